"""Figures: ticks that read as numbers, and series that can be told apart however many there are."""

from __future__ import annotations

import re

from laconic.core.figure import chart


def test_ticks() -> None:
    drawn = chart({"one": [(1024.0, 52.83), (4096.0, -0.0002)]}, "t", "tokens", "loss")
    shown = re.findall(r'class="dim"[^>]*>([^<]*)<', drawn)
    assert {"1,024", "4,096", "52.8", "-0.0002"} <= set(shown)


def test_every_name_has_a_mark_of_its_own() -> None:
    drawn = chart({f"series {i}": [(float(i), float(i))] for i in range(24)}, "t", "x", "y")
    marks = re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="10" height="10" ([^/]*)/>', drawn)
    assert len(marks) == len(set(marks)) == 24
