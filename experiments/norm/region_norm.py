"""The claim of `region_norm`: filling a hole in a digit, with batch norms or region norms in a small network.

Both arms see the picture with its hole at the mean value, and the mask; they are trained to the L1 error of the whole
picture, on the same pictures and holes. A hole is a square of 8 to 14 pixels at a random place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.norm import RegionNormB, RegionNormL
from laconic.tasks.small import small

SIDE, WIDTH, SMALLEST, LARGEST = 28, 16, 8, 14
STEPS, BATCH, LR = 200, 32, 3e-3


class Filler(nn.Module):
    """Two convolutions down, one dilated, one up: (picture, mask) -> picture."""

    def __init__(self, regions: bool):
        super().__init__()
        self.regions = regions
        self.down1, self.down2 = nn.Conv2d(2, WIDTH, 5, padding=2), nn.Conv2d(WIDTH, WIDTH, 4, 2, 1)
        self.middle, self.up = (
            nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2),
            nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1),
        )
        self.out = nn.Conv2d(WIDTH, 1, 3, padding=1)
        known = RegionNormB if regions else nn.BatchNorm2d
        found = RegionNormL if regions else nn.BatchNorm2d
        self.norms = nn.ModuleList([known(WIDTH), known(WIDTH), found(WIDTH), found(WIDTH)])

    def forward(self, picture: Tensor, hole: Tensor) -> Tensor:
        given = (hole,) if self.regions else ()
        x = F.relu(self.norms[0](self.down1(torch.cat([picture, hole], 1)), *given))
        x = F.relu(self.norms[1](self.down2(x), *given))
        x = F.relu(self.norms[2](self.middle(x)))
        return self.out(F.relu(self.norms[3](self.up(x))))


def holes(count: int, generator: torch.Generator) -> Tensor:
    """(count, 1, SIDE, SIDE), 1 in the hole."""
    mask = torch.zeros(count, 1, SIDE, SIDE)
    for plane in mask[:, 0]:
        side = int(torch.randint(SMALLEST, LARGEST + 1, (), generator=generator))
        top, left = (int(torch.randint(SIDE - side + 1, (), generator=generator)) for _ in range(2))
        plane[top : top + side, left : left + side] = 1
    return mask


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Log of the mean L1 error over the holes of the test pictures."""
    task = small("mnist-cnn", seed=seed, size=2000)
    pictures, test = task.data["train"].columns[0], task.data["test"].columns[0][:512]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Filler(arm == "region_norm")
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(3 if quick else STEPS):
        batch = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        hole = holes(BATCH, generator)
        optimizer.zero_grad()
        (model(batch * (1 - hole), hole) - batch).abs().mean().backward()
        optimizer.step()
    model.eval()
    hole = holes(len(test), torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = zip(test.split(BATCH), hole.split(BATCH), strict=True)
        error = sum(float(((model(x * (1 - m), m) - x).abs() * m).sum()) for x, m in parts)
    return math.log(error / float(hole.sum()))
