"""`lq_lora`: a weight as low-rank plus few-bit parts, W ~ Q + L1 L2, so that adapters start where rounding has hurt.

For W (out, in), L1 (out, r), L2 (r, in), alternately from Q = 0:

    L1 L2 = best rank-r approximation of W - Q          Q = NF_b(W - L1 L2)          until the error grows

The error is ||W - Q - L1 L2||, or with a diagonal F (out, in) of the Fisher information, F = sum over examples of the
squared gradient, ||sqrt(F) (W - Q - L1 L2)||. Weighted approximations are exact for F of rank one alone: with
d = sqrt(mean_j F_ij), e = sqrt(mean_i F_ij) the singular vectors are those of diag(d) (W - Q) diag(e), and L1, L2 are
divided by d and e. Rounding itself does not look at F.

NF_b is NormalFloat of b bits in blocks of B0, whose scales c are nested: c^ = o + a k / (2^b0 - 1), o the least c of the
tensor, a the largest c - o of B1 blocks, k the nearest code of b0 bits; weights are rounded with c^. This costs
b + b0 / B0 + bits(a) / (B0 B1) bits a weight. Each layer gets the configuration for which the errors of all, squared, add up
to least within a budget of bits: the integer program of `laconic.core.allocate`.

Source: "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning", Guo, Greengard,
Xing, Kim, 2023, arXiv 2311.12023. Official code: HanGuo97/lq-lora, MIT. We differ from it: the best iterate is kept, not the
last one, whose error has grown (`keep="last"` is theirs); the integer program is solved exactly; the randomized
decomposition is seeded; entries of F that are zero are lifted by a little, so that nothing is divided by zero.

Q is packed and frozen, L2 and L1 are the adapter's A and B with alpha = r: see `qlora`, of which this is another start. Use it
at 3 bits and below. At 4 bits and above plain rounding is near enough, and quicker.

Example:
    >>> import torch
    >>> W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> config = NFConfig(3, block=32, scale_block=16)
    >>> plain = float((W - config.quantize(W)).norm() / W.norm())
    >>> found = lq_decompose(W, 8, config, iterations=20)
    >>> found.errors[found.best] / float(W.norm()) < 0.9 * plain
    True
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.core.allocate import allocate
from laconic.core.card import Card
from laconic.core.lora import linear_layers
from laconic.core.modes import evaluating
from laconic.core.passes import Context, Decision
from laconic.core.record import ADAPT, PACK, Record, apply_records
from laconic.core.structure import Structure
from laconic.core.units import find_units
from laconic.errors import BadInput
from laconic.nn import PackedParameterSpec, is_packed, matrix_view, pack_tensors
from laconic.nn.packed import _is_conv1d
from laconic.numerics import Levels, NestedScales, NotFinite, Scale, Scheme, check_finite
from laconic.numerics.codebook import codes_of, values_of

from ._rtn import round_to_nearest

Heuristic = Literal["two-sided", "row", "column", "none"]
LEAST = 1e-8  # of F, as a part of its mean
RANK, ITERATIONS, OVERSAMPLING = 64, 100, 10


# --- the few-bit part -------------------------------------------------------------------------------


@dataclass(frozen=True)
class NFConfig:
    """How Q is stored.

    Args:
        bits: b, one of 2, 3, 4 and 8.
        scale_bits: b0.
        scale_dtype: of a.
        block: B0.
        scale_block: B1.

    Raises:
        ValueError: a width or type that there is not.
    """

    bits: int = 3
    scale_bits: int = 8
    scale_dtype: str = "float32"
    block: int = 64
    scale_block: int = 256

    def __post_init__(self) -> None:
        _ = self.nested, self.scheme  # they refuse what there is not

    @property
    def nested(self) -> NestedScales:
        """How scales are stored."""
        return NestedScales("linear", self.scale_bits, self.scale_block, self.scale_dtype)

    @property
    def scheme(self) -> Scheme:
        """How codes and scales are stored."""
        return Scheme(Levels(f"nf{self.bits}"), Scale("group", group=self.block, outer=self.nested))

    @property
    def bits_per_weight(self) -> float:
        """b + b0 / B0 + bits(a) / (B0 B1)."""
        width = 8 * self.nested.tensors(1)["scale_absmax"][0].itemsize
        return self.bits + self.scale_bits / self.block + width / (self.block * self.scale_block)

    def quantize(self, x: Tensor, name: str = "tensor") -> Tensor:
        """NF_b(x) float32, blocks running on over the ends of rows."""
        flat = x.detach().float().reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)
        nested = self.nested
        scale = nested.decode(nested.encode(blocks.abs().amax(1), name), len(blocks))[:, None]
        element = Levels(f"nf{self.bits}")
        codes = codes_of(blocks, torch.where(scale == 0, 1.0, scale), element)
        return values_of(codes, scale, element).view(-1)[: len(flat)].view(x.shape)


def configurations(
    bits: Iterable[int] = (2, 3, 4, 8), scale_bits: Iterable[int] = (8,), scale_dtypes: Iterable[str] = ("float32",),
    blocks: Iterable[int] = (16, 32, 64), scale_blocks: Iterable[int] = (256,),
) -> list[NFConfig]:  # fmt: skip
    """All combinations. The paper's 432: scale_bits (2, 3, 4, 8), three types, scale_blocks (16, 64, 256)."""
    return [NFConfig(*one) for one in itertools.product(bits, scale_bits, scale_dtypes, blocks, scale_blocks)]


# --- the decomposition ------------------------------------------------------------------------------


def low_rank(
    x: Tensor, rank: int, row: Tensor | None = None, column: Tensor | None = None, *, oversampling: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(L1 (m, r), L2 (r, n)) of least ||diag(d) (x - L1 L2) diag(e)||, each with the roots of the singular values.

    Args:
        x: (m, n).
        rank: r.
        row: d (m,), positive.
        column: e (n,), positive.
        oversampling: None decomposes exactly, a number by random projection on so many columns more than r.
        seed: of the projection.
    """
    scaled = x if row is None else x * row[:, None]
    scaled = scaled if column is None else scaled * column
    if oversampling is None or rank + oversampling >= min(x.shape):
        u, s, vh = torch.linalg.svd(scaled, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(scaled, rank + oversampling)
        vh = v.t()
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * vh[:rank]
    return left if row is None else left / row[:, None], right if column is None else right / column


@dataclass(frozen=True)
class Decomposed:
    """W ~ Q + L1 L2.

    Attributes:
        quantized: Q (m, n).
        left: L1 (m, r).
        right: L2 (r, n).
        errors: after each iteration.
        best: which iteration this is, counted from 0.
    """

    quantized: Tensor
    left: Tensor
    right: Tensor
    errors: list[float]
    best: int


def lq_decompose(
    W: Tensor, rank: int, config: NFConfig | Callable[[Tensor], Tensor], fisher: Tensor | None = None, *,
    heuristic: Heuristic = "two-sided", iterations: int = ITERATIONS, keep: Literal["best", "last"] = "best",
    oversampling: int | None = None, seed: int = 0, name: str = "tensor",
) -> Decomposed:  # fmt: skip
    """Alternate until the error grows.

    Args:
        W: (m, n).
        rank: r.
        config: how to round, or a function that does.
        fisher: F (m, n), not negative; None weighs all entries alike.
        heuristic: which sides are scaled; with "none" F counts in the errors alone.
        iterations: at most.
        keep: which iterate is the result.
        oversampling, seed: see `low_rank`.
        name: the parameter's path, for messages.

    Raises:
        NotFinite: inf or nan in W or F.
        ValueError: a rank or a number of iterations below 1, or F of another shape or negative.
    """
    if rank < 1 or iterations < 1:
        raise ValueError(f"{name}: rank={rank} and iterations={iterations}: both are 1 at least")
    check_finite(W, name)
    W = W.detach().float()
    weight, row, column = _weights(W, fisher, heuristic, name)
    rounded = config.quantize if isinstance(config, NFConfig) else config
    quantized = torch.zeros_like(W)
    errors: list[float] = []
    kept: tuple[Tensor, Tensor, Tensor, int] | None = None
    for i in range(iterations):
        left, right = low_rank(W - quantized, rank, row, column, oversampling=oversampling, seed=seed)
        low = left @ right
        quantized = rounded(W - low)
        off = W - quantized - low
        errors.append(float((off if weight is None else off * weight).norm()))
        if keep == "last" or errors[-1] <= min(errors):
            kept = quantized, left, right, i
        if i and errors[-1] > errors[-2]:
            break
    assert kept is not None
    return Decomposed(*kept[:3], errors, kept[3])


def _weights(
    W: Tensor, fisher: Tensor | None, heuristic: str, name: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """sqrt(F), d and e."""
    if fisher is None:
        return None, None, None
    if heuristic not in ("two-sided", "row", "column", "none"):
        raise ValueError(f"{name}: heuristic is {heuristic!r}: it must be two-sided, row, column or none")
    check_finite(fisher, name)
    if fisher.shape != W.shape or bool((fisher < 0).any()):
        raise ValueError(f"{name}: the Fisher information is {tuple(fisher.shape)} for {tuple(W.shape)}, or negative")
    F = fisher.detach().float()
    least = LEAST * float(F.mean()) or 1.0
    row = F.mean(1).clamp(min=least).sqrt() if heuristic in ("two-sided", "row") else None
    return F.sqrt(), row, F.mean(0).clamp(min=least).sqrt() if heuristic in ("two-sided", "column") else None


def fisher_information(
    model: nn.Module, examples: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor],
    select: Callable[[str, nn.Module], bool] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Name of the weight of each linear layer -> sum over examples of its squared gradient.

    Args:
        model: with float weights; it is put back as it was.
        examples: one by one, each a batch of one: the square of a batch's gradient is another thing.
        loss: of the model on an example.
        select: whether to take the layer at a path; see `linear_layers`.

    Raises:
        BadInput: there is no example, or a gradient is not finite.
    """
    names = [f"{path}.weight" for path in linear_layers(model, select)[0] if not is_packed(model.get_submodule(path))]
    weights = [model.get_parameter(name) for name in names]
    found, count = [torch.zeros_like(w, dtype=torch.float32) for w in weights], 0
    before = [w.requires_grad for w in weights]
    try:
        for weight in weights:
            weight.requires_grad_()
        with evaluating(model):
            for example in examples:
                gradients = torch.autograd.grad(loss(model, example), weights, allow_unused=True)
                for total, gradient in zip(found, gradients, strict=True):
                    if gradient is not None:
                        total += gradient.float().square()
                count += 1
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)
    if not count:
        raise BadInput("the Fisher information of no examples is not known: give some")
    for name, total in zip(names, found, strict=True):
        try:
            check_finite(total, f"{name}: its Fisher information")
        except NotFinite as error:
            raise BadInput(str(error)) from error
    return dict(zip(names, found, strict=True))


# --- the pass, and a whole model --------------------------------------------------------------------


@dataclass(frozen=True)
class LQLoRA:
    """The pass: linear layers become packed ones with an adapter, Q + L1 L2.

    Args:
        rank: r.
        config: how Q is stored where `configs` says nothing.
        configs: by the weight's name; `allocate_bits` finds them.
        fisher: F by the weight's name.
        heuristic, iterations, oversampling: see `lq_decompose`.
        skip: names of layers, the last part of their paths, that are left alone.
    """

    rank: int = RANK
    config: NFConfig = field(default_factory=NFConfig)
    configs: Mapping[str, NFConfig] = field(default_factory=dict)
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    heuristic: Heuristic = "two-sided"
    iterations: int = ITERATIONS
    oversampling: int | None = OVERSAMPLING
    skip: Sequence[str] = ("lm_head",)

    id: ClassVar = "lq_lora"
    stage: ClassVar = "quantize"
    scope: ClassVar = "module"
    needs: ClassVar = frozenset({"float"})

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Weight -> how Q is stored; parameter -> why it is left alone."""
        units, skipped = {}, {}
        allowed, left = linear_layers(model, lambda path, module: path.rpartition(".")[2] not in self.skip)
        for unit in find_units(model, structure):
            path = unit.name.rpartition(".")[0]
            config = self.configs.get(unit.name, self.config)
            why = unit.reason or _refusal(unit.spec(config.scheme), config)
            if len(unit.names) > 1:
                why = f"it is tied: {' = '.join(unit.names)}"
            elif path in left:
                why = left[path]
            elif unit.op != "linear" or path not in allowed:
                why = why or "it is not the weight of a linear layer that was asked for"
            if why:
                skipped[unit.name] = why
            else:
                units[unit.name] = _said(path, unit.spec(config.scheme), config, self.rank)
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Q, L1 and L2 of the weight at `path`; `loss` is the share of its energy that is error, weighed by F."""
        return self._solved(path, decision.units[path], ctx.model.get_parameter(path).detach(), ctx.seed)

    def _solved(self, path: str, said: Mapping[str, Any], value: Tensor, seed: int) -> Record:
        spec, config = PackedParameterSpec.from_json(said["spec"]), NFConfig(**said["config"])
        W, F = matrix_view(value, spec.view), self.fisher.get(path)
        F = None if F is None else matrix_view(F, spec.view)
        found = lq_decompose(
            W, said["rank"], config, F, heuristic=self.heuristic, iterations=self.iterations,
            oversampling=self.oversampling, seed=seed, name=path,
        )  # fmt: skip
        solved = round_to_nearest(W.float() - found.left @ found.right, spec.scheme, path)
        tensors = pack_tensors(spec, solved.codes, solved.scale, solved.zero)
        power = float((W.float() if F is None else W.float() * F.sqrt()).square().sum(dtype=torch.float64)) or 1.0
        data = {**said, "loss": found.errors[found.best] ** 2 / power, "pass": self.id, "method": self.id}
        tensors |= {"lora_A": found.right.contiguous(), "lora_B": found.left.contiguous()}
        return Record(PACK, path, data, tensors)

    def apply(self, model: nn.Module, record: Record) -> None:
        """Pack Q, and put an adapter around the layer that starts from L1 and L2; it is trainable."""
        data = {key: record.data[key] for key in ("spec", "aliases")}
        packed = {name: tensor for name, tensor in record.tensors.items() if not name.startswith("lora_")}
        adapter = {name: tensor for name, tensor in record.tensors.items() if name.startswith("lora_")}
        path = record.path.rpartition(".")[0]
        adapt = Record(ADAPT, path, {"rank": record.data["rank"]}, adapter)
        apply_records(model, [Record(PACK, record.path, data, packed), adapt])


def _refusal(spec: PackedParameterSpec, config: NFConfig) -> str:
    """Why a weight cannot be stored so, "" if it can."""
    k = spec.matrix[1]
    return f"its rows of {k} are no whole blocks of {config.block}" if k % config.block else ""


def _said(path: str, spec: PackedParameterSpec, config: NFConfig, rank: int) -> dict[str, Any]:
    """What a decision says of a weight."""
    return {
        "spec": spec.to_json(), "aliases": [], "op": "linear", "layer": path, "config": asdict(config),
        "rank": min(rank, *spec.matrix),
    }  # fmt: skip


def allocate_bits(
    weights: Mapping[str, Tensor], budget: float, rank: int = RANK, configs: Sequence[NFConfig] | None = None,
    fisher: Mapping[str, Tensor] | None = None, *, heuristic: Heuristic = "two-sided", iterations: int = 4,
    oversampling: int | None = OVERSAMPLING,
) -> dict[str, NFConfig]:  # fmt: skip
    """Name -> configuration, of least squared error in all within a budget.

    Args:
        weights: name -> matrix (rows, K).
        budget: bits a weight, on average over all; adapters are not counted.
        rank: of the adapters.
        configs: to choose from; `configurations()` by default.
        fisher: name -> F, of all or none.
        heuristic, iterations, oversampling: of the decompositions that are tried.

    Raises:
        Impossible: even the smallest configurations exceed the budget.
        BadInput: none divides the rows of a weight, or F of some weights is missing.
    """
    configs = configurations() if configs is None else list(configs)
    fisher = {} if fisher is None else fisher
    missing = [name for name in weights if name not in fisher] if fisher else []
    if missing:
        raise BadInput(f"{missing[0]}: its Fisher information is missing, and errors of several kinds do not add up")
    costs, sizes = [], []
    for name, W in weights.items():
        if all(W.shape[1] % one.block for one in configs):
            raise BadInput(f"{name}: its rows of {W.shape[1]} are no whole blocks of any configuration")
        cost = []
        for one in configs:
            if W.shape[1] % one.block:
                cost.append(float("inf"))
                continue
            found = lq_decompose(
                W, min(rank, *W.shape), one, fisher.get(name), heuristic=heuristic, iterations=iterations,
                oversampling=oversampling, name=name,
            )  # fmt: skip
            cost.append(found.errors[found.best] ** 2)
        costs.append(cost)
        sizes.append([one.bits_per_weight * W.numel() for one in configs])
    choice = allocate(costs, sizes, budget * sum(W.numel() for W in weights.values()))
    return {name: configs[index] for name, index in zip(weights, choice, strict=True)}


def lq_lora_(
    model: nn.Module, rank: int = RANK, config: NFConfig | float = 3.0, fisher: Mapping[str, Tensor] | None = None, *,
    select: Callable[[str, nn.Module], bool] | None = None, configs: Sequence[NFConfig] | None = None,
    heuristic: Heuristic = "two-sided", iterations: int = ITERATIONS, oversampling: int | None = OVERSAMPLING,
) -> dict[str, NFConfig]:  # fmt: skip
    """Decompose the linear layers of a model and freeze all but the adapters, in place.

    Args:
        model: with float weights.
        rank: of the adapters; of a smaller matrix its own.
        config: how Q is stored everywhere, or a budget in bits a weight that `allocate_bits` spends.
        fisher: see `fisher_information`.
        select: whether to take the layer at a path; all but `lm_head` by default. Those are left alone whose weights are
            tied, packed, or of rows that are no whole blocks.
        configs: to choose from within a budget.
        heuristic, iterations, oversampling: see `lq_decompose`.

    Returns:
        Name of each weight -> how it is stored.

    Raises:
        Impossible: the budget is too small.
        BadInput: no layer is left to take, or weights are not finite.
    """
    chosen, _ = linear_layers(model, select)
    fisher = {} if fisher is None else dict(fisher)
    options = configurations() if configs is None else list(configs)
    if isinstance(config, NFConfig):
        options = [config]
    shared = _shared(model)
    taken: dict[str, PackedParameterSpec] = {}
    for path in chosen:
        module: Any = model.get_submodule(path)
        if is_packed(module) or "weight" not in module._parameters or id(module.weight) in shared:
            continue
        view: Any = "transposed" if _is_conv1d(module) else "rows"
        spec = PackedParameterSpec(options[0].scheme, tuple(module.weight.shape), view)
        if any(not _refusal(spec, one) for one in options):
            taken[f"{path}.weight"] = spec
    if not taken:
        raise BadInput(f"{type(model).__name__} has no linear layer to decompose: tied, packed or narrow ones are not")
    values = {name: model.get_parameter(name).detach() for name in taken}
    views = {name: matrix_view(value, taken[name].view) for name, value in values.items()}
    try:
        if isinstance(config, NFConfig):
            found = dict.fromkeys(taken, config)
        else:
            seen = {name: matrix_view(fisher[name], taken[name].view) for name in taken if name in fisher}
            found = allocate_bits(
                views,
                config,
                rank,
                options,
                seen,
                heuristic=heuristic,
                oversampling=oversampling,  # type: ignore[arg-type]
            )
        one = LQLoRA(rank, configs=found, fisher=fisher, heuristic=heuristic, iterations=iterations, oversampling=oversampling)  # fmt: skip
        records = []
        for name, spec in taken.items():
            spec = PackedParameterSpec(found[name].scheme, spec.shape, spec.view)
            records.append(one._solved(name, _said(name.rpartition(".")[0], spec, found[name], rank), values[name], 0))
    except NotFinite as error:
        raise BadInput(str(error)) from error
    model.requires_grad_(False)
    for record in records:
        one.apply(model, record)
    return found


def _shared(model: nn.Module) -> set[int]:
    """Identities of parameters that have several names."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


CARD = Card(
    id="lq_lora",
    title="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
    authors="Guo, Greengard, Xing, Kim",
    year=2023,
    source="arXiv 2311.12023",
    family="quant",
    summary="Splits weights into a few-bit part and a low-rank part that is fine-tuned, with bits for each layer by an "
    "integer program.",
    objects={"LQLoRA": "Pass"},
    use="To fine-tune a model in 3 bits and below.",
    avoid="At 4 bits and above, where qlora starts near enough.",
    composes=("qlora",),
    vectors=("lq_lora",),
    code="github.com/HanGuo97/lq-lora, MIT",
    claim={
        "text": "With weights in 3 bits and adapters of rank 8, a language model that starts from the decomposition is "
        "better after fine-tuning than one whose adapters start from zero.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.005,
        "arms": ("qlora", "lq_lora"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
