"""Training with quantized weights and inputs, and packing at the end what was trained for.

    prepared = prepare(model, "v1/int4/channel/float32/minmax/znone/nearest", learned=True)
    ...                                               # train the model as ever
    records = convert(model)                          # its layers are packed ones now, and compute the same

`prepare` registers a parametrization on the weight of every layer that `laconic.nn` can run packed; modules, paths and
optimizers stay as they are. A parametrization that `convert` can pack is a `PackableWeight`: it gives the weight that the
packed layer will have, and the codes for it.

    FakeWeight      W^ = dequantize(quantize(W)) under any scheme, scales from W at each step or learned (LSQ)
    FakeInput       x^ of a layer's input under a learned scale (LSQ), from a pre-hook of the layer

Inputs by `INT8_TOKENS` are rounded row by row as the packed layers do it themselves. Those of a `FakeInput` are rounded by
its hook before the packed layer, too: the numbers are right, and no time is saved.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput
from laconic.kernels.inputs import INT8_TOKENS, round_inputs
from laconic.nn import PackedParameterSpec, is_packed, matrix_view, pack_tensors, restore_view
from laconic.nn.packed import View, _is_conv1d, op_of
from laconic.numerics import Int, NotFinite, Scheme, affine_params, check_finite, dequantize, grouped, quantize

from ._trace import Names
from .fake_quant import code_range, lsq, lsq_grad_scale, lsq_init, pass_through
from .record import PACK, Record, apply_records

__all__ = ["FakeInput", "FakeWeight", "PackableWeight", "Prepared", "attach_input_quantizer", "convert", "prepare", "quantized_layers"]

OPS = ("linear", "conv")
Codes = tuple[Tensor, Tensor, Tensor | None]


# --- weights ----------------------------------------------------------------------------------------


class PackableWeight(nn.Module):
    """A parametrization whose weight can be stored exactly under a scheme.

    Args:
        scheme: how it is stored.
        view: how the weight becomes a matrix (rows, k).
    """

    def __init__(self, scheme: Scheme | str, view: View = "rows"):
        super().__init__()
        self.scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        self.view = view

    @abstractmethod
    def codes(self, weight: Tensor) -> Codes:
        """Codes (rows, k), scale and zero point of the matrix view of what `forward` makes of a weight."""

    def extra_repr(self) -> str:
        return str(self.scheme)


class FakeWeight(PackableWeight):
    """W^ as it would be stored, with a straight-through gradient.

    Weights that lie more than half a step outside of all codes get no gradient (rules "percentile" and "mse").

    Args:
        weight: W, as it is; the first scales are made for it.
        scheme: how to store it.
        view: how it becomes a matrix.
        learned: train the scales by LSQ; integers without a zero point alone.

    Raises:
        ValueError: the scheme's scales cannot be learned.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, scheme: Scheme | str, view: View = "rows", *, learned: bool = False):
        super().__init__(scheme, view)
        self.learned = learned
        if not learned:
            return
        if not isinstance(self.scheme.element, Int) or self.scheme.zero != "none":
            raise ValueError(f"LSQ learns the scales of integers without a zero point, and not those of {self.scheme}")
        self._range = code_range(self.scheme.element.bits)
        with torch.no_grad():
            first = lsq_init(grouped(matrix_view(weight, view), self.scheme), self._range[1], (-1,)).squeeze(-1)
        self.scale = nn.Parameter(first.to(device=weight.device, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        spec = PackedParameterSpec(self.scheme, tuple(weight.shape), self.view)
        matrix = matrix_view(weight, self.view)
        made = self._learned(matrix) if self.learned else self._rounded(matrix)
        return restore_view(made, spec)

    def codes(self, weight: Tensor) -> Codes:
        matrix = matrix_view(weight.detach(), self.view)
        if self.learned:
            scale, zero = self._scale().detach().to(self.scheme.scale.torch_dtype), None
        else:
            scale, zero = affine_params(matrix, self.scheme)
        return quantize(matrix.float(), scale, zero, self.scheme), scale, zero

    def _scale(self) -> Tensor:
        """The learned scales, positive, as they will be stored."""
        dtype = self.scheme.scale.torch_dtype
        positive = self.scale.float().abs().clamp(min=float(torch.finfo(dtype).smallest_normal))
        return pass_through(positive, positive.detach().to(dtype).float())

    def _learned(self, matrix: Tensor) -> Tensor:
        rows, k = matrix.shape
        scale = self._scale()
        shared = max(1, matrix.numel() // scale.numel())
        if self.scheme.scale.granularity == "group":
            scale = scale.repeat_interleave(self.scheme.scale.group_of(k), dim=1)[:, :k]
        return lsq(matrix, scale, *self._range, lsq_grad_scale(shared, self._range[1]))

    def _rounded(self, matrix: Tensor) -> Tensor:
        with torch.no_grad():
            plain = matrix.detach().float()
            scale, zero = affine_params(plain, self.scheme)
            value = dequantize(quantize(plain, scale, zero, self.scheme), scale, zero, self.scheme)
        made = pass_through(matrix, value.to(matrix.dtype))
        if self.scheme.scale.rule in ("minmax", "absmean") or not isinstance(self.scheme.element, Int):
            return made  # nothing lies outside
        wide = scale.float()
        if self.scheme.scale.granularity == "group":
            wide = wide.repeat_interleave(self.scheme.scale.group_of(matrix.shape[1]), dim=1)[:, : matrix.shape[1]]
        inside = (plain - value).abs() <= wide * (0.5 + 1e-4)
        return torch.where(inside, made, value.to(matrix.dtype))


# --- inputs -----------------------------------------------------------------------------------------


class FakeInput(nn.Module):
    """x^ of an activation, under one scale that is learned by LSQ and starts from the first batch in training mode.

    Args:
        bits: of a code.
        signed: whether codes have a sign; without one, numbers below 0 become 0 (after a ReLU there are none).
        learned: False keeps the first scale.
        power_of_two: round the scale to a power of two.

    Raises:
        ValueError: too few bits.
        BadInput: in the call, evaluation before any batch was seen in training mode.
    """

    scale: Tensor

    def __init__(self, bits: int = 8, signed: bool = True, *, learned: bool = True, power_of_two: bool = False):
        super().__init__()
        self.qmin, self.qmax = code_range(bits, signed=signed)
        self.bits, self.signed, self.power_of_two = bits, signed, power_of_two
        self.scale = nn.Parameter(torch.ones(()), requires_grad=learned)
        self._ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready:
            self._start(x)
        return lsq(x, self.step().to(x.dtype), self.qmin, self.qmax)

    def step(self) -> Tensor:
        """The scale that is used: positive, and a power of two if it shall be."""
        positive = self.scale.abs().clamp(min=float(torch.finfo(torch.float32).tiny))
        return pass_through(positive, positive.detach().log2().round().exp2()) if self.power_of_two else positive

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        if not self.training:
            raise BadInput("the scale of a layer's inputs is not known yet: call the model once in training mode")
        self.scale.copy_(lsq_init(x, self.qmax))
        self._ready = True

    def get_extra_state(self) -> Tensor:
        """Whether the scale is known yet, for the state dict."""
        return torch.tensor(self._ready)

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` gave."""
        self._ready = bool(state)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class _ByToken(nn.Module):
    """Rows rounded to 8 bits as packed layers do it, with a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return pass_through(x, round_inputs(x.detach(), INT8_TOKENS))


INPUTS = "input_quantizer"  # the submodule's name


def attach_input_quantizer(layer: nn.Module, quantizer: nn.Module) -> None:
    """Let a layer's inputs pass a module first, in place; a second one takes the place of the first."""
    fresh = not hasattr(layer, INPUTS)
    setattr(layer, INPUTS, quantizer)
    if fresh:
        layer.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: Any, arguments: tuple) -> tuple:
    """The pre-hook of such a layer."""
    return (getattr(module, INPUTS)(arguments[0]), *arguments[1:])


# --- preparing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did.

    Attributes:
        layers: paths of the layers whose weights are quantized now.
        left: path of a layer that was left alone -> why.
    """

    layers: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def prepare(
    model: nn.Module,
    weights: Scheme | str | Callable[[str, nn.Module], PackableWeight],
    *,
    inputs: str | Callable[[str, nn.Module], nn.Module | None] = "",
    select: Callable[[str, nn.Module], bool] | None = None,
    learned: bool = False,
) -> Prepared:
    """Let the linear layers and convolutions of a model compute with quantized weights, and inputs, in place.

    Args:
        model: to be trained.
        weights: the scheme of all weights, or what makes the parametrization of the weight of the layer at a path.
        inputs: "" leaves them, `INT8_TOKENS` rounds each row to 8 bits; or what makes the quantizer of a layer's input,
            as a `FakeInput`, or None to leave it.
        select: whether to take the layer at a path; all by default.
        learned: learn the scales of weights; see `FakeWeight`.

    Raises:
        BadInput: no layer is left to prepare, or one has weights that cannot be stored like this.
    """
    done, planned = Prepared(), []
    tied = {name: group for group in Names.of(model).groups().values() if len(group) > 1 for name in group}
    for path, module in model.named_modules():
        if not _is_layer(module) or (select is not None and not select(path, module)):
            continue
        reason = _refusal(model, path, module, tied, bool(inputs))
        if reason:
            done.left[path] = reason
            continue
        try:
            planned.append((path, module, _weight_of(path, module, weights, learned), _input_of(path, module, inputs)))
        except NotFinite as error:
            raise BadInput(str(error)) from error
        except ValueError as error:
            raise BadInput(f"{path or 'the model'}: {error}") from error
    if not planned:
        why = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in done.left.items())
        raise BadInput(f"{type(model).__name__} has no layer to quantize{f': {why}' if why else ''}")
    for path, module, weight, quantizer in planned:
        parametrize.register_parametrization(module, "weight", weight)
        if quantizer is not None:
            attach_input_quantizer(module, quantizer.train(module.training))
        done.layers.append(path)
    return done


def quantized_layers(model: nn.Module) -> dict[str, tuple[nn.Module, PackableWeight]]:
    """Path -> layer and parametrization, of all layers that `convert` would pack."""
    found = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            last = module.parametrizations["weight"][-1]  # type: ignore[index]
            if isinstance(last, PackableWeight):
                found[path] = (module, last)
    return found


def convert(model: nn.Module, *, method: str = "qat") -> list[Record]:
    """Pack every weight that was trained for it, in place; inputs by row are rounded by the packed layers from then on.

    Args:
        model: one that `prepare` changed.
        method: id of the method, for the records.

    Returns:
        What was done, as `laconic.core.record.apply_records` does it to an unprepared copy of the model again.

    Raises:
        BadInput: there is nothing to pack, or a weight became nan or infinite.
    """
    layers = quantized_layers(model)
    if not layers:
        raise BadInput(
            f"{type(model).__name__} has no weight that was trained to be packed: see laconic.core.qat.prepare"
        )
    solved: dict[str, tuple[Any, PackableWeight, Codes]] = {}
    for path, (module, last) in layers.items():
        name = f"{path}.weight" if path else "weight"
        with torch.no_grad():
            before = _before_last(module)
            try:
                check_finite(before, name)
            except NotFinite as error:
                raise BadInput(str(error)) from error
            solved[name] = (module, last, last.codes(before))
    records = []
    for name, (module, last, (codes, scale, zero)) in solved.items():
        by_token = isinstance(getattr(module, INPUTS, None), _ByToken)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        spec = PackedParameterSpec(last.scheme, tuple(module.weight.shape), last.view, INT8_TOKENS if by_token else "")
        if by_token:
            _drop_input(module)
        data = {"spec": spec.to_json(), "aliases": [], "op": op_of(module, "weight"), "pass": method, "method": method}
        records.append(Record(PACK, name, data, pack_tensors(spec, codes, scale, zero)))
    apply_records(model, records)
    return records


def _before_last(module: Any) -> Tensor:
    """The weight as it enters the last of its parametrizations."""
    chain = module.parametrizations["weight"]
    if not chain.is_tensor:
        raise BadInput(f"{type(module).__name__}: its weight is made from several tensors, and cannot be packed")
    value = chain.original
    for one in list(chain)[:-1]:
        value = one(value)
    return value.detach()


def _drop_input(module: nn.Module) -> None:
    delattr(module, INPUTS)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _quantize_input:
            del module._forward_pre_hooks[key]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or _is_conv1d(module)


def _refusal(model: nn.Module, path: str, module: Any, tied: dict[str, tuple[str, ...]], inputs: bool) -> str:
    """Why a layer is left alone, "" if it is not."""
    if is_packed(module):
        return "its weight is packed already"
    if quantized_layers(module).get("") is not None:
        return "its weight is quantized already"
    if (
        type(module.weight).__module__.partition(".")[0] not in ("torch", "laconic")
        or not module.weight.is_floating_point()
    ):
        return f"its weight is a {type(module.weight).__name__} of {module.weight.dtype}, quantized by another tool"
    if op_of(module, "weight") not in OPS:
        return f"there is no packed {type(module).__name__}"
    group = tied.get(f"{path}.weight" if path else "weight")
    if group:
        return f"its weight is tied: {' = '.join(group)}"
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    if inputs and isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight directly, and its input is never seen"
    return ""


def _weight_of(path: str, module: Any, weights: Any, learned: bool) -> PackableWeight:
    name = f"{path}.weight" if path else "weight"
    check_finite(module.weight, name)
    if module.weight.numel() == 0:
        raise ValueError("its weight has no elements")
    if callable(weights):
        return weights(path, module)
    return FakeWeight(module.weight, weights, "transposed" if _is_conv1d(module) else "rows", learned=learned)


def _input_of(path: str, module: nn.Module, inputs: Any) -> nn.Module | None:
    if callable(inputs):
        return inputs(path, module)
    if not inputs:
        return None
    if inputs != INT8_TOKENS:
        raise ValueError(f"inputs={inputs!r}: '' (as they are), {INT8_TOKENS!r}, or what makes a quantizer")
    if op_of(module, "weight") != "linear":
        raise ValueError(f"a {type(module).__name__} has no rows of inputs: take linear layers alone, by `select`")
    return _ByToken()
