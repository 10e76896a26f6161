"""A fitted calibrator in a folder: its numbers as safetensors, and a JSON file that says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import BadInput

from ._binning import BBQ, HistogramBinning, IsotonicCalibration, Polyline, Steps
from ._logit_scaling import MatrixScaling, TemperatureScaling, VectorScaling

WEIGHTS, ABOUT = "calibrator.safetensors", "calibrator.json"
VERSION = 1
SCALINGS = {"temperature": TemperatureScaling, "vector": VectorScaling, "matrix": MatrixScaling}
MAPS = {"histogram": HistogramBinning, "isotonic": IsotonicCalibration, "bbq": BBQ}
CALIBRATORS: dict[str, Any] = {**SCALINGS, **MAPS}
"""Every calibrator by the name that commands and files use."""


def save_calibrator(calibrator: Any, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write a fitted calibrator into a folder, which is made where it is not there.

    Args:
        calibrator: one of `CALIBRATORS`, fitted.
        folder: gets two files.
        about: is kept beside, as "about".

    Raises:
        BadInput: it is none of them, or not fitted.
    """
    from safetensors.torch import save_file

    kind = next((name for name, made in CALIBRATORS.items() if type(calibrator) is made), None)
    if kind is None:
        raise BadInput(
            f"a {type(calibrator).__name__} is no calibrator that can be saved: {', '.join(CALIBRATORS)} are"
        )
    tensors = _tensors(calibrator)
    if not tensors:
        raise BadInput(f"the {kind} calibrator is not fitted: call fit before it is saved")
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, where / WEIGHTS)
    text = {"format": "laconic calibrator", "version": VERSION, "kind": kind, "about": dict(about or {})}
    (where / ABOUT).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def load_calibrator(folder: str | os.PathLike[str]) -> Any:
    """The calibrator of a folder: `transform(logits)` gives probabilities.

    Raises:
        BadInput: there is none, or not one that this version reads.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = Path(folder)
    try:
        text = json.loads((where / ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(where / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(
            f"{where} holds no calibrator that can be read ({error}): `laconic calibrate-confidence` writes one"
        ) from error  # noqa: E501
    kind = text.get("kind") if isinstance(text, dict) else None
    if kind not in CALIBRATORS or text.get("version") != VERSION:
        raise BadInput(
            f"{where / ABOUT} is of kind {kind!r}, and not one of version {VERSION} that is read here: "
            f"{', '.join(CALIBRATORS)}"
        )
    made = CALIBRATORS[kind]()
    try:
        if kind == "temperature":
            made.temperature_ = float(tensors["temperature"])
        elif kind in SCALINGS:
            made.weight_, made.bias_ = tensors["weight"], tensors["bias"]
        else:
            curve = Polyline if kind == "isotonic" else Steps
            count = int(tensors["maps"])
            made.maps_ = [curve(tensors[f"x.{i}"].numpy(), tensors[f"y.{i}"].numpy()) for i in range(count)]
    except KeyError as error:
        raise BadInput(f"{where / WEIGHTS} lacks {error} of a {kind} calibrator: write it anew") from None
    return made


def _tensors(calibrator: Any) -> dict[str, Tensor]:
    """What a fitted calibrator consists of; nothing where it is not fitted."""
    if isinstance(calibrator, TemperatureScaling):
        return {"temperature": torch.tensor(calibrator.temperature_, dtype=torch.float64)}
    if isinstance(calibrator, (VectorScaling, MatrixScaling)):
        return {"weight": calibrator.weight_, "bias": calibrator.bias_}
    found: dict[str, Tensor] = {}
    for i, curve in enumerate(calibrator.maps_):
        x, y = (curve.places, curve.values) if isinstance(curve, Polyline) else (curve.edges, curve.theta)
        for name, values in (("x", x), ("y", y)):
            found[f"{name}.{i}"] = torch.from_numpy(np.asarray(values, np.float64).copy())
    return found | {"maps": torch.tensor(len(calibrator.maps_))} if found else {}


CARD = None  # a part of `calibration`
