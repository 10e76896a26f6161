"""What is known of a model without running it: its parameters and their readers, ties, norms, blocks.

Everything that rewrites models asks `Structure` and matches no classes by itself:

    structure = Structure.build(model, example)              # example = (args, kwargs) of one forward call
    structure.parameters["lm_head.weight"].uses              # (Use("lm_head", "linear", False, "weight"),)
    structure.readers("model.layers.0.input_layernorm")      # (".. q_proj", ".. k_proj", ".. v_proj")

It is read in three steps. A *shadow* of the model is made (`_tracing.py`): a copy whose tensors are fake (shapes without
data, all on one pretended CPU), so that a billion parameters on `meta` cost seconds and the model itself is never
touched. The shadow is *traced* into a list of `Step`s (`_trace.py`), by `torch.export` (`_export.py`) or, where that
fails, by watching one forward call (`_watch.py`). Small functions then *read* the steps (`_uses.py`, `norms_of.py`,
`_batchnorms.py`, `chains_of.py`); they do not know which of the two wrote them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from laconic.errors import BadInput

from ._affines import Around, affines_of
from ._batchnorms import batchnorm_pairs
from ._chains import chains_of
from ._export import by_export
from ._norms import Readers, norms_of
from ._residuals import Mixer, Residual, mixers_of, residuals_of
from ._streams import Stream, Writer, streams_of
from ._trace import Names, Step, Trace, module_of
from ._tracing import Example, shadow_of, tensors_in
from ._uses import Use, reads_of
from ._watch import by_hooks, by_hooks_for_real
from .affine import channel_axis

__all__ = [
    "Around", "BufferInfo", "Example", "Mixer", "ParameterInfo", "Readers", "Residual", "Step", "Stream", "Structure",
    "Trace", "Use", "Writer",
]  # fmt: skip


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter, under its canonical name, and all places where it is read.

    Attributes:
        name: the canonical name, the first one in `named_parameters`.
        shape: its shape.
        dtype: its dtype.
        names: all names of the same storage, the canonical one first. More than one means tied.
        uses: the distinct places that read it, under any of its names, in the order of the forward pass.
        calls: how many reads one forward pass makes in all; 0 means that nothing reads it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...]
    uses: tuple[Use, ...]
    calls: int


@dataclass(frozen=True)
class BufferInfo:
    """A buffer: its name, shape, dtype, and whether it is saved with the model (`persistent`)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool


@dataclass(frozen=True)
class Structure:
    """What is known of a model; made by `Structure.build`.

    Attributes:
        parameters: every parameter by canonical name (a tied parameter stands here once, `name_of` finds it).
        buffers: every buffer by name.
        ties: the groups of names that share one storage.
        calls: how often one forward pass calls each module; 0 for containers and for what is never reached.
        ops: names of the operations that a module's own forward ran in its first call, without those of its
            submodules: ("linear",) for a plain linear layer, ("embedding", "mul") for a scaled embedding.
        norms: for every module that normalizes and then scales by a weight, who reads its output.
        batchnorm_pairs: (conv or linear, batch norm) paths where the batch norm is the only reader of the
            other's output, scales its output channels, and both run once, so that the one can be folded into the
            other.
        around: for every module that may be affine per channel (`laconic.core.affine`), what lies around it; where one
            is inside another, for the outer one.
        chains: for every outermost `ModuleList` (or `Sequential` of one class) whose members feed one
            another, the members in call order.
        blocks: the chain that holds the most parameters; () if there is none.
        how: "export" or "hooks".
        why: why hooks were used, "" otherwise.
        notes: what could not be found out, in sentences.
        streams: the residual streams that layer norms read.
        residuals: the residual streams that norms of any kind read.
        mixers: pairs of linear layers, values and output, between which heads are averaged over tokens.
    """

    parameters: dict[str, ParameterInfo]
    buffers: dict[str, BufferInfo]
    ties: list[tuple[str, ...]]
    calls: dict[str, int]
    ops: dict[str, tuple[str, ...]]
    norms: dict[str, Readers]
    batchnorm_pairs: list[tuple[str, str]]
    around: dict[str, Around]
    chains: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    how: str
    why: str
    notes: list[str] = field(default_factory=list)
    streams: tuple[Stream, ...] = ()
    residuals: tuple[Residual, ...] = ()
    mixers: tuple[Mixer, ...] = ()

    @classmethod
    def build(cls, model: nn.Module, example: Example, *, how: str | None = None) -> Structure:
        """Read the structure of `model` in eval mode, as one forward pass on `example` shows it.

        The model may be on `meta`, and is not changed. No arithmetic is done, unless the forward depends on
        the values of tensors in a way that neither export nor fake tensors can follow: then it runs once
        for real.

        Args:
            model: the model.
            example: `(args, kwargs)` of one forward call; only shapes and dtypes of tensors matter.
            how: "export" or "hooks" to insist on one way; by default export, and hooks where it fails.

        Raises:
            BadInput: the forward fails on the example, or a lazy layer has no shape yet.
        """
        if how not in (None, "export", "hooks"):
            raise ValueError(f"how must be 'export', 'hooks' or None, not {how!r}")
        for name, parameter in model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise BadInput(f"{name} is lazy and has no shape yet: call the model once before compressing it")
        names = Names.of(model)
        return _read(_trace(model, example, names, how), model, names)

    def name_of(self, name: str) -> str:
        """The canonical name of the parameter called `name`.

        Raises:
            KeyError: no parameter has this name.
        """
        if name in self.parameters:
            return name
        for group in self.ties:
            if name in group:
                return group[0]
        raise KeyError(f"no parameter is called {name!r}")

    def readers(self, norm: str) -> tuple[str, ...]:
        """Modules that read the norm's output, or () unless a per-channel scale can move into all of them.

        Args:
            norm: path of the norm, one of `norms`; `reason` says why the answer is empty.
        """
        found = self.norms.get(norm)
        return tuple(dict.fromkeys(found.modules)) if found is not None and found.complete else ()

    def reason(self, norm: str) -> str:
        """Why `readers(norm)` is empty, or "" if it is not."""
        if norm not in self.norms:
            return f"{norm} is not a norm with a weight of its own"
        return self.norms[norm].reason

    def unused(self) -> list[str]:
        """Canonical names of the parameters that the forward pass never reads."""
        return [name for name, info in self.parameters.items() if not info.calls]

    def describe(self) -> str:
        """A short text for people: counts, ties, foldable norms, blocks, and what is unusual."""
        elements = sum(torch.Size(info.shape).numel() for info in self.parameters.values())
        uses = Counter(use.op for info in self.parameters.values() for use in info.uses if use.role != "bias")
        folds = sum(readers.complete for readers in self.norms.values())
        lines = [
            f"{len(self.parameters)} parameters, {elements:,} elements, read by {self.how}"
            + (f" ({self.why})" if self.why else ""),
            "uses: " + ", ".join(f"{count} {op}" for op, count in uses.most_common()),
            f"norms: {len(self.norms)}, of which {folds} can be folded into their readers",
            f"batch norms that fold: {len(self.batchnorm_pairs)}",
            f"blocks: {len(self.blocks)}" + (f", from {self.blocks[0]}" if self.blocks else ""),
        ]
        lines += [f"tied: {' = '.join(group)}" for group in self.ties]
        lines += [f"called {count} times: {path}" for path, count in self.calls.items() if count > 1]
        lines += [f"never read: {name}" for name in self.unused()]
        return "\n".join(lines + self.notes)


# --- tracing ----------------------------------------------------------------------------------------


def _trace(model: nn.Module, example: Example, names: Names, how: str | None) -> Trace:
    """Trace by export, else by hooks on fake tensors, else by hooks on the model itself."""
    why: list[str] = []
    ways = {"export": by_export, "hooks": by_hooks}
    for way in (how,) if how else ways:
        try:
            return replace(ways[way](*shadow_of(model, example), names), why="; ".join(why))
        except Exception as error:  # whatever a forward or the exporter may raise: the next way is tried
            why.append(f"{way}: {_one_line(error)}")
    tensors = [*model.parameters(), *model.buffers(), *tensors_in(example)]
    if how == "export" or any(tensor.is_meta for tensor in tensors):
        raise BadInput(f"{type(model).__name__} can't be traced on the example inputs: {'; '.join(why)}")
    try:
        return replace(by_hooks_for_real(model, example, names), why="; ".join(why) + ", so it was run once")
    except Exception as error:
        message = f"{type(model).__name__}: its forward fails on the example inputs: {_one_line(error)}"
        raise BadInput(message) from error


def _one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# --- reading ----------------------------------------------------------------------------------------


def _read(trace: Trace, model: nn.Module, names: Names) -> Structure:
    """Read everything that `Structure` holds from a trace."""
    reads = reads_of(trace)
    parameters = _parameters(reads, model, names)
    calls = Counter(trace.order)
    chains = chains_of(trace, model)
    sizes = {chain: _size(model, chain) for chain in chains}
    norms = norms_of(trace, reads, names)
    return Structure(
        parameters=parameters,
        buffers=_buffers(model),
        ties=[group for group in names.groups().values() if len(group) > 1],
        calls={path: calls[first] for path, first in names.modules.items()},
        ops=_ops(trace),
        norms=norms,
        batchnorm_pairs=batchnorm_pairs(trace, reads, names),
        around=affines_of(trace, reads, names, _channel_axes(model, names)),
        chains=chains,
        blocks=max(chains, key=lambda chain: (sizes[chain], len(chain)), default=()),
        how=trace.how,
        why=trace.why,
        notes=_notes(trace, parameters, calls, names),
        streams=streams_of(trace),
        residuals=residuals_of(trace, norms, reads),
        mixers=mixers_of(trace),
    )


def _parameters(reads: list[tuple[str, Use]], model: nn.Module, names: Names) -> dict[str, ParameterInfo]:
    """Every parameter with its names and uses."""
    uses: dict[str, list[Use]] = defaultdict(list)
    for name, use in reads:
        uses[name].append(use)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: ParameterInfo(
            name=name,
            shape=tuple(tensors[name].shape),
            dtype=tensors[name].dtype,
            names=group,
            uses=tuple(dict.fromkeys(uses[name])),
            calls=len(uses[name]),
        )
        for name, group in names.groups().items()
    }


def _buffers(model: nn.Module) -> dict[str, BufferInfo]:
    """Every buffer by name."""
    hidden = {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        for key in module._non_persistent_buffers_set
    }
    return {
        name: BufferInfo(name, tuple(buffer.shape), buffer.dtype, name not in hidden)
        for name, buffer in model.named_buffers()
    }


def _ops(trace: Trace) -> dict[str, tuple[str, ...]]:
    """Names of the operations in each module's first call, its submodules left out."""
    first: dict[str, str] = {}
    found: dict[str, list[str]] = defaultdict(list)
    for step in trace.steps:
        if first.setdefault(step.module, step.call) == step.call:
            found[step.module].append(step.op)
    return {path: tuple(ops) for path, ops in found.items()}


def _channel_axes(model: nn.Module, names: Names) -> dict[str, int]:
    """Path of a module that may be affine -> the axis of its channels."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        axis = channel_axis(module)
        if axis is not None and path and not any(path.startswith(f"{outer}.") for outer in found):
            found[names.modules[path]] = axis
    return found


def _size(model: nn.Module, paths: tuple[str, ...]) -> int:
    """Elements of the parameters in some modules."""
    return sum(parameter.numel() for path in paths for parameter in model.get_submodule(path).parameters())


def _notes(trace: Trace, parameters: dict[str, ParameterInfo], calls: Counter[str], names: Names) -> list[str]:
    """What remains unclear."""
    notes = [
        f"{name}: {module_of(name) or 'the model'} runs, but no read of this parameter was seen"
        for name, info in parameters.items()
        if not info.calls and calls[names.modules[module_of(name)]]
    ]
    if trace.how == "hooks":
        notes.append("read by hooks: what is computed without torch functions was not seen")
    return notes
