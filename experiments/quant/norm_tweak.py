"""The claim of `norm_tweak`: a character model, its blocks' linear layers in 2 bits by GPTQ, groups of 32.

Both arms train the same model and round its blocks one after the other by GPTQ, on 128 texts that the model wrote itself. The
arm "gptq_and_tweaked_norms" trains the norms of each block before the next is rounded: one pass over these texts.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from laconic.core.structure import Structure
from laconic.core.synthesis import generated_text
from laconic.numerics import Int, Scale, Scheme
from laconic.quant import Hessian, gptq_matrix, norm_tweak
from laconic.tasks.small import small

WINDOWS, TEXTS, BATCH = 4000, 128, 1
RATE = 1e-4  # the largest of the paper's grid
SCHEME = Scheme(Int(2), Scale("group", group=32, dtype="float16"), zero="int")


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    model.eval()
    length = task.data["train"].columns[0].shape[1]
    count = 4 if quick else TEXTS
    texts = generated_text(model, count, length, first_tokens=range(1, len(task.alphabet) + 1), batch=count, seed=seed)
    structure = Structure.build(model, ((texts[:2],), {}))

    def quantize(path: str, block: nn.Module) -> None:
        """The block's linear layers in order, each by what it reads in the model as it is by then."""
        for layer in (module for module in block.modules() if isinstance(module, nn.Linear)):
            found = Hessian.of(layer)
            handle = layer.register_forward_pre_hook(lambda module, args, found=found: found.add(args[0]))
            with torch.no_grad():
                model(texts)
            handle.remove()
            layer.weight.data = _rounded(layer.weight.detach(), found, path)

    tweaked = arm == "gptq_and_tweaked_norms"
    norm_tweak(
        model, [texts], structure, quantize, teacher=copy.deepcopy(model), lr=RATE, iters=int(tweaked), batch=BATCH,
        seed=seed,
    )  # fmt: skip
    return task.evaluate(model).value


def _rounded(weight: Tensor, hessian: Hessian, name: str) -> Tensor:
    return gptq_matrix(weight, hessian.matrix, SCHEME, name=name).dequantize(SCHEME)
