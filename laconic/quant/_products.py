"""`fast_products`: float32 matrix products by the faster of torch's two libraries, where it multiplies in float32 too.

Torch gives float32 products on CPUs to MKL, unless it may round factors to bfloat16: then to oneDNN. But oneDNN rounds
only where the CPU has units that make rounding faster (AMX), and elsewhere multiplies in float32, on CPUs that are not
Intel's about twice as fast as MKL. So with the permission given a product is tried once: where digits beyond bfloat16
are lost, or the library is absent, everything stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# Enough for a product to be worth oneDNN's while.
TRIED = 256


_barred = 0


@contextmanager
def no_fast_products() -> Iterator[None]:
    """Until the end of the block, `fast_products` changes nothing: oneDNN keeps hundreds of megabytes for later use."""
    global _barred
    _barred += 1
    try:
        yield
    finally:
        _barred -= 1


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 products on the CPU take the faster way, in this process, until the end of the block."""
    options = _options()
    if options is None or _barred or not _still_float32():
        yield
        return
    before = options.fp32_precision
    options.fp32_precision = "bf16"
    try:
        yield
    finally:
        options.fp32_precision = before


def _options() -> Any:
    """Torch's settings of oneDNN's products, None where this build has none."""
    return getattr(torch.backends.mkldnn, "matmul", None) if torch.backends.mkldnn.is_available() else None


@cache
def _still_float32() -> bool:
    """Whether products with the permission to round keep the digits that rounding would drop."""
    options = _options()
    fine = torch.full((TRIED, TRIED), 1 + 2.0**-12)  # 1 in bfloat16
    before = options.fp32_precision
    options.fp32_precision = "bf16"
    try:
        product = fine @ fine
    finally:
        options.fp32_precision = before
    return bool(torch.allclose(product.double(), fine.double() @ fine.double(), rtol=1e-6, atol=0))


CARD = None  # methods share this; it is none itself
