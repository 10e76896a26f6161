"""What the passes that pack weights share: which parameters, and how a record packs one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from laconic.core.passes import Decision, Scope, Stage
from laconic.core.record import Record, apply_records
from laconic.core.structure import Structure
from laconic.core.units import Unit, find_units
from laconic.numerics import Int, Scheme


@dataclass(frozen=True)
class PackWeights:
    """Packs every parameter that can be, all under one scheme; `compress` decides a scheme for each instead.

    Args:
        scheme: how to store them, as a `Scheme` or its string form.
    """

    scheme: Scheme | str = "v1/int4/group64/float16/minmax/zint/nearest"

    stage: ClassVar[Stage] = "quantize"
    scope: ClassVar[Scope] = "module"
    ops: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "parameter")

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Parameter -> its scheme; parameter -> why it stays float."""
        scheme = str(self._scheme)
        units = find_units(model, structure)
        offered = [u for u in units if u.options]  # the others may have no matrix view at all
        refused = {u.name: self._scheme.refusal(u.spec(self._scheme).matrix[1]) for u in offered}
        chosen = {u.name: {"scheme": scheme} for u in offered if u.op in self.ops and not refused[u.name]}
        other = {u.name: f"it is read as {u.op}, which this pass leaves alone" for u in units}
        left = {u.name: u.reason or refused.get(u.name) or other[u.name] for u in units}
        return Decision(chosen, {name: why for name, why in left.items() if name not in chosen})

    def apply(self, model: nn.Module, record: Record) -> None:
        """Pack the parameter; its module computes from the packed form afterwards."""
        apply_records(model, [record])

    @property
    def _scheme(self) -> Scheme:
        return Scheme.parse(self.scheme) if isinstance(self.scheme, str) else self.scheme

    def _unit(self, path: str, structure: Structure, model: nn.Module) -> Unit:
        return next(u for u in find_units(model, structure) if u.name == path)


def check_integers(scheme: Scheme, name: str, method: str) -> None:
    """Refuse a scheme whose codes are not evenly spaced integers, for a method that reckons with them.

    Raises:
        ValueError: naming the parameter, the scheme and what takes it.
    """
    if not isinstance(scheme.element, Int) or not scheme.scale.plain:
        raise ValueError(f"{name}: {method} works on integer codes, not on {scheme}; round it to nearest (rtn) instead")


CARD = None  # passes share this; it is none itself
