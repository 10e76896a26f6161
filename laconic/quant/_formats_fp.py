"""`formats_fp`: small floats in blocks with shared scales, by name: FP8, MXFP4, 6 and 8, MXINT8, NVFP4.

A block of a row's elements x has a scale X and codes f, numbers of a float of 4, 6 or 8 bits: x^ = X f. By format:

    FP8     e4m3 (448) or e5m2 (57344), X = max |x| / largest in float32, by row, token, block or tensor
    MX      e2m1, e2m3, e3m2, e4m3, e5m2 or int8 in blocks of 32, X a power of two in a byte
    NVFP4   e2m1 in blocks of 16, X = e4m3(g max |x| / 6) / g with one g = 448 * 6 / max |tensor| in float32

Each is a `Scheme`, and stored and run like any other: `RTN(MXFP(4))` packs a model's weights, and a recipe's units name
`mxfp4`, `mxfp6`, `mxfp8`, `mxint8`, `nvfp4` and `fp8`. The numbers and bytes are those of `laconic.numerics.blocks`, where
the rules of scales stand; here they get their names.

Source: "OCP Microscaling Formats (MX) Specification 1.0", Rouhani et al., 2023, and "Microscaling Data Formats for Deep
Learning", Rouhani et al., 2023, arXiv 2310.10537 (MX); "FP8 Formats for Deep Learning", Micikevicius et al., 2022,
arXiv 2209.05433. Official code: microsoft/microxcaling, MIT; vllm-project/compressed-tensors, Apache-2.0 (NVFP4, whose
bytes these are). We differ in that elements are rounded once, from float64, and that `rule="ceil"` is the least power of
two under which nothing saturates.

Use MXFP4 and NVFP4 for what hardware multiplies in these formats; at the same bits integers with a zero point have less
error on weights, which have light tails (`Scheme`).

Example:
    >>> import torch
    >>> x = torch.tensor([[0.1, -0.7, 3.0, 6.5]])
    >>> quantize_blocks(x, MXFP(4)).dequantize().tolist()
    [[0.0, -0.5, 3.0, 6.0]]
    >>> quantize_blocks(x, MXFP(4, rule="ceil")).dequantize().tolist()
    [[0.0, -1.0, 3.0, 6.0]]
    >>> NVFP4().bits_per_weight(4096, 4096), MXFP(6).bits_per_weight(4096, 4096)
    (4.500001907348633, 6.25)
"""

from __future__ import annotations

from typing import Literal

from laconic.core.card import Card
from laconic.errors import BadInput
from laconic.numerics import Float, Scale, Scheme, quantize_blocks
from laconic.numerics.floats import Round

__all__ = ["FP8", "MXFP", "MXINT8", "NVFP4", "quantize_blocks"]

MX_ELEMENTS = {4: ("e2m1",), 6: ("e3m2", "e2m3"), 8: ("e4m3", "e5m2")}
Rule = Literal["floor", "ct_round", "ceil"]


def FP8(
    element: str = "e4m3", granularity: Literal["channel", "token", "tensor"] = "channel", *, block: int | None = None
) -> Scheme:
    """8-bit floats under float32 scales.

    Args:
        element: e4m3 or e5m2.
        granularity: a scale for each row of a weight (`channel`) or an activation (`token`), or one for the `tensor`.
        block: elements of a row that share a scale instead.

    Raises:
        BadInput: another element or granularity.
    """
    if element not in MX_ELEMENTS[8]:
        raise BadInput(f"FP8({element!r}): one of {', '.join(MX_ELEMENTS[8])}")
    if granularity not in ("channel", "token", "tensor"):
        raise BadInput(f"FP8(granularity={granularity!r}): one of channel, token, tensor")
    if block is not None:
        return Scheme(Float(element), Scale("group", block))
    return Scheme(Float(element), Scale("tensor" if granularity == "tensor" else "channel"))


def MXFP(
    bits: int = 4, elem: str | None = None, *, rule: Rule = "floor", block: int = 32, rounding: Round = "even"
) -> Scheme:
    """A microscaling format.

    Args:
        bits: 4, 6 or 8.
        elem: e2m1; e3m2 or e2m3; e4m3 or e5m2. The first of its width by default.
        rule: of scales: floor, ct_round or ceil.
        block: elements to a scale.
        rounding: even, away or zero.

    Raises:
        BadInput: another width or element.
    """
    if bits not in MX_ELEMENTS:
        raise BadInput(f"MXFP({bits}): 4, 6 or 8 bits")
    chosen = MX_ELEMENTS[bits][0] if elem is None else elem
    if chosen not in MX_ELEMENTS[bits]:
        raise BadInput(f"MXFP({bits}, elem={elem!r}): one of {', '.join(MX_ELEMENTS[bits])}")
    return _scheme(chosen, Scale("group", block, "e8m0", rule), rounding)


def MXINT8(*, rule: Rule = "floor", block: int = 32, rounding: Round = "even") -> Scheme:
    """Whole numbers over 64 under powers of two."""
    return _scheme("int8", Scale("group", block, "e8m0", rule), rounding)


def NVFP4(*, block: int = 16, rounding: Round = "even") -> Scheme:
    """e2m1 under scales of two levels."""
    return _scheme("e2m1", Scale("group", block, "e4m3"), rounding)


def _scheme(element: str, scale: Scale, rounding: Round) -> Scheme:
    return Scheme(Float(element), scale, rounding="nearest" if rounding == "even" else rounding)


CARD = Card(
    id="formats_fp",
    title="Microscaling Data Formats for Deep Learning",
    authors="Rouhani, Zhao, More, Hall, Khodamoradi, Deng, Choudhary, Cornea, Dellinger, Denolf, Dusan, Elango, Golub, "
    "Heinecke, James-Roxby, Jani, Kolhe, Langhammer, Li, Melnick, Mesmakhosroshahi, Rodriguez, Schulte, Shafipour, "
    "Shao, Siu, Dubey, Micikevicius, Naumov, Verrilli, Wittig, Burger, Chung",
    year=2023,
    source="arXiv 2310.10537",
    family="quant",
    summary="Floats of 4, 6 and 8 bits in blocks that share a scale: FP8, MX and NVFP4, with their bytes.",
    objects={},
    use="Where the hardware multiplies in these formats, or a file has to be in them.",
    avoid="For weights at 4 bits on a CPU: integers with a zero point lose less and have kernels here.",
    composes=("hqq", "rotate", "smoothquant"),
    vectors=("formats", "hqq", "mx", "nvfp4"),
    code="microsoft/microxcaling, MIT; vllm-project/compressed-tensors, Apache-2.0",
    claim={
        "text": "On numbers with heavy tails (Student's t of 4 degrees) NVFP4 keeps a signal-to-noise ratio more than "
        "1.5 dB above MXFP4's.",
        "metric": "decibels",
        "direction": "higher",
        "margin": 1.5,
        "arms": ("mxfp4", "nvfp4"),
        "seeds": 5,
        "minutes": 1,
        "task": "random numbers",
    },
)
