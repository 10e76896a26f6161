"""The claim of `rotate`: a character model with planted outliers, weights and inputs of its linear layers in 4 bits.

Both arms train the same transformer with a gated perceptron. Then, in each layer, two rows of `up` are multiplied by 30 and
the columns of `down` that read them divided by 30, and so one channel of the values and its column of the output layer:
nothing of the function changes. One arm rotates before both are rounded, weights by row and inputs by token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.numerics import Int, Scale, Scheme, fake_quantize
from laconic.quant import rotate
from laconic.tasks.small import small
from laconic.zoo import LlamaLM, LlamaLMConfig

WINDOWS, FACTOR = 4000, 30.0
WEIGHTS, INPUTS = Scheme(Int(4), Scale("channel")), Scheme(Int(4), Scale("token"), zero="int")


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaLM(LlamaLMConfig(len(task.alphabet) + 1, width=64, layers=2, heads=4, hidden=160))
    task.train(model, seed)
    plant(model.eval(), torch.Generator().manual_seed(seed))
    if arm == "rotated":
        rotate(model, ((task.data["train"].columns[0][:2],), {}), heads=True, seed=seed)
    in_four_bits(model)
    return task.evaluate(model).value


@torch.no_grad()
def plant(model: LlamaLM, generator: torch.Generator) -> None:
    """Outliers in the inputs of layers that write to the stream; the function stays."""
    for layer in model.layers:
        mixer, inner = layer.attention.branch, layer.perceptron.branch
        for writer, reader, count in ((inner.up, inner.down, 2), (mixer.v, mixer.o, 1)):
            chosen = torch.randperm(len(writer.weight), generator=generator)[:count]
            writer.weight[chosen] *= FACTOR
            reader.weight[:, chosen] /= FACTOR


def in_four_bits(model: nn.Module) -> None:
    """Round weights, and inputs as they come; the head stays."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "head":
            layer.weight.data = fake_quantize(layer.weight.detach(), WEIGHTS, path)
            layer.register_forward_pre_hook(lambda _, args: (by_token(args[0]), *args[1:]))


def by_token(x: Tensor) -> Tensor:
    """Each vector of x in 4 bits and back."""
    return fake_quantize(x.reshape(-1, x.shape[-1]), INPUTS).view_as(x)
