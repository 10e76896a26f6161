"""What this machine and this install can do, and whether it does it right: `laconic doctor`.

    report = diagnose()      # plain data, ready for JSON
    checks = self_test()     # each kernel and each op against its reference, on odd shapes
    render(Console(), report, checks)

A doctor that dies at the patient's bedside is no use: nothing here raises. What could not be found out is
reported as `{"error": "..."}` in its place; a check that broke has failed, with the error as its detail.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["OPTIONAL", "TESTED", "Check", "diagnose", "render", "self_test"]

# The versions that this version of laconic was tested with; the same as in constraints.txt.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "accelerate": "1.15.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
}

# Module that need not be there -> (package, what it is for).
OPTIONAL = {
    "gguf": ("gguf", "tokenizers of GGUF files, K-quants, and families of GGUF that laconic does not read by itself"),
    "sentencepiece": ("sentencepiece", "tokenizers of T5, Llama and their kin that ship no tokenizer.json"),
    "h5py": ("h5py", "reading the weights of the task cifar-cnn"),
    "PIL": ("pillow", "image data: folders of pictures, image processors"),
    "pyarrow": ("pyarrow", "data in Parquet files"),
    "onnx": ("onnx", "laconic export --to onnx"),
    "onnxscript": ("onnxscript", "laconic export --to onnx"),
    "ray": ("ray", "laconic compress --distribute ray:N"),
    "peft": ("peft", "training PEFT's adapters over packed layers"),
    "sklearn": ("scikit-learn", "the linear probe of the task minilm-bbc"),
}

# Every op that is registered with torch as `laconic::NAME`.
OPS = (
    "linear", "embedding", "conv", "experts", "experts_input_grad", "dequantize", "sparse_linear", "sparse_dense",
    "binary_linear", "bit_serial_linear", "binary_conv2d", "int8_conv2d", "decode_attention", "cache_append_",
)  # fmt: skip
ON_GPU = ("linear", "embedding", "conv", "experts", "dequantize", "sparse_linear", "sparse_dense")  # of these, with kernels

# Ops that share one kernel, which the check "C++: norms" tries.
NORMS = (
    "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "layer_norm_int8", "rms_norm_int8", "add_layer_norm_int8",
    "add_rms_norm_int8", "norm_backward",
)  # fmt: skip

State = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing tried.

    Attributes:
        name: what was tried.
        state: "passed", "failed" or "skipped" (it is not there to be tried).
        detail: what was compared, what went wrong, or why it was skipped.
        seconds: how long it took.
    """

    name: str
    state: State
    detail: str
    seconds: float


class _Skipped(Exception):
    """Raised by a check for what is not there to be tried; the message says why."""


def diagnose() -> dict[str, Any]:
    """What is here, as plain data.

    Returns:
        versions: package -> {"found": str | None, "tested": str | None}; machine: system, cpu, isa, cores,
        threads; memory: total_bytes, available_bytes; devices: accelerators; kernels: [{"name", "present",
        "why", ...}]; optional: [{"package", "present", "for"}]; programs: found on PATH; cache: folder,
        bytes, writable, fetched; environment: the LACONIC_* variables that are set. A section that failed is
        {"error": str}.
    """
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "machine": _machine,
        "memory": _memory,
        "devices": _devices,
        "kernels": _kernels,
        "optional": _optional,
        "programs": _programs,
        "cache": _cache,
        "environment": _environment,
    }
    return {name: _attempt(section) for name, section in sections.items()}


def self_test() -> list[Check]:
    """Try everything that computes, against its reference; in a second or two."""
    return [_check(name, run) for name, run in _CHECKS.items()]


def render(console: Console, report: dict[str, Any] | None = None, checks: Sequence[Check] | None = None) -> None:
    """Print a diagnosis and a self-test, made now where they are not given."""
    report = diagnose() if report is None else report
    checks = self_test() if checks is None else checks
    broken = {name: x["error"] for name, x in report.items() if isinstance(x, dict) and "error" in x}
    parts: dict[Callable[[Console, dict[str, Any]], None], tuple[str, ...]] = {
        _print_machine: ("machine", "memory", "devices", "cache", "programs", "environment"),
        _print_versions: ("versions",),
        _print_kernels: ("kernels",),
        _print_optional: ("optional",),
    }
    for print_part, needs in parts.items():
        if not any(name in broken for name in needs):
            print_part(console, report)
    for name, error in broken.items():
        console.print(f"{name} could not be found out: {error}", style="red", markup=False)
    _print_checks(console, checks)


# --- what is here -------------------------------------------------------------------------------------------


def _versions() -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = {
        "python": {"found": platform.python_version(), "tested": None},
        "laconic": {"found": _version("laconic"), "tested": None},
    }
    return found | {name: {"found": _version(name), "tested": tested} for name, tested in TESTED.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(package)  # run from the source tree, without an install
        return getattr(module, "__version__", None)


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> dict[str, int | None]:
    info = Path("/proc/meminfo")
    if info.is_file():
        pairs = (line.split(":") for line in info.read_text().splitlines() if ":" in line)
        kilobytes = {name: int(value.split()[0]) for name, value in pairs}
        return {
            "total_bytes": kilobytes["MemTotal"] * 1024,
            "available_bytes": kilobytes.get("MemAvailable", kilobytes["MemFree"]) * 1024,
        }
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"total_bytes": total, "available_bytes": None}
    return {"total_bytes": None, "available_bytes": None}


def _devices() -> list[dict[str, Any]]:
    import torch

    return [
        {"name": torch.cuda.get_device_name(i), "bytes": torch.cuda.get_device_properties(i).total_memory}
        for i in range(torch.cuda.device_count())
    ]


def _kernels() -> list[dict[str, Any]]:
    from laconic.kernels import native, triton

    return [
        {"name": "C++ (packed and sparse weights, norms, caches, bits)", **native.status()},
        {"name": "Triton (packed weights, int8, FP8, norms)", **triton.status()},
    ]


def _optional() -> list[dict[str, Any]]:
    return [
        {"package": package, "present": importlib.util.find_spec(module) is not None, "for": purpose}
        for module, (package, purpose) in OPTIONAL.items()
    ]


def _programs() -> dict[str, bool]:
    return {name: shutil.which(name) is not None for name in ("npm", "c++", "cmake")}


def _cache() -> dict[str, Any]:
    from laconic.tasks.fetch import PACKAGES, cache_folder, is_fetched

    folder = cache_folder()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    return {
        "folder": str(folder),
        "writable": os.access(nearest, os.W_OK),
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0,
        "fetched": [name for name in PACKAGES if is_fetched(name)],
    }


def _environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("LACONIC_")}


def _attempt(section: Callable[[], Any]) -> Any:
    try:
        return section()
    except Exception as error:  # whatever a broken install throws is itself the finding
        return {"error": f"{type(error).__name__}: {error}"}


# --- whether it does it right -------------------------------------------------------------------------------

_SHAPES = ((1, 1), (3, 33), (2, 63), (5, 257), (1, 4133), (0, 64))  # rows, k


def _reference_round_trip() -> str:
    import torch

    from laconic.numerics import pack, unpack

    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        for rows, k in _SHAPES:
            codes = torch.randint(0, 2**bits, (rows, k), dtype=torch.uint8, generator=generator)
            if not torch.equal(unpack(pack(codes, bits), bits, k), codes):
                raise AssertionError(f"{bits} bits, shape {(rows, k)}: codes changed on the way")
    return f"1 to 8 bits, {len(_SHAPES)} shapes"


def _native() -> Any:
    from laconic.kernels import native

    if native.load() is None:
        raise _Skipped(native.status()["why"])
    return native


def _native_unpack() -> str:
    import torch

    from laconic.numerics import unpack

    native = _native()
    for bits in range(1, 9):
        for rows, k in _SHAPES:
            words = _words(rows, bits, k)
            if not torch.equal(native.unpack(words, bits, k), unpack(words, bits, k)):
                raise AssertionError(f"{bits} bits, shape {(rows, k)}: not equal to laconic.numerics.unpack")
    return f"bit-equal to the reference: 1 to 8 bits, {len(_SHAPES)} shapes"


def _native_dequantize() -> str:
    import torch

    from laconic.numerics import Int, Scale, Scheme, dequantize, unpack

    native = _native()
    cases = 0
    for bits in range(2, 9):
        for rows, k in _SHAPES:
            for zero, dtype in (("none", "float32"), ("int", "float16"), ("real", "bfloat16")):
                scheme = Scheme(Int(bits), Scale("group", group=32, dtype=dtype), zero=zero)
                words, shape = _words(rows, bits, k), (rows, scheme.scale.groups(k))
                ramp = torch.linspace(0.001, 1.0, shape[0] * shape[1]).view(shape)
                scale = ramp.to(scheme.scale.torch_dtype)
                zeros = {"none": None, "int": torch.full(shape, 3, dtype=torch.uint8), "real": scale}[zero]
                got = native.dequantize(words, scale, zeros, scheme.scale.group_of(k), bits, k)
                if not torch.equal(got, dequantize(unpack(words, bits, k), scale, zeros, scheme)):
                    raise AssertionError(f"{scheme}, {(rows, k)}: not equal to laconic.numerics.dequantize")
                cases += 1
    return f"bit-equal to the reference: {cases} schemes and shapes"


def _native_hadamard() -> str:
    import torch

    from laconic.numerics import hadamard

    native = _native()
    lengths = (1, 2, 8, 64, 4096, 8192)
    for n in lengths:
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
        if not torch.equal(native.hadamard_(x.clone()), hadamard(x)):
            raise AssertionError(f"length {n}: not equal to laconic.numerics.hadamard")
    return f"bit-equal to the reference: lengths {', '.join(map(str, lengths))}"


def _native_norms() -> str:
    import torch

    from laconic.kernels import norm

    _native()
    shapes = ((1, 1), (3, 33), (5, 257), (2, 4133))
    for centred in (True, False):
        for shape in shapes:
            generator = torch.Generator().manual_seed(shape[1])
            x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
            weight = torch.linspace(0.5, 1.5, shape[1])
            got = norm.forward(x, residual, weight, None, centred=centred, eps=1e-5)
            want = norm.reference(x, residual, weight, None, centred=centred, eps=1e-5)
            for a, b in zip(got, want, strict=True):
                if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
                    raise AssertionError(f"{'LayerNorm' if centred else 'RMSNorm'} of {shape}: not the reference's")
    return f"LayerNorm and RMSNorm, with the sum before: {len(shapes)} shapes"


def _triton_ops() -> str:
    from laconic.kernels import triton
    from laconic.nn.check_ops import check_op

    status = triton.status()
    if not status["present"]:
        raise _Skipped(status["why"])
    return "; ".join(f"{name}: {check_op(name, 'cuda')}" for name in ON_GPU)


def _words(rows: int, bits: int, k: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(bits * 10_000 + k)
    return torch.randint(-(2**31), 2**31, (rows, -(-k * bits // 32)), generator=generator).to(torch.int32)


def _op(name: str) -> str:
    from laconic.nn.check_ops import check_op

    return check_op(name)


_CHECKS: dict[str, Callable[[], str]] = {
    "reference: pack and unpack": _reference_round_trip,
    "C++: unpack": _native_unpack,
    "C++: dequantize": _native_dequantize,
    "C++: hadamard": _native_hadamard,
    "C++: norms": _native_norms,
    "Triton: ops on the GPU": _triton_ops,
    **{f"op: {name}": functools.partial(_op, name) for name in OPS},
}


def _check(name: str, run: Callable[[], str]) -> Check:
    begin = time.perf_counter()
    state: State = "passed"
    try:
        detail = run()
    except _Skipped as why:
        state, detail = "skipped", str(why)
    except Exception as error:  # a check that breaks has failed; the others still run
        known = isinstance(error, AssertionError)
        state, detail = "failed", str(error) if known else f"{type(error).__name__}: {error}"
    return Check(name, state, detail, time.perf_counter() - begin)


# --- what is printed ----------------------------------------------------------------------------------------

_MARKS = {"passed": "[green]passed[/]", "failed": "[bold red]FAILED[/]", "skipped": "[yellow]skipped[/]"}


def _print_machine(console: Console, report: dict[str, Any]) -> None:
    machine, memory, cache = report["machine"], report["memory"], report["cache"]
    table = Table(title="Machine", show_header=False, title_justify="left")
    table.add_row("cpu", f"{machine['cpu']} ({machine['architecture']}, torch uses {machine['isa']})")
    table.add_row("cores", f"{machine['cores']}, torch uses {machine['threads']} threads")
    total, free = _size(memory["total_bytes"]), _size(memory["available_bytes"])
    table.add_row("memory", f"{total}, of which {free} free")
    names = ", ".join(f"{d['name']} ({_size(d['bytes'])})" for d in report["devices"])
    table.add_row("accelerators", names or "none (none is needed)")
    writable = "" if cache["writable"] else ", not writable: set LACONIC_CACHE to a folder that is"
    fetched = ", ".join(cache["fetched"]) or "nothing yet"
    table.add_row("cache", f"{escape(cache['folder'])} ({_size(cache['bytes'])}: {fetched}{writable})")
    if not report["programs"]["npm"]:
        table.add_row("npm", "not found: sotu, moby-dick and cifar10 cannot be fetched without it")
    for name, value in report["environment"].items():
        table.add_row(name, escape(value))
    console.print(table)


def _print_versions(console: Console, report: dict[str, Any]) -> None:
    table = Table("package", "found", "tested with", title="Versions", title_justify="left")
    for name, version in report["versions"].items():
        same = version["tested"] is None or _minor(version["found"]) == _minor(version["tested"])
        found = version["found"] or "[red]missing[/]"
        table.add_row(name, found if same else f"[yellow]{found}[/]", version["tested"] or "")
    console.print(table)


def _print_kernels(console: Console, report: dict[str, Any]) -> None:
    table = Table("kernels", "", "", title="Kernels", title_justify="left")
    for kernel in report["kernels"]:
        if kernel["present"]:
            how = f"{kernel['isa']}, built by {kernel['compiler']}"
            if kernel.get("fp8"):
                how += f"; {kernel['fp8']}"
            table.add_row(kernel["name"], "[green]present[/]", how)
        else:
            why = f"{kernel['why']}; PyTorch does the work instead"
            table.add_row(kernel["name"], "[yellow]missing[/]", escape(why))
    console.print(table)


def _print_optional(console: Console, report: dict[str, Any]) -> None:
    table = Table("package", "", "for", title="Optional packages", title_justify="left")
    for extra in report["optional"]:
        mark = "[green]present[/]" if extra["present"] else "[yellow]missing[/]"
        table.add_row(extra["package"], mark, extra["for"])
    console.print(table)
    if not all(extra["present"] for extra in report["optional"]):
        console.print("The missing ones come with: pip install 'laconic[tasks,interop]'", markup=False)


def _print_checks(console: Console, checks: Sequence[Check]) -> None:
    table = Table("self-test", "", "detail", title="Self-test", title_justify="left")
    for check in checks:
        table.add_row(check.name, _MARKS[check.state], escape(check.detail))
    console.print(table)


def _minor(version: str | None) -> str:
    return ".".join((version or "").split(".")[:2])


def _size(n: int | None) -> str:
    if n is None:
        return "unknown"
    amount = float(n)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
