"""`calibrate_confidence`: make a classifier's confidence mean its accuracy, and show it on other examples.

A calibrator maps logits to probabilities and changes nothing in the model. It is fitted on one half of the examples (or
on a task's select split) and judged on the other (verify), before and after, with the same bins.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import BadInput
from laconic.norm import CALIBRATORS, CalibrationProbe, save_calibrator
from laconic.tasks import load_task, own_model

from .labelled import labelled
from .observe import innermost_module
from .source import resolve
from .source_base import first_line

__all__ = ["calibrate_confidence"]

LEAST = 20  # examples, half of them to fit on
BATCH = 64


def calibrate_confidence(
    model: Any = None,
    data: Any = None,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    methods: Sequence[str] = tuple(CALIBRATORS),
    keep: str = "temperature",
    out: str | os.PathLike[str] | None = None,
    bins: int = 15,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Fit calibrators and report them on examples that they were not fitted on.

    Args:
        model: as in `compress`, or an NPZ file with `logits` (n, k) and `labels` (n,); None where a task brings one.
        data, task, columns, seed: as in `compress`, for a model.
        methods: which of `laconic.norm.CALIBRATORS` are tried.
        keep: the one that is saved.
        out: a folder, for the calibrator, `report.json` and `reliability.svg`.
        bins: of ECE and MCE.
        overwrite: replace what is in the folder.
        trust_remote_code, allow_pickle: as in `resolve`.

    Returns:
        A record: `table` (a row for each method: accuracy, nll, brier, ece, mce, "as it is" first), `fitted_on` and
        `judged_on` (examples), `kept`, `svg`, `out`, `notes`.

    Raises:
        BadInput: no or too few examples, logits and labels that do not fit, an unknown method, a folder in use.
    """
    methods = tuple(dict.fromkeys((*methods, keep)))
    for name in methods:
        if name not in CALIBRATORS:
            raise BadInput(f"{name!r} is no calibrator: there are {', '.join(CALIBRATORS)}")
    if bins < 1:
        raise BadInput(f"bins is {bins}: at least one is needed")
    if out is not None and Path(out).exists() and not overwrite and (Path(out).is_file() or any(Path(out).iterdir())):
        raise BadInput(f"{out} exists: name another folder, or pass --overwrite")
    if _is_npz(model) and data is None and task is None:
        name, notes = os.fspath(model), []
        fit_on, judge_on = _halves(*_read(Path(model)), seed)
    else:
        name, fit_on, judge_on, notes = _of_model(model, data, task, columns, seed, trust_remote_code, allow_pickle)
    try:
        calibrators = {method: CALIBRATORS[method]() for method in methods}
        finding = CalibrationProbe(bins, calibrators)(torch.nn.Identity(), judge_on, fit_on=fit_on)
        kept = calibrators[keep].fit(*fit_on)
    except ValueError as error:
        raise BadInput(f"{name}: {first_line(error)}") from error
    record = {
        "name": name, "fitted_on": len(fit_on[1]), "judged_on": len(judge_on[1]), "bins": bins, "seed": seed,
        "kept": keep, "table": [dict(row) for row in finding.table], "svg": finding.plot(),
        "out": None if out is None else os.fspath(out), "notes": notes,
    }  # fmt: skip
    if out is not None:
        about = {key: record[key] for key in ("name", "fitted_on", "judged_on", "bins", "seed", "table")}
        save_calibrator(kept, out, about)
        (Path(out) / "report.json").write_text(json.dumps(about | {"kept": keep, "notes": notes}, indent=1) + "\n")
        (Path(out) / "reliability.svg").write_text(record["svg"], encoding="utf-8")
    return record


def _is_npz(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike)) and Path(model).suffix == ".npz"


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} cannot be read as an NPZ file: {first_line(error)}") from error
    for name in ("logits", "labels"):
        if name not in found:
            raise BadInput(
                f"{path} has no array {name!r}, only {', '.join(found) or 'nothing'}: logits and labels are needed"
            )
    logits, labels = found["logits"], found["labels"]
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or logits.dtype.kind not in "fiu":
        raise BadInput(
            f"{path}: logits are {logits.dtype} {logits.shape} and labels {labels.shape}: (n, k) numbers of two classes or "
            "more, and (n,) are needed"
        )
    if labels.dtype.kind not in "iu" or not len(labels):
        raise BadInput(f"{path}: the labels are {labels.dtype} {labels.shape}: at least one whole number is needed")
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise BadInput(
            f"{path}: labels go from {labels.min()} to {labels.max()}, and the logits are of classes 0 to "
            f"{logits.shape[1] - 1}"
        )
    if not np.isfinite(logits).all():
        raise BadInput(f"{path}: {int((~np.isfinite(logits)).sum())} of the logits are not finite")
    return torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(labels.astype(np.int64))


def _halves(logits: Tensor, labels: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Examples to fit on and to judge by, drawn by the seed."""
    if len(labels) < LEAST:
        raise BadInput(f"there are {len(labels)} examples, and {LEAST} are the least: half of them fit, half judge")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    fit, judge = order[: len(order) // 2], order[len(order) // 2 :]
    return (logits[fit], labels[fit]), (logits[judge], labels[judge])


def _of_model(
    model: Any, data: Any, task: str | None, columns: Any, seed: int, trust_remote_code: bool, allow_pickle: bool
) -> tuple[str, tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    named = task or data
    if named is None:
        raise BadInput(
            "calibration needs labelled examples: give an NPZ file of logits and labels, or --data or --task"
        )
    if task is not None and data is not None:
        raise BadInput("both data and a task were named, and each says what the examples are: give one of them")
    model = own_model(str(named)) if model is None else model
    if model is None:
        raise BadInput("no model was named: give a folder, a fetched name, module:function, or a task that brings one")
    source = resolve(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    loaded = load_task(named, source, columns, seed)
    net = source.load().eval()
    found = []
    for split in ("select", "verify"):
        answering, x, classes = labelled(net, loaded, split)
        try:
            with torch.no_grad():
                logits = torch.cat([answering(part).float() for part in x.split(BATCH)])
        except (RuntimeError, TypeError, IndexError) as error:  # whatever the forward of a model raises is its message
            where = innermost_module(net, error)
            raise BadInput(
                f"{source.name} fails on {loaded.id}{where}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if logits.ndim != 2:
            raise BadInput(f"{source.name} gives outputs {tuple(logits.shape)}, and logits (n, k) are needed")
        found.append((logits.double(), classes))
    if min(len(part[1]) for part in found) < LEAST // 2:
        raise BadInput(f"{loaded.id} has {len(found[0][1])} and {len(found[1][1])} examples: too few to fit and judge")
    return source.name, found[0], found[1], loaded.notes
