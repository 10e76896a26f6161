"""The tables in the terminal: whole figures at 80 and at 140 columns, no line too long, gaps survived."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from laconic.report import comparison_table, inspect_tree, plan_table, summary_table

from .sample import make_plan, make_record

WIDTHS = pytest.mark.parametrize("width", [80, 140])


def lines(renderable, width: int) -> list[str]:
    console = Console(width=width, color_system=None, record=True, file=StringIO())
    console.print(renderable)
    found = console.export_text().splitlines()
    assert max(map(len, found)) <= width
    return [line.rstrip() for line in found]


def row(found: list[str], start: str) -> str:
    (line,) = [line for line in found if line.strip().startswith(start)]
    return line


@WIDTHS
def test_summary(width):
    found = lines(summary_table(make_record(40)), width)
    assert "4.46x smaller, drop 0.1 points (95 %: -0.2 to 0.5): met and certified" in found
    assert row(found, "Size").split() == ["Size", "91.2", "MB", "20.5", "MB", "4.46x", "smaller"]
    assert "95.71 %   95.61 %" in row(found, "same-topic")
    assert "1.16x slower" in row(found, "Latency")
    text = " ".join(found)
    assert "This model is smaller, not faster" in text
    assert "99.62 % of the elements are stored in fewer bits; 27 of 1,725 answers changed." in text
    assert "12 of 40 units were taken over" in text
    assert row(found, "Report").endswith("small/report.html")


@WIDTHS
def test_a_memory_ceiling_shows_weights_and_cache(width):
    told = {"bytes": 1_000_000, "weights": 600_000, "cache": 300_000, "tokens": 4096, "batch": 2, "cache_bits": "4 bits"}
    record = make_record(5)
    record["budget"] = {"memory": told}
    words = "900 kB of 1.00 MB: 600 kB weights + 300 kB cache in 4 bits for 2 x 4,096 tokens"
    assert f"Weights and cache: {words}." in " ".join(lines(summary_table(record), width))
    assert words in " ".join(" ".join(lines(plan_table({**make_plan(5), "memory": told}), width)).split())
    assert "Weights and cache" not in " ".join(lines(summary_table(make_record(5)), width))
    alone = "600 kB of 1.00 MB, weights alone"
    record["budget"] = {"memory": {**told, "cache": 0, "tokens": 0}}
    assert alone in " ".join(lines(summary_table(record), width))


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (20.0, "also faster"),
        (41.0, "smaller, not faster: as fast as before"),
        (82.4, "not faster: 2.00x the time"),
    ],
)
def test_the_sentence_about_time(packed, words):
    record = make_record(5)
    record["after"] = record["after"] | {"latency_ms": packed}
    assert words in " ".join(lines(summary_table(record), 140))


@pytest.mark.parametrize(
    ("met", "certified", "words"), [(True, False, "met and not certified"), (False, False, ": missed")]
)
def test_the_verdict_is_built_where_none_is_recorded(met, certified, words):
    record = make_record(5) | {"verdict": {"met": met, "certified": certified, "sentence": None}}
    assert any(line.endswith(words) for line in lines(summary_table(record), 140))


@WIDTHS
def test_comparison(width):
    record = make_record(5)
    assert lines(comparison_table(record), width)[0].split() == ["Before", "After", "Change"]
    record["before"]["name"], record["after"]["name"] = "float-model", "packed"
    found = lines(comparison_table(record), width)
    assert found[0].split() == ["float-model", "packed", "Change"]
    assert "27 of 1,725 answers differ." in found


@WIDTHS
def test_plan_of_few_units_names_each(width):
    plan = make_plan(7)
    found = lines(plan_table(plan), width)
    text = "".join(line.strip() for line in found)
    assert "embeddings.word_embeddings" in text
    assert f"{plan['least'] / 1e6:.2f} MB, 13.00x smaller" in row(found, "Least reachable")
    assert "1.30 GB (estimate)" in row(found, "Peak memory")
    assert "2 min 51 s (estimate)" in row(found, "Time")
    assert any("excluded by --exclude" in line for line in found)


@WIDTHS
def test_plan_of_many_units_sums_up_those_alike(width):
    found = lines(plan_table(make_plan(220)), width)
    assert len(found) < 60
    text = " ".join(found)
    assert "int8 channel" in text and "int4 group64" in text
    assert any("24x" in line or "25x" in line for line in found)


@WIDTHS
def test_tree_sums_along_the_path(width):
    record = make_record(37)  # a table and six whole blocks, the last layer of which is left alone
    found = lines(inspect_tree(record), width)
    total = sum(unit["bytes_before"] for unit in record["units"])
    assert f"{total / 1e6:.1f} MB" in row(found, "minilm")
    assert any("0-5  (6 alike)" in line for line in found)
    apart = lines(inspect_tree(record, repeated=True), width)
    assert len(apart) > len(found)
    assert not any("alike" in line for line in apart)
    ends = {len(line) for line in found}
    assert len(ends) == 1, "the figures stand in columns"


def test_gaps_are_no_error():
    for renderable in (summary_table({}), comparison_table({}), plan_table({}), inspect_tree({})):
        assert lines(renderable, 80)
    bare = {"units": [{"name": "weight"}, {"name": "a.0.b"}, {"name": "a.1.b", "bytes": None}]}
    assert "0-1" in " ".join(lines(inspect_tree(bare), 80))
    assert lines(plan_table(bare), 80)


def test_text_from_outside_is_not_read_as_markup():
    record = make_record(5)
    record["model"]["name"] = "[red]x[/nonsense]"
    record["out"] = "[/b]"
    assert "[red]x[/nonsense]" in lines(summary_table(record), 80)
    plan = make_plan(3) | {"notes": ["[/oops]"], "model": "[/x]"}
    plan["units"][0]["name"] = plan["units"][2]["reason"] = "[/y]"
    assert any("[/oops]" in line for line in lines(plan_table(plan), 80))
    assert any("[/y]" in line for line in lines(inspect_tree(plan), 80))
