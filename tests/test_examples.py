"""The examples in docstrings run and print what they say, and every landed method has one: its page shows it."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

from docs.markdown import PROMPT
from docs.methods import shown_examples
from laconic.catalog import read

ROOT = Path(__file__).resolve().parents[1]
METHODS = read().methods
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def with_examples() -> list[str]:
    """Names of the modules that have examples."""
    found = []
    for path in sorted((ROOT / "laconic").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if any(PROMPT in (ast.get_docstring(node) or "") for node in ast.walk(tree) if isinstance(node, documented)):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.parametrize("name", with_examples())
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = [one for one in doctest.DocTestFinder().find(importlib.import_module(name), name) if one.examples]
    assert tests, f"{name} has a prompt in a docstring that doctest does not see"
    lines: list[str] = []
    threads = torch.get_num_threads()
    try:
        for test in tests:
            torch.manual_seed(0)
            doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append)
    finally:
        torch.set_num_threads(threads)
    assert not lines, "".join(lines)


@pytest.mark.parametrize("id", list(METHODS))
def test_every_method_has_an_example(id):
    method = METHODS[id]
    where = method.path.relative_to(ROOT).as_posix()
    assert shown_examples(method), f"{where}: end the docstring with `Example:` and a doctest of a few lines"


def test_an_example_that_prints_something_else_fails():
    """The flags above let widths and `...` differ, and nothing else."""
    lines: list[str] = []
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append)
    assert "Expected:\n    3\nGot:\n    2" in "".join(lines)
