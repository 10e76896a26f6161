"""Budgets as users write them: `"size=4x, latency=2x, drop=1, memory=8GB"`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from laconic.errors import BadInput

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NUMBER = re.compile(r"(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z%]*)")
HELP = 'write it like "size=4x, drop=1" or "size=20MB"'


@dataclass(frozen=True)
class Budget:
    """What the user bounds. None: not bounded.

    Attributes:
        size: bytes that `model.safetensors` may have, or
        size_ratio: how many times smaller than the weight files as given.
        drop: points for a bounded metric, per cent otherwise; positive is worse.
        latency: how many times faster ("2x"), or milliseconds ("5ms"), on a batch of the user's size.
        memory: bytes that the weights and a decoder's cache of keys and values may take together.
        text: as written.
    """

    size: int | None = None
    size_ratio: float | None = None
    drop: float | None = None
    latency: str | None = None
    memory: int | None = None
    text: str = ""

    def milliseconds(self, before: float) -> float | None:
        """Milliseconds that a forward may take, given those of the float model."""
        if self.latency is None:
            return None
        value = self.latency.lower()
        if value.endswith("ms"):
            return float(value.removesuffix("ms"))
        return before / float(value.removesuffix("x"))

    def ceiling(self, size_before: int) -> int | None:
        """Bytes that the file may have, given the bytes before."""
        if self.size is not None:
            return self.size
        return int(size_before / self.size_ratio) if self.size_ratio else None


UNBOUNDED = Budget(text="none")


def parse_budget(text: str | Budget | None) -> Budget:
    """The budget that a text states.

    Raises:
        BadInput: it does not parse, names something unknown, or bounds the same thing twice.
    """
    if text is None:
        return Budget(size_ratio=4.0, text="size=4x")
    if isinstance(text, Budget):
        return text
    if not isinstance(text, str):
        raise BadInput(f"a budget is a text or a Budget, not {text!r} ({type(text).__name__}): {HELP}")
    found: dict[str, object] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (s.strip() for s in part.partition("="))
        name = name.lower()
        if not equals or not value:
            raise BadInput(f"the budget {text!r} does not parse at {part!r}: {HELP}")
        if name in found or (name == "size" and "size_ratio" in found):
            raise BadInput(f"the budget {text!r} bounds {name} twice")
        if name == "size" and value.lower().endswith("x"):
            found["size_ratio"] = _positive(value[:-1], text, part)
        elif name in ("size", "memory"):
            found[name] = parse_bytes(value, f"the budget {text!r}")
        elif name == "drop":
            found["drop"] = _positive(value.rstrip("%"), text, part, zero=True)
        elif name == "latency":
            _positive(value.lower().removesuffix("x").removesuffix("ms"), text, part)
            found["latency"] = value
        else:
            raise BadInput(f"the budget {text!r} names {name!r}; known are size, drop, latency and memory: {HELP}")
    if not found:
        raise BadInput(f"the budget {text!r} is empty: {HELP}")
    return Budget(**found, text=text)  # type: ignore[arg-type]


def parse_bytes(text: str, where: str = "the size") -> int:
    """Bytes of "8GB", "500 MiB" or "1000000"."""
    match = _NUMBER.fullmatch(text.strip())
    if not match or match["unit"].lower() not in UNITS:
        raise BadInput(f"{where} has {text!r}, which is no size: write a number and one of B, KB, MB, GB, MiB, GiB")
    size = float(match["value"]) * UNITS[match["unit"].lower()]
    if not 1 <= size < float("inf"):
        raise BadInput(f"{where} has {text!r}, which is no size: it must be finite, and a byte at least")
    return int(size)


def _positive(value: str, text: str, part: str, zero: bool = False) -> float:
    try:
        number = float(value)
    except ValueError:
        raise BadInput(f"the budget {text!r} does not parse at {part!r}: {HELP}") from None
    if not (number > 0 or (zero and number == 0)) or number == float("inf"):
        least = "of zero or more" if zero else "above zero"
        raise BadInput(f"the budget {text!r} has {part!r}, which must be a finite number {least}")
    return number
