"""The process of an experiment: what it may do wrong, and that it ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from laconic.claims.run import OutOfTime, execute
from laconic.errors import BadInput, LaconicError


def write(folder: Path, body: str) -> Path:
    path = folder / "dummy.py"
    path.write_text(body)
    return path


RUNS = [("plain", 0), ("shift", 0)]


def test_results_come_in_order_and_prints_are_no_results(tmp_path):
    path = write(
        tmp_path, "def run(arm, seed, quick=False):\n    print('{\"value\": 9}')\n    return seed + (arm == 'shift')\n"
    )
    told = []
    found = execute(path, [("plain", 3), ("shift", 3)], seconds=60, told=told.append)
    assert [(r.arm, r.seed, r.value) for r in found] == [("plain", 3, 3.0), ("shift", 3, 4.0)]
    assert told == found and all(r.seconds >= 0 and r.cpu_seconds >= 0 for r in found)


def test_quick_and_threads_are_passed_on(tmp_path):
    path = write(
        tmp_path, "import torch\ndef run(arm, seed, quick=False):\n    return 10 * quick + torch.get_num_threads()\n"
    )
    assert [r.value for r in execute(path, RUNS, seconds=60, quick=True, threads=1)] == [11.0, 11.0]


def test_a_claim_that_never_ends_is_stopped_with_its_children(tmp_path):
    path = write(
        tmp_path,
        "import subprocess, sys, time\n"
        "def run(arm, seed, quick=False):\n"
        "    if arm == 'shift':\n"
        "        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"        open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "        while True: time.sleep(0.1)\n"
        "    return 1.0\n",
    )
    start = time.monotonic()
    with pytest.raises(OutOfTime) as stopped:
        execute(path, [*RUNS, ("plain", 1), ("shift", 1), ("plain", 2), ("shift", 2)], seconds=15)
    assert time.monotonic() - start < 40
    said = str(stopped.value)
    assert "bound of 0.25 minutes with 1 of 6 runs done" in said and "no verdict" in said
    assert "missing are shift seed 0, plain seed 1, shift seed 1, plain seed 2 and 1 more" in said
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("def run(arm, seed, quick=False):\n    return 1 / seed\n", LaconicError, "plain, seed 0: ZeroDivisionError"),
        ("x = 1\n", BadInput, r"has no function run\(arm, seed, quick=False\)"),
        ("def run(:\n", LaconicError, "SyntaxError"),
        ("def run(arm, seed, quick=False):\n    return float('nan')\n", BadInput, "gave nan for plain, seed 0"),
        ("def run(arm, seed, quick=False):\n    return float('-inf')\n", BadInput, "gave -inf for plain, seed 0"),
        ("def run(arm, seed, quick=False):\n    return 'good'\n", LaconicError, "ValueError"),
        (
            "from laconic.errors import BadInput\n"
            "def run(arm, seed, quick=False):\n    raise BadInput('run `laconic fetch mnist`')\n",
            BadInput,
            "^run `laconic fetch mnist`$",
        ),
        (
            "import os, sys\n"
            "def run(arm, seed, quick=False):\n    print('out of luck', file=sys.stderr)\n    os._exit(3)\n",
            LaconicError,
            "ended in the run of plain, seed 0: out of luck",
        ),
    ],
)
def test_what_goes_wrong_is_said(tmp_path, body, error, says):
    with pytest.raises(error, match=says) as raised:
        execute(write(tmp_path, body), RUNS, seconds=60)
    assert type(raised.value) is error


def test_the_callers_environment_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    path = write(
        tmp_path,
        f"import os\ndef run(arm, seed, quick=False):\n    return os.environ['LACONIC_CACHE'] == {str(tmp_path)!r}\n",
    )
    assert execute(path, RUNS[:1], seconds=60)[0].value == 1.0
    assert os.environ["LACONIC_CACHE"] == str(tmp_path)
