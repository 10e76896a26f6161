"""Scale tuning and coordinate descent: the optimum where it is known, and never a step back."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from laconic.numerics import Int, Scale, Scheme, dequantize
from laconic.quant import Solved, gptq_matrix, output_error, refine_codes, round_to_nearest, tune, tune_scales

SHARES = [("tensor", None), ("channel", None), ("group", 8), ("group", 7)]


def problem(rows: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * k, k, generator=generator) @ torch.randn(k, k, generator=generator) + 0.5
    return torch.randn(rows, k, generator=generator), x.T @ x / k


def error(W: Tensor, H: Tensor, solved: Solved, scheme: Scheme) -> float:
    return output_error(W - solved.dequantize(scheme), H)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5),
    st.sampled_from(SHARES),
    st.sampled_from(["none", "int", "real"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(0, 99),
)
def test_never_worse_and_honest(
    bits: int, share: tuple, zero: str, dtype: str, rows: int, k: int, seed: int
) -> None:
    W, H = problem(rows, k, seed)
    scheme = Scheme(Int(bits), Scale(*share, dtype), zero)
    start = round_to_nearest(W, scheme)
    tuned = tune_scales(W, H, start.codes, start.scale, start.zero, scheme)
    near = dict(rel=1e-3, abs=1e-5 * output_error(W, H))
    assert tuned.scale.dtype == start.scale.dtype and tuned.scale.shape == start.scale.shape
    assert tuned.after <= tuned.before == pytest.approx(error(W, H, start, scheme), **near)
    assert tuned.after == pytest.approx(error(W, H, replace(start, scale=tuned.scale), scheme), **near)
    refined, before, after = refine_codes(W, H, start, scheme, sweeps=2)
    assert after <= before == pytest.approx(error(W, H, start, scheme), **near)
    assert after == pytest.approx(error(W, H, refined, scheme), **near)
    assert int(refined.codes.max()) < 2**bits
    both = tune(W, H, start, scheme)
    assert both.loss * 2 <= min(tuned.before, before) * (1 + 1e-6)
    assert both.loss * 2 == pytest.approx(error(W, H, both, scheme), **near)


@pytest.mark.parametrize("share", SHARES)
def test_the_scales_are_the_least_squares_solution(share: tuple) -> None:
    """Against torch.linalg.lstsq on the square root of H, row by row (or all at once)."""
    W, H = problem(4, 24)
    scheme = Scheme(Int(3), Scale(*share), "int")
    start = round_to_nearest(W, scheme)
    tuned = tune_scales(W, H, start.codes, start.scale, start.zero, scheme, ridge=0.0)
    root = torch.linalg.cholesky(H.double()).T  # H = root^T root
    v = dequantize(start.codes, torch.ones_like(start.scale), start.zero, scheme).double()
    width = share[1] or 24
    if share[0] == "tensor":
        want = torch.linalg.lstsq((v @ root.T).reshape(-1, 1), (W.double() @ root.T).reshape(-1, 1)).solution
        torch.testing.assert_close(tuned.scale.double(), want, rtol=1e-4, atol=1e-5)
        return
    member = torch.nn.functional.one_hot(torch.arange(24) // width).double()
    for r in range(4):
        want = torch.linalg.lstsq(root @ (v[r][:, None] * member), root @ W[r].double()).solution
        torch.testing.assert_close(tuned.scale[r].double(), want, rtol=1e-3, atol=1e-4)


def test_groups_without_codes_keep_their_scale() -> None:
    W, H = problem(3, 16)
    W[:, :8] = 0
    scheme = Scheme(Int(4), Scale("group", 8), "int")
    start = round_to_nearest(W, scheme)
    tuned = tune_scales(W, H, start.codes, start.scale, start.zero, scheme)
    assert torch.equal(tuned.scale[:, 0], torch.ones(3))


def test_coordinate_descent_ends_where_no_single_step_helps() -> None:
    W, H = problem(3, 12)
    scheme = Scheme(Int(3), Scale("group", 4), "int")
    done, _, best = refine_codes(W, H, round_to_nearest(W, scheme), scheme, sweeps=50)
    for r in range(3):
        for j in range(12):
            for code in range(8):
                codes = done.codes.clone()
                codes[r, j] = code
                assert error(W, H, replace(done, codes=codes), scheme) >= best * (1 - 1e-5)


@pytest.mark.parametrize("k", [60, 300])
def test_it_improves_gptq(k: int) -> None:
    W, H = problem(16, k)
    scheme = Scheme(Int(2), Scale("group", 16, "float16"), "int")
    start = gptq_matrix(W, H, scheme)
    assert 2 * tune(W, H, start, scheme).loss < 0.95 * error(W, H, start, scheme)


def test_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(7, 20)
    for share in SHARES:
        scheme = Scheme(Int(3), Scale(*share), "int")
        start = round_to_nearest(W, scheme)
        whole = tune_scales(W, H, start.codes, start.scale, start.zero, scheme)
        with monkeypatch.context() as patch:
            patch.setattr("laconic.quant._scale_tuning.CHUNK", 40)
            parts = tune_scales(W, H, start.codes, start.scale, start.zero, scheme)
            refine_codes(W, H, start, scheme)
        torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-3, atol=1e-5)


def test_refused_and_empty() -> None:
    W, H = problem(3, 16)
    scheme = Scheme(Int(4), Scale("group", 4), "int")
    scattered = gptq_matrix(W, H, scheme, act_order=True)
    with pytest.raises(ValueError, match="runs of columns"):
        refine_codes(W, H, scattered, scheme)
    empty = round_to_nearest(W[:0], scheme)
    tuned = tune_scales(W[:0], H, empty.codes, empty.scale, empty.zero, scheme)
    assert tuned.scale.shape == (0, 4) and tuned.before == tuned.after == 0
