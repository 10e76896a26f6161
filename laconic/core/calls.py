"""What modules are called with: arguments and outputs seen in one forward, which may end as soon as they were seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Stop", "call", "capture", "first_output", "has_tensor", "is_arguments"]


class Stop(Exception):
    """Ends a forward when what was wanted has been seen."""


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a mapping holds keyword arguments, a tuple or list positional ones, a tensor is the one.

    A pair of a tuple and a mapping is both kinds.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        if is_arguments(batch):
            return model(*batch[0], **batch[1])
        return model(*batch)
    return model(batch)


def is_arguments(batch: Any) -> bool:
    """Whether a batch is a pair of positional and keyword arguments."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    return pair and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping)


def capture(
    model: nn.Module,
    run: Callable[[], Any],
    paths: Sequence[str],
    *,
    first: str | None = None,
    last: str | None = None,
) -> tuple[dict[str, tuple[tuple, dict]], dict[str, Any]]:
    """Arguments and outputs of modules in one forward, which ends as it enters `first` or leaves `last`.

    Args:
        model: whose modules they are.
        run: makes the forward.
        paths: of the modules.
        first: of the module before which to stop.
        last: of the module after which to stop.

    Returns:
        path -> (args, kwargs), in call order, and path -> output; of the last call, where there are several.
    """
    seen: dict[str, tuple[tuple, dict]] = {}
    outputs: dict[str, Any] = {}

    def before(path: str, args: tuple, kwargs: dict) -> None:
        seen[path] = (args, kwargs)
        if path == first:
            raise Stop

    def after(path: str, output: Any) -> None:
        outputs[path] = output
        if path == last:
            raise Stop

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(lambda m, a, k, path=path: before(path, a, k), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda m, a, out, path=path: after(path, out)))
    try:
        run()
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


def first_output(output: Any) -> Any:
    """What a module hands on: its output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def has_tensor(x: Any) -> bool:
    """Whether a nest of tuples, lists and mappings holds a tensor."""
    if isinstance(x, Mapping):
        return any(has_tensor(value) for value in x.values())
    return isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and any(has_tensor(v) for v in x))
