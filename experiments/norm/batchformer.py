"""The claim of `batchformer`: digits of which 5 to 9 are rare in training, with and without looks across the batch.

Both arms have the baseline network of the task with a narrower layer before the head, and the same pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.norm import BatchFormer
from laconic.tasks.small import small

RARE, KEPT = 5, 10  # classes from this on; one in so many of their pictures is kept
WIDTH, BATCH, EPOCHS, LR = 64, 64, 3, 1e-3


class Classifier(nn.Module):
    """Convolutions, a narrow layer, perhaps a BatchFormer, and the head."""

    def __init__(self, stem: nn.Sequential, across: bool):
        super().__init__()
        head = stem[-1]
        assert isinstance(head, nn.Linear)
        self.stem = nn.Sequential(*stem[:-1], nn.Linear(head.in_features, WIDTH), nn.ReLU())
        self.across = BatchFormer(WIDTH) if across else None
        self.head = nn.Linear(WIDTH, head.out_features)

    def loss(self, pictures: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(pictures)
        if self.across is not None:
            x, labels = self.across(x), self.across.labels(labels)
        return F.cross_entropy(self.head(x), labels)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Accuracy on the test pictures of the rare classes."""
    task = small("mnist-cnn", seed=seed, size=3000)
    pictures, labels = task.data["train"].columns
    generator = torch.Generator().manual_seed(seed)
    kept = (labels < RARE) | (torch.rand(len(labels), generator=generator) < 1 / KEPT)
    pictures, labels = pictures[kept], labels[kept]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(task.model(seed), arm == "batchformer")
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        for _ in range(1 if quick else EPOCHS):
            for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
                optimizer.zero_grad()
                model.loss(pictures[batch], labels[batch]).backward()
                optimizer.step()
    model.eval()
    tested, answers = task.data["test"].columns
    rare = answers >= RARE
    with torch.no_grad():
        found = model.head(model.stem(tested[rare])).argmax(1)
    return float((found == answers[rare]).double().mean())
