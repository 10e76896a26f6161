"""Reading and comparing vectors: what a file must say, and what a comparison finds."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from laconic.errors import BadInput
from laconic.testing import Broken, VectorFile
from laconic.testing.vectors import compare, folder, run_case

ARRAYS = {
    "x": np.array([1.0, -2.0, 3.0], dtype=np.float32),
    "w": np.array([[2.0, 1.0, 0.5]], dtype=np.float32),
    "y": np.array([2.0, -2.0, 1.5], dtype=np.float32),
    "s0": np.array(1, dtype=np.int64),
    "s1": np.array(2, dtype=np.int64),
    "names": np.array(["a", "b"]),
    "spare": np.zeros(0, dtype=np.float32),
}

ABOUT = {
    "source": "written for this test",
    "calls": "y = x w",
    "keys": {},
    "ids": ["product", "other"],
    "official": "full",
    "unused": {"spare": "empty"},
    "informational": ["names"],
    "tolerance": {
        "rtol": 1e-5,
        "atol": 1e-6,
        "dtype": "float32",
        "except": {"count": {"rtol": 0, "atol": 0}, "out*": {"atol": 0.5, "note": "rounds to half a unit"}},
        "except_match": "fnmatch on the role",
    },
    "cases": [
        {
            "name": "plain",
            "what": "forward",
            "args": {"k": 1},
            "arrays": {"input": "x", "weight": "w", "output": "y", "count": ["s0", "s1"], "names": "names"},
        },
        {"name": "empty", "what": "forward", "args": {}, "arrays": {"p.a": "x", "p.b": "w", "steps": [], "loss": "s0"}},
    ],
}


def write(where, change=None, arrays=None, text=None):
    about = copy.deepcopy(ABOUT)
    if change is not None:
        change(about)
    (where / "product.json").write_text(json.dumps(about) if text is None else text)
    np.savez(where / "product.npz", **(ARRAYS if arrays is None else arrays))
    return VectorFile.read("product", where)


@pytest.fixture
def case(tmp_path):
    return write(tmp_path).case("plain")


def right(case):
    x, w = case.array("input"), case.array("weight")
    return {"output": x * w[0], "count": [torch.tensor(1), torch.tensor(2)]}


def test_a_right_result_passes(case):
    compare(case, right(case))
    assert case.read == {"input", "weight"} and str(case) == "product.json, case plain"


def off(role, value):
    def change(returned):
        returned[role] = value
        return returned

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (off("output", torch.tensor([2.0, -2.0, 2.5])), r"1 of 3 values are off; at \(2,\) 2.5 for 1.5"),
        (off("output", torch.tensor([2.0, float("nan"), 1.5])), r"at \(1,\) nan for -2.0"),
        (off("output", torch.tensor([2.0, float("inf"), 1.5])), r"at \(1,\) inf for -2.0"),
        (off("output", torch.tensor([[2.0, -2.0, 1.5]])), r"the shape is \(1, 3\), and \(3,\) was recorded"),
        (off("output", 2.0), "one tensor was recorded, and float"),
        (off("output", [torch.zeros(3)]), "one tensor was recorded, and list"),
        (off("count", [torch.tensor(1), torch.tensor(3)]), r"count\[1\]: 1 of 1 values are off"),
        (off("count", [torch.tensor(1)]), "2 tensors were recorded, and 1 returned"),
        (off("count", torch.tensor([1, 2])), "a list of 2 tensors was recorded, and Tensor"),
        (lambda r: {"output": r["output"]}, "count: neither read nor returned"),
        (off("input", torch.zeros(3)), "input: was read as an input"),
    ],
)
def test_a_wrong_result_is_found(case, change, says):
    with pytest.raises(Broken, match=says):
        compare(case, change(right(case)))


def test_all_differences_are_told_at_once(case):
    with pytest.raises(Broken, match=r"(?s)count: neither.*output: 3 of 3"):
        compare(case, {"output": 0 * right(case)["output"]})


def test_whole_numbers_are_compared_as_such(tmp_path):
    def exact(about):
        about["tolerance"]["except"] = {"output": {"rtol": 0, "atol": 0}}

    file = write(tmp_path, exact, {**ARRAYS, "y": np.array([2**60, 0, 0])})
    case = file.case("plain")
    good = {**right(case), "output": torch.tensor([2**60, 0, 0])}
    compare(case, good)
    with pytest.raises(Broken, match="1 of 3"):
        compare(case, {**good, "output": torch.tensor([2**60 + 1, 0, 0])})


def test_unknown_roles_are_refused(case):
    with pytest.raises(BadInput, match="product.json, case plain has no role 'inputs': it has input, weight"):
        case.array("inputs")
    with pytest.raises(BadInput, match="has no role 'result'"):
        compare(case, {**right(case), "result": torch.zeros(1)})
    with pytest.raises(BadInput, match="is a list of arrays: read it with case.arrays"):
        case.array("count")
    with pytest.raises(BadInput, match="holds text: read it with case.words"):
        case.array("names")
    with pytest.raises(BadInput, match="no role that starts with 'p.'"):
        case.named("p.")
    with pytest.raises(BadInput, match="must return results by role, and returned NoneType"):
        compare(case, None)


def test_reading(tmp_path):
    file = write(tmp_path)
    empty, plain = file.case("empty"), file.case("plain")
    assert {name: tuple(t.shape) for name, t in empty.named("p.").items()} == {"a": (3,), "b": (1, 3)}
    assert empty.arrays("steps") == [] and empty.array("loss").dtype == torch.int64
    assert plain.words("names") == ["a", "b"] and [int(t) for t in plain.arrays("count")] == [1, 2]
    first = plain.array("input")
    first.zero_()
    assert plain.array("input").any()  # fresh memory each time
    with pytest.raises(BadInput, match="has no case 'plane': plain, empty"):
        file.case("plane")


def test_tolerances_and_their_exceptions(tmp_path):
    file = write(tmp_path)
    assert (file.tolerance("loss").rtol, file.tolerance("loss").atol) == (1e-5, 1e-6)
    assert (file.tolerance("count").rtol, file.tolerance("count").atol) == (0, 0)
    assert (file.tolerance("output").rtol, file.tolerance("output").atol) == (1e-5, 0.5)
    literal = write(
        tmp_path,
        lambda about: (
            about["tolerance"].update({"except": {"output": {"rtol": 1, "atol": 0}}})
            or about["tolerance"].pop("except_match")
        ),
    )
    assert literal.tolerance("output").rtol == 1 and literal.tolerance("out").rtol == 1e-5


def test_peeking_needs_a_note(case):
    assert torch.equal(case.peek("output")[0], torch.tensor([2.0, -2.0, 1.5]))
    with pytest.raises(BadInput, match="'count' has no note that leaves anything free"):
        case.peek("count")
    with pytest.raises(Broken, match="output: neither read nor returned"):
        compare(case, {"count": right(case)["count"]})


def test_several_methods_share_a_file(tmp_path):
    case = write(tmp_path).case("plain")
    assert run_case(case, {"product": right, "other": lambda case: NotImplemented}) == ["product"]
    assert run_case(case, {"other": lambda case: NotImplemented}) == []
    with pytest.raises(Broken, match="neither read nor returned"):
        run_case(case, {"product": right, "other": lambda case: {"output": right(case)["output"]}})


def edit(*path, value):
    def change(about):
        *inner, last = path
        for key in inner:
            about = about[key]
        if value is None:
            del about[last]
        else:
            about[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("source", value=None), "product.json: 'source' is missing"),
        (edit("tolerence", value={}), "the key 'tolerence' is not known"),
        (edit("official", value="yes"), "official is 'yes'; it is one of full, partly, retyped"),
        (edit("ids", value=[]), "ids must name the methods"),
        (edit("cases", value=[]), "there are no cases"),
        (edit("cases", 0, "kind", value="x"), "case plain: the key 'kind' is not known"),
        (edit("cases", 0, "args", value=None), "case plain: 'args' is missing"),
        (edit("cases", 0, "arrays", "input", value="z"), "case plain: the array 'z' of the role 'input' is not in"),
        (edit("cases", 0, "arrays", "input", value={"a": "x"}), "the role 'input' names a dict"),
        (edit("cases", 1, "name", value="plain"), "two cases are called 'plain'"),
        (edit("cases", 1, value=3), "holds a int where an object is needed"),
        (edit("tolerance", "rtol", value=None), "tolerance: 'rtol' is missing"),
        (edit("tolerance", "rtol", value=-1), "rtol is -1, not a number of at least 0"),
        (edit("tolerance", "atol", value="1"), "atol is '1', not a number"),
        (edit("tolerance", "except", "losss", value={"rtol": 1}), "the tolerance of 'losss' is for no role"),
        (edit("tolerance", "except", "loss", value={"relative": 1}), "the key 'relative' is not known"),
        (edit("tolerance", "except_match", value="regex"), "except_match is 'regex'"),
        (edit("informational", value=["nams"]), "informational lists 'nams', which is no role of any case"),
        (edit("unused", value={"spar": ""}), "unused lists 'spar', which is no array"),
        (edit("unused", value={}), "the array 'spare' plays no role in any case"),
    ],
)
def test_a_file_that_does_not_say_what_it_must_is_refused(tmp_path, change, says):
    with pytest.raises(BadInput, match=says):
        write(tmp_path, change)


def test_a_file_that_does_not_parse_is_refused(tmp_path):
    with pytest.raises(BadInput, match="do not parse"):
        write(tmp_path, text="{")
    with pytest.raises(BadInput, match="holds a list where an object is needed"):
        write(tmp_path, text="[]")
    (tmp_path / "product.npz").write_bytes(b"not an archive")
    with pytest.raises(BadInput, match="do not parse"):
        VectorFile.read("product", tmp_path)
    (tmp_path / "product.npz").unlink()
    with pytest.raises(BadInput, match="product.npz is missing"):
        VectorFile.read("product", tmp_path)


def test_no_pickle_is_read(tmp_path):
    with pytest.raises(BadInput, match="do not parse"):
        write(tmp_path, arrays={**ARRAYS, "x": np.array([object()], dtype=object)})


def test_the_folder_is_chosen_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LACONIC_VECTORS", str(tmp_path))
    assert folder() == tmp_path
    monkeypatch.delenv("LACONIC_VECTORS")
    (tmp_path / "tests" / "vectors").mkdir(parents=True)
    assert folder(tmp_path) == tmp_path / "tests" / "vectors"
    monkeypatch.setenv("LACONIC_VECTORS", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="nowhere is no folder of vectors"):
        folder()
