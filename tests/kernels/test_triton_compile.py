"""The Triton kernels down to machine code for GPUs that are not here: what the interpreter cannot see.

Types that do not agree, shapes that no tensor core takes, kernels that need more shared memory than a GPU has, or more
registers: all this shows when a kernel is compiled, for which Triton brings what it needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from laconic.kernels.triton import INTERPRET
from tests.kernels.triton_road import HAVE_TRITON, NO_TRITON

KERNELS = {"_gemv", "_gemm", "_reduce", "_rows", "_int8_gemm", "_quantize_rows", "_fused_norm"}
# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_TRITON, reason=NO_TRITON)
@pytest.mark.parametrize("capability", SHARED)
def test_compiles(capability, tmp_path):
    environment = {name: v for name, v in os.environ.items() if name != INTERPRET} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {x["kernel"] for x in found} == KERNELS | ({"_fp8_gemm"} if capability >= 89 else set())
    for kernel in found:
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["spills"] == 0, kernel
