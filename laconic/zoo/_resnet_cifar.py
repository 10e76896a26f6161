"""`resnet_cifar`: the residual networks of small pictures, 6 n + 2 layers deep, with the norms where one wants them.

A convolution to w_1 channels; three stages of n residual blocks with widths (w_1, w_2, w_3), the second and third stage
begin with stride 2; the mean over places; a linear layer:

    y = relu(S(x) + N(conv(relu(N(conv(x))))))       x (N, C, H, W) -> y (N, C', H / s, W / s), convolutions 3 x 3

The shortcut S is the identity; where the shape changes it keeps every second place and adds channels of zeros (`pad`,
option A of the paper: no parameters), or is a 1 x 1 convolution with a norm (`conv`, option B).

The placement of the block's outer norm is an option (`laconic.zoo.SCHEMES`). "output" is the paper's network. "pre" is
its successor, y = S(x) + conv(relu(N(conv(relu(N(x)))))), with one more norm and relu before the mean ("Identity
Mappings in Deep Residual Networks", He et al., 2016, arXiv 1603.05027).

Source: "Deep Residual Learning for Image Recognition", He, Zhang, Ren, Sun, 2015, arXiv 1512.03385, section 4.2.
Official code: github.com/KaimingHe/deep-residual-networks (MIT), whose models are for ImageNet. We differ from the paper
in the linear layer's first weights, which are PyTorch's. Depths 20, 32, 44, 56, 110 and 1202 have the counts of
parameters that the paper's table 6 gives.

At inference each batch norm behind a convolution folds into it (`laconic.norm.FoldBatchNorm`); norms that stand before a
relu and a convolution, as "pre" has them, do not. Use it for pictures of up to 64 x 64 pixels; larger ones want a stem
that makes them smaller first.

Example:
    >>> import torch
    >>> from laconic.zoo import ResNetCifar, ResNetCifarConfig
    >>> model = ResNetCifar(ResNetCifarConfig(depth=20))
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in model.parameters())
    269722
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.placement import Placement, Residual, Scheme, placements
from laconic.errors import BadInput


@dataclass(frozen=True)
class ResNetCifarConfig:
    """Sizes and options.

    Attributes:
        depth: layers with weights, 6 n + 2 for n blocks to a stage.
        widths: channels of the three stages.
        classes: outputs.
        channels: of the pictures.
        shortcut: where the shape changes, "pad" or "conv".
        placement: of the norms, a name of `laconic.zoo.SCHEMES` or a function.
    """

    depth: int = 20
    widths: tuple[int, int, int] = (16, 32, 64)
    classes: int = 10
    channels: int = 3
    shortcut: Literal["pad", "conv"] = "pad"
    placement: str | Scheme = "output"

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise BadInput(f"the depth of a CIFAR residual network is 6 n + 2 (8, 14, 20, ...), not {self.depth}")
        if self.shortcut not in ("pad", "conv"):
            raise BadInput(f"the shortcut is 'pad' or 'conv', not {self.shortcut!r}")
        if self.shortcut == "pad" and list(self.widths) != sorted(self.widths):
            raise BadInput(f"a padded shortcut cannot take channels away, as widths {self.widths} ask: use 'conv'")


def pad_shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Every `stride`-th place of x (N, C, H, W), with zeros for the channels from C to `channels`, half on each side."""
    extra = channels - x.shape[1]
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2))


class PadShortcut(nn.Module):
    """`pad_shortcut` as a module."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride))."""
        return pad_shortcut(x, self.channels, self.stride)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.channels}, stride={self.stride}"


class ResNetCifar(nn.Module):
    """The network: pictures (N, channels, H, W) -> class scores (N, classes).

    Args:
        config: its sizes.
        norm: makes the norm of so many channels.
    """

    def __init__(self, config: ResNetCifarConfig | None = None, *, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.config = config = config or ResNetCifarConfig()
        each = (config.depth - 2) // 6
        places = placements(config.placement, 3 * each)
        width = config.widths[0]
        # Blocks that normalize their input want it raw; all others want it to be what blocks themselves give.
        self.stem = nn.Sequential(_conv(config.channels, width))
        if not places[0].norm_in:
            self.stem.extend([norm(width), nn.ReLU()])
        self.blocks = nn.Sequential()
        for number, place in enumerate(places):
            wider = config.widths[number // each]
            stride = 2 if number % each == 0 and number else 1
            self.blocks.append(_block(width, wider, stride, place, norm, config.shortcut))
            width = wider
        self.norm = nn.Sequential(norm(width), nn.ReLU()) if places[-1].norm_in else nn.Identity()
        self.head = nn.Linear(width, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block, place in zip(self.blocks, places, strict=True):
            block.branch[-1].weight.data.mul_(0.0 if place.zero_last else place.init_gain)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores.

        Raises:
            ValueError: the pictures have another number of channels.
        """
        if images.ndim != 4 or images.shape[1] != self.config.channels:
            want = f"(N, {self.config.channels}, H, W)"
            raise ValueError(f"pictures of shape {want} are wanted, not {tuple(images.shape)}")
        return self.head(self.norm(self.blocks(self.stem(images))).mean((2, 3)))


def _conv(a: int, b: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, stride, padding=1, bias=False)


def _block(a: int, b: int, stride: int, place: Placement, norm: Callable[[int], nn.Module], shortcut: str) -> Residual:
    branch = nn.Sequential(_conv(a, b, stride), norm(b), nn.ReLU(), _conv(b, b))
    return Residual(
        branch,
        place,
        lambda: norm(a),
        norm_of_output=lambda: norm(b),
        shortcut=_shortcut(a, b, stride, norm, shortcut) if place.skip_scale else None,
        activation=nn.ReLU(),
    )


def _shortcut(a: int, b: int, stride: int, norm: Callable[[int], nn.Module], how: str) -> nn.Module | None:
    if a == b and stride == 1:
        return None
    if how == "pad":
        return PadShortcut(b, stride)
    return nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), norm(b))


CARD = Card(
    id="resnet_cifar",
    title="Deep Residual Learning for Image Recognition",
    authors="He, Zhang, Ren, Sun",
    year=2015,
    source="arXiv 1512.03385, section 4.2",
    family="zoo",
    summary="A convolutional network for small pictures whose blocks add to their input, so that it trains when deep.",
    objects={"ResNetCifar": "Model"},
    use="Small pictures, and as the common ground on which convolutional layers, norms and optimizers are compared.",
    avoid="Pictures of more than 64 x 64 pixels, which want a stem that makes them smaller first.",
    composes=("fold_batchnorm", "weight_standardization", "zero_init"),
    code="github.com/KaimingHe/deep-residual-networks, MIT (ImageNet models)",
    claim={
        "text": "At 44 layers a network learns better with shortcuts than without, all else being the same.",
        "metric": "accuracy",
        "direction": "higher",
        "margin": 0.02,
        "arms": ("plain", "residual"),
        "seeds": 5,
        "minutes": 6,
        "task": "digits",
    },
)
