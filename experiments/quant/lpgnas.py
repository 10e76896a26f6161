"""The claim of `lpgnas`: two graph convolutions on a graph of four communities, in 8 bits everywhere or as searched.

600 nodes, noisy features, a fifth of the nodes to train on and a fifth held out for the choices. Both arms are trained for
as long in their formats; what is compared is the mean bits of weights and buffers, unless more than a point of accuracy
is lost against 8 bits everywhere.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.quant import QuantSpace, SearchedFormats, search_formats

NODES, CLASSES, FEATURES, WIDTH = 600, 4, 32, 16
INSIDE, OUTSIDE, NOISE = 0.04, 0.008, 2.0
STEPS, BETA, LOST = 200, 1.0, 0.01
UNIFORM = QuantSpace(weights=((2, 6),), activations=((4, 4),))
SPACE = QuantSpace()


class Network(nn.Module):
    """Z = A (relu(A (X W_1)) W_2), products as linear layers: (N, features) -> (N, classes)."""

    adjacency: Tensor

    def __init__(self, adjacency: Tensor):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.first, self.second = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.second(F.relu(self.adjacency @ self.first(x)))


def graph(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized adjacency, features and classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (NODES,), generator=generator)
    chance = torch.where(classes[:, None] == classes, INSIDE, OUTSIDE)
    linked = (torch.rand(NODES, NODES, generator=generator) < chance).float().triu(1)
    adjacency = linked + linked.T + torch.eye(NODES)
    scale = adjacency.sum(1).rsqrt()
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    features = centres[classes] + NOISE * torch.randn(NODES, FEATURES, generator=generator)
    return scale[:, None] * adjacency * scale, features / features.std(), classes


@functools.cache
def trained(space: QuantSpace, seed: int, quick: bool) -> tuple[float, float]:
    """Test accuracy and mean bits of one space."""
    adjacency, x, y = graph(seed)
    train, held, test = torch.arange(NODES).split([NODES // 5, NODES // 5, NODES - 2 * (NODES // 5)])
    torch.manual_seed(seed)
    model = Network(adjacency)
    searched = SearchedFormats(model, space)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(x)[rows], y[rows])

    steps = 3 if quick else STEPS
    search_formats(searched, lambda: loss(train), lambda: loss(held), steps=steps, beta=BETA)
    optimizer = torch.optim.Adam(searched.weights(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(train).backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(x)[test].argmax(1) == y[test]
        return right.double().mean().item(), float(searched.bits()) / searched.elements()


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean bits of one arm from one seed; `quick` tests the code and shows nothing."""
    bound = trained(UNIFORM, seed, quick)[0] - LOST
    accuracy, bits = trained(UNIFORM if arm == "uniform" else SPACE, seed, quick)
    return bits if accuracy >= bound else 16.0
