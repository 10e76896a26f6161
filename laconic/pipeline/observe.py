"""Looking at a model and its data while a run goes on: positions of a batch, histograms, extreme magnitudes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.calls import capture
from laconic.core.units import Unit
from laconic.errors import BadInput
from laconic.kernels.inputs import round_inputs
from laconic.quant import InputRange

from .measure import run_batch
from .source_base import bytes_of
from .tensorfile import tensor_digest
from .workspace import digest


def positions(batch: Any) -> int:
    """Positions that a batch gives a layer: tokens, or pixels by a stride of 8."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    if first.is_floating_point():
        return max(first.shape[0], first.shape[0] * first[0].numel() // 192)
    return first.numel()


def batches_of(
    task: Any, split: str, tokens: int, *, batch: int | None = None, seq: int | None = None, limit: int | None = None
) -> list[Any]:
    """Batches of a split, up to about so many positions; none where the task has nothing to calibrate with."""
    if task is None or not {"calibrate", split} <= set(task.splits):
        return []  # a task without inputs to calibrate with has none at all: it is a scoring function
    kept, seen = [], 0
    for one in task.batches(split, batch=batch, seq=seq, limit=limit):
        kept.append(one)
        seen += positions(one)
        if seen >= tokens:
            break
    return kept


def rows_within(task: Any, split: str, tokens: int, *, seq: int | None = None) -> int:
    """Examples of a split that make about so many positions: one at least.

    Of floats 64 at most, of token ids 8: the next ones may be longer, and all are padded to the longest.
    """
    found = batches_of(task, split, 1, batch=1, seq=seq, limit=1)
    if not found:
        return 1
    first = next(iter(found[0].values())) if isinstance(found[0], Mapping) else found[0][0]
    return min(64 if first.is_floating_point() else 8, max(1, tokens // max(1, positions(found[0]))))


def arguments(model: nn.Module, task: Any, batch: Any) -> tuple[tuple, dict]:
    """What a task calls the model with, for a batch."""
    seen, _ = capture(model, lambda: task.forward(model, batch), [""], first="")
    return seen[""]


def data_digest(batches: Iterable[Any]) -> str:
    """Hash of the inputs that a result depends on."""
    parts = []
    for batch in batches:
        tensors = batch.values() if isinstance(batch, Mapping) else batch
        parts += [tensor_digest(t.dtype, tuple(t.shape), iter([bytes_of(t.contiguous())])) for t in tensors]
    return digest("data", parts)


def histograms(model: nn.Module, task: Any, units: Iterable[Unit], batches: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Histograms of the weights of units, and of their inputs on the given batches."""
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for unit in units:
            entry = found[unit.name] = {"histogram": histogram(model.get_parameter(unit.name)), "activation": None}
            if unit.op in ("linear", "conv") and batches:
                module = model.get_submodule(unit.name.rpartition(".")[0])
                handle = module.register_forward_pre_hook(
                    lambda m, args, e=entry: e.__setitem__("activation", histogram(args[0])) if args else None
                )
                stack.callback(handle.remove)
        for batch in batches:
            run_batch(task, model, batch)
    return found


def histogram(x: Tensor, bins: int = 48) -> dict[str, Any]:
    """Counts over the range of a tensor, and how far its largest magnitude stands out of the mean square."""
    flat = x.detach().float().reshape(-1)
    if flat.numel() > 1 << 18:
        flat = flat[:: flat.numel() >> 18]
    flat = flat[torch.isfinite(flat)]  # what overflowed is in no bin
    if flat.numel() == 0:
        flat = torch.zeros(1)
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        high = low + 1.0
    counts = torch.histc(flat, bins, low, high)
    rms = float(flat.square().mean().sqrt())
    absmax = float(flat.abs().max())
    return {
        "edges": [low + (high - low) * i / bins for i in range(bins + 1)],
        "counts": [int(c) for c in counts],
        "absmax": absmax,
        "outlier_ratio": absmax / rms if rms else 0.0,
    }


@contextmanager
def rounded_inputs(model: nn.Module, units: Iterable[Unit]) -> Iterator[None]:
    """Let a float model round what its layers read, where their packed forms will."""
    with ExitStack() as stack:
        for unit in units:
            for name in unit.names if unit.inputs else ():
                module = model.get_submodule(name.rpartition(".")[0])
                hook = lambda m, args, inputs=unit.inputs: (round_inputs(args[0], inputs), *args[1:])  # noqa: E731
                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def input_scales(model: nn.Module, task: Any, paths: Iterable[str], batches: Sequence[Any]) -> dict[str, float]:
    """The static scale of the inputs of modules, of those that run (see `InputRange`).

    Raises:
        BadInput: inputs that are not finite, with the module's path.
    """
    found: dict[str, InputRange] = {}

    def note(path: str, x: Tensor) -> None:
        try:
            found.setdefault(path, InputRange()).add(x)
        except ValueError as error:
            raise BadInput(f"{path}: {error}") from error

    with ExitStack() as stack, torch.no_grad():
        for path in paths:
            hook = lambda m, args, path=path: note(path, args[0])  # noqa: E731
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
        for batch in batches:
            run_batch(task, model, batch)
    return {path: seen.scale() for path, seen in found.items()}


def output_absmax(model: nn.Module, task: Any, paths: Iterable[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Largest magnitude of every channel (last axis) of the outputs of modules, where they run."""
    found: dict[str, Tensor] = {}

    def note(path: str, output: Tensor) -> None:
        most = output.detach().abs().reshape(-1, output.shape[-1]).amax(0).float()
        found[path] = torch.maximum(found[path], most) if path in found else most

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: note(path, out))
            stack.callback(handle.remove)
        for batch in batches:
            run_batch(task, model, batch)
    return found


def innermost_module(model: nn.Module, error: BaseException) -> str:
    """Where in the model a forward failed, from the traceback's frames: " in PATH", or ""."""
    paths = {id(m): name for name, m in model.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in paths:
            found = paths[id(module)]
        trace = trace.tb_next
    return f" in {found}" if found else ""
