"""What each process of `torchrun` runs in test_distribute: python distributed_script.py JOB.json.

The job lists calls of `compress`. Under "data" every plan misses the drop and the second process does not see the folder of
the first, under "streamed" the model is taken for one that does not fit, and under "refused" the second process was given
something else.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from pytest import MonkeyPatch

from laconic.errors import LaconicError
from laconic.pipeline.compress import compress
from laconic.pipeline.run import Run


def pretend(name: str, patch: MonkeyPatch) -> None:
    """Let a job meet what its name says."""
    if name == "streamed":
        patch.setattr(Run, "must_stream", lambda self, meta: True)
    if name == "data":  # whatever is measured misses the drop: a larger plan is solved after the first
        real = Run._measure_select
        patch.setattr(Run, "_measure_select", lambda self, *given: real(self, *given) + 100.0)
    if name == "data" and os.environ.get("RANK") == "1":
        there = Path.exists
        patch.setattr(Path, "exists", lambda path: not path.name.startswith("together-") and there(path))


def main(job: Path) -> None:
    torch.set_num_threads(1)
    rank, said = os.environ["RANK"], []
    for call in json.loads(job.read_text()):
        name = call.pop("name")
        if rank == "1" and name == "refused":
            call["seed"] = 7
        with MonkeyPatch.context() as patch:
            pretend(name, patch)
            try:
                result = compress(**call, distribute=2)
                said.append([result.exit_code, result.units_reused])
            except LaconicError as error:
                said.append([type(error).__name__, str(error)])
    job.with_name(f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
