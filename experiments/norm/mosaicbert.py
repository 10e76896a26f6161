"""The claim of `mosaicbert`: a small encoder over masked characters, built and trained by its recipe or by BERT's.

Both arms have two layers of the same width and about as many parameters, the same windows of the book in the same order,
AdamW at the same rate, and are measured at 15 % masked characters, the same for both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.norm import MaskTokens, MosaicBert, MosaicBertConfig
from laconic.tasks.small import small

WIDTH, HEADS, LAYERS, LENGTH = 64, 4, 2, 64
HIDDEN_GATED, HIDDEN = 176, 256  # 3 x 64 x 176 is about 2 x 64 x 256
STEPS, BATCH, LR = 400, 32, 3e-3
SHARES = {"bert": 0.15, "mosaicbert": 0.30}
TESTED = 0.15


class Bert(nn.Module):
    """Post-norm encoder with learned positions and a GELU perceptron: ids (B, S) -> logits (B, S, vocabulary)."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(LAYERS)
        )
        self.transform = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places.weight)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.transform(x))


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Nats per masked character of the test windows."""
    task = small("chars", seed=seed)
    vocabulary = len(task.alphabet) + 2
    mask_token = vocabulary - 1
    windows, test = task.data["train"].columns[0], task.data["test"].columns[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = MosaicBertConfig(vocabulary, WIDTH, LAYERS, HEADS, HIDDEN_GATED, dropout=0.0)
        model = Bert(vocabulary) if arm == "bert" else MosaicBert(config)
    masking = MaskTokens(mask_token, vocabulary, SHARES[arm])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for _ in range(3 if quick else STEPS):
        chosen = torch.randint(len(windows), (BATCH,), generator=generator)
        ids, labels = masking(windows[chosen], generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    ids, labels = MaskTokens(mask_token, vocabulary, TESTED)(test, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()))
