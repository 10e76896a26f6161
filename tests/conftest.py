"""Before anything imports triton: where there is no GPU, its kernels are interpreted, which is decided at its import.

Processes of one run share the cores: each gets its part of them as torch's threads, and so do those that it starts.
"""

from __future__ import annotations

import os
from typing import Any

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch  # noqa: E402 - its threads are counted when it is imported

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The longest first: whoever gets one at the end keeps all others waiting."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
