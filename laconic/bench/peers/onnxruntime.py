"""ONNX Runtime: `MatMulNBits` for packed matrices, dynamic int8 for products with int8 inputs and for the encoder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laconic.bench.contest import Ready, contestant
from laconic.bench.machine import INT8
from laconic.bench.problems import Encoder, Product

__all__: list[str] = []

NEEDS = ("onnxruntime", "onnx")
NBITS = {"int8": 8, "int4": 4, "int2": 2}
OPSET = 21


def _session(model: Any, threads: int) -> Any:
    """A session on the CPU with so many threads; `model` is bytes or a path."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _packable(problem: Product) -> str | None:
    if problem.weights not in NBITS:
        return f"MatMulNBits stores {' or '.join(NBITS)} alone"
    if problem.activations is not None:
        return "MatMulNBits takes float inputs"
    return None


@contestant("onnxruntime MatMulNBits", "onnxruntime", Product, needs=NEEDS, when=_packable)
def matmul_nbits(problem: Product) -> Ready:
    """A graph of one `MatMulNBits` a copy, inputs rounded to int8 within it (`accuracy_level` 4)."""
    from onnx import TensorProto, helper, numpy_helper

    bits, k, n = NBITS[problem.weights], problem.inputs, problem.outputs
    group = problem.group or 128  # its blocks are of 256 at most: a scale for each row is not to be had
    packed, scales = _blocks(problem.weight.numpy(), bits, group)
    nbytes = packed.nbytes + scales.nbytes
    turns = problem.turns(nbytes)
    nodes, initial, outputs = [], [], []
    for turn in range(turns):
        # Other rows first in every copy: equal constants, and equal products, would be made one.
        initial += [numpy_helper.from_array(np.roll(a, turn, 0), f"{name}{turn}") for name, a in (("w", packed), ("s", scales))]
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"w{turn}", f"s{turn}"], [f"y{turn}"], domain="com.microsoft",
                K=k, N=n, bits=bits, block_size=group, accuracy_level=4,
            )
        )  # fmt: skip
        outputs.append(helper.make_tensor_value_info(f"y{turn}", TensorProto.FLOAT, [problem.rows, n]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [problem.rows, k])
    graph = helper.make_graph(nodes, "product", [x], outputs, initial)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    session = _session(
        helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString(), problem.threads
    )
    feed = {"x": problem.x.numpy()}
    note = f"blocks of {group}, accuracy_level 4"
    return Ready(lambda: session.run(None, feed), nbytes, turns, _first, INT8, note)


def _first(outputs: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(outputs[0])


def _blocks(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, blocks, group bits / 8) uint8 and scales, symmetric: w^ = (q - 2^(bits-1)) s."""
    n, k = weight.shape
    middle = 1 << (bits - 1)
    w = weight.reshape(n, k // group, group)
    peak = np.take_along_axis(w, np.abs(w).argmax(-1, keepdims=True), -1)
    scale = np.where(peak == 0, 1, -peak / middle).astype(np.float32)  # the largest becomes the lowest code
    codes = np.clip(np.rint(w / scale) + middle, 0, 2 * middle - 1).astype(np.uint8)
    packed = np.zeros((n, k // group, group * bits // 8), np.uint8)
    each = 8 // bits
    for lane in range(each):
        packed |= codes[..., lane::each] << (bits * lane)
    return packed, scale.reshape(n, k // group)


@contestant(
    "onnxruntime int8 dynamic", "onnxruntime", Product, needs=NEEDS,
    when=lambda problem: None if problem.weights == "int8" else "rounds to int8 alone",
)  # fmt: skip
def dynamic(problem: Product) -> Ready:
    """`quantize_dynamic` of a graph with one `MatMul` a copy."""
    from onnx import TensorProto, helper, numpy_helper, save
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nbytes = problem.weight.numel()
    turns = problem.turns(nbytes)
    weight = np.ascontiguousarray(problem.weight.numpy().T)
    nodes = [helper.make_node("MatMul", ["x", f"w{turn}"], [f"y{turn}"]) for turn in range(turns)]
    initial = [numpy_helper.from_array(np.roll(weight, turn, 1), f"w{turn}") for turn in range(turns)]
    shape = [problem.rows, problem.outputs]
    outputs = [helper.make_tensor_value_info(f"y{turn}", TensorProto.FLOAT, shape) for turn in range(turns)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [problem.rows, problem.inputs])
    graph = helper.make_graph(nodes, "product", [x], outputs, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        save(model, str(Path(folder) / "float.onnx"))
        big, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        quantize_dynamic(big, small, weight_type=QuantType.QInt8, per_channel=True)
        session = _session(str(small), problem.threads)
    feed = {"x": problem.x.numpy()}
    return Ready(lambda: session.run(None, feed), nbytes, turns, _first, INT8, "inputs by tensor")


@contestant("onnxruntime float32", "onnxruntime", Encoder, needs=(*NEEDS, "onnxscript"))
def encoder(problem: Encoder) -> Ready:
    """The exported graph."""
    with tempfile.TemporaryDirectory() as folder:
        return _encoder(problem, export(problem, Path(folder)), 4 * problem.sizes["linear"], "float32")


@contestant("onnxruntime int8 dynamic", "onnxruntime", Encoder, needs=(*NEEDS, "onnxscript"))
def encoder_int8(problem: Encoder) -> Ready:
    """The exported graph through `quantize_dynamic` with its defaults: a scale for each matrix."""
    return _dynamic_encoder(problem, per_channel=False)


@contestant("onnxruntime int8 dynamic by channel", "onnxruntime", Encoder, needs=(*NEEDS, "onnxscript"))
def encoder_int8_channels(problem: Encoder) -> Ready:
    """The same with a scale for each channel."""
    return _dynamic_encoder(problem, per_channel=True)


def _dynamic_encoder(problem: Encoder, per_channel: bool) -> Ready:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path, small = export(problem, Path(folder)), Path(folder) / "int8.onnx"
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=per_channel)
        return _encoder(problem, small, problem.sizes["linear"], INT8)


def _encoder(problem: Encoder, path: Path, stored: float, peak: str) -> Ready:
    session = _session(str(path), problem.threads)
    names = [one.name for one in session.get_inputs()]
    feed = {name: problem.inputs[name].numpy() for name in names}
    return Ready(lambda: session.run(None, feed), stored, answer=lambda y: problem.pool(y[0]), peak=peak)


def export(problem: Encoder, folder: Path) -> Path:
    """The encoder as ONNX with the problem's shape."""

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = problem.model()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    path = folder / "float.onnx"
    with torch.inference_mode():
        torch.onnx.export(
            Hidden().eval(), (problem.inputs["input_ids"], problem.inputs["attention_mask"]), str(path), dynamo=True,
            input_names=["input_ids", "attention_mask"], output_names=["hidden"], external_data=False, verbose=False,
        )  # fmt: skip
    return path
