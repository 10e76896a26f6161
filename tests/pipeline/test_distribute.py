"""Several processes give the bytes of one, end together, and leave what they have solved to any number of others."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import types

import pytest
import torch

from laconic.errors import BadInput
from laconic.pipeline import distribute
from laconic.pipeline.compress import compress
from laconic.pipeline.distribute import Shares, Team, balanced, parse_distribute

from . import distributed_script
from .runs import ALWAYS, environ, hashes, run_cli, save, token_file


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files(folder):
    """What must be alike: bytes, and of laconic.json everything but the folder's name."""
    return hashes(folder) | {"laconic.json": (folder / "laconic.json").read_bytes()}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    at = tmp_path_factory.mktemp("given")
    llama, resnet = save("llama", at / "llama"), save("resnet", at / "resnet")
    return types.SimpleNamespace(at=at, llama=str(llama), resnet=str(resnet), data=str(token_file(at / "tokens.npz")))


def jobs(given):
    """Calls of compress, and what else `distributed_script` is told of each."""
    looks = {"model": given.llama, "data": given.data}
    return {
        "data": looks | {"budget": "drop=0", "strategy": "gptq"},
        "rotated": looks | {"budget": "size=5x", "strategy": "rsq"},
        "none": {"model": given.resnet, "budget": "size=3x"},
        "streamed": looks | {"budget": "size=5x", "max_ram": "64GB"},
        "refused": looks | {"budget": "size=5x"},
        "missing": {"model": str(given.at / "nowhere")},
    }


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """What one process gives: by name, once."""
    at, found = tmp_path_factory.mktemp("whole"), {}

    def run(name):
        if name not in found:
            with pytest.MonkeyPatch.context() as patch:
                distributed_script.pretend(name, patch)
                found[name] = compress(**(jobs(given) | {"plain": jobs(given)["refused"]})[name], out=at / name)
        return found[name]

    return run


def pair(job, *arguments, **environment):
    """Two processes as `torchrun` starts them, without its own import of torch."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return [
        subprocess.Popen(
            [sys.executable, job, *arguments], env=environ(RANK=str(rank), **said), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(given, tmp_path_factory):
    """What two processes, started together, gave and said."""
    at = tmp_path_factory.mktemp("two")
    called = jobs(given)
    listed = [{"name": name, **call, "out": str(at / name)} for name, call in called.items()]
    (at / "job.json").write_text(json.dumps(listed))
    for process in pair(distributed_script.__file__, at / "job.json"):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err
    said = [json.loads((at / f"said-{rank}.json").read_text()) for rank in range(2)]
    return at, [dict(zip(called, one, strict=True)) for one in said]


@pytest.mark.parametrize("name", ["data", "rotated", "none", "streamed"])
def test_the_bytes_of_one_process(name, whole, two):
    at, said = two
    alone = whole(name)
    assert files(at / name) == files(alone.out) and set(hashes(alone.out)) == set(ALWAYS)
    assert said[0][name] == said[1][name] == [alone.exit_code, 0]
    assert sorted(p.name for p in (at / name).iterdir()) == sorted(p.name for p in alone.out.iterdir())
    methods = {u["method"] for u in alone.record["units"]} - {None}
    others = {"rotated": {"rsq", "rtn"}, "none": {"rtn"}, "data": {"rtn"}}  # which ends at 8 bits
    assert methods == others.get(name, {"gptq", "rtn"})
    assert any("does not fit under --max-ram" in note for note in alone.record["notes"]) == (name == "streamed")
    if name == "data":  # a larger plan was solved after the float values were back
        solved = [one for one in alone.record["tried"] if one["name"].startswith("gptq") and one["split"] == "select"]
        assert len({one["size"] for one in solved}) > 1


def test_processes_that_see_other_things_are_refused(two):
    at, said = two
    kind, sentence = said[1]["refused"]
    assert said[0]["refused"] == [kind, f"process 1 of 2: {sentence}"] and kind == "BadInput"
    assert sentence.startswith("the options or the data differs from that of the first process")
    assert not (at / "refused").exists()


def test_bad_input_is_said_by_all(two):
    _, said = two
    assert said[0]["missing"] == said[1]["missing"] and said[0]["missing"][0] == "BadInput"
    assert "nowhere" in said[0]["missing"][1] and "process" not in said[0]["missing"][1]


def test_a_process_that_dies_ends_the_run_which_any_number_resumes(given, whole, tmp_path, capsys, monkeypatch):
    """By the command line, whose second process is killed in the middle of the chain; then alone."""
    out = tmp_path / "out"
    arguments = ["compress", given.llama, "--data", given.data, "--budget", "size=5x", "--out", out, "--json"]
    with monkeypatch.context() as patch:
        patch.setenv("LACONIC_FAILPOINT", "worker:6")
        patch.setenv("PYTHONPATH", environ()["PYTHONPATH"])
        code, printed, said = run_cli(capsys, *arguments, "--distribute", "2")
    assert (code, printed) == (1, ""), said
    assert "laconic: process 1 of 2 was ended by SIGKILL" in said and "--resume" in said
    records = list((tmp_path / "out.partial" / "records").glob("*.safetensors"))
    assert records and not out.exists()
    resumed = compress(given.llama, given.data, "size=5x", out=out, resume=True)
    assert 0 < resumed.units_reused <= len(records)
    assert files(out) == files(whole("plain").out)
    assert not list(out.glob("activations*"))


def test_a_model_in_memory_and_more_processes_than_parameters(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    example = torch.ones(1, 64)
    alone = compress(model, budget="size=3x", out=tmp_path / "alone", example=example)
    both = compress(model, budget="size=3x", out=tmp_path / "both", example=example, distribute=2)
    assert files(both.out) == files(alone.out) and both.units_reused == 0
    assert "2 processes shared 1 parameters: fewer would have done" in both.record["notes"]
    assert not multiprocessing.active_children()


def test_ctrl_c_while_it_waits_for_the_others(given, tmp_path, monkeypatch):
    """No process is needed for that: what never answers is one that is busy."""
    looks = itertools.count()

    class Busy:
        def is_completed(self):
            if next(looks) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return False

    stopped = []
    workers = types.SimpleNamespace(fallen=lambda: None, start=lambda: None, stop=stopped.append)
    monkeypatch.setattr(distribute, "_team", lambda place, given: distribute.Several(0, 2, lambda team: None, workers))
    monkeypatch.setattr(distribute.Several, "_all", lambda self, parts, mine: self._wait(Busy()))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            compress(given.llama, budget="size=4x", out=tmp_path / "out", distribute=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped == [False]


# --- who does what ---------------------------------------------------------------------------------------------------


class Pair(Team):
    rank, size = 0, 2


def test_shares_learn_from_the_block_before():
    shapes = {"q": (8, 8), "k": (8, 8), "o": (8, 8), "up": (8, 32), "down": (32, 8)}
    learned = {}
    first = Shares(Pair(), {f"layers.0.{name}": shape for name, shape in shapes.items()}, learned)
    leaders = {"q": "q", "k": "q", "o": "o", "up": "up", "down": "down"}
    for name, leader in leaders.items():  # as they are seen
        first.of(f"layers.0.{name}", f"layers.0.{leader}")
    assert learned == leaders
    second = Shares(Pair(), {f"layers.1.{name}": shape for name, shape in shapes.items()}, learned)
    assert second.owner["layers.1.down"] == 0  # the heaviest
    assert {second.owner[f"layers.1.{name}"] for name in ("q", "o", "up")} == {1}
    assert second.of("layers.1.k", "layers.1.q") == 1 and second.of("layers.1.new", "layers.1.down") == 0


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_balanced_leaves_nobody_far_behind(size):
    costs = [float(7 * i % 11) for i in range(23)]
    owner = balanced(costs, size)
    loads = [sum(c for c, who in zip(costs, owner, strict=True) if who == rank) for rank in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs)


@pytest.mark.parametrize("value", [0, -1, "0", "x", "", "ray:", "ray:0", "slurm:2", 1.5, True])
def test_what_is_no_number_of_processes_is_refused(value, given, tmp_path):
    with pytest.raises(BadInput, match="distribute is .* say how many processes"):
        compress(given.llama, budget="size=4x", out=tmp_path / "out", distribute=value)


def test_the_number_must_be_that_of_the_environment(monkeypatch):
    assert parse_distribute(1) is None and parse_distribute("1") is None
    assert parse_distribute(3).by == "laconic" and parse_distribute("ray:3").by == "ray"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_distribute("4").by == "environment"
    for value in (2, "ray:4"):
        with pytest.raises(BadInput, match="one of 4 processes that were started together"):
            parse_distribute(value)


def test_under_torchrun_the_command_asks_for_all_and_one_speaks(given, tmp_path, monkeypatch, capsys):
    asked = []

    def compress(model, **options):
        asked.append(options["distribute"])
        if model == "nothing":
            raise BadInput("there is no such model")
        return types.SimpleNamespace(record={}, exit_code=3)

    monkeypatch.setattr("laconic.pipeline.compress.compress", compress)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_cli(capsys, "compress", given.llama, "--out", tmp_path / "out") == (3, "", "")
    assert run_cli(capsys, "compress", "nothing", "--out", tmp_path / "out") == (2, "", "")
    monkeypatch.setenv("RANK", "0")
    assert (
        run_cli(capsys, "compress", "nothing", "--out", tmp_path / "out")[2].strip()
        == "laconic: there is no such model"
    )
    assert asked == ["2", "2", "2"]


def test_what_cannot_be_sent_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    model.hook = lambda x: x
    with pytest.raises(BadInput, match="cannot be sent to another process"):
        compress(model, budget="size=3x", out=tmp_path / "out", example=torch.ones(1, 64), distribute=2)
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_not_shared(given, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BadInput, match="on the CPU so far"):
        compress(given.llama, out=tmp_path / "out", device="cuda", distribute=2)


def test_ray_that_is_not_there_is_said(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'laconic\[ray\]'"):
        compress(given.llama, budget="size=4x", out=tmp_path / "out", distribute="ray:2")
