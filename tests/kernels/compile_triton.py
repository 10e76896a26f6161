"""Compiles launches of the Triton kernels for one kind of GPU, without one: python -m tests.kernels.compile_triton 90

The kernels' own launchers are called with CPU tensors. In place of the driver stands one that only knows which GPU it
compiles for, so every launch goes through Triton's own specialization of its arguments, LLVM and ptxas, down to the
machine code that a GPU would load, and stops there. With `--all`: more schemes, and all configurations of autotuned kernels (some minutes).

Prints a JSON line for each, {"kernel", "constants", "shared", "registers", "spills"}: bytes of shared memory, registers
of a thread, bytes of registers spilled to memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from laconic.kernels.triton import fp8, int8, norm, weight_only
from laconic.numerics import Binary, Int, Levels, Scale, Scheme, Ternary

SCHEMES = [
    Scheme(Int(8), Scale("channel")),
    Scheme(Int(5), Scale("tensor"), zero="int"),
    Scheme(Int(4), Scale("group", group=128, dtype="float16")),
    Scheme(Int(4), Scale("group", group=32, dtype="bfloat16"), zero="int"),
    Scheme(Int(3), Scale("group", group=64, dtype="float16"), zero="int"),
    Scheme(Int(2), Scale("group", group=16, dtype="float16"), zero="real"),
    Scheme(Levels("nf4"), Scale("group", group=64, dtype="float16")),
    Scheme(Ternary(), Scale("channel", dtype="float16", rule="absmean")),
    Scheme(Ternary(), Scale("group", group=128, dtype="float16", rule="absmean")),
    Scheme(Binary(), Scale("group", group=128, dtype="float16", rule="absmean")),
]


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The number under which Triton keeps what it compiled."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0


def compile_launches(capability: int, every: bool) -> None:
    """Compile for a compute capability, as 90 for 9.0, and print what came of it."""
    launch, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **options):
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            constants = {name: value for name, value in options.items() if isinstance(value, int | str)}
            found = {"kernel": self.__name__, "constants": constants, "shared": compiled.metadata.shared}
            print(json.dumps(found | _used(compiled.asm["cubin"])), flush=True)
        return compiled

    def compile_each(self, *args, **options):
        for config in self.configs if every else self.configs[:1]:
            self.fn.run(*args, **options, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_only, compile_each
    triton.runtime.driver.set_active(Driver(capability))
    fp8._require = lambda device: None
    _weight_only(SCHEMES if every else SCHEMES[3:9:2], (1, 8, 16, 70) if every else (2, 70))
    _int8(SCHEMES[:4] if every else SCHEMES[1:4:2], (1, 70) if every else (70,))
    _norms((1, 640, norm.LONGEST) if every else (640,))
    if capability >= 89:
        _fp8()


def _weight_only(schemes: list[Scheme], rows: tuple[int, ...], n: int = 96, k: int = 640) -> None:
    for i, scheme in enumerate(schemes):
        operands = [
            torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in scheme.tensors(n, k).items() if name != "shape"
        ]
        codes, scale, zero = (*operands, None)[:3]
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        act = ("none", "silu", "gelu", "gelu_tanh", "relu")[i % 5]
        for m in rows:
            x, bias = torch.zeros(m, k, dtype=dtype), torch.zeros(n, dtype=dtype)
            residual = torch.zeros(m, n, dtype=dtype)
            weight_only.linear(x, codes, scale, zero, bias, residual, scheme=str(scheme), act=act)
        for tokens in (2, 40):
            index = torch.arange(tokens) % 3
            x = torch.zeros(tokens, k, dtype=dtype)
            weight_only.experts(x, index, codes, scale, zero, out=n // 3, scheme=str(scheme))
        weight_only.dequantize(codes, scale, zero, scheme=str(scheme), k=k, dtype=dtype)
        ids = torch.tensor([3, 1])
        weight_only.embedding(ids, codes, scale, zero, scheme=str(scheme), dim=k, dtype=torch.float32)


def _int8(schemes: list[Scheme], rows: tuple[int, ...], n: int = 96, k: int = 640) -> None:
    for scheme in schemes:
        codes, scale, zero = (*(torch.zeros(s, dtype=d) for d, s in scheme.tensors(n, k).values()), None)[:3]
        for m in rows:
            x, x_scale = int8.quantize_rows(torch.zeros(m, k, dtype=torch.bfloat16))
            options = {"scheme": str(scheme), "dtype": torch.bfloat16}
            int8.linear(x, x_scale, codes, scale, zero, torch.zeros(n), act="gelu", **options)
            int8.linear(x, x_scale, codes, scale, zero, out_scale=0.5, **options)


def _norms(lengths: tuple[int, ...]) -> None:
    for k in lengths:
        x, weight = torch.zeros(3, k, dtype=torch.float16), torch.zeros(k)
        norm.rms_norm(x, weight)
        norm.layer_norm(x, weight, weight, residual=x)
        norm.rms_norm(x, weight, residual=x, quantized=True)


def _fp8(n: int = 96, k: int = 640) -> None:
    for m in (1, 70):
        x, x_scale = fp8.quantize_rows(torch.zeros(m, k))
        weight, scale = fp8.quantize_rows(torch.zeros(n, k))
        fp8.linear(x, x_scale, weight, scale, torch.zeros(n), dtype=torch.bfloat16, act="silu")


def _used(cubin: bytes) -> dict[str, int]:
    """Registers and spills of the machine code, by Triton's own copy of cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {
        "registers": max(map(int, re.findall(r"REG:(\d+)", said))),
        "spills": max(map(int, re.findall(r"STACK:(\d+)", said))),
    }


if __name__ == "__main__":
    compile_launches(int(sys.argv[1]), "--all" in sys.argv)
