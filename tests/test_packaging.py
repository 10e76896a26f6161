"""What the package says of itself, and (slow) that it builds: with a compiler, without, from its sdist."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from laconic import doctor

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
META = PROJECT["project"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt holds `name==version` lines alone"
    return {normal(name): Version(version) for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    extras = [text for group in META["optional-dependencies"].values() for text in group]
    texts = [*META["dependencies"], *extras, *PROJECT["build-system"]["requires"]]
    return [Requirement(text) for text in texts]


def test_every_range_holds_its_pin():
    pinned = pins()
    wanted = [r for r in requirements() if normal(r.name) != "laconic"]
    assert {normal(r.name) for r in wanted} <= set(pinned)
    assert [str(r) for r in wanted if pinned[normal(r.name)] not in r.specifier] == []


def test_torch_is_pinned_and_ranged_as_tested():
    assert str(pins()["torch"]) == "2.13.0"
    by_name = {r.name: r.specifier for r in requirements()}
    assert Version("2.14.0") not in by_name["torch"]
    assert Version("5.24.0") not in by_name["transformers"]  # its tie tables are looked at minor by minor
    assert not {"torchvision", "timm"} & set(by_name)


def test_the_build_needs_no_torch():
    assert not any("torch" in text for text in PROJECT["build-system"]["requires"])


def test_the_doctor_knows_the_tested_versions():
    pinned = pins()
    assert {name: Version(version) for name, version in doctor.TESTED.items()} == {
        name: pinned[normal(name)] for name in doctor.TESTED
    }


def test_the_doctor_lists_the_extras_for_users():
    extras = META["optional-dependencies"]
    named = {Requirement(text).name for name in ("tasks", "interop", "ray", "adapters") for text in extras[name]}
    assert named == {package for package, _ in doctor.OPTIONAL.values()}


def test_one_version_everywhere():
    import laconic

    assert laconic.__version__ == META["version"]
    assert importlib.metadata.version("laconic") == META["version"]


def test_python_dash_m_equals_the_command():
    """The same bytes from both; the command is the one that the install made, beside this interpreter."""
    command = Path(sys.executable).parent / "laconic"
    assert command.exists(), "laconic is not installed in this environment: make install"
    by_name, by_module = (
        subprocess.run([*prefix, "--version"], capture_output=True, text=True, timeout=120, cwd=ROOT)
        for prefix in ([str(command)], [sys.executable, "-m", "laconic"])
    )
    assert by_name.returncode == by_module.returncode == 0, by_name.stderr + by_module.stderr
    assert by_name.stdout == by_module.stdout
    assert META["version"] in by_name.stdout


def test_the_doctor_never_raises_and_tells_what_broke(monkeypatch):
    """Sections and checks that throw, and texts with brackets that rich would take for markup."""
    from rich.console import Console

    def broken():
        raise OSError("no [/bold] such thing")

    monkeypatch.setattr(doctor, "_memory", broken)
    monkeypatch.setattr(doctor, "_optional", broken)
    monkeypatch.setitem(doctor._CHECKS, "C++: unpack", broken)
    monkeypatch.setenv("LACONIC_TRIED", "[/red]")
    report, checks = doctor.diagnose(), doctor.self_test()
    assert report["memory"] == report["optional"] == {"error": "OSError: no [/bold] such thing"}
    assert {c.name: c.state for c in checks}["C++: unpack"] == "failed"
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    doctor.render(console, report, checks)
    text = console.export_text()
    assert "memory could not be found out: OSError: no [/bold] such thing" in text
    assert re.search(r"C\+\+: unpack\W+FAILED\W+OSError: no \[/bold\] such thing", text)
    assert "Versions" in text and "Optional packages" not in text


def test_the_doctor_finds_nothing_wrong_here():
    from rich.console import Console

    report, checks = doctor.diagnose(), doctor.self_test()
    assert not {name: part for name, part in report.items() if isinstance(part, dict) and "error" in part}
    assert [c.name for c in checks if c.state == "failed"] == []
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    doctor.render(console, report, checks)
    text = console.export_text()
    assert all(name in text for name in ("Machine", "torch", "Kernels", "pyarrow", "Self-test"))


def test_the_doctor_tries_every_registered_op():
    """Ops are found in torch's own table, so a new one that the doctor does not try fails here."""
    import torch

    import laconic.kernels.attention
    import laconic.kernels.binary
    import laconic.kernels.conv
    import laconic.kernels.norm
    import laconic.kernels.ops
    import laconic.kernels.sparse  # noqa: F401 - registers them, as the others do

    names = [name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("laconic::")]  # fmt: skip
    tried = {c.name.removeprefix("op: "): c for c in doctor.self_test() if c.name.startswith("op: ")}
    assert set(names) - set(doctor.NORMS) == set(tried) and set(doctor.NORMS) <= set(names)
    assert {c.state for c in tried.values()} == {"passed"}, [c for c in tried.values() if c.state != "passed"]
    assert all(int(c.detail.split()[0]) >= 5 for c in tried.values())


@pytest.mark.parametrize(
    "wrong", [lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: y[..., :-1], lambda y: y.half()]
)
def test_the_doctor_finds_a_wrong_op(monkeypatch, wrong):
    """A kernel that is off by a thousandth, breaks down, or gives another shape or type."""
    from laconic.kernels import ops

    real = ops.dequantize_rows
    monkeypatch.setattr(ops, "dequantize_rows", lambda *given: wrong(real(*given)))
    states = {c.name: c.state for c in doctor.self_test()}
    assert states["op: embedding"] == "failed"


# --- builds -----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built, in a folder with a space in its name."""
    for tool in ("scikit_build_core", "nanobind", "build"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed; `make install` installs it")
    copy = tmp_path / "a copy"
    copy.mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    shutil.copytree(ROOT / "laconic", copy / "laconic", ignore=ignore)
    return copy


def build(tree: Path, *what: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the build frontend without isolation (so without network); the process, and what is in dist/."""
    clean = {k: v for k, v in os.environ.items() if k not in ("LACONIC_REQUIRE_KERNELS", "CXX")}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", "dist", "."],
        cwd=tree, env=clean | {"PATH": path} | env, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    folder = tree / "dist"
    return done, sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.slow
@pytest.mark.timeout(1500)  # it compiles all kernels, perhaps beside other tests
def test_sdist_and_the_wheel_built_from_it(tree, tmp_path):
    quick = {"SKBUILD_CMAKE_DEFINE": "LACONIC_OPTIMIZE=-O0"}  # what is compiled counts here, not how fast it runs
    done, names = build(tree, **quick)  # with neither --sdist nor --wheel, the wheel is built from the sdist
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wheel, sdist = names if names[0].endswith(".whl") else reversed(names)
    with tarfile.open(tree / "dist" / sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "laconic/kernels/cpu").glob("*.?pp")}
    assert len(sources) > 3 and sources | {"CMakeLists.txt", "LICENSE", "pyproject.toml"} <= inside

    with zipfile.ZipFile(tree / "dist" / wheel) as archive:
        inside = set(archive.namelist())
        archive.extractall(tmp_path / "wheel")
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "laconic").rglob("*.py")}
    assert modules <= inside
    assert not [name for name in inside if name.endswith((".cpp", ".hpp", ".inl"))]

    if "none-any" in wheel:  # no compiler here
        assert "LACONIC_REQUIRE_KERNELS" not in os.environ
        return
    (binary,) = [name for name in inside if name.startswith("laconic/kernels/_cpu.")]
    folder = tmp_path / "wheel" / Path(binary).parent
    # -S: torch is not on the path; its OpenMP runtime, which the extension shares, is stood in for by the compiler's.
    shared = "import ctypes, sys; sys.platform == 'linux' and ctypes.CDLL('libgomp.so.1', ctypes.RTLD_GLOBAL); "
    command = [sys.executable, "-S", "-c", shared + "import _cpu; print(_cpu.isa())"]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert loaded.stdout.strip() in ("portable", "avx2", "avx512", "neon"), loaded.stderr


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_python(tree):
    done, names = build(tree, "--wheel", CXX="/bin/false")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert names == [f"laconic-{META['version']}-py3-none-any.whl"]
    with zipfile.ZipFile(tree / "dist" / names[0]) as archive:
        inside = archive.namelist()
    assert "laconic/kernels/native.py" in inside
    assert not [name for name in inside if name.endswith((".so", ".pyd"))]


@pytest.mark.slow
def test_where_kernels_are_required_a_failed_build_stays_failed(tree):
    done, names = build(tree, "--wheel", CXX="/bin/false", LACONIC_REQUIRE_KERNELS="1")
    assert done.returncode != 0 and names == []
    assert "unset LACONIC_REQUIRE_KERNELS" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)  # it compiles all kernels, perhaps beside other tests
def test_a_compile_error_fails_where_kernels_are_required(tree):
    """Not the configuration but the compilation breaks."""
    for source in (tree / "laconic/kernels/cpu").rglob("*.cpp"):  # all of them: none is worth waiting for
        source.write_text("#error broken on purpose\n")
    done, names = build(tree, "--wheel", LACONIC_REQUIRE_KERNELS="1")
    assert done.returncode != 0 and names == []
