"""`inspect --probe`: run a probe of the catalog on a model and data.

A probe says what it is called with by `reads`: "labelled" (inputs and classes), "batch" (one batch of these), "inputs",
"tokens", or "batches" (calls of the model and their targets, where there are such: `laconic.core.depth.Batch`); labelled
where it says nothing. If its call takes `fit_on`, it gets other examples for that. What its constructor takes, or
`from_options` where it has that, are its options.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from laconic.errors import BadInput, LaconicError
from laconic.tasks import Task, load_task, own_model

from .labelled import calls_of, inputs_of, labelled, tokens_of
from .observe import innermost_module
from .source import resolve
from .source_base import first_line

__all__ = ["READS", "run_probe"]

READS = ("labelled", "batch", "inputs", "tokens", "batches")
BATCH = 64  # examples of "batch"


def run_probe(
    probe: type,
    model: Any,
    data: Any = None,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    examples: int | None = 512,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[dict[str, Any], Any]:
    """What a probe finds.

    Args:
        probe: its class.
        model: as in `compress`; None where a task brings its own.
        data, task, columns, seed: as in `compress`; the verify split is looked at.
        options: of the probe.
        examples: at most.
        trust_remote_code, allow_pickle: as in `resolve`.

    Returns:
        A record of model, probe, data, table, cost and seconds; and the finding, whose `plot()` is an SVG.

    Raises:
        BadInput: data that the probe cannot read, options that it has not, or a model that fails on the data.
    """
    made = _made(probe, dict(options or {}))
    name = task or data
    if name is None:
        raise BadInput(f"{probe.__name__} looks at a model on examples: pass --data or --task")
    if task is not None and data is not None:
        raise BadInput("both data and a task were named, and each says what the examples are: give one of them")
    if model is None:
        model = own_model(str(name))
    if model is None:
        raise BadInput("no model was named: give a folder, a fetched name, module:function, or a task that brings one")
    source = resolve(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    loaded = load_task(name, source, columns, seed)
    net = source.load().eval()
    began = time.perf_counter()
    try:
        arguments, more = _arguments(made, net, loaded, examples)
        finding = made(*arguments, **more)
    except LaconicError:
        raise
    except ValueError as error:
        raise BadInput(f"{probe.__name__} cannot look at {source.name} on {loaded.id}: {first_line(error)}") from error
    except (RuntimeError, TypeError, IndexError) as error:  # whatever the forward of a model raises is its message
        where = innermost_module(net, error)
        raise BadInput(
            f"{source.name} fails on {loaded.id}{where}: {type(error).__name__}: {first_line(error)}"
        ) from error
    record = {
        "model": source.name, "probe": probe.__name__, "data": loaded.id, "options": dict(options or {}), "seed": seed,
        "table": [dict(row) for row in finding.table], "cost": finding.cost, "seconds": time.perf_counter() - began,
        "notes": [*loaded.notes, *getattr(finding, "notes", ())],
    }  # fmt: skip
    return record, finding


def _made(probe: type, options: dict[str, Any]) -> Any:
    make = getattr(probe, "from_options", probe)
    known = inspect.signature(make).parameters
    for name in options:
        if name not in known:
            raise BadInput(f"{probe.__name__} has no option {name!r}: it has {', '.join(known) or 'none'}")
    missing = [n for n, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and n not in options]
    if missing:
        raise BadInput(f"{probe.__name__} needs {', '.join(missing)}: pass --set {missing[0]}=...")
    try:
        return make(**options)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{probe.__name__} does not take these options: {first_line(error)}") from error


def _arguments(probe: Any, net: nn.Module, task: Task, examples: int | None) -> tuple[tuple, dict[str, Any]]:
    """What the probe is called with."""
    reads = getattr(probe, "reads", "labelled")
    if reads == "tokens":
        return (net, tokens_of(task, "verify", examples)), {}
    if reads == "batches":
        return (net, calls_of(net, task, "verify", examples)), {}
    if reads == "inputs":
        names, x = inputs_of(task, "verify", examples)
        if names is not None and len(names) > 1:
            raise BadInput(f"{task.id} gives its model several inputs, and {type(probe).__name__} reads one")
        return (net, x), {}
    if reads not in READS:
        raise BadInput(f"{type(probe).__name__} reads {reads!r}, which is none of {', '.join(READS)}")
    model, x, classes = labelled(net, task, "verify", BATCH if reads == "batch" else examples)
    more = {}
    if "fit_on" in inspect.signature(probe).parameters and "select" in task.splits:
        _, held, known = labelled(net, task, "select", None)
        more["fit_on"] = (held, known)
    return (model, (x, classes)), more
