"""The claim of `simq_nas`: an elastic perceptron on digits, its depth, widths and bits searched with 150 measurements.

One network is trained so that any number of its layers and of each layer's first units works. A measurement is the
accuracy on the validation rows and the bytes of a sub-network, its layers rounded to their bits. The arms choose what is
measured by predictors, or draw it; what counts is the share of the unit square (accuracy, bytes saved) that is dominated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.numerics import fake_quantize
from laconic.quant import Linas, bit_choices, hypervolume
from laconic.quant._rounded import scheme_of
from laconic.search import Space
from laconic.tasks.small import small

MEASUREMENTS, POPULATION, INNER, STEPS = 150, 30, 3000, 600
DEPTHS, WIDTHS, BITS = (1, 2, 3, 4), (8, 16, 32, 64), (2, 3, 4, 8)
LAYERS = max(DEPTHS)
SPACE = Space(
    {"depth": DEPTHS}
    | {f"width of {i}": WIDTHS for i in range(LAYERS)}
    | bit_choices([*map(str, range(LAYERS)), "head"], BITS)
)


def dead(values: Mapping[str, Any]) -> list[str]:
    """Decisions about layers beyond the depth."""
    return [f"{what} of {i}" for i in range(values["depth"], LAYERS) for what in ("width", "bits")]


class Elastic(nn.Module):
    """Layers of 64 units whose first ones work alone: (n, 64) -> (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(64, WIDTHS[-1]) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTHS[-1], 10)

    def parts(self, values: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, int]]:
        """Weight, bias and bits of each layer of a sub-network."""
        widths = [64, *(values[f"width of {i}"] for i in range(values["depth"]))]
        found = [
            (layer.weight[:b, :a], layer.bias[:b], values[f"bits of {i}"])
            for i, (layer, a, b) in enumerate(zip(self.hidden, widths, widths[1:], strict=False))
        ]
        return [*found, (self.head.weight[:, : widths[-1]], self.head.bias, values["bits of head"])]

    @staticmethod
    def run(x: Tensor, parts: list[tuple[Tensor, Tensor, int]], rounded: bool) -> Tensor:
        """Logits of a sub-network."""
        for i, (weight, bias, bits) in enumerate(parts):
            w = fake_quantize(weight, scheme_of(bits)) if rounded else weight
            x = F.linear(x if i == 0 else F.relu(x), w, bias)
        return x


def trained(task: Any, seed: int, steps: int) -> Elastic:
    """The network after steps on the whole and on a drawn sub-network each."""
    torch.manual_seed(seed)
    model, generator = Elastic(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = task.data["train"].columns
    whole = SPACE.values(tuple(size - 1 for size in SPACE.sizes))
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        for values in (whole, SPACE.values(SPACE.sample(generator))):
            F.cross_entropy(model.run(x[rows], model.parts(values), rounded=False), y[rows]).backward()
        optimizer.step()
    return model


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Dominated share of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed)
    model = trained(task, seed, 5 if quick else STEPS)
    x, y = task.data["validate"].columns

    def size(values: Mapping[str, Any]) -> int:
        return sum(w.numel() * bits + b.numel() * 32 for w, b, bits in model.parts(values))

    largest = size(SPACE.values(tuple(n - 1 for n in SPACE.sizes)))

    @torch.no_grad()
    def measure(candidate: tuple[int, ...]) -> tuple[float, float]:
        values = SPACE.values(candidate)
        right = model.run(x, model.parts(values), rounded=True).argmax(1) == y
        return right.double().mean().item(), 1 - size(values) / largest

    measurements = 40 if quick else MEASUREMENTS
    search = Linas(SPACE, seed, population=POPULATION, inner_evaluations=60 if quick else INNER, dead=dead)
    points: list[tuple[float, float]] = []
    generator = torch.Generator().manual_seed(seed)
    while len(points) < measurements:
        batch = search.ask() if arm == "linas" else [SPACE.sample(generator)]
        for candidate in batch[: measurements - len(points)]:
            points.append(measure(candidate))
            search.tell(candidate, points[-1])
    return hypervolume(points, (0.0, 0.0))
