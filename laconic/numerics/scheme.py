"""`Scheme`: how the numbers of one tensor are stored, as a value that prints and parses.

A scheme says what a stored element is (`Int`, `Float`, `Levels`, `Ternary`, `Binary` or `Codebook`), how the scale is
shared, chosen and stored (`Scale`), whether there is a zero point, and how values are rounded. How codes lie in bytes is
*not* part of it: that is `Layout`, so that kernels may be tested by bytes and schemes by numbers.

The affine map of the integer element, with b bits and unsigned codes q in [0, 2^b - 1]:

    q = clamp(round(x / s) + z, 0, 2^b - 1)          x^ = s * (q - z)

`zero="none"` fixes z = 2^(b-1), so the code is the two's complement value plus 2^(b-1), as compressed-tensors
stores it. The other elements have tables of levels around 0 and no zero point:

    q = the code of the level nearest to x / s         x^ = s T[q]

Formats that have a name parse by it, too: `Scheme.parse("mxfp4")`, see `NAMED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch

from .elements import Codebook, Element, Float, Int, Levels, Rule, parse_element
from .nested import SCALE_DTYPES, NestedScales

VERSION = "v1"

Granularity = Literal["tensor", "channel", "group", "token"]
Zero = Literal["none", "int", "real"]
Rounding = Literal["nearest", "stochastic", "away", "zero"]

CODED_DTYPES = ("e8m0", "e4m3")  # scales in a byte, of floats
POWERS = ("floor", "ct_round", "ceil")  # rules that give powers of two
RULES = ("minmax", "percentile", "mse", "hqq", "absmean", *POWERS)


@dataclass(frozen=True)
class Scale:
    """Which elements share a scale, how the scale is chosen and how it is stored.

    Args:
        granularity: `tensor` (one), `channel` (one a row of the matrix view), `group` (runs of `group`
            elements along the row; the last one may be short), `token` (one a row of an activation, computed
            when the row is seen).
        group: run length, for `group` only.
        dtype: storage type; values are rounded to it *before* codes are computed, so that file and codes
            agree. `e8m0` (powers of two) and `e4m3` (with one float32 for the tensor) belong to floats, see
            `scales.py`.
        rule: `minmax`; `percentile` (from the `100 - percentile` % to the `percentile` % quantile); `mse` (a
            grid over shrunken ranges, least sum of |x^ - x|^2.4; of ternary numbers the least squares, exactly);
            `hqq` (the scale of `minmax`, and a real zero point that is solved for, see `half_quadratic.py`);
            `absmean` (the mean of |x|, for ternary and binary numbers, and codebooks); `floor`, `ct_round` and `ceil`
            (powers of two, see `blocks.py`).
        percentile: used by `percentile`.
        outer: how scales of float32 are stored in few bits themselves (double quantization).
    """

    granularity: Granularity = "channel"
    group: int | None = None
    dtype: str = "float32"
    rule: Rule = "minmax"
    percentile: float = 99.9
    outer: NestedScales | None = None

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel", "group", "token"):
            raise ValueError(f"Scale(granularity={self.granularity!r}): one of tensor, channel, group, token")
        if (self.granularity == "group") != (self.group is not None):
            raise ValueError(
                f"Scale(granularity={self.granularity!r}, group={self.group!r}): `group` belongs to granularity 'group'"
            )
        if self.group is not None and self.group < 1:
            raise ValueError(f"Scale(group={self.group}): a group has at least one element")
        if self.dtype not in SCALE_DTYPES and self.dtype not in CODED_DTYPES:
            raise ValueError(f"Scale(dtype={self.dtype!r}): one of {', '.join((*SCALE_DTYPES, *CODED_DTYPES))}")
        if self.rule not in RULES:
            raise ValueError(f"Scale(rule={self.rule!r}): one of {', '.join(RULES)}")
        if (self.dtype == "e8m0") != (self.rule in POWERS):
            raise ValueError(
                f"Scale(dtype={self.dtype!r}, rule={self.rule!r}): scales in e8m0, and no others, go by "
                f"{', '.join(POWERS)}"
            )
        if self.dtype in CODED_DTYPES and self.granularity == "tensor":
            raise ValueError(f"Scale(dtype={self.dtype!r}): a single scale is stored in float32, or in 16 bits")
        if self.outer is not None and (self.dtype != "float32" or self.granularity == "tensor"):
            raise ValueError(
                f"Scale(outer={self.outer}): scales of dtype float32 are stored so, and more than one of them"
            )
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"Scale(percentile={self.percentile}): in (50, 100]")
        if self.rule != "percentile":
            object.__setattr__(self, "percentile", 99.9)  # not printed, so it must not tell two schemes apart

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of scales as numbers; they are stored in it where they are plain."""
        return SCALE_DTYPES.get(self.dtype, torch.float32)

    @property
    def plain(self) -> bool:
        """Whether scales are stored as the numbers that they are."""
        return self.dtype in SCALE_DTYPES and self.outer is None

    def tensors(self, rows: int, groups: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names (suffixes), dtypes and shapes of what is stored for (rows, groups) scales."""
        if self.outer is not None:
            return self.outer.tensors(rows * groups)
        if self.plain:
            return {"scale": (self.torch_dtype, (rows, groups))}
        shared = {"global_scale": (torch.float32, (1,))} if self.dtype == "e4m3" else {}
        return {"scale": (torch.uint8, (rows, groups)), **shared}

    def group_of(self, k: int) -> int:
        """Elements that share a scale in a row of `k`."""
        return min(self.group, k) if self.group is not None and k > 0 else max(k, 1)

    def groups(self, k: int) -> int:
        """Scales per row of `k` elements (at least one, also when k = 0)."""
        return max(1, math.ceil(k / self.group_of(k)))


@dataclass(frozen=True)
class Scheme:
    """How the numbers of a tensor are stored. Frozen, hashable, and equal to `Scheme.parse(str(scheme))`.

    Example:
        >>> scheme = Scheme(Int(4), Scale("group", group=64, dtype="float16"), zero="int")
        >>> str(scheme)
        'v1/int4/group64/float16/minmax/zint/nearest'
        >>> Scheme.parse(str(scheme)) == scheme
        True
        >>> scheme.bits_per_weight(rows=8, k=128)
        4.3125
        >>> str(Scheme.parse("nvfp4"))
        'v1/floate2m1/group16/e4m3/minmax/znone/nearest'
    """

    element: Element = field(default_factory=lambda: Int(8))
    scale: Scale = field(default_factory=Scale)
    zero: Zero = "none"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if not isinstance(self.element, Element):
            raise TypeError(f"Scheme(element={self.element!r}): one of Int, Float, Levels, Ternary, Binary, Codebook")
        if self.scale.rule not in self.element.rules:
            rules = " or ".join(repr(rule) for rule in self.element.rules)
            raise ValueError(
                f"Scheme({self.element}, rule={self.scale.rule!r}): scales of {self.element} go by {rules}"
            )
        if self.zero not in ("none", "int", "real"):
            raise ValueError(f"Scheme(zero={self.zero!r}): one of none, int, real")
        if self.rounding not in ("nearest", "stochastic", "away", "zero"):
            raise ValueError(f"Scheme(rounding={self.rounding!r}): one of nearest, stochastic, away, zero")
        others: dict[type, tuple[str, ...]] = {Int: ("stochastic",), Float: ("away", "zero")}
        roundings = ("nearest", *others.get(type(self.element), ()))
        if (not isinstance(self.element, Int) and self.zero != "none") or self.rounding not in roundings:
            raise ValueError(
                f"Scheme({self.element}, zero={self.zero!r}, rounding={self.rounding!r}): a zero point and stochastic "
                "rounding belong to integers, rounding away from or towards zero to floats; all have zero 'none' and "
                "rounding 'nearest'"
            )
        if self.scale.rule == "hqq" and self.zero != "real":
            raise ValueError(f"Scheme(rule='hqq', zero={self.zero!r}): the rule finds real zero points, take zero='real'")
        if self.scale.dtype in CODED_DTYPES and not isinstance(self.element, Float):
            raise ValueError(f"Scheme({self.element}, dtype={self.scale.dtype!r}): scales in a byte belong to floats")
        if isinstance(self.element, Codebook) and (self.scale.group or 0) % self.element.dim:
            raise ValueError(
                f"Scheme({self.element}, group={self.scale.group}): a group holds whole runs of {self.element.dim}"
            )

    @property
    def bits(self) -> float:
        """Bits of a code as it is stored: 1.6 of a ternary one, else whole."""
        return self.element.bits

    @property
    def plain(self) -> Scheme:
        """The scheme under which kernels read the same codes, once the scales are the numbers that they stand for."""
        return self if self.scale.plain else _plain(self)

    @property
    def whole(self) -> bool:
        """Whether scales or tables follow from the whole matrix at once, so that it cannot be taken by rows."""
        shared = self.scale.granularity == "tensor" or self.scale.dtype == "e4m3" or self.scale.outer is not None
        return shared or isinstance(self.element, Codebook)

    @property
    def beside(self) -> str | None:
        """Suffix of what is stored beside codes and scales, the `zero` of the ops: zero points, or a codebook's table."""
        if isinstance(self.element, Codebook):
            return "codebook"
        return {"none": None, "int": "zero_point", "real": "zero"}[self.zero]

    @property
    def symmetric(self) -> bool:
        """Whether no zero point is stored, so that 0 lies in the middle of the codes."""
        return self.zero == "none"

    def with_(self, **changes: object) -> Scheme:
        """A copy with fields of the scheme or of its scale replaced: `scheme.with_(dtype="float32")`."""
        own = {k: v for k, v in changes.items() if k in ("element", "scale", "zero", "rounding")}
        inner = {k: v for k, v in changes.items() if k not in own}
        return replace(self, **own, **({"scale": replace(self.scale, **inner)} if inner else {}))  # type: ignore[arg-type]

    def __str__(self) -> str:
        share = self.scale.granularity + (str(self.scale.group) if self.scale.group is not None else "")
        rule = self.scale.rule + (f"{float(self.scale.percentile)!r}" if self.scale.rule == "percentile" else "")
        dtype = self.scale.dtype if self.scale.outer is None else str(self.scale.outer)
        return "/".join([VERSION, str(self.element), share, dtype, rule, "z" + self.zero, self.rounding])

    @staticmethod
    def parse(text: str) -> Scheme:
        """The scheme that printed as `text`, or has this name. Raises ValueError that says what was not understood."""
        return NAMED[text] if text in NAMED else _parse(text)

    def scales(self, rows: int, k: int) -> tuple[int, int]:
        """Rows and columns of the scales of a (rows, k) matrix."""
        return (1, 1) if self.scale.granularity == "tensor" else (rows, self.scale.groups(k))

    def refusal(self, k: int) -> str:
        """Why rows of `k` cannot be stored so; "" if they can."""
        if isinstance(self.element, Codebook) and k % self.element.dim:
            return (
                f"its rows of {k} are no whole runs of {self.element.dim}, as {self.element} takes them: choose another"
            )
        return ""

    def tensors(self, rows: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names (suffixes), dtypes and shapes of what is stored for a (rows, k) matrix."""
        scale_rows, groups = self.scales(rows, k)
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "packed": (torch.int32, (rows, self.element.words(k))),
            **self.scale.tensors(scale_rows, groups),
        }
        if self.zero == "int":
            stored["zero_point"] = (torch.int32, (self.element.words(scale_rows), groups))
        elif self.zero == "real":
            stored["zero"] = (self.scale.torch_dtype, (scale_rows, groups))
        elif isinstance(self.element, Codebook):
            stored["codebook"] = (self.scale.torch_dtype, (self.element.levels, self.element.dim))
        return stored

    def nbytes(self, rows: int, k: int) -> int:
        """Bytes of everything that is stored for a (rows, k) matrix."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors(rows, k).values())

    def bits_per_weight(self, rows: int, k: int) -> float:
        """Stored bits per element, scales and zero points included."""
        return 8 * self.nbytes(rows, k) / max(1, rows * k)

    def fits(self, k: int) -> bool:
        """Whether groups divide a row of `k` evenly (foreign formats require it; ours may end short)."""
        return self.scale.granularity != "group" or (k > 0 and k % self.scale.group_of(k) == 0)


@lru_cache(maxsize=1024)
def _plain(scheme: Scheme) -> Scheme:
    rule: Rule = "minmax" if scheme.scale.rule in POWERS else scheme.scale.rule
    return replace(scheme, scale=replace(scheme.scale, dtype="float32", outer=None, rule=rule))


@lru_cache(maxsize=4096)
def _parse(text: str) -> Scheme:
    parts = text.split("/")
    if len(parts) != 7:
        raise ValueError(f"scheme {text!r}: expected 7 parts separated by '/', got {len(parts)}")
    version, element, share, dtype, rule, zero, rounding = parts
    if version != VERSION:
        raise ValueError(f"scheme {text!r}: version {version!r} is not known here (this laconic reads {VERSION})")
    try:
        parsed = parse_element(element)
    except ValueError as error:
        raise ValueError(f"scheme {text!r}: {error}") from None
    group = share.removeprefix("group") if share.startswith("group") else None
    if group is not None and not group.isdigit():
        raise ValueError(f"scheme {text!r}: {share!r} needs a group length, as in group64")
    percentile = 99.9
    if rule.startswith("percentile"):
        try:
            percentile, rule = float(rule.removeprefix("percentile")), "percentile"
        except ValueError:
            raise ValueError(f"scheme {text!r}: {rule!r} needs a number, as in percentile99.9") from None
    if not zero.startswith("z"):
        raise ValueError(f"scheme {text!r}: zero {zero!r} is one of znone, zint, zreal")
    outer = NestedScales.parse(dtype)
    scale = Scale(
        granularity="group" if group is not None else share,  # type: ignore[arg-type]
        group=int(group) if group is not None else None,
        dtype=dtype if outer is None else "float32",
        rule=rule,  # type: ignore[arg-type]
        percentile=percentile,
        outer=outer,
    )
    scheme = Scheme(parsed, scale, zero[1:], rounding)  # type: ignore[arg-type]
    if str(scheme) != text:
        raise ValueError(f"scheme {text!r}: spelled {str(scheme)!r}")
    return scheme


def _mx(element: str) -> Scheme:
    return Scheme(Float(element), Scale("group", 32, "e8m0", "floor"))


# Formats of others by the name that they have there. `nf4` is that of QLoRA, scales in 8 bits and all.
NAMED: dict[str, Scheme] = {
    "fp8": Scheme(Float("e4m3")),
    "fp8_e4m3": Scheme(Float("e4m3")),
    "fp8_e5m2": Scheme(Float("e5m2")),
    "mxfp4": _mx("e2m1"),
    "mxfp6": _mx("e3m2"),
    "mxfp6_e2m3": _mx("e2m3"),
    "mxfp6_e3m2": _mx("e3m2"),
    "mxfp8": _mx("e4m3"),
    "mxfp8_e4m3": _mx("e4m3"),
    "mxfp8_e5m2": _mx("e5m2"),
    "mxint8": _mx("int8"),
    "nf4": Scheme(Levels("nf4"), Scale("group", 64, outer=NestedScales())),
    "nvfp4": Scheme(Float("e2m1"), Scale("group", 16, "e4m3")),
}
