"""`nap`: normalize what every layer gives, and keep every weight at the length it started with.

    N:  y = act(norm(W x))                          a norm between each layer and its activation (`insert_prenorm`)
    P:  W <- |W_0| W / |W|                          after every step, whole tensors, Frobenius norm (`NormProjection`)
    P:  (gamma, beta) <- |(gamma, beta)_0| / |(gamma, beta)| (gamma, beta)      of each norm, the two as one vector

With N the function does not change when W is scaled, so P changes nothing but what a step means: the direction of W
moves by the effective learning rate, lr / |W|^2 for SGD and lr / |W| for Adam. Normalized networks without P slow down
as |W| grows, unseen; with P only the schedule decides, and a network can go on learning when its data changes.

Source: "Normalization and effective learning rates in reinforcement learning", Lyle, Zheng, Khetarpal, Martens, van
Hasselt, Pascanu, Dabney, 2024, arXiv 2407.01800. No official code was found. The optimizer's moments are left as they
are. Of the paper's ways with gamma and beta we have "project" and "free"; `insert_prenorm(affine=False)` leaves them
out.

Nothing of P is left at inference, and the norms stay. Use it where the targets move: reinforcement and continual
learning. Set weight decay to 0, which has nothing left to do. In a training that relied on the hidden decay of its
learning rate, give a schedule in its place. Project before averaging weights, not after.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.weight import insert_prenorm, project_weights
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> insert_prenorm(model)
    ['1']
    >>> before = model[0].weight.norm().item()
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    >>> handle = project_weights(model, optimizer)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(5, 8)).square().mean().backward()
    ...     _ = optimizer.step()
    >>> abs(model[0].weight.norm().item() - before) < 1e-4
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.card import Card
from laconic.core.constraint import Handle, constrain
from laconic.errors import BadInput

from ._layers import MATRIX_LAYERS, NORMS, matrix_layers

PRENORMS = ("layer", "rms")
SCALE_OFFSETS = ("project", "free")
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Softplus, nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid,
)  # fmt: skip


class NormProjection:
    """The constraint |p| = radius, for `laconic.core.constraint.constrain` and its hook `Constrain`.

    It projects weights and not gradients, as the paper does: there is no `tangent`.

    Args:
        groups: parameters, each held at its present length; several in a tuple are held as one vector.
        radius: one length for all, and for parameters that are in no group.
        every: project at every so many calls for a parameter.

    Raises:
        BadInput: a parameter stands twice or has no length to be held at, a radius or `every` that is not positive.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter | Sequence[nn.Parameter]] = (),
        *,
        radius: float | None = None,
        every: int = 1,
    ):
        if radius is not None and not radius > 0:
            raise BadInput(f"nap: radius is {radius}: it must be positive")
        if every < 1:
            raise BadInput(f"nap: every is {every}: it must be 1 or more")
        self.radius, self.every = radius, every
        self._groups = [(group,) if isinstance(group, Tensor) else tuple(group) for group in groups]
        self._radii = [_length(group) if radius is None else radius for group in self._groups]
        self._group_of = {p: i for i, group in enumerate(self._groups) for p in group}
        self._calls = dict.fromkeys(self._group_of, 0)
        if len(self._group_of) < sum(map(len, self._groups)):
            raise BadInput("nap: a parameter stands in two groups: it can have one length only")
        for group, length in zip(self._groups, self._radii, strict=True):
            if not length > 0:
                shapes = " and ".join(str(tuple(p.shape)) for p in group)
                raise BadInput(f"nap: parameters of shape {shapes} are 0, and could never be anything else: leave them")

    @classmethod
    def of(cls, model: nn.Module, *, scale_offset: str = "project", every: int = 1) -> NormProjection:
        """The rule for a model: weights of linear layers and convolutions, and what norms have.

        Args:
            model: the model, at its initial weights. Parameters that are not trained are left out.
            scale_offset: "project" holds the gain and offset of each norm as one vector, "free" lets them go.
            every: see `NormProjection`.

        Raises:
            BadInput: another `scale_offset`, a parametrization computes a weight, or there is nothing to hold.
        """
        if scale_offset not in SCALE_OFFSETS:
            raise BadInput(f"nap: scale_offset is {scale_offset!r}: it must be one of {', '.join(SCALE_OFFSETS)}")
        groups: list[tuple[nn.Parameter, ...]] = []
        for path, layer in matrix_layers(model):
            if parametrize.is_parametrized(layer, "weight"):
                raise BadInput(f"nap: a parametrization computes the weight of {path or 'the model'}: remove it first")
            groups.append((layer.weight,))
        if scale_offset == "project":
            norms = [module for module in model.modules() if _is_norm(module)]
            groups += [tuple(p for p in norm.parameters(recurse=False)) for norm in norms]
        trained = [group for group in groups if group and all(p.requires_grad for p in group)]
        if not trained:
            raise BadInput(f"nap: {type(model).__name__} has no trained weight of a linear layer or a convolution")
        return cls(trained, every=every)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is held."""
        return list(self._group_of)

    @torch.no_grad()
    def project_(self, p: nn.Parameter) -> None:
        """Bring p, and those that are held with it, back to their length, in place.

        Raises:
            BadInput: p is in no group, and there is no common radius.
        """
        at = self._group_of.get(p)
        if at is None:
            if self.radius is None:
                raise BadInput(
                    f"nap: a parameter of shape {tuple(p.shape)} is in no group, so its length is not known: "
                    "pass constrain(..., params=rule.parameters)"
                )
            _rescale((p,), self.radius)
            return
        self._calls[p] += 1
        if self._calls[p] % self.every == 0:
            _rescale(self._groups[at], self._radii[at])

    def state_dict(self) -> dict[str, Any]:
        """Radii of the groups and calls so far, in the order in which they were given."""
        radii = torch.tensor(self._radii, dtype=torch.float64)
        return {"radii": radii, "calls": torch.tensor(list(self._calls.values()), dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            BadInput: it is of another number of parameters.
        """
        radii, calls = state["radii"].tolist(), state["calls"].tolist()
        if len(radii) != len(self._radii) or len(calls) != len(self._calls):
            raise BadInput(
                f"nap: the state is of {len(calls)} parameters in {len(radii)} groups, and "
                f"{len(self._calls)} in {len(self._radii)} are held here"
            )
        self._radii, self._calls = radii, dict(zip(self._calls, calls, strict=True))


def project_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, scale_offset: str = "project", every: int = 1
) -> Handle:
    """Hold a model's weights at their present length after every step of the optimizer.

    Args:
        model: the model, with its norms (`insert_prenorm`) and at its initial weights.
        optimizer: over its parameters, with a weight decay of 0.
        scale_offset, every: see `NormProjection`.

    Returns:
        Its `remove()` ends it.

    Raises:
        BadInput: as in `NormProjection.of`, or the optimizer does not have a parameter.
    """
    rule = NormProjection.of(model, scale_offset=scale_offset, every=every)
    return constrain(optimizer, rule, rule.parameters)


def insert_prenorm(model: nn.Module, norm: str = "layer", *, affine: bool = True) -> list[str]:
    """Put a norm between each layer and its activation, in place; make the optimizer afterwards.

    They are found in `nn.Sequential`, where a linear layer or convolution stands right before an activation of torch.
    The layer loses its bias, which would end the invariance: an affine layer norm goes on with it as its offset, others
    drop it. A convolution gets a layer norm over channels and places, `nn.GroupNorm(1, channels)`. Later members of a
    `Sequential` without names are renumbered.

    Args:
        model: the model.
        norm: "layer", or "rms" for linear layers alone.
        affine: give the norms a gain, and layer norms an offset.

    Returns:
        Paths of the norms.

    Raises:
        BadInput: another norm, no such pair, a layer that stands in two places, or "rms" at a convolution.
    """
    if norm not in PRENORMS:
        raise BadInput(f"nap: norm is {norm!r}: it must be one of {', '.join(PRENORMS)}")
    pairs = [
        (box, key, f"{path}.{key}" if path else key)
        for path, box in model.named_modules()
        if isinstance(box, nn.Sequential)
        for key, after in zip(box._modules, list(box._modules)[1:], strict=False)
        if isinstance(box._modules[key], MATRIX_LAYERS) and isinstance(box._modules[after], ACTIVATIONS)
    ]
    if not pairs:
        raise BadInput(
            f"nap: {type(model).__name__} has no Sequential where an activation follows a layer: put norms in by hand"
        )
    places = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    for box, key, path in pairs:
        layer = box._modules[key]
        if places.count(id(layer)) > 1:
            raise BadInput(f"nap: {path} stands in two places: its bias cannot be moved behind one norm")
        if norm == "rms" and not isinstance(layer, nn.Linear):
            raise BadInput(f"nap: norm='rms' is over the last dimension, which {path} has not its channels on: 'layer'")
    made = {}
    for box, key, _ in pairs:
        made[id(box), key] = _norm_behind(box._modules[key], norm, affine)
    for box in {id(box): box for box, _, _ in pairs}.values():
        _insert(box, {key: new for (where, key), new in made.items() if where == id(box)})
    inserted = {id(new) for new in made.values()}
    return [path for path, module in model.named_modules() if id(module) in inserted]


def _norm_behind(layer: nn.Module, norm: str, affine: bool) -> nn.Module:
    """The norm of a layer's output; takes the layer's bias."""
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    new: nn.Module
    if norm == "rms":
        new = nn.RMSNorm(layer.out_features, elementwise_affine=affine, **like)
    elif isinstance(layer, nn.Linear):
        new = nn.LayerNorm(layer.out_features, elementwise_affine=affine, **like)
    else:
        new = nn.GroupNorm(1, layer.out_channels, affine=affine, **like)
    bias, layer.bias = layer.bias, None
    offset = getattr(new, "bias", None)
    if bias is not None and offset is not None:
        with torch.no_grad():
            offset.copy_(bias)
    return new.train(layer.training)


def _insert(box: nn.Sequential, norms: Mapping[str, nn.Module]) -> None:
    """Rebuild a Sequential with a norm behind each of the named members."""
    numbered = all(key.isdecimal() for key in box._modules)
    members: list[tuple[str, nn.Module]] = []
    for key, module in box._modules.items():
        members.append((key, module))
        if key in norms:
            members.append((f"{key}_norm", norms[key]))
    box._modules.clear()
    for i, (key, module) in enumerate(members):
        box.add_module(str(i) if numbered else key, module)


def _is_norm(module: nn.Module) -> bool:
    """A norm of torch, or one by another hand that says so in its name, as RMSNorm in its many forms."""
    return isinstance(module, NORMS) or type(module).__name__.lower().endswith("norm")


def _length(group: Sequence[Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(p.detach(), dtype=torch.float64)) ** 2 for p in group) ** 0.5


def _rescale(group: Sequence[Tensor], radius: float) -> None:
    length = _length(group)
    if length > 0:
        for p in group:
            p.mul_(radius / length)


CARD = Card(
    id="nap",
    title="Normalization and effective learning rates in reinforcement learning",
    authors="Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney",
    year=2024,
    source="arXiv 2407.01800",
    family="weight",
    summary="Normalize-and-project: puts norms before activations and holds every weight at its initial length, so "
    "that the effective learning rate does not decay and the network stays able to learn.",
    objects={"NormProjection": "Constraint"},
    use="Reinforcement and continual learning, where targets go on changing.",
    avoid="Networks without norms; trainings that rely on the learning rate's hidden decay and have no schedule.",
    composes=("elr_probe", "rmsnorm"),
    claim={
        "text": "When labels are drawn anew task after task, a normalized network with projected weights fits the late "
        "tasks better than without, by more than two points of training accuracy.",
        "metric": "training accuracy on the last tasks",
        "direction": "higher",
        "margin": 0.02,
        "arms": ("norms", "norms_and_projection"),
        "seeds": 5,
        "minutes": 6,
        "task": "digits",
    },
)
