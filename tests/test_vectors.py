"""All recorded vectors of all landed methods: whatever is in the folder for a landed id is run, within the file's tolerance.

The folder is `LACONIC_VECTORS` (default `tests/vectors`): another set with other shapes and options drops in.
"""

from __future__ import annotations

import functools

import pytest

from laconic.testing.vectors import VectorFile, folder, run_case
from tests.testing.landed import ROOT, cards, runner_of

pytestmark = pytest.mark.vectors


@functools.cache
def files() -> dict[str, VectorFile]:
    """name -> file, for all in the folder."""
    where = folder(ROOT)
    names = {path.stem for path in where.iterdir() if path.suffix in (".json", ".npz")}
    return {name: VectorFile.read(name, where) for name in sorted(names)}


def landed(file: VectorFile) -> list[str]:
    """The ids of a file that have landed."""
    return [id for id in file.ids if id in cards()]


CASES = [(name, case.name) for name, file in files().items() if landed(file) for case in file.cases()]
PAIRS = [(name, id) for name, file in files().items() for id in landed(file)]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_case(name, case):
    file = files()[name]
    took = run_case(file.case(case), {id: runner_of(cards()[id]) for id in landed(file)})
    waiting = sorted(set(file.ids) - set(cards()))
    if not took and waiting:
        pytest.skip(f"{name}, case {case} belongs to what has not landed: {', '.join(waiting)}")
    assert took, f"{name}, case {case}: {', '.join(file.ids)} have landed, and none of them takes it"


@pytest.mark.parametrize(("name", "id"), PAIRS, ids=[f"{name}-{id}" for name, id in PAIRS])
def test_each_landed_method_takes_a_case(name, id):
    run = runner_of(cards()[id])
    assert any(run(case) is not NotImplemented for case in files()[name].cases()), f"{id} takes no case of {name}"


@pytest.mark.parametrize("id", sorted(cards()))
def test_a_card_lists_its_vectors(id):
    here = {name for name, of in PAIRS if of == id}
    listed = set(cards()[id].vectors)
    absent = sorted(listed - set(files()))
    assert not absent, f"the card of {id} lists vectors that are not in {folder(ROOT)}: {', '.join(absent)}"
    assert here == listed, f"the card of {id} lists {sorted(listed)}, and the files for it are {sorted(here)}"


def test_vectors_of_methods_that_have_not_landed():
    waiting = [name for name, file in files().items() if not landed(file)]
    if waiting:
        pytest.skip(f"{len(waiting)} of {len(files())} files wait for their methods: {', '.join(waiting)}")
