"""`smoothquant`: moves outliers of activations into the weights that read them, exactly.

Between a norm and the linear layers that read it, any positive s (K,) can be inserted without changing the
function:

    y = (x / s) (W diag(s))^T        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

x / s costs nothing at inference, because it folds into the norm's weight (and bias): g' = g / s, beta' = beta
/ s, and W diag(s) into the stored weights. max|W_j| is over all rows of all readers. alpha = 0.5 evens both
out; 0 only evens the weights' columns, 1 only the activations. With a norm that multiplies by `offset + w`
(Gemma: 1 + w), w' = (offset + w) / s - offset.

Source: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", Xiao, Lin,
Seznec, Wu, Demouth, Han, 2022, arXiv 2211.10438. Official code: mit-han-lab/smoothquant, MIT. We differ from
it: channels where X or W is zero throughout keep s = 1 (official clamps s to 1e-5, which multiplies the
norm's weight by 1e5 there); which layers read a norm comes from `Structure`, not from class names; products
are taken in float64 and cast once.

Use it before quantizing activations (W8A8), or to even out weight columns. It does nothing for weights that
no norm feeds, and costs weight-only quantization a little where activations have outliers: leave it out, or
take a small alpha, there.

Example:
    >>> amax, W = torch.tensor([1.0, 64.0]), torch.tensor([[1.0, 1.0], [-1.0, 0.5]])
    >>> s = smooth_scales(amax, [W])
    >>> s.tolist(), (amax / s).tolist(), (W * s).abs().amax(0).tolist()
    ([1.0, 8.0], [1.0, 8.0], [1.0, 8.0])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import REWRITE, Record
from laconic.core.structure import Structure

# Below this, an amplitude counts as zero.
TINY = 1e-5


@dataclass(frozen=True)
class Smoothed:
    """What became of one norm: the `scale` (K,) that its readers were multiplied by, or None and why."""

    norm: str
    readers: tuple[str, ...]
    scale: Tensor | None
    reason: str = ""


def smooth_scales(act_amax: Tensor, weights: list[Tensor], alpha: float = 0.5) -> Tensor:
    """s (K,) float32 for one norm and its readers.

    Args:
        act_amax: (K,) largest magnitude of each channel of the norm's output, over calibration data.
        weights: (rows, K) of every reader.
        alpha: 0 to 1, the share of the difficulty that moves into the weights.

    Raises:
        ValueError: alpha outside [0, 1], no weights, or shapes or values that cannot be.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth_scales: alpha={alpha} is not within 0 and 1")
    if not weights or any(w.shape[-1] != act_amax.numel() for w in weights):
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(f"smooth_scales: {act_amax.numel()} channels do not fit weights of shapes {shapes}")
    x = act_amax.detach().reshape(-1).double()
    if not bool(torch.isfinite(x).all()) or bool((x < 0).any()):
        raise ValueError("smooth_scales: act_amax must be finite and not negative")
    w = torch.stack(
        [weight.detach().reshape(-1, x.numel()).abs().amax(0).double() for weight in weights]
    ).amax(0)
    usable = (x > TINY) & (w > TINY)
    s = torch.where(usable, x.clamp(min=TINY) ** alpha / w.clamp(min=TINY) ** (1 - alpha), 1.0)
    return s.clamp(min=TINY).float()


def smooth_norm(model: nn.Module, structure: Structure, norm: str, scale: Tensor) -> None:
    """Divide a norm's output by `scale` (K,) and multiply its readers' columns by it, in place.

    Args:
        model: changed in place; may be on `meta`, where nothing happens to shapes.
        structure: of the model.
        norm: path of a norm whose readers are complete.
        scale: positive.

    Raises:
        ValueError: a reader of the norm is unknown, and why; or the scale does not fit.
    """
    readers = structure.norms.get(norm)
    if readers is None or not readers.complete:
        raise ValueError(f"{norm}: cannot be smoothed: {structure.reason(norm)}")
    module = model.get_submodule(norm)
    s = scale.detach().double().reshape(-1)
    if s.numel() != module.weight.numel() or not bool((s > 0).all()):
        raise ValueError(f"{norm}: needs {module.weight.numel()} positive scales, got {s.numel()}")
    _rescale(model, norm, readers.offset, {name: _stored_in_out(structure, name) for name in readers.weights}, s)


@torch.no_grad()
def _rescale(model: nn.Module, norm: str, offset: float, readers: Mapping[str, bool], s: Tensor) -> None:
    """Divide a norm by s (K,) float64 and multiply its readers' columns; `readers` says which store (in, out)."""
    module = model.get_submodule(norm)
    weight = module.weight
    weight.copy_(((weight.double() + offset) / s.to(weight.device).view_as(weight) - offset).to(weight.dtype))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() / s.to(bias.device).view_as(bias)).to(bias.dtype))
    for name, in_out in readers.items():
        reader = model.get_parameter(name)
        along = s.to(reader.device)[:, None] if in_out else s.to(reader.device)
        reader.copy_((reader.double() * along).to(reader.dtype))

def apply_smooth(
    model: nn.Module, structure: Structure, act_amax: Mapping[str, Tensor], alpha: float = 0.5
) -> list[Smoothed]:
    """Smooth every norm in `act_amax`, in place, and say what was done and what was not.

    Args:
        model: changed in place.
        structure: of the model.
        act_amax: path of a norm -> (K,) largest magnitudes of its output.
        alpha: see `smooth_scales`.

    Returns:
        One entry for each norm of `act_amax`, in its order; those with a `reason` were left as they were.
    """
    done = []
    for norm, amax in act_amax.items():
        reason = refusal(model, structure, norm)
        readers = structure.norms[norm].modules if norm in structure.norms else ()
        if reason:
            done.append(Smoothed(norm, readers, None, reason))
            continue
        names = structure.norms[norm].weights
        matrices = [
            model.get_parameter(name).mT if _stored_in_out(structure, name) else model.get_parameter(name)
            for name in names
        ]
        scale = smooth_scales(amax, [m.reshape(-1, m.shape[-1]) for m in matrices], alpha)
        smooth_norm(model, structure, norm, scale)
        done.append(Smoothed(norm, readers, scale))
    return done


@dataclass(frozen=True)
class SmoothQuant:
    """The pass: evens out every norm whose readers are all known.

    Args:
        alpha: 0 to 1, the share of the difficulty that moves into the weights.
    """

    alpha: float = 0.5

    id: ClassVar = "smoothquant"
    stage: ClassVar = "rewrite"
    scope: ClassVar = "model"
    needs: ClassVar = frozenset({"data", "float"})

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Norm -> the weights that read it; norm -> why it cannot be smoothed."""
        reasons = {norm: refusal(model, structure, norm) for norm in structure.norms}
        return Decision(
            {
                norm: {
                    "alpha": self.alpha,
                    "offset": structure.norms[norm].offset,
                    "readers": {name: _stored_in_out(structure, name) for name in structure.norms[norm].weights},
                }
                for norm, reason in reasons.items()
                if not reason
            },
            {norm: reason for norm, reason in reasons.items() if reason},
        )

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """s of one norm, from `ctx.absmax`."""
        said = decision.units[path]
        if path not in ctx.absmax:
            raise ValueError(f"{path}: smoothing needs the largest magnitudes of its output on calibration data")
        matrices = [
            ctx.model.get_parameter(name).mT if in_out else ctx.model.get_parameter(name)
            for name, in_out in said["readers"].items()
        ]
        scale = smooth_scales(ctx.absmax[path], [m.reshape(-1, m.shape[-1]) for m in matrices], said["alpha"])
        return Record(REWRITE, path, {"pass": self.id, **said}, {"scale": scale})

    def apply(self, model: nn.Module, record: Record) -> None:
        """Divide the norm by s and multiply its readers' columns by it."""
        said = record.data
        _rescale(model, record.path, said["offset"], said["readers"], record.tensors["scale"].double())


def refusal(model: nn.Module, structure: Structure, norm: str) -> str:
    """Why a norm cannot be smoothed, or "" if it can."""
    reason = structure.reason(norm)
    if reason:
        return reason
    module = model.get_submodule(norm)
    known = {"weight", "bias"}
    others = [name for name, _ in module.named_parameters() if name not in known]
    if others:
        return f"it has parameters beside weight and bias: {', '.join(others)}"
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and structure.norms[norm].offset and bias.shape != module.weight.shape:
        return "its bias and its weight differ in shape"
    return ""


def _stored_in_out(structure: Structure, name: str) -> bool:
    """Whether a reader's weight has its input axis before its output axis."""
    return any(
        use.transposed for use in structure.parameters[structure.name_of(name)].uses if use.role == "weight"
    )


CARD = Card(
    id="smoothquant",
    title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    authors="Xiao, Lin, Seznec, Wu, Demouth, Han",
    year=2022,
    source="arXiv 2211.10438",
    family="quant",
    summary="Moves outliers of activations out of a norm's output into the weights that read it, exactly.",
    objects={"SmoothQuant": "Pass"},
    traits={"SmoothQuant": ("exact",)},
    use="Before activations are quantized, most of all at 8 bits for weights and activations.",
    avoid="For weights alone where activations have outliers: it makes weights harder to round.",
    composes=("gptq", "rtn"),
    code="mit-han-lab/smoothquant, MIT",
)
