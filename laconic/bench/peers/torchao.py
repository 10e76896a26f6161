"""torchao: its configurations for the CPU, applied as its documentation does, with `quantize_`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from laconic.bench.contest import Ready, contestant, cycling
from laconic.bench.machine import INT8
from laconic.bench.ours import encoder_ready
from laconic.bench.problems import Encoder, LanguageModel, Product

__all__: list[str] = []

NEEDS = ("torchao",)
INT4_GROUPS = (32, 64, 128, 256)


def _quantize(model: nn.Module, config: Callable[[], Any]) -> nn.Module:
    # it tells of the extensions for GPUs that it lacks
    from torchao.quantization import quantize_

    quantize_(model, config())
    return model


def _inferring(call: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with torch.inference_mode():
            return call()

    return inside


def _linear(problem: Product, config: Callable[[], Any], nbytes: float, dtype: torch.dtype, **given: Any) -> Ready:
    first = nn.Linear(problem.inputs, problem.outputs, bias=False, dtype=dtype)
    first.weight = nn.Parameter(problem.weight.to(dtype), requires_grad=False)
    _quantize(first, config)
    copies = [first, *(copy.deepcopy(first) for _ in range(problem.turns(nbytes) - 1))]
    x = problem.x.to(dtype)
    return Ready(_inferring(cycling(copies, lambda layer: layer(x))), stored=nbytes, **given)


def _int8_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _int4(group: int) -> Callable[[], Any]:
    def config() -> Any:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)

    return config


def _stores_int8(problem: Product) -> str | None:
    return None if problem.weights == "int8" else "stores int8 weights alone"


def _stores_int4(problem: Product) -> str | None:
    if problem.weights != "int4" or problem.group not in INT4_GROUPS:
        return f"stores int4 weights in groups of {', '.join(map(str, INT4_GROUPS))} alone"
    return None


@contestant("torchao int8 weight-only", "torchao", Product, needs=NEEDS, when=_stores_int8)
def int8_weight_only(problem: Product) -> Ready:
    """`Int8WeightOnlyConfig`, bfloat16 inputs."""
    nbytes = problem.weight.numel() + 4 * problem.outputs
    return _linear(problem, _int8_weights, nbytes, torch.bfloat16, note="bfloat16 inputs")


@contestant("torchao int8 dynamic", "torchao", Product, needs=NEEDS, when=_stores_int8)
def int8_dynamic(problem: Product) -> Ready:
    """`Int8DynamicActivationInt8WeightConfig`."""
    nbytes = problem.weight.numel() + 4 * problem.outputs
    return _linear(problem, _int8_dynamic, nbytes, torch.float32, peak=INT8, note="inputs by row")


@contestant("torchao int4", "torchao", Product, needs=NEEDS, when=_stores_int4)
def int4(problem: Product) -> Ready:
    """`PrototypeInt4WeightOnlyConfig`, which is what torchao has for int4 on a CPU; bfloat16 inputs."""

    assert problem.group is not None
    nbytes = problem.weight.numel() * (0.5 + 4 / problem.group)
    return _linear(
        problem, _int4(problem.group), nbytes, torch.bfloat16, note="bfloat16 inputs; a prototype of torchao"
    )


@contestant("torchao int8 weight-only", "torchao", Encoder, needs=NEEDS)
def encoder_int8_weights(problem: Encoder) -> Ready:
    """`Int8WeightOnlyConfig`."""
    model = _quantize(problem.model(), _int8_weights)
    return encoder_ready(problem, model, stored=problem.sizes["linear"])


@contestant("torchao int8 dynamic", "torchao", Encoder, needs=NEEDS)
def encoder_int8_dynamic(problem: Encoder) -> Ready:
    """`Int8DynamicActivationInt8WeightConfig`."""
    model = _quantize(problem.model(), _int8_dynamic)
    return encoder_ready(problem, model, stored=problem.sizes["linear"], peak=INT8)


@contestant(
    "torchao int4", "torchao", LanguageModel, needs=NEEDS,
    when=lambda problem: None if problem.weights == "int4" else "stores int4 weights alone",
)  # fmt: skip
def language_model_int4(problem: LanguageModel) -> Ready:
    """`PrototypeInt4WeightOnlyConfig` on transformers' model in bfloat16."""
    model = _quantize(problem.twin(torch.bfloat16), _int4(problem.group))
    stored = (problem.parameters + problem.head) * (0.5 + 4 / problem.group)
    return Ready(problem.step(model), stored=stored, note="bfloat16; a prototype of torchao")
