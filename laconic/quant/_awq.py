"""`awq`: scales up the weight columns that meet large activations before rounding, and takes it back in the norm.

Rounding a weight costs about the same whatever its size, so a column that is multiplied by t_j before and divided by
it after loses 1/t_j of that, and the others in its group lose more as its range grows. Between a norm and the linear
layers W (rows, K) that read its output x (tokens, K) this is exact but for the rounding Q:

    y = (x / t) (W diag(t))^T            W^ = Q(W diag(t)) diag(1/t)

with one t (K,) for all readers, from how large the inputs are, a_j = sqrt(mean x_j^2), and one exponent r:

    t_j = a_j^r,   t <- t / sqrt(max t * min t)        r in {0, 1/20, ..., 19/20}: the least sum of tr(D H D^T)

D = W^ - W of each reader and H = X^T X (K, K): the squared change of the readers' outputs. r = 0 is plain rounding, so
the result is never worse on the inputs behind H. x / t folds into the norm's weight and bias, W diag(t) into the stored
weights: nothing is left at inference. Whatever rounds afterwards must see inputs of the scaled model.

`clipped_round` is the second half: of each group, the range p [low, high] that changes the output least,

    min over p in {1, 0.95, ..., 0.55} of e H_gg e^T        e = w_g - Q_p(w_g), H_gg the group's block of H

Source: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", Lin, Tang, Tang, Yang, Chen,
Wang, Xiao, Dang, Gan, Han, 2023, arXiv 2306.00978. Official code: mit-han-lab/llm-awq, MIT. We differ from it: a is the
root mean square and not the mean magnitude, since H holds it; the loss is that of the readers' outputs and not of the
block's, exact over all calibration inputs; channels that calibration never saw keep t = 1; only what a norm feeds is
scaled (official also scales v by o and up by down); the range shrinks at both ends and keeps 0 exact.

Use it before `rtn` at 4 bits and below, where a rounding that feeds errors on is not at hand. `gptq` gains less.

Example:
    >>> import torch
    >>> from laconic.numerics import Int, Scale, Scheme
    >>> x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([20.0] + 7 * [1.0])
    >>> scheme = Scheme(Int(3), Scale("channel"), zero="int")
    >>> found = search_scale([torch.linspace(-1, 1, 32).view(4, 8)], x.T @ x, scheme)
    >>> bool(found.scale[0] == found.scale.max()), found.after < found.before
    (True, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import REWRITE, Record
from laconic.core.structure import Structure
from laconic.numerics import Int, Scale, Scheme, dequantize, fake_quantize, grouped, params_from_range, quantize

from ._gptq import Hessian, output_error
from ._products import fast_products
from ._rtn import Solved
from ._smoothquant import SmoothQuant

GRID = 20
CLIPS = tuple(1 - i / 20 for i in range(10))
# Below this part of the largest, an input counts as never seen.
UNSEEN = 1e-6
# Elements of a chunk of rows; about six float32 temporaries of this size live at once.
CHUNK = 1 << 22
DEFAULT = Scheme(Int(4), Scale("group", group=128, dtype="float16"), zero="int")


@dataclass(frozen=True)
class Scaled:
    """What a search found: t (K,) float32, the exponent r, and the sum of tr(D H D^T) without and with it."""

    scale: Tensor
    ratio: float
    before: float
    after: float


def awq_scale(amplitude: Tensor, ratio: float) -> Tensor:
    """t (K,) float32 of amplitudes a (K,) and an exponent r."""
    a = amplitude.detach().double()
    seen = a > UNSEEN * float(a.max())
    if not bool(seen.any()):
        return torch.ones_like(a).float()
    t = a.clamp(min=torch.finfo(torch.float64).tiny) ** ratio
    t = t / (t[seen].max() * t[seen].min()).sqrt()
    return torch.where(seen, t, 1.0).float()


def search_scale(
    weights: Sequence[Tensor], H: Tensor, scheme: Scheme, grid: int = GRID, name: str = "tensor"
) -> Scaled:
    """The t that changes the outputs of all readers least.

    Args:
        weights: (rows, K) of every reader.
        H: (K, K), second moment of what they read, up to a factor.
        scheme: how they will be stored.
        grid: exponents to try, from 0 on.
        name: the norm's path, for messages.

    Raises:
        ValueError: no weights, or shapes that do not fit.
        NotFinite: inf or nan in a weight.
    """
    if not weights or any(w.ndim != 2 or w.shape[1] != len(H) for w in weights):
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(f"{name}: readers of shapes {shapes} do not fit inputs of {len(H)} channels")
    amplitude = H.diagonal().double().clamp(min=0).sqrt()
    best: Scaled | None = None
    before = 0.0
    with fast_products():
        for i in range(grid):
            t = awq_scale(amplitude, i / grid)
            loss = sum(_rounding_error(w, t, H, scheme, name) for w in weights)
            before = before if i else loss
            if best is None or loss < best.after:
                best = Scaled(t, i / grid, before, loss)
    assert best is not None
    return best


def _rounding_error(W: Tensor, t: Tensor, H: Tensor, scheme: Scheme, name: str) -> float:
    """tr(D H D^T) of one reader, a few rows at a time."""
    total = 0.0
    step = W.shape[0] if scheme.scale.granularity == "tensor" else max(1, CHUNK // max(1, W.shape[1]))
    for begin in range(0, W.shape[0], max(1, step)):
        w = W[begin : begin + step].detach().float()
        total += output_error(fake_quantize(w * t, scheme, name) / t - w, H)
    return total


def clipped_round(
    W: Tensor, H: Tensor, scheme: Scheme, name: str = "tensor", clips: Sequence[float] = CLIPS
) -> Solved:
    """Round to nearest, each group in the range that changes the output least; `loss` is tr(D H D^T).

    Args:
        W: (rows, K) of any floating type.
        H: (K, K) of its inputs.
        scheme: with a scale per row or group.
        name: the parameter's path, for messages.
        clips: p, parts of the full range.

    Raises:
        ValueError: a scale per tensor, or shapes that do not fit.
        NotFinite: inf or nan in `W`.
        ScaleOutOfRange: a scale does not fit in the scheme's scale dtype.
    """
    if scheme.scale.granularity not in ("channel", "group") or W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"{name}: clipping needs a scale per row or group, and inputs of {tuple(W.shape)[1:]} channels: got "
            f"{scheme} and H of shape {tuple(H.shape)}"
        )
    k = W.shape[1]
    g = scheme.scale.group_of(k)
    pad = -k % g
    padded = nn.functional.pad(H.float(), (0, pad, 0, pad))  # what is no column costs nothing
    blocks = torch.stack([padded[a : a + g, a : a + g] for a in range(0, k + pad, g)])
    parts, loss = [], 0.0
    for begin in range(0, W.shape[0], max(1, CHUNK // max(1, k))):
        w = W[begin : begin + max(1, CHUNK // max(1, k))].detach().float()
        fake_quantize(w, scheme, name)  # refuses what cannot be stored in its full range
        groups = grouped(w, scheme)
        low, high = groups.amin(-1), groups.amax(-1)
        best = torch.full_like(low, torch.inf)
        chosen = torch.ones_like(low)
        for p in clips:
            scale, zero = params_from_range(p * low, p * high, scheme, name)
            e = w - dequantize(quantize(w, scale, zero, scheme), scale, zero, scheme)
            e = nn.functional.pad(e, (0, pad)).view(len(w), -1, g)
            error = torch.einsum("rgi,gij,rgj->rg", e, blocks, e)
            better = error < best
            best, chosen = torch.where(better, error, best), torch.where(better, p, chosen)
        scale, zero = params_from_range(chosen * low, chosen * high, scheme, name)
        codes = quantize(w, scale, zero, scheme)
        one = output_error(w - dequantize(codes, scale, zero, scheme), H.float())
        parts.append(Solved(codes, scale, zero, one))
        loss += one
    return Solved.of_rows(parts)


class AWQ:
    """The pass: finds t of every norm whose readers are all known, and moves it from the norm into them.

    Args:
        scheme: how the readers will be stored by what comes after; 4 bits in groups of 128 by default.
        grid: exponents to try.

    Raises:
        ValueError: fewer than one exponent.
    """

    id: ClassVar = "awq"
    stage: ClassVar = "rewrite"
    scope: ClassVar = "model"
    needs: ClassVar = frozenset({"data", "float"})

    def __init__(self, scheme: Scheme = DEFAULT, grid: int = GRID):
        if grid < 1:
            raise ValueError(f"AWQ: grid={grid}: at least one exponent")
        self.scheme, self.grid = scheme, grid

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Norm -> the weights that read it; norm -> why it cannot be scaled."""
        found = SmoothQuant().plan(structure, model)  # what may stand between a norm and its readers is the same
        units, skipped = {}, dict(found.skipped)
        for norm, said in found.units.items():
            wide = [name for name in said["readers"] if len(structure.parameters[structure.name_of(name)].shape) != 2]
            if wide:
                skipped[norm] = f"{wide[0]}, which reads it, is no matrix"
            else:
                rest = {key: value for key, value in said.items() if key != "alpha"}
                units[norm] = {"scheme": str(self.scheme), "grid": self.grid, **rest}
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """t of one norm, from `ctx.hessians` of any of its readers: all of them read the same."""
        said = decision.units[path]
        held = (ctx.hessians[module] for module in ctx.structure.norms[path].modules if module in ctx.hessians)
        hessian = next(held, None)
        if hessian is None:
            raise ValueError(f"{path}: scaling needs the second moment of what its readers get on calibration data")
        H = hessian.matrix if isinstance(hessian, Hessian) else hessian
        weights = [
            ctx.model.get_parameter(name).mT if in_out else ctx.model.get_parameter(name)
            for name, in_out in said["readers"].items()
        ]
        found = search_scale(weights, H, Scheme.parse(said["scheme"]), said["grid"], path)
        told = {"ratio": found.ratio, "before": found.before, "after": found.after}
        return Record(REWRITE, path, {"pass": self.id, **said, **told}, {"scale": found.scale})

    def apply(self, model: nn.Module, record: Record) -> None:
        """Divide the norm by t and multiply its readers' columns by it."""
        SmoothQuant().apply(model, record)


CARD = Card(
    id="awq",
    title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    authors="Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han",
    year=2023,
    source="arXiv 2306.00978",
    family="quant",
    summary="Scales up the weight columns that meet large activations before rounding, and takes it back in the norm.",
    objects={"AWQ": "Pass"},
    traits={"AWQ": ("exact",)},
    use="Before plain rounding at 4 bits and below, where some calibration data are at hand.",
    avoid="Before gptq, which weighs errors by the inputs already; at 8 bits, where plain rounding loses nothing.",
    composes=("rtn", "scale_tuning"),
    code="mit-han-lab/llm-awq, MIT",
    claim={
        "text": "At 3 bits, scaling weights by how large their inputs are and clipping ranges by what they change "
        "loses less of a language model than plain rounding.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.005,
        "arms": ("rtn", "awq"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
