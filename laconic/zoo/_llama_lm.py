"""`llama_lm`: a transformer that predicts the next token, built as Llama is, with the norms where one wants them.

Each of L layers has two residual blocks, attention and a gated perceptron. With the usual placement ("pre"):

    x <- x + W_o Attention(R_t W_q N(x), R_t W_k N(x), W_v N(x))      x (N, T, d), causal, heads of width d / heads
    x <- x + W_down (silu(W_gate N(x)) * W_up N(x))                   W_gate, W_up (hidden, d), W_down (d, hidden)
    logits = W_head N(x)                                              (N, T, vocabulary)

N(x) = g x / sqrt(mean(x^2) + eps) over the last axis. R_t turns the pair (j, j + D / 2) of a head's D channels by the
angle t theta^(-2 j / D) at position t, so that scores depend on distances alone. With fewer key-value heads than heads,
each serves heads / kv_heads neighbouring ones.

Source: "LLaMA: Open and Efficient Foundation Language Models", Touvron et al., 2023, arXiv 2302.13971; of its parts:
RMSNorm, Zhang and Sennrich, 2019, arXiv 1910.07467; gated perceptron, Shazeer, 2020, arXiv 2002.05202; rotary
positions, Su et al., 2021, arXiv 2104.09864; shared keys, Ainslie et al., 2023, arXiv 2305.13245. Official code:
github.com/meta-llama/llama (Llama 2 Community License; not used here). It computes what `LlamaForCausalLM` of
transformers does from the same weights; it has no cache and no padding, being for training and for measuring.

Gains of norms before linear layers fold into those. Use it as the common ground on which attention, norms, placements
and optimizers are compared; to run a published checkpoint take transformers' own class, which laconic compresses.

Example:
    >>> import torch
    >>> from laconic.zoo import LlamaLM, LlamaLMConfig
    >>> model = LlamaLM(LlamaLMConfig(vocabulary=100, width=32, layers=2, heads=4, kv_heads=2, hidden=64))
    >>> model(torch.zeros(2, 7, dtype=torch.long)).shape
    torch.Size([2, 7, 100])
    >>> len(LlamaLM(LlamaLMConfig(100, 32, 2, placement="peri")).layers[0].attention.norm_out.weight)
    32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.placement import Placement, Residual, Scheme, placements
from laconic.errors import BadInput

# Of the normal distribution that weights are drawn from; as in GPT-2, and in Llama's published configs.
DEVIATION = 0.02


@dataclass(frozen=True)
class LlamaLMConfig:
    """Sizes and options.

    Attributes:
        vocabulary: tokens.
        width: d.
        layers: L.
        heads: of attention; they share the width.
        kv_heads: heads of keys and values; as many as `heads` by default.
        hidden: width of the gated perceptron; by default 8 d / 3, rounded up to a multiple of 16, which has as many
            parameters as two matrices of 4 d.
        theta: base of the rotary angles.
        eps: of the norms.
        tied: whether the head is the table of embeddings.
        placement: of the norms, a name of `laconic.zoo.SCHEMES` or a function of (layer, layers).
        norm_embedding: whether the embeddings are normalized first; by default where the placement is "peri".
    """

    vocabulary: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    hidden: int | None = None
    theta: float = 10_000.0
    eps: float = 1e-5
    tied: bool = False
    placement: str | Scheme = "pre"
    norm_embedding: bool | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise BadInput(f"{self.heads} heads of an even width each do not fill a width of {self.width}")
        if self.heads % self.shared_heads:
            raise BadInput(f"{self.heads} heads cannot share {self.shared_heads} heads of keys and values evenly")

    @property
    def shared_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def inner(self) -> int:
        """Width of the gated perceptron."""
        return -(-8 * self.width // 48) * 16 if self.hidden is None else self.hidden


def rotary(length: int, width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of t theta^(-2 j / width), each (length, width / 2), on the device of `like`.

    The angles are worked out anew in each call, in float32 at least: a buffer would be rounded with the model.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    steps = torch.arange(0, width, 2, device=like.device, dtype=dtype) / width
    places = torch.arange(length, device=like.device, dtype=dtype)
    angles = torch.outer(places, 1.0 / theta**steps)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (j, j + D / 2) of x (..., T, D) by angles given as (T, D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal attention with rotary positions: (N, T, d) -> the same."""

    def __init__(self, config: LlamaLMConfig):
        super().__init__()
        self.each = config.width // config.heads
        shared = config.shared_heads * self.each
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, shared, bias=False)
        self.v = nn.Linear(config.width, shared, bias=False)
        self.o = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The mixture of values, by position."""
        q, k, v = (part(x).unflatten(-1, (-1, self.each)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o(y.transpose(1, 2).flatten(2))


class GatedPerceptron(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., d) -> the same."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The output; what attention needs besides is not looked at."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and the gated perceptron, each in its residual block."""

    def __init__(self, config: LlamaLMConfig, place: Placement, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.attention = Residual(Attention(config), place, lambda: norm(config.width))
        self.perceptron = Residual(GatedPerceptron(config.width, config.inner), place, lambda: norm(config.width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(N, T, d) -> the same."""
        return self.perceptron(self.attention(x, cos, sin))

    def carriers(self) -> tuple[nn.Linear, ...]:
        """What carries values to the sums, without queries and keys: DeepNorm makes their first weights smaller."""
        mixer, inner = self.attention.branch, self.perceptron.branch
        return mixer.v, mixer.o, inner.gate, inner.up, inner.down


class LlamaLM(nn.Module):
    """The model: ids (N, T) -> logits (N, T, vocabulary) of what follows each.

    Args:
        config: its sizes.
        norm: makes the norm of so many channels; RMSNorm by default.
    """

    def __init__(self, config: LlamaLMConfig, *, norm: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.config = config
        make = norm or (lambda width: nn.RMSNorm(width, eps=config.eps))
        places = placements(config.placement, config.layers)
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        first = config.placement == "peri" if config.norm_embedding is None else config.norm_embedding
        self.norm_embedding = make(config.width) if first else nn.Identity()
        self.layers = nn.ModuleList(Layer(config, place, make) for place in places)
        # A last block that normalizes its sum has done it already.
        self.norm = nn.Identity() if places[-1].norm_after_add else make(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=DEVIATION)
        for layer, place in zip(self.layers, places, strict=True):
            for linear in layer.carriers():
                linear.weight.data.mul_(place.init_gain)
            if place.zero_last:
                nn.init.zeros_(layer.attention.branch.o.weight)
                nn.init.zeros_(layer.perceptron.branch.down.weight)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits.

        Raises:
            ValueError: ids of another shape than (N, T).
        """
        if ids.ndim != 2:
            raise ValueError(f"ids of shape (N, T) are wanted, not {tuple(ids.shape)}")
        x = self.norm_embedding(self.embedding(ids))
        cos, sin = rotary(ids.shape[1], self.config.width // self.config.heads, self.config.theta, x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


CARD = Card(
    id="llama_lm",
    title="LLaMA: Open and Efficient Foundation Language Models",
    authors="Touvron, Lavril, Izacard, Martinet, Lachaux, Lacroix, Rozière, Goyal, Hambro, Azhar, Rodriguez, Joulin, "
    "Grave, Lample",
    year=2023,
    source="arXiv 2302.13971",
    family="zoo",
    summary="A decoder-only transformer with RMSNorm, rotary positions and a gated perceptron, norms placed as one wants.",
    objects={"LlamaLM": "Model"},
    traits={"LlamaLM": ("causal",)},
    use="Small language models, and as the common ground on which norms, placements and optimizers are compared.",
    avoid="Running published checkpoints: transformers' own class has a cache, and laconic compresses it.",
    composes=("rmsnorm", "muon"),
    code="github.com/meta-llama/llama, Llama 2 Community License (not used)",
    claim={
        "text": "With as many layers and about as many parameters, RMSNorm, rotary positions and a gated perceptron "
        "predict better than layer norm, learned positions and a GELU perceptron.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("gpt", "llama"),
        "seeds": 5,
        "minutes": 6,
        "task": "chars",
    },
)
