"""What each process of `torchrun` runs in test_distribute: python distributed_script.py JOB.json.

The job lists calls of `compress`. Under "streamed" the model is taken for one that does not fit, under "apart" the second
process does not see the folder of the first, and under "refused" it was given something else.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.pipeline.compress import compress
from laconic.pipeline.run import Run


def unseen(path: Path, real: Any = Path.exists) -> bool:
    """As on another machine: the sign of the first process is not there."""
    return not path.name.startswith("together-") and real(path)


def main(job: Path) -> None:
    torch.set_num_threads(1)
    rank, said = os.environ["RANK"], []
    must_stream = Run._must_stream
    for call in json.loads(job.read_text()):
        name = call.pop("name")
        Run._must_stream = must_stream if name != "streamed" else lambda self, meta: True
        if rank == "1" and name == "apart":
            Path.exists = unseen
        if rank == "1" and name == "refused":
            call["seed"] = 7
        try:
            result = compress(**call, distribute=2)
            said.append([result.exit_code, result.units_reused])
        except LaconicError as error:
            said.append([type(error).__name__, str(error)])
    job.with_name(f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
