"""Scale and shift of norms, moved into the layers around them: the same function, within the stated bound."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.core.affine import Affine, affine_of, after_layer, as_affine, before_layer, rounding_bound

CONVS = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False, stride=2), (2, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 7)),
}


def drawn(size: int, seed: int = 0) -> Affine:
    g = torch.Generator().manual_seed(seed)
    return Affine(*torch.randn(2, size, generator=g, dtype=torch.float64))


def lively(norm: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor, generator=g)
    nn.init.uniform_(norm.running_var, 0.5, 2, generator=g)
    return norm.eval()


@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_in_evaluation(affine):
    norm = lively(nn.BatchNorm2d(4, eps=1e-3, affine=affine).double())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(as_affine(norm)(x), norm(x))


def test_what_is_not_affine():
    assert as_affine(nn.LayerNorm(4)) is None
    assert as_affine(nn.Linear(4, 4)) is None
    assert as_affine(nn.BatchNorm1d(4, track_running_stats=False).eval()) is None
    with pytest.raises(ValueError, match="training mode: call model.eval"):
        as_affine(nn.BatchNorm1d(4))


def test_a_subclass_of_batch_norm_may_do_anything():
    class Shifted(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    assert as_affine(Shifted(4).eval()) is None


def test_a_norm_speaks_for_itself():
    class Own(nn.Module):
        def as_affine(self):
            return Affine(torch.ones(2, requires_grad=True), torch.zeros(2))

    found = as_affine(Own())
    assert found.scale.dtype == torch.float64 and not found.scale.requires_grad


def test_one_after_the_other():
    first, second, x = drawn(3), drawn(3, 1), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(first.then(second)(x), second(first(x)))
    assert drawn(3)(x.float().T, dim=0).dtype == torch.float32


def test_without_mean_weight_and_bias():
    scale, shift = affine_of(torch.tensor([3.0]), 1.0)
    assert (scale.item(), shift.item()) == (0.5, 0.0)


@pytest.mark.parametrize("name", CONVS)
def test_a_reader_takes_it_in(name):
    conv, shape = CONVS[name]
    conv = conv.double()
    affine, x = drawn(4), torch.randn(shape, dtype=torch.float64)
    weight, bias = before_layer(affine, conv.weight, conv.bias, conv.groups)
    torch.testing.assert_close(conv._conv_forward(x, weight, bias), conv(affine(x)))


@pytest.mark.parametrize("name", [*CONVS, "transposed"])
def test_the_layer_before_takes_it_in(name):
    if name == "transposed":
        conv, shape = nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)
    else:
        conv, shape = CONVS[name]
    conv, x = conv.double(), torch.randn(shape, dtype=torch.float64)
    affine = drawn(conv.out_channels)
    weight, bias = after_layer(affine, conv.weight, conv.bias, conv.groups, transposed=name == "transposed")
    with torch.no_grad():
        want = affine(conv(x))
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias)
        torch.testing.assert_close(conv(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_bound_holds_and_is_not_idle(dtype, offset):
    reader, affine = nn.Linear(64, 32).to(dtype), drawn(64)
    x = (torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) + offset).to(dtype)
    exact = affine(x.double()) @ reader.weight.double().T + reader.bias.double()
    weight, bias = (part.to(dtype) for part in before_layer(affine, reader.weight, reader.bias))
    exact = exact.detach()
    off = (nn.functional.linear(x, weight, bias).double() - exact).abs()
    bound = rounding_bound(weight, bias, x)
    assert bool((off <= bound).all())
    assert (off / bound).max().item() > 1e-3


def test_widths_must_match():
    with pytest.raises(ValueError, match="5 channels do not match a layer that reads 4"):
        before_layer(drawn(5), torch.ones(3, 4), None)
    with pytest.raises(ValueError, match="5 channels do not match a layer that makes 3"):
        after_layer(drawn(5), torch.ones(3, 4), None)
