"""The compiled kernels, when they are there: loading them, saying why not, and calling them with tensors.

    from laconic.kernels import native
    if native.load() is not None:
        w = native.dequantize(words, scale, zero, group=64, bits=4, k=4096)

Each function is bit-equal to the plain PyTorch reference in `laconic.numerics`, which is the truth. The
extension `laconic.kernels._cpu` knows nothing of torch: it takes addresses and sizes, and checks every bound
again. It works without the interpreter's lock, on as many of torch's threads as `torch.get_num_threads()` says;
results do not depend on how many. Writing to fresh memory costs several times what the arithmetic does: pass `out`
where the weights are used up at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import re
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["BUILD", "DISABLE", "REQUIRE", "check", "dequantize", "disabled", "hadamard_", "load", "module", "status", "unpack"]

DISABLE = "LACONIC_DISABLE_KERNELS"  # set to 1: never load the extension
REQUIRE = "LACONIC_REQUIRE_KERNELS"  # set to 1: a build fails without a compiler, tests want the kernels
EXTENSION = "laconic.kernels._cpu"
BUILD = "LACONIC_KERNELS"  # path of another build of the extension, such as one with sanitizers

_FALSE = ("", "0", "false", "off", "no")


def load() -> ModuleType | None:
    """The extension module, or None with the reason in `status()`. Looked for once in a process."""
    return _load()[0]


def disabled() -> bool:
    """Whether compiled kernels, of whatever kind, are switched off by the environment."""
    return os.environ.get(DISABLE, "").lower() not in _FALSE


def status() -> dict[str, Any]:
    """What is known of the extension.

    Returns:
        present: bool; why: the reason it is missing, "" if present; compiler, isa ("portable", "avx2", "avx512", "neon") and
        path of the extension, None if missing.
    """
    module, why = _load()
    return {
        "present": module is not None,
        "why": why,
        "compiler": module.compiler if module is not None else None,
        "isa": module.isa() if module is not None else None,
        "path": module.__file__ if module is not None else None,
    }


def unpack(words: Tensor, bits: int, k: int, *, isa: int = -1) -> Tensor:
    """Unsigned codes (rows, k) uint8 of dense LSB-first words (rows, ceil(k*bits/32)) int32.

    Args:
        words: CPU, contiguous.
        bits: 1 to 8.
        k: codes per row.
        isa: number of the instruction set, -1 the best of this CPU; for tests.

    Raises:
        ValueError: bits, shape, type or device do not fit.
        RuntimeError: the extension is missing.
    """
    cpu = module()
    rows, columns = _check_words("unpack", words, bits, k)
    out = torch.empty((rows, k), dtype=torch.uint8)
    cpu.unpack(words.data_ptr(), words.numel(), rows, columns, bits, k, out.data_ptr(), out.numel(), 0, rows, isa)
    return out


def dequantize(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int | None,
    bits: int,
    k: int,
    *,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    threads: int | None = None,
    isa: int = -1,
) -> Tensor:
    """Weights (rows, k) float32 of packed codes: w[r, i] = (q[r, i] - z[r, i // group]) * s[r, i // group].

    Args:
        words: (rows, ceil(k*bits/32)) int32, CPU, contiguous.
        scale: (rows, G) or (1, G) float32, float16 or bfloat16; G = ceil(k / group).
        zero: of scale's shape, uint8 or one of scale's types; None: z = 2^(bits-1).
        group: codes that share a scale, the last group of a row may be short; None: the whole row (G = 1).
        bits: 1 to 8.
        k: codes per row.
        out: (rows, k) float32 to write to, so that memory can be reused; None: fresh memory.
        rows: (begin, end), the rows of `out` to write, so that a caller can shard; None: all.
        threads: at most so many; None: torch's number.
        isa: number of the instruction set, -1 the best of this CPU; for tests.

    Raises:
        ValueError: a number, shape, type or device does not fit.
        RuntimeError: the extension is missing.
    """
    cpu = module()
    n_rows, columns = _check_words("dequantize", words, bits, k)
    scale = _per_row("scale", scale, n_rows, tuple(_FLOATS))
    if zero is not None:
        zero = _per_row("zero", zero, n_rows, (torch.uint8, *_FLOATS))
        if zero.shape != scale.shape:
            raise ValueError(f"dequantize: zero has shape {tuple(zero.shape)}, scale {tuple(scale.shape)}")
    if out is None:
        out = torch.empty((n_rows, k), dtype=torch.float32)
    check("dequantize", "out", out, (torch.float32,), 2)
    if tuple(out.shape) != (n_rows, k):
        raise ValueError(f"dequantize: out has shape {tuple(out.shape)}, must be {(n_rows, k)}")
    begin, end = (0, n_rows) if rows is None else rows
    dtypes = {torch.uint8: cpu.UINT8} | {dtype: getattr(cpu, name) for dtype, name in _FLOATS.items()}
    zero_at = (zero.data_ptr(), zero.numel(), dtypes[zero.dtype]) if zero is not None else (0, 0, cpu.NONE)
    cpu.dequantize(
        words.data_ptr(), words.numel(), n_rows, columns,
        scale.data_ptr(), scale.numel(), dtypes[scale.dtype], *zero_at,
        scale.shape[1], max(k, 1) if group is None else group, bits, k,
        out.data_ptr(), out.numel(), begin, end, torch.get_num_threads() if threads is None else threads, isa,
    )  # fmt: skip
    return out


def hadamard_(x: Tensor, *, threads: int | None = None, isa: int = -1) -> Tensor:
    """x <- x H_n / sqrt(n) along the last axis, in place; returns x.

    float16 and bfloat16 are computed in float32 and rounded once, at the end.

    Args:
        x: (..., n) float32, float16 or bfloat16, CPU, contiguous, n a power of two; not one that requires grad.
        threads: at most so many; None: torch's number.
        isa: number of the instruction set, -1 the best of this CPU; for tests.

    Raises:
        ValueError: n is no power of two, or type or device do not fit.
        RuntimeError: the extension is missing.
    """
    cpu = module()
    check("hadamard_", "x", x, tuple(_FLOATS), None)
    if x.requires_grad:
        raise ValueError("hadamard_: x requires grad, and autograd would not see this; detach it first")
    n = x.shape[-1] if x.ndim else 1
    rows = x.numel() // n if n else 0
    many = torch.get_num_threads() if threads is None else threads
    dtype = getattr(cpu, _FLOATS[x.dtype])
    cpu.hadamard(x.data_ptr(), x.numel(), dtype, rows, n, float(n**-0.5) if n else 1.0, many, isa)
    return x


_FLOATS = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    if disabled():
        return None, f"switched off by {DISABLE}={os.environ[DISABLE]}"
    try:
        _share_openmp()
        if os.environ.get(BUILD):
            return _from_file(os.environ[BUILD]), ""
        return importlib.import_module(EXTENSION), ""
    except ModuleNotFoundError as error:
        if error.name != EXTENSION:
            raise
        return None, "not built: the install found no working C++20 compiler (slower, results are the same)"
    except ImportError as error:
        return None, f"built but does not load: {error}"


def _from_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(EXTENSION, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{BUILD}={path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible to the extension, which links none of its own.

    Two runtimes in a process are two pools of threads that fight for the same cores.
    """
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        loaded = {line.split(maxsplit=5)[-1].strip() for line in maps if _OPENMP.search(line)}
    for path in sorted(loaded) or ["libgomp.so.1"]:
        with contextlib.suppress(OSError):  # then importing the extension says which symbol is missing
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return


_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


def module() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is missing; the message says why.
    """
    module, why = _load()
    if module is None:
        raise RuntimeError(f"{EXTENSION} is missing ({why}); use the reference in laconic.numerics")
    return module


def check(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], ndim: int | None) -> None:
    """Refuse a tensor that a kernel cannot take.

    Args:
        op, name: for the message.
        x: must be contiguous, on the CPU.
        dtypes: one of which it must have.
        ndim: axes that it must have, or None.

    Raises:
        ValueError: saying what is wrong.
    """
    if x.dtype not in dtypes:
        raise ValueError(f"{op}: {name} is {x.dtype}, must be {' or '.join(map(str, dtypes))}")
    if x.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {x.device}, this kernel runs on the CPU; move it there")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, must have {ndim} axes")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} of shape {tuple(x.shape)} is not contiguous; call .contiguous()")


def _check_words(op: str, words: Tensor, bits: int, k: int) -> tuple[int, int]:
    """Shape of the words, checked (before memory is asked for) to be what k codes of these bits fill."""
    check(op, "words", words, (torch.int32,), 2)
    rows, columns = words.shape
    if not 1 <= bits <= 8:
        raise ValueError(f"{op}: bits is {bits}, must be 1 to 8")
    if k < 0 or columns != -(-k * bits // 32):
        raise ValueError(f"{op}: words has {columns} per row, but {k} codes of {bits} bits fill {-(-k * bits // 32)}")
    return rows, columns


def _per_row(name: str, x: Tensor, rows: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """(rows, G) from (rows, G), or from the one row (1, G) of a scale per tensor."""
    if x.ndim == 2 and x.shape[0] == 1 and rows != 1:
        x = x.expand(rows, x.shape[1]).contiguous()
    check("dequantize", name, x, dtypes, 2)
    if x.shape[0] != rows:
        raise ValueError(f"dequantize: {name} has {x.shape[0]} rows, words have {rows}")
    return x
