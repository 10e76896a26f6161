"""The claim of `mambaquant`: a Mamba character model with planted outliers, weights and inputs in 4 bits.

Both arms train the same model of two blocks. Then three gates of each mixer are multiplied by 30 (rows of the gate, with the
gate's scale 1 / 30, and columns of the last layer / 30), which changes nothing of the function. One arm turns stream, steps
and inputs by Hadamard matrices, the other by KLT rotations after smoothing. Then weights are rounded by row, inputs by token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.nn.mamba import MambaBlock
from laconic.numerics import Int, Scale, Scheme, fake_quantize
from laconic.quant import MambaQuant, calibrate_mamba
from laconic.tasks.small import small

WINDOWS, CALIBRATION, FACTOR, PLANTED, WIDTH = 1200, 32, 30.0, 3, 64
WEIGHTS, INPUTS = Scheme(Int(4), Scale("channel")), Scheme(Int(4), Scale("token"), zero="int")


class Characters(nn.Module):
    """ids (N, L) -> logits of what follows each."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.table = nn.Embedding(vocabulary, WIDTH)
        nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.ModuleList(MambaBlock(WIDTH, d_state=8) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=32 if quick else WINDOWS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Characters(len(task.alphabet) + 1)
    task.train(model, seed)
    plant(model.eval(), torch.Generator().manual_seed(seed))
    windows = task.data["train"].columns[0][: 4 if quick else CALIBRATION]
    structure = Structure.build(model, ((windows[:2, :4],), {}), how="hooks")
    statistics = calibrate_mamba(model, [windows]) if arm == "mambaquant" else None
    run_pass(MambaQuant(statistics), Context(model, structure, seed=seed))
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "head":
            layer.weight.data = fake_quantize(layer.weight.detach(), WEIGHTS, path)
            layer.register_forward_pre_hook(lambda _, args: (by_token(args[0]),))
    return task.evaluate(model).value


@torch.no_grad()
def plant(model: Characters, generator: torch.Generator) -> None:
    """Large gates; the function stays."""
    for block in model.blocks:
        mixer = block.mixer
        chosen = torch.randperm(mixer.inner, generator=generator)[:PLANTED]
        mixer.in_proj.weight[mixer.inner + chosen] *= FACTOR
        mixer.gate_scale[chosen] /= FACTOR
        mixer.out_proj.weight[:, chosen] /= FACTOR


def by_token(x: Tensor) -> Tensor:
    """Each vector of x in 4 bits and back."""
    return fake_quantize(x.reshape(-1, x.shape[-1]), INPUTS).view_as(x)
