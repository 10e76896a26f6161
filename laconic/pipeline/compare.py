"""`compare`: two models side by side, on the same examples."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from laconic.errors import BadInput
from laconic.tasks import compare as compare_evaluations
from laconic.tasks import load_task

from .measure import latency_ms, machine, peak_rss, run_batch, versions
from .source import Source, resolve


def compare(
    a: Any,
    b: Any,
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    batch: int | None = None,
    seq: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure two models (or artifacts) on the verify split of some data, paired.

    Args:
        a, b: folders, fetched names, `module:function`, artifacts or modules; `a` counts as before.
        data: as in `compress`.
        columns, batch, seq, seed: as in `compress`.
        progress: is called with (stage, done, total).

    Returns:
        A record as `compress` reports it, without units and ledger.

    Raises:
        BadInput: no data, or a model that cannot be loaded.
    """
    if data is None:
        raise BadInput("a comparison needs examples: pass --data or --task")
    show = progress or (lambda stage, done, total: None)
    begin = time.perf_counter()
    first, second = _open(a, None), _open(b, a)
    task = load_task(data, first.source or second.source, columns, seed, batch=batch, seq=seq)
    before = task.evaluate(first.model, "verify", lambda d, t: show("first", d, t))
    after = task.evaluate(second.model, "verify", lambda d, t: show("second", d, t))
    found = compare_evaluations(before, after, task.metric, seed)
    n = batch or 1
    times = _latencies(task, first.model, second.model, n, seq)
    unit = "points" if task.metric.bounded else "%"
    return {
        "version": 1, "command": " ".join(sys.argv), "seed": seed,
        "verdict": {"met": None, "certified": None, "exit_code": 0, "sentence": f"{second.name} against {first.name}"},
        "model": {
            "name": f"{first.name} -> {second.name}", "kind": "comparison", "class": type(second.model).__name__, "parameters": None,
        },
        "task": {
            "id": task.id, "metric": task.metric.name, "higher_is_better": task.metric.higher_is_better,
            "bounded": task.metric.bounded, "unit": unit, "verify_n": found.n,
        },
        "budget": {"size": None, "drop": None, "latency": None, "memory": None},
        "before": {"size": first.size, "value": found.before, "latency_ms": times["before"], "peak_rss": None, "name": first.name},
        "after": {"size": second.size, "value": found.after, "latency_ms": times["after"], "peak_rss": None, "name": second.name},
        "ratio": first.size / second.size if second.size else None, "drop": found.drop, "drop_low": found.low,
        "drop_high": found.high, "flips": found.flips,
        "also": {name: [before.also.get(name), value] for name, value in after.also.items()},
        "latency": {
            "batch": n, "seq": seq, "threads": machine()["threads"], "rounds": 7, "sentence": "",
            "ratio": times["before"] / times["after"] if times["before"] and times["after"] else None,
        },
        "coverage": None, "units_reused": None, "units_total": None,
        "seconds": {"total": time.perf_counter() - begin, "stages": {}}, "peak_rss_bytes": peak_rss(),
        "tried": [], "units": [], "ledger": [], "ledger_header": None, "ledger_padding": None, "changed": [], "notes": task.notes,
        "machine": machine(), "versions": versions(), "kernels": {}, "out": None, "report": None,
    }  # fmt: skip


def _latencies(task: Any, before: nn.Module, after: nn.Module, n: int, seq: int | None) -> dict[str, float | None]:
    """Median milliseconds of both on one batch; None for a scoring function that has no inputs to show."""
    try:
        one = task.batches("verify", batch=n, seq=seq, limit=n)[0]
    except (BadInput, NotImplementedError, IndexError):
        return {"before": None, "after": None}
    runs = {"before": lambda: run_batch(task, before, one), "after": lambda: run_batch(task, after, one)}
    return dict(latency_ms(runs))


class _Opened:
    """A model, its source if it has one, and the bytes of its weight files."""

    def __init__(self, name: str, model: nn.Module, size: int, source: Source | None):
        self.name, self.model, self.size, self.source = name, model, size, source


def _open(model: Any, skeleton_of: Any) -> _Opened:
    if isinstance(model, (str, Path)) and (Path(model) / "laconic.json").exists():
        from .load import load

        size = (Path(model) / "model.safetensors").stat().st_size
        try:
            return _Opened(str(model), load(model), size, None)
        except BadInput:
            if skeleton_of is None:
                raise
            return _Opened(str(model), load(model, into=resolve(skeleton_of).skeleton()), size, None)
    source = resolve(model)
    return _Opened(source.name, source.load(), source.size_before, source)
