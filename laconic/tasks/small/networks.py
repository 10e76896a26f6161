"""The baseline networks: plain, with the layers that the literature has, and nothing in them to be clever about."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Block", "CharacterModel", "ComplEx", "GraphConvolution", "ResidualNetwork", "TextClassifier", "cnn", "mlp"]

EMBEDDING_DEVIATION = 0.02  # of words, as in GPT-2: with PyTorch's 1.0 rare words stay what they were drawn as


def mlp(inputs: int, hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """A perceptron with ReLU: (n, ...) of `inputs` values in all -> (n, classes)."""
    widths = (inputs, *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(channels: tuple[int, int], side: int, classes: int) -> nn.Sequential:
    """Two stages of convolution, batch normalization, ReLU and pooling: (n, 1, side, side) -> (n, classes)."""
    layers: list[nn.Module] = []
    for a, b in zip((1, *channels), channels, strict=False):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[1] * (side // 4) ** 2, classes))


class ResidualBlock(nn.Module):
    """y = relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), the first convolution with the stride."""

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        same = a == b and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(a, b, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


class ResidualNetwork(nn.Module):
    """A stem that halves the picture, three residual blocks, the mean over places: (n, 3, s, s) -> (n, classes)."""

    def __init__(self, classes: int, widths: tuple[int, int, int] = (16, 32, 64)):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(2)
        )
        strides = (1, 2, 2)
        pairs = zip((widths[0], *widths), widths, strides, strict=False)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, stride) for a, b, stride in pairs))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def embedding(count: int, width: int) -> nn.Embedding:
    """A table of word embeddings with small normal weights."""
    table = nn.Embedding(count, width)
    nn.init.normal_(table.weight, std=EMBEDDING_DEVIATION)
    return table


class Attention(nn.Module):
    """Multi-head attention: (n, t, width) -> the same; `mask` (n, t) says which places may be looked at."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with normalization before: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextClassifier(nn.Module):
    """A transformer encoder and the mean over words: ids (n, t), 0 where the text has ended -> (n, classes)."""

    def __init__(self, vocabulary: int, length: int, classes: int, width: int = 64, heads: int = 4, layers: int = 1):
        super().__init__()
        self.words, self.places = embedding(vocabulary, width), embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        mask[:, 0] = True  # an empty text still has a place to look at
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        weight = mask.unsqueeze(-1).to(x.dtype)
        return self.head((self.norm(x) * weight).sum(1) / weight.sum(1))


class CharacterModel(nn.Module):
    """A causal transformer: ids (n, t) -> logits (n, t, vocabulary) of what follows each."""

    def __init__(self, vocabulary: int, context: int, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GraphConvolution(nn.Module):
    """Z = A relu(A E W_1) W_2 over all nodes, of which the asked are returned: nodes (n,) -> (n, classes).

    Args:
        adjacency: (N, N), symmetric, 0 or 1. A = D^-1/2 (adjacency + I) D^-1/2 with the degrees D of the sum.
        classes: outputs.
        width: of the hidden features; the nodes' own features E are learned.
    """

    adjacency: Tensor

    def __init__(self, adjacency: Tensor, classes: int, width: int = 16):
        super().__init__()
        looped = adjacency + torch.eye(len(adjacency))
        scale = looped.sum(1).rsqrt()
        self.register_buffer("adjacency", scale[:, None] * looped * scale)
        self.nodes = nn.Embedding(len(adjacency), width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, nodes: Tensor) -> Tensor:
        hidden = F.relu(self.first(self.adjacency @ self.nodes.weight))
        return self.second(self.adjacency @ hidden)[nodes]


class ComplEx(nn.Module):
    """Scores of every entity as the tail of (head, relation): Re(sum_k h_k r_k conj(t_k)); (n, 2) -> (n, entities).

    Source: "Complex Embeddings for Simple Link Prediction", Trouillon et al., 2016, arXiv 1606.06357.
    """

    def __init__(self, entities: int, relations: int, width: int = 64):
        super().__init__()
        self.entities, self.relations = nn.Embedding(entities, 2 * width), nn.Embedding(relations, 2 * width)
        for table in (self.entities, self.relations):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, queries: Tensor) -> Tensor:
        h_re, h_im = self.entities(queries[:, 0]).chunk(2, -1)
        r_re, r_im = self.relations(queries[:, 1]).chunk(2, -1)
        t_re, t_im = self.entities.weight.chunk(2, -1)
        return (h_re * r_re - h_im * r_im) @ t_re.T + (h_re * r_im + h_im * r_re) @ t_im.T
