"""Solving what shares inputs together: as good as alone, honest about its loss, and careful with its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.numerics import Int, NotFinite, Scale, Scheme
from laconic.quant import Hessian, Matrix, gptq_matrix, output_error, round_to_nearest, solve_calibrated, tune_scales

GROUPED = Scale("group", 16, "float16")


def inputs(tokens: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5 + 0.3


def collected(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def weights(rows: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("zero", ["none", "int", "real"])
@pytest.mark.parametrize("share", [Scale("tensor"), Scale("channel"), GROUPED, Scale("group", 7)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_loss_is_that_of_what_is_stored(bits: int, share: Scale, zero: str) -> None:
    scheme = Scheme(Int(bits), share, zero)
    hessian = collected(inputs(300, 48))
    H = hessian.matrix
    matrices = [Matrix("q", weights(12, 48), scheme), Matrix("k", weights(5, 48, 2), scheme)]
    found = solve_calibrated(matrices, hessian)
    assert [c.name for c in found] == ["q", "k"]
    for matrix, got in zip(matrices, found, strict=True):
        W = matrix.W
        assert got.solved.codes.shape == W.shape and got.solved.g_idx is None
        assert got.solved.scale.shape == scheme.tensors(*W.shape)["scale"][1]
        error = output_error(W - got.solved.dequantize(scheme), H)
        assert got.loss == pytest.approx(error / output_error(W, H), rel=1e-3)
        assert 2 * got.solved.loss == pytest.approx(error, rel=1e-3)
        plain = round_to_nearest(W, scheme)
        assert error < 0.8 * output_error(W - plain.dequantize(scheme), H)


@pytest.mark.parametrize("bits", [2, 4])
def test_together_is_as_good_as_alone(bits: int) -> None:
    H = collected(inputs(300, 64)).matrix
    scheme = Scheme(Int(bits), GROUPED, "int")
    other = Scheme(Int(bits), Scale("channel"), "none")
    matrices = [Matrix(f"m{i}", weights(8, 64, i), s) for i, s in enumerate((scheme, other, scheme))]
    together = solve_calibrated(matrices, H)
    for matrix, got in zip(matrices, together, strict=True):
        (alone,) = solve_calibrated([matrix], H)
        assert got.loss == pytest.approx(alone.loss, rel=0.02)  # ties of float32 sums
        assert (got.solved.codes != alone.solved.codes).float().mean() < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_repair_takes_from_the_error_of_gptq(bits: int) -> None:
    W, H = weights(16, 96), collected(inputs(400, 96)).matrix
    scheme = Scheme(Int(bits), GROUPED, "int")
    (got,) = solve_calibrated([Matrix("w", W, scheme)], H)
    plain = gptq_matrix(W, H, scheme.with_(rule="mse"), act_order=True, static_groups=True)
    assert got.loss * output_error(W, H) < 0.97 * output_error(W - plain.dequantize(scheme), H)


def test_a_grouped_convolution_has_a_hessian_for_each_group() -> None:
    H = torch.stack([collected(inputs(200, 18, seed)).matrix for seed in (0, 1)])
    scheme = Scheme(Int(4), Scale("channel"), "int")
    W = weights(6, 18)
    (got,) = solve_calibrated([Matrix("conv", W, scheme)], H)
    D, above, below = W - got.solved.dequantize(scheme), 0.0, 0.0
    for w, d, h in zip(W.chunk(2), D.chunk(2), H, strict=True):
        above, below = above + output_error(d, h), below + output_error(w, h)
    assert got.loss == pytest.approx(above / below, rel=1e-3)
    with pytest.raises(ValueError, match="conv: 5 rows are not 2 equal groups"):
        solve_calibrated([Matrix("conv", W[:5], scheme)], H)
    with pytest.raises(ValueError, match="conv: .* use a scale per channel"):
        solve_calibrated([Matrix("conv", W, Scheme(Int(4), Scale("tensor")))], H)


def test_weights_and_matrices_are_left_alone_in_any_type_and_order() -> None:
    H = collected(inputs(200, 32)).matrix
    scheme = Scheme(Int(4), GROUPED, "int")
    stored = weights(32, 10).bfloat16()  # (in, out), as GPT-2 has it
    kept = stored.clone(), H.clone()
    (got,) = solve_calibrated([Matrix("w", stored.T, scheme)], H)
    assert torch.equal(stored, kept[0]) and torch.equal(H, kept[1])
    (same,) = solve_calibrated([Matrix("w", stored.T.float().contiguous(), scheme)], H)
    assert torch.equal(got.solved.codes, same.solved.codes) and torch.equal(got.solved.scale, same.solved.scale)


def test_a_hessian_is_used_up() -> None:
    hessian = collected(inputs(200, 16))
    H, mean = hessian.matrix, hessian.mean
    place = hessian._sum.data_ptr()
    taken = hessian.take()
    assert torch.equal(taken, H) and taken.data_ptr() == place  # no second (K, K)
    assert torch.equal(hessian.mean, mean) and hessian.tokens == 200
    for again in (lambda: hessian.take(), lambda: hessian.matrix, lambda: hessian.add(torch.zeros(2, 16))):
        with pytest.raises(ValueError, match=r"Hessian\(16\): its matrix was taken"):
            again()


def test_inputs_that_were_always_zero_are_rounded_to_nearest() -> None:
    scheme = Scheme(Int(4), GROUPED, "int")
    (got,) = solve_calibrated([Matrix("expert", weights(4, 32), scheme)], Hessian(32))
    assert torch.equal(got.solved.codes, round_to_nearest(weights(4, 32), scheme.with_(rule="mse")).codes)
    assert got.loss == 0


@pytest.mark.parametrize("shape", [(0, 16), (3, 1), (1, 16)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    scheme = Scheme(Int(3), GROUPED, "int")
    (found,) = solve_calibrated([Matrix("w", weights(*shape), scheme)], torch.eye(shape[1]))
    assert found.solved.codes.shape == shape
    assert found.solved.scale.shape == scheme.tensors(*shape)["scale"][1]
    assert solve_calibrated([], torch.eye(4)) == []


def test_errors_name_the_matrix() -> None:
    scheme = Scheme(Int(4), GROUPED, "int")
    spoiled = weights(3, 16)
    spoiled[1, 1] = torch.nan
    with pytest.raises(NotFinite, match=r"up\.weight: 1 nan"):
        solve_calibrated(
            [Matrix("gate.weight", weights(3, 16), scheme), Matrix("up.weight", spoiled, scheme)], torch.eye(16)
        )
    with pytest.raises(ValueError, match=r"up\.weight: its shape \(3, 16\) does not fit a Hessian of 8 columns"):
        solve_calibrated([Matrix("up.weight", weights(3, 16), scheme)], torch.eye(8))


def test_tuning_moves_no_code() -> None:
    """Above the widths that refine, codes are those of GPTQ, and the scales the least-squares ones for them."""
    W, H = weights(6, 64), collected(inputs(300, 64)).matrix
    scheme = Scheme(Int(4), GROUPED, "int")
    (got,) = solve_calibrated([Matrix("w", W, scheme)], H)
    plain = gptq_matrix(W, H, scheme.with_(rule="mse"), act_order=True, static_groups=True)
    assert torch.equal(got.solved.codes, plain.codes)
    assert torch.equal(got.solved.scale, tune_scales(W, H, plain.codes, plain.scale, plain.zero, scheme).scale)
