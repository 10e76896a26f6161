"""Reading a trace: the chains of blocks, each of which feeds the next."""

from __future__ import annotations

from collections import Counter, defaultdict

from torch import nn

from ._trace import Trace, module_of

__all__ = ["chains_of"]


def chains_of(trace: Trace, model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Members, in call order, of the outermost containers whose members feed one another."""
    calls = Counter(trace.order)
    found: dict[str, tuple[str, ...]] = {}
    for path, container in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in found):
            continue
        kinds = {type(child) for child in container.children()}
        if not isinstance(container, nn.ModuleList) and not (
            isinstance(container, nn.Sequential) and len(kinds) == 1 and len(container) > 1
        ):
            continue
        members = {f"{path}.{key}" if path else key for key, _ in container.named_children()}
        ordered = tuple(name for name in trace.order if name in members)
        owns = all(any(True for _ in model.get_submodule(name).parameters()) for name in ordered)
        if ordered and owns and all(calls[name] == 1 for name in ordered) and _feed(trace, ordered):
            found[path] = ordered
    return tuple(found.values())


def _feed(trace: Trace, members: tuple[str, ...]) -> bool:
    """Whether each member reads something that was made from what the one before it made."""
    made: dict[str, set[int]] = defaultdict(set)  # member -> values that come from it without passing another
    linked = set()
    for step in trace.steps:
        member = _member(step.module, members)
        for before, after in zip(members, members[1:], strict=False):
            if not any(value in made[before] for _, value in step.inputs):
                continue
            if member == after:
                linked.add(after)
            elif member is None:
                made[before].update(step.outputs)
        if member is not None:
            made[member].update(step.outputs)
    return linked == set(members[1:])


def _member(module: str, members: tuple[str, ...]) -> str | None:
    """Which of the members a module lies in."""
    while module:
        if module in members:
            return module
        module = module_of(module)
    return None
