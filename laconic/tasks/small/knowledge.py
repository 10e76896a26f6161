"""Small tasks `kg-NAME`: complete the triples (head, relation, tail) of a knowledge graph, in the published split.

A row is a query (head, relation) and its answer, a tail; every triple is asked both ways, the other way with
a relation of its own. The rank of an answer is taken among the entities that are not known to be answers too
(the filtered setting); ties count half. The metric is the mean of 1 / rank.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import BadInput

from ..metrics import Evaluation, Metric
from .base import Baseline, Rows, SmallTask, outputs
from .networks import ComplEx
from .sources import locate

__all__ = ["GRAPHS", "KnowledgeTask", "load", "ranks"]

GRAPHS = ("nations", "kinships", "umls")
FILES = {"train": "train.txt", "validate": "valid.txt", "test": "test.txt"}
# Of kg-nations, the graph that the test of the baseline trains on.
BASELINE = Baseline(epochs=20, lr=1e-2, value=0.745, spread=0.03)
MRR = Metric("mean reciprocal rank", higher_is_better=True, bounded=True)


class KnowledgeTask(SmallTask):
    """Rows (query (n, 2), answer (n,)) in both directions.

    Args:
        entities, relations: how many; a relation counts twice, once for each direction.
    """

    metric = MRR

    def __init__(
        self, id: str, data: dict[str, Rows], entities: int, relations: int, baseline: Baseline, seed: int = 0
    ):
        super().__init__(id, data, baseline, seed, batch_size=128)
        self.entities, self.relations = entities, relations
        known: dict[tuple[int, int], list[int]] = {}
        for rows in data.values():
            for query, answer in zip(rows.columns[0].tolist(), rows.columns[1].tolist(), strict=True):
                known.setdefault(tuple(query), []).append(answer)
        self._known = known

    def build(self) -> nn.Module:
        return ComplEx(self.entities, self.relations)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy of the answer among all entities."""
        queries, answers = batch
        return F.cross_entropy(model(queries), answers)

    def measure(self, model: nn.Module, rows: Rows) -> Evaluation:
        """Mean reciprocal rank; the share of ranks up to 10 stands in `also`."""
        queries, answers = rows.columns
        known = torch.zeros(len(rows), self.entities, dtype=torch.bool)
        for row, query in zip(known, queries.tolist(), strict=True):
            row[self._known[tuple(query)]] = True
        found = ranks(outputs(model, rows), answers, known)
        scores = (1 / found).numpy()
        return Evaluation(self.metric.value(scores), scores, {"hits at 10": (found <= 10).double().mean().item()})


def ranks(scores: Tensor, answers: Tensor, known: Tensor) -> Tensor:
    """The filtered rank of each answer, from 1, ties counted half.

    Args:
        scores: (n, entities); what is not a number ranks an answer last.
        answers: (n,).
        known: (n, entities), true for every answer that is known to be right.
    """
    scores = torch.nan_to_num(scores.double(), nan=-torch.inf)
    own = scores.gather(1, answers[:, None])
    others = ~known
    higher, equal = ((scores > own) & others).sum(1), ((scores == own) & others).sum(1)
    lost = own[:, 0] == -torch.inf
    return torch.where(lost, 1 + others.sum(1), 1 + higher + equal / 2).double()


def load(
    name: str, *, seed: int = 0, size: int | None = None, cache: str | os.PathLike[str] | None = None
) -> KnowledgeTask:
    """The task; trains on all triples by default, `size` counts triples.

    Raises:
        BadInput: there is no such graph, or it has fewer triples.
    """
    graph = name.removeprefix("kg-")
    if graph not in GRAPHS:
        raise BadInput(f"there is no small knowledge graph {graph!r}; there are {', '.join(GRAPHS)}")
    folder = locate("pykeen", name, cache) / graph
    triples = {split: _read(folder / file) for split, file in FILES.items()}
    if size is not None:
        if size > len(triples["train"]):
            raise BadInput(f"the small task {name} has {len(triples['train']):,} training triples, not {size:,}")
        chosen = np.random.default_rng(seed).permutation(len(triples["train"]))[:size]
        triples["train"] = [triples["train"][i] for i in chosen]
    every = [triple for part in triples.values() for triple in part]
    entities = {e: i for i, e in enumerate(sorted({e for head, _, tail in every for e in (head, tail)}))}
    relations = {r: i for i, r in enumerate(sorted({relation for _, relation, _ in every}))}
    data = {split: _both_ways(part, entities, relations) for split, part in triples.items()}
    return KnowledgeTask(name, data, len(entities), 2 * len(relations), BASELINE, seed)


def _read(path: Path) -> list[tuple[str, str, str]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise BadInput(f"{path}:{number} has {len(fields)} fields and not head, relation, tail; fetch pykeen again")
        found.append((fields[0], fields[1], fields[2]))
    return found


def _both_ways(triples: list[tuple[str, str, str]], entities: dict[str, int], relations: dict[str, int]) -> Rows:
    ids = torch.tensor([(entities[head], relations[relation], entities[tail]) for head, relation, tail in triples])
    head, relation, tail = ids.unbind(1)
    queries = torch.cat([torch.stack([head, relation], 1), torch.stack([tail, relation + len(relations)], 1)])
    return Rows(queries, torch.cat([tail, head]))
