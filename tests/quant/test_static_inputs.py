"""`InputRange` against a search over the values themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laconic.quant import InputRange


def error(x: Tensor, scale: float) -> float:
    """Mean square of what 8 bits at a scale make of x."""
    return float((x - (x / scale).round().clamp(-127, 127) * scale).square().double().mean())


def seen(*batches: Tensor) -> InputRange:
    found = InputRange()
    for batch in batches:
        found.add(batch)
    return found


@pytest.mark.parametrize("tails", ["uniform", "normal", "heavy", "one outlier"])
def test_the_least_error_is_found(tails: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40_000, generator=g) if tails == "uniform" else torch.randn(40_000, generator=g)
    if tails == "heavy":
        x = x / torch.rand(40_000, generator=g).clamp_min(1e-3)
    if tails == "one outlier":
        x[7] = 300.0
    got = error(x, seen(x).scale())
    points = [float(x.abs().max()) * i / 400 / 127 for i in range(1, 401)]
    assert got <= 1.02 * min(error(x, scale) for scale in points)
    if tails in ("normal", "heavy"):
        assert got < error(x, float(x.abs().max()) / 127), "clipping pays"


def test_batches_in_any_order_and_of_any_size() -> None:
    small, large = torch.randn(300), 40 * torch.randn(7, 50)
    scales = [
        seen(small, large).scale(),
        seen(large, small).scale(),
        seen(torch.zeros(5), small, torch.empty(0, 4), large).scale(),
    ]
    x = torch.cat([small, large.reshape(-1)])
    best = seen(x).scale()
    for scale in scales:
        assert error(x, scale) <= 1.05 * error(x, best)
    assert seen(small.half()).scale() == pytest.approx(seen(small).scale(), rel=0.02)


def test_nothing_but_zeros_and_what_is_not_finite() -> None:
    assert InputRange().scale() == 1.0
    assert seen(torch.zeros(9)).scale() == 1.0
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            seen(torch.tensor([1.0, bad]))
