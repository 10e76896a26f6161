"""Packed parameters, and the modules that compute with them.

`declare(module, "weight", spec)` turns a module into its packed form *in place*: the instance gets a subclass of its own
class, so paths, hooks, ties and `isinstance` stay as they were. In that subclass

- the parameter's name becomes a read-only property that dequantizes on access, so code that reads `module.weight` keeps
  working (bytes are saved, time is not);
- where the class is a known one (`nn.Linear`, GPT-2's `Conv1D`, `nn.Conv1d/2d`, `nn.Embedding`, fused 3-D experts), the
  forward of that base calls the packed op. The op sits *below* the module's own class in the method resolution order:
  a subclass that scales or offsets and then calls `super().forward` (Gemma's scaled embedding, OPT's offset positions)
  keeps doing so.

What is stored, for a parameter NAME: integers (`NAME_packed`, `NAME_shape`, `NAME_zero_point`, where columns are sorted
`NAME_order`, and scales in bytes or codes) as parameters without gradient; numbers (`NAME_scale`, `NAME_zero`,
`NAME_codebook` and the like) as buffers, so that `model.dtype` still tells the type that the model computes in.
`module.to(bfloat16)`, `.half()` and `.double()` move them between devices and never change their type. Scales that are
stored in bytes or codes are decoded at each use: the ops see numbers.

A tied parameter is packed once, by its owner; every other module that has it gets an alias (`declare_alias`) that reads
the owner's tensors, so ties hold on disk, in memory and after every `.to(...)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.kernels import binary as _binary  # noqa: F401 - registers torch.ops.laconic, as the next two do
from laconic.kernels import conv as _conv  # noqa: F401
from laconic.kernels.inputs import check_inputs
from laconic.numerics import Scheme, pack_codes, read_scales, store_scales

View = Literal["rows", "last", "transposed"]


@dataclass(frozen=True)
class PackedParameterSpec:
    """How one parameter of a module is stored.

    Attributes:
        scheme: of its matrix view.
        shape: of the float parameter.
        view: how it becomes a matrix (rows, k): `rows` flattens all but dim 0 (linear, conv, embedding), `last`
            flattens all but the last dim (experts, anything else), `transposed` swaps two dims (GPT-2's Conv1D).
        inputs: how the inputs of a linear layer are rounded when it runs: "" (not at all) or a word of
            `laconic.kernels.inputs`.
        order: whether `NAME_order` is stored: column j of the matrix belongs to input order[j] of a linear layer. So are
            stored the weights of tools that put inputs of one importance into one group (GPTQ's act-order).
    """

    scheme: Scheme
    shape: tuple[int, ...]
    view: View = "rows"
    inputs: str = ""
    order: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, k) of the matrix view."""
        return matrix_shape(self.shape, self.view)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape of everything that is stored."""
        order = {"order": (torch.int32, (self.matrix[1],))} if self.order else {}
        return {**self.scheme.tensors(*self.matrix), **order, "shape": (torch.int64, (len(self.shape),))}

    @property
    def word(self) -> str:
        """The scheme of the operands, as the ops take it."""
        return str(self.scheme.plain)

    def to_json(self) -> dict[str, Any]:
        """As records hold it."""
        stored: dict[str, Any] = {"scheme": str(self.scheme), "shape": list(self.shape), "view": self.view}
        return stored | ({"inputs": self.inputs} if self.inputs else {}) | ({"order": True} if self.order else {})

    @staticmethod
    def from_json(data: dict[str, Any]) -> PackedParameterSpec:
        """What `to_json` gave.

        Raises:
            ValueError: the view or the rounding of inputs is not known, or the shape has no such view.
        """
        view = data["view"]
        if view not in ("rows", "last", "transposed"):
            raise ValueError(f"view {view!r} is not known")
        shape = tuple(int(n) for n in data["shape"])
        if not shape or min(shape) < 0 or (view == "transposed" and len(shape) != 2):
            raise ValueError(f"shape {shape} has no {view} view as a matrix")
        inputs, scheme = check_inputs(str(data.get("inputs", ""))), Scheme.parse(data["scheme"])
        if refusal := scheme.refusal(matrix_shape(shape, view)[1]):
            raise ValueError(refusal)
        return PackedParameterSpec(scheme, shape, view, inputs, bool(data.get("order", False)))


def matrix_shape(shape: tuple[int, ...], view: View) -> tuple[int, int]:
    """(rows, k) of a parameter's matrix view."""
    total = 1
    for n in shape:
        total *= n
    if view == "transposed":
        return shape[1], shape[0]
    if view == "last":
        return (total // shape[-1] if shape[-1] else 0), shape[-1]
    return shape[0], (total // shape[0] if shape[0] else 0)


def matrix_view(x: Tensor, view: View) -> Tensor:
    """The (rows, k) matrix of a parameter."""
    if view == "transposed":
        return x.t()
    return x.reshape(matrix_shape(tuple(x.shape), view))


def restore_view(matrix: Tensor, spec: PackedParameterSpec) -> Tensor:
    """The parameter of a (rows, k) matrix: the inverse of `matrix_view`."""
    return matrix.t() if spec.view == "transposed" else matrix.reshape(spec.shape)


def pack_tensors(spec: PackedParameterSpec, codes: Tensor, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
    """What is stored, by suffix, of unpacked codes (rows, k), scales and zero points (rows, G), or a codebook's table.

    All of them are as `affine_params` and `quantize` give them; scales are those of the whole matrix.
    """
    element = spec.scheme.element
    stored = {"packed": pack_codes(codes, element), **store_scales(scale, spec.scheme)}
    if spec.scheme.zero == "int":
        assert zero is not None
        stored["zero_point"] = pack_codes(zero.t().contiguous(), element).t().contiguous()
    elif spec.scheme.zero == "real":
        assert zero is not None
        stored["zero"] = zero.contiguous()
    elif spec.scheme.beside is not None:
        assert zero is not None
        stored[spec.scheme.beside] = zero.contiguous()
    stored["shape"] = torch.tensor(spec.shape, dtype=torch.int64)
    return stored


def storage_names(path: str, spec: PackedParameterSpec) -> dict[str, str]:
    """Suffix -> full name in the file, for the parameter at `path` (`encoder.fc.weight` -> `encoder.fc.weight_packed`)."""
    return {suffix: f"{path}_{suffix}" for suffix in spec.tensors()}


# --- the packed classes ---------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Common part of every packed module; comes first in the method resolution order."""

    _packed: dict[str, PackedParameterSpec]
    _packed_owner: dict[str, tuple[nn.Module, str]]
    _packed_dtype: torch.dtype
    _laconic_original: type

    def packed_tensor(self, name: str, suffix: str) -> Tensor | None:
        """A stored tensor of the packed parameter `name`, wherever it lives."""
        owner = self._packed_owner.get(name, (self,))[0]
        own_name = self._packed_owner[name][1] if name in self._packed_owner else name
        return getattr(owner, f"{own_name}_{suffix}", None)

    def packed_operands(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """codes, scale, zero of the packed parameter `name`, as the ops take them under `PackedParameterSpec.word`."""
        scheme, matrix = self._packed[name].scheme, self._packed[name].matrix
        codes, scale = self.packed_tensor(name, "packed"), self.packed_tensor(name, "scale")
        if not scheme.scale.plain:
            found = {suffix: self.packed_tensor(name, suffix) for suffix in scheme.scale.tensors(*scheme.scales(*matrix))}
            stored = {suffix: tensor for suffix, tensor in found.items() if tensor is not None}
            scale = read_scales(stored, scheme, scheme.scales(*matrix))
        assert codes is not None and scale is not None
        return codes, scale, None if scheme.beside is None else self.packed_tensor(name, scheme.beside)

    def _apply(self, fn, recurse=True):  # noqa: ANN001 - torch's own signature
        """Everything moves; scales and zero points keep their type, whatever the model is cast to."""
        kept = {id(self._buffers[n]) for n in self._scale_names() if n in self._buffers}

        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        super()._apply(guarded, recurse)
        # An empty tensor of the compute type tells what `fn` does to types.
        device = next((b.device for b in self._buffers.values() if b is not None), "cpu")
        object.__setattr__(self, "_packed_dtype", fn(torch.empty(0, dtype=self._packed_dtype, device=device)).dtype)
        return self

    def _scale_names(self) -> list[str]:
        return [f"{name}_{suffix}" for name, spec in self._packed.items() for suffix in spec.tensors()]

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}: {spec.scheme}" for name, spec in self._packed.items())
        own = super().extra_repr()
        return f"{own}, {shown}" if own else shown


def _value(self: Packed, name: str) -> Tensor:
    """The float parameter, dequantized now."""
    spec = self._packed[name]
    codes, scale, zero = self.packed_operands(name)
    k = spec.matrix[1]
    matrix = torch.ops.laconic.dequantize(codes, scale, zero, scheme=spec.word, k=k, dtype=self._packed_dtype)
    if spec.order:
        matrix = matrix.index_select(1, self.packed_tensor(name, "order").argsort())  # type: ignore[union-attr]
    return restore_view(matrix, spec)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    """y = x W^T + b, W (out, in) as packed: of nn.Linear, and of transformers' Conv1D, which stores W (in, out)."""
    spec = self._packed["weight"]
    if input.shape[-1] != spec.matrix[1]:  # the words of a row fit several widths, so the op itself cannot tell
        raise RuntimeError(f"{self} takes {spec.matrix[1]} features and got an input of shape {tuple(input.shape)}")
    if spec.order:
        input = input.index_select(-1, self.packed_tensor("weight", "order"))
    codes, scale, zero = self.packed_operands("weight")
    return torch.ops.laconic.linear(
        input, codes, scale, zero, self.bias, None, scheme=spec.word, inputs=spec.inputs
    )


class _LinearForward(nn.Linear):
    forward = _linear_forward


class _EmbeddingForward(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        spec = self._packed["weight"]
        codes, scale, zero = self.packed_operands("weight")
        return torch.ops.laconic.embedding(
            input, codes, scale, zero, scheme=spec.word, dim=spec.shape[1], dtype=self._packed_dtype
        )


def _conv_forward(self: Any, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """torch's `_conv_forward` with the packed op; `weight` is what the caller read and is not looked at."""
    spec = self._packed["weight"]
    codes, scale, zero = self.packed_operands("weight")
    padding = self.padding
    if self.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(self.kernel_size)
    return torch.ops.laconic.conv(
        input, codes, scale, zero, bias, None, scheme=spec.word, kernel=self.kernel_size, stride=self.stride,
        padding=padding, dilation=self.dilation, groups=self.groups,
    )  # fmt: skip


class _Conv1dForward(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return _conv_forward(self, input, None, self.bias)


class _Conv2dForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return _conv_forward(self, input, None, self.bias)


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Fused experts: y_t = sum_j w_tj down_e(gate(up_e(x_t))), e = top_k_index_tj, rows sorted by nothing, no capacity."""
    tokens, top = top_k_index.shape
    index = top_k_index.reshape(-1)
    x = hidden_states.repeat_interleave(top, dim=0)
    up = "gate_up_proj" if self.has_gate else "up_proj"
    h = _expert_linear(self, up, x, index)
    h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    y = _expert_linear(self, "down_proj", h, index)
    y = y * top_k_weights.reshape(-1, 1)
    return y.view(tokens, top, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _expert_linear(self: Any, name: str, x: Tensor, index: Tensor) -> Tensor:
    bias = getattr(self, f"{name}_bias", None) if self.has_bias else None
    if name in self._packed:
        spec = self._packed[name]
        codes, scale, zero = self.packed_operands(name)
        return torch.ops.laconic.experts(x, index, codes, scale, zero, bias, out=spec.shape[1], scheme=spec.word)
    weight = getattr(self, name)
    y = x.new_zeros((x.shape[0], weight.shape[1]))
    for e in torch.unique(index).tolist():
        at = (index == e).nonzero().squeeze(1)
        y[at] = F.linear(x[at], weight[e], bias[e] if bias is not None else None)
    return y


def op_of(module: nn.Module, name: str) -> str:
    """Which packed op a module's forward would run for this parameter: "linear", "conv", "embedding", "experts" or
    "parameter" (dequantized on access)."""
    if name == "weight" and not _owns_forward(module):
        for base, op in (
            (nn.Linear, "linear"), (nn.Embedding, "embedding"), (nn.Conv1d, "conv"), (nn.Conv2d, "conv"),
        ):  # fmt: skip
            if isinstance(module, base):
                return op
    if name == "weight" and _is_conv1d(module):
        return "linear"
    return "experts" if _is_experts(module) and name in ("gate_up_proj", "up_proj", "down_proj") else "parameter"


def _owns_forward(module: nn.Module) -> bool:
    """Transposed convolutions and embeddings that change their weight in place have no packed op."""
    return isinstance(module, nn.Embedding) and module.max_norm is not None


def _is_conv1d(module: nn.Module) -> bool:
    cls = getattr(type(module), "_laconic_original", type(module))
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def _is_experts(module: nn.Module) -> bool:
    """transformers' fused experts: 3-D weights (E, out, in) and the flags that its decorator sets."""
    flags = ("has_gate", "has_bias", "is_transposed", "num_experts", "act_fn")
    return (
        all(hasattr(module, flag) for flag in flags)
        and not module.is_transposed
        and not getattr(module, "has_post_expert_norm", False)
        and (not module.has_gate or hasattr(module, "_apply_gate"))
    )


_CLASSES: dict[tuple[type, frozenset[str]], type] = {}
_BASES: tuple[tuple[type, type], ...] = (
    (nn.Linear, _LinearForward),
    (nn.Embedding, _EmbeddingForward),
    (nn.Conv1d, _Conv1dForward),
    (nn.Conv2d, _Conv2dForward),
)


def _packed_class(module: nn.Module, names: frozenset[str]) -> type:
    """The packed subclass of a module's class: one per class and set of packed names."""
    cls = getattr(type(module), "_laconic_original", type(module))
    if (cls, names) in _CLASSES:
        return _CLASSES[cls, names]
    body: dict[str, Any] = {name: property(lambda self, name=name: _value(self, name)) for name in names}
    bases: tuple[type, ...] = (Packed, cls)
    if "weight" in names and op_of(module, "weight") != "parameter":
        for base, below in _BASES:
            if isinstance(module, base):
                # When the class is the base itself, the forward must come before it; a subclass must come first.
                bases = (Packed, below) if cls is base else (Packed, cls, below)
                break
        if _is_conv1d(module):
            body["forward"] = _linear_forward
    if _is_experts(module) and any(op_of(module, name) == "experts" for name in names):
        body["forward"] = _experts_forward
    if isinstance(module, nn.RNNBase):
        body["_flat_weights"] = property(
            lambda self: [getattr(self, n) for n in self._flat_weights_names], lambda self, value: None
        )
    body["_laconic_original"] = cls
    _CLASSES[cls, names] = type(f"Packed{cls.__name__}", bases, body)
    return _CLASSES[cls, names]


def is_packed(module: nn.Module) -> bool:
    """Whether a module holds packed parameters."""
    return isinstance(module, Packed)


def packed_specs(model: nn.Module) -> dict[str, PackedParameterSpec]:
    """Path -> spec of every packed parameter that is stored (aliases are not)."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Packed):
            for name, spec in module._packed.items():
                if name not in module._packed_owner:
                    found[f"{path}.{name}" if path else name] = spec
    return found


def _retype(module: nn.Module, name: str, spec: PackedParameterSpec) -> None:
    parameter = module._parameters.pop(name)
    dtype = parameter.dtype if parameter is not None else torch.get_default_dtype()
    before = dict(module._packed) if isinstance(module, Packed) else {}
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)
    specs = {**before, name: spec}
    if not isinstance(module, Packed):
        object.__setattr__(module, "_packed_owner", {})
        object.__setattr__(module, "_packed_dtype", dtype)
    object.__setattr__(module, "_packed", specs)
    module.__class__ = _packed_class(module, frozenset(specs))


def declare(module: nn.Module, name: str, spec: PackedParameterSpec, device: torch.device | str | None = None) -> None:
    """Turn parameter `name` of a module into a packed one with empty tensors; `fill` gives them values.

    Args:
        module: holds the parameter; changed in place.
        name: the attribute, e.g. "weight".
        spec: how it is stored.
        device: of the empty tensors; by default that of the parameter (so a meta skeleton stays on meta).

    Raises:
        ValueError: the module has no such parameter, or one of another shape.
    """
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ValueError(f"{type(module).__name__} has no parameter {name!r} to pack")
    if tuple(parameter.shape) != spec.shape:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}, the record says {spec.shape}")
    if spec.order and op_of(module, name) != "linear":
        raise ValueError(f"{name} of {type(module).__name__} has an order of inputs, which only linear layers have")
    device = device if device is not None else parameter.device
    _retype(module, name, spec)
    for suffix, (dtype, shape) in spec.tensors().items():
        empty = torch.empty(shape, dtype=dtype, device=device)
        if dtype.is_floating_point:
            module.register_buffer(f"{name}_{suffix}", empty)
        else:
            module.register_parameter(f"{name}_{suffix}", nn.Parameter(empty, requires_grad=False))


def declare_alias(module: nn.Module, name: str, owner: nn.Module, owner_name: str) -> None:
    """Turn a parameter that is tied to a packed one of `owner` into a view of the owner's tensors."""
    if module is owner and name == owner_name:
        return
    spec = owner._packed[owner_name]  # type: ignore[index,union-attr]
    _retype(module, name, spec)  # type: ignore[arg-type]
    # In a tuple inside a plain dict: nn.Module must not register the owner as a child.
    module._packed_owner[name] = (owner, owner_name)  # type: ignore[index,union-attr]


def fill(module: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Give the packed parameter `name` its stored tensors, by suffix.

    Raises:
        ValueError: a tensor is missing, or has another type or shape than the spec says.
    """
    spec = module._packed[name]  # type: ignore[index,union-attr]
    for suffix, (dtype, shape) in spec.tensors().items():
        value = tensors.get(suffix)
        if value is None or value.dtype != dtype or tuple(value.shape) != shape:
            got = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{name}_{suffix}: expected {dtype} of shape {shape}, got {got}")
        if dtype.is_floating_point:
            module._buffers[f"{name}_{suffix}"] = value
        else:
            module._parameters[f"{name}_{suffix}"] = nn.Parameter(value, requires_grad=False)


def unpack_parameter(module: nn.Module, name: str) -> Tensor:
    """The float value of a packed parameter."""
    return _value(module, name)  # type: ignore[arg-type]


def make_float(modules: Iterable[nn.Module]) -> None:
    """Turn packed modules back into their own classes with float parameters, in place; tied ones share one.

    Args:
        modules: packed; with an alias goes its owner, and with an owner all its aliases.
    """
    packed = [module for module in modules if isinstance(module, Packed)]
    made: dict[tuple[int, str], nn.Parameter] = {}
    for module in packed:
        for name in module._packed:
            owner, own = module._packed_owner.get(name, (module, name))
            if (id(owner), own) not in made:
                value = unpack_parameter(owner, own).detach().to(module._packed_dtype)
                made[id(owner), own] = nn.Parameter(value.contiguous(), requires_grad=False)
    for module in packed:
        specs, owners = dict(module._packed), dict(module._packed_owner)
        module.__class__ = module._laconic_original  # type: ignore[assignment]
        for name, spec in specs.items():
            for home in (module._parameters, module._buffers):
                for suffix in spec.tensors():
                    home.pop(f"{name}_{suffix}", None)
            owner, own = owners.get(name, (module, name))
            module.register_parameter(name, made[id(owner), own])
