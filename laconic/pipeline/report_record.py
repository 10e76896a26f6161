"""The measured record of a compression: what report.json holds and every table and plot is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from laconic.core.record import PACK, Record
from laconic.kernels import native
from laconic.numerics import Scheme
from laconic.tasks import Comparison, Evaluation

from .measure import UNSTEADY, machine, peak_rss, versions

if TYPE_CHECKING:
    from .run import Run
    from .workspace import Workspace

CHANGED = 24  # examples shown whose answer changed


def build_record(
    run: Run,
    workspace: Workspace,
    decision: Mapping[str, Scheme | None],
    records: list[Record],
    coverage: float,
    found: Comparison | None,
    after: Evaluation | None,
    latency: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that was measured, and the verdict."""
    ground, task, budget = run.ground, run.task, run.budget
    before: Evaluation | None = run.before
    metric = task.metric if task else None
    low, high = run.interval(found) if found else (None, None)
    unit = "points" if metric is not None and metric.bounded else "%"
    size_ok = run.ceiling is None or run.size_after <= run.ceiling
    drop_ok = budget.drop is None or (found is not None and found.drop <= budget.drop)
    # On a resumed run the ceiling in milliseconds is that of the float model measured now.
    bound = budget.milliseconds(latency["before"]) if latency and latency["before"] else None
    latency_ok = not budget.latency or (latency is not None and bound is not None and latency["after"] <= bound)
    memory = run.memory.to_json(run.size_after, run.cache) if run.memory is not None else None
    memory_ok = memory is None or bool(memory["met"])
    met = bool(size_ok and drop_ok and latency_ok and memory_ok)
    certified = None if budget.drop is None or found is None else bool(
        high is not None and size_ok and latency_ok and memory_ok and high <= budget.drop
    )
    ratio = ground.source.size_before / run.size_after
    model = ground.model
    return {
        "version": 1,
        "command": run.options.command,
        "seed": run.options.seed,
        "verdict": {
            "met": met, "certified": certified, "exit_code": 0 if met else 3,
            "sentence": _sentence(ratio, found, low, high, unit, met, certified, budget.drop),
        },
        "model": {
            "name": ground.source.name, "kind": ground.source.kind, "class": type(model).__name__,
            "parameters": sum(u.numel for u in ground.units),
        },
        "task": None if task is None else {
            "id": task.id, "metric": task.metric.name, "higher_is_better": task.metric.higher_is_better,
            "bounded": task.metric.bounded, "unit": unit, "verify_n": found.n if found else None,
        },
        "budget": {
            "text": budget.text,
            "size": None if run.ceiling is None else {"text": budget.text, "bytes": run.ceiling},
            "drop": budget.drop, "memory": memory,
            "latency": None if not budget.latency else {"text": budget.latency, "ms": bound, "met": bool(latency_ok)},
        },
        "before": {
            "size": ground.source.size_before, "value": found.before if found else None,
            "latency_ms": latency["before"] if latency else None, "peak_rss": None,
        },
        "after": {
            "size": run.size_after, "value": found.after if found else after.value if after else None,
            "latency_ms": latency["after"] if latency else None, "peak_rss": None,
        },
        "ratio": ratio, "drop": found.drop if found else None, "drop_low": low, "drop_high": high,
        "flips": found.flips if found and before is not None and before.answers else None,
        "also": {} if before is None or after is None else {
            name: [before.also.get(name), value] for name, value in after.also.items()
        },
        "latency": None if latency is None else {
            **latency, "threads": machine()["threads"],
            "ratio": latency["before"] / latency["after"] if latency["before"] else None,
            "sentence": _time_sentence(latency),
        },
        "coverage": coverage, "units_reused": workspace.reused,
        "units_total": sum(1 for s in decision.values() if s is not None),
        "seconds": {"total": 0.0, "stages": run.seconds}, "peak_rss_bytes": peak_rss(),
        "tried": run.tried, "explained": run.explained,
        "units": _units(run, decision, records),
        "ledger": run.ledger, "ledger_header": run.header, "ledger_padding": run.padding,
        "changed": _changed(before, after), "notes": _notes(run),
        "machine": machine(), "versions": versions(), "kernels": native.status(),
        "out": str(workspace.out), "report": str(workspace.out / "report.html"),
    }  # fmt: skip


def _units(run: Run, decision: Mapping[str, Scheme | None], records: list[Record]) -> list[dict[str, Any]]:
    packed = {r.path: r for r in records if r.action == PACK}
    rows = {row["name"]: row for row in run.ledger}
    found = []
    for unit in run.ground.units:
        scheme = decision.get(unit.name)
        record = packed.get(unit.name)
        loss = record.data.get("loss") if record else None
        found.append(
            {
                "name": unit.name, "kind": "parameter", "op": unit.op, "scheme": str(scheme) if scheme else None,
                "bits": scheme.bits if scheme else 8 * unit.dtype.itemsize, "bytes_before": unit.nbytes,
                "bytes_after": rows[unit.name]["bytes"], "method": record.data["method"] if record else None,
                "loss": loss if loss is None or math.isfinite(loss) else None, "reason": rows[unit.name]["reason"],
                "calls": unit.calls, **run.histograms.get(unit.name, {"histogram": None, "activation": None}),
            }
        )  # fmt: skip
    return found


def _changed(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, str]]:
    if before is None or after is None or not before.answers:
        return []
    rows = zip(before.examples, before.answers, after.answers, strict=False)
    return [{"example": e, "before": str(b), "after": str(a)} for e, b, a in rows if b != a][:CHANGED]


def _notes(run: Run) -> list[str]:
    notes = list(run.ground.source.notes) + list(run.ground.structure.notes) + run.notes
    if run.ground.structure.how != "export":
        notes.append(f"structure was found by hooks, because {run.ground.structure.why}")
    if run.ground.folded:
        notes.append(f"{len(run.ground.folded)} batch norms were folded into the layer before them")
    if run.ground.streamed:
        notes.append(
            "the float model does not fit under --max-ram: weights passed through memory layer by layer, and figures that "
            "need the whole float model are missing"
        )
    if run.memory is not None:
        said = run.memory.to_json(run.size_after, run.cache)
        beside = f" and a cache of {said['cache']:,} for {said['batch']} x {said['tokens']:,} tokens" if said["cache"] else ""
        notes.append(f"memory: weights of {said['weights']:,} bytes{beside}, of {said['bytes']:,} that were allowed")
    if run.task is None:
        notes.append("no data was given: only data-free methods were used, and no quality is claimed")
    if native.load() is None:
        notes.append(f"native kernels are missing ({native.status()['why'] or 'not built'}): packed layers run slower")
    return notes


def _time_sentence(latency: dict[str, Any]) -> str:
    before, after = latency["before"], latency["after"]
    if not before:
        return "The float model did not fit in memory: its latency was not measured."
    busy = ""
    if latency["spread"] > UNSTEADY:
        busy = f" Something else was running: of the same model, slow times were {latency['spread']:.1f} times the quick ones."
    if after > 0.98 * before:
        slower = f"{after / before:.2f} times the float model's time on a batch of {latency['batch']}."
        return f"This model is smaller, not faster: {slower}{busy}"
    return f"{before / after:.2f} times faster than the float model on a batch of {latency['batch']}.{busy}"


def _sentence(
    ratio: float, found: Comparison | None, low: float | None, high: float | None, unit: str,
    met: bool, certified: bool | None, ceiling: float | None,
) -> str:  # fmt: skip
    text = f"{ratio:.2f} times smaller"
    if found is not None and not math.isfinite(found.drop):
        text += f", its score is {found.after} where it was {found.before:.4g}"
    elif found is not None:
        text += f", drop {found.drop:.2f} {unit}"
        text += f" (95 %: {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    elif ceiling is None:
        text += ", quality not measured"
    if not met:
        return text + ": the budget is missed"
    return text + (": met and certified" if certified else ": met, not certified" if certified is False else ": met")
