"""Linear layers by the compiled kernels against dequantized weights in torch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from laconic.kernels import cpu_linear, native
from laconic.kernels.inputs import INT8_TOKENS, int8_tensor, round_inputs, static_scale
from laconic.kernels.ops import ACTIVATIONS
from laconic.nn import PackedParameterSpec, pack_tensors
from laconic.numerics import Scheme, affine_params, dequantize, quantize

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no compiled kernels: {native.status()['why']}")

SCHEMES = [
    "v1/int8/channel/float32/minmax/znone/nearest",
    "v1/int8/group32/float16/minmax/zint/nearest",
    "v1/int8/tensor/float32/minmax/zint/nearest",
    "v1/int6/group64/float16/minmax/znone/nearest",
    "v1/int5/channel/float32/minmax/zreal/nearest",
    "v1/int4/group16/float16/minmax/znone/nearest",
    "v1/int4/group32/bfloat16/minmax/zint/nearest",
    "v1/int4/group96/float32/minmax/zreal/nearest",
    "v1/int4/tensor/float32/minmax/znone/nearest",
    "v1/int3/group24/bfloat16/minmax/zint/nearest",
    "v1/int3/group5/float16/minmax/zint/nearest",
    "v1/int3/channel/float32/minmax/znone/nearest",
    "v1/int2/group16/bfloat16/minmax/zreal/nearest",
    "v1/int2/group64/float16/minmax/zint/nearest",
    "v1/levelsnf4/group64/float16/minmax/znone/nearest",
    "v1/levelsfp4/channel/float32/minmax/znone/nearest",
    "v1/ternary/channel/float16/absmean/znone/nearest",
    "v1/ternary/group40/float32/absmean/znone/nearest",
    "v1/ternary/group16/float32/absmean/znone/nearest",
    "v1/ternary/group128/float16/absmean/znone/nearest",
    "v1/ternary/group36/float32/absmean/znone/nearest",
    "v1/binary/channel/float32/absmean/znone/nearest",
    "v1/binary/group32/float16/absmean/znone/nearest",
    "v1/binary/group16/float16/absmean/znone/nearest",
]
SHAPES = [(6, 37), (1, 64), (33, 300), (17, 1030), (70, 96), (5, 8), (3, 1), (0, 16)]
ISAS = range(native.load().best_isa() + 1) if native.load() is not None else ()


def packed(rows: int, k: int, text: str) -> tuple[Scheme, tuple[Tensor, Tensor, Tensor | None], Tensor]:
    scheme = Scheme.parse(text)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k))
    scale, zero = affine_params(x, scheme)
    codes = quantize(x, scale, zero, scheme)
    stored = pack_tensors(PackedParameterSpec(scheme, (rows, k)), codes, scale, zero)
    operands = stored["packed"], stored["scale"], stored.get("zero_point", stored.get("zero"))
    return scheme, operands, dequantize(codes, scale, zero, scheme)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_dequantized_product(scheme: str, isa: int) -> None:
    for rows, k in SHAPES:
        parsed, operands, weight = packed(rows, k, scheme)
        bias = noise(rows)
        for m, act in ((0, "none"), (1, "gelu"), (2, "silu"), (3, "gelu_tanh"), (4, "relu"), (7, "none"), (23, "gelu")):
            x, residual = noise(m, k), noise(m, rows)
            got = cpu_linear.linear(x, *operands, bias, residual, parsed, act, isa=isa)
            want = ACTIVATIONS[act](x.double() @ weight.double().t() + bias) + residual
            # Sums of k products, each rounded: a part of the sum of their sizes.
            size = (x.double().abs() @ weight.double().abs().t() + 1).max() if want.numel() else 1.0
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(size))


@pytest.mark.parametrize("scheme", SCHEMES[4:7])
def test_same_bits_for_any_number_of_threads_and_from_run_to_run(scheme: str) -> None:
    parsed, operands, _ = packed(77, 520, scheme)
    for m in (5, 300):
        x = noise(m, 520)
        first = cpu_linear.linear(x, *operands, None, None, parsed, "silu", threads=1)
        for threads in (1, 2, 3, 4):
            again = cpu_linear.linear(x, *operands, None, None, parsed, "silu", threads=threads)
            assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_any_float_type_and_strides(dtype: torch.dtype) -> None:
    parsed, operands, weight = packed(9, 64, SCHEMES[5])
    x = noise(64, 6).to(dtype).t()[::2]  # neither contiguous nor aligned
    got = cpu_linear.linear(x, *operands, None, None, parsed, "none")
    assert got.dtype == dtype
    want = (x.float() @ weight.t()).to(dtype)
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_inputs(value: float) -> None:
    parsed, operands, weight = packed(8, 64, SCHEMES[5])
    x = torch.full((2, 64), value)
    got = cpu_linear.linear(x, *operands, None, None, parsed, "none")
    torch.testing.assert_close(got, x @ weight.t(), rtol=1e-4, atol=1e-4 * value)


def test_activations_far_from_zero_and_nan() -> None:
    parsed, operands, _ = packed(1, 8, "v1/int8/channel/float32/minmax/znone/nearest")
    bias = torch.zeros(1)
    for act, function in ACTIVATIONS.items():
        for value in (-1e4, -90.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 90.0, 1e4):
            got = cpu_linear.linear(torch.zeros(1, 8), *operands, bias + value, None, parsed, act)
            want = function(torch.tensor([[value]]))
            assert torch.allclose(got, want, rtol=2e-6, atol=3e-7 * max(1.0, abs(value))), (act, value, got, want)
        got = cpu_linear.linear(torch.zeros(1, 8), *operands, bias + torch.nan, None, parsed, act)
        assert got.isnan().all(), act


def test_what_does_not_fit_is_refused() -> None:
    parsed, (codes, scale, _), _ = packed(8, 64, SCHEMES[5])
    with pytest.raises(ValueError, match="codes is torch.int64, must be torch.int32"):
        cpu_linear.linear(noise(1, 64), codes.long(), scale, None, None, None, parsed, "none")
    with pytest.raises(ValueError, match=r"words: 8 per row, but 32 codes of 4 bits fill 4"):
        cpu_linear.linear(noise(1, 32), codes, scale, None, None, None, parsed, "none")
    with pytest.raises(ValueError, match="scale: 3 groups per row"):
        cpu_linear.linear(noise(1, 64), codes, scale[:, :3].contiguous(), None, None, None, parsed, "none")
    with pytest.raises(ValueError, match="scale has 7 rows, words have 8"):
        cpu_linear.linear(noise(1, 64), codes, scale[:7], None, None, None, parsed, "none")
    with pytest.raises(ValueError, match="threads is 0"):
        cpu_linear.linear(noise(1, 64), codes, scale, None, None, None, parsed, "none", threads=0)
    with pytest.raises(ValueError, match="isa is 9"):
        cpu_linear.linear(noise(1, 64), codes, scale, None, None, None, parsed, "none", isa=9)


class TestInputsOf8Bits:
    @pytest.mark.parametrize("inputs", [INT8_TOKENS, int8_tensor(0.013)], ids=["tokens", "static"])
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize(
        "scheme", [s for s in SCHEMES if not any(word in s for word in ("group5", "levels"))]
    )
    def test_equals_the_product_of_rounded_inputs(self, scheme: str, isa: int, inputs: str) -> None:
        known = static_scale(inputs)
        for rows, k in SHAPES:
            parsed, operands, weight = packed(rows, k, scheme)
            bias = noise(rows)
            for m, act in ((0, "none"), (1, "gelu"), (3, "relu"), (6, "none"), (8, "none"), (29, "silu")):
                x, residual = noise(m, k), noise(m, rows)
                got = cpu_linear.linear(x, *operands, bias, residual, parsed, act, int8=True, x_scale=known, isa=isa)
                rounded = round_inputs(x, inputs).double()
                want = ACTIVATIONS[act](rounded @ weight.double().t() + bias) + residual
                size = (rounded.abs() @ weight.double().abs().t() + 1).max() if want.numel() else 1.0
                torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(size))

    @pytest.mark.parametrize("m", [1, 6, 500])
    def test_same_bits_for_any_number_of_threads(self, m: int) -> None:
        parsed, operands, _ = packed(77, 520, SCHEMES[5])
        x = noise(m, 520)
        first = cpu_linear.linear(x, *operands, None, None, parsed, "gelu", int8=True, threads=1)
        for threads in (2, 3, 4):
            again = cpu_linear.linear(x, *operands, None, None, parsed, "gelu", int8=True, threads=threads)
            assert torch.equal(first, again)

    def test_rows_of_zeros_and_the_extremes_of_codes(self) -> None:
        parsed, operands, weight = packed(8, 64, "v1/int8/channel/float32/minmax/znone/nearest")
        x = torch.zeros(3, 64)
        x[1] = -torch.arange(64.0)
        x[2] = 1e30
        got = cpu_linear.linear(x, *operands, None, None, parsed, "none", int8=True)
        want = round_inputs(x, INT8_TOKENS).double() @ weight.double().t()
        assert torch.equal(got[0], torch.zeros(8))
        for row in (1, 2):
            torch.testing.assert_close(got[row].double(), want[row], rtol=0, atol=1e-6 * float(x[row].abs().sum()))

    def test_groups_of_no_whole_words_go_through_the_reference(self) -> None:
        parsed, operands, weight = packed(6, 37, "v1/int3/group5/float16/minmax/zint/nearest")
        assert not cpu_linear.takes_int8(parsed, 37)
        with pytest.raises(ValueError, match="groups of a multiple of 4"):
            cpu_linear.linear(noise(2, 37), *operands, None, None, parsed, "none", int8=True)
        got = torch.ops.laconic.linear(noise(2, 37), *operands, scheme=str(parsed), inputs=INT8_TOKENS)
        torch.testing.assert_close(got, round_inputs(noise(2, 37), INT8_TOKENS) @ weight.t(), rtol=1e-4, atol=1e-5)

    def test_gradients_pass_the_rounding_unchanged(self) -> None:
        parsed, operands, weight = packed(6, 64, SCHEMES[5])
        x = noise(3, 64).requires_grad_()
        y = torch.ops.laconic.linear(x, *operands, scheme=str(parsed), inputs=INT8_TOKENS)
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)

    def test_a_static_scale_cuts_off_what_is_larger(self) -> None:
        parsed, operands, weight = packed(6, 64, SCHEMES[5])
        x, words = noise(12, 64), {"scheme": str(parsed), "inputs": int8_tensor(0.005)}
        want = (x / 0.005).round().clamp(-128, 127) * 0.005 @ weight.t()
        for rows in (x, x[:2]):  # by panels, and by rows
            got = torch.ops.laconic.linear(rows, *operands, **words)
            torch.testing.assert_close(got, want[: len(rows)], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("inputs", ["int4", INT8_TOKENS.replace("token", "tensor"), int8_tensor(0.5).replace("0.5", "-1.0")])
    def test_other_schemes_of_inputs_are_refused(self, inputs: str) -> None:
        parsed, operands, _ = packed(6, 64, SCHEMES[5])
        with pytest.raises(ValueError, match=re.escape(f"inputs={inputs!r}")):
            torch.ops.laconic.linear(noise(3, 64), *operands, scheme=str(parsed), inputs=inputs)

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, 1e39, 1e-60])
    def test_a_static_scale_is_positive(self, scale: float) -> None:
        with pytest.raises(ValueError, match="a static scale of inputs"):
            int8_tensor(scale)

    def test_a_static_scale_is_what_kernels_take(self) -> None:
        for scale in (0.1, 1 / 3, 1e-30, 3e30):
            assert static_scale(int8_tensor(scale)) == torch.tensor(scale).item()
            assert int8_tensor(static_scale(int8_tensor(scale))) == int8_tensor(scale)


def test_a_table_that_fits_in_no_register_takes_the_reference():
    """256 levels of NormalFloat: the op runs, as torch does it, and not the extension."""
    scheme, operands, value = packed(6, 64, "v1/levelsnf8/group64/float16/minmax/znone/nearest")
    x = noise(3, 64)
    assert not cpu_linear.takes(scheme) and cpu_linear.takes(Scheme.parse(SCHEMES[-6]))
    torch.testing.assert_close(torch.ops.laconic.linear(x, *operands, scheme=str(scheme)), x @ value.t())
