"""What a measured record says, in words and rows: shared by the page, the terminal and the JSON line.

A record is the dict that `laconic compress` measures and saves as `report.json`. Every figure in it may be
`None` (not measured, or it does not apply); `clean` turns everything else into plain JSON first.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import text

__all__ = ["Row", "badges", "before_after", "clean", "get", "time_sentence", "unit_of", "verdict_sentence"]

NOT_MEASURED = "not measured"
NO_NUMBER = "no number any more"
NOISE = 0.03  # of a latency: less than this is "as fast"


class Row(NamedTuple):
    """One line of the before/after table."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None  # None: neither better nor worse, or not known


def clean(x: Any) -> Any:
    """`x` as plain JSON types: numpy scalars become numbers, NaN and infinity `None`, the rest text."""
    if x is None or isinstance(x, (str, bool)):
        return x
    if isinstance(x, Mapping):
        return {str(k): clean(v) for k, v in x.items()}
    if hasattr(
        x, "tolist"
    ):  # numpy arrays and scalars, torch tensors: by duck typing, since neither is imported
        return clean(x.tolist())
    if isinstance(x, (list, tuple)):
        return [clean(v) for v in x]
    if isinstance(x, numbers.Integral):
        return int(x)
    if isinstance(x, numbers.Real):
        return float(x) if math.isfinite(x) else None
    return str(x)


def get(record: Any, *path: str) -> Any:
    """The value at a path of keys, `None` where any of them is missing or `None`."""
    for key in path:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def unit_of(record: Mapping) -> str:
    """What the drop is counted in: points or %."""
    return get(record, "task", "unit") or ("points" if get(record, "task", "bounded") else "%")


def verdict_sentence(record: Mapping) -> str:
    """The recorded verdict, or the same sentence built from the figures."""
    given = get(record, "verdict", "sentence")
    if given:
        return str(given)
    ratio = record.get("ratio")
    parts = [f"{text.ratio(ratio)} smaller" if ratio else "size not known"]
    if record.get("drop") is None:
        parts.append("quality not measured")
    else:
        parts.append(_drop(record))
    words = " and ".join(word for word, _ in badges(record))
    return ", ".join(parts) + (f": {words}" if words else "")


def badges(record: Mapping) -> list[tuple[str, str]]:
    """The verdict as words with their tone: good, warn, bad."""
    met, certified = get(record, "verdict", "met"), get(record, "verdict", "certified")
    found = []
    if met is not None:
        found.append(("met", "good") if met else ("missed", "bad"))
    if met and certified is not None:
        found.append(("certified", "good") if certified else ("not certified", "warn"))
    return found


def time_sentence(record: Mapping) -> str | None:
    """Whether the packed model is faster, in plain words; says so when bytes are saved and time is not."""
    given = get(record, "latency", "sentence")
    if given:
        return str(given)
    before, after = get(record, "before", "latency_ms"), get(record, "after", "latency_ms")
    if not before or not after:
        return None
    pair = f"{text.ms(after)} packed against {text.ms(before)} in floating point"
    if after < before * (1 - NOISE):
        return f"This model is also faster: {pair}."
    small = (record.get("ratio") or 0) > 1
    if after <= before * (1 + NOISE):
        return (
            f"This model is smaller, not faster: as fast as before, {pair}." if small else f"As fast: {pair}."
        )
    factor = f"{text.ratio(after / before)} the time"
    return f"This model is smaller, not faster: {factor}, {pair}." if small else f"Slower: {factor}, {pair}."


def _factor(before: float | None, after: float | None, less: str, more: str) -> tuple[str, bool | None]:
    if not before or not after:
        return (NOT_MEASURED if before is None and after is None else ""), None
    if 1 / (1 + NOISE) <= after / before <= 1 + NOISE:
        return "about the same", None
    smaller = after < before
    return f"{text.ratio(before / after if smaller else after / before)} {less if smaller else more}", smaller


def _setting(record: Mapping) -> str:
    """The batch and length that a latency was measured at."""
    latency = record.get("latency") or {}
    known = [
        f"{name} {latency[key]}" for key, name in (("batch", "batch"), ("seq", "length")) if latency.get(key)
    ]
    if latency.get("threads"):
        known.append(f"{latency['threads']} thread" + ("s" if latency["threads"] != 1 else ""))
    return f" ({', '.join(known)})" if known else ""


def before_after(record: Mapping) -> list[Row]:
    """The rows of the before/after table: size, metric, other metrics, latency, peak memory."""
    before, after = record.get("before") or {}, record.get("after") or {}
    bounded = bool(get(record, "task", "bounded"))

    def row(label: str, key: str, show: Callable, less: str, more: str) -> Row:
        first, last = before.get(key), after.get(key)
        change, better = _factor(first, last, less, more)
        return Row(label, show(first), show(last), change, better)

    rows = [row("Size", "size", text.bytes_, "smaller", "larger")]
    if record.get("task"):
        first, last = text.value(before.get("value"), bounded), text.value(after.get("value"), bounded)
        metric = str(get(record, "task", "metric") or "quality")
        rows.append(Row(metric, first, last, _drop(record), get(record, "verdict", "met")))
    for name, pair in (record.get("also") or {}).items():
        a, b = (list(pair or []) + [None, None])[:2]
        share = bounded and all(v is None or 0 <= v <= 1 for v in (a, b))
        rows.append(Row(name, text.value(a, share), text.value(b, share), _moved(a, b, share), None))
    rows.append(row("Latency" + _setting(record), "latency_ms", text.ms, "faster", "slower"))
    if before.get("peak_rss") or after.get("peak_rss"):
        rows.append(row("Peak memory", "peak_rss", text.bytes_, "less", "more"))
    return rows


def _drop(record: Mapping) -> str:
    """The drop with its interval."""
    if record.get("drop") is None:
        was, now = get(record, "before", "value"), get(record, "after", "value")
        return NO_NUMBER if was is not None and now is None else NOT_MEASURED
    spread = text.interval(record.get("drop_low"), record.get("drop_high"))
    return f"drop {text.drop(record['drop'], unit_of(record))}" + (f" ({spread})" if spread else "")


def _moved(first: float | None, last: float | None, points: bool) -> str:
    """How far a further metric moved, without a verdict: which way is better is not recorded for these."""
    if first is None or last is None or (not points and not first):
        return ""
    moved = 100 * (last - first) if points else 100 * (last - first) / abs(first)
    sign = "+" if moved > 0 else ""
    return f"{sign}{text.drop(round(moved, 2), 'points' if points else '%')}"
