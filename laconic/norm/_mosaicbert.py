"""`mosaicbert`: a BERT built to be pretrained fast: distances instead of positions, gated perceptrons, no padding.

Embeddings of words and types, a norm, dropout; then L layers on x (nnz, d), the tokens of all sequences that are there,
one after the other ("unpadded"); only attention puts them back into (B, S, d):

    a = softmax(q k^T / sqrt(D) + A + P) v                   q, k, v of one matrix, in this order, heads within each
    x <- LN(x + drop(W_a a))
    x <- LN(x + W_o drop(gelu(u) * w))                       [u, w] = W_g x, gate first, without bias; W_o with one

    A[h, i, j] = -m_h |i - j|         ALiBi; behind the position it is -m_h (i - j) in the causal form
    m_h = 2^(-8 (h + 1) / H)          for H heads, a power of two; else the slopes of the next smaller power P, then
                                      those of 2 P at places 0, 2, 4, ...
    P = -10000 where j is padding

With `positions`, the last layer's perceptron and the head compute those alone: pretraining asks for the masked ones.

The recipe: 30 % of the tokens masked, of which 80 % become the mask token, 10 % another one, 10 % stay (`MaskTokens`);
evaluation always at 15 %. Layer norms in bfloat16 under autocast (`low_precision_layernorm`). The paper's optimizer is
AdamW with rate 5e-4, betas (0.9, 0.98), eps 1e-6, decay 1e-5, linear to 0.02 of it, 6 % of the steps as warm-up, batch
4096, length 128.

Source: "MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining", Portes, Trott, Havens, King, Venigalla,
Nadeem, Sardana, Khudia, Frankle, 2023, arXiv 2312.17482. Official code: mosaicml/examples, Apache-2.0. ALiBi: Press,
Smith, Lewis, 2021, arXiv 2108.12409. We differ: position 0 is not added to `positions` (it is for a pooler, which this
model has not), and slopes are computed in float64 and rounded once.

At inference nothing folds (the norms stand behind sums), and unpadding saves as much as the batch has padding. Use it to
pretrain small encoders, and for sequences longer than those trained on, which ALiBi bears. Compare losses of masked
language models at equal shares of masked tokens only. The table's eps 1e-12 is for float32 alone.

Example:
    >>> import torch
    >>> from laconic.norm import MosaicBert, MosaicBertConfig
    >>> model = MosaicBert(MosaicBertConfig(50, width=16, layers=2, heads=4, hidden=24))
    >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    >>> model(torch.zeros(2, 4, dtype=torch.long), mask).shape
    torch.Size([2, 4, 50])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.surgery import Swapped, swap
from laconic.errors import BadInput

PADDING_BIAS = -10_000.0
DEVIATION = 0.02
IGNORED = -100  # of labels, as torch's cross-entropy has it
MASKED_SHARE, REPLACED = 0.8, 0.1  # of the chosen tokens: become the mask, become another one


# --- mathematics ------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> Tensor:
    """m (heads,) in float64.

    Raises:
        ValueError: there are no heads.
    """
    if heads < 1:
        raise ValueError(f"mosaicbert: {heads} heads have no slopes")
    power = 1 << (heads.bit_length() - 1)

    def of(count: int) -> Tensor:
        return 2.0 ** (-8.0 / count * torch.arange(1, count + 1, dtype=torch.float64))

    return torch.cat([of(power), of(2 * power)[0::2][: heads - power]])


def alibi_bias(
    heads: int,
    length: int,
    symmetric: bool = True,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A (heads, length, length), to be added to the scores.

    Args:
        heads: H.
        length: S.
        symmetric: -m |i - j|; False gives -m (i - j) for j up to i and 0 behind it, for causal attention.
        device, dtype: of the result.
    """
    at = torch.arange(length, dtype=torch.float64)
    distance = at[:, None] - at
    distance = distance.abs() if symmetric else distance.clamp_min(0)
    bias = -alibi_slopes(heads)[:, None, None] * distance
    return bias.to(device=device, dtype=dtype or torch.get_default_dtype())


def unpad(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x (B, S, ...) where the mask (B, S) is not 0, (nnz, ...), and their places in the flattened x."""
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mosaicbert: a mask of {tuple(mask.shape)}: it must be {tuple(x.shape[:2])}")
    places = (mask != 0).flatten().nonzero().squeeze(1)
    return x.flatten(0, 1)[places], places


def repad(rows: Tensor, places: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of `unpad`: (batch, length, ...) with zeros where there was padding."""
    whole = rows.new_zeros(batch * length, *rows.shape[1:])
    return whole.index_copy(0, places, rows).unflatten(0, (batch, length))


# --- the model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MosaicBertConfig:
    """Sizes and options; the defaults are those of MosaicBERT-Base.

    Attributes:
        vocabulary: tokens; rounded up to a multiple of 8 it runs faster.
        width: d.
        layers: L.
        heads: H, of attention; they share the width.
        hidden: width of the gated perceptron; 2048 would have as many parameters as BERT's.
        types: of segments.
        dropout: of embeddings and of what the branches give.
        attention_dropout: of the shares of attention.
        eps: of the norms.
    """

    vocabulary: int = 30_528
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    types: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise BadInput(f"mosaicbert: {self.heads} heads do not share a width of {self.width} evenly")


@dataclass(frozen=True)
class _Padding:
    """Where the rows (nnz, d) belong: `places` in the flattened (batch, length), None where all are there."""

    batch: int
    length: int
    places: Tensor | None

    def put(self, rows: Tensor) -> Tensor:
        if self.places is None:
            return rows.unflatten(0, (self.batch, self.length))
        return repad(rows, self.places, self.batch, self.length)

    def take(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return flat if self.places is None else flat[self.places]


class MosaicAttention(nn.Module):
    """Attention with its sum and norm: (nnz, d) -> the same."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.drop, self.norm = nn.Dropout(config.dropout), nn.LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor, padding: _Padding, bias: Tensor) -> Tensor:
        q, k, v = padding.put(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        y = padding.take(y.transpose(1, 2).flatten(2))
        return self.norm(x + self.drop(self.out(y)))


class MosaicPerceptron(nn.Module):
    """The gated perceptron with its sum and norm: (nnz, d) -> the same."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.gated = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.width)
        self.drop, self.norm = nn.Dropout(config.dropout), nn.LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gated(x).chunk(2, -1)
        return self.norm(x + self.out(self.drop(F.gelu(gate) * value)))


class MosaicLayer(nn.Module):
    """Attention, then the gated perceptron."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.attention, self.perceptron = MosaicAttention(config), MosaicPerceptron(config)

    def forward(self, x: Tensor, padding: _Padding, bias: Tensor, wanted: Tensor | None = None) -> Tensor:
        """(nnz, d) -> the same, or only the rows that are wanted: all are looked at, and the rest ends there."""
        x = self.attention(x, padding, bias)
        return self.perceptron(x if wanted is None else x[wanted])


class MosaicEncoder(nn.Module):
    """The layers: x (B, S, d) and a mask (B, S) -> (B, S, d), zeros where there is padding.

    Args:
        config: its sizes.
    """

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MosaicLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The last layer's output.

        Args:
            x: (B, S, d).
            mask: (B, S), 0 at padding; without one all is there.
            positions: (B, S), not 0 where the output is wanted; (count, d) comes back then, in order, those of padding
                left out.

        Raises:
            ValueError: shapes that do not fit.
        """
        batch, length, width = x.shape
        if width != self.config.width:
            raise ValueError(f"mosaicbert: an input of {tuple(x.shape)}: it must be (B, S, {self.config.width})")
        bias = alibi_bias(self.config.heads, length, device=x.device, dtype=x.dtype)[None]
        places = None
        rows = x.flatten(0, 1)
        if mask is not None:
            rows, places = unpad(x, mask)
            bias = bias + PADDING_BIAS * (mask == 0)[:, None, None, :].to(x.dtype)
        padding = _Padding(batch, length, places)
        wanted = None
        if positions is not None:
            if positions.shape != x.shape[:2]:
                raise ValueError(
                    f"mosaicbert: positions of {tuple(positions.shape)}: they must be {tuple(x.shape[:2])}"
                )
            wanted = padding.take((positions != 0).unsqueeze(-1)).squeeze(-1)
        for number, layer in enumerate(self.layers, 1):
            rows = layer(rows, padding, bias, wanted if number == len(self.layers) else None)
        return rows if wanted is not None else padding.put(rows)


class MosaicBert(nn.Module):
    """The model for masked language modelling: ids (B, S) -> logits (B, S, vocabulary). The head's matrix is the table.

    Args:
        config: its sizes; MosaicBERT-Base by default.
    """

    def __init__(self, config: MosaicBertConfig | None = None):
        super().__init__()
        self.config = config = config or MosaicBertConfig()
        self.words, self.types = nn.Embedding(config.vocabulary, config.width), nn.Embedding(config.types, config.width)
        self.norm, self.drop = nn.LayerNorm(config.width, config.eps), nn.Dropout(config.dropout)
        self.encoder = MosaicEncoder(config)
        self.transform = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.LayerNorm(config.width, config.eps)
        )
        self.head = nn.Linear(config.width, config.vocabulary)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=DEVIATION)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head.weight = self.words.weight

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits.

        Args:
            ids: (B, S).
            mask: (B, S), 0 at padding.
            types: (B, S), of segments; 0 by default.
            positions: (B, S), not 0 where logits are wanted; (count, vocabulary) comes back then.

        Raises:
            ValueError: ids of another shape than (B, S).
        """
        if ids.ndim != 2:
            raise ValueError(f"mosaicbert: ids of shape (B, S) are wanted, not {tuple(ids.shape)}")
        segments = self.types.weight[0] if types is None else self.types(types)
        x = self.drop(self.norm(self.words(ids) + segments))
        return self.head(self.transform(self.encoder(x, mask, positions)))

    def masked_loss(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the masked tokens, computed at those alone; 0 where there is none.

        Args:
            ids: (B, S), some of them masked.
            labels: (B, S), the token that stood there, -100 elsewhere.
            mask: (B, S), 0 at padding.
        """
        asked = labels != IGNORED
        if mask is not None:
            asked = asked & (mask != 0)
        logits = self(ids, mask, positions=asked)
        return F.cross_entropy(logits.float(), labels[asked], reduction="sum") / max(len(logits), 1)


# --- the recipe -------------------------------------------------------------------------------------


class MaskTokens:
    """The transform: tokens (...) -> tokens with some masked, and labels that hold those, -100 elsewhere.

    Args:
        mask_token: id of the mask.
        vocabulary: other tokens are drawn from [0, vocabulary).
        p: share that is chosen: 0.3 to train, 0.15 to evaluate.
        special: ids that are never chosen (padding, separators).

    Raises:
        ValueError: p is not in (0, 1], or the mask is no token of the vocabulary.
    """

    def __init__(self, mask_token: int, vocabulary: int, p: float = 0.3, special: tuple[int, ...] = ()):
        if not 0 < p <= 1:
            raise ValueError(f"mosaicbert: the share of masked tokens is {p}: it must be in (0, 1]")
        if not 0 <= mask_token < vocabulary:
            raise ValueError(f"mosaicbert: the mask {mask_token} is no token of a vocabulary of {vocabulary}")
        self.mask_token, self.vocabulary, self.p, self.special = mask_token, vocabulary, p, special

    def __call__(self, ids: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(masked ids, labels), both of the shape of ids."""
        chance = torch.rand(ids.shape, generator=generator)
        fate = torch.rand(ids.shape, generator=generator)
        other = torch.randint(self.vocabulary, ids.shape, generator=generator)
        chosen = (chance < self.p).to(ids.device)
        for token in self.special:
            chosen &= ids != token
        fate, other = fate.to(ids.device), other.to(ids)
        labels = torch.where(chosen, ids, torch.full_like(ids, IGNORED))
        replaced = chosen & (fate >= MASKED_SHARE) & (fate < MASKED_SHARE + REPLACED)
        masked = torch.where(chosen & (fate < MASKED_SHARE), torch.full_like(ids, self.mask_token), ids)
        return torch.where(replaced, other, masked), labels


class LowPrecisionLayerNorm(nn.LayerNorm):
    """A layer norm that under autocast reads and writes autocast's type; torch's own goes to float32 there."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return super().forward(x)
        low = torch.get_autocast_dtype(kind)
        weight, bias = (None if part is None else part.to(low) for part in (self.weight, self.bias))
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x.to(low), self.normalized_shape, weight, bias, self.eps)


def low_precision_layernorm(model: nn.Module) -> Swapped:
    """Put `LowPrecisionLayerNorm` in the place of every layer norm, in place; parameters are kept."""

    def low(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.LayerNorm)
        affine, bias = old.weight is not None, old.bias is not None
        return LowPrecisionLayerNorm(old.normalized_shape, old.eps, affine, bias)

    return swap(model, nn.LayerNorm, low)


CARD = Card(
    id="mosaicbert",
    title="MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining",
    authors="Portes, Trott, Havens, King, Venigalla, Nadeem, Sardana, Khudia, Frankle",
    year=2023,
    source="arXiv 2312.17482",
    family="norm",
    summary="A BERT that is pretrained fast: distances instead of positions, gated perceptrons, no computation on padding, "
    "layer norms in bfloat16.",
    objects={"MosaicBert": "Model", "MaskTokens": "Data", "LowPrecisionLayerNorm": "Layer"},
    traits={
        "MaskTokens": ("transform",),
        "LowPrecisionLayerNorm": ("gradient:exact", "batch_independent_eval"),
    },
    use="Pretraining small encoders on a budget, and sequences longer than those trained on.",
    avoid="Published checkpoints of other encoders, whose positions are learned.",
    composes=("rmsnorm",),
    vectors=("mosaicbert",),
    code="github.com/mosaicml/examples, Apache-2.0",
    claim={
        "text": "After as many steps, the recipe (distances, gated perceptrons, 30 % masked) predicts masked characters "
        "better than BERT's (learned positions, GELU perceptrons, 15 % masked), both at 15 %: the cross-entropy falls by "
        "more than 0.05 nats.",
        "metric": "nats per masked character",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("bert", "mosaicbert"),
        "seeds": 5,
        "minutes": 6,
        "task": "chars",
    },
)
