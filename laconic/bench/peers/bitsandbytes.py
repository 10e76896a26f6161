"""bitsandbytes: its NF4 and int8 linear layers on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from laconic.bench.contest import Ready, contestant, cycling
from laconic.bench.machine import INT8
from laconic.bench.problems import LanguageModel, Product

__all__: list[str] = []

NEEDS = ("bitsandbytes",)
BLOCK = 64  # weights that share a scale by default


def _stores(kind: str) -> Callable[[Any], str | None]:
    def when(problem: Product | LanguageModel) -> str | None:
        return None if problem.weights == kind else f"stores {kind} weights alone"

    return when


def _nf4(weight: torch.Tensor) -> nn.Module:
    import bitsandbytes

    n, k = weight.shape
    how = {"quant_type": "nf4", "compress_statistics": False}
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, **how)
    layer.weight = bitsandbytes.nn.Params4bit(weight.bfloat16(), requires_grad=False, **how)
    return layer.to("cpu").eval()  # which is when it packs


def _inferring(call: Any) -> Any:
    def inside() -> Any:
        with torch.inference_mode():
            return call()

    return inside


@contestant("bitsandbytes NF4", "bitsandbytes", Product, needs=NEEDS, when=_stores("int4"))
def nf4(problem: Product) -> Ready:
    """`Linear4bit`, NF4 in blocks of 64, bfloat16 inputs."""
    nbytes = problem.weight.numel() * (0.5 + 4 / BLOCK)
    first = _nf4(problem.weight)
    layers = [first, *(copy.deepcopy(first) for _ in range(problem.turns(nbytes) - 1))]
    x = problem.x.bfloat16()
    call = _inferring(cycling(layers, lambda layer: layer(x)))
    return Ready(call, nbytes, note=f"blocks of {BLOCK}, bfloat16 inputs")


@contestant("bitsandbytes int8", "bitsandbytes", Product, needs=NEEDS, when=_stores("int8"))
def int8(problem: Product) -> Ready:
    """`Linear8bitLt`: int8 by int8, inputs by row."""
    import bitsandbytes

    first = bitsandbytes.nn.Linear8bitLt(problem.inputs, problem.outputs, bias=False, has_fp16_weights=False)
    first.load_state_dict({"weight": problem.weight})
    first = first.to("cpu").eval()
    layers = [first, *(copy.deepcopy(first) for _ in range(problem.turns(problem.weight.numel()) - 1))]
    x = problem.x.bfloat16()
    call = _inferring(cycling(layers, lambda layer: layer(x)))
    return Ready(call, problem.weight.numel(), peak=INT8, note="inputs by row")


@contestant("bitsandbytes NF4", "bitsandbytes", LanguageModel, needs=NEEDS, when=_stores("int4"))
def language_model(problem: LanguageModel) -> Ready:
    """`Linear4bit` in place of every linear layer of transformers' model in bfloat16."""
    model, stored = problem.twin(torch.bfloat16), 0.0
    for path, linear in LanguageModel.linears(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _nf4(linear.weight.detach()))
        stored += linear.weight.numel() * (0.5 + 4 / BLOCK)
    return Ready(problem.step(model), stored, note=f"blocks of {BLOCK}, bfloat16")
