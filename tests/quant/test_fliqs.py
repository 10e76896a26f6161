"""`fliqs`: the policy on recorded rewards, formats, costs, a training that keeps its target, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from laconic.core.fit import fit
from laconic.errors import BadInput, Impossible
from laconic.quant import REWARDS, Fliqs, FliqsPolicy, Switched, entropy_weight, fake_format
from laconic.search import Space
from laconic.tasks.small import small
from laconic.testing import Example
from laconic.testing.vectors import Case

SPACE = Space({"a": (2, 4, 8), "b": (2, 4), "c": (2, 4, 8)})
OPTIMUM = (2, 0, 1)


def reward(candidate) -> float:
    return -float(sum(abs(i - j) for i, j in zip(candidate, OPTIMUM, strict=True)))


EXAMPLES = [
    Example(
        lambda space, seed: FliqsPolicy(space, seed, total=200, delay=40, lr=0.05),
        kind="Search",
        name="FliqsPolicy",
        inputs=[SPACE, reward],
        stated={"optimum": OPTIMUM, "evaluations": 200},
    )
]


def run_vector(case: Case) -> dict[str, Tensor | list[Tensor]]:
    """A schedule, rewards, or steps of the policy."""
    args = case.args
    if case.what == "schedule":
        more = {"switch_at": args["switch_at"]} if "switch_at" in args else {}
        how = {"maximum": args["max_beta"], "delay": args["delay"], "total": args["total_steps"]}
        steps = [entropy_weight(t, **how, schedule=args["schedule"], **more) for t in args["at_steps"]]
        return {"beta": torch.tensor(steps, dtype=torch.float64)}
    quality, cost = case.array("acc"), case.array("cost")
    kind = args.get("reward_kind", "one_sided_tunas_abs" if args.get("one_sided") else "tunas_abs")
    beta = args.get("reward_beta", args.get("beta"))
    rewards = [
        REWARDS[kind](float(q), float(c), target=args["target"], beta=beta) for q, c in zip(quality, cost, strict=True)
    ]
    found: dict[str, Tensor | list[Tensor]] = {"reward": torch.tensor(rewards, dtype=torch.float64)}
    if case.what == "forward":
        return found
    space = Space({str(i): range(args["options"]) for i in range(args["decisions"])})
    policy = FliqsPolicy(
        space, total=args["total_steps"], delay=args["delay"], lr=args["lr"], betas=tuple(args["betas"]),
        eps=args["eps"], entropy=args["max_beta"], schedule=args["schedule"], ema=args["ema"],
        switch_at=args.get("switch_at", 0.5), temperature=args["temperature"], init=args["init_logit"],
        clamp=args["prob_clamp"], baseline_first=args["ema_updated_before_advantage"],
    )  # fmt: skip
    baselines, logits = [], []
    for drawn, value in zip(case.array("samples").tolist(), rewards, strict=True):
        policy.tell(tuple(drawn), value)
        baselines.append(policy.baseline)
        logits.append(policy.logits)
    return found | {
        "baseline_after": torch.tensor(baselines, dtype=torch.float64), "logits_after": torch.stack(logits),
    }  # fmt: skip


def test_steps_written_out() -> None:
    policy = FliqsPolicy(
        Space({"a": range(2), "b": range(2)}), total=10, delay=1, lr=0.1, entropy=0.3, schedule="constant"
    )
    policy.tell((0, 1), 1.0)
    assert policy.baseline == 1.0 and torch.equal(policy.logits, torch.full((2, 2), 0.5))
    policy.tell((1, 1), 3.0)
    advantage = 3.0 - (0.99 * 1 + 0.01 * 3)
    # At equal logits the entropy is stationary; mean over two decisions; the first step of Adam has the length lr.
    assert advantage > 0
    torch.testing.assert_close(policy.logits, torch.tensor([[0.4, 0.6], [0.4, 0.6]]))
    before = policy.logits.double().clone().requires_grad_()
    policy.tell((0, 1), 0.0)
    p = before.softmax(-1)
    baseline = 0.99 * 1.02
    loss = -(0 - baseline) * (p[0, 0].log() + p[1, 1].log()) / 2 + 0.3 * -(p * p.log()).sum(-1).mean()
    (g2,) = torch.autograd.grad(loss, before)
    g1 = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).double() * advantage * 0.5 / 2
    m, v = 0.9 * 0.1 * g1 + 0.1 * g2, 0.999 * 0.001 * g1**2 + 0.001 * g2**2
    want = before - 0.1 * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    torch.testing.assert_close(policy.logits.double(), want.detach(), rtol=1e-5, atol=1e-6)


def test_the_policy_is_forced_to_one_choice_in_the_end() -> None:
    policy = FliqsPolicy(SPACE, 1, total=400, delay=50, lr=0.05)
    while policy.step < 400:
        (drawn,) = policy.ask()
        policy.tell(drawn, reward(drawn))
    assert policy.choice() == OPTIMUM and policy.probabilities().amax(-1).min() > 0.95
    assert policy.probabilities()[1, 2] == 0  # b has two options
    cost = [[1.0, 2.0, 4.0], [1.0, 2.0], [1.0, 2.0, 4.0]]
    assert policy.choice(cost, 7.0) == OPTIMUM and sum(
        row[i] for row, i in zip(cost, policy.choice(cost, 5.0), strict=True)
    ) <= 5  # fmt: skip
    with pytest.raises(Impossible):
        policy.choice(cost, 2.5)
    policy.tell((0, 0, 0), math.nan)
    assert math.isfinite(policy.baseline) and policy.step == 401


def test_the_first_steps_are_uniform_whatever_the_logits() -> None:
    policy = FliqsPolicy(Space({"a": range(3)}), total=3000, delay=3000)
    policy.logits[:] = torch.tensor([9.0, 0.0, 0.0])
    drawn = torch.bincount(torch.tensor([policy.ask()[0][0] for _ in range(3000)]), minlength=3) / 3000
    torch.testing.assert_close(drawn, torch.full((3,), 1 / 3), rtol=0, atol=0.04)


def test_formats_written_out_and_their_gradient() -> None:
    x = torch.tensor([[0.5, -7.0, 3.4], [0.1, 0.2, -0.05]], requires_grad=True)
    y = fake_format(x, 4, share="channel")
    torch.testing.assert_close(y[0], torch.tensor([0.0, -7.0, 3.0]))
    torch.testing.assert_close(y[1] / (0.2 / 7), torch.tensor([4.0, 7.0, -2.0]), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))
    torch.testing.assert_close(fake_format(x, 4)[1], torch.zeros(3))  # one scale for all
    rows = torch.tensor([[7.0, 1.0], [70.0, 10.0]])
    torch.testing.assert_close(fake_format(rows, 4, share="token"), rows)
    outlier = torch.cat([torch.linspace(-1, 1, 50), torch.tensor([4.0])])
    errors = [float((fake_format(outlier, 3, clip=c) - outlier).square().sum()) for c in (None, 1.0, 0.3)]
    assert errors[0] == min(errors) < errors[1]
    small_floats = torch.tensor([6.0, -5.1, 2.4, 0.2, 0.3, 0.0])
    torch.testing.assert_close(fake_format(small_floats, "e2m1"), torch.tensor([6.0, -6.0, 2.0, 0.0, 0.5, 0.0]))
    wide = torch.tensor([448.0, -17.0, 0.3])
    torch.testing.assert_close(fake_format(wide, "e4m3"), wide.to(torch.float8_e4m3fn).float())
    assert torch.equal(fake_format(torch.zeros(3), 2), torch.zeros(3))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3))


def test_costs_and_granularity() -> None:
    x = torch.randn(2, 1, 4, 4)
    made = Switched(net(), (2, (4, 8), "e4m3"), cost="compute", example=x)
    conv = 4 * 9 * 16
    assert made.table()[0] == pytest.approx([conv * 4e-6, conv * 36e-6, conv * 64e-6])
    assert made.cost((0, 1, 2)) == pytest.approx((conv * 4 + 512 * 36 + 24 * 64) / 1e6)
    assert made.formats((0, 1, 2)) == {"0.weight": 2, "3.weight": (4, 8), "4.weight": "e4m3"}
    assert Switched(net(), (4, 8)).cost((0, 1, 1)) == pytest.approx((36 * 4 + 512 * 8 + 24 * 8) / 8 / 2**20)
    assert Switched(net(), (4, 8), granularity="model").sizes == (2,)
    assert Switched(nn.Sequential(net(), net()), granularity="block").sizes == (2, 2)
    assert Switched(net(), (4, 8), skip=("0", "4")).sizes == (2,)


def test_switching_and_giving_back() -> None:
    model, x = net(), torch.randn(2, 1, 4, 4)
    want, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    made = Switched(model, (2, 8))
    torch.testing.assert_close(model(x), want)
    made.set((0, 0, 0))
    coarse = (model(x) - want).norm()
    made.set((1, 1, 1))
    assert 0 < (model(x) - want).norm() < 0.2 * coarse
    torch.testing.assert_close(model[3].weight, fake_format(state["3.weight"], 8, share="channel"))
    made.set(None)
    torch.testing.assert_close(model(x), want)
    made.remove()
    assert model.state_dict().keys() == state.keys() and torch.equal(model[3].weight, state["3.weight"])
    baked = Switched(model, (2, 8))
    baked.set((0, 0, 0))
    baked.remove(bake=True)
    torch.testing.assert_close(model[4].weight, fake_format(state["4.weight"], 2, share="channel"))


def test_a_training_ends_near_its_target_and_resumes() -> None:
    task = small("digits", size=200)
    model = task.model(0)
    switched = Switched(model, (2, 4, 8))
    policy = FliqsPolicy(switched, total=120, delay=20, lr=0.1)
    target = switched.cost((1, 1))
    hook = Fliqs(switched, policy, target=target, beta=20.0)
    fitted = fit(model, task, torch.optim.Adam(model.parameters(), lr=3e-3), steps=120, hooks=[hook], quiet=True)
    assert policy.step == 120 and "cost" in fitted.history[-1]
    assert switched.cost(policy.choice()) == pytest.approx(target, rel=0.3)
    assert fitted.model[1].parametrizations.weight[0].fmt == switched.options[policy.choice()[0]]
    other = Fliqs(switched, FliqsPolicy(switched, total=120, delay=20), target=target)
    other.load_state_dict(hook.state_dict())
    assert other.policy.ask() == policy.ask() and other.policy.baseline == policy.baseline


def test_what_is_refused() -> None:
    model = net()
    for given, message in (
        ({"options": (4, 4)}, "different ones"), ({"options": (1, 4)}, "1 is no format"),
        ({"options": ("e5m9",)}, "'e5m9' is no format"), ({"granularity": "head"}, "layer, block or model"),
        ({"cost": "compute"}, "needs an example"), ({"input_scale": "channel"}, "tensor or token"),
        ({"skip": ("0", "3", "4")}, "no linear or convolution layer"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            Switched(model, **given)
    made = Switched(model)
    with pytest.raises(BadInput, match=r"0\.weight is computed by a parametrization already"):
        Switched(model)
    with pytest.raises(BadInput, match="delay of 9 steps does not fit in 5"):
        FliqsPolicy(made, total=5, delay=9)
    with pytest.raises(BadInput, match="schedule 'exp' is none of"):
        FliqsPolicy(made, total=5, delay=1, schedule="exp")
    with pytest.raises(BadInput, match="temperature is positive"):
        FliqsPolicy(made, total=5, delay=1, temperature=0)
    with pytest.raises(BadInput, match="the reward 'best' is none of"):
        Fliqs(made, FliqsPolicy(made, total=5, delay=1), target=1.0, reward="best")
    with pytest.raises(BadInput, match="target cost is positive"):
        Fliqs(made, FliqsPolicy(made, total=5, delay=1), target=0.0)
