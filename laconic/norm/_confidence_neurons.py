"""`confidence_neurons`: the neurons of the last layer by which a language model sets how sure it is.

With the last MLP's output weights w_n (d,), one a neuron, and the head W_U (V, d), the final norm's gain folded into it
and its mean over the vocabulary taken away:

    LogitVar(n) = Var_v cos(w_n, W_U[v])        how much it prefers some tokens over others
    rho(n) = |U_k^T w_n| / |w_n|                U_k (d, k): directions of the k smallest singular values of W_U

An **entropy neuron** has a large |w_n|, a small LogitVar and a large rho: it writes where the head does not look, and
acts by making the residual longer, which the final norm then divides by. To see this, a neuron is held at its mean,
residual += (mean - act_n) w_n, before the final norm:

    total effect      mean |change of the loss|
    direct effect     the same, with the norm's scale of every position held at what it was
    norm-mediated     1 - direct / total; exactly 0 where there is no norm

A **token-frequency neuron** acts along u = (log p - mean) / |...|, p the frequencies of tokens: with `freeze="unigram"`
the logits' part along u is held at what it was.

Source: "Confidence Regulation Neurons in Language Models", Stolfo, Wu, Gurnee, Belinkov, Song, Sachan, Nanda, 2024,
arXiv 2406.16254. Official code: bpwu1/confidence-regulation-neurons, no licence file, of which none was used.

The last MLP, norm and head are found by the order of calls. It costs one pass over the tokens and one product with the
head for each ablation. Look at it where a model's confidence changes and its accuracy does not: after compressing, or
after removing norms.

Example:
    >>> import torch
    >>> from laconic.norm import ConfidenceNeurons
    >>> from laconic.tasks.small.networks import CharacterModel
    >>> model, tokens = CharacterModel(20, 12, width=16), torch.randint(20, (4, 12))
    >>> [row["kind"] for row in ConfidenceNeurons(top=2)(model, tokens).table]
    ['entropy', 'entropy', 'random', 'random']
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.figure import chart
from laconic.core.modes import evaluating
from laconic.errors import BadInput

START = 3  # positions of a text that are left out: too little stands before them
SHARE = 40 / 768  # of the head's directions that count as not looked at, the code's figure for GPT-2
AGREES = 1e-3  # relative difference between the model's logits and ours that rounding may make


class Readout(NamedTuple):
    """What writes last into the residual stream, and what reads it; `norm` is None where there is none."""

    writer: str
    norm: str | None
    head: str


@dataclass(frozen=True)
class Seen:
    """A pass over tokens, as ablations need it.

    Attributes:
        tokens: (n, t).
        activations: (n, t, m), what the last MLP's output layer reads.
        residual: (n, t, d), what the final norm (or the head) reads.
        out: (m, d), the weights w.
        head: (V, d) and its bias (V,) or None.
        norm: the final norm or None.
    """

    tokens: Tensor
    activations: Tensor
    residual: Tensor
    out: Tensor
    head: tuple[Tensor, Tensor | None]
    norm: nn.Module | None

    @property
    def centred(self) -> bool:
        """Whether the final norm takes the mean away."""
        return self.norm is not None and isinstance(self.norm, nn.LayerNorm)

    def scale(self, residual: Tensor) -> Tensor | float:
        """1 over what the norm divides each position by, (n, t, 1)."""
        if self.norm is None:
            return 1.0
        eps = _eps(self.norm)
        x = residual - residual.mean(-1, keepdim=True) if self.centred else residual
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def logits(self, residual: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """(n, t, V); with a scale that is held, or the residual's own."""
        x = residual - residual.mean(-1, keepdim=True) if self.centred else residual
        x = x * (self.scale(residual) if scale is None else scale)
        gain, shift = (getattr(self.norm, name, None) for name in ("weight", "bias"))
        if gain is not None:
            x = x * gain.float()
        if shift is not None:
            x = x + shift.float()
        return F.linear(x, *self.head)


@dataclass(frozen=True)
class Ablation:
    """What holding neurons at their mean does, each a mean over positions.

    Attributes:
        loss, entropy, kl: without it; in nats; kl from the tokens' frequencies.
        loss_after, entropy_after, kl_after: with it.
        effect: mean |change of the loss|.
    """

    loss: float
    entropy: float
    kl: float
    loss_after: float
    entropy_after: float
    kl_after: float
    effect: float


# --- finding ----------------------------------------------------------------------------------------


@torch.no_grad()
def find_readout(model: nn.Module, tokens: Tensor) -> Readout:
    """The last MLP's output layer, the final norm and the head, by the order in which they are called.

    Raises:
        BadInput: fewer than two linear layers are called.
    """
    order: list[tuple[str, bool]] = []

    def note(path: str, norm: bool) -> Any:
        return lambda module, arguments, output: order.append((path, norm))

    handles = [
        module.register_forward_hook(note(path, _is_norm(module)))
        for path, module in model.named_modules()
        if _is_norm(module) or _is_linear(module)
    ]
    try:
        model(tokens[:1])
    finally:
        for handle in handles:
            handle.remove()
    linear = [i for i, (_, norm) in enumerate(order) if not norm]
    if len(linear) < 2:
        raise BadInput(
            "confidence_neurons: a language model of MLPs and a head is needed: no two linear layers are called"
        )
    head, writer = linear[-1], linear[-2]
    between = [path for path, norm in order[writer + 1 : head] if norm]
    return Readout(order[writer][0], between[-1] if between else None, order[head][0])


@torch.no_grad()
def look(model: nn.Module, tokens: Tensor, readout: Readout | None = None) -> Seen:
    """Run a model over tokens (n, t) in evaluation mode and keep what ablations need.

    Raises:
        BadInput: the tokens are none, or what is found does not give the model's logits.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens) or tokens.shape[1] < START + 2:
        raise BadInput(
            f"confidence_neurons: tokens (n, t) with t of at least {START + 2} are needed, not {tuple(tokens.shape)} "
            f"{tokens.dtype}"
        )
    held = next(iter(model.parameters()), tokens)
    tokens = tokens.to(held.device)
    kept: dict[str, Tensor] = {}
    with evaluating(model):
        found = readout or find_readout(model, tokens)
        reader = found.norm or found.head
        handles = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda m, a, name=name: kept.__setitem__(name, a[0].detach().float())
            )
            for name, path in (("activations", found.writer), ("residual", reader))
        ]
        try:
            output = model(tokens)
        finally:
            for handle in handles:
                handle.remove()
    head = model.get_submodule(found.head)
    bias = getattr(head, "bias", None)
    norm = model.get_submodule(found.norm) if found.norm else None
    seen = Seen(
        tokens, kept["activations"], kept["residual"], _matrix(model.get_submodule(found.writer)),
        (_matrix(head).T, None if bias is None else bias.detach().float()), norm,
    )  # fmt: skip
    logits = (output if isinstance(output, Tensor) else output.logits).detach().float()
    ours = seen.logits(seen.residual)
    if ours.shape != logits.shape or not (ours - logits).abs().max() <= AGREES * logits.abs().max():
        raise BadInput(
            f"confidence_neurons: {found.norm or 'no norm'} and {found.head} after {found.writer} do not give the model's "
            "logits: something else stands between"
        )
    return seen


# --- mathematics ------------------------------------------------------------------------------------


def neuron_table(seen: Seen, k: int | None = None) -> dict[str, Tensor]:
    """|w|, LogitVar and rho of every neuron, each (m,).

    Args:
        seen: of a model.
        k: directions of the head that count as not looked at; 40 of 768 by default.
    """
    head = seen.head[0]
    gain = getattr(seen.norm, "weight", None)
    if gain is not None:
        head = head * gain.detach().float()
    head = head - head.mean(0)
    out = seen.out - seen.out.mean(1, keepdim=True) if seen.centred else seen.out
    size = head.shape[1]
    count = max(1, round(SHARE * size)) if k is None else k
    if not 0 < count < size:
        raise BadInput(f"confidence_neurons: k={count} of {size} directions: between 1 and {size - 1} are possible")
    # The eigenvalues of W^T W rise: its first vectors are the directions of the smallest singular values.
    _, directions = torch.linalg.eigh((head.T @ head).double())
    length = out.norm(dim=1)
    safe = length.clamp(min=torch.finfo(torch.float32).tiny)
    cosines = (out @ head.T) / safe[:, None] / head.norm(dim=1).clamp(min=1e-12)
    rho = (out.double() @ directions[:, :count]).norm(dim=1).float() / safe
    return {"norm": length, "logit_var": cosines.var(1, correction=0), "rho": rho}


def mean_ablation(
    seen: Seen, neurons: Sequence[int], freeze: str | None = None, unigram: Tensor | None = None
) -> Ablation:
    """Hold neurons at their mean over the tokens.

    Args:
        seen: of a model.
        neurons: which.
        freeze: None, "ln": the norm's scale stays, or "unigram": the logits' part along the frequencies stays.
        unigram: frequencies (V,); those of the tokens by default.

    Raises:
        BadInput: another `freeze`, or a neuron that there is not.
    """
    if freeze not in (None, "ln", "unigram"):
        raise BadInput(f"confidence_neurons: freeze is None, 'ln' or 'unigram', not {freeze!r}")
    if not all(0 <= n < len(seen.out) for n in neurons):
        raise BadInput(f"confidence_neurons: neurons {list(neurons)} of {len(seen.out)}")
    chosen = torch.as_tensor(list(neurons), dtype=torch.long, device=seen.out.device)
    act = seen.activations[..., chosen]
    held = act[:, START:].mean((0, 1)) - act
    changed = seen.residual + held @ seen.out[chosen]
    before = seen.logits(seen.residual)
    after = seen.logits(changed, seen.scale(seen.residual) if freeze == "ln" else None)
    p = frequencies(seen) if unigram is None else unigram.to(before)
    if freeze == "unigram":
        u = p.log() - p.log().mean()
        u = u / u.norm().clamp(min=1e-12)
        after = after + ((before - after) @ u)[..., None] * u
    loss, entropy, kl = _measures(before, seen.tokens, p)
    loss_after, entropy_after, kl_after = _measures(after, seen.tokens, p)
    means = [float(values.mean()) for values in (loss, entropy, kl, loss_after, entropy_after, kl_after)]
    return Ablation(*means, effect=float((loss_after - loss).abs().mean()))


def frequencies(seen: Seen) -> Tensor:
    """Of the tokens, (V,), each counted once more than it is there."""
    counts = torch.bincount(seen.tokens.flatten(), minlength=len(seen.head[0])).float() + 1
    return counts / counts.sum()


def _measures(logits: Tensor, tokens: Tensor, unigram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy and KL(unigram, p) at every position from `START` on that has a next token."""
    log_p = logits[:, START:-1].log_softmax(-1)
    loss = -log_p.gather(2, tokens[:, START + 1 :, None]).squeeze(2)
    return loss, -(log_p.exp() * log_p).sum(-1), (unigram * (unigram.log() - log_p)).sum(-1)


def norm_mediated(seen: Seen, neurons: Sequence[int]) -> tuple[float, float, float]:
    """Total and direct effect of ablating neurons, and the share that the norm mediates."""
    total = mean_ablation(seen, neurons).effect
    direct = mean_ablation(seen, neurons, "ln").effect
    return total, direct, 1 - direct / total if total else 0.0


def entropy_neurons(model: nn.Module, tokens: Tensor, k: int | None = None, top: int = 10) -> list[int]:
    """The neurons of the last MLP with the largest rho, among the longer half of them."""
    return _entropy_neurons(neuron_table(look(model, tokens), k), top)


def token_frequency_neurons(
    model: nn.Module, tokens: Tensor, unigram: Tensor | None = None, top: int = 10
) -> list[tuple[int, float]]:
    """Neurons whose effect goes most through the tokens' frequencies: (neuron, share of the effect that does)."""
    seen = look(model, tokens)
    shares = []
    for n in range(len(seen.out)):
        total = mean_ablation(seen, [n], unigram=unigram).effect
        rest = mean_ablation(seen, [n], "unigram", unigram).effect
        shares.append((total - rest, n, 1 - rest / total if total else 0.0))
    return [(n, share) for _, n, share in sorted(shares, reverse=True)[:top]]


def _entropy_neurons(table: Mapping[str, Tensor], top: int) -> list[int]:
    long = table["norm"] >= table["norm"].median()
    return torch.where(long, table["rho"], -1.0).argsort(descending=True, stable=True)[:top].tolist()


# --- the probe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfidenceFinding:
    """What was found.

    Attributes:
        table: rows of neuron, kind ("entropy", "random"), norm, logit_var, rho, total, direct, norm_mediated,
            frequency_mediated.
        points: (rho, LogitVar) of every neuron.
        cost: forward passes, ablations, tokens, seconds.
    """

    table: Sequence[Mapping[str, Any]]
    points: Sequence[tuple[float, float]]
    cost: Mapping[str, float]

    def plot(self) -> str:
        """LogitVar over rho of every neuron, those of the table marked, in SVG."""
        series: dict[str, list[tuple[float, float]]] = {"all": list(self.points), "entropy": [], "random": []}
        for row in self.table:
            series[row["kind"]].append((row["rho"], row["logit_var"]))
        return chart(
            series, "neurons of the last layer", "rho: written where the head does not look", "LogitVar", joined=False
        )  # noqa: E501


class ConfidenceNeurons:
    """The probe: the likeliest entropy neurons of a language model's last MLP beside random ones.

    Args:
        top: how many of each.
        k: see `neuron_table`.
        seed: of the random ones.

    Raises:
        BadInput: fewer than one neuron.
    """

    reads = "tokens"

    def __init__(self, top: int = 5, k: int | None = None, seed: int = 0):
        if top < 1:
            raise BadInput(f"confidence_neurons: top={top}: at least one neuron is looked at")
        self.top, self.k, self.seed = top, k, seed

    def __call__(self, model: nn.Module, tokens: Tensor) -> ConfidenceFinding:
        """What it finds on tokens (n, t).

        Raises:
            BadInput: see `look`.
        """
        began = time.perf_counter()
        with torch.no_grad():
            seen = look(model, tokens)
            table = neuron_table(seen, self.k)
            chosen = _entropy_neurons(table, self.top)
            rest = [n for n in range(len(seen.out)) if n not in chosen]
            drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(self.seed))[: self.top]
            kinds = [(n, "entropy") for n in chosen] + [(rest[i], "random") for i in drawn.tolist()]
            rows = [self._row(seen, table, n, kind) for n, kind in kinds]
        points = list(zip(table["rho"].tolist(), table["logit_var"].tolist(), strict=True))
        cost = {
            "forward passes": 2, "ablations": 3 * len(rows), "tokens": tokens.numel(),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
        return ConfidenceFinding(rows, points, cost)

    @staticmethod
    def _row(seen: Seen, table: Mapping[str, Tensor], n: int, kind: str) -> dict[str, Any]:
        total, direct, share = norm_mediated(seen, [n])
        rest = mean_ablation(seen, [n], "unigram").effect
        return {
            "neuron": n, "kind": kind, **{name: float(values[n]) for name, values in table.items()}, "total": total,
            "direct": direct, "norm_mediated": share, "frequency_mediated": 1 - rest / total if total else 0.0,
        }  # fmt: skip


def _is_norm(module: nn.Module) -> bool:
    return (
        "Norm" in type(module).__name__
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 1
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _matrix(module: nn.Module) -> Tensor:
    """(in, out) in float32: transformers' Conv1D has it so, a linear layer has the other."""
    weight = module.weight.detach().float()
    return weight.T if isinstance(module, nn.Linear) else weight


def _eps(norm: nn.Module) -> float:
    found = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    return torch.finfo(torch.float32).eps if found is None else float(found)


CARD = Card(
    id="confidence_neurons",
    title="Confidence Regulation Neurons in Language Models",
    authors="Stolfo, Wu, Gurnee, Belinkov, Song, Sachan, Nanda",
    year=2024,
    source="arXiv 2406.16254",
    family="norm",
    summary="Finds the last layer's neurons by which a language model sets its confidence through the final norm, and "
    "through the tokens' frequencies.",
    objects={"ConfidenceNeurons": "Probe"},
    use="Where a language model's confidence changes and its accuracy does not: after compressing, or removing norms.",
    avoid="Models whose head does not read the residual stream through one norm.",
    composes=("calibration",),
    code="github.com/bpwu1/confidence-regulation-neurons, no licence file",
    claim={
        "text": "What the neurons that write where the head does not look do is mediated by the final norm: by more than "
        "three tenths more of their effect than of random neurons'.",
        "metric": "share of the effect on the loss that the final norm mediates",
        "direction": "higher",
        "margin": 0.3,
        "arms": ("random neurons", "entropy neurons"),
        "seeds": 5,
        "minutes": 6,
        "task": "chars",
    },
)
