"""`adaquant`: its quantizer by hand, what training gains, bits, tuning, ties and refusals, the recorded vectors."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from laconic.core.passes import Context, run
from laconic.core.reconstruct import Calls, Group, output_loss, reconstruct
from laconic.core.structure import Structure
from laconic.errors import BadInput, Impossible
from laconic.quant import (
    AdaQuant,
    RangeQuantizer,
    Rates,
    adaquant,
    best_of_noise,
    bias_tune,
    bn_tune,
    compose,
    degradations,
    integer_program,
    pack_learned,
    range_quantize,
)  # fmt: skip
from laconic.quant._adaquant import input_range, row_range
from laconic.testing import Example
from laconic.testing.vectors import Case


def small(generator: torch.Generator) -> list:
    """Two layers, and inputs."""
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return [model.eval(), torch.randn(40, 24, generator=generator)]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.words(ids)))


def context(model: nn.Module, structure: Structure, arguments: tuple) -> dict:
    return {"batches": [arguments], "teacher": copy.deepcopy(model)}


EXAMPLES = [
    Example(
        lambda: AdaQuant(bits=6, steps=5),
        kind="Pass",
        inputs=small,
        stated={"bound": 0.1, "context": context, "refused": lambda: (Tied().eval(), [torch.tensor([[1, 2]])], "head")},
    ),
    Example(
        lambda weight: RangeQuantizer.of_weight(weight, 4), name="RangeQuantizer", kind="Weight",
        traits=("gradient:surrogate",),
    ),
]  # fmt: skip


def run_vector(case: Case) -> dict[str, Tensor]:
    """First ranges; an output and its gradients; steps of Adam."""
    args = case.args
    dim = {"per_row": 0, "per_tensor": None}[args["weight_granularity"]]
    assert args["input_granularity"] == "per_tensor"
    bits = int(case.array("bits"))
    w, x = case.array("weight"), case.array("input")
    if case.what == "quantize":
        names = ("weight_range", "weight_zero", "input_range", "input_zero")
        return dict(zip(names, (*row_range(w, dim), *input_range(x)), strict=True))
    names = ("weight", "bias", "input_range", "input_zero", "weight_range", "weight_zero")
    p = {name: case.array(name).clone().requires_grad_() for name in names}
    act = {"identity": None, "relu": torch.relu}[args["activation"]]
    options = {"scale_clamp": tuple(args["scale_clamp"]), "round_ste": args["round_ste"]}
    options["zero_round_ste"] = args["zero_round_ste"]

    def forward(x: Tensor) -> Tensor:
        wq = range_quantize(p["weight"], p["weight_range"], p["weight_zero"], bits, **options)
        return nn.functional.linear(
            range_quantize(x, p["input_range"], p["input_zero"], bits, **options), wq, p["bias"]
        )

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = output_loss(output, target, activation=act)
        return value * output.numel() if args["loss_reduction"] == "sum" else value

    target = case.array("target")
    if case.what == "backward":
        output = forward(x)
        loss(output, target).backward()
        return {"output": output, **{f"grad_{name}": p[name].grad for name in names}}
    assert args["optimizer"] == "Adam" and args["full_batch"] and not args["weight_decay"]
    done = reconstruct(
        forward, Calls("layer", [x], [target], [((), {})]), [Group([p[name]], args[f"lr_{name}"]) for name in names],
        steps=args["steps"], batch=None, loss=loss, keep_better=False, betas=tuple(args["betas"]), eps=args["eps"],
    )  # fmt: skip
    return {"loss": torch.tensor(done.losses), **{f"{name}_after": p[name] for name in names}}


def conv_net(seed: int = 0) -> tuple[nn.Sequential, nn.Sequential, Structure, Tensor]:
    """A network with batch norms whose statistics are its data's, the same with these folded, and the data."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(80, 1, 8, 8)
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        model[1].weight[2] *= -1
    model.train()
    for _ in range(40):
        model(x)
    model.eval()
    from laconic.norm import FoldBatchNorm  # tests may use what families do not know of each other

    structure = Structure.build(model, ((x[:2],), {}))
    folded = copy.deepcopy(model)
    run(FoldBatchNorm(), Context(folded, structure))
    return model, folded, structure, x


def off(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - teacher(x)).norm() / teacher(x).norm())


def test_the_first_range_of_inputs_averages_before_it_takes_in_zero() -> None:
    span, low = input_range(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
    assert (float(span), float(low)) == (2.5, -1.0)
    span, low = input_range(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert (float(span), float(low)) == (3.0, 0.0)
    assert [float(v) for v in (*input_range(torch.zeros(2, 3)), *row_range(torch.zeros(1, 3)))] == [1, 0, 1, 0]


def test_the_equation() -> None:
    torch.manual_seed(0)
    x, span, low, b = torch.randn(30), 2.0, -0.7, 3
    s = span / 7
    z = min(max(round(0.7 / s), 0), 7)
    got = range_quantize(x, torch.tensor([span]), torch.tensor([low]), b)
    for i in range(30):
        q = round(min(max((float(x[i]) + s * z) / s, 0), 7))
        assert float(got[i]) == pytest.approx(s * (q - z), abs=1e-6)


def test_gradient_of_ranges_by_differences() -> None:
    torch.manual_seed(1)
    x = torch.randn(50, dtype=torch.float64)
    span = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    y = range_quantize(x, span, torch.tensor([-0.7], dtype=torch.float64), 3)
    y.sum().backward()
    # Codes and zero point held, y is linear in the scale but for the straight-through terms -x/s and its like of Z.
    s = 2.0 / 7
    want = 0.0
    for v in x.tolist():
        z = round(0.7 / s)
        raw = v / s + z
        q = round(min(max(raw, 0), 7))
        inside = 0 <= raw <= 7
        dz = -0.7 / s**2  # of Z, through its rounding
        want += ((q - z) + s * ((-v / s**2 + dz) * inside - dz)) / 7
    assert float(span.grad) == pytest.approx(want, rel=1e-6)


def test_what_is_packed_is_what_was_trained() -> None:
    model, x = small(torch.Generator().manual_seed(2))
    structure = Structure.build(model, ((x,), {}))
    adaquant(model, [x], 4, steps=20)
    want = model(x)
    records = pack_learned(model, structure)
    assert [r.path for r in records] == ["0.weight", "2.weight"]
    assert not hasattr(model[0], "parametrizations") and "0.weight_packed" in model.state_dict()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_training_lowers_each_layers_error(mode: str) -> None:
    _, folded, _, x = conv_net(3)
    rough, tuned = copy.deepcopy(folded), copy.deepcopy(folded)
    adaquant(rough, [x], 3, steps=0, mode=mode)
    rates = Rates(weight=1e-3, weight_range=1e-2)
    done = adaquant(tuned, [x], 3, steps=60, mode=mode, rates=rates)
    found = {path: layer.after / layer.before for path, layer in done.items()}
    assert max(found.values()) <= 1 and found["3"] < 0.95 and found["8"] < 0.5, found
    assert off(tuned, folded, x) < 0.9 * off(rough, folded, x)


def test_inputs_are_rounded_too() -> None:
    _, folded, _, x = conv_net(4)
    model = copy.deepcopy(folded)
    adaquant(model, [x], 8, input_bits={"3": 2}, steps=0)
    assert len(model[3].input_quantizer(torch.rand(3, 6, 6, 6)).unique()) <= 4 and not hasattr(
        model[0], "input_quantizer"
    )
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and "3.input_quantizer.span" in model.state_dict()


def test_batch_norms_come_back_and_are_folded_again() -> None:
    teacher, folded, structure, x = conv_net(5)
    model = copy.deepcopy(folded)
    adaquant(model, [x], 3, steps=0)
    with torch.no_grad():
        model[0].bias += 0.5  # a shift that statistics see
    rough = off(model, teacher, x)
    codes = model[0].parametrizations.weight[0].solved(model[0].parametrizations.weight.original, "rows").codes
    moved = bn_tune(model, teacher, structure.batchnorm_pairs, [x])
    assert set(moved) == {"0", "3"} and moved["0"][0] > 0.3
    assert off(model, teacher, x) < 0.7 * rough
    quantizer = model[0].parametrizations.weight[0]
    assert bool((quantizer.span > 0).all())
    now = quantizer.solved(model[0].parametrizations.weight.original, "rows").codes
    same = (now == codes).float().mean(1)
    turned = (now == 7 - codes.int()).float().mean(1)
    assert torch.maximum(same, turned).min() > 0.95  # the range followed its rows, one of them turned around
    out = model[:2](x)  # the layer's output again has the statistics of the norm that it lost
    torch.testing.assert_close(out.mean((0, 2, 3)), teacher[1].bias, rtol=0, atol=1e-3)


def test_a_negative_gain_turns_the_range() -> None:
    q = RangeQuantizer(torch.tensor([[3.0], [3.0]]), torch.tensor([[-1.0], [-1.0]]), 4)
    q.scale_(torch.tensor([-2.0, 2.0]))
    assert q.span.flatten().tolist() == [6.0, 6.0] and q.low.flatten().tolist() == [-4.0, -2.0]


def test_biases_are_tuned_together() -> None:
    teacher, folded, _, x = conv_net(6)
    model = copy.deepcopy(folded)
    adaquant(model, [x], 3, steps=0)
    weights = [p.clone() for name, p in model.named_parameters() if not name.endswith("bias")]
    done = bias_tune(model, teacher, [x[:40], x[40:]], epochs=5, lr=1e-2)
    assert done.after < 0.9 * done.before and len(done.losses) == 10
    now = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))


@pytest.mark.parametrize("power", [1, 2])
def test_the_program_is_that_of_all_choices(power: int) -> None:
    generator = torch.Generator().manual_seed(7)
    widths, layers = (2, 4, 8), ("a", "b", "c", "d")
    for _ in range(10):
        costs = {
            layer: dict(
                zip(widths, torch.rand(3, generator=generator).sort(descending=True).values.tolist(), strict=True)
            )
            for layer in layers
        }
        sizes = {layer: int(torch.randint(1, 50, (), generator=generator)) for layer in layers}
        budget = sum(sizes.values()) * (32 * 0.15) ** power
        best = torch.inf
        for choice in itertools.product(widths, repeat=4):
            pairs = list(zip(layers, choice, strict=True))
            if sum(sizes[layer] * k**power for layer, k in pairs) <= budget:
                best = min(best, sum(costs[layer][k] for layer, k in pairs))
        found = integer_program(costs, sizes, 0.15, power=power)
        assert sum(costs[layer][found[layer]] for layer in layers) == pytest.approx(best, rel=1e-4)
    with pytest.raises(Impossible, match="at least 0.0625"):
        integer_program(costs, sizes, 0.05)
    with pytest.raises(BadInput, match="c: what it costs"):
        integer_program({**costs, "c": {2: math.nan, 8: 0.0}}, sizes, 0.2)


def test_each_layer_is_measured_alone_and_noise_finds_other_choices() -> None:
    _, folded, _, x = conv_net(8)
    models = {}
    for width in (2, 8):
        models[width] = copy.deepcopy(folded)
        adaquant(models[width], [x], width, steps=0)
    layers = ["0", "3", "8"]

    def evaluate(model: nn.Module) -> float:
        return off(model, folded, x)

    costs = degradations(models, evaluate, layers)
    assert all(costs[layer][8] == 0 and costs[layer][2] > 0 for layer in layers)
    mixed = compose(models, {"3": 2}, 8)
    assert evaluate(mixed) - evaluate(models[8]) == pytest.approx(costs["3"][2], rel=1e-5)
    sizes = {layer: models[8].get_submodule(layer).weight.numel() for layer in layers}
    seen: list[dict[str, int]] = []

    def judge(choice: dict[str, int]) -> float:
        seen.append(choice)
        return evaluate(compose(models, choice, 8))

    best = best_of_noise(costs, sizes, 0.24, judge, tries=6, noise=2.0)
    assert min(evaluate(compose(models, c, 8)) for c in seen) == evaluate(compose(models, best, 8)) and len(seen) > 1


def test_what_is_left_alone_and_refused() -> None:
    ids = torch.tensor([[1, 2, 3]])
    done = adaquant(Tied().eval(), [ids], 4, steps=0)
    assert "tied" in done.skipped["head"] and list(done) == ["inner"]
    model, x = small(torch.Generator().manual_seed(9))
    with pytest.raises(BadInput, match="'5' is no linear layer"):
        adaquant(model, [x], {"5": 4})
    with pytest.raises(BadInput, match="parallel or sequential"):
        adaquant(model, [x], 4, mode="both")
    with pytest.raises(BadInput, match="there is none"):
        adaquant(model, [], 4)
    with pytest.raises(ValueError, match="teacher"):
        run(AdaQuant(), Context(model, Structure.build(model, ((x,), {}))))
    with pytest.raises(BadInput, match="2 to 8"):
        RangeQuantizer(torch.ones(1), torch.zeros(1), 9)
    with pytest.raises(BadInput, match="ranges cannot follow"):
        bn_tune(model, model, [("0", "1")], [x])
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"^0"):
        adaquant(model, [x], 4)
    flat = nn.Sequential(nn.Linear(4, 3)).eval()
    with torch.no_grad():
        flat[0].weight.fill_(0.0)
        flat[0].weight[1] = 0.5  # a row of equal weights, and rows of zeros
    want = flat(torch.ones(2, 4)).detach()
    adaquant(flat, [torch.ones(2, 4)], 4, steps=2)
    torch.testing.assert_close(flat(torch.ones(2, 4)), want, rtol=1e-3, atol=1e-3)
