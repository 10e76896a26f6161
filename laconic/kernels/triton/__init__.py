"""GPU kernels in Triton for the ops of `laconic.kernels.ops`: packed weights, int8, FP8, norms.

Nothing here is needed to install, to import or to run: where triton or a GPU is missing, `status()` says which, and
PyTorch does the work. triton itself is imported by the first call with a CUDA tensor, since importing it takes as long
as importing half of torch.

    from laconic.kernels import triton
    triton.status()["why"]           # "torch finds no CUDA device"

Which kernels were run on hardware: none so far. They are tested through Triton's interpreter, which runs each program
in numpy on CPU tensors, and by compiling every launch down to machine code for three generations of GPUs, for which no
GPU is needed. So their arithmetic, their masks and their types are tested; their speed, and what only shows in parallel,
is not. `pytest -m gpu` runs the same tests on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

from laconic.kernels import native

__all__ = ["INTERPRET", "LEAST", "LEAST_FP8", "fp8_missing", "installed", "interpreted", "missing", "status"]

INTERPRET = "TRITON_INTERPRET"  # Triton's own switch; set to 1 before triton is imported, kernels run on CPU tensors
LEAST = (8, 0)  # compute capability: bfloat16 on tensor cores
LEAST_FP8 = (8, 9)  # float8_e4m3 on tensor cores


def installed() -> bool:
    """Whether triton is there to be imported, and torch could have a CUDA device; imports nothing."""
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter, on CPU tensors."""
    return os.environ.get(INTERPRET) == "1"


def missing(device: torch.device) -> str:
    """Why the kernels cannot run on tensors of this device; "" if they can."""
    if device.type == "cpu":
        if not interpreted():
            return f"tensors on the CPU need {INTERPRET}=1"
        return _load()
    if device.type != "cuda":
        return f"there are no kernels for {device.type} devices"
    return _missing_on_gpu(device.index if device.index is not None else torch.cuda.current_device())


def fp8_missing(device: torch.device) -> str:
    """Why the FP8 kernels cannot run on tensors of this device; "" if they can."""
    why = missing(device)
    if why or device.type == "cpu":
        return why
    return _too_old(torch.cuda.get_device_capability(device), LEAST_FP8, "FP8")


def status() -> dict[str, Any]:
    """What is known of the kernels on the current CUDA device, in the form of `native.status()`.

    Returns:
        present: bool; why: the reason it is missing, "" if present; compiler: triton and its version; isa: the
        device's, as "sm_90"; path of triton; fp8: why the FP8 kernels are missing, "" if they are there.
    """
    why = _load() if _gpu() else _why_no_gpu()
    found: dict[str, Any] = {"present": False, "why": why, "compiler": None, "isa": None, "path": None, "fp8": why}
    if why:
        return found
    device = torch.device("cuda", torch.cuda.current_device())
    why = missing(device)
    major, minor = torch.cuda.get_device_capability(device)
    return found | {
        "present": not why,
        "why": why,
        "compiler": f"triton {importlib.metadata.version('triton')}",
        "isa": f"sm_{major}{minor}",
        "path": importlib.import_module("triton").__file__,
        "fp8": fp8_missing(device),
    }


def _gpu() -> bool:
    return installed() and torch.cuda.is_available()


def _why_no_gpu() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; torch's CUDA builds for Linux bring it)"
    if torch.version.cuda is None:
        return "this build of torch knows no CUDA"
    return "torch finds no CUDA device"


@functools.cache
def _missing_on_gpu(index: int) -> str:
    if not installed():
        return _why_no_gpu()
    return _load() or _too_old(torch.cuda.get_device_capability(index), LEAST, "Triton")


def _too_old(found: tuple[int, int], least: tuple[int, int], what: str) -> str:
    if found >= least:
        return ""
    return f"the {what} kernels need compute capability {least[0]}.{least[1]}, this GPU has {found[0]}.{found[1]}"


@functools.cache
def _load() -> str:
    """Import triton: why it cannot be used, or ""."""
    if native.disabled():
        return f"switched off by {native.DISABLE}={os.environ[native.DISABLE]}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not load: {error}"
    return ""
