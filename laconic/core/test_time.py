"""Batch norms that compute other statistics at test time: put in, taken out, and put back to their start.

What adapts to the stream of test data stands in the place of the model's batch norms for a while:

    with attach(model, lambda bn: AlphaBN.from_batchnorm(bn, source_weight=0.9)) as attached:
        model(x)             # normalized by other statistics
        attached.reset()     # another domain: every layer is as it was when it was put in
    model(x)                 # the batch norms that the model came with, bit for bit

The model's own batch norms are set aside whole: no value of theirs is read into a buffer that is then written to, no
flag is changed, nothing is hooked. The layers that stand in hold copies of gain, shift and statistics under the same
names, so that the state dict of the model keeps their keys, and what is learned at test time is learned on copies.

How much the source's statistics count is called `source_weight` everywhere, in [0, 1]: 1 is the model as it was
trained, 0 is the test data alone. (Papers call either that or its complement alpha.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput

from .affine import BATCH_NORMS
from .statistics import widened

__all__ = ["BATCH_NORMS", "AdaptedNorm", "Attached", "attach", "source_share"]



def source_share(who: str, source_weight: float) -> float:
    """The weight of the source's statistics, once it is known to be one.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= source_weight <= 1:
        raise ValueError(f"{who}: source_weight is {source_weight}: 1 is the source alone, 0 the test data alone")
    return float(source_weight)


class AdaptedNorm(nn.Module):
    """y = weight (x - mean) / sqrt(var + eps) + bias, the mean and variance being what a subclass makes of the input.

    Shape: (n, num_features, ...) -> the same. float16 and bfloat16 are computed in float32.

    Args:
        num_features: C.
        eps: added to the variance.
        affine: have a gain and a shift.
        device, dtype: of the parameters and the source's statistics.

    Attributes:
        running_mean, running_var: (C,), the source's; never written to.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features, **place)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features, **place)) if affine else None)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features, **place))
        self.register_buffer("running_var", torch.ones(num_features, **place))

    @classmethod
    def from_batchnorm(cls, norm: Any, **options: Any) -> Self:
        """A layer with copies of what a batch norm holds, in its mode; `options` are those of the layer.

        Raises:
            BadInput: it is no batch norm, or keeps no running statistics.
        """
        reason = unfit(norm)
        if reason:
            raise BadInput(f"{cls.__name__}: {reason}")
        held = norm.running_mean
        made = cls(norm.num_features, eps=norm.eps, affine=norm.affine, device=held.device, dtype=held.dtype, **options)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                theirs, ours = getattr(norm, name), getattr(made, name)
                if theirs is not None:
                    ours.copy_(theirs)
                    ours.requires_grad_(theirs.requires_grad)
        made.take_source(norm)
        return made.train(norm.training)

    def take_source(self, norm: nn.Module) -> None:
        """Whatever else a subclass wants of the batch norm; called once all values are copied."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance for x (n, C, ...) in float32 or wider, of shapes that broadcast against it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"{type(self).__name__}: x is (n, {self.num_features}, ...), not {tuple(x.shape)}")
        wide = widened(x)
        mean, var = self.statistics(wide)
        y = (wide - mean) * torch.rsqrt(var + self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * self.per_channel(self.weight, wide) + self.per_channel(self.bias, wide)
        return y.to(x.dtype)

    def per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """Values (..., C) in x's type and shaped to broadcast against x (n, C, ...)."""
        return values.to(x.dtype).reshape(*values.shape, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}" + ", affine=False" * (not self.affine)


class Attached:
    """Layers that stand in the place of a model's batch norms. As a context manager it detaches at the end.

    Attributes:
        model: that holds them.
        layers: path -> the layer that stands there; a module that the model holds in several places has one path.
        left: path of a batch norm -> why it was left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
        left: Mapping[str, str],
    ):
        self.model, self.layers, self.left = model, dict(layers), dict(left)
        self._originals = dict(originals)
        first: dict[int, str] = {}
        for path, layer in self.layers.items():
            first.setdefault(id(layer), path)
        self._own = {path: layer for path, layer in self.layers.items() if first[id(layer)] == path}
        self._start = _copied({path: layer.state_dict() for path, layer in self._own.items()})

    @property
    def attached(self) -> bool:
        """Whether the layers are still there."""
        return bool(self.layers)

    def reset(self) -> None:
        """Everything that the layers hold as it was when they were put in, what was learned included."""
        self.load_state_dict(self._start)

    def detach(self) -> nn.Module:
        """The model with its own batch norms, the very same modules; they follow it if it was moved meanwhile.

        Raises:
            BadInput: another module stands where a layer was put.
        """
        for path, layer in self.layers.items():
            found = self.model.get_submodule(path)
            if found is not layer:
                raise BadInput(
                    f"{path} is a {type(found).__name__} that was put there after attaching: take it out first"
                )
        for path, original in self._originals.items():
            place = next(iter(self.layers[path].buffers()), None)
            if place is not None:
                original.to(place.device)
            self.model.set_submodule(path, original)
        self.layers, self._own = {}, {}
        return self.model

    def update(self, *batch: Any) -> Any:
        """The model's output on the next of the stream, without gradients; the layers adapt to it."""
        self._require("update")
        with torch.no_grad():
            return self.model(*batch)

    def predict(self, *batch: Any) -> Any:
        """The model's output, without gradients; the layers stay as they are."""
        self._require("predict")
        before = self.state_dict()
        with torch.no_grad():
            output = self.model(*batch)
        self.load_state_dict(before)
        return output

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """path -> copies of all that the layer there holds."""
        return _copied({path: layer.state_dict() for path, layer in self._own.items()})

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            BadInput: the layers were detached, or the state is of others.
        """
        self._require("load a state")
        if set(state) != set(self._own):
            raise BadInput(f"the state is of layers at {sorted(state)}, and those here are at {sorted(self._own)}")
        for path, layer in self._own.items():
            layer.load_state_dict(state[path])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.attached:
            self.detach()

    def __repr__(self) -> str:
        what = sorted({type(layer).__name__ for layer in self.layers.values()})
        return f"Attached({len(self._own)} of {', '.join(what) or 'nothing'}; {len(self.left)} left alone)"

    def _require(self, what: str) -> None:
        if not self.attached:
            raise BadInput(f"the layers were detached: attach them anew to {what}")


def attach(
    model: nn.Module,
    make: Callable[[nn.Module], nn.Module],
    *,
    kinds: Iterable[type[nn.Module]] = BATCH_NORMS,
) -> Attached:
    """Put a layer in the place of every batch norm; nothing is changed before all of them are made.

    Args:
        model: which is changed, until `detach`.
        make: the layer for a batch norm, which it only reads.
        kinds: classes of batch norms that are replaced; others are left alone, which `Attached.left` says.

    Raises:
        BadInput: the model is a batch norm itself, has none that can be replaced, or has such layers already.
    """
    wanted = tuple(kinds)
    made: dict[int, nn.Module] = {}
    layers: dict[str, nn.Module] = {}
    originals: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedNorm):
            raise BadInput(
                f"{path or 'the model'} is a {type(module).__name__} already: detach what was attached first"
            )
        if not isinstance(module, BATCH_NORMS):
            continue
        reason = unfit(module) if isinstance(module, wanted) else f"a {type(module).__name__} keeps its statistics"
        if reason:
            left[path] = reason
            continue
        if not path:
            raise BadInput("the model is a batch norm itself and cannot be replaced inside itself: put it into another")
        if id(module) not in made:
            made[id(module)] = make(module)
        layers[path], originals[path] = made[id(module)], module
    if not layers:
        why = "; ".join(f"{path}: {reason}" for path, reason in left.items()) or "it has no batch norm"
        raise BadInput(f"no batch norm of the model can compute other statistics: {why}")
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return Attached(model, layers, originals, left)


def unfit(norm: nn.Module) -> str:
    """Why a module cannot be replaced by a layer with its statistics, "" if it can."""
    base = next((kind for kind in BATCH_NORMS if isinstance(norm, kind)), None)
    if base is None:
        return f"a {type(norm).__name__} is no batch norm"
    if not isinstance(norm.running_mean, Tensor) or not isinstance(norm.running_var, Tensor):
        return "it keeps no running statistics (track_running_stats=False), so there is no source to start from"
    if parametrize.is_parametrized(norm):
        return "a parametrization computes its values: remove it first (torch.nn.utils.parametrize)"
    if type(norm).forward is not base.forward:
        return f"{type(norm).__name__} has a forward of its own and may do more than {base.__name__}"
    return ""


def _copied(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {path: {name: value.detach().clone() for name, value in state.items()} for path, state in states.items()}
