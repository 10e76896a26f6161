"""The JSON line: exactly these keys in this order, one line, null for what is not a number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from laconic.report import clean, json_line

from .sample import make_record

KEYS = [
    "size_before",
    "size_after",
    "ratio",
    "metric",
    "value_before",
    "value_after",
    "drop",
    "drop_low",
    "drop_high",
    "met",
    "certified",
    "latency_before_ms",
    "latency_after_ms",
    "peak_rss_bytes",
    "seconds",
    "coverage",
    "units_reused",
    "out",
    "report",
]


def strict(line: str) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert "\n" not in line
    return json.loads(line, parse_constant=refuse)


def test_keys_and_values():
    record = make_record(5)
    found = strict(json_line(record))
    assert list(found) == KEYS
    assert found["size_before"] == record["before"]["size"]
    assert found["latency_after_ms"] == record["after"]["latency_ms"]
    assert found["seconds"] == record["seconds"]["total"]
    assert found["metric"] == "same-topic retrieval P@1"
    assert (found["met"], found["certified"], found["out"]) == (True, True, "small")


@pytest.mark.parametrize("nothing", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), None])
def test_what_is_not_a_number_is_null(nothing):
    record = make_record(5) | {"drop": nothing, "ratio": nothing, "before": {"size": nothing}, "task": None}
    found = strict(json_line(record))
    assert list(found) == KEYS
    assert [found[k] for k in ("drop", "ratio", "size_before", "value_before", "metric")] == [None] * 5


def test_an_empty_record_is_all_null():
    assert set(strict(json_line({})).values()) == {None}


def test_numpy_and_paths_become_plain():
    record = {"ratio": np.float32(4.5), "units_reused": np.int64(3), "out": Path("a")}
    record["verdict"] = {"met": np.bool_(True)}
    found = strict(json_line(record))
    assert (found["ratio"], found["units_reused"], found["out"], found["met"]) == (4.5, 3, "a", True)
    assert clean({1: (np.array([1.0, np.inf]), {"x": b"y"})}) == {"1": [[1.0, None], {"x": "b'y'"}]}
    assert clean(True) is True


def test_a_line_break_in_a_name_stays_within_the_line():
    assert strict(json_line({"out": "a\nb"}))["out"] == "a\nb"
