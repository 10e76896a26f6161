"""`fold_affine`: a norm that is affine at inference goes into the layers around it, and costs nothing any more.

For y = s x + t per channel, what the norm is at inference (`laconic.core.affine`), it goes

    into the layer before, x = W u + b:              W' = diag(s) W        b' = s b + t
    or into every reader, z = W y + b:               W' = W diag(s)        b' = b + W t

into the layer before where nothing else sees what lies between the two; else into the readers, if everything that sees
y is a linear layer (separate or fused queries, keys and values, `Conv1D` of transformers) or, for channels on axis 1, a
convolution without zeros around its input. The norm becomes `nn.Identity`. This covers batch norm, PRepBN, unified norm,
PowerNorm without layer scale, estimated batch norm, and any module with `as_affine`. With `partial=True` gain and shift
of LayerNorm, RMSNorm and PowerNorm with layer scale go into the readers too, and the bare norm stays.

W' and b' are computed in float64 and rounded once. With K inputs to an output and the unit roundoff u of W's type,

    |computed - exact| <= gamma (|W'| |x| + |b'|),   gamma = (K + 2) u / (1 - (K + 2) u)

per output, where exact is the norm and the layer in real arithmetic; records hold the gamma of each layer as `bound`,
and `laconic.core.affine.rounding_bound` evaluates the right side.

Source: folklore, as `fold_batchnorm`, which this generalizes; for RepBN "SLAB: Efficient Transformers with Simplified
Linear Attention and Progressive Re-parameterized Batch Normalization", Guo, Chen, Tang, Wang, 2024, arXiv 2405.11582.

Always use it before a model with such norms is deployed or quantized. A reader whose weight is tied (a head to the
embedding) is left alone, or untied first with `untie=True`, which costs its bytes. Not while a schedule still mixes
norms: that is refused, and the message says how many steps are left.

Example:
    >>> import torch
    >>> from laconic.norm import RepBN, fold
    >>> model = torch.nn.Sequential(RepBN(4), torch.nn.Linear(4, 2)).eval()
    >>> x = torch.randn(3, 4)
    >>> before = model(x)
    >>> fold(model, ((x,), {}))
    folded 0 into 1
    >>> model[0], torch.allclose(model(x), before, atol=1e-6)
    (Identity(), True)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.affine import Affine, after_layer, before_layer, split_affine
from laconic.core.card import Card
from laconic.core.passes import Context, Decision, run
from laconic.core.record import FOLD_AFFINE, Record, apply_fold_affine
from laconic.core.structure import Around, Example, Structure

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FoldAffine:
    """The pass.

    Args:
        partial: also fold gain and shift of norms that stay.
        untie: give a reader whose weight is tied a weight of its own, rather than to leave the norm alone.
    """

    partial: bool = False
    untie: bool = False

    id: ClassVar = "fold_affine"
    stage: ClassVar = "fold"
    scope: ClassVar = "module"
    needs: ClassVar = frozenset({"float"})

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Norm -> the layers that it goes into; norm -> why it cannot."""
        units: dict[str, dict[str, Any]] = {}
        skipped: dict[str, str] = {}
        for path, around in structure.around.items():
            try:
                units[path] = self._unit(model, path, around, structure)
            except ValueError as error:
                skipped[path] = str(error)
        return Decision(units, skipped)

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """W' and b' of the layers, for the norm at `path`.

        Raises:
            ValueError: the norm is not affine now, or its width is not that of a layer.
        """
        unit = decision.units[path]
        split = split_affine(ctx.model.get_submodule(path))
        if split is None:
            raise ValueError(f"{path} is not affine")
        layers, tensors = [], {}
        for number, said in enumerate(unit["layers"]):
            layer = ctx.model.get_submodule(said["path"])
            weight, bias = _folded(split[1], layer, said, unit["where"])
            tensors[f"{number}.weight"], tensors[f"{number}.bias"] = weight, bias
            layers.append({**said, "bound": _gamma(weight, said)})
        return Record(FOLD_AFFINE, path, {**unit, "layers": layers}, tensors)

    def apply(self, model: nn.Module, record: Record) -> None:
        """Give the layers their values and take the norm away."""
        apply_fold_affine(model, record)

    def _unit(self, model: nn.Module, path: str, around: Around, structure: Structure) -> dict[str, Any]:
        """What would be done to a norm.

        Raises:
            ValueError: why it cannot be.
        """
        norm = model.get_submodule(path)
        _check_plain(path, norm)
        split = split_affine(norm)
        if split is None:
            raise ValueError(f"a {type(norm).__name__} stays a function of its input, and has no gain to fold")
        rest, affine = split
        whole = isinstance(rest, nn.Identity)
        if not whole and not self.partial:
            raise ValueError(
                f"a {type(norm).__name__} stays a function of its input; partial=True folds its gain and shift"
            )
        if whole and not around.not_before:
            layer = model.get_submodule(around.before)
            try:
                said = _layer(around.before, layer, affine, "before", False, False)
                return {"where": "before", "becomes": "identity", "layers": [said]}
            except ValueError:
                if around.not_after:  # else the readers may do it
                    raise
        if around.not_after:
            reason = f"{around.not_before}; and {around.not_after}" if whole else around.not_after
            raise ValueError(reason)
        layers = []
        for reader in around.readers:
            own = reader.shared == "tied"
            if reader.shared == "twice" or own and not self.untie:
                hint = "" if reader.shared == "twice" else ": untie=True gives the reader its own"
                raise ValueError(
                    f"{reader.weight}, which {reader.module} reads it with, is read in other places too{hint}"
                )
            layer = model.get_submodule(reader.module)
            if own and f"{reader.module}.weight" not in structure.parameters[reader.weight].names:
                raise ValueError(f"{reader.weight}, which {reader.module} reads it with, is not its own")
            layers.append(_layer(reader.module, layer, affine, "after", reader.transposed, own))
        return {"where": "after", "becomes": "identity" if whole else "bare", "layers": layers}


@dataclass(frozen=True, repr=False)
class Folded:
    """What `fold` did.

    Attributes:
        folded: path of a norm -> paths of the layers that it went into.
        left: path of a norm -> why it was left alone.
        records: of the pass.
    """

    folded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def __repr__(self) -> str:
        """A report for people."""
        lines = [f"folded {norm} into {', '.join(layers)}" for norm, layers in self.folded.items()]
        lines += [f"left {norm}: {reason}" for norm, reason in self.left.items()]
        return "\n".join(lines or ["there was no norm to fold"])


def fold(model: nn.Module, example: Example, *, partial: bool = False, untie: bool = False) -> Folded:
    """Fold every norm of a model that can be, in place.

    Args:
        model: in evaluation mode.
        example: (args, kwargs) of one forward call.
        partial, untie: see `FoldAffine`.

    Returns:
        What was folded, and what was not and why.

    Raises:
        ValueError: a norm will be affine, but is not yet (training mode, a schedule that still runs); by path. Nothing
            is changed then.
    """
    structure = Structure.build(model, example)
    for path in structure.around:
        try:
            split_affine(model.get_submodule(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    records, left = run(FoldAffine(partial, untie), Context(model, structure))
    folded = {record.path: tuple(layer["path"] for layer in record.data["layers"]) for record in records}
    return Folded(folded, left, records)


def _layer(path: str, layer: nn.Module, affine: Affine, where: str, turned: bool, own: bool) -> dict[str, Any]:
    """How a layer is to take a norm in.

    Raises:
        ValueError: why it cannot, by its path.
    """
    _check_plain(path, layer)
    conv, transposed = isinstance(layer, CONVS), isinstance(layer, TRANSPOSED)
    weight = getattr(layer, "weight", None)
    like_linear = isinstance(weight, Tensor) and weight.ndim == 2 and isinstance(getattr(layer, "bias", None), Tensor)
    if not (isinstance(layer, nn.Linear) or conv or transposed or (like_linear and where == "after")):
        raise ValueError(f"{path} is a {type(layer).__name__}, not a linear layer or a convolution")
    groups = layer.groups if conv or transposed else 1
    if where == "before":
        channels = outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    else:
        channels, outputs = (
            (weight.shape[0], weight.shape[1]) if turned else (weight.shape[1] * groups, weight.shape[0])
        )
        if conv and _pads(layer):  # zeros: any other padding is a step of its own, before the convolution
            raise ValueError(f"{path} pads its input with zeros, which the norm does not shift")
    if affine.scale.numel() != channels:
        raise ValueError(f"{affine.scale.numel()} channels do not match the {channels} of {path}")
    return {"path": path, "outputs": int(outputs), "own": own, "turned": turned}


def _pads(conv: Any) -> bool:
    return (
        any(conv.padding) if isinstance(conv.padding, tuple) else conv.padding == "same" and max(conv.kernel_size) > 1
    )


def _folded(affine: Affine, layer: Any, said: dict[str, Any], where: str) -> tuple[Tensor, Tensor]:
    weight, dtype = layer.weight, layer.weight.dtype
    groups = getattr(layer, "groups", 1)
    affine = Affine(*(part.to(weight.device) for part in affine))
    if where == "before":
        made = after_layer(affine, weight, layer.bias, groups, transposed=isinstance(layer, TRANSPOSED))
    elif said["turned"]:
        turned, bias = before_layer(affine, weight.mT, layer.bias)
        made = turned.mT, bias
    else:
        made = before_layer(affine, weight, layer.bias, groups)
    return made[0].to(dtype).contiguous(), made[1].to(dtype)


def _gamma(weight: Tensor, said: dict[str, Any]) -> float:
    """gamma of the docstring for a layer."""
    terms = (weight.numel() / max(said["outputs"], 1) + 2) * torch.finfo(weight.dtype).eps / 2
    return terms / (1 - terms)


def _check_plain(path: str, module: nn.Module) -> None:
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        raise ValueError(f"a parametrization computes weights of {path}: remove it first (torch.nn.utils.parametrize)")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"forward hooks look at {path}: remove them first")


CARD = Card(
    id="fold_affine",
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
    "Normalization",
    authors="Guo, Chen, Tang, Wang",
    year=2024,
    source="arXiv 2405.11582, section 3.1; the folding itself is folklore",
    family="norm",
    summary="Folds every norm that is affine at inference into the layers around it: batch norm, PRepBN, unified norm, "
    "PowerNorm, estimated batch norm.",
    objects={"FoldAffine": "Pass"},
    traits={"FoldAffine": ("exact",)},
    use="Always, before a model with such norms is deployed or its weights are quantized.",
    avoid="Models that go on training, and norms whose schedule is still running.",
    composes=("prepbn", "unified_norm", "powernorm", "fold_batchnorm", "rtn"),
)
