"""The claim of `byol_gn_ws`: digits learned from two views without labels, with GroupNorm and standardised weights or bare.

Both arms have the same encoder, projector and predictor; a view is the picture moved by up to three pixels, with another
contrast and noise. A linear classifier is then fitted to the features of labelled digits, in closed form.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from laconic.norm import BYOL, to_gn_ws
from laconic.tasks.small import small

STEPS, BATCH, LR, TAU = 150, 64, 1e-3, 0.98
MOVED, NOISE, RIDGE = 3, 0.3, 1e-2
WIDTH = 64


def network() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder, projector and predictor, with batch norms."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
    )  # fmt: skip
    projector = nn.Sequential(nn.Linear(288, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    predictor = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return encoder, projector, predictor


def view(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved, with another contrast, and noise."""
    down, right = (int(torch.randint(-MOVED, MOVED + 1, (), generator=generator)) for _ in range(2))
    contrast = 0.6 + 0.8 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = NOISE * torch.randn(pictures.shape, generator=generator)
    return contrast * pictures.roll((down, right), (2, 3)) + noise


def probe(features: Tensor, labels: Tensor, test: Tensor, answers: Tensor) -> float:
    """Accuracy of a ridge regression to the classes, on standardised features."""
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    x, y = ((part - mean) / deviation for part in (features.double(), test.double()))
    x, y = (torch.cat([part, torch.ones(len(part), 1)], 1) for part in (x, y))
    wanted = nn.functional.one_hot(labels).double()
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1])
    return float(((y @ torch.linalg.solve(gram, x.T @ wanted)).argmax(1) == answers).double().mean())


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy of the linear classifier on the test digits."""
    task = small("mnist-cnn", seed=seed, size=2000)
    pictures, labels = task.data["train"].columns
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = network()
    for part in parts:
        if arm == "gn_ws" and any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in part.modules()):
            to_gn_ws(part)
        elif arm == "no_norm":
            for path, module in list(part.named_modules()):
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    part.set_submodule(path, nn.Identity())
    steps = 3 if quick else STEPS
    learner = BYOL(*parts, partial(torch.optim.Adam, lr=LR), steps=steps, tau=TAU)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        learner.update(view(batch, generator), view(batch, generator))
    test, answers = task.data["test"].columns
    features, tested = (torch.cat([learner.predict(p) for p in part.split(256)]) for part in (pictures, test))
    return probe(features, labels, tested, answers)
