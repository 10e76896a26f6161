"""`quant_study`: does a quantized language model bear the same temperature and top-k as its original?

For every format, temperature T and top-k: with logits z_f of the float model and z_q of the quantized one, on texts that
the float model itself wrote at that T and k,

    p = softmax(top_k(z_f) / T),  q = softmax(top_k(z_q) / T)          each with its own k largest
    KL = mean over tokens of sum_i p_i log(p_i / q_i)                  both mixed with eps of the uniform distribution
    overlap = |top_k(z_f) & top_k(z_q)| / |top_k(z_f) | top_k(z_q)|    1 where all are kept
    agreement = share of tokens whose most likely successor is the same

and of texts that the quantized model writes: distinct pairs over pairs (`distinct_2`), the float model's perplexity on
them, the share of places where two seeds wrote the same token (`consistency`), tokens a second, and bytes as held.
Dividing logits by T multiplies their error by 1/T, so KL rises as T falls, until the largest logit alone decides.

All formats draw the same random numbers for the same prompt and seed, so differences are the format's. The interval of a
KL is over prompts. Formats are really packed: `int8` is LLM.int8, whose speed is that of its decomposition and says
nothing about 8 bits as such; `nf4` and `fp4` are those of bitsandbytes with a float32 scale for each 64 weights of a row, and
`-dq` has these scales in 8 bits, 256 together (`laconic.numerics.nested`). Embeddings and the output layer stay float.

Source: "Understanding the Impact of Post-Training Quantization on Large Language Models", Roy, 2023, arXiv 2309.05210; no
code was found, and how texts were judged is not known: the measures are ours. In bitsandbytes the 64
weights run on over the ends of rows.

Use it before a decoding setting that was tuned on the float model is kept. It costs the formats times temperatures times
seeds many generations, without a cache: give few and short prompts, of which 32 times 4 seeds keep the noise low.

Example:
    >>> import torch
    >>> f, q = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    >>> [round(tempered_kl(f, q, t).item(), 3) for t in (1.0, 0.5)], round(top_k_overlap(f, q, 1).item(), 3)
    ([0.421, 1.499], 0.0)
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.figure import chart
from laconic.core.modes import evaluating
from laconic.core.passes import Context
from laconic.core.record import Record, apply_records
from laconic.core.structure import Structure
from laconic.core.units import find_units
from laconic.errors import BadInput
from laconic.numerics import Scheme

from ._llm_int8 import LLMInt8
from ._rounded import tensor_of
from ._rtn import RTN

EPS = 1e-6
BLOCK, SECOND = 64, 256  # weights of a scale, and scales that share one in the second quantization
FORMATS = ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
TEMPERATURES = (0.1, 0.25, 0.5, 0.65, 0.8, 1.0)


# --- mathematics ------------------------------------------------------------------------------------


def tempered(logits: Tensor, temperature: float, top_k: int = 0) -> Tensor:
    """log softmax(top_k(z) / T) (..., V) in float32; -inf outside the top k, of which 0 keeps all."""
    z = logits.float() / temperature
    if 0 < top_k < z.shape[-1]:
        least = z.topk(top_k, dim=-1).values[..., -1:]
        z = z.masked_fill(z < least, -math.inf)
    return z.log_softmax(-1)


def tempered_kl(reference: Tensor, other: Tensor, temperature: float, top_k: int = 0, eps: float = EPS) -> Tensor:
    """KL (...) in nats between what two rows of logits (..., V) say under the same temperature and top k."""
    size = reference.shape[-1]
    p, q = (tempered(z, temperature, top_k).exp().double() * (1 - eps) + eps / size for z in (reference, other))
    return (p * (p / q).log()).sum(-1)


def top_k_overlap(reference: Tensor, other: Tensor, top_k: int) -> Tensor:
    """Share (...) of the tokens in either top k that are in both; 1 for a top k of 0, which keeps all."""
    if not 0 < top_k < reference.shape[-1]:
        return torch.ones(reference.shape[:-1])
    kept = [
        torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.topk(top_k, -1).indices, True) for z in (reference, other)
    ]
    return (kept[0] & kept[1]).sum(-1) / (kept[0] | kept[1]).sum(-1)


def distinct_pairs(texts: Tensor) -> float:
    """Distinct pairs of neighbours over all pairs, the mean over texts (n, t); 1 where there is no pair."""
    if texts.shape[1] < 2:
        return 1.0
    pairs = torch.stack([texts[:, :-1], texts[:, 1:]], -1)
    return sum(len({tuple(pair) for pair in text}) / len(text) for text in pairs.tolist()) / len(texts)


def consistency(texts: Tensor) -> float:
    """Share of places (n, t) at which two seeds (s, n, t) wrote the same token, the mean over pairs of seeds."""
    seeds = len(texts)
    same = [(texts[a] == texts[b]).double().mean().item() for a in range(seeds) for b in range(a)]
    return sum(same) / len(same) if same else 1.0


def write(
    model: Callable[[Tensor], Any], prompts: Tensor, tokens: int, temperature: float, top_k: int, seed: int
) -> Tensor:
    """So many tokens (n, tokens) after prompts (n, t), each drawn by noise that depends on seed and place alone."""
    generator = torch.Generator().manual_seed(seed)
    texts = prompts
    for _ in range(tokens):
        logits = tensor_of(model(texts))[:, -1]
        uniform = torch.rand(logits.shape, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
        gumbel = -(-uniform.log()).log().to(logits.device)
        drawn = (tempered(logits, temperature, top_k) + gumbel).argmax(-1)
        texts = torch.cat([texts, drawn[:, None]], 1)
    return texts[:, prompts.shape[1] :]


# --- formats ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formatted:
    """A model in a format.

    Attributes:
        model: a copy, ready to run.
        bytes: of its parameters and buffers.
    """

    model: nn.Module
    bytes: int


def in_format(model: nn.Module, name: str, prompts: Tensor, skip: Sequence[str] = ("lm_head", "head")) -> Formatted:
    """A copy of a float model in a format.

    Args:
        model: left as it is.
        name: "float" (as it is), one of `FORMATS`, or a scheme for the weights of linear layers.
        prompts: token ids, to see the structure of the model by.
        skip: names of output layers, which stay float.

    Raises:
        BadInput: there is no such format.
    """
    made = copy.deepcopy(model).eval()
    if name == "bf16":
        made = made.to(torch.bfloat16)
    elif name == "int8":
        _pack(LLMInt8(skip=tuple(skip)), made, prompts, skip)
    elif name != "float":
        base, second, _ = name.partition("-dq")
        text = {"nf4": "levelsnf4", "fp4": "levelsfp4_bnb"}.get(base)
        scales = f"dynamic8x{SECOND}" if second else "float32"
        try:
            scheme = Scheme.parse(name if text is None else f"v1/{text}/group{BLOCK}/{scales}/minmax/znone/nearest")
        except ValueError as error:
            known = ", ".join(("float", *FORMATS))
            raise BadInput(f"quant_study: there is no format {name!r}: {known}, or a scheme ({error})") from None
        _pack(RTN(scheme), made, prompts, skip)
    return Formatted(made, _held(made))


def _pack(method: Any, model: nn.Module, prompts: Tensor, skip: Sequence[str]) -> None:
    """Pack linear layers in place."""
    structure = Structure.build(model, ((prompts[:1],), {}), how="hooks")
    ctx = Context(model, structure)
    decision = method.plan(structure, model)
    linear = {unit.name for unit in find_units(model, structure) if unit.op == "linear"}
    chosen = [n for n in decision.units if n in linear and not set(n.split(".")) & set(skip)]
    if not chosen:
        raise BadInput("quant_study: the model has no linear layer that can be packed")
    for path in chosen:
        record: Record = method.solve(path, decision, ctx)
        if isinstance(method, LLMInt8):
            method.apply(model, record)
        else:
            apply_records(model, [record])


def _held(model: nn.Module) -> int:
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(held.values())


# --- the probe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyFinding:
    """What was found.

    Attributes:
        table: a row for each format, temperature and top k: `format`, `temperature`, `top_k`, `kl` and its `kl_low` and
            `kl_high` (95 %), `overlap`, `agreement`, `distinct_2`, `float_perplexity`, `consistency`,
            `tokens_per_second`, `bytes`.
        cost: what it took.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, float]

    def plot(self) -> str:
        """KL over the temperature, a line for each format and top k, in SVG."""
        series: dict[str, list[tuple[float, float]]] = {}
        several = len({row["top_k"] for row in self.table}) > 1
        for row in self.table:
            name = f"{row['format']}, top {row['top_k'] or 'all'}" if several else row["format"]
            series.setdefault(name, []).append((row["temperature"], row["kl"]))
        return chart(series, "what formats change at each temperature", "temperature", "KL to the float model, nats")


class QuantStudy:
    """The probe: formats against temperatures and top-k, on prompts.

    Args:
        formats: names, see `in_format`.
        temperatures: positive.
        top_k: how many tokens may be drawn, 0 for all.
        max_new_tokens: that each text gets.
        seeds: texts for each prompt.
        prompt_tokens: look at so many tokens of each prompt, all by default; with the new ones they must fit in what the
            model can read.
        skip: names of output layers, which stay float.

    Raises:
        BadInput: nothing to look at, or a temperature that is not positive.
    """

    reads = "tokens"

    def __init__(
        self, formats: Sequence[str] = FORMATS, temperatures: Iterable[float] = TEMPERATURES,
        top_k: Iterable[int] = (0,), *, max_new_tokens: int = 16, seeds: int = 4,
        prompt_tokens: int | None = None, skip: Sequence[str] = ("lm_head", "head"),
    ):  # fmt: skip
        self.formats, self.temperatures, self.top_k = tuple(formats), tuple(temperatures), tuple(top_k)
        self.max_new_tokens, self.seeds, self.prompt_tokens = max_new_tokens, seeds, prompt_tokens
        self.skip = tuple(skip)
        if not (self.formats and self.temperatures and self.top_k) or min(max_new_tokens, seeds) < 1:
            raise BadInput("quant_study: one format, temperature, top k, new token and seed are the least")
        if not all(0 < t < math.inf for t in self.temperatures) or any(k < 0 for k in self.top_k):
            raise BadInput(
                f"quant_study: temperatures {self.temperatures} are positive, top_k {self.top_k} not negative"
            )

    def __call__(self, model: nn.Module, prompts: Tensor) -> StudyFinding:
        """What it finds on prompts (n, t) of token ids, all of one length.

        Raises:
            BadInput: no prompts, logits that are not finite, or a model with nothing to pack.
        """
        began = time.perf_counter()
        if not isinstance(prompts, Tensor) or prompts.ndim != 2 or not prompts.numel():
            raise BadInput("quant_study: prompts are token ids (n, t), at least one of one token")
        prompts = prompts[:, : self.prompt_tokens]
        self._passes = 0
        with evaluating(model), torch.no_grad():
            made = {name: in_format(model, name, prompts, self.skip) for name in self.formats}
            rows: list[dict[str, Any]] = []
            for temperature in self.temperatures:
                for k in self.top_k:
                    own = self._texts(model, prompts, temperature, k)
                    truth = self._logits(model, prompts, own)
                    for name in self.formats:
                        rows.append(self._row(model, made[name], prompts, own, truth, name, temperature, k))
        rows.sort(key=lambda row: self.formats.index(row["format"]))
        cost = {"forward passes": self._passes, "prompts": len(prompts), "seconds": time.perf_counter() - began}
        return StudyFinding(rows, cost)

    def _row(
        self, model: nn.Module, made: Formatted, prompts: Tensor, own: Tensor, truth: Tensor, name: str,
        temperature: float, k: int,
    ) -> dict[str, Any]:  # fmt: skip
        logits = self._logits(made.model, prompts, own)
        by_prompt = tempered_kl(truth, logits, temperature, k).view(self.seeds, len(prompts), -1).mean((0, 2))
        spread = by_prompt.std().item() / math.sqrt(len(prompts)) if len(prompts) > 1 else math.nan
        kl = by_prompt.mean().item()
        start = time.perf_counter()
        written = self._texts(made.model, prompts, temperature, k)
        seconds = time.perf_counter() - start
        likely = self._logits(model, prompts, written).log_softmax(-1).gather(-1, written.flatten(0, 1)[..., None])
        return {
            "format": name, "temperature": temperature, "top_k": k, "kl": kl, "kl_low": kl - 1.96 * spread,
            "kl_high": kl + 1.96 * spread, "overlap": top_k_overlap(truth, logits, k).mean().item(),
            "agreement": (truth.argmax(-1) == logits.argmax(-1)).double().mean().item(),
            "distinct_2": distinct_pairs(written.flatten(0, 1)), "float_perplexity": math.exp(-likely.mean().item()),
            "consistency": consistency(written), "tokens_per_second": written.numel() / seconds, "bytes": made.bytes,
        }  # fmt: skip

    def _texts(self, model: nn.Module, prompts: Tensor, temperature: float, k: int) -> Tensor:
        """(seeds, n, tokens)."""
        self._passes += self.seeds * self.max_new_tokens
        texts = [write(model, prompts, self.max_new_tokens, temperature, k, seed) for seed in range(self.seeds)]
        return torch.stack(texts)

    def _logits(self, model: nn.Module, prompts: Tensor, texts: Tensor) -> Tensor:
        """Float32 logits (seeds * n, tokens, V) from which each token of texts (seeds, n, tokens) was drawn."""
        self._passes += 1
        whole = torch.cat([prompts.repeat(len(texts), 1), texts.flatten(0, 1)], 1)
        found = tensor_of(model(whole))[:, prompts.shape[1] - 1 : -1].float()
        if not bool(torch.isfinite(found).all()):
            raise BadInput("quant_study: the model's logits are not finite on the prompts")
        return found


CARD = Card(
    id="quant_study",
    title="Understanding the Impact of Post-Training Quantization on Large Language Models",
    authors="Roy",
    year=2023,
    source="arXiv 2309.05210",
    family="quant",
    summary="Formats against temperatures and top-k: what quantizing changes in the texts that a model writes, and speed.",
    objects={"QuantStudy": "Probe"},
    use="Before a temperature or top-k that was tuned on the float model is kept for the quantized one.",
    avoid="To compare perplexities of formats alone: `laconic compare` does that on more data.",
    composes=("llm_int8", "rtn"),
    vectors=("formats",),
    code="none found",
    claim={
        "text": "At temperatures from .5 to .8 a language model in nf4 stays nearer to its original than in fp4.",
        "metric": "log10 of the mean KL in nats",
        "direction": "lower",
        "margin": 0.03,
        "arms": ("fp4", "nf4"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
