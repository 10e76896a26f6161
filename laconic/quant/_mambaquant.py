"""`mambaquant`: evens out what a Mamba model reads and stores before it is rounded, exactly: KLT rotations and
smoothing.

Hadamard rotations spread a single outlier, but leave channels whose variances differ in a common direction uneven. With
the covariance C = K L K^T of activations and a normalized Hadamard H, the rotation K H gives every channel the variance
mean(L):

    diag((K H)^T C (K H)) = diag(H^T L H) = mean(L) 1

Places in a mixer (names as in `laconic.nn.mamba`; E inner channels), all exact but for rounding:

    R1   residual stream by K H, gains folded before; K from what the first mixer reads
    S2   input of W_out: rows of the gate in W_in / s, columns of W_out * s, the gate becomes z sigmoid(s z) ("S-SiLU"):
         with z' = z / s it is silu(z) / s
    R2   input of W_out by H, online: W_out <- W_out H
    S4   states: rows of W_x for B / s and for C * s, so that h / s and C s meet; A stays
    S5   step: rows of W_x for t / s, columns of W_dt * s;   R5   t by K H between these two, nothing online
    R6   input of W_x by H, online
    S7   rows of u in W_in / s, taps of the convolution * s

with s_j = max|x_j|^a / max|w_j|^(1 - a), a = 1/2, x what goes over the place and w what multiplies it; for S4 w is C.

Source: "MambaQuant: Quantizing the Mamba Family with Variance Aligned Rotation Methods", Xu, Yue, Xu, Hu, Yu, Chen,
Zhou, Yuan, Yang, 2025, arXiv 2501.13484. Official code: MambaQuant/MambaQuant, without a licence (not used). We differ
from it: all rotations of a layer come from that layer's own data (its code multiplies R2 and R5 on from layer to
layer); A needs no correction, since B carries 1 / s; the state's own rotations (R3, R4) are left out, as the state
stays in floats, and so is smoothing at norms (S1), which folding the gains for R1 undoes.

A rotation does not commute with the gate, the convolution and the scan: only these places are turned. Use it before
weights and inputs of a Mamba model are rounded, at 8 bits and below. For transformers take `rotate`. Mixers of
transformers are turned in their stream and inputs by `rotate` too, but lack the gate's scale: exchange them for
`laconic.nn.mamba.MambaMixer`.

Example:
    >>> import torch
    >>> from laconic.core.rotation import klt_rotation
    >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 9)
    >>> turned = x @ klt_rotation(torch.cov(x.T), torch.Generator().manual_seed(0))
    >>> spread = lambda v: round(float(v.var(0).max() / v.var(0).min()), 3)
    >>> spread(x) > 50, spread(turned)
    (True, 1.0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import RENORM, Record, apply_records
from laconic.core.renorm import _Values
from laconic.core.rotation import (
    divide,
    input_refusal,
    klt_rotation,
    positive,
    rotate_along,
    rotation,
    solve_stream,
    stream_refusal,
)
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.nn.mamba import MambaMixer
from laconic.numerics import check_finite, hadamard_block, hadamard_matrix

from ._batches import Batch, run_batch

LEAST = 1e-2  # of a smoothing scale
TINY = 1e-8


@dataclass(frozen=True)
class MambaStatistics:
    """What calibration saw, by the path of a mixer.

    Attributes:
        stream: covariance (d, d) of what its first layer reads.
        step: covariance (r, r) of t.
        out: (E,) largest magnitudes of what its last layer reads.
        projected: (r + 2 n,) of t, B and C.
        conv: (E,) of what its convolution reads.
    """

    stream: Mapping[str, Tensor] = field(default_factory=dict)
    step: Mapping[str, Tensor] = field(default_factory=dict)
    out: Mapping[str, Tensor] = field(default_factory=dict)
    projected: Mapping[str, Tensor] = field(default_factory=dict)
    conv: Mapping[str, Tensor] = field(default_factory=dict)


class _Moments:
    """Covariance and largest magnitudes, added up."""

    def __init__(self) -> None:
        self.count, self.total, self.products, self.absmax = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor, path: str) -> None:
        check_finite(x, f"what {path} sees")
        flat = x.detach().double().flatten(0, -2)
        self.count += len(flat)
        self.total = self.total + flat.sum(0)
        self.products = self.products + flat.T @ flat
        self.absmax = torch.maximum(self.absmax, flat.abs().amax(0))

    @property
    def covariance(self) -> Tensor:
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)


def mixers_in(model: nn.Module) -> dict[str, MambaMixer]:
    """Path -> mixer."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MambaMixer)}


def calibrate_mamba(model: nn.Module, batches: Sequence[Batch]) -> MambaStatistics:
    """What the mixers of a model see.

    Raises:
        BadInput: no data, fewer than two tokens, or no mixer.
    """
    mixers = mixers_in(model)
    if not batches or not mixers:
        what = "no calibration data" if mixers else f"{type(model).__name__} has no laconic.nn.mamba.MambaMixer"
        raise BadInput(f"mambaquant: {what}")
    seen = {path: {name: _Moments() for name in ("stream", "out", "projected", "conv")} for path in mixers}
    handles = []
    for path, mixer in mixers.items():

        def reads(module: nn.Module, args: tuple, path: str = path, name: str = "out") -> None:
            seen[path][name].add(args[0], path)

        def gives(module: nn.Module, args: tuple, y: Tensor, path: str = path) -> None:
            seen[path]["projected"].add(y, path)

        def convolves(module: nn.Module, args: tuple, path: str = path) -> None:
            seen[path]["conv"].add(args[0].mT, path)

        def enters(module: nn.Module, args: tuple, path: str = path) -> None:
            seen[path]["stream"].add(args[0], path)

        handles += [
            mixer.in_proj.register_forward_pre_hook(enters), mixer.out_proj.register_forward_pre_hook(reads),
            mixer.x_proj.register_forward_hook(gives), mixer.conv1d.register_forward_pre_hook(convolves),
        ]  # fmt: skip
    try:
        for batch in batches:
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    short = next((path for path, found in seen.items() if found["stream"].count < 2), None)
    if short is not None:
        raise BadInput(f"{short}: saw {seen[short]['stream'].count} tokens: a covariance needs two or more")
    return MambaStatistics(
        {path: found["stream"].covariance for path, found in seen.items()},
        {path: found["projected"].covariance[: mixers[path].rank, : mixers[path].rank] for path, found in seen.items()},
        {path: found["out"].absmax for path, found in seen.items()},
        {path: found["projected"].absmax for path, found in seen.items()},
        {path: found["conv"].absmax for path, found in seen.items()},
    )


def smoothing(inputs: Tensor, weights: Tensor, alpha: float = 0.5) -> Tensor:
    """s (K,) float64 of largest magnitudes of what goes over a place and of what multiplies it; 1 where one is 0."""
    x, w = inputs.double(), weights.double()
    s = x.clamp(min=TINY) ** alpha / w.clamp(min=TINY) ** (1 - alpha)
    return torch.where((x > TINY) & (w > TINY), s, 1.0).clamp(min=LEAST)


class MambaQuant:
    """The pass: the residual stream of a Mamba model, and its mixers one by one.

    Args:
        statistics: of calibration data (`calibrate_mamba`); without them Hadamard matrices stand for K H, and nothing
            is smoothed.
        klt: whether K is used.
        smooth: whether scales are.
        online: whether R2 and R6 are.
        alpha: a, the share of the difficulty that moves on.

    Raises:
        BadInput: alpha outside 0 to 1.
    """

    id: ClassVar = "mambaquant"
    stage: ClassVar = "rewrite"
    scope: ClassVar = "model"
    needs: ClassVar = frozenset({"data", "float"})

    def __init__(
        self, statistics: MambaStatistics | None = None, *, klt: bool = True, smooth: bool = True, online: bool = True,
        alpha: float = 0.5,
    ):  # fmt: skip
        if not 0 <= alpha <= 1:
            raise BadInput(f"mambaquant: alpha={alpha} is not within 0 and 1")
        self.statistics = MambaStatistics() if statistics is None else statistics
        self.klt, self.smooth, self.online, self.alpha = klt, smooth, online, alpha

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """First norm of each stream that mixers read, and each mixer; path -> why it is left alone."""
        units: dict[str, dict[str, Any]] = {}
        skipped: dict[str, str] = {}
        mixers = mixers_in(model)
        for residual in structure.residuals:
            readers = [m for found in residual.norms.values() for m in found.modules]
            mine = [path for path in mixers if f"{path}.in_proj" in readers]
            reason = stream_refusal(structure, model, residual) if mine else "no Mamba mixer reads it"
            if reason:
                skipped |= dict.fromkeys(residual.norms, reason)
            else:
                units[next(iter(residual.norms))] = {"what": "stream", "mixer": mine[0], "norms": list(residual.norms)}
        for path in mixers:
            layers = [f"{path}.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
            reason = next((why for layer in layers if (why := input_refusal(structure, model, layer))), "")
            if reason:
                skipped[path] = reason
            else:
                units[path] = {"what": "mixer", "online": self.online}
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """New weights of a stream or a mixer."""
        said = decision.units[path]
        generator = torch.Generator().manual_seed(ctx.seed)
        if said["what"] == "stream":
            return self._stream(path, said["mixer"], ctx, generator)
        return self._mixer(path, ctx, generator)

    def _stream(self, path: str, mixer: str, ctx: Context, generator: torch.Generator) -> Record:
        residual = next(one for one in ctx.structure.residuals if path in one.norms)
        covariance = self.statistics.stream.get(mixer) if self.klt else None
        if covariance is None:
            q = rotation(residual.width, generator=generator)
        else:
            # What the first layer reads is the stream times a gain, which goes into that layer.
            norm = next(p for p, found in residual.norms.items() if f"{mixer}.in_proj" in found.modules)
            gain = getattr(ctx.model.get_submodule(norm), "weight", None)
            wide = covariance.double()
            if gain is not None:
                g = gain.detach().double() + residual.norms[norm].offset
                g = torch.where(g.abs() > TINY, g, 1.0)
                wide = wide / torch.outer(g, g)
            q = klt_rotation(wide, generator)
        return solve_stream(ctx.structure, ctx.model, residual, q, method=self.id)

    def _mixer(self, path: str, ctx: Context, generator: torch.Generator) -> Record:
        mixer: Any = ctx.model.get_submodule(path)
        inner, rank, n = mixer.inner, mixer.rank, mixer.state
        values = _Values(ctx.model)
        names = {name: f"{path}.{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")}
        seen = self.statistics
        into = {names["in_proj"]: 0} | ({f"{path}.in_proj.bias": 0} if mixer.in_proj.bias is not None else {})
        if self.smooth and path in seen.out:
            s = positive(smoothing(seen.out[path], _largest(values[names["out_proj"]], 0), self.alpha), inner, path)
            divide(values, {name: (axis, inner, 2 * inner) for name, axis in into.items()}, s)
            values.new[names["out_proj"]] = values[names["out_proj"]] * s
            values.new[f"{path}.gate_scale"] = mixer.gate_scale.double() * s
        if self.smooth and path in seen.conv:
            taps = values[names["conv1d"]]
            s = positive(smoothing(seen.conv[path], taps.abs().amax((1, 2)), self.alpha), inner, path)
            divide(values, {name: (axis, 0, inner) for name, axis in into.items()}, s)
            values.new[names["conv1d"]] = taps * s[:, None, None]
        if self.smooth and path in seen.projected:
            self._smooth_projected(path, seen.projected[path], rank, n, values, names)
        covariance = seen.step.get(path) if self.klt else None
        if covariance is not None and self.smooth and path in seen.projected:
            covariance = covariance / torch.outer(*[self._step_scale(path, rank, ctx.model)] * 2)
        q = rotation(rank, generator=generator) if covariance is None else klt_rotation(covariance, generator)
        projected = values[names["x_proj"]].clone()
        projected[:rank] = rotate_along(projected[:rank], 0, q)
        values.new[names["x_proj"]] = projected
        values.new[names["dt_proj"]] = rotate_along(values[names["dt_proj"]], 1, q)
        turned = {}
        if self.online:
            h = hadamard_matrix(hadamard_block(inner))
            for name in ("x_proj", "out_proj"):
                values.new[names[name]] = rotate_along(values[names[name]], 1, h)
                turned[f"{path}.{name}"] = {"size": len(h), "stride": 1}
        tensors = values.rounded(ctx.model)
        data = {"pass": self.id, "method": self.id, "norms": {}, "rotated_inputs": turned}
        data["shapes"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
        return Record(RENORM, path, data, tensors)

    def _step_scale(self, path: str, rank: int, model: nn.Module) -> Tensor:
        weight = model.get_submodule(path).dt_proj.weight.detach()  # type: ignore[union-attr]
        return smoothing(self.statistics.projected[path][:rank], _largest(weight.double(), 0), self.alpha)

    def _smooth_projected(
        self, path: str, seen: Tensor, rank: int, n: int, values: _Values, names: Mapping[str, str]
    ) -> None:
        """Steps and states: S5 and S4."""
        s5 = smoothing(seen[:rank], _largest(values[names["dt_proj"]], 0), self.alpha)
        s4 = smoothing(seen[rank : rank + n], seen[rank + n :], self.alpha)
        divide(values, {names["x_proj"]: (0, 0, rank)}, s5)
        divide(values, {names["x_proj"]: (0, rank, rank + n)}, s4)
        divide(values, {names["x_proj"]: (0, rank + n, rank + 2 * n)}, 1 / s4)
        values.new[names["dt_proj"]] = values[names["dt_proj"]] * s5

    def apply(self, model: nn.Module, record: Record) -> None:
        """Give the new weights, and let layers turn their inputs."""
        apply_records(model, [record])


def _largest(weight: Tensor, axis: int) -> Tensor:
    return weight.abs().amax(axis)


CARD = Card(
    id="mambaquant",
    title="MambaQuant: Quantizing the Mamba Family with Variance Aligned Rotation Methods",
    authors="Xu, Yue, Xu, Hu, Yu, Chen, Zhou, Yuan, Yang",
    year=2025,
    source="arXiv 2501.13484",
    family="quant",
    summary="Turns a Mamba model by rotations that give all channels one variance, and smooths its gates, exactly.",
    objects={"MambaQuant": "Pass"},
    traits={"MambaQuant": ("exact",)},
    use="Before weights and inputs of a Mamba model are rounded, at 8 bits and below.",
    avoid="Transformers (take rotate), and weights alone at 8 bits.",
    composes=("rtn", "gptq"),
    vectors=("mamba",),
    code="MambaQuant/MambaQuant, no licence (not used)",
    claim={
        "text": "With 4-bit weights and inputs, a Mamba language model with a few large channels loses less with "
        "variances evened by KLT and smoothing than with Hadamard rotations alone.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.02,
        "arms": ("hadamard", "mambaquant"),
        "seeds": 5,
        "minutes": 2,
        "task": "chars",
    },
)
