"""Training with quantized weights: the packed layers compute what was trained, scales are learned, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from laconic.core.qat import FakeInput, FakeWeight, convert, prepare, quantized_layers
from laconic.core.record import Record, apply_records
from laconic.errors import BadInput
from laconic.kernels.ops import INT8_TOKENS
from laconic.nn import is_packed, unpack_parameter
from laconic.numerics import Scheme, fake_quantize

INT4 = "v1/int4/channel/float32/minmax/znone/nearest"
SCHEMES = (
    INT4,
    "v1/int3/group8/float16/minmax/zint/nearest",
    "v1/int2/group5/float32/mse/znone/nearest",
    "v1/int4/tensor/float32/percentile99.0/zint/nearest",
    "v1/int4/channel/float32/minmax/zreal/nearest",
    "v1/levelsnf4/group8/float32/minmax/znone/nearest",
    "v1/ternary/channel/float32/absmean/znone/nearest",
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 20), nn.ReLU(), nn.Linear(20, 3)
    )


def train(model: nn.Module, steps: int = 5) -> None:
    x, y = torch.randn(16, 2, 3, 3), torch.randint(0, 3, (16,))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_packed_model_computes_what_was_trained(scheme):
    model = network()
    assert prepare(model, scheme).layers == ["0", "3", "5"]
    train(model)
    model.eval()
    x = torch.randn(4, 2, 3, 3)
    want, weights = model(x), {path: model.get_submodule(path).weight.detach() for path in ("0", "3", "5")}
    records = convert(model)
    assert [record.path for record in records] == ["0.weight", "3.weight", "5.weight"]
    for path, weight in weights.items():
        assert is_packed(model.get_submodule(path)) and not parametrize.is_parametrized(model)
        torch.testing.assert_close(unpack_parameter(model.get_submodule(path), "weight"), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    fresh = network()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "bias" in k}, strict=False)
    for record in records:
        apply_records(fresh, [Record.from_json(record.to_json())])
        fresh.load_state_dict({f"{record.path}_{k}": v for k, v in record.tensors.items()}, strict=False)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("scheme", [INT4, "v1/int2/group7/float16/minmax/znone/nearest"])
def test_learned_scales(scheme):
    model = network()
    prepare(model, scheme, learned=True)
    before = [last.scale.detach().clone() for _, last in quantized_layers(model).values()]
    train(model)
    after = [last.scale.detach() for _, last in quantized_layers(model).values()]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    x = torch.randn(4, 2, 3, 3)
    want = model.eval()(x)
    convert(model)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_the_value_and_gradient_of_a_weight():
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse("v1/int2/channel/float32/mse/znone/nearest")
    layer = nn.Linear(12, 4, bias=False)
    layer.weight.data = weight.clone()
    parametrize.register_parametrization(layer, "weight", FakeWeight(weight, scheme))
    assert torch.equal(layer.weight, fake_quantize(weight, scheme))
    g = torch.randn(4, 12)
    layer.weight.backward(g)
    got = layer.parametrizations.weight.original.grad
    clipped = (weight - fake_quantize(weight, scheme)).abs() > 0.55 * fake_quantize(weight, scheme).unique()[1].abs()
    assert torch.equal(got[got != 0], g[got != 0]) and (got == 0).any() and not (got[clipped & (weight > 1.5)]).any()


def test_training_at_two_bits_beats_rounding_afterwards():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 1))
    x = torch.randn(256, 8)
    y = teacher(x).detach()
    scheme = "v1/int2/channel/float32/mse/znone/nearest"
    rounded = copy.deepcopy(teacher)
    prepare(rounded, scheme)
    before = (rounded(x) - y).square().mean().item()
    trained = copy.deepcopy(teacher)
    prepare(trained, scheme.replace("mse", "minmax"), learned=True)
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (trained(x) - y).square().mean().backward()
        optimizer.step()
    assert (trained(x) - y).square().mean().item() < 0.5 * before


def test_inputs_by_row_are_those_of_the_packed_layer():
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    prepare(model, "v1/int8/channel/float32/minmax/znone/nearest", inputs=INT8_TOKENS)
    x = torch.randn(5, 10, requires_grad=True)
    want = model(x)
    want.sum().backward()
    assert x.grad.abs().sum() > 0
    convert(model)
    assert not model[0]._forward_pre_hooks and not hasattr(model[0], "input_quantizer")
    assert model[0]._packed["weight"].inputs == INT8_TOKENS
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_learned_inputs_keep_their_hook():
    model = network()
    prepare(model, INT4, inputs=lambda path, module: FakeInput(4, signed=path == "0") if path != "5" else None)
    with pytest.raises(BadInput, match="call the model once in training mode"):
        model.eval()(torch.randn(2, 2, 3, 3))
    train(model.train())
    x = torch.randn(4, 2, 3, 3)
    other = network(1)
    prepare(other, INT4, inputs=lambda path, module: FakeInput(4, signed=path == "0") if path != "5" else None)
    other.load_state_dict(model.state_dict())
    want = model.eval()(x)
    assert torch.equal(other.eval()(x), want), "the state dict says that scales are ready"
    convert(model)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    seen = []
    model[3].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(x)
    assert len(seen[0].unique()) <= 16 and (seen[0] >= 0).all()


def test_input_scale_is_learned_and_may_be_a_power_of_two():
    quantizer = FakeInput(3, signed=False, power_of_two=True)
    x = torch.rand(64)
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is not None
    exponent = quantizer.step().log2()
    assert exponent == exponent.round()
    assert set((quantizer(x) / quantizer.step()).unique().tolist()) <= set(range(8))


def test_parametrizations_below_are_kept():
    model = nn.Sequential(nn.Linear(6, 4))

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model[0], "weight", Double())
    prepare(model, INT4)
    want = model[0].weight.detach()
    convert(model)
    torch.testing.assert_close(model[0].weight, want)


def test_refusals():
    with pytest.raises(BadInput, match="ReLU has no layer to quantize"):
        prepare(nn.ReLU(), INT4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ConvTranspose2d(2, 2, 3), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    left = prepare(model, INT4).left
    assert "tied: 0.weight = 1.weight" in left["0"] and left["2"] == "there is no packed ConvTranspose2d"
    assert prepare_again(model) == {"3": "its weight is quantized already"}
    convert(model)
    with pytest.raises(BadInput, match="3: its weight is packed already"):
        prepare(model, INT4, select=lambda path, module: path == "3")
    with pytest.raises(BadInput, match="no weight that was trained"):
        convert(nn.Linear(2, 2))
    bad = nn.Sequential(nn.Linear(4, 4))
    bad[0].weight.data[0, 0] = float("nan")
    with pytest.raises(BadInput, match="0.weight: 1 nan and 0 inf"):
        prepare(bad, INT4)
    with pytest.raises(BadInput, match="0: LSQ learns the scales of integers without a zero point"):
        prepare(nn.Sequential(nn.Linear(4, 4)), "v1/int4/channel/float32/minmax/zint/nearest", learned=True)
    with pytest.raises(BadInput, match="0: a Conv2d has no rows of inputs"):
        prepare(network(), INT4, inputs=INT8_TOKENS)
    trained = nn.Sequential(nn.Linear(4, 4))
    prepare(trained, INT4)
    trained[0].parametrizations.weight.original.data[1, 1] = float("inf")
    with pytest.raises(BadInput, match="0.weight: 0 nan and 1 inf"):
        convert(trained)


def prepare_again(model: nn.Module) -> dict[str, str]:
    with pytest.raises(BadInput, match="its weight is quantized already"):
        prepare(model, INT4, select=lambda path, module: path == "3")
    model.append(nn.Linear(2, 2))
    return prepare(model, INT4, select=lambda path, module: path in ("3", "4")).left
