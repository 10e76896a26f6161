"""`zeroq`: its quantizer by hand, data, sensitivities, the frontier against all mixtures, refusals, the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.core.synthesis import Pixels, statistics_loss, watched
from laconic.errors import BadInput, Impossible
from laconic.numerics import NotFinite
from laconic.quant import bn_matched_data, minmax_quantize, minmax_weight, mixed_bits, sensitivity, zeroq
from laconic.testing.vectors import Case


def run_vector(case: Case) -> dict[str, Tensor]:
    """Trained pictures, with the first gradient; rounded weights and activations."""
    args = case.args
    if case.what == "quantize":
        x, bits, floor = case.array("input"), int(case.array("bits")), args["range_floor"]
        assert not args["symmetric"]
        if isinstance(args["range"], str):
            dim = {"output channel": 0, "tensor": None}[args["granularity"]]
            return {"output": minmax_weight(x, bits, dim=dim, range_floor=floor)}
        return {"output": minmax_quantize(x, bits, *args["range"], range_floor=floor)}
    model, start = vector_network(case), case.array("input")
    assert args["optimizer"] == "adam" and args["betas"] == [0.9, 0.999] and args["adam_eps"] == 1e-8
    options = {"eps": args["std_eps"], "unbiased": args["var_unbiased"]}
    found = bn_matched_data(
        model, start.shape[1:], len(start), steps=args["steps"], lr=args["lr"], start=start,
        include_input=args["include_input"], input_mean=args["input_mean"], input_std=args["input_std"], **options,
    )  # fmt: skip
    x = start.clone().requires_grad_()
    with watched(model, per="image", **options) as losses:
        model(x)
        loss = torch.stack(losses).sum()
    if args["include_input"]:
        var = args["input_std"] ** 2 - args["std_eps"]
        loss = loss + statistics_loss(x, args["input_mean"], var, per="image", **options)
    loss.backward()
    return {"grad_input_first_step": x.grad, "loss": torch.tensor(found.losses), "input_after": found.inputs}


def vector_network(case: Case) -> nn.Module:
    """The network that a case describes, with its values."""
    layers: list[nn.Module] = []
    counts = {"conv": 0, "batch_norm": 0}
    for said in case.args["net"]["layers"]:
        if said["type"] == "conv":
            counts["conv"] += 1
            name = f"conv{counts['conv']}"
            made: nn.Module = nn.Conv2d(
                said["in"], said["out"], said["kernel"], said["stride"], said["padding"], bias=said["bias"]
            )
            state = {k: case.array(f"{name}.{k}") for k in ("weight", "bias") if f"{name}.{k}" in case}
            made.load_state_dict(state)
        elif said["type"] == "batch_norm":
            counts["batch_norm"] += 1
            name = f"bn{counts['batch_norm']}"
            made = nn.BatchNorm2d(said["features"], said["eps"])
            nn.init.constant_(made.weight, said["weight"])
            nn.init.constant_(made.bias, said["bias"])
            made.running_mean.copy_(case.array(f"{name}.running_mean"))
            made.running_var.copy_(case.array(f"{name}.running_var"))
        else:
            made = {"relu": nn.ReLU, "relu6": nn.ReLU6}[said["type"]]()
        layers.append(made)
    return nn.Sequential(*layers).train(case.args["net"]["mode"] != "eval")


def network(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).eval(), torch.randn(30, 1, 6, 6)


@pytest.mark.parametrize("low, high", [(-0.7, 1.6), (0.5, 2.0), (-3.0, -1.0)])
def test_the_equation(low: float, high: float) -> None:
    x = torch.linspace(-2, 3, 41)
    inverse = 15 / (high - low)
    zero = round(inverse * low) + 8
    for value, got in zip(x.tolist(), minmax_quantize(x, 4, low, high).tolist(), strict=True):
        q = min(max(round(inverse * value - zero), -8), 7)
        assert got == pytest.approx((q + zero) / inverse, abs=1e-5)


def test_a_range_of_nothing_keeps_its_value_nearly() -> None:
    flat = torch.full((2, 5), 0.25)
    torch.testing.assert_close(minmax_weight(flat, 4), flat, rtol=0, atol=1e-6)


def test_each_layer_is_rounded_alone() -> None:
    model, x = network(1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    table = sensitivity(model, [x[:10], x[10:]], bits=(2, 4, 8))
    assert list(table) == ["0", "2", "5"]
    for row in table.values():
        assert row[2] > row[4] > row[8] >= 0
    with torch.no_grad():
        p = model(x).double().softmax(-1)
        model[2].weight.copy_(minmax_weight(state["2.weight"], 4))
        q = model(x).double().softmax(-1)
    assert table["2"][4] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    model.load_state_dict(state)
    sensitivity(model, [x], bits=(2,), layers=["2"])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_bits_within_a_budget() -> None:
    model, x = network(3)
    table = sensitivity(model, [x], bits=(2, 4, 8))
    sizes = {path: model.get_submodule(path).weight.numel() for path in table}
    budget = 4 * sum(sizes.values())
    found = mixed_bits(table, sizes, budget)
    assert found.size <= budget and found.size == sum(sizes[path] * k for path, k in found.bits.items())
    assert found.cost <= sum(row[4] for row in table.values()) + 1e-12  # no worse than 4 bits everywhere
    with pytest.raises(Impossible, match="at least"):
        mixed_bits(table, sizes, 1)


def test_ranges_are_seen_on_the_data() -> None:
    model, x = network(4)
    made = zeroq(model, [x, 2 * x], 8, input_bits={"0": 4, "2": 8})
    assert float(made[0].input_quantizer.high) == float(2 * x.max()) and not hasattr(made[5], "input_quantizer")
    assert len(made[0].input_quantizer(3 * x).unique()) <= 16 and not hasattr(model[0], "input_quantizer")
    with torch.no_grad():
        assert float((made(x) - model(x)).norm() / model(x).norm()) < 0.3


def test_statistics_fall_into_place() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).train()
    for _ in range(30):
        model(torch.randn(32, 1, 8, 8))
    found = bn_matched_data(model.eval(), (1, 8, 8), 6, steps=60)
    assert found.inputs.shape == (6, 1, 8, 8) and found.losses[-1] < 0.1 * found.losses[0]
    assert Pixels((2, 1, 3, 3), start=torch.ones(2, 1, 3, 3)).inputs.sum() == 18


def test_refusals() -> None:
    model, x = network(6)
    with pytest.raises(BadInput, match="no batch norms"):
        bn_matched_data(model, (1, 6, 6), 2, steps=1)
    with pytest.raises(BadInput, match="model.eval"):
        sensitivity(model.train(), [x])
    model.eval()
    with pytest.raises(BadInput, match="'1' is no linear"):
        sensitivity(model, [x], layers=["1"])
    with pytest.raises(BadInput, match="no data"):
        sensitivity(model, [])
    with pytest.raises(BadInput, match="no data"):
        zeroq(model, [])
    model[2].weight.data[0] = torch.nan
    with pytest.raises(BadInput, match="not finite"):
        sensitivity(model, [x])
    with pytest.raises(NotFinite, match=r"2\.weight"):
        zeroq(model, [x])
