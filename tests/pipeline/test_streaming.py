"""A model that does not fit under --max-ram: weights pass through memory one by one, with the same bytes."""

from __future__ import annotations

import pytest
import torch

import laconic
from laconic.pipeline import compress as compress_module
from laconic.pipeline import plan as plan_module
from laconic.pipeline import stream
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
    for module in (compress_module, plan_module):
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


def test_figures_of_the_float_model_are_null_with_data(large, tmp_path):
    data = token_file(tmp_path / "t.npz", rows=30)
    found = compress(large, data, "size=5x", max_ram=MAX_RAM, out=tmp_path / "out")
    assert found.value_before is None and found.drop is None and found.latency_before_ms is None
    assert {u["method"] for u in found.record["units"] if u["scheme"]} == {"rtn"}


def test_batch_norms_are_not_folded_while_streaming(tmp_path, monkeypatch):
    monkeypatch.setattr(compress_module._Run, "_must_stream", lambda self, meta: True)
    found = compress(save("resnet", tmp_path / "float"), budget="size=3x", out=tmp_path / "out")
    assert not any("folded" in note for note in found.record["notes"])
    assert torch.isfinite(laconic.load(found.out)(pixel_values=torch.randn(2, 3, 32, 32)).logits).all()
