"""The process that runs an experiment: reads a job from standard input, writes one line of JSON for each run.

A job is {"experiment": path, "runs": [[arm, seed], ...], "quick": bool, "threads": int or null}. What the
experiment prints goes to standard error, so that it cannot be taken for a result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

from laconic.errors import BadInput

__all__ = ["main"]


def load_run(path: Path) -> Callable[..., float]:
    """The function `run` of an experiment's file.

    Raises:
        BadInput: there is none.
    """
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    run = getattr(module, "run", None)
    if not callable(run):
        raise BadInput(f"{path} has no function run(arm, seed, quick=False)")
    return run


def main(job: dict, out: IO[str]) -> None:
    """Do the runs in order; stop at the first that fails, and say why."""
    if job["threads"]:
        import torch

        torch.set_num_threads(job["threads"])
    arm, seed = None, None
    try:
        run = load_run(Path(job["experiment"]))
        for arm, seed in job["runs"]:
            start, cpu = time.perf_counter(), time.process_time()
            value = float(run(arm, seed, quick=job["quick"]))
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            _write(out, {"arm": arm, "seed": seed, "value": value, **spent})
    except Exception as error:  # whatever the experiment raises is told to the process that waits
        said = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        trace = None if isinstance(error, BadInput) else traceback.format_exc()
        bad_input = isinstance(error, BadInput)
        _write(out, {"error": said, "arm": arm, "seed": seed, "bad_input": bad_input, "traceback": trace})


def _write(out: IO[str], line: dict) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(json.loads(sys.stdin.read()), results)
