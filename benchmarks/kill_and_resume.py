"""Kill a compression with SIGKILL at random moments, resume it, and compare the bytes with an uninterrupted run's.

    python benchmarks/kill_and_resume.py [--kills 10] [--chain] [--seed 0] [--out FILE] [-- ARGUMENTS OF compress]
    python benchmarks/kill_and_resume.py --kills 10 -- --task minilm-bbc --budget size=4x

Without arguments of its own, `laconic compress` gets `--task tiny-lm --budget size=8x`. One run is left alone: it gives the
bytes and the duration D. The moments of the kills are uniform over [0, D), drawn from the seed. Both are seconds of the
process's own CPU time, so that a machine that is busy with other things does not move them to another place in the work. By
default every kill has a folder of its own and one resumed run that ends it. With `--chain` the same folder is killed again and
again until a run gets to its end before its moment comes; then a new folder begins. That is cheaper, and a harder test.

Two things are checked, and exit code 1 says that one failed:

- *same*: model.safetensors, config.json and recipe.yaml of every finished run have the bytes of the uninterrupted run;
- *reused*: a run that began with records of solved units in its folder, and ended, took at least one of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from laconic.pipeline.measure import machine, versions

DEFAULT = ("--task", "tiny-lm", "--budget", "size=8x")
COMPARED = ("model.safetensors", "config.json", "recipe.yaml")
FINISHED = (0, 3)  # the budget was met, or missed: either way the artifact is there
POLL = 0.01  # seconds between two looks at a process's CPU time


@dataclass
class Attempt:
    """One process, started in a folder and killed there, or left to its end.

    Attributes:
        folder: number of the output folder; attempts with the same number follow each other.
        began_with: records of solved units that were there when it started.
        left: records that were there when it was gone (none once the folder is complete).
        cpu_seconds: CPU time that it had used when it was killed, or ended.
        killed: whether SIGKILL came before its end.
        reused: units that it says it took from records; None if it was killed.
        same: whether the finished files have the bytes of the uninterrupted run; None if it was killed.
    """

    folder: int
    began_with: int
    left: int
    cpu_seconds: float
    killed: bool
    reused: int | None = None
    same: bool | None = None

    def faults(self) -> list[str]:
        """What is wrong, in words."""
        if self.killed:
            return []
        found = [] if self.same else ["the bytes differ from the uninterrupted run's"]
        if self.began_with and not self.reused:
            found.append(f"{self.began_with} records were there and none was reused")
        return found


class Runner:
    """Starts `laconic compress` with given arguments, and kills it.

    Args:
        arguments: of `compress`, without `--out`.
        work: folder for outputs and logs.
    """

    def __init__(self, arguments: Sequence[str], work: Path):
        self.arguments, self.work = tuple(arguments), work
        self.expected: dict[str, str] = {}
        self.duration = 0.0

    def whole(self) -> dict[str, str]:
        """Run once to the end: the hashes that every later run is held to, and the duration."""
        out = self.work / "whole"
        process, log = self._start(out, resume=False)
        self.duration = _run(process, until=None)
        self._ended(process.returncode, log)
        self.expected = hashes(out)
        return self.expected

    def attempt(self, folder: int, moment: float | None) -> Attempt:
        """Run in a folder until `moment` seconds of CPU time, or to the end.

        Raises:
            RuntimeError: the run failed by itself.
        """
        out = self.work / f"out-{folder}"
        before = records(out)
        process, log = self._start(out, resume=True)
        cpu = _run(process, until=moment)
        if process.returncode == -signal.SIGKILL:
            if not out.exists():
                return Attempt(folder, before, records(out), cpu, killed=True)
            # The folder got its final name, and the process died before it could say so: the bytes are judged all the same.
            return Attempt(folder, 0, 0, cpu, killed=False, same=hashes(out) == self.expected)
        said = self._ended(process.returncode, log)
        return Attempt(folder, before, 0, cpu, False, said["units_reused"], hashes(out) == self.expected)

    def _start(self, out: Path, resume: bool) -> tuple[subprocess.Popen[bytes], Path]:
        log = self.work / f"{out.name}.log"
        command = [sys.executable, "-m", "laconic", "compress", *self.arguments, "--out", str(out), "--json"]
        with open(log, "wb") as file:
            said = subprocess.Popen([*command, *(["--resume"] if resume else [])], stdout=file, stderr=file)
        return said, log

    def _ended(self, code: int, log: Path) -> dict:
        """The line of JSON that a finished run printed."""
        text = log.read_text(errors="replace")
        if code not in FINISHED:
            raise RuntimeError(f"laconic compress ended with exit code {code}:\n{text[-2000:]}")
        return json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))


def _run(process: subprocess.Popen[bytes], until: float | None) -> float:
    """Wait for a process, and kill it at `until` seconds of its CPU time; the CPU seconds that it used."""
    seen, watched = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            times = watched.cpu_times()
        except psutil.NoSuchProcess:  # it ended between the two looks
            continue
        seen = times.user + times.system
        if until is not None and seen >= until:
            process.kill()
            process.wait()
        else:
            time.sleep(POLL)
    return seen


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that equal runs must give alike; a file that is missing has none."""
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in COMPARED if (folder / n).exists()}


def records(out: Path) -> int:
    """Records of solved units that wait for a resumed run of `out`."""
    return len(list(out.with_name(f"{out.name}.partial").glob("records/*.safetensors")))


def attempts(runner: Runner, kills: int, seed: int, chain: bool) -> Iterator[Attempt]:
    """Kill at moments uniform over [0, duration) until so many kills have landed, and bring every folder to its end."""
    draw, folder, landed = random.Random(seed), 0, 0
    while landed < kills:
        found = runner.attempt(folder, draw.uniform(0.0, runner.duration))
        landed += found.killed
        yield found
        if found.killed and chain and landed < kills:
            continue
        if found.killed:
            yield runner.attempt(folder, None)
        folder += 1


def row(number: int, found: Attempt) -> str:
    """A line of the table."""
    end = f"{'killed' if found.killed else 'ended':>7} after {found.cpu_seconds:6.1f} s"
    if found.killed:
        return f"{number:>4}  out-{found.folder:<3} {end}  records {found.began_with:>4} -> {found.left:<4}"
    reused = "?" if found.reused is None else found.reused
    verdict = "; ".join(found.faults()) or "same bytes"
    return f"{number:>4}  out-{found.folder:<3} {end}  records {found.began_with:>4}, reused {reused:<4} {verdict}"


def main() -> int:
    """Run, kill, resume, compare; print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="of laconic compress, after --; without --out")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--chain", action="store_true", help="kill the same folder until a run gets to its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args()
    arguments = options.arguments or list(DEFAULT)
    print(f"laconic compress {' '.join(arguments)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as work:
        runner = Runner(arguments, Path(work))
        expected = runner.whole()
        print(f"left alone: {runner.duration:.1f} s of CPU time", flush=True)
        found = []
        for one in attempts(runner, options.kills, options.seed, options.chain):
            found.append(one)
            print(row(len(found), one), flush=True)
    kills, ends = sum(a.killed for a in found), [a for a in found if not a.killed]
    faults = [f"attempt {i}: {fault}" for i, a in enumerate(found, 1) for fault in a.faults()]
    good = sum(not a.faults() for a in ends)
    print(f"{kills} kills, {len(ends)} finished runs, {good} of them as they must be")
    if options.out:
        written = {
            "command": " ".join(["python", *sys.argv]), "arguments": arguments, "seed": options.seed, "chain": options.chain,
            "cpu_seconds_left_alone": runner.duration, "kills": kills, "finished": len(ends), "faults": faults,
            "sha256": expected, "attempts": [asdict(a) for a in found], "load_average": os.getloadavg(),
            "machine": machine(), "versions": versions(),
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
