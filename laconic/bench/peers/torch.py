"""torch itself: float32, which is everybody's baseline, bfloat16, and its own low-bit products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.bench.contest import Ready, contestant, cycling
from laconic.bench.machine import INT8
from laconic.bench.ours import encoder_ready
from laconic.bench.problems import Encoder, LanguageModel, Load, Product
from laconic.pipeline.tensorfile import SINGLE

__all__: list[str] = []

INT4_GROUPS = (32, 64, 128, 256)  # that torch's kernel knows
FEW_ROWS = 32


def _when(weights: tuple[str, ...], most_rows: int | None = None) -> Callable[[Product], str | None]:
    def why_not(problem: Product) -> str | None:
        if problem.weights not in weights:
            return f"stores {' or '.join(weights)} weights alone"
        if most_rows is not None and problem.rows > most_rows:
            return f"a kernel for few rows, at most {most_rows} here"
        return None

    return why_not


@contestant("torch float32", "torch", Product)
def float32(problem: Product) -> Ready:
    """`F.linear`."""
    copies = problem.copies(problem.weight)
    return Ready(cycling(copies, lambda w: F.linear(problem.x, w)), stored=copies[0].nbytes)


@contestant("torch bfloat16", "torch", Product)
def bfloat16(problem: Product) -> Ready:
    """`F.linear`, inputs and weights in bfloat16."""
    copies = problem.copies(problem.weight.bfloat16())
    x = problem.x.bfloat16()
    return Ready(cycling(copies, lambda w: F.linear(x, w)), stored=copies[0].nbytes)


def _int4_fits(problem: Product) -> str | None:
    if problem.group not in INT4_GROUPS:
        return f"its groups are of {', '.join(map(str, INT4_GROUPS))}"
    return _when(("int4",), FEW_ROWS)(problem)


@contestant("torch int4", "torch", Product, when=_int4_fits)
def int4(problem: Product) -> Ready:
    """`torch._weight_int4pack_mm_for_cpu`, bfloat16 inputs: w^ = (q - 8) s + z."""
    group = problem.group
    assert group is not None
    w = problem.weight.unflatten(1, (-1, group))
    low, high = w.amin(-1), w.amax(-1)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((w - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15).to(torch.int32).flatten(1)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    x, nbytes = problem.x.bfloat16(), words.nbytes + pairs.nbytes
    copies = [(words.clone(), pairs.clone()) for _ in range(problem.turns(nbytes))]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Ready(cycling(copies, lambda w: product(x, w[0], group, w[1])), stored=nbytes, note="bfloat16 inputs")


@contestant("torch int8 weight-only", "torch", Product, when=_when(("int8",), FEW_ROWS))
def int8_weight_only(problem: Product) -> Ready:
    """`torch._weight_int8pack_mm`, bfloat16 inputs."""
    codes, scale = _by_row(problem.weight)
    copies, scales, x = problem.copies(codes), scale.squeeze(1).bfloat16(), problem.x.bfloat16()
    product = torch.ops.aten._weight_int8pack_mm
    return Ready(cycling(copies, lambda w: product(x, w, scales)), stored=codes.nbytes, note="bfloat16 inputs")


@contestant("torch int8 _int_mm", "torch", Product, when=_when(("int8",)))
def int_mm(problem: Product) -> Ready:
    """Inputs rounded by row, `torch._int_mm`, and both scales, as separate operations."""
    codes, scale = _by_row(problem.weight)
    copies, column = problem.copies(codes), scale.t().contiguous()

    def product(w: Tensor) -> Tensor:
        x, scales = _by_row(problem.x)
        return torch._int_mm(x, w.t()).float().mul_(scales).mul_(column)

    return Ready(cycling(copies, product), stored=codes.nbytes, peak=INT8, note="inputs by row")


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales (rows, 1): q = round(x / s), s = max|x| / 127."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().to(torch.int8), scale


@contestant("torch qint8 dynamic", "torch", Product, when=_when(("int8",)))
def qint8(problem: Product) -> Ready:
    """`torch.ops.quantized.linear_dynamic` through oneDNN: inputs rounded for the whole tensor."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        _, scale = _by_row(problem.weight)
        zeros = torch.zeros(problem.outputs, dtype=torch.int64)
        weight = torch.quantize_per_channel(problem.weight, scale.squeeze(1).double(), zeros, 0, torch.qint8)
        nbytes = problem.weight.numel()
        prepack = torch.ops.quantized.linear_prepack
        copies = [prepack(weight, None) for _ in range(problem.turns(nbytes))]
    finally:
        torch.backends.quantized.engine = engine
    linear = torch.ops.quantized.linear_dynamic
    call = cycling(copies, lambda w: linear(problem.x, w, False))
    return Ready(call, stored=nbytes, peak=INT8, note="oneDNN; inputs by tensor")


@contestant("torch float32", "torch", Encoder)
def encoder(problem: Encoder) -> Ready:
    """transformers' model."""
    return encoder_ready(problem, problem.model(), stored=4 * problem.sizes["linear"], note="transformers' forward")


@contestant("torch qint8 dynamic", "torch", Encoder)
def encoder_qint8(problem: Encoder) -> Ready:
    """`torch.ao.quantization.quantize_dynamic` of the linear layers."""
    # it is deprecated, and still what many use
    model = torch.ao.quantization.quantize_dynamic(problem.model(), {nn.Linear}, dtype=torch.qint8)
    return encoder_ready(problem, model, stored=problem.sizes["linear"], peak=INT8)


@contestant("reading the file", "torch", Load)
def reading(problem: Load) -> Ready:
    """The weights' file read once into memory: what loading cannot be faster than. It answers nothing."""
    path = problem.artifact / SINGLE
    return Ready(path.read_bytes, stored=path.stat().st_size, answer=None)


@contestant("torch float32", "torch", Load)
def first_answer(problem: Load) -> Ready:
    """transformers' `from_pretrained` of the float weights, then one forward."""
    path = problem.folder / "model.safetensors"
    size = path.stat().st_size if path.is_file() else None

    def call() -> Tensor:
        with torch.inference_mode():
            return problem.model()(**problem.inputs).last_hidden_state

    return Ready(call, stored=size, answer=problem.pool)


@contestant("torch float32", "torch", LanguageModel)
def language_model(problem: LanguageModel) -> Ready:
    """transformers' model with its growing cache."""
    return Ready(problem.step(problem.model), stored=4 * (problem.parameters + problem.head))


@contestant("torch bfloat16", "torch", LanguageModel)
def language_model_bfloat16(problem: LanguageModel) -> Ready:
    """The same in bfloat16."""
    model = problem.twin(torch.bfloat16)
    return Ready(problem.step(model), stored=2 * (problem.parameters + problem.head))
