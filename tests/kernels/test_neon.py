"""The NEON kernels, compiled for AArch64 and run under qemu, against the portable ones (tests/native/compare.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("make", "aarch64-linux-gnu-g++", "qemu-aarch64")
MISSING = [name for name in TOOLS if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif("LACONIC_NEON" not in os.environ, reason="compiles for minutes: make neon, or LACONIC_NEON=1")
@pytest.mark.skipif(bool(MISSING), reason=f"not found: {', '.join(MISSING)}")
def test_neon_kernels_equal_the_portable_ones(tmp_path: Path):
    command = ["make", "--silent", "-j2", "neon", f"NEON={tmp_path}", "NEON_CASES=40"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "neon against portable:" in ran.stdout
