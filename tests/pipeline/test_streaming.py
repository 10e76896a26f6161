"""A model that does not fit under --max-ram: weights pass through memory one by one, with the same bytes."""

from __future__ import annotations

import pytest
import torch

import laconic
from laconic.errors import BadInput
from laconic.pipeline import deciding, reading, residency, solve, stream
from laconic.pipeline import plan as plan_module
from laconic.pipeline import run as run_module
from laconic.pipeline import workspace as workspace_module
from laconic.pipeline.compress import compress

from .runs import hashes, save, token_file

MAX_RAM = 900 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of about 60 MB."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("large") / "float"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 100_000)  # many pieces a weight
    for module in (reading, run_module, plan_module):
        monkeypatch.setattr(module, "RUNTIME", 700 << 20)


@pytest.fixture(scope="module")
def whole(large, tmp_path_factory):
    return compress(large, budget="size=5x", out=tmp_path_factory.mktemp("whole") / "out")


def test_streamed_bytes_are_those_of_the_run_in_memory(large, whole, tmp_path):
    """Allocation sees samples only, so the recipe of one is given to the other."""
    recipe = whole.out / "recipe.yaml"
    streamed = compress(large, budget="size=5x", max_ram=MAX_RAM, recipe=recipe, out=tmp_path / "streamed")
    assert hashes(streamed.out) == hashes(whole.out)
    assert any("does not fit under --max-ram" in note for note in streamed.record["notes"])
    assert not any("does not fit under --max-ram" in note for note in whole.record["notes"])
    losses = ({u["name"]: u["loss"] for u in r.record["units"] if u["scheme"]} for r in (streamed, whole))
    for (name, a), b in zip(next(losses).items(), next(losses).values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4), name
    assert streamed.units_reused == 0


def test_an_allocation_from_samples_fits(large, tmp_path):
    found = compress(large, budget="size=6x", max_ram="900MiB", out=tmp_path / "out")
    assert found.ratio >= 6 and found.met and found.value_before is None
    ids = torch.arange(12)[None]
    assert torch.isfinite(laconic.load(found.out)(input_ids=ids).logits).all()


def test_streaming_is_resumed(large, whole, tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    left = iter(range(6, -1, -1))

    def failpoint(name: str) -> None:
        if not next(left):
            raise Stopped

    options = {"budget": "size=5x", "max_ram": MAX_RAM, "recipe": whole.out / "recipe.yaml"}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(workspace_module, "failpoint", failpoint)
        compress(large, out=tmp_path / "out", **options)
    resumed = compress(large, out=tmp_path / "out", resume=True, **options)
    assert resumed.units_reused == 7 and hashes(resumed.out) == hashes(whole.out)


def test_calibration_is_streamed_block_by_block_to_the_same_bytes(large, tmp_path, monkeypatch):
    """Weights and activations pass through disk, and every unit is solved as it is in memory."""
    data = token_file(tmp_path / "t.npz", rows=60)
    whole = compress(large, data, "size=5x", max_ram="64GB", out=tmp_path / "whole")  # it fits
    spilled = []
    real = residency.Activations.__init__
    monkeypatch.setattr(residency.Activations, "__init__", lambda self, to: (spilled.append(to), real(self, to))[1])
    recipe = whole.out / "recipe.yaml"
    streamed = compress(large, data, "size=5x", max_ram=MAX_RAM, recipe=recipe, out=tmp_path / "streamed")
    assert [to for to in spilled if to is not None] and not (streamed.out / "activations").exists()
    assert {u["method"] for u in streamed.record["units"] if u["scheme"]} == {"rtn", "gptq"}
    assert hashes(streamed.out) == hashes(whole.out)
    assert streamed.value_before is None and streamed.drop is None and streamed.latency_before_ms is None


def test_a_streamed_allocation_looks_at_data(large, tmp_path, monkeypatch):
    data = token_file(tmp_path / "t.npz", rows=60)
    seen = {}
    real = deciding.option_costs
    monkeypatch.setattr(
        deciding, "option_costs", lambda read, weights, *rest: (seen.update(weights), real(read, weights, *rest))[1]
    )
    found = compress(large, data, "size=5x", max_ram=MAX_RAM, out=tmp_path / "out")
    assert found.met and found.ratio >= 5
    assert seen["model.layers.0.mlp.down_proj.weight"].shape == (1024,) and "lm_head.weight" not in seen


def test_a_layer_whose_hessian_does_not_fit_is_rounded_and_said(large, tmp_path, monkeypatch):
    monkeypatch.setattr(solve, "_hessian_fits", lambda job, unit: "down_proj" not in unit.name)
    data = token_file(tmp_path / "t.npz", rows=60)
    found = compress(large, data, "size=5x", max_ram=MAX_RAM, out=tmp_path / "out")
    methods = {u["name"].split(".")[-2]: u["method"] for u in found.record["units"] if u["scheme"]}
    assert methods["down_proj"] == "rtn" and methods["q_proj"] == "gptq"
    assert any("5 layers were rounded to nearest: the Hessian of" in note for note in found.record["notes"])


def test_a_model_that_is_no_chain_is_rounded_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.Run, "must_stream", lambda self, meta: True)
    data = token_file(tmp_path / "t.npz", rows=60)
    found = compress(save("mixtral", tmp_path / "float"), data, "size=3x", seq=8, out=tmp_path / "out")
    loaded = laconic.load(found.out)
    assert torch.isfinite(loaded(input_ids=torch.arange(3, 11)[None]).logits).all()


def test_a_drop_cannot_be_held_against_a_model_that_does_not_fit(large, tmp_path):
    data = token_file(tmp_path / "t.npz")
    with pytest.raises(BadInput, match="raise --max-ram to about"):
        compress(large, data, "size=4x, drop=1", max_ram=MAX_RAM, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_batch_norms_are_not_folded_while_streaming(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.Run, "must_stream", lambda self, meta: True)
    found = compress(save("resnet", tmp_path / "float"), budget="size=3x", out=tmp_path / "out")
    assert not any("folded" in note for note in found.record["notes"])
    assert torch.isfinite(laconic.load(found.out)(pixel_values=torch.randn(2, 3, 32, 32)).logits).all()
