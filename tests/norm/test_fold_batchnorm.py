"""Batch-norm folding: the same function without the norm, on data and on meta."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.structure import Structure
from laconic.norm import FoldBatchNorm, fold_batchnorm, fold_shapes, foldable
from laconic.testing import Example
from tests.zoo import ZOO, outputs


def _convnet(g):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    norm = model[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor, generator=g)
    nn.init.uniform_(norm.running_var, 0.5, 2.0, generator=g)
    return [model.eval(), torch.randn(2, 3, 6, 6, generator=g)]


def _in_training():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    return model, [torch.randn(2, 3, 6, 6)], "1"


EXAMPLES = [
    Example(lambda: FoldBatchNorm(), kind="Pass", traits=("exact",), inputs=_convnet, stated={"refused": _in_training})
]


def lively(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 3, generator=generator)
            if module.affine:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.eval()


PAIRS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-3), (2, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), (2, 4, 5)),
    "linear": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (5, 4)),
    "not affine": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_function_stays(name: str) -> None:
    layer, norm, shape = PAIRS[name]
    model = lively(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    structure = Structure.build(model, ((x,), {}))
    assert foldable(structure, model) == [("0", "1", "")]
    before = model(x)
    skeleton = copy.deepcopy(model).to("meta")
    fold_batchnorm(model, "0", "1")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert isinstance(model[1], nn.Identity) and not model[1].training
    fold_shapes(skeleton, [("0", "1")])
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, skeleton)]
    assert shapes[0] == shapes[1] and all(value.is_meta for value in skeleton.state_dict().values())


@pytest.mark.parametrize("name", ["resnet", "convnet"])
def test_whole_models(name: str) -> None:
    entry = ZOO[name]
    model = lively(entry.build())
    example = entry.example(model)
    structure = Structure.build(model, example)
    pairs = [(conv, bn) for conv, bn, reason in foldable(structure, model) if not reason]
    assert pairs == structure.batchnorm_pairs and len(pairs) >= 2
    before = outputs(model, example)
    for conv, bn in pairs:
        fold_batchnorm(model, conv, bn)
    for a, b in zip(outputs(model, example), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    left = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert not set(left) & {bn for _, bn in pairs}


def test_half_precision_is_rounded_once() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    wide = copy.deepcopy(model).bfloat16().float()
    narrow = model.bfloat16()
    fold_batchnorm(wide, "0", "1")
    fold_batchnorm(narrow, "0", "1")
    assert narrow[0].weight.dtype == torch.bfloat16
    assert torch.equal(narrow[0].weight, wide[0].weight.bfloat16())


class Halved(nn.BatchNorm1d):
    """A batch norm that does something else, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def refusals() -> list[tuple[nn.Module, str]]:
    hooked = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    hooked[0].register_forward_hook(lambda module, args, out: None)
    parametrized = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    torch.nn.utils.parametrizations.weight_norm(parametrized[0])
    return [
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), "training mode"),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False)).eval(), "no running"),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)).eval(), "6 outputs do not match the 5 features"),
        (nn.Sequential(nn.Linear(4, 6), Halved(6)).eval(), "Halved is not a batch norm of torch"),
        (nn.Sequential(nn.Embedding(4, 6), nn.BatchNorm1d(6)).eval(), "Embedding is not a linear layer"),
        (hooked, "forward hooks"),
        (parametrized, "parametrization"),
    ]


@pytest.mark.parametrize(("model", "reason"), refusals(), ids=lambda value: value if isinstance(value, str) else "")
def test_refusals_say_why_and_change_nothing(model: nn.Module, reason: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"1 cannot be folded into 0: .*{reason}"):
        fold_batchnorm(model, "0", "1")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not isinstance(model[1], nn.Identity)
