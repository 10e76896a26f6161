"""GPTQ: the official code's results, and the properties that hold without it."""

from __future__ import annotations

import itertools
from types import NotImplementedType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from laconic.numerics import Int, NotFinite, Scale, Scheme, affine, affine_params, pack
from laconic.quant import GPTQ, Hessian, conv_inputs, gptq_matrix, inverse_factor, output_error, round_to_nearest
from laconic.testing import Example
from laconic.testing.vectors import Case
from tests.quant import golden

KNOWN = {
    *("bits", "sym", "group", "per_channel", "mse", "mse_norm", "mse_grid", "mse_max_shrink"),
    *("block", "damp", "act_order", "static_groups", "stale_group_scales"),
    *("in_channels", "out_channels", "kernel", "stride", "padding", "dilation", "groups", "bias"),
}
FP32 = Scale("channel")


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Inputs with strong correlations, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    return (torch.randn(tokens, k, generator=generator) * torch.logspace(0, -1.5, k)) @ mix + 0.3


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian.matrix


def weights(rows: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


# --- against the official code -----------------------------------------------------------------------


def run_vector(case: Case) -> dict[str, Tensor] | NotImplementedType:
    """The Hessian and the rounded weights of the official code, and the words that its files hold."""
    if case.file.name == "formats":
        if case.what != "pack":
            return NotImplemented
        return _packed(case)
    args = case.args
    hessian = _collected(case).matrix
    returned = {"hessian": hessian} if "hessian" in case else {}
    if case.what != "quantize":
        return returned
    assert set(args) <= KNOWN, "an option that this test does not know"
    grouped = args["group"] > 0
    scale = Scale(
        "group" if grouped else "channel" if args["per_channel"] else "tensor",
        group=args["group"] if grouped else None,
        rule="mse" if args["mse"] else "minmax",
    )
    scheme = Scheme(Int(args["bits"]), scale, zero="none" if args["sym"] else "int")
    W = case.array("weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "MSE_NORM", args.get("mse_norm", affine.MSE_NORM))
        patch.setattr(affine, "MSE_GRID", args.get("mse_grid", affine.MSE_GRID))
        patch.setattr(affine, "MSE_SHRINK", args.get("mse_max_shrink", affine.MSE_SHRINK))
        solved = gptq_matrix(
            W.flatten(1), hessian, scheme, damp=args["damp"], block=args["block"], act_order=args["act_order"],
            static_groups=args["static_groups"], stale_group_scales=args.get("stale_group_scales", False), dead="zero",
            choose=golden.official_scales,
        )  # fmt: skip
    returned["output"] = solved.dequantize(scheme).view_as(W)
    if "scale" in case:  # of groups the official code keeps the last
        returned["scale"] = solved.scale[:, -1:].expand(len(W), 1)  # repeated there where all rows share it
    if "zero" in case:
        symmetric = torch.full_like(solved.scale[:, -1:], 2.0 ** (args["bits"] - 1))
        returned["zero"] = (symmetric if solved.zero is None else solved.zero[:, -1:]).expand(len(W), 1)
    return returned


def _collected(case: Case) -> Hessian:
    args, inputs = case.args, case.arrays("input")
    if "kernel" not in args:
        hessian = Hessian(inputs[0].shape[-1])
        for x in inputs:
            hessian.add(x)
        return hessian
    module = nn.Conv2d(
        args["in_channels"], args["out_channels"], args["kernel"], stride=args["stride"],
        padding=args["padding"], dilation=args.get("dilation", 1), groups=args.get("groups", 1),
    )  # fmt: skip
    hessian = Hessian.of(module)
    for x in inputs:
        hessian.add_conv(x, module)
    return hessian


def _packed(case: Case) -> dict[str, Tensor]:
    bits = case.args["bits"]
    codes = case.array("codes")
    if case.args["format"] == "gptq":  # packed along the input axis; scales and zeros lie beside it as they are
        case.array("scale"), case.array("zero")
        return {"packed": pack(codes.to(torch.uint8), bits).T}
    codes = (codes.int() + case.args["stored_offset"]).to(torch.uint8)
    return {"packed": pack(codes, bits), "packed_dim0": pack(codes.T.contiguous(), bits).T}


def _network(g: torch.Generator) -> list:
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16)).eval()
    for p in model.parameters():
        nn.init.normal_(p, generator=g)
    return [model, torch.randn(64, 32, generator=g)]


def _hessians(model: nn.Module, structure: Any, arguments: list) -> dict[str, Any]:
    found, x = {}, arguments[0]
    for path, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            found[path] = Hessian(layer.in_features)
            found[path].add(x)
        x = layer(x).detach()
    return {"hessians": found}


def _embedding() -> tuple:
    return nn.Sequential(nn.Embedding(40, 32)).eval(), [torch.tensor([[1, 2]])], "0.weight"


EXAMPLES = [
    Example(
        lambda: GPTQ("v1/int6/group16/float16/minmax/zint/nearest"), kind="Pass", inputs=_network,
        stated={"context": _hessians, "bound": 0.03, "refused": _embedding},
    )
]  # fmt: skip


def official_by_hand(W: Tensor, H: Tensor, bits: int, sym: bool, group: int, mse: bool) -> Tensor:
    """What the official code computes, from its equations: float64, one column at a time, blocks of one column."""
    W, H, top = W.double().clone(), H.double().clone(), 2**bits - 1
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))

    def chosen(rows: Tensor) -> tuple[Tensor, Tensor]:
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(-low, high)
            low = torch.where(low < 0, -high, low)  # a row without negative weights is not mirrored
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        best = torch.full_like(low, torch.inf)
        s, z = torch.empty_like(low), torch.empty_like(low)
        for i in range(80 if mse else 1):
            p = 1 - i / 100
            scale = p * (high - low) / top
            zero = torch.full_like(scale, (top + 1) / 2) if sym else (-p * low / scale).round()
            error = (cast(rows, scale[:, None], zero[:, None]) - rows).abs().pow(2.4).sum(1)
            better = error < best
            best, s, z = (torch.where(better, a, b) for a, b in ((error, best), (scale, s), (zero, z)))
        return s, z

    def cast(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return scale * (((x / scale).round() + zero).clamp(0, top) - zero)

    s, z = chosen(W)
    W[:, dead] = 0
    upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    out = torch.empty_like(W)
    for j in range(W.shape[1]):
        if group > 0 and j % group == 0:
            s, z = chosen(W[:, j : j + group])
        out[:, j] = cast(W[:, j], s, z)
        W[:, j:] -= torch.outer((W[:, j] - out[:, j]) / upper[j, j], upper[j, j:])
    return out


@pytest.mark.parametrize("group", [-1, 8])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_rows_without_negative_weights_as_the_official_code_has_them(sym: bool, mse: bool, group: int) -> None:
    """Its scale is half of ours there and clips: `choose` reproduces it."""
    W, H = weights(6, 24), hessian_of(correlated(200, 24))
    W[1] = W[1].abs()
    W[3, :8] = W[3, :8].abs()
    W[4] = 0
    scale = Scale("group", group) if group > 0 else Scale()
    scheme = Scheme(Int(4), scale, "none" if sym else "int").with_(rule="mse" if mse else "minmax")
    want = official_by_hand(W, H, 4, sym, group, mse)
    official = gptq_matrix(W, H, scheme, dead="zero", choose=golden.official_scales)
    torch.testing.assert_close(official.dequantize(scheme).double(), want, rtol=1e-4, atol=1e-5)
    ours = gptq_matrix(W, H, scheme, dead="zero")
    if sym:
        errors = [float((W - s.dequantize(scheme))[1].square().sum()) for s in (ours, official)]
        assert errors[0] < 0.5 * errors[1]


# --- without correlations it is rounding to nearest ---------------------------------------------------


schemes = st.builds(
    Scheme,
    st.integers(2, 8).map(Int),
    st.builds(
        lambda share, dtype, rule: Scale(share[0], share[1], dtype, rule),
        st.sampled_from([("tensor", None), ("channel", None), ("group", 4), ("group", 7), ("group", 64)]),
        st.sampled_from(["float32", "float16", "bfloat16"]),
        st.sampled_from(["minmax", "percentile", "mse"]),
    ),
    st.sampled_from(["none", "int", "real"]),
)


@settings(max_examples=60, deadline=None)
@given(
    schemes,
    st.integers(1, 5),
    st.integers(1, 41),
    st.sampled_from([4, 16, 128]),
    st.booleans(),
    st.integers(0, 99),
)
def test_identity_hessian_is_rtn(scheme: Scheme, rows: int, k: int, block: int, static: bool, seed: int) -> None:
    W = weights(rows, k, seed)
    plain = round_to_nearest(W, scheme)
    solved = gptq_matrix(W, 3 * torch.eye(k), scheme, block=block, static_groups=static, act_order=static)
    assert torch.equal(solved.codes, plain.codes)
    assert torch.equal(solved.scale, plain.scale)
    assert solved.zero is None if plain.zero is None else torch.equal(solved.zero, plain.zero)


# --- the objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["none", "int", "real"])
@pytest.mark.parametrize(("act_order", "static"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("group", [None, 16, 24, 80])
def test_loss_is_the_damped_objective(zero: str, act_order: bool, static: bool, group: int | None) -> None:
    k = 72
    W, H = weights(10, k), hessian_of(correlated(500, k))
    share = Scale("channel") if group is None else Scale("group", group, "float16")
    scheme = Scheme(Int(3), share, zero)
    solved = gptq_matrix(W, H, scheme, block=32, act_order=act_order, static_groups=static)
    damped = H + solved.damp * H.diagonal().mean() * torch.eye(k)
    D = W - solved.dequantize(scheme)
    assert solved.loss == pytest.approx(output_error(D, damped) / 2, rel=1e-3)
    plain = round_to_nearest(W, scheme)
    assert output_error(D, H) < 0.7 * output_error(W - plain.dequantize(scheme), H)
    assert (solved.g_idx is not None) == (group is not None and act_order and not static)


def test_block_changes_speed_alone() -> None:
    W, H = weights(8, 100), hessian_of(correlated(400, 100))
    for scheme in (Scheme(Int(4)), Scheme(Int(4), Scale("group", 12), "int")):
        losses = [gptq_matrix(W, H, scheme, block=block).loss for block in (1, 7, 32, 64, 100, 128)]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02)


def test_against_the_textbook_loop() -> None:
    """Column by column with the whole inverse eliminated anew, as in the paper's derivation, in float64."""
    k = 24
    W, H = weights(5, k), hessian_of(correlated(200, k))
    scheme = Scheme(Int(4), FP32, "int")
    scale, zero = affine_params(W, scheme)
    s, z = scale[:, 0].double(), zero[:, 0].double()
    w = W.double().clone()
    inverse = torch.linalg.inv(H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(k))
    want = torch.empty_like(w)
    for j in range(k):
        want[:, j] = s * ((w[:, j] / s).round().add(z).clamp(0, 15) - z)
        w -= torch.outer(w[:, j] - want[:, j], inverse[j] / inverse[j, j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j].clone()
    got = gptq_matrix(W, H, scheme, block=8).dequantize(scheme)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [5, 257, 600])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_inverse(k: int, act_order: bool) -> None:
    H = hessian_of(correlated(2 * k, k))
    factor = inverse_factor(H, act_order=act_order)
    upper = factor.unit.triu().double() * factor.diag.double()[:, None]
    damped = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(k)
    order = torch.arange(k) if factor.order is None else factor.order
    product = (upper.T @ upper) @ damped[order][:, order]
    torch.testing.assert_close(product, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-3)
    assert (factor.order is not None) == act_order
    assert not act_order or bool((H.diagonal()[order].diff() <= 0).all())


def test_group_scales_see_the_block_they_are_in() -> None:
    W, H = weights(6, 32), hessian_of(correlated(300, 32))
    scheme = Scheme(Int(4), Scale("group", 8), "int")
    fresh = gptq_matrix(W, H, scheme, block=16)
    stale = gptq_matrix(W, H, scheme, block=16, stale_group_scales=True)
    assert torch.equal(fresh.scale[:, 0], stale.scale[:, 0])
    assert not torch.equal(fresh.scale[:, 1], stale.scale[:, 1])
    one_by_one = gptq_matrix(W, H, scheme, block=8)
    torch.testing.assert_close(fresh.scale, one_by_one.scale, rtol=1e-4, atol=1e-5)


def test_rows_are_independent_and_factors_are_shared() -> None:
    W, H = weights(12, 40), hessian_of(correlated(300, 40))
    scheme = Scheme(Int(4), Scale("group", 16, "float16"), "int")
    together = gptq_matrix(W, H, scheme)
    factor = inverse_factor(H)
    for part, codes in zip(W.split(5), together.codes.split(5), strict=True):
        assert (gptq_matrix(part, factor, scheme).codes != codes).float().mean() < 0.01  # ties of float32 sums


def test_inputs_are_left_alone_and_any_float_is_taken() -> None:
    W, H = weights(4, 20).bfloat16(), hessian_of(correlated(100, 20))
    kept = W.clone(), H.clone()
    scheme = Scheme(Int(4), Scale("channel", dtype="float16"), "int")
    solved = gptq_matrix(W, H, scheme, act_order=True)
    assert torch.equal(W, kept[0]) and torch.equal(H, kept[1])
    assert solved.scale.dtype == torch.float16 and solved.zero.dtype == torch.uint8
    assert torch.equal(solved.codes, gptq_matrix(W.float(), H, scheme, act_order=True).codes)


def test_stochastic_rounding_is_seeded() -> None:
    W, H = weights(4, 20), hessian_of(correlated(100, 20))
    scheme = Scheme(Int(4), FP32, "int", "stochastic")
    a, b, c = (gptq_matrix(W, H, scheme, generator=torch.Generator().manual_seed(s)).codes for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# --- trouble ------------------------------------------------------------------------------------------


def test_dead_columns() -> None:
    x = correlated(300, 16)
    x[:, 3] = 0
    W, H = weights(5, 16), hessian_of(x)
    scheme = Scheme(Int(4), FP32, "int")
    kept = gptq_matrix(W, H, scheme)
    gone = gptq_matrix(W, H, scheme, dead="zero")
    assert torch.equal(kept.codes[:, 3], round_to_nearest(W, scheme).codes[:, 3])
    assert bool((gone.dequantize(scheme)[:, 3] == 0).all())


def test_an_expert_that_was_never_asked_is_rounded_to_nearest() -> None:
    W = weights(5, 16)
    scheme = Scheme(Int(4), Scale("group", 8), "int")
    solved = gptq_matrix(W, Hessian(16).matrix, scheme)
    assert torch.equal(solved.codes, round_to_nearest(W, scheme).codes)


def test_damping_is_raised_and_reported() -> None:
    x = correlated(3, 64)  # rank 3 of 64
    W, H = weights(5, 64), hessian_of(x)
    solved = gptq_matrix(W, H, Scheme(Int(4)), damp=0.0)
    assert solved.damp > 0 and solved.loss < float("inf")
    assert gptq_matrix(W, H, Scheme(Int(4)), damp=0.01).damp == 0.01
    with pytest.raises(ValueError, match=r"layer\.3: its Hessian is not positive semidefinite"):
        gptq_matrix(W, H - 1e6 * torch.eye(64), Scheme(Int(4)), name="layer.3")


def test_errors_name_the_tensor() -> None:
    W, H = weights(3, 8), torch.eye(8)
    W[1, 2] = torch.inf
    with pytest.raises(NotFinite, match=r"head\.weight: 0 nan and 1 inf"):
        gptq_matrix(W, H, Scheme(Int(4)), name="head.weight")
    spoiled = torch.eye(8)
    spoiled[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"Hessian of head\.weight: 1 nan"):
        gptq_matrix(weights(3, 8), spoiled, Scheme(Int(4)), name="head.weight")
    with pytest.raises(ValueError, match=r"head\.weight: a weight of 8 columns needs a \(8, 8\) Hessian"):
        gptq_matrix(weights(3, 8), torch.eye(9), Scheme(Int(4)), name="head.weight")


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (1, 1)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    W = weights(*shape)
    solved = gptq_matrix(W, torch.eye(shape[1]), Scheme(Int(4), Scale("group", 4), "int"))
    assert solved.codes.shape == shape and solved.scale.shape == (shape[0], -(-shape[1] // 4))


# --- collecting ---------------------------------------------------------------------------------------


def test_hessian_counts_sequences_and_sums_tokens() -> None:
    x = torch.randn(5, 7, 12)
    hessian = Hessian(12)
    hessian.add(x[:2].bfloat16())
    hessian.add(x[2:])
    flat = torch.cat([x[:2].bfloat16().float(), x[2:]]).reshape(-1, 12)
    assert (hessian.n, hessian.tokens) == (5, 35)
    torch.testing.assert_close(hessian.matrix, 2 / 5 * flat.T @ flat)
    torch.testing.assert_close(hessian.mean, flat.mean(0))
    assert torch.equal(hessian.matrix, hessian.matrix.T)
    hessian.add(x[0])
    assert hessian.n == 6  # an input of two axes is one sequence
    with pytest.raises(ValueError, match="do not end in 12"):
        hessian.add(torch.zeros(3, 4))


def test_hessian_by_panels_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 30)
    whole = hessian_of(x)
    monkeypatch.setattr("laconic.quant._gptq.PANEL", 8)
    monkeypatch.setattr("laconic.quant._gptq.TOKENS", 16)
    torch.testing.assert_close(hessian_of(x), whole)


CONVS = [
    (nn.Conv1d, dict(stride=2, padding=1)),
    (nn.Conv1d, dict(dilation=3, groups=2, padding="same")),
    (nn.Conv2d, dict(stride=(2, 1), padding=(1, 2), groups=2)),
    (nn.Conv2d, dict(padding=2, padding_mode="reflect")),
    (nn.Conv2d, dict(padding="same", padding_mode="circular", dilation=2, groups=4)),
    (nn.Conv2d, dict(padding="valid", bias=False)),
    (nn.Conv3d, dict(stride=2, padding=1, dilation=2)),
]


@pytest.mark.parametrize(("kind", "options"), CONVS, ids=itertools.count())
def test_conv_inputs_times_weights_is_the_convolution(kind: type[nn.Module], options: dict) -> None:
    module = kind(4, 8, 3, **options)
    axes = len(module.kernel_size)
    x = torch.randn(3, 4, *[9, 8, 7][:axes])
    y = module(x)
    rows = conv_inputs(x, module)
    per_group = module.weight.flatten(1).chunk(module.groups)
    out = torch.cat([part @ w.T for part, w in zip(rows, per_group, strict=True)], dim=1)
    out = out.view(3, *y.shape[2:], 8).movedim(-1, 1)
    bias = 0 if module.bias is None else module.bias.view(-1, *[1] * axes)
    torch.testing.assert_close(out + bias, y, rtol=1e-4, atol=1e-5)


def test_conv_inputs_refuses_what_is_no_convolution() -> None:
    with pytest.raises(ValueError, match="ConvTranspose2d is not"):
        conv_inputs(torch.zeros(1, 2, 3, 3), nn.ConvTranspose2d(2, 2, 2))


def test_grouped_convolution_has_a_hessian_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.quant._gptq.UNFOLDED", 1)  # one example at a time
    module = nn.Conv2d(6, 4, 3, groups=2)
    x = torch.randn(5, 6, 7, 7)
    hessian = Hessian.of(module)
    hessian.add_conv(x, module)
    assert (hessian.matrix.shape, hessian.mean.shape, hessian.n) == ((2, 27, 27), (2, 27), 5)
    rows = conv_inputs(x, module)
    torch.testing.assert_close(hessian.matrix, 2 / 5 * rows.mT @ rows, rtol=1e-4, atol=1e-4)
    W = module.weight.detach().flatten(1)
    scheme = Scheme(Int(4), FP32, "int")
    solved = gptq_matrix(W, hessian.matrix, scheme)
    for g in range(2):
        apart = gptq_matrix(W[2 * g : 2 * g + 2], hessian.matrix[g], scheme)
        assert torch.equal(solved.codes[2 * g : 2 * g + 2], apart.codes)
    with pytest.raises(ValueError, match="use a scale per channel"):
        gptq_matrix(W, hessian.matrix, Scheme(Int(4), Scale("tensor")))
