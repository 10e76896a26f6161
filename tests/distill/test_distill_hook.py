"""`Distill`: the loss it makes, what the teacher sees, adapters, resuming, and that nothing of it stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.fit import TrainTask, fit
from laconic.core.hooks import Hook
from laconic.distill import Distill, FeatureMSE, KDLoss, Match, layer_map, regressor
from laconic.errors import BadInput
from laconic.tasks.metrics import ACCURACY
from laconic.tasks.small import Rows


class Toy(TrainTask):
    """Three classes of points in the plane."""

    id, metric, batch_size = "toy", ACCURACY, 8

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(24, 2, generator=generator)
        self.rows = Rows(x, (x @ torch.randn(2, 3, generator=generator)).argmax(1))

    def train_data(self) -> Rows:
        return self.rows

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.0), nn.Linear(4, 3))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, split: str = "test") -> float:
        with torch.no_grad():
            return float((model(self.rows.columns[0]).argmax(1) == self.rows.columns[1]).double().mean())


def teacher() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), nn.Linear(6, 3))


def trained(hooks: list[Hook], **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    task = Toy()
    model = task.model(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    fit(model, task, optimizer, hooks=hooks, quiet=True, **({"epochs": 3} | options))
    return model, optimizer


def test_one_step_descends_the_sum() -> None:
    task, big = Toy(), teacher()
    model = task.model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = task.rows.columns
    output = model(x)
    expected = 0.25 * F.cross_entropy(output, y) + 0.5 * KDLoss(2.0, 1.0)(output, big.eval()(x))
    expected.backward()
    want = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    big.train()
    hook = Distill(big, [Match(KDLoss(2.0, 1.0), weight=0.5)], task_weight=0.25)
    task.batch_size = 24
    fit(model, task, optimizer, steps=1, hooks=[hook], quiet=True)
    for got, expected_value in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(got.detach(), expected_value, rtol=1e-5, atol=1e-6)
    assert big.training and all(p.grad is None for p in big.parameters())


class Noisy(Hook):
    """Changes the batch, as augmentation does."""

    def batch(self, run, batch):
        return batch[0] + torch.randn(batch[0].shape, generator=run.generator()), batch[1]


def test_the_teacher_sees_what_the_student_sees() -> None:
    seen: list[Tensor] = []
    big = teacher()
    big.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    task = Toy()
    model = task.model(1)
    shown: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: shown.append(args[0].clone()))
    hook = Distill(big, [Match(KDLoss(alpha=1.0))])
    fit(model, task, torch.optim.SGD(model.parameters(), lr=0.1), steps=2, hooks=[Noisy(), hook], quiet=True)
    assert len(seen) == len(shown) == 2 and all(torch.equal(a, b) for a, b in zip(seen, shown, strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_an_adapter_is_trained_and_not_exported() -> None:
    match = Match(FeatureMSE(regressor(4, 6)), student="0")
    before = [p.detach().clone() for p in match.loss.parameters()]
    model, optimizer = trained([Distill(teacher(), [match])])
    assert all(not torch.equal(a, b) for a, b in zip(before, match.loss.parameters(), strict=True))
    assert set(model.state_dict()) == set(Toy().model(1).state_dict())
    assert len(optimizer.param_groups) == 1
    assert not model._forward_pre_hooks and not model[0]._forward_hooks


def test_a_schedule_does_not_mind_the_adapter() -> None:
    match = Match(FeatureMSE(regressor(4, 6)), student="0")
    trained([Distill(teacher(), [match])], schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda s: 0.9**s]))


class Halt(Hook):
    """Stops a training at a step, as a machine that fails."""

    def __init__(self, at: int | None):
        self.at = at

    def step(self, run):
        if run.clock.step == self.at:
            raise KeyboardInterrupt


def test_resuming_gives_the_same_bits(tmp_path) -> None:
    def hooks(halt: int | None = None) -> list[Hook]:
        torch.manual_seed(3)
        return [Distill(teacher(), [Match(FeatureMSE(regressor(4, 6)), student="0")]), Halt(halt)]

    whole, _ = trained(hooks())
    with pytest.raises(KeyboardInterrupt):
        trained(hooks(5), out=tmp_path, save_every=2)
    again, _ = trained(hooks(), out=tmp_path, save_every=2, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def adapted() -> dict[str, Tensor]:
    """Student and adapter after some steps, on however many processes."""
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(50 + rank)  # the others start as the first does
    match = Match(FeatureMSE(regressor(4, 6)), student="0")
    model, _ = trained([Distill(teacher(), [match])])
    assert isinstance(match.loss, nn.Module)
    return {name: p.detach().clone() for part in (model, match.loss) for name, p in part.named_parameters()}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path) -> None:
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("distributed_script.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = adapted()
    for rank in (0, 1):
        both = load_file(tmp_path / f"{rank}.safetensors")
        assert both.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5, msg=f"{name} of process {rank}")


def test_evaluation_does_not_ask_the_teacher() -> None:
    calls: list[int] = []
    big = teacher()
    big.register_forward_hook(lambda *args: calls.append(1))
    trained([Distill(big, [Match(KDLoss(alpha=1.0))])], evaluate_every=1)
    assert len(calls) == 9


def test_refusals() -> None:
    with pytest.raises(BadInput, match="one Match at least"):
        Distill(teacher(), [])
    with pytest.raises(BadInput, match="the student has no module 'block'"):
        trained([Distill(teacher(), [Match(KDLoss(alpha=1.0), student="block")])])
    with pytest.raises(BadInput, match="the teacher has no module 'body'"):
        trained([Distill(teacher(), [Match(KDLoss(alpha=1.0), teacher="body")])])
    with pytest.raises(BadInput, match="returns dict: give Match"):
        Match(KDLoss()).tensor({})
    for bad in ((0, 4, "hidden"), (3, 4, "hidden"), (2, 4, "heads")):
        with pytest.raises(ValueError, match="layer_map"):
            layer_map(*bad)
    with pytest.raises(ValueError, match="regressor"):
        regressor(2, 3, 0, norm=True)


def test_outputs_of_transformers_are_understood() -> None:
    class Output:
        logits = torch.ones(2)

    match = Match(KDLoss())
    assert match.tensor(Output()) is Output.logits
    assert match.tensor((Output.logits, None)) is Output.logits
