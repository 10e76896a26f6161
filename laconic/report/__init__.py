"""Renders measured records: the HTML report, tables for the terminal, the JSON line. Needs no torch."""

from __future__ import annotations

from .answers import labels_table, similarity_table, speed_line
from .blame import blame_lines
from .examine import examine_lines
from .explain import explain_lines
from .findings import calibration_table, finding_table
from .html import render_report, write_report
from .jsonline import json_line
from .normalize import normalize_table
from .plan import plan_table
from .record import clean
from .terminal import comparison_table, summary_table
from .tree import inspect_tree

__all__ = [
    "blame_lines",
    "calibration_table",
    "clean",
    "comparison_table",
    "examine_lines",
    "explain_lines",
    "finding_table",
    "inspect_tree",
    "json_line",
    "labels_table",
    "normalize_table",
    "plan_table",
    "render_report",
    "similarity_table",
    "speed_line",
    "summary_table",
    "write_report",
]
