"""`adab2n`: weights by task, the sequence of momenta, stopping and resuming, and the recorded vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from laconic.adapt import AdaB2N, AdaB2NContext, task_weights, weighted_statistics
from laconic.errors import BadInput
from laconic.testing import Case, Example


def ready(renormalize: bool = False) -> AdaB2N:
    """A layer in its second task, told what a batch of four holds."""
    layer = AdaB2N(3, 2, kappa=0.4, renormalize=renormalize)
    layer.end_task()
    layer.set_tasks(torch.tensor([0, 1, 1, 1]))
    return layer


TRAITS = ("gradient:exact", "batch_independent_eval", "folds")
EXAMPLES = [
    Example(ready, kind="Layer", traits=TRAITS, inputs=[(4, 3, 2, 2)], wrong=[(4, 5, 2, 2)]),
    Example(lambda: ready(True), kind="Layer", traits=TRAITS, inputs=[(4, 3)], wrong=[(4, 5)]),
]


def run_vector(case: Case):
    args = case.args
    layer = AdaB2N(
        args["num_features"],
        args["num_tasks"],
        args["eps"],
        args["momentum"],
        args["affine"],
        kappa=args["kappa"],
        balanced_from_task=args.get("balanced_from_task", 1),
    )
    state = dict(layer.state_dict())
    taken = ("weight", "bias", "task_weight", "running_mean", "running_var", "num_batches_tracked")
    state |= {name: case.array(name) for name in taken if name in case}
    if "cur_tasks" in case:
        state["current_task"] = case.array("cur_tasks")
    layer.load_state_dict(state)
    layer.train(args["training"])
    if not args["training"]:
        return {"output": layer(case.array("input"))}
    roles = ("output", "grad_input", "running_mean_after", "running_var_after", "stat_loss", "eta")
    learned = [name for name in ("weight", "bias") if f"grad_{name}" in case]
    found = {role: [] for role in roles} | {f"grad_{name}": [] for name in learned}
    if "grad_task_weight" in case:
        found["grad_task_weight"] = []
    steps = zip(
        *(case.arrays(role) for role in ("input", "grad_output", "label", "task")), range(args["steps"]), strict=True
    )
    for x, grad, labels, task, step in steps:
        while int(layer.current_task) < int(task):
            layer.end_task()
        layer.set_tasks(labels // args["num_classes_per_task"] if int(task) >= args["balanced_from_task"] else None)
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        ((y * grad).sum() + args["stat_loss_weight"] * layer.stat_loss).backward()
        after = (layer.running_mean.clone(), layer.running_var.clone(), layer.stat_loss, layer.eta.clone())
        for role, value in zip(roles, (y, x.grad, *after), strict=True):
            found[role].append(value)
        for name in learned:
            found[f"grad_{name}"].append(layer.get_parameter(name).grad)
        if "grad_task_weight" in found and step >= args["grad_task_weight_first_step"]:
            found["grad_task_weight"].append(layer.task_weight.grad)
    return found


def test_the_equation():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 2, 3, generator=g, dtype=torch.float64), [0.3, -0.2, 0.7]
    tasks = [0, 2, 2, 0, 2]  # none of task 1
    weights = task_weights(torch.tensor(tasks), torch.tensor(w, dtype=torch.float64))
    a = [math.exp(w[t]) + tasks.count(t) for t in range(3)]
    want = [a[t] / sum(a) / tasks.count(t) for t in tasks]
    assert weights.tolist() == pytest.approx(want)
    assert weights.sum().item() == pytest.approx(1 - a[1] / sum(a))  # what task 1 would weigh is lost
    whole = task_weights(torch.tensor(tasks), torch.tensor(w, dtype=torch.float64), renormalize=True)
    assert whole.sum().item() == pytest.approx(1)
    mean, var = weighted_statistics(x, weights)
    for c in range(2):
        m = sum(want[i] * x[i, c].mean().item() for i in range(5))
        v = sum(want[i] * (x[i, c] - m).square().mean().item() for i in range(5))
        assert (mean[c].item(), var[c].item()) == (pytest.approx(m), pytest.approx(v))


def test_without_tasks_it_is_a_batch_norm():
    ours, theirs = AdaB2N(3), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) + 2
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)  # kappa = 1: the same momentum
    assert not torch.allclose(ours.running_var, theirs.running_var)  # biased here


def test_kappa_zero_is_the_mean_over_all_batches():
    layer, means = AdaB2N(2, kappa=0.0), []
    for i in range(6):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(i)) + i
        layer(x)
        means.append(x.mean(0))
        assert float(layer.eta) == pytest.approx(1 / (i + 1))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))


def test_the_sequence_goes_on_after_a_resume():
    first = ready()
    for _ in range(3):
        first(torch.randn(4, 3, 2))
    second = ready()
    second.load_state_dict(first.state_dict())
    assert second.next_eta() == first.next_eta() != first.momentum


def test_a_context_tells_all_layers_and_finishes_with_batch_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    originals = model[1], model[4]
    context = AdaB2NContext(model, 3, kappa=0.5, loss_from_task=1)
    with pytest.raises(BadInput, match="before the model was run"):
        context.stat_loss()
    model(torch.randn(4, 1, 8, 8))
    assert context.stat_loss() == 0  # of the first task
    context.end_task()
    with context.batch(torch.tensor([0, 1, 1, 1])):
        model(torch.randn(4, 1, 8, 8))
    loss = context.stat_loss()
    assert loss.item() == pytest.approx(sum(layer.stat_loss.item() for layer in context.layers.values()))
    loss.backward()
    assert all(layer.task_weight.grad is not None for layer in context.layers.values())
    x = torch.randn(2, 1, 8, 8)
    want = model.eval()(x)
    assert context.finish() is model and model[1] is originals[0] and model[4] is originals[1]
    torch.testing.assert_close(model.eval()(x), want)


def test_micro_batches_can_be_differentiated_together():
    layer = ready()
    losses = []
    for _ in range(2):
        layer(torch.randn(4, 3, 2))
        losses.append(layer.stat_loss)
    torch.stack(losses).sum().backward()
    assert torch.isfinite(layer.task_weight.grad).all()


def test_functional_calls_leave_the_state():
    layer = ready()
    before = layer.running_mean.clone()
    functional_call(layer, dict(layer.state_dict()), (torch.randn(4, 3, 2),))
    assert torch.equal(layer.running_mean, before)


def test_refusals():
    layer = AdaB2N(3, 2)
    with pytest.raises(ValueError, match="the latest is 0: call end_task"):
        layer.set_tasks(torch.tensor([0, 1]))
    layer.end_task()
    with pytest.raises(ValueError, match="num_tasks=2 have begun"):
        layer.end_task()
    layer.set_tasks(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="set for 2 examples, and the batch has 3"):
        layer(torch.randn(3, 3))
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(1, 3))
    with pytest.raises(ValueError, match="kappa=2"):
        AdaB2N(3, kappa=2)
    with pytest.raises(BadInput, match="kappa=0 is that average"):
        AdaB2N.from_batchnorm(nn.BatchNorm1d(3, momentum=None), 2)
