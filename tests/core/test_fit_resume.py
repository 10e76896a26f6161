"""A training that was cut off and resumed ends with the bits of one that was not; no other may take it up."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.core.fit import fit
from laconic.core.hooks import EarlyStop, Hook
from laconic.errors import BadInput
from tests.core.training import Average, Crash, NoisyPoints, Points, weights


class Residue(nn.Module):
    """Batch statistics, dropout, a buffer that the state dict leaves out, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.tied = nn.Linear(6, 16, bias=False)
        self.tied.weight = self.inner[0].weight
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.seen += x.abs().mean().detach()
        return self.inner(x) + 0.1 * self.tied(x)[:, :2] + 0.01 * self.seen


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=30)


def warmup(optimizer):
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 9]),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [5])


CASES = {
    "plain": {},
    "schedule": {"schedule": one_cycle, "clip": 0.5},
    "nested schedule": {"schedule": warmup, "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    "accumulation": {"accumulate": 3},
    "bf16": {"precision": "bf16", "optimizer": torch.optim.NAdam},
    "checkpoint between epochs": {"save_every": "epoch"},
    "workers": {"workers": 1},
}


def train(out: Path | None, *, fail_at: int = 0, resume: bool = False, make_task=NoisyPoints, **changes):
    torch.manual_seed(0)
    options = {"optimizer": torch.optim.AdamW, "steps": 26, "save_every": 3, "log_every": 4, "evaluate_every": 5}
    options |= changes
    task = make_task(90, fail_at)  # 12 micro-batches to an epoch
    average = Average()
    result = fit(
        Residue(), task, options.pop("optimizer"), out=out, resume=resume, hooks=[average, EarlyStop(50)], **options
    )
    return result, average


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_never_stopped(case, tmp_path):
    changes = CASES[case]
    straight, straight_average = train(tmp_path / "straight", **changes)
    micro = changes.get("accumulate", 1)
    assert straight.clock.step == 26
    with pytest.raises(Crash):
        train(tmp_path / "cut", fail_at=17 * micro, **changes)
    with pytest.raises(Crash):  # cut off a second time
        train(tmp_path / "cut", fail_at=3 * micro, resume=True, **changes)
    saved = json.loads((tmp_path / "cut" / "checkpoint.json").read_text())["step"]
    assert saved == (12 if case == "checkpoint between epochs" else 15)
    resumed, average = train(tmp_path / "cut", resume=True, **changes)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert torch.equal(resumed.model.seen, straight.model.seen)
    assert resumed.history == straight.history
    assert (resumed.clock, resumed.value, resumed.best.step) == (straight.clock, straight.value, straight.best.step)
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")
    assert average.seen == straight_average.seen
    assert all(torch.equal(a, b) for a, b in zip(average.mean, straight_average.mean, strict=True))
    for name in ("model.safetensors", "best.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_checkpoint_does_not_change_what_follows(tmp_path):
    pytest.importorskip("tensorboard")
    without, _ = train(None)
    saved, _ = train(tmp_path / "a", save_every=1, log=("csv", "tensorboard"))
    assert torch.equal(weights(without.model), weights(saved.model))


def test_a_finished_training_is_resumed_to_the_same_end(tmp_path):
    first, _ = train(tmp_path)
    again, _ = train(tmp_path, resume=True)
    assert again.history == first.history and again.clock == first.clock
    assert torch.equal(weights(again.model), weights(first.model))


def test_resume_starts_anew_where_nothing_is(tmp_path):
    assert train(tmp_path / "new", resume=True)[0].clock.step == 26


def test_low_precision_weights_keep_their_float32_state(tmp_path):
    """torch's own loading casts an optimizer's state to the weight's dtype."""

    class Precise(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("sum", torch.zeros(p.shape, dtype=torch.float32)).add_(p.grad.float(), alpha=1.001)
                    p.data.add_(state["sum"].to(p.dtype), alpha=-1e-2)

    class Half(Points):
        def loss(self, model, batch):
            return super().loss(model, (batch[0].bfloat16(), batch[1]))

    def run(out, fail_at=0, resume=False):
        task = Half(90, fail_at)
        model = task.model(0).bfloat16()
        fit(model, task, Precise, steps=9, out=out, resume=resume, save_every=2)
        return weights(model)

    with pytest.raises(Crash):
        run(tmp_path / "cut", fail_at=6)
    assert torch.equal(run(tmp_path / "cut", resume=True), run(tmp_path / "straight"))


KILLED = """
import os, signal, sys
from tests.core.test_fit_resume import train
from tests.core.training import NoisyPoints

class Killed(NoisyPoints):
    pass

def loss(self, model, batch):
    if self.calls == int(sys.argv[2]):
        os.kill(os.getpid(), int(sys.argv[3]))
    return NoisyPoints.loss(self, model, batch)

Killed.loss = loss
Killed.__qualname__, Killed.__module__ = NoisyPoints.__qualname__, NoisyPoints.__module__
train(sys.argv[1], make_task=Killed if sys.argv[2] != "-1" else NoisyPoints)
"""


def in_a_process(out: Path, at: int, number: signal.Signals) -> subprocess.CompletedProcess:
    script = out.parent / "train.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(script), str(out), str(at), str(int(number))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch(tmp_path):
    found = in_a_process(tmp_path / "cut", 16, signal.SIGKILL)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert json.loads((tmp_path / "cut" / "checkpoint.json").read_text())["step"] == 15
    resumed, _ = train(tmp_path / "cut", resume=True)
    straight, _ = train(None)
    assert torch.equal(weights(resumed.model), weights(straight.model))


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_keeps_it(tmp_path):
    found = in_a_process(tmp_path / "cut", 16, signal.SIGINT)
    assert found.returncode != 0 and "KeyboardInterrupt" in found.stderr
    assert json.loads((tmp_path / "cut" / "checkpoint.json").read_text())["step"] == 17
    resumed, _ = train(tmp_path / "cut", resume=True)
    straight, _ = train(None)
    assert torch.equal(weights(resumed.model), weights(straight.model))


class Wider(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.inner(x)


class OtherPoints(Points):
    id = "other-points"


def shifted():
    task = Points()
    task.x += 1
    return task


class Idle(Hook):
    pass


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": partial(Wider, 8)}, r"parameter inner\.0\.weight was \[16, 6\] float32, is \[8, 6\] float32"),
        ({"model": lambda: nn.Sequential(Wider())}, "the model's class was .*Wider, is .*Sequential"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.2)}, "optimizer group 0: lr was 0.1, is 0.2"),
        ({"optimizer": torch.optim.Adam}, "the optimizer's class was .*SGD, is .*Adam"),
        ({"schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=3)}, "schedule was none, is .*StepLR"),
        ({"task": OtherPoints}, "task was points, is other-points"),
        ({"task": shifted}, "the training data has changed"),
        ({"task": partial(Points, 96)}, "examples was 97, is 96"),
        ({"hooks": [Idle()]}, "hooks was none, is .*Idle"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"accumulate": 2}, "accumulate was 1, is 2"),
        ({"clip": 1.0}, "clip was None, is 1.0"),
        ({"precision": "bf16"}, "precision was no, is bf16"),
        ({"resume": False}, "holds a training already; go on with resume=True"),
    ],
)
def test_another_training_is_refused_by_what_differs(changes, says, tmp_path):
    def run(model=Wider, task=Points, optimizer=None, resume=True, **options):
        optimizer = optimizer or partial(torch.optim.SGD, lr=0.1)
        return fit(model(), task(), optimizer, steps=4, out=tmp_path, resume=resume, **options)

    run(resume=False)
    before = (tmp_path / "checkpoint.json").read_bytes()
    with pytest.raises(BadInput, match=says):
        run(**changes)
    assert (tmp_path / "checkpoint.json").read_bytes() == before


def test_changed_source_is_refused(tmp_path):
    sources = [
        "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        return super().forward(x)\n",
        "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        return 2 * super().forward(x)\n",
    ]
    import importlib.util

    def net(number):
        path = tmp_path / f"net{number}.py"
        path.write_text(sources[number])
        spec = importlib.util.spec_from_file_location("a_net", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["a_net"] = module
        spec.loader.exec_module(module)
        return module.Net(6, 2)

    fit(net(0), Points(), torch.optim.Adam, steps=1, out=tmp_path / "out")
    with pytest.raises(BadInput, match=r"source of a_net\.Net has changed"):
        fit(net(1), Points(), torch.optim.Adam, steps=1, out=tmp_path / "out", resume=True)
    del sys.modules["a_net"]


def test_another_number_of_processes_is_refused(tmp_path):
    def run(**more):
        return fit(Wider(), Points(), torch.optim.Adam, steps=2, out=tmp_path, **more)

    run()
    path = tmp_path / "checkpoint.json"
    found = json.loads(path.read_text())
    found["state"]["random"] *= 4
    path.write_text(json.dumps(found))
    with pytest.raises(BadInput, match="was trained by 4 processes, now there is 1"):
        run(resume=True)


def test_more_steps_than_planned_are_told(tmp_path, caplog):
    def run(steps, **more):
        return fit(Wider(), Points(), torch.optim.Adam, steps=steps, out=tmp_path, **more)

    run(3)
    result = run(7, resume=True)
    assert result.clock.step == 7 and "was to have 3 steps, now 7" in caplog.text
    straight = fit(Wider(), Points(), torch.optim.Adam, steps=7)
    assert straight.clock == result.clock


@pytest.mark.parametrize("harm", ["json", "tensors", "missing", "format"])
def test_a_checkpoint_that_cannot_be_read(harm, tmp_path):
    def run(**more):
        return fit(Wider(), Points(), torch.optim.Adam, steps=2, out=tmp_path, **more)

    run()
    (tensors,) = tmp_path.glob("checkpoint-*.safetensors")
    path = tmp_path / "checkpoint.json"
    if harm == "json":
        path.write_text(path.read_text()[:100])
    elif harm == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif harm == "missing":
        tensors.unlink()
    else:
        path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(BadInput, match=r"checkpoint\.json cannot be read"):
        run(resume=True)


def test_state_that_cannot_be_kept_is_named(tmp_path):
    class Odd(Hook):
        def state_dict(self):
            return {"thing": object()}

    with pytest.raises(BadInput, match=r"state\.hooks\.0\.thing is of type object"):
        fit(Wider(), Points(), torch.optim.Adam, steps=2, out=tmp_path, hooks=[Odd()])
