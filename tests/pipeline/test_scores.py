"""A scoring function that returns one number: no interval, strict JSON, and what happens where it is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from laconic.errors import BadInput
from laconic.pipeline.compare import compare
from laconic.pipeline.compress import Result, compress
from laconic.report import comparison_table, summary_table

from .runs import Classifier, trained_classifier


def compressed(score: Any, out: Path, budget: str = "size=4x, drop=5", model: nn.Module | None = None) -> Result:
    torch.manual_seed(0)
    return compress(model or Classifier(), score, budget, example=torch.zeros(2, 24), out=out)


def strict(file: Path) -> dict[str, Any]:
    """JSON as its standard has it: without NaN and infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def shown(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as found:
        console.print(table)
    return found.get()


def test_one_number_has_no_interval_and_no_answers(tmp_path: Path) -> None:
    model, data = trained_classifier(tmp_path)
    found = np.load(data)
    x, label = torch.from_numpy(found["x"]), torch.from_numpy(found["label"])

    def score(model: nn.Module) -> float:
        return float((model(x).argmax(1) == label).float().mean())

    result = compressed(score, tmp_path / "out", model=model)
    record = strict(result.out / "report.json")
    assert record == result.record
    assert record["drop"] is not None and record["drop_low"] is record["drop_high"] is record["flips"] is None
    assert (record["verdict"]["met"], record["verdict"]["certified"]) == (True, False)
    for text in (record["verdict"]["sentence"], shown(summary_table(record)), (result.out / "report.html").read_text()):
        assert "drop " in text and "95 %:" not in text and "to nan" not in text and "answers changed" not in text
    assert "Note: gptq was left out: score gives no examples to calibrate with" in shown(summary_table(record))
    both = compare((model, torch.zeros(2, 24)), (model, torch.zeros(2, 24)), score)
    assert both["drop_low"] is both["flips"] is None and both["drop"] == 0
    assert "answers differ" not in shown(comparison_table(both))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (math.nan, "score returned nan for the float model on the verify split"),
        (math.inf, "score returned inf for the float model"), ([1.0, None], "score returned nan for the float model"),
        (None, "score must return a number or an array of numbers, it returned NoneType"),
    ],
)  # fmt: skip
def test_a_float_model_without_a_score_is_refused(tmp_path: Path, value: Any, sentence: str) -> None:
    def score(model: nn.Module) -> Any:
        return value

    with pytest.raises(BadInput, match=sentence):
        compressed(score, tmp_path / "out")
    with pytest.raises(BadInput, match=sentence.partition(" for ")[0]):
        compare((Classifier(), torch.zeros(2, 24)), (Classifier(), torch.zeros(2, 24)), score)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("budget", "met"), [("size=4x, drop=5", False), ("size=4x", True)])
def test_a_compressed_model_that_breaks_down_holds_no_drop(tmp_path: Path, budget: str, met: bool) -> None:
    values = iter((0.5, math.nan))
    result = compressed(lambda model: next(values), tmp_path / "out", budget)
    record = strict(result.out / "report.json")
    assert (record["verdict"]["met"], result.exit_code) == (met, 0 if met else 3)
    assert record["drop"] is record["drop_high"] is record["after"]["value"] is None
    assert "its score is nan where it was 0.5" in record["verdict"]["sentence"]
    assert "no number any more" in shown(summary_table(record))
