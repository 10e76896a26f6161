"""Fixtures shared by the tests of tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from laconic.errors import BadInput
from laconic.tasks.fetch import fetch


@pytest.fixture
def fetched() -> Callable[[str], Path]:
    """Fetch by name; the test is skipped only where the cache lacks it and there is no network."""

    def get(name: str) -> Path:
        try:
            return fetch(name)
        except BadInput as error:
            pytest.skip(f"{name} is not in the cache and could not be fetched: {error}")

    return get
