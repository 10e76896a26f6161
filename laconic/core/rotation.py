"""Rewriting models by rotations that change nothing they compute: what spreads outliers before numbers are rounded.

For orthogonal Q, in float64 and rounded once; vectors are rows, so y = x W^T of a linear layer W (out, in):

    stream    a residual stream x of width d holds x Q instead. RMS(x Q) = RMS(x), so with each norm's gain and bias
              folded into its readers,   writers and readers   W <- W Q along the stream's axis,   biases b <- b Q
              layer norms need the stream's mean to be gone first (`laconic.core.renorm`); they become RMS norms
    values    between value and output layers of an attention, head by head:  v <- v Q on outputs, o <- o Q on inputs;
              averages over tokens commute with it, and nothing is left at inference
    input     W <- W R, and the layer's input is rotated online by the same R, a Hadamard matrix (`laconic.nn.rotated`);
              with `scale` s, W <- W diag(s) first, and what makes the input gives x / s ("smooth-fused")
    output    W <- P R W, a layer that makes what a cache should hold; R and P are undone after it, online

Which Q: `rotation` makes a (random) Hadamard matrix, where there is none a block diagonal of such, or a random
orthogonal one. `klt_rotation` makes K H: K holds the eigenvectors of a covariance C = K L K^T, so that diag(H^T L H) is
the mean of L for a Hadamard H: all channels get equal variances (MambaQuant, arXiv 2501.13484). QuaRot (arXiv
2404.00456) is the source of the places.

What is worked out here is a `Record`, done by `laconic.core.record.apply_records`, also to a skeleton on meta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput
from laconic.nn.rotated import rotate_inputs
from laconic.numerics import check_finite, hadamard_block, hadamard_matrix, random_hadamard, random_orthogonal

from .record import RENORM, Record
from .renorm import _fold, _input_axis, _Values, untie
from .structure import Mixer, Residual, Structure

__all__ = [
    "Kind", "input_refusal", "klt", "klt_rotation", "rotate_along", "rotate_inputs", "rotation", "solve_input",
    "solve_output", "solve_stream", "solve_values", "stream_refusal", "ties_in_the_way", "untie", "values_refusal",
]  # fmt: skip

Kind = Literal["hadamard", "orthogonal"]


# --- matrices ---------------------------------------------------------------------------------------


def rotation(n: int, kind: Kind = "hadamard", generator: torch.Generator | None = None) -> Tensor:
    """Q (n, n) float64: diag(+-1) H in blocks of the largest order there is, or a random orthogonal matrix.

    Raises:
        BadInput: another kind.
    """
    if kind == "orthogonal":
        return random_orthogonal(n, generator)
    if kind != "hadamard":
        raise BadInput(f"rotations are 'hadamard', 'orthogonal' or a matrix, not {kind!r}")
    size = hadamard_block(n)
    if size == n:
        return random_hadamard(n, generator)
    if size <= 2:  # hardly a rotation
        return random_orthogonal(n, generator)
    return torch.block_diag(*(random_hadamard(size, generator) for _ in range(n // size)))


def klt(covariance: Tensor) -> Tensor:
    """K (n, n) float64, eigenvectors as columns, the largest eigenvalue first.

    Raises:
        BadInput: no symmetric matrix of finite numbers.
    """
    wide = covariance.detach().double()
    if wide.ndim != 2 or wide.shape[0] != wide.shape[1]:
        raise BadInput(f"a covariance is a square matrix, got shape {tuple(wide.shape)}")
    if not bool(torch.isfinite(wide).all()):
        raise BadInput("the covariance holds inf or nan: look at the calibration data")
    if not torch.allclose(wide, wide.T, rtol=1e-4, atol=1e-6 * float(wide.abs().max())):
        raise BadInput("a covariance is symmetric, and this matrix is not")
    return torch.linalg.eigh((wide + wide.T) / 2).eigenvectors.flip(1)


def klt_rotation(covariance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """K H (n, n) float64: rotated inputs of this covariance have the same variance in every channel.

    Where no Hadamard matrix of order n is known, H is a random orthogonal one, and variances are even on average only.
    """
    k = klt(covariance)
    n = len(k)
    return k @ (random_hadamard(n, generator) if hadamard_block(n) == n else random_orthogonal(n, generator))


def rotate_along(weight: Tensor, axis: int, matrix: Tensor, stride: int = 1) -> Tensor:
    """w <- w Q along one axis, in runs: entries that lie `stride` apart, len(Q) of them, make a vector w.

    Raises:
        ValueError: the runs do not fill the axis.
    """
    size = len(matrix)
    if weight.shape[axis] % (size * stride):
        raise ValueError(f"an axis of {weight.shape[axis]} is not made of runs of {size} that lie {stride} apart")
    moved = weight.movedim(axis, -1)
    parts = moved.unflatten(-1, (-1, size, stride)).mT @ matrix.to(weight.dtype)
    return parts.mT.flatten(-3).movedim(-1, axis)


def _given(matrix: Tensor, width: int, what: str) -> Tensor:
    """A matrix in float64, if it is orthogonal and of this width.

    Raises:
        BadInput: it is not.
    """
    q = matrix.detach().double()
    if tuple(q.shape) != (width, width):
        raise BadInput(f"{what} is {width} wide, and the rotation is of shape {tuple(matrix.shape)}")
    off = float((q @ q.T - torch.eye(width, dtype=q.dtype)).abs().max())
    if not off < 1e-4:
        raise BadInput(f"{what}: the rotation given is not orthogonal, Q Q^T is off by {off:.2g}")
    return q


# --- the residual stream ----------------------------------------------------------------------------


def stream_refusal(structure: Structure, model: nn.Module, residual: Residual) -> str:
    """Why a residual stream cannot be turned, "" if it can."""
    mine = {(writer.name, writer.module) for writer in residual.writers}
    if residual.reason:
        read = [name for found in residual.norms.values() for name in found.weights]
        packed = next((path for path, module in model.named_modules() if getattr(module, "_packed", None)), None)
        if packed is not None:
            return f"{packed} is packed: rotate before weights are quantized ({residual.reason})"
        tied = [n for n in (*read, *(w.name for w in residual.writers)) if len(structure.parameters[n].names) > 1]
        return f"{residual.reason}; {_tied(tied[0], structure)}" if tied else residual.reason
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for path, readers in residual.norms.items():
        for module_path, name in zip(readers.modules, readers.weights, strict=True):
            why = _unreadable(model, module_path, name, residual.width)
            if why:
                return why
            if len(structure.parameters[name].names) > 1:
                return _tied(name, structure)
        norm: Any = model.get_submodule(path)
        if residual.kinds[path] == "layer" and type(norm) is not nn.LayerNorm:
            return f"{path} is a {type(norm).__name__}, and not a layer norm of torch"
    for writer in residual.writers:
        if writer.name not in tensors:
            return f"{writer.name} is stored in another form: rotate before weights are quantized"
        if tensors[writer.name].shape[writer.axis] != residual.width:
            return f"{writer.name} writes to a stream that is {residual.width} wide, and is not"
        info = structure.parameters[writer.name]
        strange = [use for use in info.uses if (writer.name, use.module) not in mine and use.role != "other"]
        if strange and len(info.names) > 1:
            return _tied(writer.name, structure)
        if strange:
            return f"{writer.name} is read by {strange[0].module or 'the model'} too"
        owner = model.get_submodule(writer.name.rpartition(".")[0])
        if parametrize.is_parametrized(owner):
            return f"a parametrization computes {writer.name}: remove it first (torch.nn.utils.parametrize)"
    return ""


def _tied(name: str, structure: Structure) -> str:
    other = next(n for n in structure.parameters[name].names if n != name)
    return f"{name} is tied to {other}: untie them first (laconic.core.rotation.ties_in_the_way)"


def _unreadable(model: nn.Module, path: str, name: str, width: int) -> str:
    """Why a reader's weight cannot be rotated, "" if it can."""
    module: Any = model.get_submodule(path)
    axis = _input_axis(module)
    if axis is None or name.rpartition(".")[0] != path:
        return f"{path}, which reads it, is a {type(module).__name__}"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"{path}.weight is stored in another form: rotate before weights are quantized"
    if parametrize.is_parametrized(module):
        return f"a parametrization computes {path}.weight: remove it first (torch.nn.utils.parametrize)"
    if module.weight.shape[axis] != width:
        return f"{path} reads {module.weight.shape[axis]} channels of a stream that is {width} wide"
    return ""


def ties_in_the_way(structure: Structure) -> dict[str, tuple[str, ...]]:
    """Canonical name of each writer or reader of a residual stream -> its other names, to be untied (`untie`)."""
    found = {}
    for residual in structure.residuals:
        names = [writer.name for writer in residual.writers]
        names += [name for readers in residual.norms.values() for name in readers.weights]
        for name in names:
            others = structure.parameters[structure.name_of(name)].names
            if len(others) > 1:
                found[others[0]] = others[1:]
    return found


def solve_stream(structure: Structure, model: nn.Module, residual: Residual, matrix: Tensor, *, method: str) -> Record:
    """Gains folded and the stream turned: new values of all its writers, norms and readers.

    Args:
        structure, model: as they are.
        residual: one that `stream_refusal` does not refuse.
        matrix: Q (d, d).
        method: id, for the record.

    Raises:
        BadInput: Q is not orthogonal, or of another width.
    """
    first = next(iter(residual.norms))
    q = _given(matrix, residual.width, f"the stream of {first}")
    values = _Values(model)
    centred = "layer" in residual.kinds.values()
    norms: dict[str, Any] = {}
    for path, readers in residual.norms.items():
        norm: Any = model.get_submodule(path)
        gain = getattr(norm, "weight", None)
        if gain is not None:
            _fold(structure, values, norm, path, 1.0, False, offset=readers.offset)
        if residual.kinds[path] == "layer":
            norms[path] = {"kind": "rms", "width": residual.width, "eps": norm.eps}
        elif gain is not None:
            values.new[f"{path}.weight"] = torch.full_like(gain.detach().double(), 1.0 - readers.offset)
            if getattr(norm, "bias", None) is not None:
                values.new[f"{path}.bias"] = torch.zeros_like(norm.bias.detach().double())
        for module_path, name in zip(readers.modules, readers.weights, strict=True):
            axis = _input_axis(model.get_submodule(module_path))
            assert axis is not None  # stream_refusal has seen to it
            values.new[name] = rotate_along(values[name], axis, q)
    for writer in residual.writers:
        value = values[writer.name]
        if centred:
            value = value - value.mean(writer.axis, keepdim=True)
        values.new[writer.name] = rotate_along(value, writer.axis, q)
    return _record(model, first, values, method, norms=norms)


# --- values of an attention -------------------------------------------------------------------------


def values_refusal(structure: Structure, model: nn.Module, mixer: Mixer) -> str:
    """Why the values of an attention cannot be turned, "" if they can."""
    for path in (mixer.value, mixer.output):
        why = input_refusal(structure, model, path)
        if why:
            return why
    return ""


def solve_values(
    structure: Structure, model: nn.Module, mixer: Mixer, matrix: Tensor | None = None, *, method: str
) -> Record:
    """Values turned head by head, by the Hadamard matrix of a head's width unless one is given."""
    q = _given(rotation_of_heads(mixer.width) if matrix is None else matrix, mixer.width, f"a head of {mixer.value}")
    values = _Values(model)
    value: Any = model.get_submodule(mixer.value)
    output: Any = model.get_submodule(mixer.output)
    name = f"{mixer.value}.weight"
    values.new[name] = rotate_along(values[name], 1 - (_input_axis(value) or 0), q)
    if value.bias is not None:
        values.new[f"{mixer.value}.bias"] = rotate_along(values[f"{mixer.value}.bias"], 0, q)
    name = f"{mixer.output}.weight"
    values.new[name] = rotate_along(values[name], _input_axis(output) or 0, q)
    return _record(model, mixer.value, values, method)


def rotation_of_heads(width: int) -> Tensor:
    """H of a head's width, in blocks where there is none."""
    size = hadamard_block(width)
    return torch.block_diag(*[hadamard_matrix(size)] * (width // size))


# --- inputs, online ---------------------------------------------------------------------------------


def input_refusal(structure: Structure, model: nn.Module, path: str) -> str:
    """Why the input of the layer at `path` cannot be rotated, "" if it can."""
    module: Any = model.get_submodule(path)
    if _input_axis(module) is None:
        return f"{path} is a {type(module).__name__}, and not a linear layer"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"{path}.weight is stored in another form: rotate before weights are quantized"
    if parametrize.is_parametrized(module):
        return f"a parametrization computes {path}.weight: remove it first (torch.nn.utils.parametrize)"
    info = structure.parameters.get(f"{path}.weight")
    if info is None or len(info.names) > 1:
        return f"{path}.weight is tied to another parameter"
    others = [use.module for use in info.uses if use.module != path]
    return f"{path}.weight is read by {others[0] or 'the model'} too" if others else ""


def solve_input(
    structure: Structure, model: nn.Module, path: str, *, size: int | None = None, stride: int = 1,
    scale: Tensor | None = None, writers: Mapping[str, tuple[int, int, int]] | None = None, method: str,
) -> Record:  # fmt: skip
    """A layer's input rotated online, and its weight once and for all.

    Args:
        structure, model: as they are.
        path: of a linear layer that `input_refusal` does not refuse.
        size: channels that are mixed; by default the largest divisor of the input that has a Hadamard matrix.
        stride: how far apart they lie.
        scale: s (in,), positive: the weight's columns are multiplied by it before.
        writers: parameters that make the input linearly -> (axis, begin, end) of the entries to be divided by s.
        method: id, for the record.

    Raises:
        BadInput: the scale is not positive and finite, or of another width; or runs do not fill the input.
    """
    module: Any = model.get_submodule(path)
    axis = _input_axis(module) or 0
    width = module.weight.shape[axis]
    size = hadamard_block(width // stride) if size is None else size
    if width % (size * stride):
        raise BadInput(f"{path} reads {width} channels, which are not runs of {size} that lie {stride} apart")
    values = _Values(model)
    name = f"{path}.weight"
    weight = values[name]
    if scale is not None:
        s = positive(scale, width, path)
        weight = weight * (s if axis == 1 else s[:, None])
        divide(values, writers or {}, s)
    values.new[name] = rotate_along(weight, axis, hadamard_matrix(size), stride)
    return _record(model, path, values, method, rotated_inputs={path: {"size": size, "stride": stride}})


def solve_output(
    structure: Structure, model: nn.Module, path: str, *, size: int, order: Tensor, method: str
) -> Record:  # fmt: skip
    """A layer that makes its outputs rotated and in another order, and restores them after.

    Args:
        structure, model: as they are.
        path: of a linear layer that `input_refusal` does not refuse.
        size: channels that are mixed.
        order: (out,) which rotated channel each output becomes.
        method: id, for the record.

    Raises:
        BadInput: runs do not fill the output, or the order is no permutation of it.
    """
    module: Any = model.get_submodule(path)
    axis = 1 - (_input_axis(module) or 0)
    width = module.weight.shape[axis]
    if width % size or sorted(order.tolist()) != list(range(width)):
        raise BadInput(
            f"{path} gives {width} channels: an order of them all and runs of a divisor are needed, not {size}"
        )
    values, q = _Values(model), hadamard_matrix(size)
    names = [(f"{path}.weight", axis)] + ([(f"{path}.bias", 0)] if module.bias is not None else [])
    for name, at in names:
        values.new[name] = rotate_along(values[name], at, q).index_select(at, order)
    return _record(model, path, values, method, restored_outputs={path: {"size": size, "order": order.tolist()}})


def positive(scale: Tensor, width: int, path: str) -> Tensor:
    """Scales in float64.

    Raises:
        BadInput: not positive and finite, or of another width.
    """
    s = scale.detach().double().reshape(-1)
    if s.numel() != width or not bool(((s > 0) & torch.isfinite(s)).all()):
        raise BadInput(
            f"{path} needs {width} positive finite scales, got {s.numel()} from {s.min():.3g} to {s.max():.3g}"
        )
    return s


def divide(values: _Values, writers: Mapping[str, tuple[int, int, int]], s: Tensor) -> None:
    """Divide the entries begin..end of each parameter along an axis by s."""
    for name, (axis, begin, end) in writers.items():
        value = values[name].clone()
        part = value.narrow(axis, begin, end - begin)
        part.div_(s.view([-1 if i == axis else 1 for i in range(value.ndim)]))
        values.new[name] = value


def _record(model: nn.Module, path: str, values: _Values, method: str, **said: Any) -> Record:
    tensors = values.rounded(model)
    for name, tensor in tensors.items():
        check_finite(tensor, name)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return Record(RENORM, path, {"pass": method, "method": method, "norms": {}, "shapes": shapes, **said}, tensors)
