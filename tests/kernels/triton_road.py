"""The two roads on which the tests of Triton kernels run: by interpretation on the CPU, or compiled on a GPU.

Triton decides at its import which one a process takes, so of the two variants of each test one is skipped and says why:
`pytest -m gpu` runs those that need a GPU, and only them.

The interpreter works in numpy, which has neither bfloat16 nor float8; where it makes do, it is wrong: it rounds float32
to bfloat16 towards zero, takes the bits of bfloat16 for integers in a dot, and loses the carry when it rounds to float8.
`mend` puts torch's conversions there, which are those of the hardware.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from laconic.kernels.triton import LEAST, interpreted

HAVE_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "triton is not installed"

ROADS = ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)]


def device_of(road: str) -> torch.device:
    """The device on which to test, or a skip that says why not."""
    if not HAVE_TRITON:
        pytest.skip(NO_TRITON)
    if road == "interpreter":
        if not interpreted():
            pytest.skip("there is a GPU, and triton compiles for it: set TRITON_INTERPRET=1 to interpret instead")
        mend()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if interpreted():
        pytest.skip("TRITON_INTERPRET=1: triton interprets instead of compiling for the GPU")
    if torch.cuda.get_device_capability() < LEAST:
        pytest.skip(f"the GPU is older than compute capability {LEAST[0]}.{LEAST[1]}")
    return torch.device("cuda")


def mend() -> None:
    """Give the interpreter the hardware's conversions; once."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "mended"):
        return
    types = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
    types[tl.float8e4nv] = torch.float8_e4m3fn
    bits = {torch.bfloat16: (torch.int16, np.uint16), torch.float8_e4m3fn: (torch.uint8, np.uint8)}

    def convert(source, target):
        """numpy data of type `target` from a handle, through torch."""
        given, wanted = types[source.dtype.scalar], types[target]
        data = np.ascontiguousarray(source.data)
        tensor = torch.from_numpy(data.view(np.int16) if data.dtype == np.uint16 else data)
        tensor = (tensor.view(given) if given in bits else tensor).to(wanted)
        if wanted in bits:
            return tensor.view(bits[wanted][0]).numpy().view(bits[wanted][1])
        return tensor.numpy()

    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def mended_cast(self, src, dst_type):
        if src.dtype.scalar in types and dst_type.scalar in types:
            return handle(convert(src, dst_type.scalar), dst_type.scalar)
        return cast(self, src, dst_type)

    def mended_fp_to_fp(self, src, dst_type, rounding_mode):
        if src.dtype.scalar in types and dst_type.scalar in types:
            return handle(convert(src, dst_type.scalar), dst_type.scalar)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def mended_dot(self, a, b, d, *options):
        narrow = (tl.bfloat16, tl.float8e4nv)
        a = handle(convert(a, tl.float32), tl.float32) if a.dtype.scalar in narrow else a
        b = handle(convert(b, tl.float32), tl.float32) if b.dtype.scalar in narrow else b
        return dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = mended_cast, mended_fp_to_fp, mended_dot
    builder.mended = True
