"""The loop against one written out by hand, the moments of hooks, and what ends a training."""

from __future__ import annotations

import csv
import math
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_model
from torch import nn
from torch.nn import functional

from laconic.core._loader import Loader, epoch_order
from laconic.core.clock import Clock
from laconic.core.fit import NotFinite, fit
from laconic.core.hooks import EarlyStop, Hook, Run
from laconic.errors import BadInput
from tests.core.training import ACCURACY, NoisyPoints, Points, weights


def by_hand(model, task, optimizer, steps, *, accumulate=1, seed=0, clip=None, schedule=None):
    """The same training, written out: one batch of `accumulate` micro-batches at once."""
    group, done, epoch = task.batch_size * accumulate, 0, 0
    while done < steps:
        for indices in epoch_order(len(task.x), seed, epoch).split(group)[: steps - done]:
            optimizer.zero_grad()
            functional.cross_entropy(model(task.x[indices]), task.y[indices]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            done += 1
        epoch += 1


@pytest.mark.parametrize(("accumulate", "count"), [(1, 97), (3, 97), (3, 93)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_equals_the_loop_written_out(accumulate, count, clip):
    task = Points(count)  # an epoch ends with a step of one example, or with one of 8 + 8 + 5
    ours, theirs = task.model(0), task.model(0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (ours, theirs)]
    schedules = [torch.optim.lr_scheduler.StepLR(o, 5, 0.5) for o in optimizers]
    result = fit(ours, task, optimizers[0], steps=20, accumulate=accumulate, clip=clip, schedule=schedules[0])
    by_hand(theirs, task, optimizers[1], 20, accumulate=accumulate, clip=clip, schedule=schedules[1])
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)
    assert [row["lr"] for row in result.history] == [0.5 * 0.5**1, 0.5 * 0.5**3]
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] == 0.5 * 0.5**4
    per_epoch = math.ceil(count / (8 * accumulate))
    assert (result.clock.step, result.clock.steps_per_epoch) == (20, per_epoch)
    assert (result.clock.epoch, result.clock.step_in_epoch) == divmod(20, per_epoch)


def test_every_epoch_sees_every_example_once_in_another_order():
    task = Points(50)
    loader = Loader(task.train_data(), 8, accumulate=2)
    epochs = [torch.cat([b[0] for step in loader.epoch(e) for b in step.batches]) for e in range(2)]
    assert not torch.equal(*epochs)
    for seen in epochs:
        assert torch.equal(seen.sort(0).values, task.x.sort(0).values)
    assert torch.equal(epochs[1], torch.cat([b[0] for step in loader.epoch(1) for b in step.batches]))
    tail = torch.cat([b[0] for step in loader.epoch(1, 2) for b in step.batches])
    assert torch.equal(tail, epochs[1][32:])


@pytest.mark.parametrize("world", [2, 3, 16])
def test_the_shares_of_processes_are_the_batches_of_one(world):
    data = Points(50).train_data()
    whole = list(Loader(data, 8, accumulate=2).epoch(3))
    parts = [list(Loader(data, 8, accumulate=2, rank=r, world=world).epoch(3)) for r in range(world)]
    for number, step in enumerate(whole):
        assert sum(sum(part[number].weights) for part in parts) == pytest.approx(1)
        for m, batch in enumerate(step.batches):
            shares = [part[number].batches[m][0] for part in parts if part[number].weights[m]]
            assert torch.equal(torch.cat(shares), batch[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_are_known_from_seed_and_position(workers):
    data = NoisyPoints(40).train_data()
    torch.manual_seed(1)
    first = [b[0] for step in Loader(data, 8).epoch(0) for b in step.batches]
    torch.manual_seed(2)
    second = [b[0] for step in Loader(data, 8, workers=workers).epoch(0, 2) for b in step.batches]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_drop_last():
    task = Points(97)
    task.drop_last = True
    assert fit(task.model(0), task, torch.optim.Adam, epochs=2).clock.examples == 2 * 96


class Diary(Hook):
    """Writes down when it was asked, with the clock."""

    def __init__(self):
        self.lines: list[str] = []

    def start(self, run):
        self.lines.append("start")

    def batch(self, run, batch):
        self.lines.append(f"batch {len(batch[0])}")
        return batch

    def loss(self, run, loss, batch, output):
        assert output.shape == (len(batch[0]), 2) and output.requires_grad
        self.lines.append("loss")
        return loss

    def gradients(self, run):
        self.lines.append(f"gradients {run.clock.step}")

    def step(self, run):
        self.lines.append(f"step {run.clock.step} lr {run.optimizer.param_groups[0]['lr']}")

    def evaluated(self, run, value):
        self.lines.append("evaluated")

    def epoch(self, run):
        self.lines.append(f"epoch {run.clock.epoch}")

    def end(self, run):
        self.lines.append("end")


def test_the_moments_of_hooks():
    diary, task = Diary(), Points(17)
    model = task.model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    fit(model, task, optimizer, epochs=1, accumulate=2, hooks=[diary], schedule=schedule, evaluate_every="epoch")
    assert diary.lines == [
        "start", "batch 8", "batch 8", "loss", "loss", "gradients 0", "step 1 lr 0.5",
        "batch 1", "loss", "gradients 1", "step 2 lr 0.25", "evaluated", "epoch 1", "end",
    ]  # fmt: skip


class Pull(Hook):
    """Half the loss, on inputs that are turned round, with gradients that are turned round again and doubled."""

    def batch(self, run, batch):
        return -batch[0], batch[1]

    def loss(self, run, loss, batch, output):
        return loss / 2

    def gradients(self, run):
        for p in run.model.parameters():
            p.grad *= 2


def test_what_hooks_return_is_what_is_trained_on():
    task, turned = Points(), Points()
    turned.x = -turned.x
    hooked, plain = task.model(0), task.model(0)
    fit(hooked, task, torch.optim.SGD(hooked.parameters(), lr=0.5), steps=5, hooks=[Pull()])
    fit(plain, turned, torch.optim.SGD(plain.parameters(), lr=0.5), steps=5)
    torch.testing.assert_close(weights(hooked), weights(plain))


def test_gradients_can_be_computed_a_second_time():
    class Twice(Hook):
        def gradients(self, run):
            before = [p.grad.clone() for p in run.model.parameters()]
            assert run.compute_gradients() == run.loss
            assert all(torch.equal(p.grad, b) for p, b in zip(run.model.parameters(), before, strict=True))

    task = Points()
    fit(task.model(0), task, torch.optim.Adam, steps=3, accumulate=2, hooks=[Twice()])


def test_an_optimizer_that_needs_its_closure():
    task = Points(64)
    task.batch_size = 64
    model = task.model(0)
    before = task.loss(model, (task.x, task.y)).item()
    result = fit(model, task, torch.optim.LBFGS, steps=5)
    assert task.loss(model, (task.x, task.y)).item() < before / 2
    assert result.history[-1]["loss"] < before


def test_evaluation_best_and_early_stop(tmp_path):
    values = iter([0.5, 0.7, 0.6, 0.65, 0.9])

    class Told(Points):
        def evaluate(self, model, split="test"):
            assert split == "valid" and not model.training
            torch.rand(3)  # must not change what comes after
            self.kept.append(weights(model))
            return next(values)

    task = Told()
    task.kept = []
    model = task.model(0)
    result = fit(
        model, task, torch.optim.Adam, epochs=9, evaluate_every=4, split="valid", hooks=[EarlyStop(2)], out=tmp_path
    )
    assert result.clock.step == 16 and model.training
    assert "not got better than 0.7" in result.stopped
    assert (result.best.value, result.best.step, result.value) == (0.7, 8, 0.65)
    best = task.model(1)
    load_model(best, result.best.path)
    assert torch.equal(weights(best), task.kept[1])
    load_model(best, tmp_path / "model.safetensors")
    assert torch.equal(weights(best), weights(model))


def test_evaluating_does_not_change_what_follows():
    class Drawing(Points):
        def evaluate(self, model, split="test"):
            return super().evaluate(model, split) + torch.rand(()).item()

    def trained(every):
        task = Drawing()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(6), task.model(0))
        fit(model, task, torch.optim.Adam, steps=6, evaluate_every=every)
        return weights(model)

    assert torch.equal(trained(None), trained(2))


def test_lower_is_better():
    stop = EarlyStop(patience=1, min_delta=0.1)
    run = Run(
        nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), metric=type(ACCURACY)(name="e", higher_is_better=False)
    )
    for value in (3.0, 2.0, 1.95):
        assert run.stopped is None
        stop.evaluated(run, value)
    assert run.stopped is not None


def test_history_and_csv(tmp_path):
    task = Points()
    result = fit(task.model(0), task, torch.optim.Adam, epochs=2, out=tmp_path, log_every=5, evaluate_every="epoch")
    assert [row["step"] for row in result.history] == [5, 10, 13, 15, 20, 25, 26]
    assert result.history[2]["epoch"] == 1 and result.history[2]["examples"] == 97
    assert result.history[2]["accuracy"] > 0.4 and "accuracy" not in result.history[1]
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in result.history]
    assert rows[0]["accuracy"] == "" and float(rows[2]["accuracy"]) == result.history[2]["accuracy"]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = Points()
    result = fit(task.model(0), task, torch.optim.Adam, steps=20, out=tmp_path, log=("csv", "tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [10, 20]
    assert events.Scalars("loss")[1].value == pytest.approx(result.history[1]["loss"])


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    task = Points()
    with pytest.raises(BadInput, match="pip install tensorboard"):
        fit(task.model(0), task, torch.optim.Adam, steps=1, out=tmp_path, log="tensorboard")


def test_the_callers_generators_are_left_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    task = NoisyPoints()
    fit(nn.Sequential(nn.Dropout(), task.model(0)), task, torch.optim.Adam, steps=3)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]


def test_same_seed_same_weights_other_seed_others():
    def trained(seed):
        task = Points()
        model = nn.Sequential(nn.Dropout(0.2), task.model(0))
        fit(model, task, torch.optim.Adam, steps=5, seed=seed)
        return weights(model)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_bf16_runs_the_forward_in_bf16_and_the_loss_in_float32():
    seen = []

    class Watch(Hook):
        def start(self, run):
            run.model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))

        def loss(self, run, loss, batch, output):
            seen.append(output.dtype)
            return loss

    task = Points()
    model = task.model(0)
    forward = model.forward
    fit(model, task, torch.optim.SGD(model.parameters(), lr=0.1), steps=1, precision="bf16", hooks=[Watch()])
    assert seen == [torch.bfloat16, torch.float32]
    assert model[0].weight.dtype == torch.float32 and model.forward == forward
    assert model(task.x).dtype == torch.float32  # autocast is over


class Break(nn.Module):
    """Passes through, until the n-th call: then NaN in the output, or in the gradient alone."""

    def __init__(self, at, gradient=False):
        super().__init__()
        self.at, self.gradient, self.calls = at, gradient, 0
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.calls += 1
        if self.calls < self.at:
            return x * self.scale
        return x + torch.sqrt((self.scale - self.scale.detach()) ** 2) if self.gradient else x * self.scale * math.inf


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_names_step_and_module(accumulate, tmp_path):
    task = Points()
    inner = task.model(0)
    model = nn.Sequential(inner[0], nn.Sequential(nn.ReLU(), Break(at=3 * accumulate)), inner[2])
    before = []

    class Keep(Hook):
        def step(self, run):
            before[:] = [weights(model)]

    with pytest.raises(NotFinite, match=r"^step 3: the loss is .*is that of 1\.1 \(Break\)") as caught:
        fit(model, task, torch.optim.Adam, steps=9, accumulate=accumulate, hooks=[Keep()], out=tmp_path)
    assert (caught.value.step, caught.value.module) == (3, "1.1")
    assert torch.equal(weights(model), before[0])  # the bad step was not taken


def test_a_gradient_that_is_not_finite_names_the_parameter():
    task = Points()
    inner = task.model(0)
    model = nn.Sequential(inner[0], Break(at=2, gradient=True), inner[2])
    with pytest.raises(NotFinite, match=r"^step 2: the gradient of 1\.scale is not finite") as caught:
        fit(model, task, torch.optim.Adam, steps=9, clip=1.0)
    assert caught.value.module == "1"


def test_a_batch_or_weights_that_are_not_finite():
    task = Points()
    task.x[:] = math.nan
    with pytest.raises(NotFinite, match="the batch holds NaN"):
        fit(task.model(0), task, torch.optim.Adam, steps=1)
    task = Points()
    model = task.model(0)
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    with pytest.raises(NotFinite, match=r"the weights of 2\.weight are not finite before the step"):
        fit(model, task, torch.optim.Adam, steps=1)


def test_sparse_gradients_are_stepped_and_watched():
    class Bag(Points):
        def loss(self, model, batch):
            return functional.cross_entropy(model((batch[0] > 0).long()), batch[1])

    task = Bag()
    model = nn.Sequential(nn.EmbeddingBag(2, 2, sparse=True))
    result = fit(model, task, torch.optim.SGD(model.parameters(), lr=0.1), steps=2, clip=1e-3)
    assert result.history[-1]["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "either epochs or steps"),
        ({"epochs": 1, "steps": 1}, "either epochs or steps"),
        ({"steps": -1}, "steps=-1 is negative"),
        ({"steps": 1, "accumulate": 0}, "accumulate=0"),
        ({"steps": 1, "clip": 0.0}, "clip=0.0"),
        ({"steps": 1, "precision": "fp4"}, "precision='fp4'"),
        ({"steps": 1, "evaluate_every": "day"}, "evaluate_every='day'"),
        ({"steps": 1, "resume": True}, "resume=True needs out"),
        ({"steps": 1, "hooks": [EarlyStop()]}, "EarlyStop goes by evaluations, and there are none"),
        ({"steps": 1, "schedule": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o)}, "steps by a metric"),
    ],
)
def test_arguments_that_do_not_fit(arguments, says):
    task = Points()
    with pytest.raises(BadInput, match=says):
        fit(task.model(0), task, torch.optim.Adam, **arguments)


def test_things_that_cannot_be_trained_on(tmp_path):
    class Whole(Points):
        def loss(self, model, batch):
            return model(batch[0])

    class Stream(Points):
        def train_data(self):
            return iter([])

    for task, says in ((Points(0), "nothing to train on"), (Whole(), "must be one number"), (Stream(), "no length")):
        with pytest.raises(BadInput, match=says):
            fit(task.model(0), task, torch.optim.Adam, steps=1)
    task = Points()
    with pytest.raises(BadInput, match="log='wandb' is not known"):
        fit(task.model(0), task, torch.optim.Adam, steps=1, out=tmp_path / "a", log="wandb")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        fit(task.model(0), task, torch.optim.Adam, steps=1, out=tmp_path / "file")
    other = torch.optim.Adam(task.model(0).parameters())
    with pytest.raises(BadInput, match="of another optimizer"):
        schedule = torch.optim.lr_scheduler.StepLR(other, 1)
        fit(task.model(0), task, torch.optim.Adam, steps=1, schedule=schedule)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    task = Points()
    fit(task.model(0), task, torch.optim.Adam, epochs=2, evaluate_every="epoch")
    said = capsys.readouterr().err
    assert ("epoch 2  loss" in said and "26/26" in said) if terminal else said == ""
    fit(task.model(0), task, torch.optim.Adam, epochs=1, quiet=True)
    assert capsys.readouterr().err == ""


def test_generators_of_a_run_are_of_seed_step_and_stream():
    run = Run(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), seed=3)
    draw = lambda *stream: torch.rand(4, generator=run.generator(*stream))  # noqa: E731
    first = draw()
    assert torch.equal(first, draw()) and not torch.equal(first, draw(1))
    run.clock.step += 1
    assert not torch.equal(first, draw())
    with pytest.raises(BadInput, match="only under laconic.fit"):
        run.compute_gradients()


def test_the_clock():
    clock = Clock(steps_per_epoch=3, total=6)
    assert clock.progress == 0 and not clock.every(1)
    assert [clock.advance(8) for _ in range(4)] == [False, False, True, False]
    assert (clock.step, clock.epoch, clock.step_in_epoch, clock.examples) == (4, 1, 1, 32)
    assert clock.progress == pytest.approx(2 / 3) and clock.every(2) and not clock.every(3)
    again = Clock()
    again.load_state_dict(clock.state_dict())
    assert again == clock
