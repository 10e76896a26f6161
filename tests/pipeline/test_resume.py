"""Killed at any moment and resumed: the same bytes, with what was solved reused; and never half an output."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from laconic.pipeline import workspace as workspace_module
from laconic.pipeline.compress import compress
from laconic.pipeline.workspace import Workspace

from .runs import hashes, process, save, token_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save("llama", tmp_path_factory.mktemp("float") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return token_file(tmp_path_factory.mktemp("data") / "tokens.npz")


@pytest.fixture(scope="module")
def whole(folder, data, tmp_path_factory):
    """What an uninterrupted run gives, without and with data."""
    at = tmp_path_factory.mktemp("whole")
    found = {}
    for name, given in (("none", None), ("data", data)):
        result = compress(folder, given, "size=5x", out=at / name)
        assert result.units_reused == 0
        found[name] = hashes(result.out)
    return found


class Stopped(BaseException):
    """Stands for SIGKILL within this process: nothing catches it."""


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(n)`: the n-th unit that is kept from now on is the last; `stop_after(0)`: no more of this."""

    def arm(n: int) -> None:
        left = iter(range(n - 1, -1, -1))

        def failpoint(name: str) -> None:
            if n and not next(left):
                raise Stopped

        monkeypatch.setattr(workspace_module, "failpoint", failpoint)

    return arm


@pytest.mark.parametrize(("given", "n"), [("none", 9), ("data", 8)])
def test_killed_and_resumed_gives_the_same_bytes(given, n, folder, data, whole, tmp_path):
    out = tmp_path / "out"
    arguments = ["compress", folder, "--budget", "size=5x", "--out", out, "--json"]
    arguments += ["--data", data] if given == "data" else []
    killed = process(*arguments, LACONIC_FAILPOINT=f"unit:{n}")
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    assert len(list((tmp_path / "out.partial" / "records").glob("*.safetensors"))) == n
    done = process(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["units_reused"] == n
    assert hashes(out) == whole[given]
    assert not (tmp_path / "out.partial").exists() and not (out / "records").exists()


@pytest.mark.parametrize(
    ("given", "n"), [("none", 1), ("none", 15), ("data", 1), ("data", 3), ("data", 10), ("data", 15)]
)
def test_stopped_after_any_unit(given, n, folder, data, whole, tmp_path, stop_after):
    arguments = (folder, data if given == "data" else None, "size=5x")
    stop_after(n)
    with pytest.raises(Stopped):
        compress(*arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stop_after(0)
    result = compress(*arguments, out=tmp_path / "out", resume=True)
    assert result.units_reused == n and hashes(result.out) == whole[given]


def test_stopped_again_and_again_still_ends(folder, data, whole, tmp_path, stop_after):
    for _ in range(3):
        stop_after(4)
        with pytest.raises(Stopped):
            compress(folder, data, "size=5x", out=tmp_path / "out", resume=True)
    stop_after(0)
    result = compress(folder, data, "size=5x", out=tmp_path / "out", resume=True)
    assert result.units_reused == 12 and hashes(result.out) == whole["data"]


def test_resume_with_nothing_to_resume_simply_starts(folder, whole, tmp_path):
    result = compress(folder, budget="size=5x", out=tmp_path / "out", resume=True)
    assert result.units_reused == 0
    assert hashes(result.out) == whole["none"]


def test_without_resume_an_old_partial_folder_is_thrown_away(folder, tmp_path):
    records = tmp_path / "out.partial" / "records"
    records.mkdir(parents=True)
    (records / "stray.safetensors").write_bytes(b"stale")
    result = compress(folder, budget="size=5x", out=tmp_path / "out")
    assert result.units_reused == 0 and not list(result.out.glob("**/stray*"))


def test_what_was_solved_for_another_budget_is_not_taken_for_this_one(folder, tmp_path, stop_after):
    """Records are named by everything their bits depend on: another run's are ignored where they differ."""
    stop_after(9)
    with pytest.raises(Stopped):
        compress(folder, budget="size=6x", out=tmp_path / "out")
    stop_after(0)
    resumed = compress(folder, budget="size=4x", out=tmp_path / "out", resume=True)
    fresh = compress(folder, budget="size=4x", out=tmp_path / "fresh")
    assert hashes(resumed.out) == hashes(fresh.out)


def test_a_torn_record_is_solved_again(folder, whole, tmp_path, stop_after):
    stop_after(4)
    with pytest.raises(Stopped):
        compress(folder, budget="size=5x", out=tmp_path / "out")
    stop_after(0)
    record = sorted((tmp_path / "out.partial" / "records").glob("*.safetensors"))[0]
    record.write_bytes(record.read_bytes()[:-7])
    result = compress(folder, budget="size=5x", out=tmp_path / "out", resume=True)
    assert result.units_reused == 3 and hashes(result.out) == whole["none"]


def test_ctrl_c_keeps_the_work_and_says_how_to_go_on(folder, data, whole, tmp_path):
    out, records = tmp_path / "out", tmp_path / "out.partial" / "records"
    arguments = ["compress", folder, "--budget", "size=5x", "--out", out, "--json", "--data", data]
    stopped = process(*arguments, LACONIC_FAILPOINT="unit:2:SIGINT")
    printed, said = stopped.stdout, stopped.stderr
    assert stopped.returncode == 130, said
    assert printed == "" and "--resume" in said and "Traceback" not in said
    assert not out.exists() and records.is_dir()
    done = process(*arguments, "--resume")
    assert done.returncode == 0 and json.loads(done.stdout)["units_reused"] > 0
    assert hashes(out) == whole["data"]


def test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(folder, tmp_path, stop_after):
    out = tmp_path / "out"
    compress(folder, budget="size=4x", out=out)
    before = hashes(out)
    stop_after(5)
    with pytest.raises(Stopped):
        compress(folder, budget="size=6x", out=out, overwrite=True)
    assert hashes(out) == before
    stop_after(0)
    compress(folder, budget="size=6x", out=out, overwrite=True, resume=True)
    assert hashes(out) != before
    assert os.listdir(tmp_path) == ["out"]


def test_abandon_removes_only_a_folder_without_records(tmp_path):
    workspace = Workspace(tmp_path / "a")
    workspace.open()
    workspace.abandon()
    assert not workspace.partial.exists()
    workspace.open()
    (workspace.records / "x.safetensors").write_bytes(b"")
    workspace.abandon()
    assert workspace.partial.exists()
