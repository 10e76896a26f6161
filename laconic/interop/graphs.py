"""A model as one function of tensors, which is what `torch.export` and ONNX take, and the two files.

`torch.export` keeps the packed weights and the ops of laconic: whoever loads the `.pt2` imports laconic first. ONNX has none
of them: there each packed weight is a `DequantizeLinear` of its codes, scales and zero points (opset 21, blocks along the
inputs), which ONNX Runtime and OpenVINO run, and fuse where they have a kernel.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.record import owner_of
from laconic.errors import BadInput
from laconic.nn import make_float, packed_specs
from laconic.nn.packed import Packed
from laconic.numerics import Int

from .gguf import Written
from .matrix import QuantizedMatrix, spread

__all__ = ["Graph", "export_onnx", "export_torch"]

Example = tuple[tuple, dict]
OPSET = 21
# A protobuf message holds less than 2 GiB; larger weights go into a file beside it.
LARGEST = 1 << 30


class Graph(nn.Module):
    """A model that takes tensors by position and returns a tuple of tensors.

    Args:
        net: the model.
        example: arguments of a forward call; tensors among them become inputs, all else stays as it is.

    Attributes:
        inputs: names of the inputs.
        outputs: names of the outputs, known after a call.
    """

    def __init__(self, net: nn.Module, example: Example):
        super().__init__()
        self.net = net
        args, kwargs = example
        self.inputs = [*(f"x{i}" if len(args) > 1 else "x" for i in range(len(args))), *_tensors_of(kwargs)]
        self.values = (*args, *_tensors_of(kwargs).values())
        self._positional = len(args)
        self._rest = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        if getattr(net, "can_generate", lambda: False)():
            self._rest["use_cache"] = False
        self.outputs: list[str] = []

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the output, in its order."""
        kwargs = dict(zip(self.inputs[self._positional :], values[self._positional :], strict=True))
        found = self.net(*values[: self._positional], **kwargs, **self._rest)
        named = _tensors_of(dict(found)) if isinstance(found, Mapping) else {}
        if not named:
            many = found if isinstance(found, (tuple, list)) else (found,)
            kept = [value for value in many if isinstance(value, Tensor)]
            named = {f"y{i}" if len(kept) > 1 else "y": value for i, value in enumerate(kept)}
        self.outputs = list(named)
        return tuple(named.values())


def _tensors_of(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporters print what they do, and a failing one the whole graph."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _program(graph: Graph, written: Written) -> Any:
    """The exported program, for any batch and length where the model allows it, else for those of the example."""
    sizes: list[dict[int, Any]] = []
    # Two of each: a size of 1 would be taken for a constant.
    values = tuple(torch.cat([v, v]) if v.ndim and v.shape[0] == 1 else v for v in graph.values)
    for name, value in zip(graph.inputs, values, strict=True):
        long = value.ndim == 2 and (name.endswith("ids") or "mask" in name)
        sizes.append({0: torch.export.Dim.AUTO, **({1: torch.export.Dim.AUTO} if long else {})} if value.ndim else {})
    with torch.no_grad(), _quietly():
        try:
            return torch.export.export(graph, values, dynamic_shapes=(tuple(sizes),), strict=False)
        except Exception:  # the model's own forward may raise anything on sizes that are not numbers
            pass
        try:
            found = torch.export.export(graph, graph.values, strict=False)
        except Exception as error:  # likewise
            raise BadInput(
                f"{type(graph.net).__name__} cannot be exported by torch.export: {type(error).__name__}: "
                f"{next(iter(str(error).splitlines()), '')}"
            ) from error
    shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in zip(graph.inputs, graph.values, strict=True))
    written.notes.append(f"the graph holds for inputs of the example's shapes alone: {shapes}")
    return found


def export_torch(model: nn.Module, example: Example, file: Path) -> Written:
    """Write a `.pt2` of `torch.export`: packed weights and the ops of laconic stay as they are.

    Raises:
        BadInput: the model cannot be exported.
    """
    graph, written = Graph(model.eval(), example), Written()
    program = _program(graph, written)
    part = file.with_name(f"{file.name}.part.pt2")
    with _quietly():
        torch.export.save(program, str(part), extra_files={"laconic.txt": _readme(graph)})
    os.replace(part, file)
    written.rows = [
        {"name": name, "type": str(spec.scheme), "exact": True} for name, spec in packed_specs(model).items()
    ]
    written.notes.append("import laconic.nn before torch.export.load: it registers the ops that the program calls")
    return written


def _readme(graph: Graph) -> str:
    return f"inputs: {', '.join(graph.inputs)}\noutputs: {', '.join(graph.outputs)}\nneeds: import laconic.nn\n"


# --- ONNX ------------------------------------------------------------------------------------------------------------


def export_onnx(model: nn.Module, example: Example, file: Path) -> Written:
    """Write an ONNX file in which every packed weight is a `DequantizeLinear`.

    Integers of up to 4 bits, ternary and binary numbers are stored as 4-bit integers, others as 8-bit ones. Weights with
    levels, real zero points or sorted inputs, and those of convolutions with groups of inputs, are written as floats.

    Raises:
        BadInput: onnx or onnxscript is not installed, or the model cannot be exported.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - what torch's exporter needs
    except ImportError as error:
        raise BadInput(
            f"writing ONNX needs the packages onnx and onnxscript ({error.name} is missing): pip install onnx onnxscript"
        ) from error
    written = Written()
    packed = {name: QuantizedMatrix.of(*owner_of(model, name)) for name in packed_specs(model)}
    graph = Graph(_floats(model).eval(), example)
    program = _program(graph, written)
    with torch.no_grad(), _quietly():
        try:
            proto = torch.onnx.export(
                program, dynamo=True, optimize=False, opset_version=OPSET, input_names=graph.inputs, verbose=False
            ).model_proto  # type: ignore[union-attr]
        except Exception as error:  # the exporter may raise anything on an operation that it does not know
            raise BadInput(
                f"{type(model).__name__} cannot be written as ONNX: {next(iter(str(error).splitlines()), '')}"
            ) from error
    _rename_outputs(proto, graph.outputs)
    aliases = _aliases(model)
    for name, matrix in packed.items():
        why = _quantize_initializer(onnx, proto, [f"net.{one}" for one in (name, *aliases.get(name, ()))], matrix)
        written.rows.append({"name": name, "type": "float" if why else "QDQ", "exact": True})
        if why:
            written.notes.append(f"{name} is written as floats: {why}")
        if matrix.inputs and not why:
            note = "inputs that are rounded to 8 bits here stay float in ONNX"
            written.notes += [] if note in written.notes else [note]
    _forget_sources(proto)
    proto.producer_name, proto.producer_version = "laconic", ""
    _save(onnx, proto, file)
    return written


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name of a packed parameter -> its other names."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for name, (owner, own) in (module._packed_owner if isinstance(module, Packed) else {}).items():
            found.setdefault(f"{paths[id(owner)]}.{own}", []).append(f"{path}.{name}")
    return found


def _floats(model: nn.Module) -> nn.Module:
    """A copy with float parameters where packed ones are; tied ones stay one."""
    found = copy.deepcopy(model)
    make_float(found.modules())
    return found


def _forget_sources(proto: Any) -> None:
    """Drop what the exporter notes about the code behind every node: paths of this machine, and most of a small file."""
    for graph in (proto.graph, *proto.functions):
        for one in (graph, *graph.node, *graph.value_info):
            one.ClearField("metadata_props")
            one.ClearField("doc_string")
    for one in (proto, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        one.ClearField("metadata_props")
        one.ClearField("doc_string")


def _rename_outputs(proto: Any, names: list[str]) -> None:
    for output, name in zip(proto.graph.output, names, strict=False):
        old = output.name
        for node in proto.graph.node:
            node.output[:] = [name if one == old else one for one in node.output]
            node.input[:] = [name if one == old else one for one in node.input]
        output.name = name


def _quantize_initializer(onnx: Any, proto: Any, names: list[str], matrix: QuantizedMatrix) -> str | None:
    """Put a DequantizeLinear in the place of a float initializer, which has one of these names; returns why not, if it stays."""
    found = [tensor for tensor in proto.graph.initializer if tensor.name in names]
    if len(found) != 1:
        return "the exporter has folded it into another tensor"
    held, name = found[0], found[0].name
    shape = tuple(held.dims)
    parts = _qdq(matrix, shape)
    if isinstance(parts, str):
        return parts
    codes, scale, zero, kind, axis, block = parts
    readers = [node for node in proto.graph.node if name in node.input]
    turned = len(shape) == 2 and all(_transposes(node) for node in readers) and bool(readers)
    if turned:  # products take it as (in, out): with the codes in that order the product can be fused
        codes, axis = codes.t(), 1 - axis
        scale = scale if scale.ndim < 2 else scale.t()
        zero = zero if zero is None or zero.ndim < 2 else zero.t()
    proto.graph.initializer.remove(held)
    inputs = [f"{name}.codes", f"{name}.scale"]
    proto.graph.initializer.append(_integers(onnx, inputs[0], codes, kind))
    dtype = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}.get(held.data_type, torch.float32)
    raw = scale.to(dtype).contiguous()
    raw = raw.view(torch.int16) if dtype is torch.bfloat16 else raw
    proto.graph.initializer.append(
        onnx.helper.make_tensor(inputs[1], held.data_type, list(scale.shape), raw.numpy().tobytes(), raw=True)
    )
    if zero is not None:
        inputs.append(f"{name}.zero")
        proto.graph.initializer.append(_integers(onnx, inputs[2], zero, kind))
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    result = f"{name}.float" if turned else name
    node = onnx.helper.make_node("DequantizeLinear", inputs, [result], name=f"{name}.dequantize", **attributes)
    for reader in readers if turned else ():
        for other in proto.graph.node:
            other.input[:] = [result if one == reader.output[0] else one for one in other.input]
        proto.graph.node.remove(reader)
    proto.graph.node.insert(0, node)
    return None


def _transposes(node: Any) -> bool:
    order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    return node.op_type == "Transpose" and order == [1, 0]


def _qdq(matrix: QuantizedMatrix, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None, str, int, int] | str:
    """Codes in the weight's shape, scales, zero points, type, axis and block of a DequantizeLinear; or why there is none."""
    rows, k = matrix.shape
    if matrix.order is not None:
        return "its inputs are sorted by group"
    whole = matrix.integers()
    if whole is None:
        return f"ONNX has no such numbers as {matrix.scheme}"
    if shape[0] != rows or math.prod(shape[1:]) != k:
        return f"its matrix {rows} x {k} is no view of {shape}"
    bits = matrix.scheme.element.bits if isinstance(matrix.scheme.element, Int) else 4
    small = bits <= 4
    if matrix.zero is None:
        codes, kind = whole, "INT4" if small else "INT8"
        zero: Tensor | None = None
    else:
        codes, zero, kind = matrix.codes.to(torch.int16), matrix.zero.to(torch.int16), "UINT4" if small else "UINT8"
    scale, granularity = matrix.scale.float(), matrix.scheme.scale.granularity
    if granularity == "tensor" or scale.numel() == 1:
        return codes.reshape(shape), scale.reshape(()), None if zero is None else zero.reshape(()), kind, 0, 0
    if scale.shape[1] == 1:
        return codes.reshape(shape), scale.reshape(-1), None if zero is None else zero.reshape(-1), kind, 0, 0
    if len(shape) != 2:
        return "ONNX has no groups of inputs of a convolution"
    # Blocks of one length divide the row; a short last group makes them shorter.
    block = math.gcd(matrix.scheme.scale.group_of(k), k)
    scale = spread(scale, (rows, k), matrix.scheme)[:, ::block]
    zeros = None if zero is None else spread(zero, (rows, k), matrix.scheme)[:, ::block]
    return codes, scale, zeros, kind, 1, block


def _integers(onnx: Any, name: str, values: Tensor, kind: str) -> Any:
    """A tensor of 4- or 8-bit integers, two of the former to a byte, the first one low."""
    shape, flat = list(values.shape), values.reshape(-1)
    if kind.endswith("8"):
        raw = flat.to(torch.int8 if kind == "INT8" else torch.uint8).numpy().tobytes()
    else:
        nibbles = (flat & 15).to(torch.uint8)
        nibbles = torch.cat([nibbles, nibbles.new_zeros(len(nibbles) % 2)]).reshape(-1, 2)
        raw = (nibbles[:, 0] | nibbles[:, 1] << 4).numpy().tobytes()
    return onnx.helper.make_tensor(name, getattr(onnx.TensorProto, kind), shape, raw, raw=True)


def _save(onnx: Any, proto: Any, file: Path) -> None:
    """One file, or two where the weights do not fit in a message; each put in place by a rename."""
    if proto.ByteSize() < LARGEST:
        part = file.with_name(f"{file.name}.part")
        part.write_bytes(proto.SerializeToString())
        os.replace(part, file)
        return
    onnx.save_model(proto, str(file), save_as_external_data=True, location=f"{file.name}.data", convert_attribute=False)
