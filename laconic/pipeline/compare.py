"""`compare`: two models side by side, on the same examples."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.errors import BadInput, LaconicError
from laconic.report.record import clean
from laconic.tasks import TASKS, Evaluation, Task, load_task
from laconic.tasks import compare as compare_evaluations

from .artifact import is_artifact
from .load import load, usable_device
from .measure import latency_ms, machine, peak_rss, run_batch, versions
from .observe import innermost_module
from .source import Source, resolve
from .source_base import first_line
from .source_quantized import opened
from .tensorfile import SINGLE


def compare(
    a: Any,
    b: Any,
    data: Any = None,
    *,
    columns: Mapping[str, str] | None = None,
    batch: int | None = None,
    seq: int | None = None,
    task: str | Task | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure two models (or artifacts) on the verify split of some data, paired.

    Args:
        a, b: folders, fetched names, `module:function`, artifacts or modules; `a` counts as before.
        data, task, columns, batch, seq, seed: as in `compress`.
        device: where both run; their weights, packed ones too, go there.
        progress: is called with (stage, done, total).

    Returns:
        A record as `compress` reports it, without units and ledger.

    Raises:
        BadInput: no data, a model that cannot be loaded or fails on the data, or a device that is not there.
    """
    if data is None and task is None:
        raise BadInput("a comparison needs examples: pass --data or --task")
    if data is not None and task is not None:
        raise BadInput("both data and a task were named, and each says what the examples are: give one of them")
    show = progress or (lambda stage, done, total: None)
    begin = time.perf_counter()
    place = usable_device(device)
    first, second = _open(a, None, place), _open(b, a, place)
    source = first.source or second.source
    if source is None and isinstance(data, (str, os.PathLike)) and data not in TASKS and Path(data).exists():
        raise BadInput(
            f"both models are artifacts, and how {os.fspath(data)} becomes their inputs is known from a float model: name "
            "one of them before its compression, or give a task or module:function as the data"
        )
    task = load_task(task if data is None else data, source, columns, seed, batch=batch, seq=seq)
    before = _evaluate(task, first, lambda d, t: show("first", d, t))
    task.check_float(before, "verify", first.name)
    after = _evaluate(task, second, lambda d, t: show("second", d, t))
    found = compare_evaluations(before, after, task.metric, seed)
    n = batch or 1
    times = _latencies(task, first.model, second.model, n, seq, place)
    unit = "points" if task.metric.bounded else "%"
    record = {
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
        "drop_high": found.high, "flips": found.flips if before.answers else None,
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
    return clean(record)


def _evaluate(task: Task, opened: _Opened, progress: Callable[[int, int], None]) -> Evaluation:
    """The evaluation of one model on the verify split; a forward that fails there is said to, with the place."""
    try:
        return task.evaluate(opened.model, "verify", progress)
    except LaconicError:
        raise
    except Exception as error:  # whatever the forward of a model raises is its message
        where = innermost_module(opened.model, error)
        raise BadInput(
            f"{opened.name} fails on the examples of {task.id}{where}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _latencies(
    task: Task, before: nn.Module, after: nn.Module, n: int, seq: int | None, device: torch.device
) -> dict[str, float | None]:
    """Median milliseconds of both on one batch; None for a scoring function that has no inputs to show."""
    try:
        one = task.batches("verify", batch=n, seq=seq, limit=n)[0]
    except (BadInput, NotImplementedError, IndexError):
        return {"before": None, "after": None}

    def run(model: nn.Module) -> None:
        run_batch(task, model, one)
        if device.type != "cpu":
            torch.accelerator.synchronize()  # else only the launch would be timed

    return dict(latency_ms({"before": lambda: run(before), "after": lambda: run(after)}))


class _Opened:
    """A model, its source if it has one, and the bytes of its weight files."""

    def __init__(self, name: str, model: nn.Module, size: int, source: Source | None):
        self.name, self.model, self.size, self.source = name, model, size, source


def _open(model: Any, skeleton_of: Any, device: torch.device) -> _Opened:
    """A model on a device. An artifact that cannot be built by itself takes its structure from `skeleton_of`."""
    if isinstance(model, (str, Path)) and is_artifact(model):
        size = (Path(model) / SINGLE).stat().st_size if (Path(model) / SINGLE).is_file() else 0
        try:
            return _Opened(str(model), load(model, device=device), size, None)
        except BadInput:
            if skeleton_of is None:
                raise
            return _Opened(str(model), load(model, into=resolve(skeleton_of).skeleton(), device=device), size, None)
    source = resolve(model, quantized=True)
    return _Opened(source.name, opened(source).to(device), source.size_before, source)
