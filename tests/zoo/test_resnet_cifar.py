"""`resnet_cifar`: the sizes of the paper's table, the equations of its block, and where the norms may stand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.testing import Example
from laconic.zoo import SCHEMES, ResNetCifar, ResNetCifarConfig
from laconic.zoo._resnet_cifar import pad_shortcut

TINY = ResNetCifarConfig(depth=8, widths=(4, 6, 8), classes=3)
# Of table 6, in millions.
TABLE = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7", 1202: "19.4"}


def tiny_count() -> int:
    """The parameters of `TINY`, added up by hand."""
    convolutions = 9 * (3 * 4 + 4 * 4 + 4 * 4 + 4 * 6 + 6 * 6 + 6 * 8 + 8 * 8)
    norms = 2 * (4 + 4 + 4 + 6 + 6 + 8 + 8)
    return convolutions + norms + 8 * 3 + 3


EXAMPLES = [
    Example(
        lambda: ResNetCifar(TINY),
        kind="Model",
        inputs=[(2, 3, 8, 8)],
        # 0.27 M in table 6; the sum of its layers
        stated={"parameters": tiny_count(), "published": (lambda: ResNetCifar(ResNetCifarConfig(20)), 269_722)},
    )
]


@pytest.mark.parametrize("depth", TABLE)
def test_the_counts_of_the_papers_table(depth: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in ResNetCifar(ResNetCifarConfig(depth)).parameters())
    digits = len(TABLE[depth].partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == TABLE[depth]


def lively(model: nn.Module) -> nn.Module:
    """Other statistics and gains than the first ones, so that every norm counts."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_the_equation_of_the_whole_network() -> None:
    model, x = lively(ResNetCifar(TINY)), torch.randn(2, 3, 8, 8)
    want = model.stem[1](F.conv2d(x, model.stem[0].weight, padding=1)).relu()
    for block, stride in zip(model.blocks, (1, 2, 2), strict=True):
        first, norm, _, second = block.branch
        inner = norm(F.conv2d(want, first.weight, stride=stride, padding=1)).relu()
        branch = block.norm_out(F.conv2d(inner, second.weight, padding=1))
        skip = torch.zeros_like(branch)
        extra = (branch.shape[1] - want.shape[1]) // 2
        skip[:, extra : extra + want.shape[1]] = want[:, :, ::stride, ::stride]
        want = (skip + branch).relu()
    torch.testing.assert_close(model(x), model.head(want.mean((2, 3))))


def test_the_successor_adds_to_a_stream_that_nothing_else_touches() -> None:
    config = ResNetCifarConfig(depth=14, widths=(4, 4, 4), placement="pre")
    model, x = lively(ResNetCifar(config)), torch.randn(2, 3, 8, 8)
    assert isinstance(model.norm, nn.Sequential) and len(model.stem) == 1
    stream = model.stem(x)
    block = model.blocks[0]
    want = stream + block.branch(block.norm_in(stream).relu())
    torch.testing.assert_close(block(stream), want)
    assert (block(stream) < 0).any()  # no relu behind the sum


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_every_placement_trains(scheme: str, shortcut: str) -> None:
    model = ResNetCifar(ResNetCifarConfig(8, (4, 6, 8), placement=scheme, shortcut=shortcut))
    out = model(torch.randn(3, 3, 9, 9))
    assert out.shape == (3, 10) and out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_norm_can_be_another() -> None:
    model = ResNetCifar(TINY, norm=lambda channels: nn.GroupNorm(2, channels))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_every_batch_norm_behind_a_convolution_folds() -> None:
    model = ResNetCifar(TINY)
    structure = Structure.build(model, ((torch.zeros(2, 3, 8, 8),), {}))
    assert len(structure.batchnorm_pairs) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_odd_pictures_and_odd_channels_of_the_padded_shortcut() -> None:
    x = torch.arange(2 * 25.0).view(1, 2, 5, 5)
    y = pad_shortcut(x, 5, 2)
    assert y.shape == (1, 5, 3, 3)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"6 n \+ 2 .*, not 21"):
        ResNetCifarConfig(depth=21)
    with pytest.raises(BadInput, match="not 'zero'"):
        ResNetCifarConfig(shortcut="zero")
    with pytest.raises(BadInput, match="cannot take channels away"):
        ResNetCifarConfig(widths=(8, 4, 4))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\) are wanted, not \(2, 1, 8, 8\)"):
        ResNetCifar(TINY)(torch.zeros(2, 1, 8, 8))
