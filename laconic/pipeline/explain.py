"""Why each parameter got the bits that it got: what its options cost, and the price of a byte in the plan.

The plan is that of least total cost under a ceiling of bytes (see `decide`). In the best such plan no exchange gains: no byte
taken from one parameter lowers the total more in another. So beside each choice stand the next options up and down, with
the share of the total cost that they would take away or add and the bytes for it; and the price, the best that any
parameter offers for more bytes:

    price = max over parameters and their larger options of (cost now - cost there) / (bytes there - bytes now)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laconic.core.units import Unit
from laconic.numerics import Scheme

__all__ = ["explain"]


def explain(
    units: Sequence[Unit], costs: Mapping[str, Sequence[float]], decision: Mapping[str, Scheme | None]
) -> dict[str, Any]:
    """What a plan weighed.

    Args:
        units: those that can be packed.
        costs: of every option of every unit, in their order.
        decision: what was chosen; units that it does not name are as they were.

    Returns:
        `total` (cost of the plan), `price` (cost that a megabyte more would take away, at best; None where nothing is
        left to gain), and `units`: name -> `chosen` (scheme, None: float), `bytes`, `share` of the total, `up` and `down`
        (the neighbouring options, None where there is none: `scheme`, `bytes` more or less, and `share` of the total that
        they add or take away).
    """
    tables = {unit.name: _options(unit, costs[unit.name]) for unit in units}
    chosen = {unit.name: decision.get(unit.name) for unit in units}
    now = {name: next(row for row in table if row[0] == chosen[name]) for name, table in tables.items()}
    total = sum(row[2] for row in now.values())
    price, found = 0.0, {}
    for name, table in tables.items():
        scheme, size, cost = now[name]
        larger = [row for row in table if row[1] > size and row[2] < cost]
        smaller = [row for row in table if row[1] < size]
        price = max([price, *((cost - row[2]) / (row[1] - size) for row in larger)])
        found[name] = {
            "chosen": None if scheme is None else str(scheme), "bytes": size, "share": cost / total if total else 0.0,
            "up": _step(min(larger, key=lambda row: row[1], default=None), size, cost, total),
            "down": _step(max(smaller, key=lambda row: row[1], default=None), size, cost, total),
        }  # fmt: skip
    return {"total": total, "price": 1e6 * price if price else None, "units": found}


def _options(unit: Unit, costs: Sequence[float]) -> list[tuple[Scheme | None, int, float]]:
    """(scheme, bytes, cost) of leaving a unit as it is and of every option."""
    return [(None, unit.nbytes, 0.0), *((s, unit.stored(s), c) for s, c in zip(unit.options, costs, strict=True))]


def _step(row: tuple[Scheme | None, int, float] | None, size: int, cost: float, total: float) -> dict[str, Any] | None:
    if row is None:
        return None
    share = (row[2] - cost) / total if total else 0.0
    return {"scheme": None if row[0] is None else str(row[0]), "bytes": row[1] - size, "share": share}
