"""Perplexity against transformers' own loss; windows; a tiny training run, stopped and taken up again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laconic.errors import BadInput
from laconic.tasks import load_task, tiny_lm
from laconic.tasks.language import PerplexityTask, spread_windows, window_losses
from laconic.tasks.metrics import compare
from laconic.tasks.tiny_lm import Recipe, deal, learning_rate, order, read_documents, train_tiny_lm
from tests.tasks.models import llama, sentences

SPLITS = ("calibrate", "select", "verify")


def windows(n=5, length=12):
    rng = np.random.default_rng(0)
    return {split: rng.integers(0, 300, (n, length)) for split in SPLITS}


def test_perplexity_is_that_of_transformers():
    model, task = llama(), PerplexityTask("t", windows(), batch=2)
    found = task.evaluate(model, "verify")
    ids = task.windows["verify"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
        said = model(input_ids=ids).logits[:, -2].argmax(-1).tolist()
    assert found.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.per_example[:, 1].tolist() == [11.0] * 5
    assert found.answers == [str(token) for token in said]
    assert 0 <= found.also["next-token accuracy"] <= 1


def test_padding_does_not_count():
    ids = torch.randint(300, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 6, 300, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    losses, counts, _ = window_losses(logits, ids, mask)
    assert counts.tolist() == [3, 3]
    for row, part in ((0, slice(0, 4)), (1, slice(2, 6))):
        alone, count, _ = window_losses(logits[row : row + 1, part], ids[row : row + 1, part])
        assert count.item() == 3
        torch.testing.assert_close(alone[0], losses[row])


def test_forward_gives_logits_with_a_gradient():
    task, model = PerplexityTask("t", windows()), llama()
    logits = task.forward(model, task.batches("calibrate", batch=2)[0])
    assert logits.shape == (2, 12, 300) and logits.requires_grad


def test_windows_are_cut_shorter_but_not_longer():
    task = PerplexityTask("t", windows())
    pieces = task.rows("verify", 5)["input_ids"]
    assert pieces.shape == (10, 5)
    assert torch.equal(pieces[:2].flatten(), task.windows["verify"][0, :10])
    with pytest.raises(BadInput, match="windows of 12 tokens, fewer than seq=13: take a seq of 12 at most"):
        task.batches("verify", seq=13)


def test_windows_in_which_nothing_follows_are_refused():
    with pytest.raises(BadInput, match="t: in windows of 1 token there is nothing to predict: take a seq of 2"):
        PerplexityTask("t", {split: ids[:, :1] for split, ids in windows().items()})
    with pytest.raises(BadInput, match="nothing to predict"):
        PerplexityTask("t", windows()).batches("verify", seq=1)


def test_batch_is_bounded_by_the_logits():
    long = {split: np.zeros((3, 512), int) for split in SPLITS}
    assert PerplexityTask("t", long, vocabulary=49_152).batch == 1
    assert PerplexityTask("t", windows(), vocabulary=300).batch == 32


def test_a_model_that_breaks_down_is_infinitely_perplexed():
    model, task = llama(), PerplexityTask("t", windows())
    before = task.evaluate(model, "verify")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    after = task.evaluate(model, "verify")
    assert after.value == math.inf
    assert compare(before, after, task.metric).drop == math.inf


def test_spread_windows_do_not_overlap():
    tokens = np.arange(103)
    for seed in range(20):
        found = spread_windows(tokens, 4, 20, np.random.default_rng(seed))
        assert found.shape == (4, 20) and len(np.unique(found)) == 80
    with pytest.raises(BadInput, match="103 tokens are too few for 6 windows of 20: 120 are needed"):
        spread_windows(tokens, 6, 20, np.random.default_rng(0))


# tiny-lm

SMALL = Recipe(
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    hidden=24,
    vocabulary=300,
    context=16,
    batch=4,
    steps=24,
    warmup=4,
)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Short speeches and chapters in the place of the fetched ones."""
    for name in ("sotu", "moby-dick"):
        (tmp_path / name).mkdir()
    lines = sentences(200)
    for i in range(20):
        text = "\n\n".join("\n".join(lines[j : j + 3]) for j in range(10 * i, 10 * i + 9, 3))
        (tmp_path / "sotu" / f"{1790 + i}_somebody_n.txt").write_text(text)
        (tmp_path / "moby-dick" / f"chapter_{i + 1}.txt").write_text(text.upper())
    monkeypatch.setattr(tiny_lm, "fetch_package", lambda name, **_: tmp_path / name)
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_tenth_document_is_held_out(texts):
    train, held = read_documents(texts / "sotu", texts / "moby-dick")
    assert (len(train), len(held)) == (36, 4)
    speeches = sorted((texts / "sotu").iterdir())
    assert " ".join(held[0].split()) == " ".join(speeches[4].read_text().split())
    assert held[0].count("\n") == 2  # three paragraphs, each on one line
    chapter = texts / "moby-dick" / "chapter_15.txt"
    assert " ".join(held[3].split()) == " ".join(chapter.read_text().split())


def test_documents_are_dealt_whole_and_by_share():
    documents = [np.full(100, i) for i in range(40)]
    dealt = deal(documents, seed=0)
    assert {split: len(tokens) for split, tokens in dealt.items()} == {
        "calibrate": 1200,
        "select": 800,
        "verify": 2000,
    }
    held = [set(tokens.tolist()) for tokens in dealt.values()]
    assert sum(map(len, held)) == len(set.union(*held)) == 40


def test_order_passes_over_everything_and_repeats_for_a_seed():
    stream, recipe = np.arange(16 * 13 + 17), SMALL
    batches = [batch for _, batch in zip(range(6), order(stream, recipe), strict=False)]
    again = [batch for _, batch in zip(range(6), order(stream, recipe), strict=False)]
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    first = np.concatenate(batches[:3])
    assert first.shape == (12, 17) and len(np.unique(first[:, 0])) == 12


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, SMALL) for step in range(SMALL.steps)]
    assert max(rates) == rates[4] == SMALL.rate and rates[0] == SMALL.rate / 4
    assert 0.1 * SMALL.rate < rates[-1] < 0.13 * SMALL.rate


def test_training_makes_a_folder_for_transformers_and_learns(texts):
    said: list[str] = []
    folder = train_tiny_lm(SMALL, say=said.append)
    assert said[0].startswith("training tiny-lm on ") and train_tiny_lm(SMALL, say=said.append) == folder
    assert len([line for line in said if line.startswith("training")]) == 1  # the second time it is there
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(folder).decode([0]) == "<|endoftext|>"
    record = json.loads((folder / "training.json").read_text())
    assert record["recipe"]["steps"] == 24 and record["training_loss"] < math.log(300)
    task = tiny_lm.load(recipe=SMALL)
    assert task.evaluate(model, "verify").value < 0.9 * task.evaluate(llama(), "verify").value


def test_training_that_is_stopped_goes_on_to_the_same_weights(texts, monkeypatch):
    monkeypatch.setattr(tiny_lm, "bfloat16_is_faster", lambda: False)
    monkeypatch.setattr(tiny_lm, "CHECKPOINT_STEPS", 8)
    whole = train_tiny_lm(SMALL, cache=texts / "whole", say=lambda _: None)
    real, left = tiny_lm._Run.train, [19]

    def stopping(self, rows, autocast):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, rows, autocast)

    monkeypatch.setattr(tiny_lm._Run, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_tiny_lm(SMALL, cache=texts / "cut", say=lambda _: None)
    monkeypatch.setattr(tiny_lm._Run, "train", real)
    said: list[str] = []
    cut = train_tiny_lm(SMALL, cache=texts / "cut", say=said.append)
    assert "from step 16 of 24" in said[0]
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.fetched
def test_the_real_smollm_task(fetched):
    pytest.importorskip("gguf")
    fetched("smollm-moby")
    task = load_task("smollm-moby")
    assert task.sizes == {"calibrate": 64, "select": 16, "verify": 24}
    assert task.length == 512 and task.batch == 1
    rows = [tuple(row) for split in SPLITS for row in task.windows[split].tolist()]
    assert len(set(rows)) == 104
    assert "whale" in task.tokenizer.decode(task.windows["calibrate"].flatten())


@pytest.mark.fetched
@pytest.mark.slow
def test_the_real_smollm_figure(fetched):
    pytest.importorskip("gguf")
    folder = fetched("smollm")
    fetched("smollm-moby")
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    assert load_task("smollm-moby").evaluate(model, "verify").value == pytest.approx(56.31, abs=0.1)


@pytest.mark.fetched
def test_the_real_texts_of_tiny_lm(fetched):
    sotu = fetched("tiny-lm")
    train, held = read_documents(sotu, fetched("moby-dick"))
    assert (len(train), len(held)) == (331, 37)
    assert not set(train) & set(held)
    assert train[0].startswith("Fellow-Citizens of the Senate") and "Call me Ishmael" in "".join(train)
