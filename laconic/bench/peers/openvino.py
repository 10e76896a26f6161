"""OpenVINO: compressed weights in its own operations, int8 weights and NNCF's calibrated int8 for the encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from laconic.bench.contest import Ready, contestant
from laconic.bench.machine import INT8
from laconic.bench.problems import Encoder, Product

__all__: list[str] = []

NEEDS = ("openvino",)
TYPES = {"int8": "i8", "int4": "i4"}
CALIBRATION = 512  # texts that NNCF looks at, in batches of the problem's size


def _compile(model: Any, threads: int) -> Any:
    """For one stream of requests with so many threads."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    return openvino.Core().compile_model(model, "CPU", options)


@contestant(
    "openvino weights", "openvino", Product, needs=NEEDS,
    when=lambda problem: None if problem.weights in TYPES else f"stores {' or '.join(TYPES)} alone",
)  # fmt: skip
def compressed(problem: Product) -> Ready:
    """A graph with one `MatMul` a copy, whose weights are integers, converted and scaled; its defaults round the inputs."""
    import openvino
    from openvino import opset13 as ops

    bits = 8 if problem.weights == "int8" else 4
    w = problem.weight.numpy().reshape(problem.outputs, -1, problem.group or problem.inputs)
    middle = 1 << (bits - 1)
    scale = np.maximum(np.abs(w).max(-1, keepdims=True), 1e-12) / (middle - 1)
    codes = np.rint(w / scale).astype(np.int8)
    nbytes = codes.size * bits / 8 + 2 * scale.size
    turns = problem.turns(nbytes)
    x = ops.parameter([problem.rows, problem.inputs], np.float32, name="x")
    outputs = []
    for turn in range(turns):
        # Other rows first in every copy: equal constants, and equal products, would be made one.
        q, s = np.roll(codes, turn, 0), np.roll(scale, turn, 0).astype(np.float16)
        weight = ops.multiply(ops.convert(_constant(q, bits), np.float16), ops.constant(s))
        matrix = ops.reshape(weight, ops.constant(np.array([problem.outputs, problem.inputs])), special_zero=False)
        outputs.append(ops.result(ops.matmul(x, ops.convert(matrix, np.float32), False, True)))
    compiled = _compile(openvino.Model(outputs, [x], "product"), problem.threads)
    request, feed = compiled.create_infer_request(), problem.x.numpy()
    request.set_tensor(compiled.inputs[0], openvino.Tensor(feed, shared_memory=True))

    def call() -> Any:
        request.infer()
        return request

    return Ready(call, nbytes, turns, _first, INT8, f"{problem.weights} weights")


def _first(request: Any) -> torch.Tensor:
    return torch.from_numpy(request.get_output_tensor(0).data.copy())


def _constant(codes: np.ndarray, bits: int) -> Any:
    """An integer constant; two 4-bit codes to a byte, the first in the low half."""
    import openvino
    from openvino import opset13 as ops

    if bits == 8:
        return ops.constant(codes)
    flat = codes.reshape(-1).view(np.uint8) & 15
    tensor = openvino.Tensor(flat[0::2] | flat[1::2] << 4, openvino.Shape(list(codes.shape)), openvino.Type.i4)
    return openvino.op.Constant(tensor, shared_memory=False)


@contestant("openvino float32", "openvino", Encoder, needs=NEEDS)
def encoder(problem: Encoder) -> Ready:
    """The converted model."""
    return _encoder(problem, _converted(problem), 4 * problem.sizes["linear"], "float32")


@contestant("openvino int8 weights", "openvino", Encoder, needs=(*NEEDS, "nncf"))
def encoder_weights(problem: Encoder) -> Ready:
    """`nncf.compress_weights` with its defaults, int8."""
    import nncf

    model = nncf.compress_weights(_converted(problem))
    return _encoder(problem, model, problem.sizes["linear"], INT8)


@contestant("openvino int8 NNCF", "openvino", Encoder, needs=(*NEEDS, "nncf"))
def encoder_calibrated(problem: Encoder) -> Ready:
    """`nncf.quantize` for transformers, calibrated on articles that are not measured."""
    batches = max(1, CALIBRATION // problem.batch)
    found = [{name: x.numpy() for name, x in batch.items()} for batch in problem.calibration(batches)]
    import nncf

    dataset = nncf.Dataset(found)
    kind = nncf.ModelType.TRANSFORMER
    model = nncf.quantize(_converted(problem), dataset, model_type=kind, subset_size=batches)
    return _encoder(problem, model, problem.sizes["linear"], INT8)


def _converted(problem: Encoder) -> Any:
    import openvino

    example = dict(problem.inputs)
    with torch.inference_mode():
        model = openvino.convert_model(problem.model(), example_input=example)
        shape = [problem.batch, problem.tokens]
        model.reshape({one: shape for one in model.inputs if one.get_any_name() in example})
    return model


def _encoder(problem: Encoder, model: Any, stored: float, peak: str) -> Ready:
    compiled = _compile(model, problem.threads)
    feed = {one.get_any_name(): problem.inputs[one.get_any_name()].numpy() for one in compiled.inputs}
    request = compiled.create_infer_request()

    def call() -> Any:
        request.infer(feed, share_inputs=True)
        return request

    return Ready(call, stored, answer=lambda done: problem.pool(_first(done)), peak=peak)
