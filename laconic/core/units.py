"""The units of a model: every parameter, how it may be stored, and the reason where it is left alone.

Everything here is known from shapes: no weight is read.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.record import PACK, Record
from laconic.core.structure import ParameterInfo, Structure
from laconic.errors import BadInput
from laconic.nn.packed import PackedParameterSpec, View, _is_conv1d, matrix_shape, op_of
from laconic.numerics import Int, Scale, Scheme

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BITS = (8, 7, 6, 5, 4, 3, 2)
SMALLEST = 256  # elements: below this, scales and header rows cost as much as is saved
OVERHEAD = 512  # bytes of header that the four tensors of a packed parameter add, an upper bound


@dataclass
class Unit:
    """A parameter and what may be done with it.

    Attributes:
        name: canonical path; `names` holds all of them (ties).
        shape, dtype: of the float parameter.
        op: packed op that will run it: "linear", "conv", "embedding", "experts", or "parameter" (dequantized on access:
            bytes saved, no speed).
        view: how it becomes a matrix.
        calls: reads in a forward pass.
        reason: why it can only stay as it is; "" if it can be packed.
        options: schemes it may be stored under, best first. None in `choice` means: as it is.
        protected: named by --keep or --exclude: its values stay what they are.
        inputs: how its inputs are rounded when it runs packed; see `PackedParameterSpec`.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    op: str
    view: View
    calls: int
    reason: str
    options: list[Scheme] = field(default_factory=list)
    protected: bool = False
    inputs: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the float parameter."""
        return self.numel * self.dtype.itemsize

    def spec(self, scheme: Scheme) -> PackedParameterSpec:
        """How it is stored under a scheme."""
        return PackedParameterSpec(scheme, self.shape, self.view, self.inputs)

    def record(self, scheme: Scheme, tensors: Mapping[str, Tensor] | None = None, **said: Any) -> Record:
        """What packing it under a scheme is, with its tensors and what else there is to say."""
        data = {"spec": self.spec(scheme).to_json(), "aliases": list(self.names[1:]), "op": self.op, **said}
        return Record(PACK, self.name, data, dict(tensors or {}))

    def stored(self, scheme: Scheme | None) -> int:
        """Bytes under a scheme (header share included), or as it is."""
        if scheme is None:
            return self.nbytes
        sizes = (math.prod(shape) * dtype.itemsize for dtype, shape in self.spec(scheme).tensors().values())
        return sum(sizes) + OVERHEAD + 128 * (len(self.names) > 1)


def find_units(
    model: nn.Module,
    structure: Structure,
    *,
    keep: Sequence[str] = (),
    exclude: Sequence[str] = (),
    bits: Sequence[int] = BITS,
    offer: Callable[[Unit, Sequence[int]], list[Scheme]] | None = None,
) -> list[Unit]:
    """Every parameter as a unit, in the model's order.

    Args:
        model: real or on meta.
        structure: of the model.
        keep: patterns of parameters that stay float.
        exclude: patterns that no pass may touch.
        bits: widths to offer.
        offer: what a unit may be stored as at some widths; `schemes_for` by default.

    Raises:
        BadInput: a pattern matches no parameter.
    """
    units = [_unit(model, info, bits, offer or schemes_for) for info in structure.parameters.values()]
    for flag, patterns in (("--keep", keep), ("--exclude", exclude)):
        for pattern in patterns:
            hit = [u for u in units if any(matches(pattern, name) for name in u.names)]
            if not hit:
                raise BadInput(f"{flag} {pattern!r} matches no parameter; `laconic inspect` lists them")
            for unit in hit:
                unit.reason, unit.options, unit.protected = f"named by {flag} {pattern}", [], True
    return units


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter: its path, a module above it, or a glob."""
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def _unit(
    model: nn.Module, info: ParameterInfo, bits: Sequence[int], offer: Callable[[Unit, Sequence[int]], list[Scheme]]
) -> Unit:
    path, _, attribute = info.name.rpartition(".")
    module = model.get_submodule(path)
    op = op_of(module, attribute)
    if op != "parameter" and not _forward_reads(info, path):
        op = "parameter"  # another module reads the weight by itself: the packed op would never run
    view: View = "last"
    if _is_conv1d(module):
        view = "transposed"
    elif len(info.shape) > 1 and op_of(module, attribute) in ("linear", "conv", "embedding"):
        view = "rows"
    unit = Unit(info.name, info.names, info.shape, info.dtype, op, view, info.calls, _reason(info, module))
    if not unit.reason:
        unit.options = offer(unit, bits)
        if not unit.options:
            unit.reason = "nothing that is offered would make it smaller"
    return unit


def _forward_reads(info: ParameterInfo, owner: str) -> bool:
    owners = {name.rpartition(".")[0] for name in info.names}
    return any(use.module in owners for use in info.uses)


def _reason(info: ParameterInfo, module: nn.Module) -> str:
    numel = math.prod(info.shape)
    if info.dtype not in FLOATS:
        return f"{str(info.dtype).removeprefix('torch.')}, not a float"
    if numel == 0:
        return "has no elements"
    if len(info.shape) < 2:
        return "one-dimensional: a scale or a bias, small and sensitive"
    if numel < SMALLEST:
        return f"{numel} elements: scales and names would cost what is saved"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm changes its weight in every forward"
    return ""


def schemes_for(unit: Unit, bits: Sequence[int] = BITS) -> list[Scheme]:
    """What a unit may be stored as, in order of falling size: symmetric by row at 8 and 7 bits, in groups with integer
    zero points below, finer groups at fewer bits."""
    rows, k = matrix_shape(unit.shape, unit.view)
    options: list[Scheme] = []
    for b in sorted(bits, reverse=True):
        if b >= 7:
            found = [Scheme(Int(b), Scale("channel", dtype="float16"))]
            if k >= 256:
                found.insert(0, _grouped(b, k, 128))
        elif b >= 5:
            found = [_grouped(b, k, 128)]
        elif b == 4:
            found = [_grouped(4, k, 32), _grouped(4, k, 128)]
        elif b == 3:
            found = [_grouped(3, k, 32), _grouped(3, k, 64)]
        else:
            found = [_grouped(2, k, 32), _grouped(2, k, 64)]
        for scheme in found:
            smaller = not options or unit.stored(scheme) < unit.stored(options[-1])
            if scheme not in options and smaller and unit.stored(scheme) < unit.nbytes:
                options.append(scheme)
    return options


def _grouped(bits: int, k: int, target: int) -> Scheme:
    """Groups of the largest length up to `target` that divides a row; a short last group where none above a half does."""
    length = next((g for g in range(min(target, k), target // 2, -1) if k % g == 0), min(target, k))
    if length >= k:
        return Scheme(Int(bits), Scale("channel", dtype="float16"), zero="int")
    return Scheme(Int(bits), Scale("group", group=length, dtype="float16"), zero="int")
