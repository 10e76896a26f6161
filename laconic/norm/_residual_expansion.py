"""`residual_expansion`: what depth does to a residual network without norms, and the scales that bear it.

For n branches F_i and a scale lambda, f = (I + lambda F_n) o ... o (I + lambda F_1) is a sum over paths:

    f(x) = x + lambda sum_i F_i(x) + lambda^2 sum_(i<j) F_j'(x) F_i(x) + O(lambda^3)

The term of order k has C(n, k) paths, so that with lambda = 1 it explodes with depth. With 1 / n the order is bounded by
1 / k!; for branches that are independent of each other at first, variances stay bounded with 1 / sqrt(n), which works
better in practice. lambda is a knob of capacity, which the geometric complexity measures:

    GC = mean_x |df/dx|_F^2             estimated with random signs v: E |v^T df/dx|^2

`scale_residuals` sets lambda; `SkipInit` is one learned lambda to a branch, 0 at first; `fixup_` takes the norms out of
the branches and starts them so that n L layers train: the first m - 1 of m layers of a branch times n^(-1 / (2 m - 2)),
the last and the classifier at 0, a learned shift before each layer and activation, a learned factor behind each branch.

Source: "On residual network depth", Dherin, Munn, 2025, arXiv 2510.03470 (its code is not public, and it was read in
summaries only). SkipInit: De and Smith, 2020, arXiv 2002.10444; Fixup: Zhang, Dauphin, Ma, 2019, arXiv 1901.09321.
We compute the expansion to any order, as the Taylor series in lambda, by nested forward-mode derivatives.

At inference a scale folds into the last layer of its branch. Use it where norms are to go, or to ask why a deep network
does not train. Norms that train well are more accurate in the papers' own tables. Expansions need smooth activations.

Example:
    >>> import torch
    >>> from laconic.norm import residual_expansion
    >>> double, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> _ = torch.nn.init.constant_(double.weight, 2.0)
    >>> round(residual_expansion([double, double], x, 0.1, order=2).item(), 6)  # (1 + 0.2)^2
    1.44
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import jvp

from laconic.core.card import Card
from laconic.core.figure import bars
from laconic.core.modes import evaluating
from laconic.core.placement import SCHEMES, Placement, Residual
from laconic.core.placing import place
from laconic.errors import BadInput

RULES: Mapping[str, Callable[[int], float]] = {"1/sqrt(n)": lambda n: 1 / math.sqrt(n), "1/n": lambda n: 1 / n}
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm2d)

M = TypeVar("M", bound=nn.Module)


# --- the expansion ----------------------------------------------------------------------------------


def residual_expansion(blocks: Sequence[Callable[[Tensor], Tensor]], x: Tensor, lam: float, order: int = 2) -> Tensor:
    """f(x) up to lambda^order, of x's shape.

    Args:
        blocks: the branches F_1 to F_n.
        x: the input.
        lam: lambda.
        order: of the last term; each one costs about twice the one before.

    Raises:
        ValueError: a negative order.
    """
    if order < 0:
        raise ValueError(f"residual_expansion: the order is {order}: it must not be negative")

    def network(scale: Tensor) -> Tensor:
        y = x
        for block in blocks:
            y = y + scale * block(y)
        return y

    zero, total = x.new_zeros(()), torch.zeros_like(x)
    term: Callable[[Tensor], Tensor] = network
    for k in range(order + 1):
        total = total + lam**k / math.factorial(k) * term(zero)
        term = _derivative(term)
    return total


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]


# --- scales -----------------------------------------------------------------------------------------


def scale_of(rule: str | float, branches: int) -> float:
    """lambda of a rule for so many branches.

    Raises:
        BadInput: an unknown rule, or no branches.
    """
    if branches < 1:
        raise BadInput("residual_expansion: there is no residual branch to scale")
    if not isinstance(rule, str):
        return float(rule)
    if rule not in RULES:
        raise BadInput(f"residual_expansion: the rule is {rule!r}: it is {', '.join(RULES)} or a number")
    return RULES[rule](branches)


def scale_residuals(
    model: nn.Module, rule: str | float = "1/sqrt(n)", learnable: bool = False, *, scheme: str = "pre"
) -> float:
    """Multiply every residual branch of a model by lambda, in place.

    Args:
        model: one whose blocks are `laconic.core.placement.Residual` (those of `laconic.zoo`), which keep their norms; or
            a Llama, GPT-2, BERT or ViT of transformers.
        rule: "1/sqrt(n)" or "1/n" for n branches, or a number.
        learnable: make the scales parameters, one to a branch.
        scheme: where a transformers model keeps its norms, a name of `laconic.core.placement.SCHEMES`: "post" for BERT.

    Returns:
        lambda.

    Raises:
        BadInput: an unknown rule or scheme, or a model without residual blocks that are known.
    """
    blocks = _blocks(model)
    if blocks:
        scale = scale_of(rule, len(blocks))
        for block in blocks.values():
            block.placement = replace(block.placement, branch_scale=scale, learned=learnable)
            like = next(block.parameters(), torch.empty(0))
            start = torch.tensor(scale, device=like.device, dtype=like.dtype)
            block.scale = nn.Parameter(start) if learnable else None
        return scale
    if scheme not in SCHEMES:
        raise BadInput(f"residual_expansion: there is no placement {scheme!r}; there are {', '.join(SCHEMES)}")

    def scaled(layer: int, layers: int) -> Placement:
        # Two branches to a layer: attention and the perceptron.
        return replace(SCHEMES[scheme](layer, layers), branch_scale=scale_of(rule, 2 * layers), learned=learnable)

    done = place(model, scaled)
    return scale_of(rule, 2 * len(done.placements))


class SkipInit(nn.Module):
    """y = scale x, with one learned scale: behind a branch, 0 at first, so that the block starts as the identity.

    Args:
        init: the first value; Fixup has 1.
        device, dtype: of the parameter.
    """

    def __init__(
        self, init: float = 0.0, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.init = init
        self.scale = nn.Parameter(torch.full((), init, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"residual_expansion: SkipInit is for floating-point numbers, not {x.dtype}")
        return self.scale * x

    def extra_repr(self) -> str:
        return f"init={self.init}"


class Shift(nn.Module):
    """y = x + bias, with one learned bias, 0 at first."""

    def __init__(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


@torch.no_grad()
def fixup_(model: M, *, classifier: str | None = None) -> M:
    """Take the norms out of a model's residual branches and start it by Fixup, in place; train it from here.

    The learned scalars want a tenth of the learning rate. Norms outside the blocks stay.

    Args:
        model: one with `laconic.core.placement.Residual` blocks whose branches are `nn.Sequential`.
        classifier: path of the last linear layer; by default the last one outside the blocks.

    Returns:
        The model.

    Raises:
        BadInput: no such block, a branch of another kind or without two layers, a block whose norm stands before an
            activation, or no classifier.
    """
    blocks = _blocks(model)
    if not blocks:
        raise BadInput(f"fixup: {type(model).__name__} has no residual block that is known")
    inside = {module for block in blocks.values() for module in block.modules()}
    outside = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
    head: Any = model.get_submodule(classifier) if classifier is not None else (outside[-1] if outside else None)
    if not isinstance(head, nn.Linear):
        raise BadInput(f"fixup: {classifier or type(model).__name__} is or has no linear layer to be the classifier")
    for path, block in blocks.items():
        layers = [part for part in block.branch.modules() if isinstance(part, MATRICES)]
        if not isinstance(block.branch, nn.Sequential) or len(layers) < 2:
            raise BadInput(f"fixup: the branch of {path} is no nn.Sequential of two layers or more")
        if block.norm_in is not None and block.activation is not None:
            raise BadInput(f"fixup: the norm of {path} stands before an activation: build the network with it behind")
    for block in blocks.values():
        _fixup_block(block, len(blocks))
    for parameter in head.parameters():
        parameter.zero_()
    return model


def _fixup_block(block: Residual, blocks: int) -> None:
    branch = block.branch
    assert isinstance(branch, nn.Sequential)
    layers: list[Any] = [part for part in branch.modules() if isinstance(part, MATRICES)]
    for layer in layers[:-1]:
        layer.weight.mul_(blocks ** (-1 / (2 * len(layers) - 2)))
    layers[-1].weight.zero_()
    for layer in layers:
        if layer.bias is not None:
            layer.bias.zero_()
    weight = layers[0].weight
    parts: list[nn.Module] = []
    for part in branch:
        if isinstance(part, NORMS):
            continue
        if isinstance(part, (*MATRICES, *ACTIVATIONS)):
            parts.append(Shift(device=weight.device, dtype=weight.dtype))
        parts.append(part)
    block.branch = nn.Sequential(*parts, SkipInit(1.0, device=weight.device, dtype=weight.dtype))
    block.norm_in = block.norm_out = block.norm_after_add = block.scale = None
    gone = {"norm_in": False, "norm_out": False, "norm_after_add": False, "learned": False}
    block.placement = replace(block.placement, branch_scale=1.0, **gone)


def _blocks(model: nn.Module) -> dict[str, Residual]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Residual)}


# --- the probe --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Complexity:
    """What was found.

    Attributes:
        table: a row for each batch: batch, examples, complexity; the last row, "all", has their mean over examples.
        cost: backward passes and examples.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, int]

    @property
    def value(self) -> float:
        """GC."""
        return float(self.table[-1]["complexity"])

    def plot(self) -> str:
        """A bar for each batch, in SVG."""
        top = max((row["complexity"] for row in self.table), default=0.0)
        most = top if 0 < top < math.inf else 1.0
        found = [(str(row["batch"]), row["complexity"]) for row in self.table]
        rows = [(name, min(v / most, 1.0) if math.isfinite(v) else 1.0, f"{v:.4g}") for name, v in found]
        label = f"geometric complexity {self.value:.4g}"
        return bars(rows, "geometric complexity by batch", label, left=120, right=110)


class GeometricComplexity:
    """The probe: mean squared norm of the derivative of a model's output by its input.

    Args:
        samples: random signs to an example; None takes every output by itself, exactly.
        seed: of the signs.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, samples: int | None = 8, *, seed: int = 0):
        if samples is not None and samples < 1:
            raise ValueError(f"geometric_complexity: {samples} samples estimate nothing")
        self.samples, self.seed = samples, seed

    def __call__(self, model: nn.Module, data: Tensor | Iterable[Any]) -> Complexity:
        """What it finds.

        Args:
            model: examples do not influence each other; runs in evaluation mode.
            data: inputs (N, ...) of floating-point numbers, or batches of them, or batches of (inputs, anything).

        Raises:
            BadInput: there is no example, or inputs are no floating-point numbers.
        """
        generator = torch.Generator().manual_seed(self.seed)
        batches = [data] if isinstance(data, Tensor) else [b[0] if isinstance(b, (tuple, list)) else b for b in data]
        with evaluating(model):
            found = [self._batch(model, batch, generator) for batch in batches if len(batch)]
        if not found:
            raise BadInput("geometric_complexity: there is no example to look at")
        table = [{"batch": str(i), "examples": n, "complexity": s / n} for i, (s, n, _) in enumerate(found)]
        examples, total = sum(n for _, n, _ in found), sum(s for s, _, _ in found)
        table.append({"batch": "all", "examples": examples, "complexity": total / examples})
        return Complexity(table, {"backward passes": sum(passes for _, _, passes in found), "examples": examples})

    def _batch(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> tuple[float, int, int]:
        """Sum over examples, examples, backward passes."""
        if not x.is_floating_point():
            raise BadInput(f"geometric_complexity: inputs of {x.dtype} have no derivative: give the embeddings")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = model(x).flatten(1)
            passes = y.shape[1] if self.samples is None else self.samples
            total = 0.0
            for k in range(passes):
                if self.samples is None:
                    v = torch.zeros_like(y)
                    v[:, k] = 1
                else:
                    v = (2 * torch.randint(2, y.shape, generator=generator) - 1).to(y)
                (slope,) = torch.autograd.grad(y, x, v, retain_graph=k + 1 < passes)
                total += float(slope.double().square().sum())
        return total if self.samples is None else total / passes, len(x), passes


def geometric_complexity(model: nn.Module, x: Tensor, samples: int | None = 8, seed: int = 0) -> float:
    """GC of a model over inputs (N, ...)."""
    return GeometricComplexity(samples, seed=seed)(model, x).value


CARD = Card(
    id="residual_expansion",
    title="On residual network depth",
    authors="Dherin, Munn",
    year=2025,
    source="arXiv 2510.03470",
    family="norm",
    summary="Scales residual branches so that deep networks train without norms, expands them into paths, and measures "
    "how complex the function is.",
    objects={"SkipInit": "Layer", "GeometricComplexity": "Probe"},
    traits={"SkipInit": ("gradient:exact", "batch_independent_eval")},
    use="Residual networks without norms, and the question why a deep one does not train.",
    avoid="Where norms train well: networks with them are the more accurate ones.",
    composes=("lns",),
    code="none found",
    claim={
        "text": "A residual perceptron of 64 branches without norms is more accurate with branches scaled by 1 / sqrt(n) "
        "than unscaled, by more than five points.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.05,
        "arms": ("unscaled", "one_over_sqrt_n"),
        "seeds": 5,
        "minutes": 6,
        "task": "digits",
    },
)
