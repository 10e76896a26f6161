"""One module in the place of another: built from its sizes, holding its tensors, in its mode, type and on its device."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput

__all__ = ["build", "cast_", "class_of", "hooks_of", "keep_", "lost_of", "match_modes_", "plain_class", "reference"]

# What libraries call the same argument.
SIZES = ("normalized_shape", "num_features", "num_channels", "hidden_size", "dim")
EPSILONS = ("eps", "variance_epsilon", "epsilon")


# --- building ---------------------------------------------------------------------------------------


def class_of(new: Callable[..., Any]) -> type[nn.Module] | None:
    """The class that `new` is, or that it is a `functools.partial` of; None if it is a function of the old module."""
    inner = new.func if isinstance(new, functools.partial) else new
    return inner if inspect.isclass(inner) and issubclass(inner, nn.Module) else None


def build(new: Callable[..., Any], old: nn.Module, path: str, like: Tensor | None) -> Any:
    """What stands in for `old`: `new(old)`, or for a class its instance of the old module's sizes.

    Args:
        new: a class of modules, a partial of one, or a function of the old module.
        old: the module at `path`.
        path: for messages.
        like: has the device to build on and the dtype to build in.

    Raises:
        BadInput: the class wants what the old module does not have, or refuses what it has.
    """
    with torch.device(like.device) if like is not None else nullcontext():
        if class_of(new) is None:
            return new(old)
        arguments = _arguments(new, old, path, like)
        try:
            return new(**arguments)
        except Exception as error:  # a constructor may refuse by any error; torch's attention does by an assertion
            given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
            raise BadInput(f"{path}: {_name(new)}({given}) is not possible: {error}") from error


def _arguments(new: Callable[..., Any], old: nn.Module, path: str, like: Tensor | None) -> dict[str, Any]:
    """The arguments of the new class that the old module has an answer to."""
    fixed = new.keywords if isinstance(new, functools.partial) else {}
    given, missing = {}, []
    for name, parameter in inspect.signature(new).parameters.items():
        if name in fixed or name.startswith("_") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in ("device", "dtype") and like is not None:
            given[name] = getattr(like, name)
            continue
        found = next(_answers(name, old), None)
        if found is not None:
            given[name] = found[0]
        elif parameter.default is parameter.empty:
            missing.append(name)
    if missing:
        raise BadInput(
            f"{path}: {_name(new)} needs {' and '.join(missing)}, which a {type(old).__name__} does not tell: "
            f"give a function of the old module, as `lambda old: {_name(new)}(...)`"
        )
    return given


def _answers(name: str, old: nn.Module) -> Iterator[tuple[Any]]:
    """Values for an argument, the most direct first, each in a tuple since None is a value too."""
    for alias in (name, *_aliases(name)):
        if alias in old._parameters or alias in old._buffers:  # `bias=True` makes what is then called `bias`
            yield (getattr(old, alias) is not None,)
        elif hasattr(old, alias) and _is_plain(getattr(old, alias)):
            value = getattr(old, alias)
            if name not in SIZES or name == alias:
                yield (value,)
            elif isinstance(value, int) or len(value) == 1:
                yield (value if isinstance(value, int) else value[0],)
    weight = old._parameters.get("weight")
    if name in SIZES and weight is not None and weight.ndim == 1:
        yield (len(weight),)


def _aliases(name: str) -> tuple[str, ...]:
    group = next((group for group in (SIZES, EPSILONS) if name in group), ())
    return tuple(other for other in group if other != name)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _name(new: Callable[..., Any]) -> str:
    found = class_of(new)
    return found.__name__ if found is not None else getattr(new, "__name__", type(new).__name__)


# --- what is carried over ---------------------------------------------------------------------------


def reference(*modules: nn.Module) -> Tensor | None:
    """The first floating-point tensor of the first module that has one: it has the device and the dtype."""
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def cast_(new: nn.Module, old: nn.Module, like: Tensor) -> None:
    """Bring the floating-point tensors of `new` to the device and dtype of `like`, those of `old` in it left alone."""
    theirs = {id(tensor) for tensor in chain(old.parameters(), old.buffers())}
    done: dict[int, Tensor] = {}  # so that what is tied in `new` stays tied
    for holder, leaf, tensor in list(_tensors(new)):
        if id(tensor) in theirs:
            continue
        if id(tensor) not in done:
            dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
            moved = tensor.detach().to(like.device, dtype)
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, tensor.requires_grad)
            unchanged = tensor.dtype == dtype and tensor.device == like.device
            done[id(tensor)] = tensor if unchanged else moved
        setattr(holder, leaf, done[id(tensor)])


def keep_(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the very parameters and buffers of `old` that have the same name and shape there."""
    had: dict[str, Tensor] = dict(chain(old.named_parameters(remove_duplicate=False), old.named_buffers()))
    places = {name: new.get_submodule(name.rpartition(".")[0]) for name in _names(new)}
    for name, holder in places.items():
        leaf = name.rpartition(".")[2]
        mine = getattr(holder, leaf)
        was = had.get(name)
        if was is None or was.shape != mine.shape or type(mine) not in (nn.Parameter, Tensor):
            continue
        if isinstance(was, nn.Parameter) == isinstance(mine, nn.Parameter):
            setattr(holder, leaf, was)


def lost_of(new: nn.Module, old: nn.Module) -> tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """What became of the tensors: (kept, lost -> why, fresh), by their names in the old and the new module."""
    had = dict(chain(old.named_parameters(), old.named_buffers()))
    has = dict(chain(new.named_parameters(), new.named_buffers()))
    there = {id(tensor) for tensor in has.values()}
    before = {id(tensor) for tensor in had.values()}
    kept = tuple(name for name, tensor in had.items() if id(tensor) in there)
    lost = {name: _why_lost(tensor, has.get(name)) for name, tensor in had.items() if name not in kept}
    return kept, lost, tuple(name for name, tensor in has.items() if id(tensor) not in before)


def _why_lost(was: Tensor, mine: Tensor | None) -> str:
    if mine is None:
        return "no place"
    if was.shape != mine.shape:
        return f"{tuple(was.shape)} does not fit {tuple(mine.shape)}"
    return "not asked to be kept" if type(mine) in (nn.Parameter, Tensor) else f"its place is a {type(mine).__name__}"


def match_modes_(new: nn.Module, old: nn.Module) -> None:
    """Training or evaluation as in `old`, part by part where the parts have the same paths."""
    modes = {path: module.training for path, module in old.named_modules()}
    theirs = set(old.modules())
    for path, module in new.named_modules():
        if module not in theirs:
            module.training = modes.get(path, old.training)


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for holder in module.modules():
        for leaf, tensor in chain(holder._parameters.items(), holder._buffers.items()):
            if tensor is not None:
                yield holder, leaf, tensor


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in chain(module.named_parameters(remove_duplicate=False), module.named_buffers())]


# --- what cannot be carried over --------------------------------------------------------------------


def plain_class(module: nn.Module) -> type:
    """The class of a module, that below the one which a parametrization puts on top."""
    return type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)


def hooks_of(module: nn.Module) -> list[str]:
    """The kinds of hooks on a module, as words; "a forward of its own" where one was written over its class's."""
    kinds = {
        "_forward_pre_hooks": "forward pre-hooks",
        "_forward_hooks": "forward hooks",
        "_backward_pre_hooks": "backward pre-hooks",
        "_backward_hooks": "backward hooks",
        "_state_dict_pre_hooks": "state-dict pre-hooks",
        "_state_dict_hooks": "state-dict hooks",
        "_load_state_dict_pre_hooks": "loading pre-hooks",
        "_load_state_dict_post_hooks": "loading hooks",
    }
    found = [words for name, words in kinds.items() if getattr(module, name, None)]
    return found + ["a forward of its own"] * ("forward" in vars(module))
