"""The claim of `awq`: a character model with the weights of its linear layers in 3 bits, a scale for each 32.

Both arms train the same model and round the same weights. The arm "awq" scales them first, and clips ranges of all but
queries, keys and values, by what 8,192 characters of the training part show.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.numerics import Int, Scale, Scheme, fake_quantize
from laconic.quant import AWQ, Hessian, clipped_round
from laconic.tasks.small import small

WINDOWS, CALIBRATION = 4000, 128
SCHEME = Scheme(Int(3), Scale("group", group=32, dtype="float16"), zero="int")


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    model = task.model(seed)
    task.train(model, seed)
    model.eval()
    windows = task.data["train"].columns[0][:CALIBRATION]
    if arm == "awq":
        structure = Structure.build(model, ((windows[:2],), {}))
        run_pass(AWQ(SCHEME), Context(model, structure, hessians=moments(model, windows), seed=seed))
    hessians = moments(model, windows)
    for path, layer in linears(model).items():
        weight = layer.weight.detach()
        if arm == "awq" and not path.endswith("qkv"):
            rounded = clipped_round(weight, hessians[path].matrix, SCHEME, path).dequantize(SCHEME)
        else:
            rounded = fake_quantize(weight, SCHEME, path)
        layer.weight.data = rounded
    return task.evaluate(model).value


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Path -> layer."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def moments(model: nn.Module, windows: Tensor) -> dict[str, Hessian]:
    """Path -> second moment of the inputs of every linear layer."""
    found = {path: Hessian.of(layer) for path, layer in linears(model).items()}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, path=path: found[path].add(args[0]))
        for path, layer in linears(model).items()
    ]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return found
