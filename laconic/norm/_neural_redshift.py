"""`neural_redshift`: how complex the functions are that an architecture makes, before any training.

A network f: R^2 -> R is evaluated on a grid over [-1, 1]^2, ends included, to values F (H, W). With weights **and**
biases drawn from U(-a, a) this says what the architecture prefers; with trained ones, what it became.

    fourier   C = |rfft2(F)|, C[0, 0] = 0, rows 0 .. H // 2; r = round(sqrt(i^2 + j^2)), m_r = sum of C at r, m_0 = 0
              mean frequency = sum_r r m_r / (R sum_r m_r) in [0, 1],   R the largest r
    lz        phrases of the sequential LZ78 parse of the bits F > median(F), row by row, over their number

A constant function has no spectrum: its complexity is 0. Networks of ReLUs, residual connections and layer norms make
simple functions whatever a is; sines, Gaussians and tanh grow complex with it. Nothing depends on the output's scale.

Source: "Neural Redshift: Random Networks are not Random Functions", Teney, Nicolicioiu, Hartmann, Abbasnejad, 2024,
arXiv 2403.02241. Official code: ArmandNM/neural-redshift, MIT. Its third measure, by Chebyshev polynomials, was not in
the code and is not here. Its LZ parse goes by the order of a set; ours is the sequential one.

The probe cuts a plane through the first examples of the data and compares the model on it with itself redrawn. Look at
it when choosing an activation or a norm, and beside a model that learned something simpler or wilder than it should.

Example:
    >>> import torch
    >>> from laconic.norm import complexity
    >>> wave = lambda points: torch.sin(20 * points[:, 0])
    >>> slow = lambda points: torch.sin(2 * points[:, 0])
    >>> complexity(wave, grid=64) > complexity(slow, grid=64)
    True
    >>> lz78_phrases([0, 0, 0, 0, 0, 0])
    3
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core._random import derived_seed
from laconic.core.card import Card
from laconic.core.figure import chart
from laconic.errors import BadInput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "gelu": nn.functional.gelu, "selu": torch.selu, "silu": nn.functional.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sin": torch.sin, "linear": lambda x: x,
    "gaussian": lambda x: torch.exp(-x.square() / 2),
}  # fmt: skip
CHUNK = 8192  # points of a grid that are evaluated at once
MOST_OUTPUTS = 8


# --- mathematics ------------------------------------------------------------------------------------


def grid_points(grid: int, dim: int = 2, low: float = -1.0, high: float = 1.0) -> Tensor:
    """(grid^dim, dim) points, the last coordinate running fastest, ends included."""
    line = torch.linspace(low, high, grid)
    return torch.stack(torch.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, dim)


def mean_frequency(values: Tensor) -> float:
    """Of values on a grid, one dimension or more; 0 for a constant."""
    spectrum = torch.fft.rfftn(values.double()).abs()
    for axis in range(values.ndim - 1):
        spectrum = spectrum.narrow(axis, 0, values.shape[axis] // 2 + 1)
    spectrum = spectrum.clone()
    spectrum.view(-1)[0] = 0.0
    axes = [torch.arange(size, dtype=torch.float64).square() for size in spectrum.shape]
    radius = sum(torch.meshgrid(*axes, indexing="ij")).sqrt().round()  # type: ignore[union-attr]
    total = spectrum.sum()
    # What rounding leaves of a constant's spectrum is no frequency.
    if not total > 1e-9 * values.abs().double().sum() or not radius.max() > 0:
        return 0.0
    return float((spectrum * radius).sum() / total / radius.max())


def binarize(values: Tensor) -> Tensor:
    """Values over their median, in order: (n,) of 0 and 1."""
    flat = values.flatten()
    return (flat > flat.median()).long()


def lz78_phrases(sequence: Iterable[Hashable]) -> int:
    """Phrases of the sequential parse: each is the shortest that was not one before; an unfinished last one is none."""
    known: set[tuple[int, Hashable]] = set()
    numbers: dict[tuple[int, Hashable], int] = {}
    at = 0  # the phrase that the present one goes on from; 0 is the empty one
    for symbol in sequence:
        step = (at, symbol)
        if step in known:
            at = numbers[step]
        else:
            known.add(step)
            numbers[step] = len(known)
            at = 0
    return len(known)


def complexity(fn: Callable[[Tensor], Tensor], dim: int = 2, grid: int = 300, measure: str = "fourier") -> float:
    """Of a function of points (n, dim) -> (n,) or (n, outputs), the mean over outputs.

    Args:
        fn: is called without gradients.
        dim: of its inputs.
        grid: points along each; must exceed the frequency that is looked for.
        measure: "fourier", or "lz".

    Raises:
        BadInput: an unknown measure, fewer than two points, or outputs that are none or not finite.
    """
    if measure not in ("fourier", "lz"):
        raise BadInput(f"complexity: the measure is fourier or lz, not {measure!r}")
    if grid < 2 or dim < 1:
        raise BadInput(f"complexity: grid={grid}, dim={dim}: two points and one dimension are the least")
    with torch.no_grad():
        values = torch.cat([fn(points).float() for points in grid_points(grid, dim).split(CHUNK)])
    values = values.reshape(grid**dim, -1)[:, :MOST_OUTPUTS]
    if not values.shape[1] or not bool(torch.isfinite(values).all()):
        raise BadInput("complexity: the function has no output, or one that is not finite")
    each = [_measured(column.reshape([grid] * dim), measure) for column in values.unbind(1)]
    return sum(each) / len(each)


def _measured(values: Tensor, measure: str) -> float:
    if measure == "fourier":
        return mean_frequency(values)
    return lz78_phrases(binarize(values).tolist()) / values.numel()


# --- random networks --------------------------------------------------------------------------------


class RandomNetwork(nn.Module):
    """A perceptron: (n, dims[0]) -> (n, dims[-1]).

    Args:
        dims: widths.
        activation: one of `ACTIVATIONS`.
        activation_on_last: put it after the last layer too.
        residual: add the input of each layer that keeps the width.
        norm: a layer norm before each activation.
    """

    def __init__(
        self, dims: Sequence[int], activation: str = "relu", *, activation_on_last: bool = False,
        residual: bool = False, norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        if activation not in ACTIVATIONS:
            raise BadInput(f"there is no activation {activation!r}: there are {', '.join(ACTIVATIONS)}")
        self.activation, self.activation_on_last, self.residual = activation, activation_on_last, residual
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for width in dims[1:])

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            last = i + 1 == len(self.layers)
            y = layer(x)
            if not last or self.activation_on_last:
                y = act(norm(y))
            x = x + y if self.residual and not last and x.shape == y.shape else y
        return x


@torch.no_grad()
def redraw_(module: nn.Module, amplitude: float, generator: torch.Generator, scale: str = "uniform") -> nn.Module:
    """Weights and biases of all linear and convolution layers from U(-a, a); norms stay as they are.

    Args:
        module: which is changed.
        amplitude: a.
        generator: of the draws, on the CPU.
        scale: "uniform", or "xavier": a sqrt(6 / (fan in + fan out)) for weights and biases.
    """
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if not isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) or weight is None:
            continue
        places = weight[0, 0].numel()
        fans = (weight.shape[0] + weight.shape[1]) * places
        bound = amplitude * (math.sqrt(6 / fans) if scale == "xavier" else 1.0)
        for values in (weight, part.bias):
            if values is not None:
                drawn = torch.rand(values.shape, generator=generator, dtype=torch.float32)
                values.copy_((2 * drawn - 1) * bound)
    return module


def random_network_profile(
    build: Callable[[int], nn.Module],
    amplitudes: Sequence[float],
    depths: Sequence[int],
    seeds: int = 5,
    *,
    grid: int = 96,
    measure: str = "fourier",
) -> list[dict[str, float]]:
    """Complexity of random networks: a row for each depth and amplitude, the mean over seeds.

    Args:
        build: depth -> a network of two inputs; its weights are redrawn.
        amplitudes: a of U(-a, a).
        depths: what `build` is called with.
        seeds: networks to each.
        grid, measure: see `complexity`.
    """
    rows = []
    for depth, amplitude in itertools.product(depths, amplitudes):
        found = []
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = build(depth)
            generator = torch.Generator().manual_seed(derived_seed(seed, depth))
            found.append(complexity(redraw_(network, amplitude, generator), 2, grid, measure))
        rows.append({"depth": depth, "amplitude": amplitude, "complexity": sum(found) / len(found)})
    return rows


# --- the probe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RedshiftFinding:
    """What was found.

    Attributes:
        table: rows of network ("as it is", "redrawn"), amplitude (of Xavier's), mean_frequency, lz (phrases a bit).
        cost: forward passes, points, seconds.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, float]

    def plot(self) -> str:
        """Mean frequency over amplitude, in SVG; a line as high as the model itself."""
        redrawn = [(row["amplitude"], row["mean_frequency"]) for row in self.table if row["amplitude"] is not None]
        here = self.table[0]["mean_frequency"]
        series = {"redrawn": redrawn, "as it is": [(x, here) for x, _ in redrawn]}
        return chart(series, "complexity on a plane of inputs", "amplitude, over Xavier's", "mean frequency", log=True)


class NeuralRedshift:
    """The probe: complexity of a model on the plane through three examples, as it is and with redrawn weights.

    Args:
        amplitudes: of the redrawn weights, over Xavier's.
        grid: points along each side of the plane.
        seeds: redrawn copies to each amplitude.
        seed: of the first.

    Raises:
        BadInput: no amplitude that is positive, or a grid of one point.
    """

    reads = "inputs"

    def __init__(
        self, amplitudes: Sequence[float] = (0.3, 1.0, 3.0, 10.0), grid: int = 32, seeds: int = 3, seed: int = 0
    ):
        if not amplitudes or not all(a > 0 for a in amplitudes) or grid < 2 or seeds < 1:
            raise BadInput(
                f"neural_redshift: amplitudes={amplitudes}, grid={grid}, seeds={seeds}: all must be positive"
            )
        self.amplitudes, self.grid, self.seeds, self.seed = tuple(amplitudes), grid, seeds, seed

    def __call__(self, model: nn.Module, data: Any) -> RedshiftFinding:
        """What it finds.

        Args:
            model: inputs -> values (n, ...); it runs in evaluation mode.
            data: inputs (n, ...) of floating point, three different ones at least; or a pair (inputs, labels).

        Raises:
            BadInput: the inputs are no such, or the outputs not finite.
        """
        began = time.perf_counter()
        origin, across, up = _three(data)
        self._points = 0
        table = [self._row(copy.deepcopy(model), "as it is", None, (origin, across, up))]
        for amplitude in self.amplitudes:
            rows = []
            for i in range(self.seeds):
                generator = torch.Generator().manual_seed(derived_seed(self.seed, i))
                redrawn = redraw_(copy.deepcopy(model), amplitude, generator, "xavier")
                rows.append(self._row(redrawn, "redrawn", amplitude, (origin, across, up)))
            means = {key: sum(row[key] for row in rows) / len(rows) for key in ("mean_frequency", "lz")}
            table.append({"network": "redrawn", "amplitude": amplitude, **means})
        passes = 1 + len(self.amplitudes) * self.seeds
        cost = {"networks": passes, "points": self._points, "seconds": time.perf_counter() - began}
        return RedshiftFinding(table, cost)

    @torch.no_grad()
    def _row(self, model: nn.Module, network: str, amplitude: float | None, plane: tuple) -> dict[str, Any]:
        origin, across, up = plane
        model.eval()
        held = next(iter(model.parameters()), origin)
        parts = []
        for points in grid_points(self.grid).split(256):
            u, v = ((points[:, i] + 1).view(-1, *[1] * origin.ndim) / 2 for i in (0, 1))
            parts.append(_tensor(model((origin + u * (across - origin) + v * (up - origin)).to(held.device))))
            self._points += len(points)
        values = torch.cat([part.float().cpu().flatten(1)[:, :MOST_OUTPUTS] for part in parts])
        if not bool(torch.isfinite(values).all()):
            raise BadInput(f"neural_redshift: the outputs of the model {network} are not finite")
        grids = [column.reshape(self.grid, self.grid) for column in values.unbind(1)]
        means = {
            "mean_frequency": sum(map(mean_frequency, grids)) / len(grids),
            "lz": sum(_measured(g, "lz") for g in grids) / len(grids),
        }
        return {"network": network, "amplitude": amplitude, **means}


def _three(data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The first three examples that differ."""
    x = data[0] if isinstance(data, (tuple, list)) and len(data) and isinstance(data[0], Tensor) else data
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise BadInput(
            "neural_redshift: inputs (n, ...) of floating point are needed, to lay a plane through three of them"
        )
    kept: list[Tensor] = []
    for example in x:
        if not any(torch.equal(example, other) for other in kept):
            kept.append(example)
        if len(kept) == 3:
            return kept[0], kept[1], kept[2]
    raise BadInput(f"neural_redshift: three different examples are needed, and there are {len(kept)}")


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


CARD = Card(
    id="neural_redshift",
    title="Neural Redshift: Random Networks are not Random Functions",
    authors="Teney, Nicolicioiu, Hartmann, Abbasnejad",
    year=2024,
    source="arXiv 2403.02241",
    family="norm",
    summary="Measures how complex a network's function is, as it is and with random weights: mean frequency and LZ78.",
    objects={"NeuralRedshift": "Probe"},
    use="To choose an activation, a norm or a scale of initial weights by the functions that they prefer.",
    avoid="As a measure of what a network of many inputs does off the plane that is looked at.",
    composes=("weight_standardization",),
    vectors=("neural_redshift",),
    code="github.com/ArmandNM/neural-redshift, MIT",
    claim={
        "text": "Random networks of ReLUs stay simple as weights grow, where those of tanh do not: from amplitude 0.3 to "
        "10 the mean frequency rises by more than a twentieth less.",
        "metric": "rise of the mean frequency from amplitude 0.3 to 10",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("tanh", "relu"),
        "seeds": 5,
        "minutes": 2,
        "task": "random networks",
    },
)
