"""Retrieval and the linear probe on synthetic embeddings; the real corpus where it is fetched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel

from laconic.tasks import load_task
from laconic.tasks.minilm_bbc import MiniLMBBC, linear_probe, mean_pool, nearest_other, read_articles
from tests.tasks.models import bert, sentences, tokenizer


def test_mean_pool_is_the_unit_mean_over_the_text():
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [100.0, 100.0]], [[0.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(mean_pool(hidden, mask), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_nearest_other_is_never_oneself():
    points = torch.nn.functional.normalize(
        torch.randn(700, 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
    found = nearest_other(points)
    near = points @ points.T
    near.fill_diagonal_(-2)
    assert torch.equal(found, near.argmax(1))  # 700 rows: more than one block of the real thing
    assert (found != torch.arange(700)).all()


def test_linear_probe_separates_what_a_line_separates():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 4, generator=generator), torch.arange(300) % 3
    x[torch.arange(300), y] += 6
    assert linear_probe(x[:200], y[:200], x[200:], y[200:]) > 0.97
    assert linear_probe(x[:200], y[:200], torch.randn(100, 4, generator=generator), y[200:]) < 0.6


def task(n=60, **options):
    labels = np.arange(n) % 3
    return MiniLMBBC(sentences(n), labels, ["a", "b", "c"], tokenizer(), per_topic=4, seq=12, **options)


def test_splits_are_balanced_and_disjoint():
    found = task()
    assert found.sizes == {"calibrate": 12, "select": 12, "verify": 36}
    assert np.bincount(found.labels[found.indices["calibrate"]]).tolist() == [4, 4, 4]
    assert len(set(np.concatenate(list(found.indices.values())))) == 60


def test_evaluation_of_a_tiny_encoder():
    toy, model = task(), bert()
    found = toy.evaluate(model, "verify")
    labels = [toy.topics[i] for i in toy.labels[toy.indices["verify"]]]
    assert found.per_example.tolist() == [float(a == b) for a, b in zip(found.answers, labels, strict=True)]
    assert found.value == found.per_example.mean()
    assert 0 <= found.also["linear probe accuracy"] <= 1
    assert "linear probe accuracy" in toy.evaluate(model, "select").also
    assert toy.evaluate(model, "calibrate").also == {}
    output = toy.forward(model, toy.batches("calibrate", batch=5, seq=6)[0])
    assert output.shape == (5, 16) and output.requires_grad


def test_a_broken_encoder_is_measured_and_not_fatal():
    model = bert()
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.fill_(torch.nan)
    assert task().evaluate(model, "verify").value < 0.6


def test_articles_are_read_once_each(tmp_path):
    for topic, name, raw in (
        ("b", "1.txt", b"Title\n\ntext  here"),
        ("b", "2.txt", b"Title text here\n"),
        ("a", "1.txt", b"costs \xa35"),
    ):
        (tmp_path / topic).mkdir(exist_ok=True)
        (tmp_path / topic / name).write_bytes(raw)
    texts, labels, topics = read_articles(tmp_path)
    assert texts == ["costs £5", "Title text here"]
    assert labels.tolist() == [0, 1] and topics == ["a", "b"]


@pytest.mark.fetched
def test_the_real_task(fetched):
    fetched("minilm-bbc")
    real = load_task("minilm-bbc")
    assert real.sizes == {"calibrate": 200, "select": 200, "verify": 1725}
    assert len(set(real.texts)) == 2125
    model = AutoModel.from_pretrained(fetched("minilm"))
    found = real.evaluate(model, "select")
    assert 0.80 < found.value < 0.87
    assert found.also["linear probe accuracy"] > 0.88


@pytest.mark.fetched
@pytest.mark.slow
def test_the_real_figure(fetched):
    fetched("minilm-bbc")
    found = load_task("minilm-bbc").evaluate(AutoModel.from_pretrained(fetched("minilm")), "verify")
    assert found.value == pytest.approx(0.9438, abs=0.002)
    assert found.also["linear probe accuracy"] == pytest.approx(0.9455, abs=0.004)
