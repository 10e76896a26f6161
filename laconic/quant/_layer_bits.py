"""`layer_bits`: whole blocks in more or in fewer bits, by how important each block is.

Importance of block l, with inputs x and outputs y (tokens, width), or with all weights w of its layers:

    LIM_l = - mean_t cos(x_t, y_t)                                    how far the block turns what passes through it
    ZD_l  = - #{w : (w - mean) / std > 1} / #w                        few weights that stand out upwards; needs no data

The most important blocks get the larger number of bits, the others the smaller one, as many as an average allows:

    max K  such that  sum_l P_l b_l <= average * sum_l P_l            b_l = high for the K most important, else low

with P_l weights in block l, so that blocks of different sizes count for what they hold. Importance is a rank: what lies
between two values means nothing. The paper gives ZD as the share itself, and the smaller it is the more important the
block; here it has the sign that makes more be more important, as LIM has. What stays outside blocks, such as embeddings
and the head, is left as it is.

Source: "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels",
Dumitru, Yadav, Maheshwary, Clotan, Madhusudhan, Surdeanu, 2024, arXiv 2406.17415. Official code:
github.com/RazvanDu/LayerwiseQuant, which had none yet. LIM is taken token by token, which the paper leaves open.
`absolute` counts weights that stand out in either direction, as some re-implementations of ZD do.

Use it to reach an average between two widths in seconds. Where a loss can be measured, costs by layer and an integer
program (`laconic.core.allocate`) choose better; `hessian_interlayer` looks at curvature. The first and the last block
mostly come out most important: compare with keeping just these.

Example:
    >>> import torch
    >>> from torch import nn
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> lim(x, 3 * x), lim(x, x.flip(1)), zd([torch.tensor([0.0, 0.0, 0.0, 5.0])])
    (-1.0, -0.0, -0.25)
    >>> assign_bits({"a": 0.1, "b": 0.7, "c": 0.2}, {"a": 10, "b": 10, "c": 20}, bits=(4, 2), average=3.0)
    {'a': 2, 'b': 4, 'c': 2}
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.allocate import allocate
from laconic.core.card import Card
from laconic.core.figure import chart
from laconic.core.modes import evaluating
from laconic.core.structure import Structure
from laconic.errors import BadInput

from ._rounded import Weight, batches_of, call, tensor_of, weights_of
from ._spaces import HasSizes

# --- mathematics ------------------------------------------------------------------------------------


def lim(x: Tensor, y: Tensor) -> float:
    """LIM of what passed through a block: inputs and outputs (..., width); -1 where nothing was turned."""
    total, tokens = _cosines(x, y)
    return -total / tokens


def zd(weights: Sequence[Tensor], *, threshold: float = 1.0, absolute: bool = False) -> float:
    """ZD of a block's weights: minus the share of them that lies more than so many standard deviations above the mean.

    Args:
        weights: of any shapes, taken as one.
        threshold: in standard deviations.
        absolute: count those below the mean as well.
    """
    weights = [w.detach() for w in weights]
    count = sum(w.numel() for w in weights)
    if count == 0:
        raise BadInput("zd: a block without weights has no importance")
    mean = sum(float(w.double().sum()) for w in weights) / count
    deviation = math.sqrt(sum(float((w.double() - mean).square().sum()) for w in weights) / count)
    if deviation == 0:
        return 0.0  # all weights are equal: none stands out
    far = 0
    for w in weights:
        z = (w.double() - mean) / deviation
        far += int(((z.abs() if absolute else z) > threshold).sum())
    return -far / count


def assign_bits(
    importance: Mapping[str, float], sizes: Mapping[str, int], *, bits: Sequence[int] = (8, 4), average: float
) -> dict[str, int]:
    """Block -> bits: the larger number for as many of the most important as the average allows.

    Args:
        importance: block -> importance, higher is more.
        sizes: block -> how many weights it has.
        bits: numbers of bits; with more than two, every block goes one down before any goes two.
        average: bound of the mean bits of a weight.

    Raises:
        BadInput: blocks differ, or an importance is nan.
        Impossible: the average is below the smallest number of bits.
    """
    if set(importance) != set(sizes):
        raise BadInput("assign_bits: importance and sizes name different blocks")
    bad = next((name for name, value in importance.items() if math.isnan(value)), None)
    if bad is not None:
        raise BadInput(f"assign_bits: the importance of {bad} is nan")
    names, falling = list(importance), sorted(set(bits), reverse=True)
    order = sorted(range(len(names)), key=lambda i: (importance[names[i]], i))
    table = [[float(sizes[name] * b) for b in falling] for name in names]
    budget = average * sum(sizes.values())
    chosen = allocate([[0.0] * len(falling) for _ in names], table, budget, solver="threshold", order=order)
    return {name: falling[option] for name, option in zip(names, chosen, strict=True)}


def _cosines(x: Tensor, y: Tensor) -> tuple[float, int]:
    """Sum of cosines over tokens, and how many they are; a token of zeros has cosine 0."""
    if x.shape != y.shape or x.ndim < 1 or not x.numel():
        raise BadInput(f"lim: inputs {tuple(x.shape)} and outputs {tuple(y.shape)} of a block must have one shape")
    a, b = (t.detach().reshape(-1, t.shape[-1]).double() for t in (x, y))
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    cosines = (a * b).sum(-1) / torch.where(lengths > 0, lengths, 1.0)
    return float(cosines.sum()), cosines.numel()


# --- the probe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerImportance:
    """What was found.

    Attributes:
        table: a row for each block, in the model's order: `block`, `weights` (how many), `lim`, `zd`, and their ranks
            `lim_rank` and `zd_rank`, 1 being the most important.
        cost: what it took.
        names: block -> names of its weights.
    """

    table: Sequence[Mapping[str, Any]]
    cost: Mapping[str, float]
    names: Mapping[str, tuple[str, ...]] = field(repr=False)

    def assign(self, average: float, bits: Sequence[int] = (8, 4), by: str = "lim") -> dict[str, int]:
        """Name of each weight -> its bits, for an average; `by` is "lim" or "zd"."""
        if by not in ("lim", "zd"):
            raise BadInput(f"layer_bits: blocks are ranked by 'lim' or 'zd', not by {by!r}")
        sizes = {row["block"]: row["weights"] for row in self.table}
        chosen = assign_bits({row["block"]: row[by] for row in self.table}, sizes, bits=bits, average=average)
        return {name: b for block, b in chosen.items() for name in self.names[block]}

    def plot(self) -> str:
        """Both importances over the blocks, each from its least to its largest, in SVG."""
        series = {}
        for key, name in (("lim", "LIM"), ("zd", "ZD")):
            values = [row[key] for row in self.table]
            low, span = min(values), max(values) - min(values) or 1.0
            series[name] = [(i, (value - low) / span) for i, value in enumerate(values)]
        return chart(series, "importance of blocks", "block", "share of its range")


class LayerBits:
    """The probe: how important each block is.

    Args:
        blocks: their paths; the longest chain of layers that feed one another by default.
        threshold: of ZD, in standard deviations.
        absolute: of ZD.
    """

    reads = "tokens"

    def __init__(self, blocks: Sequence[str] | None = None, *, threshold: float = 1.0, absolute: bool = False):
        self.blocks, self.threshold, self.absolute = blocks, threshold, absolute

    def __call__(self, model: nn.Module, data: Any) -> LayerImportance:
        """What it finds.

        Args:
            model: of floats.
            data: a batch, or several; a batch is a tensor, keywords, or a sequence that begins with the inputs.

        Raises:
            BadInput: there is no data, no chain of blocks, a block that is packed, that was not called, or whose output
                has another shape than its input or is not finite.
        """
        began = time.perf_counter()
        batches = batches_of(data)
        with evaluating(model), torch.no_grad():
            blocks = tuple(self.blocks) if self.blocks is not None else _blocks(model, batches[0])
            weights = {path: list(weights_of(model, [path]).values()) for path in blocks}
            turned = _turned(model, blocks, batches)
            rows = [self._row(path, weights[path], turned[path]) for path in blocks]
        for key in ("lim", "zd"):
            places = sorted(range(len(rows)), key=lambda i, key=key: (-rows[i][key], i))  # type: ignore[misc]
            for rank, i in enumerate(places, 1):
                rows[i][f"{key}_rank"] = rank
        cost = {"forward passes": len(batches), "seconds": time.perf_counter() - began}
        return LayerImportance(rows, cost, {path: tuple(w.name for w in weights[path]) for path in blocks})

    def _row(self, path: str, weights: list[Weight], turned: float) -> dict[str, Any]:
        share = zd([w.parameter.detach() for w in weights], threshold=self.threshold, absolute=self.absolute)
        count = sum(w.parameter.numel() for w in weights)
        return {"block": path, "weights": count, "lim": turned, "zd": share, "lim_rank": 0, "zd_rank": 0}


def _blocks(model: nn.Module, batch: Any) -> tuple[str, ...]:
    example = ((), dict(batch)) if isinstance(batch, Mapping) else ((_inputs(batch),), {})
    found = Structure.build(model, example, how="hooks").blocks
    if not found:
        raise BadInput("layer_bits: the model has no chain of blocks that feed one another: give blocks=...")
    return found


def _inputs(batch: Any) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def _turned(model: nn.Module, blocks: Sequence[str], batches: Sequence[Any]) -> dict[str, float]:
    """Block -> LIM over all tokens of all batches."""
    sums = {path: [0.0, 0] for path in blocks}

    def hook(path: str) -> Any:
        def seen(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            x, y = args[0] if args else next(iter(kwargs.values())), tensor_of(output)
            try:
                total, tokens = _cosines(x, y)
            except BadInput as error:
                raise BadInput(f"{path}: {error}") from None
            if not math.isfinite(total):
                raise BadInput(f"{path}: what passes through it is not finite, so its importance cannot be told")
            sums[path][0] += total
            sums[path][1] += tokens

        return seen

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in blocks]
    try:
        for batch in batches:
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    idle = next((path for path, (_, tokens) in sums.items() if not tokens), None)
    if idle is not None:
        raise BadInput(f"{idle} was not called on the data: its importance cannot be told")
    return {path: -total / tokens for path, (total, tokens) in sums.items()}


# --- the search -------------------------------------------------------------------------------------


class OrderSweep:
    """The search along an order: nothing moved, the least important layer moved, the two least important ones, ...

    Every decision is a layer, its values are numbers of bits from the most to the fewest. When all layers are at the
    second value the first goes on to the third. The best is what was told the highest result, so a result should weigh
    quality against size.

    Args:
        space: its decisions stand in the model's order.
        seed: taken for the sake of all searches; nothing is drawn.
        order: numbers of decisions, the least important first; the model's order by default.

    Raises:
        BadInput: an order that does not name every decision once.
    """

    def __init__(self, space: HasSizes, seed: int = 0, *, order: Sequence[int] | None = None):
        sizes = tuple(space.sizes)
        order = range(len(sizes)) if order is None else order
        if sorted(order) != list(range(len(sizes))):
            raise BadInput(f"an order names each of the {len(sizes)} decisions once, by number; found {list(order)}")
        now = [0] * len(sizes)
        self._path = [tuple(now)]
        for option in range(1, max(sizes)):
            for place in (p for p in order if option < sizes[p]):
                now[place] = option
                self._path.append(tuple(now))
        self._asked = 0
        self._best: tuple[int, ...] | None = None
        self._result = -math.inf

    def ask(self) -> list[tuple[int, ...]]:
        """The next choice; none at the end."""
        if self._asked == len(self._path):
            return []
        self._asked += 1
        return [self._path[self._asked - 1]]

    def tell(self, candidate: tuple[int, ...], result: float) -> None:
        """What the estimator gave; higher is better, and what is not finite is a failure."""
        if math.isfinite(result) and result > self._result:
            self._best, self._result = candidate, result

    def best(self) -> tuple[int, ...] | None:
        """The best choice that was evaluated; None before the first."""
        return self._best

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {"asked": self._asked, "best": self._best, "result": self._result}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._asked, self._result = state["asked"], state["result"]
        self._best = None if state["best"] is None else tuple(state["best"])


CARD = Card(
    id="layer_bits",
    title="Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels",
    authors="Dumitru, Yadav, Maheshwary, Clotan, Madhusudhan, Surdeanu",
    year=2024,
    source="arXiv 2406.17415",
    family="quant",
    summary="Ranks whole blocks by how far they turn their inputs, or by their weights, and gives the last fewer bits.",
    objects={"LayerBits": "Probe", "OrderSweep": "Search"},
    use="To reach an average between two numbers of bits in seconds, without measuring a loss.",
    avoid="Where a loss by layer can be measured: an integer program over the measured costs chooses better.",
    composes=("gptq", "rtn", "hessian_interlayer"),
    code="github.com/RazvanDu/LayerwiseQuant, which holds no code",
    claim={
        "text": "Moving blocks of a language model from 4 to 2 bits by LIM costs less than moving them in random order.",
        "metric": "bits per character, mean over how many blocks are moved",
        "direction": "lower",
        "margin": 0.02,
        "arms": ("random", "lim"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
