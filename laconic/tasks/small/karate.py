"""Small task `karate`: which half of Zachary's karate club a member joined, from two labelled members of each.

The graph comes with networkx, which torch needs anyway. Nodes are classified with the whole graph in view;
a row is (node, class).
"""

from __future__ import annotations

import os

import networkx
import numpy as np
import torch

from laconic.errors import BadInput

from .base import Baseline, ClassTask, Rows, draw
from .networks import GraphConvolution

__all__ = ["load"]

SIZE, VALIDATE = 4, 6
BASELINE = Baseline(epochs=100, lr=1e-2, value=0.925, spread=0.12)


def load(
    name: str = "karate",
    *,
    seed: int = 0,
    size: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> ClassTask:
    """The task: `size` labelled nodes (4 by default), 6 to validate, all others to test."""
    graph = networkx.karate_club_graph()
    labels = np.array([int(graph.nodes[node]["club"] == "Officer") for node in graph])
    train = SIZE if size is None else size
    test = len(labels) - train - VALIDATE
    if test < 1:
        raise BadInput(f"the small task {name} has {len(labels)} nodes; a size of {train} leaves none to test")
    splits = draw(name, labels, {"train": train, "validate": VALIDATE, "test": test}, seed)
    data = {s: Rows(torch.from_numpy(i), torch.from_numpy(labels[i])) for s, i in splits.items()}
    adjacency = torch.from_numpy(networkx.to_numpy_array(graph, weight=None)).float()
    return ClassTask(name, data, lambda: GraphConvolution(adjacency, 2), BASELINE, seed)
