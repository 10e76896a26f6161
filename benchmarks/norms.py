"""LayerNorm and RMSNorm of laconic against torch's operations, alternating in one run.

    python benchmarks/norms.py [--rounds 15] [--shapes 1x384 1x2048 32x384 128x2048 4096x768]
                               [--dtypes float32 bfloat16] [--clock cpu] [--out FILE]

A shape is ROWSxWIDTH. For each: a norm; the residual added before it; the rounding to 8 bits after it (against the same
in torch's operations); forward and backward. `op` is the registered operation, `call` the function behind it, which
autograd does not see. Prints how many times faster, with an interval, and writes a JSON record.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from alternate import CLOCKS, alternate, setting
from torch import Tensor

from laconic.kernels.norm import forward

laconic = torch.ops.laconic
EPS = 1e-5


def add_norm(function, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return function(s), s


def rounded(function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = function(x)
    scale = 2 * y.float().abs().amax(-1, keepdim=True) / 255
    return y, (y / scale).round().clamp(-128, 127).to(torch.int8), scale


def train(function, x: Tensor, parameters: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(function(x), [x, *parameters], grad)


def pairs(kind: str, m: int, d: int, dtype: torch.dtype) -> dict[str, dict]:
    """what -> {"torch": callable, "laconic": callable}."""
    x, residual, grad = (torch.randn(m, d).to(dtype) for _ in range(3))
    w, b = torch.randn(d).to(dtype), torch.randn(d).to(dtype)
    affine = [w, b] if kind == "layer_norm" else [w]
    if kind == "layer_norm":
        theirs = partial(F.layer_norm, normalized_shape=(d,), weight=w, bias=b, eps=EPS)
    else:
        theirs = partial(F.rms_norm, normalized_shape=(d,), weight=w, eps=EPS)
    op = partial(getattr(laconic, kind), eps=EPS)
    call = {"centred": kind == "layer_norm", "eps": EPS}
    given = (w, b if kind == "layer_norm" else None)
    trained = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in affine)]
    if kind == "layer_norm":
        their_training = partial(F.layer_norm, normalized_shape=(d,), weight=trained[1], bias=trained[2], eps=EPS)
    else:
        their_training = partial(F.rms_norm, normalized_shape=(d,), weight=trained[1], eps=EPS)
    return {
        "norm": {
            "torch": partial(theirs, x), "op": partial(op, x, *affine), "call": partial(forward, x, None, *given, **call)
        },
        "add, norm": {
            "torch": partial(add_norm, theirs, x, residual),
            "op": partial(getattr(laconic, "add_" + kind), x, residual, *affine, eps=EPS),
            "call": partial(forward, x, residual, *given, **call),
        },
        "norm, 8 bits": {
            "torch": partial(rounded, theirs, x), "op": partial(getattr(laconic, kind + "_int8"), x, *affine, eps=EPS)
        },
        "forward, backward": {
            "torch": partial(train, their_training, trained[0], trained[1:], grad),
            "op": partial(train, lambda given: op(given, *trained[1:]), trained[0], trained[1:], grad),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=["1x384", "1x2048", "32x384", "128x2048", "4096x768"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine, one thread")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    record = {"setting": setting(), "rounds": options.rounds, "clock": options.clock, "cases": []}
    for name in options.dtypes:
        for shape in options.shapes:
            m, d = (int(size) for size in shape.split("x"))
            for kind in ("layer_norm", "rms_norm"):
                for what, runs in pairs(kind, m, d, getattr(torch, name)).items():
                    with torch.inference_mode(mode="backward" not in what):
                        found = alternate(runs, "torch", options.rounds, options.clock)
                    told = ", ".join(
                        f"{other} {row['faster']:.2f} x [{row['faster_low']:.2f}, {row['faster_high']:.2f}]"
                        for other, row in found.items()
                        if other != "torch"
                    )
                    print(
                        f"{name} {shape} {kind} {what}: torch {found['torch']['microseconds']:.1f} us; {told}",
                        flush=True,
                    )
                    record["cases"].append({"shape": [m, d], "dtype": name, "kind": kind, "what": what, "found": found})
                    if options.out is not None:
                        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
