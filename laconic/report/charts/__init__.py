"""The charts of the report, each a function from the record to SVG."""

from __future__ import annotations

from .bars import drop_strip, kind_bars, size_bars, stage_bar
from .histograms import histograms
from .pareto import pareto
from .units import unit_panels, widths

__all__ = [
    "drop_strip",
    "histograms",
    "kind_bars",
    "pareto",
    "size_bars",
    "stage_bar",
    "unit_panels",
    "widths",
]
