"""Rounding to nearest: the same by chunks of rows as at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.numerics import Int, NotFinite, Scale, Scheme, affine_params, quantize
from laconic.quant import RTN, round_to_nearest
from laconic.testing import Example


def _network(g: torch.Generator) -> list:
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16)).eval()
    for p in model.parameters():
        nn.init.normal_(p, generator=g)
    return [model, torch.randint(0, 40, (3, 5), generator=g)]


def _only_small() -> tuple:
    return nn.Sequential(nn.Linear(4, 4)).eval(), [torch.randn(2, 4)], "0.weight"


EXAMPLES = [
    Example(
        lambda: RTN("v1/int8/group16/float16/minmax/zint/nearest"), kind="Pass", inputs=_network,
        stated={"bound": 0.02, "refused": _only_small},
    )
]  # fmt: skip

SHARES = [Scale("tensor"), Scale("channel", rule="mse"), Scale("group", 5, "float16", rule="percentile")]


@pytest.mark.parametrize("zero", ["none", "int", "real"])
@pytest.mark.parametrize("scale", SHARES, ids=lambda s: s.granularity)
def test_chunks_change_nothing(scale: Scale, zero: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(11, 13, generator=torch.Generator().manual_seed(0)).bfloat16()
    scheme = Scheme(Int(3), scale, zero)
    whole = round_to_nearest(W, scheme)
    want = affine_params(W, scheme)
    assert torch.equal(whole.codes, quantize(W, *want, scheme))
    assert torch.equal(whole.scale, want[0])
    D = whole.dequantize(scheme) - W.float()
    assert whole.loss == pytest.approx(float(D.square().sum()), rel=1e-5)
    monkeypatch.setattr("laconic.quant._rtn.CHUNK", 30)
    parts = round_to_nearest(W, scheme)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scale, whole.scale)
    assert zero == "none" or torch.equal(parts.zero, whole.zero)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("scale", SHARES, ids=lambda s: s.granularity)
def test_empty_matrices(shape: tuple[int, int], scale: Scale) -> None:
    solved = round_to_nearest(torch.empty(shape), Scheme(Int(4), scale, "int"))
    assert solved.codes.shape == shape and solved.loss == 0
    assert solved.dequantize(Scheme(Int(4), scale, "int")).shape == shape


def test_nan_in_a_late_chunk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.quant._rtn.CHUNK", 8)
    W = torch.zeros(10, 4)
    W[9, 3] = torch.nan
    with pytest.raises(NotFinite, match=r"embed\.weight: 1 nan"):
        round_to_nearest(W, Scheme(Int(4)), "embed.weight")
