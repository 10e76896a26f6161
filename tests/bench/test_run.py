"""Whole runs on small problems: the record, the plot, the tables, the command; every contestant that is here answers."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ElementTree
from functools import partial

import pytest
import torch
from rich.console import Console

from laconic.bench import contest, machine
from laconic.bench.contest import OURS, Absent, Ready, contestant, contestants
from laconic.bench.plot import draw
from laconic.bench.problems import LanguageModel, Problem, Product, agreement
from laconic.bench.record import write
from laconic.bench.run import run
from laconic.bench.tables import list_table, run_table
from laconic.bench.work import Aim, Work, find
from laconic.errors import BadInput
from tests.pipeline.runs import run_cli


class Double(Problem):
    """y = 2 x, for contestants of the test alone."""

    operations = 4.0
    traffic = 32.0
    expected = torch.tensor([[2.0, 4.0, 6.0, 8.0]])


class Nowhere(Double):
    """A problem that cannot be posed."""

    def check(self):
        raise Absent("the weights are not here")


@pytest.fixture
def small(monkeypatch):
    """Small probes, copies and rests: the figures mean nothing, the paths are the same."""
    monkeypatch.setattr(machine, "SIDE", 64)
    monkeypatch.setattr(machine, "BUFFER", 1)
    for where in ("machine", "problems"):
        monkeypatch.setattr(f"laconic.bench.{where}.cache_bytes", lambda: 1 << 16)
    machine._fastest_int8.cache_clear()
    yield
    machine._fastest_int8.cache_clear()


@pytest.fixture
def doubles(monkeypatch, small):
    """Works on `Double`, with contestants that are right, wrong, broken and absent."""
    contestants(Double())
    monkeypatch.setattr(contest, "_registered", list(contest._registered))
    x, closed = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), []

    @contestant("torch float32", "torch", Double)
    def right(problem):
        return Ready(lambda: x + x, stored=16.0, close=lambda: closed.append("right"))

    @contestant("ours", OURS, Double)
    def ours(problem):
        return Ready(lambda: x * 2, stored=4.0, peak="int8", note="by hand")

    @contestant("mute", "openvino", Double)
    def mute(problem):
        return Ready(lambda: None, answer=None)

    @contestant("wrong", "openvino", Double)
    def wrong(problem):
        return Ready(lambda: x.flip(1))

    @contestant("broken", "onnxruntime", Double)
    def broken(problem):
        raise RuntimeError("no such kernel\nand more")

    @contestant("misshapen", "torchao", Double)
    def misshapen(problem):
        return Ready(lambda: x[:, :2])

    @contestant("shy", "bitsandbytes", Double)
    def shy(problem):
        raise Absent("takes odd rows alone")

    aims = (
        Aim("times", 1e-6, ("torch float32",)), Aim("times", 1e9, ("torch float32",)), Aim("times", 1, ("nobody",)),
        Aim("read", 1e9), Aim("int8", 1e9), Aim("cosine", 0.9),
    )  # fmt: skip
    return [Work("double", "two times x", Double, aims), Work("nowhere", "not to be had", Nowhere)], closed


def printed(shown) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_the_record_of_a_run(doubles):
    works, closed = doubles
    told = []
    record = run(rounds=3, works=works, command="laconic bench", progress=lambda *step: told.append(step))
    first, second = record["works"]
    assert {row["name"] for row in first["contestants"]} == {"torch float32", "ours", "wrong", "mute"}
    rows = {row["name"]: row for row in first["contestants"]}
    assert all(len(row["rounds"]) == 3 and row["seconds"] > 0 for row in rows.values())
    assert [row["seconds"] for row in first["contestants"]] == sorted(row["seconds"] for row in rows.values())
    assert rows["torch float32"]["speedup"] == [1.0, 1.0, 1.0]
    assert rows["ours"]["speedup"][0] == pytest.approx(rows["torch float32"]["seconds"] / rows["ours"]["seconds"])
    assert rows["ours"]["times_as_fast_as"].keys() == {"torch float32", "wrong", "mute"}
    assert rows["ours"]["bytes"] == 36 and "bytes" not in rows["wrong"]
    can = first["machine"]["read"]["per_second"]
    assert rows["ours"]["share_of_read"][0] == pytest.approx(36 / rows["ours"]["seconds"] / can)
    peak = first["machine"]["int8"]["per_second"]
    assert rows["ours"]["share_of_peak"][0] == pytest.approx(4 / rows["ours"]["seconds"] / peak)
    assert rows["ours"]["cosine"] == pytest.approx(1) and rows["wrong"]["cosine"] < 0.9  # fast and wrong shows
    assert "cosine" not in rows["mute"]
    reasons = {one["name"]: one["reason"] for one in first["missing"]}
    assert reasons["broken"] == "failed with RuntimeError: no such kernel"
    assert reasons["shy"] == "takes odd rows alone"
    assert reasons["misshapen"].startswith("failed with ValueError: the answer has shape (1, 2)")
    assert [aim["met"] for aim in first["aims"]] == [True, False, None, False, False, True]
    assert second["absent"] == "the weights are not here" and second["contestants"] == []
    assert closed == ["right"] and ("double: rounds", 3, 3) in told
    assert record["enough_rounds"] is False and record["machine"]["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(record)) == record


def test_what_is_fast_and_far_off_meets_no_aim(doubles, monkeypatch):
    """An aim for the cosine decides who of ours is judged: the fastest that is near enough, else the fastest."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])

    @contestant("hasty", OURS, Double)
    def hasty(problem):
        return Ready(lambda: x.flip(1))

    @contestant("slow", OURS, Double)
    def slow(problem):
        return Ready(lambda: (time.sleep(0.02), x * 2)[1])

    monkeypatch.setattr(contest, "_registered", [one for one in contest._registered if one.name != "ours"])
    times = Aim("times", 1e-9, ("torch float32",))
    for aims, by in (((times, Aim("cosine", 0.99)), "slow"), ((times,), "hasty"), ((Aim("cosine", 2.0),), "hasty")):
        (found,) = run(rounds=1, works=[Work("double", "", Double, aims)])["works"]
        assert [aim["by"] for aim in found["aims"]] == [by] * len(aims)


def test_threads_are_set_and_given_back(doubles):
    before = torch.get_num_threads()
    record = run(rounds=1, works=doubles[0], threads=before + 1)
    assert record["machine"]["threads"] == before + 1 and torch.get_num_threads() == before


def test_peers_are_chosen(doubles):
    record = run(rounds=1, works=doubles[0][:1], peers=["openvino"])
    assert {row["name"] for row in record["works"][0]["contestants"]} == {"ours", "wrong", "mute"}
    assert all("speedup" not in row for row in record["works"][0]["contestants"])  # nothing to compare with
    with pytest.raises(BadInput, match="no peer is called 'tensorflow'"):
        run(peers=["tensorflow"])


def test_tables_and_plot_show_the_record(doubles, tmp_path):
    record = run(rounds=2, works=doubles[0])
    plot = write(record, tmp_path / "deep" / "a.json")
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == record
    root = ElementTree.fromstring(plot.read_text())
    titles = [one.text for one in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum("double, " in str(title) for title in titles) == 2  # those whose bytes are known
    text = printed(run_table(record))
    assert "ours" in text and "aim: 1 times as fast as nobody: cannot be said" in text and ": met" in text
    assert "broken failed with RuntimeError" in text and "the weights are not here" in text and "too few rounds" in text


def test_a_plot_of_nothing(small):
    record = run(rounds=1, works=[Work("nowhere", "", Nowhere)])
    assert "nothing was measured" in draw(record)


def test_a_record_that_cannot_be_written(doubles, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write(run(rounds=1, works=doubles[0][1:]), tmp_path / "file" / "a.json")


# Least cosine to float of what is stored so; of few values, which come back exactly, nearly one.
LEAST = {"int8": 0.999, "int4": 0.985, "int3": 0.95, "int2": 0.75, "ternary": 0.99, "binary": 0.99}
PRODUCTS = [
    (1, 512, 256, "int4", 32, None), (1, 512, 256, "int4", 128, None), (1, 512, 256, "int8", None, None),
    (1, 512, 256, "int3", 128, None), (1, 512, 256, "int2", 128, None), (1, 512, 256, "ternary", 128, None),
    (1, 512, 256, "binary", 128, None), (8, 512, 256, "int4", 128, None), (40, 512, 256, "int8", None, 8),
    (40, 512, 256, "binary", 128, 1),
]  # fmt: skip


@pytest.mark.parametrize("options", PRODUCTS, ids=lambda options: "-".join(map(str, options)))
def test_every_contestant_multiplies_rightly(small, options):
    """Whoever is installed here; torch and ours always are."""
    work = Work("small", "", partial(Product, *options))
    record = run(rounds=1, works=[work])
    (found,) = record["works"]
    broken = [one for one in found["missing"] if one["reason"].startswith("failed")]
    assert not broken
    assert len(found["contestants"]) >= 2
    for row in found["contestants"]:
        assert row["cosine"] > LEAST[options[3]], row["name"]
        assert row["stored"] > 0


@pytest.mark.parametrize("weights", ["int4", "ternary"])
@pytest.mark.parametrize(("tokens", "context"), [(1, 5), (7, 0)])
def test_every_contestant_decodes_rightly(small, weights, tokens, context):
    sizes = {"layers": 2, "width": 256, "hidden": 512, "heads": 4, "vocabulary": 512}
    work = Work(
        "small", "", partial(LanguageModel, tokens, context, weights, 32 if weights == "int4" else 128, **sizes)
    )
    (found,) = run(rounds=1, works=[work])["works"]
    assert not [one for one in found["missing"] if one["reason"].startswith("failed")]
    for row in found["contestants"]:
        assert row["cosine"] > (0.88 if weights == "int4" else 0.99), row["name"]


def test_a_turn_does_not_depend_on_the_one_before():
    problem = LanguageModel(2, 3, layers=1, width=64, hidden=64, heads=2, vocabulary=40)
    step = problem.step(problem.model)
    first = step()
    assert torch.equal(step(), first) and agreement(first, problem.expected)["max_error"] < 1e-5
    whole = problem.model(problem.ids).logits[:, -1]
    torch.testing.assert_close(first, whole)


@pytest.mark.fetched
@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm-1x32", "load-minilm"])
def test_every_contestant_embeds_rightly(name):
    (work,) = find([name])
    (found,) = run(rounds=1, works=[work])["works"]
    if "absent" in found:
        pytest.skip(found["absent"])
    assert not [one for one in found["missing"] if one["reason"].startswith("failed")]
    assert all(row.get("cosine", 1) > 0.9 for row in found["contestants"])


def test_the_list_names_who_is_here(capsys):
    assert "torch float32" in printed(list_table(find(["gemm"])))
    code, said, _ = run_cli(capsys, "bench", "gemv", "--list", "--json", "--peers", "torch")
    rows = json.loads(said)
    assert code == 0 and said.count("\n") == 1 and len(rows) == len(find(["gemv"]))
    assert {one["peer"] for row in rows for one in row["contestants"]} == {"laconic", "torch"}


def test_the_command(doubles, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("laconic.bench.run.find", lambda names: doubles[0])
    code, said, _ = run_cli(capsys, "bench", "double", "--rounds", "2", "--out", tmp_path / "a.json", "--json")
    assert code == 0 and said.count("\n") == 1
    assert json.loads(said) == json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.svg").is_file()
    code, said, _ = run_cli(capsys, "bench", "double", "--rounds", "1", "--quiet")
    assert code == 0 and "two times x" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("gemw",), "no work is called 'gemw'"), (("gemv", "--out", "a.txt"), "name it a.json"),
     (("gemv", "--peers", "jax"), "no peer is called 'jax'")],
)  # fmt: skip
def test_bad_input(capsys, arguments, says):
    code, _, said = run_cli(capsys, "bench", *arguments)
    assert code == 2 and says in said
