"""The claim of `bss`: contrastive features of digits in several styles, for a style that was never seen.

A style is a slope of light across the picture, a brightness and a contrast. Both arms train the same encoder by SimCLR
on pictures in three styles; they differ in whose low frequencies a view gets: one picture's for the whole view, or a
random picture's for each. A linear classifier of the features is fitted on the three styles and tested on the fourth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.norm import BatchStyleStandardization
from laconic.tasks.small import small

# (slope down, slope right, brightness, contrast) of each style; the last is not trained on.
STYLES = ((0.5, 0.0, 0.1, 0.5), (0.0, 0.5, 0.0, 0.6), (-0.4, 0.0, 0.5, 0.4), (0.0, -0.4, 0.45, -0.4))
STEPS, BATCH, LR, TEMPERATURE = 120, 64, 2e-3, 0.3
RATIO, MOVED, NOISE, RIDGE = (0.0, 0.1), 2, 0.05, 1e-2
SIDE, WIDTH = 28, 64


def styled(pictures: Tensor, style: Tensor) -> Tensor:
    """Pictures in [0, 1] (N, 1, SIDE, SIDE), each in the style of its number (N,)."""
    down, right, brightness, contrast = torch.tensor(STYLES)[style].T[:, :, None, None, None]
    slope = torch.linspace(-0.5, 0.5, SIDE)
    return (brightness + contrast * pictures + down * slope[:, None] + right * slope).clamp(0, 1)


def encoder() -> nn.Sequential:
    """Two convolutions with batch norms: (N, 1, SIDE, SIDE) -> (N, 288)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
    )  # fmt: skip


def contrast_loss(first: Tensor, second: Tensor) -> Tensor:
    """SimCLR's: each view is to find the other view of its picture among all views."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    scores = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    count = len(first)
    return F.cross_entropy(scores, torch.cat([torch.arange(count) + count, torch.arange(count)]))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of the linear classifier in the unseen style."""
    task = small("mnist-cnn", seed=seed, size=2000)
    generator = torch.Generator().manual_seed(seed)
    (pictures, labels), (tested, answers) = task.data["train"].columns, task.data["test"].columns
    low, high = pictures.min(), pictures.max()
    pictures, tested = (pictures - low) / (high - low), (tested - low) / (high - low)
    seen = styled(pictures, torch.randint(len(STYLES) - 1, (len(pictures),), generator=generator))
    unseen = styled(tested, torch.full((len(tested),), len(STYLES) - 1))
    transform = BatchStyleStandardization(RATIO, per_image=arm == "fourier_augmentation")

    def view(batch: Tensor) -> Tensor:
        shifts = [int(torch.randint(-MOVED, MOVED + 1, (), generator=generator)) for _ in range(2)]
        moved = transform(batch, generator=generator).roll(shifts, (2, 3))
        return moved + NOISE * torch.randn(batch.shape, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, head = encoder(), nn.Sequential(nn.Linear(288, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=LR)
    for _ in range(3 if quick else STEPS):
        batch = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        contrast_loss(head(network(view(batch))), head(network(view(batch)))).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        x, y = (torch.cat([network(p) for p in part.split(256)]).double() for part in (seen, unseen))
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, y = (torch.cat([(part - mean) / deviation, torch.ones(len(part), 1)], 1) for part in (x, y))
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1])
    found = (y @ torch.linalg.solve(gram, x.T @ F.one_hot(labels).double())).argmax(1)
    return float((found == answers).double().mean())
