"""Modules are tested on the references, where what is packed and its float twin agree to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from laconic.kernels.ops import by_reference


@pytest.fixture(autouse=True)
def _references() -> Iterator[None]:
    with by_reference():
        yield
