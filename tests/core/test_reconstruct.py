"""Reconstruction: losses, what units are called with, the walk along twins, and the training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.reconstruct import Calls, Group, Twins, channel_loss, linear_decay, output_loss, reconstruct
from laconic.errors import BadInput


class Masked(nn.Module):
    """A chain of blocks that are called with a mask besides."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.new_ones(x.shape[0], 1))
        return x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.inner(x).tanh() * mask


def twins(model: nn.Module, *batches: Tensor) -> Twins:
    teacher = model.eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    return Twins(teacher, student, batches)


def calls(x: Tensor, target: Tensor, **more) -> Calls:
    return Calls("unit", [x], [target], [((), {})], **more)


def test_losses_by_hand() -> None:
    torch.manual_seed(0)
    f, q = torch.randn(5, 3), torch.randn(5, 3)
    want = 0.0
    for c in range(3):
        means = [float(x[:, c].sum()) / 5 for x in (f, q)]
        var = [sum((float(v) - m) ** 2 for v in x[:, c]) / 4 for x, m in zip((f, q), means, strict=True)]
        want += (abs(means[0] - means[1]) + abs(var[0] - var[1])) / 3
    assert float(channel_loss(f, q)) == pytest.approx(want, rel=1e-5)
    both = channel_loss(torch.stack([f, f]), torch.stack([q, q]))
    assert float(both) == pytest.approx(2 * want, rel=1e-5)
    assert float(channel_loss(torch.stack([f, f]), torch.stack([q, q]), reduction="mean")) == pytest.approx(
        want, rel=1e-5
    )
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert float(output_loss(x, y, summed_dim=1)) == pytest.approx(3 * float(output_loss(x, y)), rel=1e-5)
    assert float(output_loss(torch.tensor([-1.0]), torch.tensor([-5.0]), activation=torch.relu)) == 0


def test_refused_losses() -> None:
    with pytest.raises(ValueError, match="single token"):
        channel_loss(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="median"):
        channel_loss(torch.ones(2, 3), torch.ones(2, 3), statistics=("median",))
    assert float(channel_loss(torch.ones(1, 3), torch.zeros(1, 3), statistics=("mean",))) == 1


def test_a_temperature_is_level_and_then_falls() -> None:
    found = [linear_decay(t, 10, warmup=0.5, start=8, end=4) for t in range(11)]
    assert found[:6] == [8.0] * 6 and found[6:] == pytest.approx([7.2, 6.4, 5.6, 4.8, 4.0])


@pytest.mark.parametrize("inputs", ["float", "student", "both"])
def test_the_walk_says_what_units_are_called_with(inputs: str) -> None:
    torch.manual_seed(1)
    pair = twins(Masked(), torch.randn(3, 4), torch.randn(2, 4))
    walked = list(pair.walk(["blocks.1", "blocks.0", "blocks.2"], inputs=inputs))
    assert [one.path for one in walked] == ["blocks.0", "blocks.1", "blocks.2"]
    for one in walked:
        alone = pair.calls(one.path, inputs=inputs)
        assert one.rows == 2  # calls have masks besides, so they are drawn whole
        for a, b in zip([*one.inputs, *one.targets], [*alone.inputs, *alone.targets], strict=True):
            torch.testing.assert_close(a, b)
    same = pair.calls("blocks.2", inputs=inputs, targets="same_input")
    made = pair.teacher.blocks[2](same.inputs[0], torch.ones(3, 1))
    torch.testing.assert_close(same.targets[0], made)


def test_layers_off_the_chain_are_reached_too() -> None:
    torch.manual_seed(2)
    pair = twins(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(5, 4), torch.randn(3, 4))
    first, second = pair.walk(["0", "2"], inputs="student")
    assert first.rows == second.rows == 8
    torch.testing.assert_close(second.inputs[0][:5], pair.student[:2](pair.batches[0]))
    torch.testing.assert_close(second.targets[0][:5], pair.teacher(pair.batches[0]))


def test_the_training_finds_the_layer() -> None:
    torch.manual_seed(3)
    layer, other = nn.Linear(6, 3), nn.Linear(6, 3)
    x = torch.randn(40, 6)
    with torch.no_grad():
        data = calls(x, layer(x))
    done = reconstruct(other, data, [Group(list(other.parameters()), 0.05, "cosine")], steps=300, batch=20)
    assert done.after < 1e-3 * done.before and len(done.losses) == 300
    assert all(p.grad is None and p.requires_grad for p in other.parameters())


def test_adam_written_out() -> None:
    w = torch.tensor([1.0], requires_grad=True)
    data = calls(torch.tensor([[2.0]]), torch.tensor([[0.0]]))
    reconstruct(lambda x: x * w, data, [Group([w], 0.1)], steps=2, batch=None, keep_better=False)
    value, m, v = 1.0, 0.0, 0.0
    for t in (1, 2):
        g = 2 * (2 * value) * 2
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        value -= 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
    assert w.item() == pytest.approx(value, rel=1e-6)


def test_it_never_ends_worse_than_it_began() -> None:
    torch.manual_seed(4)
    layer = nn.Linear(4, 2)
    x = torch.randn(10, 4)
    with torch.no_grad():
        data = calls(x, layer(x) + 1e-4 * torch.randn(10, 2))
    before = copy.deepcopy(layer.state_dict())
    done = reconstruct(layer, data, [Group(list(layer.parameters()), 10.0)], steps=5, batch=None)
    assert done.after == done.before
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), before.values(), strict=True))


def test_the_best_on_the_way_is_kept() -> None:
    w = torch.tensor([1.0], requires_grad=True)
    data = calls(torch.ones(1, 1), torch.zeros(1, 1))
    done = reconstruct(lambda x: x * w, data, [Group([w], 0.9)], steps=8, batch=None)
    assert done.after == pytest.approx(w.item() ** 2) and done.after == pytest.approx(min(done.losses), rel=1e-4)
    assert done.losses[-1] > done.after  # it overshot, and the last step was not the best


def test_draws_repeat_from_the_seed_and_leave_the_global_state() -> None:
    torch.manual_seed(5)
    x = torch.randn(30, 4)
    found = []
    for _ in range(2):
        layer = nn.Linear(4, 2)
        with torch.no_grad():
            [p.fill_(0.1) for p in layer.parameters()]
        state = torch.get_rng_state()
        data = calls(x, x[:, :2], floats=[x + 1])
        reconstruct(layer, data, [Group(list(layer.parameters()), 0.1)], steps=5, batch=4, mix=0.5, seed=7)
        assert torch.equal(state, torch.get_rng_state())
        found.append(layer.weight.detach())
    assert torch.equal(*found)


def test_a_mixture_is_of_both_inputs() -> None:
    x = torch.zeros(50, 20)
    mixed, _, _ = calls(x, x, floats=[x + 1]).draw(None, 0.25)
    assert set(mixed.unique().tolist()) == {0.0, 1.0} and 0.15 < float(mixed.mean()) < 0.35


def test_what_cannot_be_reconstructed_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    with pytest.raises(BadInput, match="there is none"):
        Twins(model, model, [])
    with pytest.raises(BadInput, match="model.eval"):
        Twins(model.train(), model, [torch.ones(1, 4)])
    model.eval()
    with pytest.raises(BadInput, match="0: its inputs on calibration data hold NaN"):
        Twins(model, model, [torch.full((1, 4), torch.nan)]).calls("0")
    with pytest.raises(BadInput, match="0: there are no calibration inputs"):
        Twins(model, model, [torch.ones(0, 4)]).calls("0")
    bypassed = nn.Sequential(nn.Linear(4, 4))
    bypassed.other = nn.Linear(4, 4)
    bypassed.forward = lambda x: bypassed[0](x)  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="other does not run"):
        list(Twins(bypassed.eval(), bypassed, [torch.ones(1, 4)]).walk(["other"]))
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(BadInput, match="unit: the loss of its reconstruction is nan"):
        reconstruct(lambda x: x * w * torch.nan, calls(torch.ones(2, 1), torch.ones(2, 1)), [Group([w], 0.1)], steps=1)
