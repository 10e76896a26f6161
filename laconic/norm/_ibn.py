"""`ibn`: instance norm for some channels and batch norm for the others, so that features forget appearance and keep content.

For x (N, C, H, W) and k = int(C ratio):

    y = [IN(x_1..k), BN(x_k+1..C)]           concatenated in that order, each with gain and shift

IN takes mean and biased variance over the (H, W) of one example's channel, in training and at inference alike; BN is
torch's. In a residual network:

    variant "a"   IBN in place of the first norm of every residual block, but for those of the last stage
    variant "b"   an IN behind the addition, before the block's last ReLU, in the last block of the first two stages, and
                  an IN in place of the stem's norm

Source: "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", Pan, Luo, Shi, Tang, 2018, arXiv
1807.09441. Official code: XingangPan/IBN-Net, MIT. We differ from it: any ratio works (its split loses channels unless
C ratio divides C), and `to_ibn` keeps what the old norms had learned where it can.

At inference the half with batch norm folds into the convolution before, the other half does not.

Use it where test pictures look different from those trained on (colour, light, style) and their content is the same.
Not in the last stage, whose features are to be discriminative, and not on maps of one pixel, where IN is 0.

Example:
    >>> import torch
    >>> from laconic.norm import IBN
    >>> layer = IBN(8, ratio=0.25)
    >>> layer.IN.num_features, layer.BN.num_features
    (2, 6)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.surgery import Swapped, Where, swap
from laconic.errors import BadInput

VARIANTS = ("a", "b")
B_STAGES = 2  # variant b: this many stages from the first end with an instance norm


class IBN(nn.Module):
    """The layer, for (N, C, H, W).

    Args:
        num_features: C.
        ratio: share of the channels, the first ones, that get instance norm; at least one of each kind must be left.
        eps, momentum: of both norms, of the batch norm.
        device, dtype: of the parameters.

    Raises:
        ValueError: a ratio that leaves one of the norms without channels; in the call, an input of another shape.
    """

    def __init__(
        self,
        num_features: int,
        ratio: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_features, self.instance_features = num_features, int(num_features * ratio)
        if not 0 < self.instance_features < num_features:
            raise ValueError(
                f"ibn: a ratio of {ratio} gives {self.instance_features} of {num_features} channels to the instance norm: both norms "
                "need one at least"
            )
        self.IN = nn.InstanceNorm2d(self.instance_features, eps, affine=True, device=device, dtype=dtype)
        rest = num_features - self.instance_features
        self.BN = nn.BatchNorm2d(rest, eps, momentum, device=device, dtype=dtype)

    @classmethod
    def from_batchnorm(cls, old: nn.BatchNorm2d, ratio: float = 0.5) -> IBN:
        """An IBN with a batch norm's gains, shifts and running statistics, as far as it has a place for them."""
        new = cls(old.num_features, ratio, old.eps, old.momentum, device=_device(old), dtype=_dtype(old))
        with torch.no_grad():
            for name, first in (("weight", True), ("bias", True), ("running_mean", False), ("running_var", False)):
                given = getattr(old, name)
                if given is None:
                    continue
                getattr(new.BN, name).copy_(given[new.instance_features :])
                if first:
                    getattr(new.IN, name).copy_(given[: new.instance_features])
            if old.num_batches_tracked is not None and new.BN.num_batches_tracked is not None:
                new.BN.num_batches_tracked.copy_(old.num_batches_tracked)
        return new

    def reset_parameters(self) -> None:
        """Both norms as they are made."""
        self.IN.reset_parameters()
        self.BN.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"ibn: an input of {tuple(x.shape)}: it must be (N, {self.num_features}, H, W)")
        one, batch = x.split([self.instance_features, self.num_features - self.instance_features], 1)
        return torch.cat([self._instance(one), self.BN(batch)], 1)

    def _instance(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] > 1:
            return self.IN(x)
        # torch refuses to train on one value to a channel; the equation says 0 there, in both modes.
        return 0 * x * self.IN.weight.view(1, -1, 1, 1) + self.IN.bias.view(1, -1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, instance={self.instance_features}"


# --- whole networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a library keeps the norms of its residual networks, as patterns of paths with groups `stage` and `block`.

    Attributes:
        first: the first norm of a block.
        last: the activation behind a block's addition; None where there is no module for it alone.
        stem: the norm of the stem.
    """

    first: str
    last: str | None
    stem: str


LAYOUTS = {
    "transformers": Layout(
        r"(?:.*\.)?encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\.layer\.0\.normalization",
        r"(?:.*\.)?encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\.activation",
        r"(?:.*\.)?embedder\.embedder\.normalization",
    ),
    "torchvision": Layout(r"(?:.*\.)?layer(?P<stage>\d+)\.(?P<block>\d+)\.bn1", None, r"(?:.*\.)?bn1"),
}
"""The residual networks that `to_ibn` knows by the names of their modules; timm's are those of torchvision."""


def to_ibn(model: nn.Module, variant: str = "a", *, ratio: float = 0.5, where: Where = None) -> Swapped:
    """Make an IBN-Net of a residual network, in place; train or fine-tune it afterwards.

    Args:
        model: a residual network of transformers, torchvision or timm; any other with `where`.
        variant: "a" or "b", see above.
        ratio: of `IBN`, for variant a.
        where: variant a in any network: which batch norms become IBN, as `laconic.swap` takes it.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        BadInput: an unknown variant, a network whose names are not known, or one without a module behind its additions.
    """
    if variant not in VARIANTS:
        raise BadInput(f"ibn: variant is {variant!r}: it is one of {', '.join(VARIANTS)}")

    def ibn(old: nn.Module) -> nn.Module | None:
        return IBN.from_batchnorm(old, ratio) if isinstance(old, nn.BatchNorm2d) else None

    if where is not None:
        if variant != "a":
            raise BadInput("ibn: `where` says which norms become IBN, and variant b has none: leave one of them out")
        return swap(model, nn.BatchNorm2d, ibn, where, keep=False)
    layout, blocks = _layout(model)
    if variant == "a":
        last = max(stage for stage, _ in blocks)
        first = [path for (stage, _), path in blocks.items() if stage < last]
        return swap(model, nn.BatchNorm2d, ibn, first, keep=False)
    if layout.last is None:
        raise BadInput(
            f"ibn: {next(iter(blocks.values()))} belongs to a block that calls one ReLU several times, so that no module "
            "stands behind its addition: write the block with an activation of its own there"
        )
    widths = _ends(model, layout, sorted({stage for stage, _ in blocks})[:B_STAGES])
    done = swap(model, nn.BatchNorm2d, _instance_of, lambda path, _: bool(re.fullmatch(layout.stem, path)))
    for path, width in widths.items():
        activation = model.get_submodule(path)
        norm = nn.InstanceNorm2d(width, affine=True, device=_device(model), dtype=_dtype(model))
        behind = swap(model, type(activation), _before(norm, activation), [path], keep=False)
        done.changed.extend(behind.changed)
        done.left.update(behind.left)
    return done


def _before(norm: nn.Module, activation: nn.Module) -> Callable[[nn.Module], nn.Module]:
    return lambda _: nn.Sequential(norm, activation)


def _layout(model: nn.Module) -> tuple[Layout, dict[tuple[int, int], str]]:
    """The layout of a network, and (stage, block) -> path of the block's first norm."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for layout in LAYOUTS.values():
        found = [(re.fullmatch(layout.first, path), path) for path in paths]
        blocks = {(int(m["stage"]), int(m["block"])): path for m, path in found if m}
        if blocks:
            return layout, blocks
    raise BadInput(
        f"ibn: {type(model).__name__} has no residual blocks with names as in {' or '.join(LAYOUTS)}: say with where= "
        "which batch norms become IBN"
    )


def _ends(model: nn.Module, layout: Layout, stages: list[int]) -> dict[str, int]:
    """The activation that ends each of the stages, and the channels that it sees."""
    assert layout.last is not None
    ends: dict[int, tuple[int, str]] = {}
    for path, _ in model.named_modules():
        match = re.fullmatch(layout.last, path)
        if match and int(match["stage"]) in stages:
            stage, block = int(match["stage"]), int(match["block"])
            ends[stage] = max(ends.get(stage, (-1, "")), (block, path))
    widths = {}
    for _, path in ends.values():
        inside = model.get_submodule(path.rpartition(".")[0]).modules()
        # The last norm of the branch normalizes what is added, so it has the channels of the sum.
        branch = [module for module in inside if isinstance(module, nn.BatchNorm2d)]
        widths[path] = branch[-1].num_features
    return widths


def _instance_of(old: nn.Module) -> nn.Module | None:
    if not isinstance(old, nn.BatchNorm2d):
        return None
    return nn.InstanceNorm2d(old.num_features, old.eps, affine=True, device=_device(old), dtype=_dtype(old))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters(), torch.empty(0)).dtype


CARD = Card(
    id="ibn",
    title="Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
    authors="Pan, Luo, Shi, Tang",
    year=2018,
    source="arXiv 1807.09441",
    family="norm",
    summary="Instance norm for some channels and batch norm for the others: features that do not depend on how a picture "
    "looks, beside those that do.",
    objects={"IBN": "Layer"},
    traits={"IBN": ("gradient:exact", "batch_independent_eval")},
    use="Convolutional networks whose test pictures differ in colour, light or style from those trained on.",
    avoid="The last stage, maps of a pixel or two, and tasks where the look of a picture is what is asked for.",
    composes=("fold_batchnorm",),
    vectors=("ibn",),
    code="github.com/XingangPan/IBN-Net, MIT",
    claim={
        "text": "On test images whose contrast and brightness were changed, a network trained without such changes is "
        "more accurate with IBN than with batch norm, by more than three points.",
        "metric": "accuracy on changed images",
        "direction": "higher",
        "margin": 0.03,
        "arms": ("batchnorm", "ibn"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
