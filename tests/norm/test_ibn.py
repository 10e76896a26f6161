"""`ibn`: the two halves by themselves, whole networks of transformers, what is refused, and the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.norm import IBN, to_ibn
from laconic.testing import Case, Example

TRAITS = ("gradient:exact", "batch_independent_eval")
EXAMPLES = [
    Example(lambda: IBN(6), kind="Layer", traits=TRAITS, inputs=[(3, 6, 3, 3)], wrong=[(3, 5, 3, 3)]),
    Example(lambda: IBN(5, 0.3), kind="Layer", traits=TRAITS, inputs=[(2, 5, 2, 4)], wrong=[(2, 7, 2, 4)]),
    Example(lambda: IBN(4), kind="Layer", traits=TRAITS, inputs=[(2, 4, 1, 1)], wrong=[(2, 7, 1, 1)]),
]


def run_vector(case: Case):
    args = case.args
    options = {name: args[name] for name in ("ratio", "eps", "momentum") if name in args}
    layer = IBN(args["num_features"], **options)
    assert layer.instance_features == args["instance_channels"]
    state = [name for name in layer.state_dict() if name in case]
    layer.load_state_dict({name: case.array(name) for name in state})
    names = [name for name, _ in layer.named_parameters()]
    after = [name for name in layer.state_dict() if f"{name}_after" in case]
    found = {"output": [], "grad_input": [], **{f"grad_{name}": [] for name in names}}
    found |= {f"{name}_after": [] for name in after}
    inputs = case.arrays("input")
    for x, grad in zip(inputs, case.arrays("grad_output"), strict=True):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        found["output"].append(y)
        found["grad_input"].append(x.grad)
        for name in names:
            found[f"grad_{name}"].append(layer.get_parameter(name).grad)
        for name in after:
            found[f"{name}_after"].append(layer.get_buffer(name).clone())
    if "output_eval" in case:
        found["output_eval"] = layer.eval()(inputs[-1])
    return found


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_the_equation(ratio):
    layer, x = IBN(10, ratio, eps=0.1).double(), torch.randn(3, 10, 4, 5, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter)
    y = layer(x)
    for c in range(10):
        k = c - layer.instance_features
        norm, at = (layer.IN, c) if k < 0 else (layer.BN, k)
        for n in range(3):
            seen = x[n, c] if k < 0 else x[:, c]
            off = x[n, c] - seen.mean()
            variance = ((seen - seen.mean()) ** 2).mean()
            want = norm.weight[at] * off / (variance + 0.1) ** 0.5 + norm.bias[at]
            torch.testing.assert_close(y[n, c], want)


def test_the_first_channels_forget_appearance():
    layer, x = IBN(8).eval(), torch.randn(2, 8, 6, 6)
    same = layer(3 * x + 5)[:, :4], layer(x)[:, :4]
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(3 * x + 5)[:, 4:], layer(x)[:, 4:], atol=0.5)


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[2, 1, 1, 2], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def test_variant_a_of_a_transformers_resnet():
    model = resnet()
    nn.init.uniform_(model.resnet.encoder.stages[1].layers[0].layer[0].normalization.weight)
    old = model.resnet.encoder.stages[1].layers[0].layer[0].normalization.weight.detach().clone()
    done = to_ibn(model, "a")
    assert sorted(path for change in done.changed for path in change.paths) == [
        f"resnet.encoder.stages.{stage}.layers.{block}.layer.0.normalization"
        for stage, block in ((0, 0), (0, 1), (1, 0), (2, 0))
    ]
    new = model.resnet.encoder.stages[1].layers[0].layer[0].normalization
    assert torch.equal(torch.cat([new.IN.weight, new.BN.weight]), old)
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)


def test_variant_b_of_a_transformers_resnet():
    model = resnet()
    to_ibn(model, "b")
    assert isinstance(model.resnet.embedder.embedder.normalization, nn.InstanceNorm2d)
    stages = model.resnet.encoder.stages
    ends = [isinstance(layer.activation, nn.Sequential) for stage in stages for layer in stage.layers]
    assert ends == [False, True, True, False, False, False]
    assert stages[1].layers[0].activation[0].num_features == 12
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)


def test_any_network_by_its_paths():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    to_ibn(model, where="1", ratio=0.25)
    assert isinstance(model[1], IBN) and model[1].instance_features == 2 and isinstance(model[4], nn.BatchNorm2d)


def test_refusals():
    with pytest.raises(ValueError, match="gives 0 of 3 channels"):
        IBN(3, 0.1)
    with pytest.raises(ValueError, match="gives 3 of 3 channels"):
        IBN(3, 1.0)
    with pytest.raises(BadInput, match="variant is 'c'"):
        to_ibn(resnet(), "c")
    with pytest.raises(BadInput, match="has no residual blocks with names"):
        to_ibn(nn.Sequential(nn.BatchNorm2d(4)))
    shared = nn.Module()
    shared.layer1 = nn.ModuleList([nn.ModuleDict({"bn1": nn.BatchNorm2d(4)})])
    with pytest.raises(BadInput, match=r"layer1\.0\.bn1 belongs to a block that calls one ReLU several times"):
        to_ibn(shared, "b")
