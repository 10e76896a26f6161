"""`OUT.partial`: where work goes until it is whole, and what makes it resumable.

Every solved unit is a file named by the hash of everything that its bits depend on, so a resumed run takes what it finds
and solves the rest: same bytes, whatever moment the first run was killed at.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from laconic.core.checkpoint import write_whole
from laconic.errors import BadInput
from laconic.report.record import clean

from . import interrupt

_done = 0


def digest(*parts: Any) -> str:
    """SHA-256 over JSON of the parts: the name of a unit of work."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Workspace:
    """The folder of a run in progress.

    Args:
        out: the final folder; work goes to `out` + ".partial".
        resume: keep what is there; otherwise start anew.
        overwrite: replace an existing `out` when the run is complete.

    Raises:
        BadInput: `out` exists and may not be replaced, or cannot be made.
    """

    def __init__(self, out: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False):
        self._place(out)
        if self.out.exists() and not overwrite:
            raise BadInput(f"{self.out} exists; name another folder or pass --overwrite")
        if self.out.exists() and not self.out.is_dir():
            raise BadInput(f"{self.out} is a file; the output is a folder")
        if self.out.exists() and any(self.out.iterdir()) and not (self.out / "laconic.json").exists():
            raise BadInput(f"{self.out} is not an artifact of laconic, so it is not overwritten; name another folder")
        self._resume = resume

    def _place(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.records = self.partial / "records"
        self.activations = self.partial / "activations"
        self.reused = 0
        self.fresh: set[str] = set()  # keys that this run has solved, here or in another process

    def open(self, need: int = 0) -> None:
        """Make the folder, on a disk with room for `need` bytes: from here on something is on disk."""
        there = next(p for p in (self.out.absolute(), *self.out.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        if free < need:
            raise BadInput(
                f"{self.out} needs about {need:,} bytes while work goes on, and {free:,} are free: make room"
            )
        try:
            if self.partial.exists() and not self._resume:
                shutil.rmtree(self.partial)
            self.records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.partial} cannot be made: {error.strerror}") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, or None."""
        try:
            return json.loads((self.partial / name).read_text())
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run whole or not at all; what is not finite becomes `null`, which JSON has."""
        text = json.dumps(clean(value), indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_whole(self.partial / name, text.encode())

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors that an earlier run solved under a key, or None; they count as reused."""
        found = self.read(key)
        self.reused += found is not None and key not in self.fresh
        return found

    def has(self, key: str) -> bool:
        """Whether an earlier run solved something under a key."""
        return (self.records / f"{key}.safetensors").exists()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors kept under a key, or None."""
        path = self.records / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            return load(path.read_bytes())
        except Exception:  # noqa: BLE001 - safetensors raises its own type; a torn record is solved again
            path.unlink(missing_ok=True)
            return None

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors of a solved unit."""
        write_whole(self.records / f"{key}.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))
        self.fresh.add(key)
        failpoint("unit")
        interrupt.check()

    def abandon(self) -> None:
        """Remove the folder if no unit was solved in it: there is nothing to resume."""
        if not any(self.records.glob("*.safetensors")):
            shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> Path:
        """Give the complete folder its final name."""
        shutil.rmtree(self.records, ignore_errors=True)
        for folder in self.partial.glob("activations*"):
            shutil.rmtree(folder, ignore_errors=True)
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
            self.partial.rename(self.out)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.out)
        return self.out


def failpoint(name: str) -> None:
    """Die at a chosen moment, for tests: `LACONIC_FAILPOINT` is "NAME:N", the N-th time that this place is passed.

    "NAME:N:SIGINT" sends that signal, as Ctrl-C does, instead of SIGKILL.
    """
    global _done
    wanted, _, rest = os.environ.get("LACONIC_FAILPOINT", "").partition(":")
    if wanted == name:
        count, _, number = rest.partition(":")
        _done += 1
        if _done == int(count) if number else _done >= int(count):
            os.kill(os.getpid(), signal.Signals[number or "SIGKILL"])
