"""Before anything imports triton: where there is no GPU, its kernels are interpreted, which is decided at its import."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
