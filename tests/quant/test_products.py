"""The switch to faster products: never less than float32, and put back whatever happens."""

from __future__ import annotations

import pytest
import torch

from laconic.quant import _products, fast_products


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_products_stay_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 257, generator=generator), torch.randn(257, 165, generator=generator)
    with fast_products():
        got = a @ b
    size = a.double().abs() @ b.double().abs()
    assert bool(((got - a.double() @ b.double()).abs() <= 1e-6 * size).all())


def test_the_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "_still_float32", lambda: True)
    before = precision()
    with fast_products():
        assert precision() == "bf16"
        with fast_products():
            pass
        assert precision() == "bf16"  # the outer block still stands
    assert precision() == before
    with pytest.raises(RuntimeError, match="no"), fast_products():
        raise RuntimeError("no")
    assert precision() == before


@pytest.mark.parametrize("lost", [True, False])
def test_nothing_changes_where_digits_would_be_lost(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that rounds, or without the library."""
    before = precision()
    if lost:
        monkeypatch.setattr(_products, "_still_float32", lambda: False)
    else:
        monkeypatch.setattr(_products, "_options", lambda: None)
    with fast_products():
        assert precision() == before
