"""`formats_fp`: the recorded values of microxcaling, compressed-tensors, gguf and hqq, names, orders of exactness."""

from __future__ import annotations

from types import NotImplementedType

import pytest
import torch
from torch import Tensor

from laconic.errors import BadInput
from laconic.interop.ggml_blocks import BLOCKS, decode, encode
from laconic.numerics import Blocks, Float, Int, Scale, Scheme, affine_params, dequantize, half_quadratic, quantize
from laconic.quant import FP8, MXFP, MXINT8, NVFP4, quantize_blocks
from laconic.quant._formats_fp import MX_ELEMENTS
from laconic.testing.vectors import Case

ROUNDINGS = {"nearest": "away", "even": "nearest", "floor": "zero"}
RULES = {"floor(log2 max|x|) - element_emax, at least -127": "floor"}


def run_vector(case: Case) -> dict[str, Tensor] | NotImplementedType:
    """A matrix in a format and back."""
    if case.file.name == "formats":
        if case.args.get("format") == "MXFP4":
            return _gguf(case)
        return _ggml(case) if case.args.get("format") in BLOCKS else NotImplemented
    if case.file.name == "hqq":
        return _half_quadratic(case)
    return _mx(case) if case.file.name == "mx" else _compressed(case)


def _half_quadratic(case: Case) -> dict[str, Tensor]:
    args, inverse = case.args, case.array("scale")
    assert args["scale_is_inverse_step"]
    codes, zero = half_quadratic(
        case.array("weight"), inverse, case.array("zero"), (args["code_min"], args["code_max"]), axis=args["axis"],
        norm=args["lp_norm"], beta=args["beta"], growth=args["kappa"] if args["kappa_used"] else 1.0, turns=args["iters"],
    )  # fmt: skip
    return {
        "bits": torch.tensor(args["bits"]), "codes": codes, "scale_after": inverse, "zero_after": zero,
        "output": (codes - zero) / inverse,
    }  # fmt: skip


def _mx(case: Case) -> dict[str, Tensor]:
    args, x = case.args, case.array("input")
    element = args["format"].rpartition("_")[2]
    rule = RULES[args["scale_exponent"]]
    scheme = Scheme(
        Float(element), Scale("group", args["block_size"], "e8m0", rule), rounding=ROUNDINGS[args["rounding"]]
    )
    numbers = scheme.element.numbers
    assert (numbers.emax, numbers.largest) == (args["element_emax"], args["element_max"])
    assert args["saturate"]
    options = {"subnormals": args["subnormals"], "flush": args["flush_fp32_subnormals"]}
    moved = x.movedim(args["axis"], -1)
    flat = moved.reshape(-1, moved.shape[-1])
    done = quantize_blocks(flat, scheme, scale_bits=args["scale_bits"], **options)
    if args["scale_bits"] == 8:
        done = Blocks.of_tensors(done.tensors(), scheme, flat.shape[1])  # also through the bytes
    return {"output": done.dequantize().view(moved.shape).movedim(-1, args["axis"])}


def _compressed(case: Case) -> dict[str, Tensor]:
    args, weight = case.args, case.array("weight")
    assert args["axis"] == -1 and args["observer"] == "minmax"
    if args["format"] == "int":
        return _integers(case, weight)
    if args["format"] == "nvfp4":
        assert (args["scale_max"], args["zero_scale_becomes"]) == (448.0, 0.125)
        scheme = NVFP4(block=args["group_size"])
    else:
        bits = next(b for b, names in MX_ELEMENTS.items() if args["element"] in names)
        scheme = MXFP(bits, args["element"], rule=args["scale_rule"], block=args["group_size"])
    done = quantize_blocks(weight, scheme)
    found = {"scale": done.scale, "quantised": done.values(), "dequantised": done.dequantize()}
    return (
        found
        if done.global_scale is None
        else found | {"global_scale": done.global_scale.view(case.expected("global_scale").shape)}
    )


def _integers(case: Case, weight: Tensor) -> dict[str, Tensor]:
    args = case.args
    scheme = Scheme(Int(args["bits"]), Scale("group", group=args["group_size"]), "none" if args["symmetric"] else "int")
    scale, zero = affine_params(weight, scheme)
    codes = quantize(weight, scale, zero, scheme)
    found = {
        "scale": scale,
        "quantised": codes.int() + args["qmin"],
        "dequantised": dequantize(codes, scale, zero, scheme),
    }
    return found if zero is None else found | {"zero_point": zero.int() + args["qmin"]}


def _gguf(case: Case) -> dict[str, Tensor]:
    """17 bytes to 32 numbers: the scale's byte, then byte j with the codes of elements j and j + 16."""
    x = case.array("input")
    done = quantize_blocks(x, MXFP(4, block=case.args["block"]))
    codes = torch.where(done.codes == 8, 0, done.codes).view(len(x), -1, 2, 16)  # it knows no negative 0
    halves = codes[:, :, 0] | codes[:, :, 1] << 4
    packed = torch.cat([done.tensors()["scale"][..., None], halves], -1).flatten(1)
    return {"packed": packed, "output": done.dequantize()}


def _ggml(case: Case) -> dict[str, Tensor]:
    """The other blocks of llama.cpp are integers, and written and read by `laconic.interop`."""
    raw = encode(case.array("input").float().numpy(), case.args["format"])
    packed = torch.from_numpy(raw).view(case.expected("packed").shape)
    return {"packed": packed, "output": torch.from_numpy(decode(raw, case.args["format"]))}


def test_names() -> None:
    assert str(FP8()) == "v1/floate4m3/channel/float32/minmax/znone/nearest" == str(Scheme.parse("fp8"))
    assert str(FP8("e5m2", "tensor")) == "v1/floate5m2/tensor/float32/minmax/znone/nearest"
    assert str(FP8(block=128)) == "v1/floate4m3/group128/float32/minmax/znone/nearest"
    assert FP8(granularity="token") == FP8() and NVFP4() == Scheme.parse("nvfp4") and MXFP(4) == Scheme.parse("mxfp4")
    assert [MXFP(b).element.name for b in (4, 6, 8)] == ["e2m1", "e3m2", "e4m3"]
    assert MXFP(6, "e2m3", rounding="zero").element.name == "e2m3"
    assert MXINT8().bits_per_weight(8, 64) == 8.25 and MXFP(4).bits_per_weight(8, 64) == 4.25


def test_signal_to_noise_on_normal_numbers() -> None:
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))

    def decibels(y: Tensor) -> float:
        return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))

    found = {
        f"{s.element.name}{s.scale.group}": decibels(quantize_blocks(x, s).dequantize()) for s in (MXFP(4), NVFP4(), MXFP(8))
    }
    assert found["e2m132"] == pytest.approx(18.78, abs=0.1) and found["e2m116"] == pytest.approx(20.44, abs=0.1)
    assert found["e4m332"] > 30


def test_refusals() -> None:
    for make, match in (
        (lambda: FP8("e3m4"), "e4m3, e5m2"), (lambda: FP8(granularity="row"), "channel, token, tensor"),
        (lambda: MXFP(5), "4, 6 or 8 bits"), (lambda: MXFP(4, "e4m3"), "one of e2m1"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            make()
