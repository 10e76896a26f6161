"""The one line that `--json` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .record import clean, get

__all__ = ["KEYS", "json_line"]

KEYS: dict[str, tuple[str, ...]] = {
    "size_before": ("before", "size"),
    "size_after": ("after", "size"),
    "ratio": ("ratio",),
    "metric": ("task", "metric"),
    "value_before": ("before", "value"),
    "value_after": ("after", "value"),
    "drop": ("drop",),
    "drop_low": ("drop_low",),
    "drop_high": ("drop_high",),
    "met": ("verdict", "met"),
    "certified": ("verdict", "certified"),
    "latency_before_ms": ("before", "latency_ms"),
    "latency_after_ms": ("after", "latency_ms"),
    "peak_rss_bytes": ("peak_rss_bytes",),
    "seconds": ("seconds", "total"),
    "coverage": ("coverage",),
    "units_reused": ("units_reused",),
    "out": ("out",),
    "report": ("report",),
}
"""Each key of the line and where its value stands in the record."""


def json_line(record: Mapping) -> str:
    """The record's main figures as exactly one line of strict JSON; `null` where a figure does not apply.

    Args:
        record: a measured record. NaN and infinity in it become `null`.
    """
    record = clean(record)
    return json.dumps({key: get(record, *path) for key, path in KEYS.items()}, allow_nan=False)
