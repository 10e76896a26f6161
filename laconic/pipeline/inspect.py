"""`inspect`: where the bytes, the operations, the milliseconds and the outliers of a model are."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.core.structure import Structure
from laconic.core.units import find_units
from laconic.errors import BadInput
from laconic.numerics import count_not_finite
from laconic.tasks import TASKS, own_model

from .artifact import is_artifact, read_manifest
from .source import resolve


def inspect(
    model: Any,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
) -> dict[str, Any]:
    """Per parameter: bytes, multiply-adds and milliseconds of its module on the example inputs, and outliers.

    Of an artifact: how each parameter is stored, and its bytes, as its ledger has them; nothing is run.

    Args:
        model: as in `compress`, or the folder of an artifact; None where `task` brings its own.
        task: a task by name, for its model.
        trust_remote_code, allow_pickle, example: as in `resolve`.

    Returns:
        A record with `model`, `units` (name, op, bytes, macs, ms, outlier_ratio, reason) and `notes`; the units of an
        artifact have a `scheme` instead of what is measured.

    Raises:
        BadInput: there is no such model or task, or both were named, or the model's forward fails.
    """
    model = _named(model, task)
    if isinstance(model, (str, os.PathLike)) and is_artifact(model):
        return _of_artifact(Path(model))
    source = resolve(model, example=example, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    net = source.load()
    args, kwargs = source.example()
    structure = Structure.build(net, (args, kwargs))
    units = find_units(net, structure)
    milliseconds, positions = _timed(net, args, kwargs)
    rows, broken = [], []
    for unit in units:
        owner = unit.name.rpartition(".")[0]
        weight = net.get_parameter(unit.name).detach().float()
        rms = float(weight.square().mean().sqrt()) if weight.numel() else 0.0
        bad = count_not_finite(weight)
        if any(bad):
            broken.append(f"{unit.name} holds {bad.nan} NaN and {bad.inf} infinite values: the weights are broken")
        main = len(unit.shape) > 1
        rows.append(
            {
                "name": unit.name, "kind": "parameter", "op": unit.op, "bytes": unit.nbytes, "bytes_before": unit.nbytes,
                "macs": unit.numel * positions.get(owner, 0) if main and unit.op in ("linear", "conv", "experts") else 0,
                "ms": milliseconds.get(owner) if main else None,
                "outlier_ratio": float(weight.abs().max()) / rms if rms and not any(bad) else None, "reason": unit.reason or None,
                "calls": unit.calls,
            }
        )  # fmt: skip
    return {
        "model": {"name": source.name, "kind": source.kind, "class": type(net).__name__, "parameters": sum(u.numel for u in units)},
        "size_before": source.size_before, "units": rows, "notes": [*broken, *source.notes, *structure.notes],
    }  # fmt: skip


def _of_artifact(folder: Path) -> dict[str, Any]:
    """The ledger of an artifact as units."""
    manifest = read_manifest(folder)
    if "class" not in manifest.model:
        raise BadInput(f"{folder} was written by save_pretrained, which leaves out the ledger: laconic.save writes one")
    rows = [
        {
            "name": row["name"], "kind": "parameter", "op": "packed" if row["scheme"] else "float", "bytes": row["bytes"],
            "bytes_before": getattr(torch, row["dtype"]).itemsize * math.prod(row["shape"]), "scheme": row["scheme"],
            "reason": row["reason"],
        }
        for row in manifest.ledger
    ]  # fmt: skip
    said = {"name": folder.resolve().name, "kind": manifest.model["kind"], "class": manifest.model["class"]}
    said["parameters"] = sum(math.prod(row["shape"]) for row in manifest.ledger)
    return {"model": said, "size_before": sum(row["bytes_before"] for row in rows), "units": rows, "notes": []}


def _named(model: Any, task: str | None) -> Any:
    """The one thing that was named: the model, or the task that brings one."""
    if task is None:
        if model is None:
            raise BadInput("no model was named: give a folder, a fetched name, module:function, or --task")
        return model
    if model is not None:
        raise BadInput("both a model and a task were named, and a task brings its own model: give one of them")
    brought = own_model(task)
    if brought is None:
        raise BadInput(f"{task} is not one of the tasks {', '.join(TASKS)}: give one of them, or a model")
    return brought


def _timed(net: nn.Module, args: tuple, kwargs: dict) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds of every leaf module (best of three runs), and positions that its weight is multiplied at."""
    best: dict[str, float] = {}
    positions: dict[str, int] = {}
    total: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}

    def before(path: str) -> None:
        started[path] = time.perf_counter()

    def after(path: str, output: Any) -> None:
        total[path] += 1000 * (time.perf_counter() - started[path])
        if isinstance(output, torch.Tensor) and output.dim() > 1:
            channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
            positions[path] = output.numel() // max(1, channels)

    handles = []
    for path, module in net.named_modules():
        if not any(module.children()):
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: before(path)))
            handles.append(module.register_forward_hook(lambda m, a, out, path=path: after(path, out)))
    try:
        for _ in range(3):
            total.clear()
            with torch.inference_mode():
                net(*args, **kwargs)
            for path, spent in total.items():
                best[path] = min(best.get(path, spent), spent)
    finally:
        for handle in handles:
            handle.remove()
    return best, positions
