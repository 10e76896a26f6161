"""Calibration data with one fault each, and the sentence that each gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laconic.errors import BadInput
from laconic.numerics import Scheme
from laconic.pipeline import examine as examine_module
from laconic.pipeline.compress import compress
from laconic.pipeline.examine import examine
from laconic.pipeline.look import look
from laconic.pipeline.plan import Ground
from tests.pipeline.runs import run_cli, save, token_file
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama") / "float")


def states(record: dict[str, Any]) -> dict[str, str]:
    return {one["check"]: one["state"] for one in record["checks"]}


def said(record: dict[str, Any], check: str) -> str:
    return next(one["sentence"] for one in record["checks"] if one["check"] == check)


def tokens(path: Path, ids: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(path, input_ids=ids, **more)
    return path


def test_good_data_has_nothing_to_warn_of(llama: Path, tmp_path: Path) -> None:
    record = examine(llama, token_file(tmp_path / "x.npz", rows=200))
    found = states(record)
    assert found.pop("draw") in ("fine", "warning"), "weights that were drawn have no plan to agree on"
    assert found == {
        "enough": "fine", "twice": "fine", "lengths": "fine", "beginning": "skipped", "chat": "skipped", "experts": "skipped",
    }  # fmt: skip
    assert "elements the same bits" in said(record, "draw")
    json.dumps(record)


def test_draws_say_the_positions_that_they_have_and_compare_bits(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 rows the calibrate split has 12 of 16 tokens, six batches of two; groups may differ, bits may not."""
    widths = iter((32, 64, 128))

    def fit(ground: Ground, costs: object, ceiling: int) -> dict[str, Scheme]:
        group = next(widths)
        return {u.name: Scheme.parse(f"v1/int4/group{group}/float16/minmax/zreal/nearest") for u in ground.packable}

    monkeypatch.setattr(examine_module, "fit", fit)
    record = examine(llama, token_file(tmp_path / "x.npz"))
    assert said(record, "draw") == "three draws of 64 positions give 100 % of the elements the same bits"
    assert states(record)["draw"] == "fine"


def test_examples_that_come_twice_and_those_that_judge(llama: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 100, (60, 16))
    ids[20:] = ids[:2].repeat(20, 0)
    record = examine(llama, tokens(tmp_path / "x.npz", ids))
    assert states(record)["twice"] == "warning" and "lie in the verify split too" in said(record, "twice")
    result = compress(llama, tmp_path / "x.npz", "size=2x", out=tmp_path / "out")
    assert any("calibration data: " in note and "come twice" in note for note in result.record["notes"])


def test_too_few_positions_for_the_widest_layer(llama: Path, tmp_path: Path) -> None:
    record = examine(llama, token_file(tmp_path / "x.npz", rows=12, length=3))
    assert states(record)["enough"] == "warning"
    assert "mlp.down_proj.weight" in said(record, "enough") or "inputs" in said(record, "enough")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_that_no_token_reaches(name: str, tmp_path: Path) -> None:
    model = ZOO[name].build()
    data = token_file(tmp_path / "x.npz", rows=100)
    model.save_pretrained(tmp_path / "routed")
    assert states(examine(tmp_path / "routed", data))["experts"] == "fine"
    routers = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert routers
    for router in routers:
        router.data.zero_()  # experts alike, of which the first are taken
    model.save_pretrained(tmp_path / "stuck")
    record = examine(tmp_path / "stuck", data)
    assert states(record)["experts"] == "warning" and "experts get no token" in said(record, "experts")


class Tokenizer:
    """Puts 1 before every text, and 50 around what a user says."""

    bos_token, bos_token_id, chat_template, all_special_ids = "<s>", 1, "a template", (1, 50)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [50 if part == "<user>" else 9 for part in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return " ".join(f"<user> {one['content']}" for one in messages)


class Rows:
    """A task of given rows."""

    def __init__(self, **splits: dict[str, torch.Tensor]):
        self.given, self.splits = splits, tuple(splits)

    def batches(self, split: str, batch: int, seq: int | None) -> list[dict[str, torch.Tensor]]:
        return [self.given[split]]


def looked(calibrate: torch.Tensor, verify: torch.Tensor | None = None, **more: Any) -> dict[str, Any]:
    given = {"calibrate": {"input_ids": calibrate, **more}}
    if verify is not None:
        given["verify"] = {"input_ids": verify}
    return {one.check: one for one in look(Rows(**given), [], Tokenizer)}


def test_a_missing_beginning_and_a_missing_template() -> None:
    ids = torch.randint(60, 90, (10, 6))
    seen = looked(ids)
    assert seen["beginning"].state == seen["chat"].state == "warning"
    assert "0 % of the examples begin with <s>" in seen["beginning"].sentence
    ids[:, 0], ids[:4, 1] = 1, 50
    seen = looked(ids)
    assert seen["beginning"].state == seen["chat"].state == "fine"
    assert seen["chat"].sentence.startswith("4 of 10 examples")
    padded = torch.nn.functional.pad(ids, (3, 0))  # on the left: the beginning is where the mask begins
    assert looked(padded, attention_mask=(padded > 0).long())["beginning"].state == "fine"


def test_lengths_unlike_those_of_the_verdict() -> None:
    seen = looked(torch.randint(60, 90, (10, 6)), torch.randint(60, 90, (10, 30)))
    assert (
        seen["lengths"].state == "warning" and "have 6 tokens, those of the verify split 30" in seen["lengths"].sentence
    )
    assert looked(torch.randint(60, 90, (10, 6)), torch.randint(60, 90, (10, 8)))["lengths"].state == "fine"


def test_what_cannot_be_examined(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="pass --data or --task"):
        examine(llama)
    code, out, _ = run_cli(capsys, "examine", llama, "--data", token_file(tmp_path / "x.npz"), "--quiet")
    assert code == 0 and "examples to calibrate on" in out and "twice: 0 of" in out
    code, _, err = run_cli(capsys, "examine", llama, "--data", tmp_path / "none.npz")
    assert code == 2 and "none.npz" in err
