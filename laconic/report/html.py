"""The report: one HTML file with its style, script and charts inside, which asks nothing of the network."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup, escape

from . import charts, ledger, text
from .record import badges, before_after, clean, get, time_sentence, unit_of, verdict_sentence

__all__ = ["render_report", "write_report"]

WORST = 6  # histograms shown open
CHANGED = 12  # examples shown open


def _breaks(path: str) -> Markup:
    """A long name that may be broken after a dot or a slash, and not within a word."""
    return Markup(str(escape(path)).replace(".", ".<wbr>").replace("/", "/<wbr>"))


@cache
def _environment() -> Environment:
    """Templates beside this file; everything that is not our own markup is escaped."""
    loader = PackageLoader("laconic.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        bytes=text.bytes_,
        seconds=text.seconds,
        amount=text.amount,
        count=text.count,
        plain=text.plain,
        shape=ledger.shape,
        breaks=_breaks,
        scheme=text.scheme,
    )
    environment.globals["inline"] = lambda name: Markup(loader.get_source(environment, name)[0])
    return environment


def _flat(found: Mapping | None, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, value) lines."""
    rows: list[tuple[str, str]] = []
    for key, x in (found or {}).items():
        name = f"{prefix}{key}".removesuffix("_bytes").replace("_", " ")
        if isinstance(x, Mapping) and not x.get("text"):
            rows += _flat(x, f"{name} / ")
        else:
            rows.append((name, text.bytes_(x) if key.endswith("bytes") else text.plain(x)))
    return rows


def _settings(record: Mapping) -> list[tuple[str, str]]:
    """What the decision was made with: budget, seed, data and how time was measured."""
    budget = record.get("budget") or {}
    if budget.get("text"):
        budget = {"": budget["text"]}
    rows = [(f"budget {k}".strip(), text.plain(v)) for k, v in budget.items() if v is not None]
    task = record.get("task") or {}
    rows += [
        (name, text.plain(task[key]))
        for key, name in (("id", "task"), ("metric", "metric"), ("verify_n", "examples in the verify split"))
        if task.get(key) is not None
    ]
    latency = record.get("latency") or {}
    rows += [
        (f"latency: {name}", text.plain(latency[key]))
        for key, name in (("batch", "batch"), ("seq", "length"), ("threads", "threads"), ("rounds", "rounds"))
        if latency.get(key) is not None
    ]
    rows.append(("seed", text.plain(record.get("seed"))))
    return rows + _flat(record.get("decision"))


def _context(record: Mapping) -> dict[str, Any]:
    """Everything the template shows, in words and charts."""
    figures = charts.histograms(record)
    return {
        "record": record,
        "name": str(get(record, "model", "name") or "model"),
        "verdict": verdict_sentence(record),
        "badges": badges(record),
        "rows": before_after(record),
        "time_sentence": time_sentence(record),
        "unit": unit_of(record),
        "size_bars": charts.size_bars(record),
        "drop_strip": charts.drop_strip(record),
        "pareto": charts.pareto(record),
        "plans": [
            {
                "recipe": p["recipe"], "size": text.bytes_(p["size"]), "drop": text.drop(p["drop"], unit_of(record)),
                "what": re.sub(r", [\d.]+x$", "", str(p.get("name") or "")),
            }
            for p in record.get("tried") or []
            if p.get("recipe")
        ],
        "kinds": charts.kind_bars(record),
        "units": charts.unit_panels(record),
        "widths": charts.widths(record),
        "worst": figures[:WORST],
        "figures": figures[WORST:],
        "changed_open": CHANGED,
        "changed_of": _changed_of(record),
        "total": ledger.total(record),
        "schemes": [(text.scheme(s), s) for s in ledger.schemes(record)],
        "left_alone": ledger.left_alone(record),
        "stages": charts.stage_bar(record),
        "settings": _settings(record),
        "machine": _flat(record.get("machine")),
        "versions": _flat(record.get("versions")),
        "kernels": _flat(record.get("kernels")),
    }


def _changed_of(record: Mapping) -> int | None:
    """How many answers changed, where the record holds only the first of them; None where it holds all."""
    flips = record.get("flips")
    return flips if flips is not None and flips > len(record.get("changed") or []) else None


def render_report(record: Mapping) -> str:
    """The page of a measured record as text."""
    return _environment().get_template("report.html").render(_context(clean(record)))


def write_report(record: Mapping, path: str | os.PathLike) -> Path:
    """Write the report of a measured record as one self-contained HTML file, whole or not at all.

    Args:
        record: what `laconic compress` measured (the schema of `report.json`); figures may be missing.
        path: the file to write; what was there is replaced.

    Returns:
        The path.
    """
    path = Path(path)
    page = render_report(record)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path
