"""The claim of `td_ln`: a small network that removes noise from digits, told the noise level by two kinds of norms.

Both arms have the same residual blocks, and predict the noise in z = sqrt(a) x + sqrt(1 - a) noise with
log_snr = log(a / (1 - a)) uniform. adaLN-Zero gets scale, shift and gate of each block from an embedding of log_snr.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.norm import TimeDependentLayerNorm, at_time
from laconic.tasks.small import small

PIXELS, WIDTH, BLOCKS, CONDITION = 64, 64, 3, 64
LOW, HIGH = -6.0, 6.0
STEPS, BATCH, LR = 800, 64, 2e-3


class TimeDependentBlock(nn.Module):
    """x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = TimeDependentLayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class AdaptiveBlock(nn.Module):
    """x + gate mlp((1 + scale) norm(x) + shift); scale, shift and gate are linear in the condition, 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Linear(CONDITION, 3 * WIDTH)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(F.silu(condition)).chunk(3, -1)
        return x + gate * self.mlp((1 + scale) * self.norm(x) + shift)


class Denoiser(nn.Module):
    """(n, 64) and log_snr (n,) -> the noise (n, 64). The time also comes in by an embedding that is added."""

    def __init__(self, block: type[nn.Module]):
        super().__init__()
        self.read, self.write = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, PIXELS)
        self.embed = nn.Sequential(nn.Linear(CONDITION, CONDITION), nn.SiLU(), nn.Linear(CONDITION, CONDITION))
        self.blocks = nn.ModuleList(block() for _ in range(BLOCKS))

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor:
        angles = log_snr[:, None] * torch.exp(torch.linspace(0, math.log(0.05), CONDITION // 2))
        condition = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.read(z) + condition
        for block in self.blocks:
            x = block(x, condition)
        return self.write(x)


def loss(model: nn.Module, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean square of what is wrong in the predicted noise."""
    log_snr = LOW + (HIGH - LOW) * torch.rand(len(pixels), generator=generator)
    share = torch.sigmoid(log_snr)[:, None]
    noise = torch.randn(pixels.shape, generator=generator)
    z = share.sqrt() * (2 * pixels - 1) + (1 - share).sqrt() * noise
    if any(isinstance(module, TimeDependentLayerNorm) for module in model.modules()):
        with at_time(model, log_snr):
            return F.mse_loss(model(z, log_snr), noise)
    return F.mse_loss(model(z, log_snr), noise)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Log of the loss on the test digits of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed)
    train, test = (task.data[split].columns[0] for split in ("train", "test"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Denoiser(TimeDependentBlock if arm == "td_ln" else AdaptiveBlock)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5 if quick else STEPS):
        chosen = torch.randint(len(train), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model, train[chosen], generator).backward()
        optimizer.step()
    with torch.no_grad():
        same = torch.Generator().manual_seed(0)  # noise that is the same for both arms and all seeds
        return math.log(float(loss(model.eval(), test.repeat(4, 1), same)))
