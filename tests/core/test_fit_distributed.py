"""The same call under `torchrun`: two processes on gloo against one.

They agree to rounding, not to the bit: each process takes the mean over its share of a micro-batch, and the exchange
adds the shares, so the same terms are summed in another order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laconic.core.fit import fit
from tests.core import distributed_script
from tests.core.training import Points

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes left."""
    out = tmp_path_factory.mktemp("two")
    # A training of one process, which two are to refuse.
    fit(Points().model(0), Points(), torch.optim.Adam, steps=1, out=out / "one-process")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [distributed_script.__file__, str(out)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What the same script leaves in this process."""
    out = tmp_path_factory.mktemp("one")
    distributed_script.main(out)
    return out


def test_two_processes_equal_one(one, two):
    alone = load_file(one / "plain-0.safetensors")
    shares = [load_file(two / f"plain-{rank}.safetensors") for rank in range(2)]
    assert torch.equal(shares[0]["weights"], shares[1]["weights"])
    torch.testing.assert_close(shares[0]["weights"], alone["weights"], rtol=0, atol=1e-6)
    for key in ("history", "value"):
        torch.testing.assert_close(shares[0][key], alone[key], rtol=1e-4, atol=1e-5)
        assert torch.equal(shares[0][key], shares[1][key])
    # Every example went to one process; an epoch's last micro-batch has one example, which is repeated for nothing.
    epochs_ended = 30 // 7
    assert sum(int(s["examples"]) for s in shares) == int(alone["examples"]) + epochs_ended


def test_two_processes_resume_to_the_bit(two):
    for rank in range(2):
        found = load_file(two / f"resumed-{rank}.safetensors")
        assert torch.equal(found["straight"], found["resumed"])


def test_a_parameter_that_takes_no_part(one, two):
    found = [load_file(two / f"again-{rank}.safetensors")["weights"] for rank in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], load_file(one / "again-0.safetensors")["weights"], rtol=0, atol=1e-6)


def test_only_the_first_process_writes(two):
    with open(two / "plain" / "metrics.csv") as file:
        steps = [line.split(",")[0] for line in file][1:]
    assert steps == ["10", "20", "30"]
    assert not list((two / "plain").glob("*.tmp"))
    assert len(json.loads((two / "plain" / "checkpoint.json").read_text())["state"]["random"]) == 2


def test_all_processes_stop_at_what_one_of_them_saw(two):
    said = [(two / f"poisoned-{rank}.txt").read_text() for rank in range(2)]
    assert all("the loss is nan" in text for text in said)
    assert sum("the batch holds NaN" in text for text in said) == 1


def test_a_checkpoint_of_one_process_is_refused(two):
    for rank in range(2):
        assert "was trained by 1 process, now there are 2" in (two / f"refused-{rank}.txt").read_text()
