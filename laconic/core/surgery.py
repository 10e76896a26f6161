"""`swap`: other modules in the place of some, with their weights where those fit, and a report of what was not done.

    >>> import torch
    >>> from torch import nn
    >>> from laconic.core.surgery import swap
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    >>> swap(model, nn.LayerNorm, nn.RMSNorm, example=((torch.zeros(1, 4),), {}))
    LayerNorm -> RMSNorm: 1 module
      1
      kept weight; lost bias (no place)

Nothing is changed before everything is known to be possible. A module is left alone, and the report says why, where a
replacement would change what the model means without a word: another module reads its weight directly, a parametrization
computes the weight, or the weight is tied and the new module has no place for it.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from laconic.errors import BadInput

from ._trace import Names, module_of
from ._transplant import build, cast_, hooks_of, keep_, lost_of, match_modes_, plain_class, reference
from .structure import Example, Structure

__all__ = ["Change", "Swapped", "Where", "swap"]

Where = str | Iterable[str] | Callable[[str, nn.Module], bool] | None

NOT_CHECKED = (
    "no example of a call was given, so it was not checked whether other modules read these weights directly: "
    "pass example=(args, kwargs)"
)
SHOWN = 6  # paths of a change in the report


@dataclass(frozen=True)
class Change:
    """A module that was replaced.

    Attributes:
        paths: all its paths; several where the model holds it in several places.
        before: the old class's name.
        after: the new class's name.
        kept: names of parameters and buffers that the new module took over.
        lost: names of those that it did not -> why.
        fresh: names of those of its own, with first values.
    """

    paths: tuple[str, ...]
    before: str
    after: str
    kept: tuple[str, ...]
    lost: dict[str, str]
    fresh: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Swapped:
    """What `swap` did.

    Attributes:
        changed: what was replaced.
        left: path of a module that was asked for -> why it was left alone.
        notes: what else is to be known.
    """

    changed: list[Change] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """A report for people: like changes together, then what was left alone."""
        groups: dict[tuple[str, str], list[str]] = {}
        for change in self.changed:
            key = (f"{change.before} -> {change.after}", _tensors_line(change))
            groups.setdefault(key, []).append(" = ".join(change.paths))
        lines = [] if groups else ["nothing was replaced"]
        for (title, tensors), paths in groups.items():
            lines.append(f"{title}: {len(paths)} module{'s' * (len(paths) > 1)}")
            more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
            lines.append(f"  {', '.join(paths[:SHOWN])}{more}")
            lines += [f"  {tensors}"] * bool(tensors)
        lines += [f"left {path or 'the model itself'}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def swap(
    model: nn.Module,
    old: type[nn.Module] | tuple[type[nn.Module], ...],
    new: Callable[..., nn.Module | None],
    where: Where = None,
    *,
    example: Example | None = None,
    keep: bool = True,
) -> Swapped:
    """Replace modules of a class, in place.

    The new module takes over, as the very same tensors, the parameters and buffers that have its names and shapes; it
    gets the old one's device, dtype, and training or evaluation mode. So ties hold, and an optimizer made before still
    knows what was kept. A module that the model holds in several places is replaced once, in all of them.

    Args:
        model: which is changed.
        old: class of what is replaced. A subclass with a forward of its own is left alone.
        new: a class (or a `functools.partial` of one), whose arguments are read off the old module; or a function that
            makes the new module from the old one, and leaves it by returning None. It may put the old one inside.
        where: which of them: a glob over paths, as "layers.*.norm" (a star spans dots); several globs or paths; or a
            function of (path, module). All by default.
        example: (args, kwargs) of one forward call, from which it is seen who reads what. Models of transformers bring
            one of their own.
        keep: False leaves the new modules with the tensors that `new` gave them.

    Returns:
        What was replaced, what was not and why.

    Raises:
        BadInput: `where` names nothing, or the new class cannot be made from an old module; nothing is changed then.
    """
    classes = old if isinstance(old, tuple) else (old,)
    if not classes or not all(isinstance(one, type) and issubclass(one, nn.Module) for one in classes):
        raise BadInput(f"`old` is a class of modules or a tuple of them; found {old!r}")
    if not callable(new) or isinstance(new, nn.Module):
        raise BadInput(f"`new` is a class of modules or a function of the old module; found {_what(new)}")
    done = Swapped()
    chosen = _chosen(model, classes, where, done.left)
    structure = _structure(model, example, done.notes) if any(_has_parameters(module) for module, _ in chosen) else None
    ties = [group for group in Names.of(model).groups().values() if len(group) > 1]
    planned: list[tuple[nn.Module, Change]] = []
    taken: list[str] = []
    for module, paths in chosen:
        reason = _inside_of(paths, taken) or _refusal(model, module, paths, classes, structure)
        made = None if reason else _made(model, module, paths[0], new, keep)
        reason = reason or _refusal_of(module, paths, made, ties)
        if reason or made is None:
            done.left[paths[0]] = reason
            continue
        taken += paths
        planned.append((made, Change(paths, type(module).__name__, type(made).__name__, *lost_of(made, module))))
        done.notes.extend(_hook_notes(module, made, paths[0]))
    for made, change in planned:
        for path in change.paths:
            model.set_submodule(path, made)
        done.changed.append(change)
    _warn(done, classes)
    return done


# --- which ------------------------------------------------------------------------------------------


def _chosen(
    model: nn.Module, classes: tuple[type[nn.Module], ...], where: Where, left: dict[str, str]
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Each module of the classes that `where` selects by one of its paths, outer ones first, with all its paths."""
    paths: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module] = (*paths.get(module, ()), path)
    selects = _selector(where, {path: module for module, all_of in paths.items() for path in all_of}, classes, left)
    return [
        (module, all_of)
        for module, all_of in paths.items()
        if isinstance(module, classes) and any(selects(path, module) for path in all_of)
    ]


def _selector(
    where: Where, modules: Mapping[str, nn.Module], classes: tuple[type[nn.Module], ...], left: dict[str, str]
) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda path, module: True
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) else list(where)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise BadInput(f"`where` is a glob, a list of globs or a function of (path, module); found {pattern!r}")
        if pattern in modules:
            if not isinstance(modules[pattern], classes):
                left[pattern] = f"it is a {type(modules[pattern]).__name__}, not a {_names(classes)}"
        elif not any(fnmatch.fnmatchcase(path, pattern) for path in modules):
            near = difflib.get_close_matches(pattern, modules, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"no module's path is or matches {pattern!r}{hint}")
    return lambda path, module: any(path == pattern or fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


# --- why not ----------------------------------------------------------------------------------------


def _structure(model: nn.Module, example: Example | None, notes: list[str]) -> Structure | None:
    """The structure of the model from the example, or from the one that models of transformers bring."""
    if example is not None:
        return Structure.build(model, example)
    own = getattr(model, "dummy_inputs", None)
    if isinstance(own, Mapping):
        try:
            return Structure.build(model, ((), dict(own)))
        except BadInput:  # not every model of transformers can be called on its own dummy inputs
            pass
    notes.append(NOT_CHECKED)
    return None


def _inside_of(paths: tuple[str, ...], taken: list[str]) -> str:
    outer = next((other for other in taken for path in paths if _is_inside(path, other)), None)
    return "" if outer is None else f"it is inside {outer}, which is replaced itself"


def _refusal(
    model: nn.Module,
    module: nn.Module,
    paths: tuple[str, ...],
    classes: tuple[type[nn.Module], ...],
    structure: Structure | None,
) -> str:
    """Why a module must stay whatever would replace it, "" if it need not."""
    if "" in paths:
        return "a module cannot be replaced inside itself: put the model into another, or build the new one by hand"
    found = plain_class(module)
    base = next(one for one in classes if issubclass(found, one))
    if getattr(found, "forward", None) is not base.forward:
        return f"{found.__name__} has a forward of its own and may do more than {base.__name__}: name it as `old`"
    parents = [model.get_submodule(module_of(path)) for path in paths]
    if any(isinstance(parent, nn.MultiheadAttention) for parent in parents):
        return "MultiheadAttention reads its weight directly and would not call the new module"
    return _outside_reader(module, paths, structure) if structure is not None else ""


def _outside_reader(module: nn.Module, paths: tuple[str, ...], structure: Structure) -> str:
    for name, _ in module.named_parameters():
        info = structure.parameters[structure.name_of(f"{paths[0]}.{name}")]
        owners = {module_of(other) for other in info.names}  # what is tied is read under a name of the reader's own
        for use in info.uses:
            if use.module not in owners and not any(_is_inside(use.module, path) for path in paths):
                return f"{use.module or 'the model itself'} reads its {name} directly and would not call the new module"
    return ""


def _refusal_of(module: nn.Module, paths: tuple[str, ...], made: nn.Module | None, ties: list[tuple[str, ...]]) -> str:
    """Why this new module cannot stand there, "" if it can."""
    if made is None:
        return "`new` left it as it is"
    stays = set(made.modules())
    for part in module.modules():
        if part in stays:
            continue
        if parametrize.is_parametrized(part):
            return "a parametrization computes its weights: remove it first (torch.nn.utils.parametrize)"
        for hook in part._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                return f"{type(hook).__name__} of torch.nn.utils computes its weights: remove it first"
    there = {id(parameter) for parameter in made.parameters()}
    for group in ties:
        mine = [name for name in group if any(_is_inside(name, path) for path in paths)]
        others = [name for name in group if name not in mine]
        if mine and others:
            path = next(path for path in paths if _is_inside(mine[0], path))
            inner = mine[0].removeprefix(f"{path}.")
            if id(module.get_parameter(inner)) not in there:
                return f"its {inner} is tied to {others[0]}, and the new {type(made).__name__} does not take it over"
    return ""


# --- how --------------------------------------------------------------------------------------------


def _made(model: nn.Module, module: nn.Module, path: str, new: Callable[..., Any], keep: bool) -> nn.Module | None:
    """The new module, ready to stand in; None where `new` leaves the old one."""
    like = reference(module, model.get_submodule(module_of(path)), model)
    made = build(new, module, path, like)
    if made is None or made is module:
        return None
    if not isinstance(made, nn.Module):
        raise BadInput(f"{path}: `new` must give a module or None; found {_what(made)}")
    if keep:
        keep_(made, module)
    if like is not None:
        cast_(made, module, like)
    match_modes_(made, module)
    return made


def _hook_notes(module: nn.Module, made: nn.Module, path: str) -> list[str]:
    stays = set(made.modules())
    return [
        f"{'.'.join(filter(None, (path, inner)))} had {' and '.join(hooks_of(part))}, which the new module does not have"
        for inner, part in module.named_modules()
        if part not in stays and hooks_of(part)
    ]


def _warn(done: Swapped, classes: tuple[type[nn.Module], ...]) -> None:
    for note in done.notes:
        if note != NOT_CHECKED:
            warnings.warn(f"swap: {note}", UserWarning, stacklevel=3)
    if not done.changed:
        why = f"{len(done.left)} left alone, see the report" if done.left else f"no {_names(classes)} was found"
        warnings.warn(f"swap replaced nothing: {why}", UserWarning, stacklevel=3)


def _tensors_line(change: Change) -> str:
    parts = [f"kept {', '.join(change.kept)}"] * bool(change.kept)
    parts += [f"lost {', '.join(f'{name} ({why})' for name, why in change.lost.items())}"] * bool(change.lost)
    parts += [f"new {', '.join(change.fresh)}"] * bool(change.fresh)
    return "; ".join(parts)


def _is_inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _names(classes: tuple[type[nn.Module], ...]) -> str:
    return " or ".join(one.__name__ for one in classes)


def _what(value: object) -> str:
    return f"an object of {type(value).__name__}"
