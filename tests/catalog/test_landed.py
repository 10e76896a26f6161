"""The cards of this source tree: all in order, finished, and as the code is; public names resolve and load lazily."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import laconic
from laconic.catalog import problems, read
from laconic.catalog.source import read_stub
from laconic.core.card import FAMILIES

PACKAGE = Path(laconic.__file__).parent


def test_every_card_is_in_order():
    assert problems() == []
    assert len(read()) > 5


def test_no_card_is_a_skeleton():
    unfinished = [found.id for found in read() if "TODO" in repr(found.card) or "TODO" in found.docstring]
    assert unfinished == []


def test_cards_say_when_to_use_a_method_and_when_not():
    silent = [found.id for found in read() if not (found.card.use and found.card.avoid)]
    assert silent == []


def test_what_a_card_reads_is_what_the_module_has():
    for found in read():
        module = importlib.import_module(f"laconic.{found.card.family}._{found.id}")
        assert found.card == module.CARD
        assert found.docstring == inspect.cleandoc(module.__doc__)


@pytest.mark.parametrize("family", FAMILIES)
def test_public_names_resolve(family):
    module = importlib.import_module(f"laconic.{family}")
    names = read_stub(PACKAGE / family / "__init__.pyi")
    assert set(module.__all__) == set(names) == set(dir(module))
    for name in names:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.not_a_name  # noqa: B018


def test_the_root_resolves_too():
    for name in laconic.__all__:
        assert getattr(laconic, name) is not None
    assert set(FAMILIES) <= set(laconic.__all__)


def test_importing_laconic_and_a_family_loads_no_torch():
    code = "import sys, laconic; laconic.norm, laconic.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
