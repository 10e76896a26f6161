"""What is known of a model without running it: its parameters and their readers, ties, norms, blocks.

Everything that rewrites models asks `Structure` and matches no classes by itself:

    structure = Structure.build(model, example)              # example = (args, kwargs) of one forward call
    structure.parameters["lm_head.weight"].uses              # (Use("lm_head", "linear", False, "weight"),)
    structure.readers("model.layers.0.input_layernorm")      # (".. q_proj", ".. k_proj", ".. v_proj")

It is read in three steps. A *shadow* of the model is made: a copy whose tensors are fake (shapes without
data, all on one pretended CPU), so that a billion parameters on `meta` cost seconds and the model itself is
never touched. The shadow is *traced* into a list of `Step`s, by `torch.export` or, where that fails, by
watching one forward call. Small functions then *read* the steps; they do not know which of the two wrote
them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from laconic.errors import BadInput

__all__ = ["BufferInfo", "ParameterInfo", "Readers", "Structure", "Use"]

Example = tuple[tuple, dict]


# --- what is known ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One place where a parameter is read.

    Attributes:
        module: path of the innermost module whose forward reads it. This is often, but not always, the
            module that owns it: `nn.MultiheadAttention` reads `out_proj.weight` by itself, Mamba's mixer
            reads `conv1d.weight`.
        op: "linear", "embedding", "conv", "conv_transpose", "norm", "matmul", "experts", "rnn", "attention"
            or "other:NAME". "linear" is every product of an activation with a 2-D parameter on its right,
            `x @ W` and `x @ W.T`; "experts" is the same with one slice of a 3-D parameter per group of
            rows; "matmul" is any other product. Casts, views, transposes, chunks and slices on the way are
            looked through, so before replacing a whole module look at `Structure.ops`, too.
        transposed: the parameter is stored (in, out), as in GPT-2's `Conv1D`; for experts (E, in, out).
        role: "weight", "bias" or "other".
    """

    module: str
    op: str
    transposed: bool
    role: str


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
class Readers:
    """Who reads the output of a norm.

    Attributes:
        modules: paths of the modules that multiply the output by a weight of theirs: a linear layer, a
            router, or fused experts (whose weight is 3-D and not called `weight`: see `weights`).
        weights: canonical names of those weights, in the same order.
        offset: what the norm adds to its stored weight before it multiplies (1.0 in Gemma, 0.0 nearly
            everywhere).
        reason: why a per-channel scale can't move from the norm into `weights`; "" if it can, which means
            that `modules` is everything that sees the output and that nothing else reads these weights.
    """

    modules: tuple[str, ...]
    weights: tuple[str, ...]
    offset: float
    reason: str

    @property
    def complete(self) -> bool:
        """Whether a scale can move from the norm into its readers."""
        return not self.reason


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
            other's output and both run once, so that the one can be folded into the other.
        chains: for every outermost `ModuleList` (or `Sequential` of one class) whose members feed one
            another, the members in call order.
        blocks: the chain that holds the most parameters; () if there is none.
        how: "export" or "hooks".
        why: why hooks were used, "" otherwise.
        notes: what could not be found out, in sentences.
    """

    parameters: dict[str, ParameterInfo]
    buffers: dict[str, BufferInfo]
    ties: list[tuple[str, ...]]
    calls: dict[str, int]
    ops: dict[str, tuple[str, ...]]
    norms: dict[str, Readers]
    batchnorm_pairs: list[tuple[str, str]]
    chains: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    how: str
    why: str
    notes: list[str] = field(default_factory=list)

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
                raise BadInput(
                    f"{name} is lazy and has no shape yet: call the model once before compressing it"
                )
        names = _Names.of(model)
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


# --- names and ties ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """All names of a model's parameters and modules, and for each the canonical one."""

    parameters: dict[str, str]  # any name -> canonical name of the same storage
    modules: dict[str, str]  # any path -> first path of the same module

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        first: dict[object, str] = {}
        parameters = {
            name: first.setdefault(_storage_key(parameter), name)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        modules = {
            path: first.setdefault(module, path)
            for path, module in model.named_modules(remove_duplicate=False)
        }
        return cls(parameters, modules)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Canonical parameter name -> all names, the canonical one first."""
        groups: dict[str, tuple[str, ...]] = {}
        for name, canonical in self.parameters.items():
            groups[canonical] = (*groups.get(canonical, ()), name)
        return groups


def _storage_key(tensor: Tensor) -> object:
    """What two parameters share when they are the same numbers; on meta too, which has no pointers."""
    if type(tensor.data) is not Tensor:
        return id(tensor)  # a subclass may have no storage of its own
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _owner(name: str) -> str:
    """Path of the module that holds the parameter or buffer `name`."""
    return name.rpartition(".")[0]


# --- the trace: what either tracer writes, and all that the readers see -----------------------------


@dataclass(frozen=True)
class Step:
    """One operation of the forward pass.

    Attributes:
        op: its name without namespace, overload and in-place mark: "linear", "add".
        module: path of the innermost module that was running.
        call: the same for every step of one call of the module, and different for its next call.
        inputs: (argument name, value) of every tensor that it reads.
        outputs: the values that it makes.
        options: its other arguments.
    """

    op: str
    module: str
    call: str
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]

    @property
    def source(self) -> int:
        """The first tensor that it reads."""
        return self.inputs[0][1]


@dataclass
class Trace:
    """The steps of one forward pass over numbered values (tensors), in order."""

    how: str
    why: str = ""
    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # by value
    parameters: dict[int, str] = field(default_factory=dict)  # value -> canonical name
    buffers: dict[int, str] = field(default_factory=dict)
    results: set[int] = field(default_factory=set)  # values that the model returns, or that leave our sight
    order: list[str] = field(default_factory=list)  # module paths as they are called

    def new(self, shape: tuple[int, ...]) -> int:
        """A new value."""
        self.shapes.append(shape)
        return len(self.shapes) - 1

    @functools.cached_property
    def consumers(self) -> dict[int, list[tuple[Step, str]]]:
        """Value -> the steps that read it, with the argument's name."""
        found: dict[int, list[tuple[Step, str]]] = defaultdict(list)
        for step in self.steps:
            for argument, value in step.inputs:
                found[value].append((step, argument))
        return found

    @functools.cached_property
    def held(self) -> dict[int, _Held]:
        """Value -> the parameter that it is an alias of."""
        return _held_parameters(self)

    @functools.cached_property
    def producers(self) -> dict[int, Step]:
        """Value -> the step that makes it."""
        return {value: step for step in self.steps for value in step.outputs}


def _trace(model: nn.Module, example: Example, names: _Names, how: str | None) -> Trace:
    """Trace by export, else by hooks on fake tensors, else by hooks on the model itself."""
    why: list[str] = []
    ways = {"export": _by_export, "hooks": _by_hooks}
    for way in (how,) if how else ways:
        try:
            return replace(ways[way](*_shadow(model, example), names), why="; ".join(why))
        except Exception as error:  # whatever a forward or the exporter may raise: the next way is tried
            why.append(f"{way}: {_one_line(error)}")
    tensors = [*model.parameters(), *model.buffers(), *_tensors(example)]
    if how == "export" or any(tensor.is_meta for tensor in tensors):
        raise BadInput(f"{type(model).__name__} can't be traced on the example inputs: {'; '.join(why)}")
    try:
        return replace(_by_hooks_for_real(model, example, names), why="; ".join(why) + ", so it was run once")
    except Exception as error:
        message = f"{type(model).__name__}: its forward fails on the example inputs: {_one_line(error)}"
        raise BadInput(message) from error


def _one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# --- the shadow: the model without its data ---------------------------------------------------------


def _shadow(model: nn.Module, example: Example) -> tuple[nn.Module, Example, FakeTensorMode]:
    """A copy of the model in eval mode, and of its example, on fake tensors that pretend to be on the CPU.

    Fake tensors and not meta ones: a skeleton may mix meta parameters with real buffers, and a forward may
    make constants on the CPU and ask for their values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Any] = {}
    for tensor in _all_tensors(model):
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _fake(tensor, mode)
    shadow = copy.deepcopy(model, fakes).eval()
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: _fake(tensor, mode), example)
    return shadow, (args, kwargs), mode


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same shape, strides and dtype without data, a parameter where the other one is."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the tensors that modules keep as plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, (Tensor, list, tuple)):
                yield from _tensors(value)


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))


def _returned(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in what a model returns, in the attributes of objects of any kind too, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, type, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (tuple, list)):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for item in inner:
        yield from _returned(item, seen)


# --- the first tracer: torch.export -----------------------------------------------------------------


def _by_export(shadow: nn.Module, example: Example, mode: FakeTensorMode, names: _Names) -> Trace:
    """Trace by `torch.export`, whose graph keeps the path of the module that ran each operation."""
    trace = Trace("export")
    with (
        _calls_recorded(shadow, names, trace.order),
        _quiet(),
        redirect_stderr(io.StringIO()),  # a failing export prints the graph that it has so far
        torch.no_grad(),
    ):
        # The last hook: export refuses to return what it does not know, such as a cache of keys and values.
        shadow.register_forward_hook(lambda *call: list(_returned(call[-1])))
        program = torch.export.export(shadow, *example, strict=False)
    signature = program.graph_signature
    values: dict[fx.Node, Any] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        values[node] = trace.new(_shape(node))
        if node.name in signature.inputs_to_parameters:
            trace.parameters[values[node]] = names.parameters[signature.inputs_to_parameters[node.name]]
        elif node.name in signature.inputs_to_buffers:
            trace.buffers[values[node]] = signature.inputs_to_buffers[node.name]
    trace.results.update(_flat(_add_graph(trace, program.graph_module, values, names)))
    return trace


def _add_graph(trace: Trace, graph: fx.GraphModule, values: dict[fx.Node, Any], names: _Names) -> Any:
    """Append the steps of a graph, given the values of its placeholders; returns the output's values."""
    for node in graph.graph.nodes:
        if node.op == "output":
            return map_arg(node.args[0], values.get)
        if node.op == "get_attr" and not isinstance(_attribute(graph, node.target), fx.GraphModule):
            values[node] = trace.new(_shape(node))
        elif node.op == "call_function" and not node.name.startswith("_assert"):
            values[node] = _add_node(trace, graph, node, values, names)
    return ()


def _add_node(
    trace: Trace, graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], names: _Names
) -> Any:
    """Append one node as a step, or the steps of the graph that it wraps; returns its value or values."""
    bodies = [
        _attribute(graph, argument.target)
        for argument in node.all_input_nodes
        if argument.op == "get_attr" and argument not in values
    ]
    if bodies:  # an autocast or no_grad region, or control flow: its body is a graph of its own
        return _add_bodies(trace, bodies, [values[n] for n in node.all_input_nodes if n in values], names)
    if _op_name(node.target) == "getitem":
        whole: Any = values[node.all_input_nodes[0]]
        if isinstance(whole, (tuple, list)):
            index: Any = node.args[1]
            return whole[index]
    inputs, options = _node_arguments(node, values)
    if _returns_its_input(node):
        return inputs[0][1]
    module, call = _node_module(node, names)
    value = trace.new(_shape(node))
    trace.steps.append(Step(_op_name(node.target), module, call, inputs, (value,), options))
    return value


def _returns_its_input(node: fx.Node) -> bool:
    """Whether a node is a cast to the dtype that its tensor has already.

    Such a cast returns the tensor itself, so export lets later readers of that tensor, in whatever module
    they are, read the cast: the step must vanish, or a norm would seem to hand its input to the residual sum.
    """
    if _op_name(node.target) not in _CASTS - {"clone"}:
        return False
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.shape == after.shape


def _add_bodies(trace: Trace, bodies: list[fx.GraphModule], operands: list[Any], names: _Names) -> Any:
    """Append the steps of the graphs that a node wraps; the first one's results stand for the node."""
    results = []
    for body in bodies:
        inner = body.graph.find_nodes(op="placeholder")
        given = operands[len(operands) - len(inner) :]
        results.append(_add_graph(trace, body, dict(zip(inner, given, strict=True)), names))
    for result in results[1:]:  # of another branch: where these values go is not followed
        trace.results.update(_flat(result))
    return results[0]


def _node_arguments(
    node: fx.Node, values: dict[fx.Node, Any]
) -> tuple[tuple[tuple[str, int], ...], dict[str, Any]]:
    """A node's tensors and its other arguments, by the names in the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    keys = [argument.name for argument in schema.arguments] if schema else ["self", "index"]
    named = {**dict(zip(keys, node.args, strict=False)), **node.kwargs}
    inputs: list[tuple[str, int]] = []
    options = {}
    for key, argument in named.items():
        found: list[fx.Node] = []
        map_arg(argument, found.append)
        inputs += [(key, value) for n in found for value in _flat(values.get(n, ()))]
        if not found:
            options[key] = argument
        elif isinstance(argument, (tuple, list)):
            options[f"len({key})"] = len(argument)
    return tuple(inputs), options


def _node_module(node: fx.Node, names: _Names) -> tuple[str, str]:
    """Path and call of the innermost module that ran a node, the last in the stack that export records."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    call, (path, _) = list(stack.items())[-1]
    return names.modules.get(path, path), call


def _attribute(graph: nn.Module, target: Any) -> Any:
    """The attribute at a dotted path."""
    return functools.reduce(getattr, target.split("."), graph)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor, with -1 where it depends on data; () for anything else."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return tuple(size if isinstance(size, int) else -1 for size in shape)


def _flat(values: Any) -> list[int]:
    """All values in a nest of them."""
    if isinstance(values, (tuple, list)):
        return [value for item in values for value in _flat(item)]
    if isinstance(values, Mapping):
        return [value for item in values.values() for value in _flat(item)]
    return [] if values is None or isinstance(values, bool) or not isinstance(values, int) else [values]


# --- the second tracer: one watched forward call ----------------------------------------------------


def _by_hooks(shadow: nn.Module, example: Example, mode: FakeTensorMode, names: _Names) -> Trace:
    """Trace by watching the shadow's forward: module hooks say who runs, a function mode says what."""
    return _watch(shadow, example, names, mode)


def _by_hooks_for_real(model: nn.Module, example: Example, names: _Names) -> Trace:
    """Trace by watching the model itself, and put back whatever a forward pass may have changed."""
    training = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            return _watch(model.eval(), example, names, nullcontext())
    finally:
        for module, mode in training.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])


def _watch(model: nn.Module, example: Example, names: _Names, context: Any) -> Trace:
    """Run the model's forward once and write down every torch function that it calls."""
    trace = Trace("hooks")
    watcher = _Watcher(trace)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trace.parameters[watcher.value(parameter)] = names.parameters[name]
    for name, buffer in model.named_buffers():
        trace.buffers[watcher.value(buffer)] = name
    args, kwargs = example
    with _calls_recorded(model, names, trace.order, watcher.stack), _quiet(), torch.no_grad(), context:
        with watcher:
            output = model(*args, **kwargs)
        trace.results.update(watcher.value(tensor) for tensor in _returned(output))
    return trace


class _Watcher(TorchFunctionMode):
    """Appends a step for every torch function.

    Tensors are told apart by identity; what is written in place gets a new value.

    What an outermost torch function calls inside is not seen, which matters for one of them alone: see
    `_EXPANDED`. Code that computes without torch functions is not seen either.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.stack: list[tuple[str, str]] = []
        self.values = WeakTensorKeyDictionary()

    def value(self, tensor: Tensor) -> int:
        """The number of a tensor, a new one if it was not met before."""
        if tensor not in self.values:
            self.values[tensor] = self.trace.new(tuple(tensor.shape))
        return self.values[tensor]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the function and write it down."""
        named = _named_arguments(func, args, kwargs or {})
        inputs = tuple((key, self.value(t)) for key, item in named.items() for t in _tensors(item))
        output = func(*args, **(kwargs or {}))
        written = list(_tensors(args[0] if _op_name(func) == "setitem" else output))
        same = _op_name(func) in _CASTS and not _is_in_place(func) and output is next(iter(named.values()))
        if not inputs or not written or same:
            return output  # reads no tensor, makes none, or is a cast to the dtype that it has
        for tensor in written:
            self.values[tensor] = self.trace.new(tuple(tensor.shape))
        module, call = self.stack[-1] if self.stack else ("", "")
        made = tuple(self.values[tensor] for tensor in written)
        self.trace.steps.append(Step(_traced_op(func, inputs), module, call, inputs, made, _options(named)))
        return output


_INPUT_FIRST = ("input", "weight", "bias")
_POSITIONAL = {  # argument names of builtin functions, which have no signature; else self, arg1, arg2, ...
    **dict.fromkeys(
        ["linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))], _INPUT_FIRST
    ),
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot", "grouped_mm"], ("self", "other")),
    **dict.fromkeys(["addmm", "baddbmm"], ("self", "mat1", "mat2")),
    "grouped_mm_fallback": ("input", "weight"),
    "embedding": ("weight", "indices"),
    "transpose": ("self", "dim0", "dim1"),
    "permute": ("self", "dims"),
    "select": ("self", "dim", "index"),
    "getitem": ("self", "indices"),
    "add": ("self", "other"),
    "mul": ("self", "other"),
}


def _is_in_place(func: Any) -> bool:
    """Whether a torch function writes into its first argument: `add_`, `__iadd__`, `x[i] = y`."""
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__") or name in ("__setitem__", *_IN_PLACE)


_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ipow__")


def _traced_op(func: Any, inputs: tuple[tuple[str, int], ...]) -> str:
    """The name that export would give a function: `x[...]` with tensors in the brackets is an "index"."""
    name = _op_name(func)
    return "index" if name == "getitem" and len(inputs) > 1 else name


def _options(named: dict[str, Any]) -> dict[str, Any]:
    """The arguments that hold no tensor, and of those that do, how many items they have."""
    options: dict[str, Any] = {}
    for key, item in named.items():
        if not any(True for _ in _tensors(item)):
            options[key] = item
        elif isinstance(item, (tuple, list)):
            options[f"len({key})"] = len(item)
    return options


def _named_arguments(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a torch function by name, as its Python signature or `_POSITIONAL` has them."""
    name = _op_name(func)
    keys = _signature(func) or _POSITIONAL.get(name, ("self",))
    if getattr(func, "__name__", "") == "__rmatmul__":  # other @ self
        args = args[::-1]
    if name == "permute" and len(args) > 2:  # x.permute(0, 2, 1)
        args = (args[0], args[1:])
    keys = (*keys, *(f"arg{index}" for index in range(len(keys), len(args))))
    return {**dict(zip(keys, args, strict=False)), **kwargs}


@functools.cache
def _signature(func: Any) -> tuple[str, ...]:
    """Argument names of a function of `torch.nn.functional` that is written in Python, else ()."""
    if not inspect.isfunction(func) or not func.__module__.startswith("torch.nn.functional"):
        return ()
    return tuple(inspect.signature(func).parameters)


# --- for both tracers -------------------------------------------------------------------------------


def _op_name(target: Any) -> str:
    """The plain name of an operator, a function, a method or a property: `aten.add_.Tensor` is "add"."""
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
    if name == "__get__":
        name = getattr(target.__self__, "__name__", name)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in ("radd", "rmul", "rmatmul", "rtruediv", "iadd", "isub", "imul", "itruediv"):
            name = name[1:]
    name = name.removesuffix("_")
    return _SAME_OP.get(name, name)


_SAME_OP = {
    "truediv": "div",
    "multiply": "mul",
    "_grouped_mm": "grouped_mm",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_to_copy": "to",
}


@contextmanager
def _calls_recorded(
    model: nn.Module, names: _Names, order: list[str], stack: list[tuple[str, str]] | None = None
) -> Iterator[None]:
    """Append the path of every module that is called to `order`, and keep those that run on `stack`."""
    stack = [] if stack is None else stack
    counts: Counter[str] = Counter()

    def enter(path: str) -> None:
        counts[path] += 1
        order.append(path)
        stack.append((path, f"{path}@{counts[path]}"))

    with ExitStack() as handles:
        for path, module in model.named_modules():
            path = names.modules.get(path, path)
            before = module.register_forward_pre_hook(lambda *_, path=path: enter(path), prepend=True)
            after = module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True)
            handles.callback(before.remove)
            handles.callback(after.remove)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's own warnings, which are about its inner workings, from the user."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch._subclasses.fake_tensor", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- reading: parameters and their uses -------------------------------------------------------------

_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}
_CASTS |= {"data", "alias", "lift_fresh", "lift_fresh_copy", "identity"}
_TURNS = {"transpose", "t", "T", "mT", "permute", "movedim", "moveaxis", "numpy_T"}
_VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as"}
_VIEWS |= {"broadcast_to", "reshape_as", "_unsafe_view", "ravel"}
_PARTS = {"chunk", "split", "split_with_sizes", "tensor_split", "narrow"}
_PARTS |= {"unbind", "getitem", "select", "slice"}
_ALIASES = _CASTS | _TURNS | _VIEWS | _PARTS
_GATHERS = {"index", "index_select"}  # W[ids]: an alias of a stack of experts, a read of a table
_EXPERT_PICKS = {"select", "getitem", "unbind", *_GATHERS}

_CONVS = {f"conv{n}d" for n in (1, 2, 3)} | {"convolution", "_convolution"}
_OPS = {
    **dict.fromkeys(_CONVS, "conv"),
    **dict.fromkeys([f"conv_transpose{n}d" for n in (1, 2, 3)], "conv_transpose"),
    **dict.fromkeys(["embedding", "embedding_bag"], "embedding"),
    **dict.fromkeys(["layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm"], "norm"),
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm", "native_group_norm"], "norm"),
    **dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], "rnn"),
    **dict.fromkeys(["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"], "rnn"),
    **dict.fromkeys(["scaled_dot_product_attention", "multi_head_attention_forward"], "attention"),
}
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "grouped_mm", "grouped_mm_fallback"}
_RIGHT = {"weight", "other", "mat2", "batch2"}
_EXPANDED = {  # arguments of multi_head_attention_forward that it passes to linear
    **dict.fromkeys(["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"], "weight"),
    **{"out_proj_weight": "weight", "in_proj_bias": "bias", "out_proj_bias": "bias"},
}


@dataclass(frozen=True)
class _Held:
    """The parameter that a value is, seen through casts, views and slices."""

    name: str
    ndim: int  # of the parameter itself
    turned: bool = False  # its last two axes are swapped
    reshaped: bool = False  # its axes are others
    part: bool = False  # a chunk or a slice of it; one expert's matrix counts as whole

    def after(self, step: Step, before: tuple[int, ...], after: tuple[int, ...]) -> _Held:
        """What it is after an alias step that leads from one shape to another."""
        if step.op in _VIEWS and [n for n in before if n != 1] != [n for n in after if n != 1]:
            return replace(self, reshaped=True)
        if step.op in _TURNS:
            swapped = _swaps_last_two(step, len(before))
            return replace(self, turned=self.turned != swapped, reshaped=self.reshaped or not swapped)
        if step.op in _PARTS | _GATHERS and not (self.ndim == 3 and step.op in _EXPERT_PICKS):
            return replace(self, part=True)
        return self


def _held_parameters(trace: Trace) -> dict[int, _Held]:
    """Value -> the parameter that it is an alias of."""
    shapes = trace.shapes
    held = {value: _Held(name, len(shapes[value])) for value, name in trace.parameters.items()}
    for step in trace.steps:
        if step.inputs and step.source in held and _is_alias(step, held[step.source]):
            parameter = held[step.source]
            for value in step.outputs:
                held[value] = parameter.after(step, shapes[step.source], shapes[value])
    return held


def _is_alias(step: Step, parameter: _Held) -> bool:
    """Whether a step only passes on a parameter that it reads first."""
    if step.op in _GATHERS:
        return parameter.ndim >= 3
    return step.op in _ALIASES


def _swaps_last_two(step: Step, ndim: int) -> bool:
    """Whether a step swaps the last two of `ndim` axes."""
    if step.op in ("t", "T", "mT", "numpy_T"):
        return ndim >= 2
    if step.op == "transpose":
        pair = {step.options.get("dim0"), step.options.get("dim1")}
        return ndim >= 2 and {axis % ndim for axis in pair if isinstance(axis, int)} == {ndim - 2, ndim - 1}
    if step.op == "permute":
        axes = [axis % ndim for axis in step.options.get("dims", ())]
        return axes[-2:] == [ndim - 1, ndim - 2]
    return False


def _reads(trace: Trace) -> list[tuple[str, Use]]:
    """Every read of a parameter, in order: its canonical name and the use."""
    held = trace.held
    found = []
    for step in trace.steps:
        for argument, value in step.inputs:
            if value in held and not (value == step.source and _is_alias(step, held[value])):
                found.append((held[value].name, _use(trace, step, argument, held[value])))
    for value in sorted(trace.results & held.keys()):  # the model returns a parameter as it is
        found.append((held[value].name, Use("", "other:output", False, "other")))
    return found


def _use(trace: Trace, step: Step, argument: str, parameter: _Held) -> Use:
    """What a step does with a parameter."""
    use = functools.partial(Use, step.module)
    if step.op == "multi_head_attention_forward" and argument in _EXPANDED:
        return use("linear", False, _EXPANDED[argument])
    if step.op in _PRODUCTS:
        return _product_use(step, argument, parameter)
    if step.op in _OPS:
        op = _OPS[step.op]
        if op == "rnn":
            return use(op, False, "weight" if parameter.ndim > 1 else "bias")
        return use(op, False, argument if argument in ("weight", "bias") else "other")
    role = _norm_role(trace, step)
    return use("norm", False, role) if role else use(f"other:{step.op}", False, "other")


def _product_use(step: Step, argument: str, parameter: _Held) -> Use:
    """A parameter in a product: `linear` has (out, in) on its right, all others have (in, out)."""
    kind = {2: "linear", 3: "experts"}.get(parameter.ndim, "matmul")
    if parameter.reshaped:  # rows and columns of the product are not those of the parameter
        kind = "matmul"
    if argument in _RIGHT:
        turned = parameter.turned if step.op == "linear" else not parameter.turned
        return Use(step.module, kind, turned and kind != "matmul", "weight")
    if argument == "bias" or step.op in ("addmm", "baddbmm") and argument == "self":
        return Use(step.module, "linear", False, "bias")
    return Use(step.module, "matmul", False, "weight" if parameter.ndim > 1 else "other")


# --- reading: norms ---------------------------------------------------------------------------------

_ROOTS = {"rsqrt", "sqrt", "linalg_vector_norm", "linalg_norm", "norm", "normalize", "std", "var_mean"}
_ELEMENTWISE = {"mul", "div", "sub", "add", "reciprocal", "clamp", "clamp_min"} | _CASTS | _VIEWS
_LOOK_BACK = 12  # values to look at on the way from a handwritten norm's scale to its root


def _norm_role(trace: Trace, step: Step) -> str:
    """ "weight" or "bias" if the step is the scale or the shift of a norm written by hand (RMSNorm), else "".

    The scale is a product with something that was just divided by a root; the shift is a sum with such a
    scale. `1 + weight`, as Gemma has it, counts as the weight.
    """
    data = [value for _, value in step.inputs if value not in trace.held]
    if step.op == "mul" and len(data) == 1:
        return "weight" if _is_divided_by_root(trace, step, data[0]) else ""
    if step.op == "add" and len(data) == 1:
        return "bias" if _is_divided_by_root(trace, step, data[0]) else ""
    if step.op == "add" and not data and len(step.inputs) == 1:
        shifted = [reader for reader, _ in _through_casts(trace, step.outputs[0])]
        rest = [value for reader in shifted for _, value in reader.inputs]
        divided = any(_is_divided_by_root(trace, step, value) for value in rest)
        return "weight" if divided and all(reader.op == "mul" for reader in shifted) else ""
    return ""


def _through_casts(trace: Trace, value: int) -> list[tuple[Step, str]]:
    """The steps that read a value, seen through casts."""
    found = []
    for step, argument in trace.consumers[value]:
        found += _through_casts(trace, step.outputs[0]) if step.op in _CASTS else [(step, argument)]
    return found


def _is_divided_by_root(trace: Trace, step: Step, value: int) -> bool:
    """Whether elementwise steps of the same module call lead from a root to `value`."""
    todo, seen = [value], {value}
    for _ in range(_LOOK_BACK):
        if not todo:
            return False
        maker = trace.producers.get(todo.pop(0))
        if maker is None or maker.call != step.call:
            continue
        if maker.op in _ROOTS or maker.op == "pow" and -0.5 in maker.options.values():
            return True
        if maker.op in _ELEMENTWISE:
            fresh = [source for _, source in maker.inputs if source not in seen]
            seen.update(fresh)
            todo += fresh
    return False


def _norms(trace: Trace, reads: list[tuple[str, Use]], names: _Names) -> dict[str, Readers]:
    """Every module that normalizes and scales by a weight of its own, with the readers of its output."""
    weights = {
        use.module: name
        for name, use in reads
        if use.op == "norm" and use.role == "weight" and names.modules[_owner(name)] == use.module
    }
    steps: dict[str, list[Step]] = defaultdict(list)
    for step in trace.steps:
        steps[step.module].append(step)
    counts = Counter(name for name, _ in reads)
    return {
        path: _readers(trace, steps[path], counts)
        for path in weights
        if not any(step.op == "batch_norm" for step in steps[path])
    }


def _readers(trace: Trace, steps: list[Step], counts: Counter[str]) -> Readers:
    """Follow what leaves a norm, given its steps, to the products that read it."""
    own = {id(step) for step in steps}
    leaving = [
        value
        for step in steps
        for value in step.outputs
        if value in trace.results or any(id(reader) not in own for reader, _ in trace.consumers[value])
    ]
    reasons = _reasons_within(trace, steps, leaving, counts)
    modules: list[str] = []
    weights: list[str] = []
    for value in leaving:
        for step, argument, at in _beyond_views(trace, value):
            parameter = _multiplied_by(trace.held, step, argument, at)
            if id(step) in own:
                continue
            if parameter is None:
                reasons.append(f"its output also goes to {step.op} in {step.module or 'the model'}")
                continue
            if counts[parameter.name] > 1:
                reasons.append(f"{parameter.name}, which reads it, is read in other places too")
            if parameter.name not in weights:
                modules.append(step.module)
                weights.append(parameter.name)
        if trace.results & _views_of(trace, value):
            reasons.append("the model returns its output")
    if not modules and not reasons:
        reasons.append("nothing reads its output")
    offset = next((added for step in steps if (added := _added_to_weight(step, trace.held))), 0.0)
    return Readers(tuple(modules), tuple(weights), offset, "; ".join(dict.fromkeys(reasons)))


def _reasons_within(trace: Trace, steps: list[Step], leaving: list[int], counts: Counter[str]) -> list[str]:
    """Why the norm itself, whoever reads it, does not scale the last axis of one output."""
    reasons = []
    if len({step.call for step in steps}) > 1:
        reasons.append("it is called more than once")
    elif len(leaving) > 1:
        reasons.append(f"{len(leaving)} of its values are read outside")
    for step in steps:
        if step.op in ("group_norm", "instance_norm") and len(trace.shapes[step.source]) > 2:
            reasons.append("it scales the second axis and not the last")
        for value in [value for _, value in step.inputs if value in trace.held]:
            if sum(size != 1 for size in trace.shapes[value]) > 1:
                reasons.append("its weight has more than one axis")
            if counts[trace.held[value].name] > 1 and len({step.call for step in steps}) == 1:
                reasons.append(f"{trace.held[value].name}, its own, is read in other places too")
    return reasons


def _added_to_weight(step: Step, held: dict[int, _Held]) -> float:
    """The constant that a step adds to a bare parameter."""
    if step.op != "add" or len(step.inputs) != 1 or step.source not in held:
        return 0.0
    return float(sum(option for option in step.options.values() if isinstance(option, (int, float))))


def _keeps_channels(trace: Trace, step: Step, value: int) -> bool:
    """Whether a step only moves rows of `value` about, each still a vector over the same channels."""
    before, after = trace.shapes[value], trace.shapes[step.outputs[0]]
    if value != step.source or not before or not after or before[-1] != after[-1]:
        return False
    last = len(before) - 1
    if step.op in ("dropout", "feature_dropout", *_CASTS):
        return True
    if step.op in _VIEWS:
        return before[-1] != 1
    if step.op == "transpose":
        axes = (step.options.get("dim0"), step.options.get("dim1"))
        return all(isinstance(axis, int) and axis % len(before) != last for axis in axes)
    if step.op == "permute":
        axes = step.options.get("dims", ())
        return bool(axes) and axes[-1] % len(before) == last
    if step.op in ("select", "slice", "narrow"):
        dim = step.options.get("dim", 0)
        return isinstance(dim, int) and dim % len(before) != last
    if step.op == "index":  # rows, as a router sends them to experts; a mask spans as many axes as it has
        widest = max(len(trace.shapes[index]) for _, index in step.inputs[1:])
        return step.options.get("len(indices)", 1) + max(widest, 1) - 1 <= last
    if step.op == "getitem":
        index = step.options.get("indices")
        return _leaves_last_axis(index if isinstance(index, tuple) else (index,), len(before))
    return False


def _leaves_last_axis(index: tuple, ndim: int) -> bool:
    """Whether `x[index]`, with numbers and slices alone, takes all of the last of `ndim` axes."""
    if any(item is None for item in index):
        return False
    if Ellipsis in index:
        return index[-1] is Ellipsis or index[-1] == slice(None)
    return len(index) < ndim or index[-1] == slice(None)


def _beyond_views(trace: Trace, value: int) -> Iterator[tuple[Step, str, int]]:
    """The steps that read a value, seen through those that keep its channels: (step, argument, value)."""
    for step, argument in trace.consumers[value]:
        if _keeps_channels(trace, step, value):
            yield from _beyond_views(trace, step.outputs[0])
        else:
            yield step, argument, value


def _views_of(trace: Trace, value: int) -> set[int]:
    """A value and those that have the same channels."""
    found = {value}
    for step, _ in trace.consumers[value]:
        if _keeps_channels(trace, step, value):
            found |= _views_of(trace, step.outputs[0])
    return found


def _multiplied_by(held: dict[int, _Held], step: Step, argument: str, value: int) -> _Held | None:
    """The parameter on the right of a product that has an activation on its left."""
    if step.op not in _PRODUCTS or argument not in ("input", "self", "mat1", "batch1"):
        return None
    if step.op in ("addmm", "baddbmm") and argument == "self":
        return None
    found = [held[other] for key, other in step.inputs if key in _RIGHT and other in held and other != value]
    if len(found) != 1 or found[0].ndim not in (2, 3) or found[0].reshaped or found[0].part:
        return None
    return found[0]


# --- reading: batch norms ---------------------------------------------------------------------------


def _batchnorm_pairs(trace: Trace, reads: list[tuple[str, Use]], names: _Names) -> list[tuple[str, str]]:
    """(conv or linear, batch norm) where nothing else sees what lies between them."""
    counts = Counter(name for name, _ in reads)
    calls = Counter(trace.order)
    pairs = []
    for norm in trace.steps:
        if norm.op != "batch_norm" or norm.options.get("training") or calls[norm.module] != 1:
            continue
        between = norm.source
        maker = trace.producers.get(between)
        if maker is None or between in trace.results or len(trace.consumers[between]) != 1:
            continue
        held = [trace.held[value].name for _, value in maker.inputs if value in trace.held]
        alone = calls[maker.module] == 1 and all(counts[name] == 1 for name in held)
        if alone and _reads_own_weight(trace.held, maker, names):
            pairs.append((maker.module, norm.module))
    return pairs


def _reads_own_weight(held: dict[int, _Held], step: Step, names: _Names) -> bool:
    """Whether a step is a convolution or a linear layer with the whole weight of its own module."""
    if step.op != "linear" and _OPS.get(step.op) not in ("conv", "conv_transpose"):
        return False
    weights = [held[value] for argument, value in step.inputs if argument == "weight" and value in held]
    return any(
        names.modules[_owner(weight.name)] == step.module
        and not (weight.turned or weight.reshaped or weight.part)
        for weight in weights
    )


# --- reading: blocks --------------------------------------------------------------------------------


def _chains(trace: Trace, model: nn.Module) -> tuple[tuple[str, ...], ...]:
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
        module = _owner(module)
    return None


# --- all together -----------------------------------------------------------------------------------


def _read(trace: Trace, model: nn.Module, names: _Names) -> Structure:
    """Read everything that `Structure` holds from a trace."""
    reads = _reads(trace)
    parameters = _parameters(reads, model, names)
    calls = Counter(trace.order)
    chains = _chains(trace, model)
    sizes = {chain: _size(model, chain) for chain in chains}
    return Structure(
        parameters=parameters,
        buffers=_buffers(model),
        ties=[group for group in names.groups().values() if len(group) > 1],
        calls={path: calls[first] for path, first in names.modules.items()},
        ops=_ops(trace),
        norms=_norms(trace, reads, names),
        batchnorm_pairs=_batchnorm_pairs(trace, reads, names),
        chains=chains,
        blocks=max(chains, key=lambda chain: (sizes[chain], len(chain)), default=()),
        how=trace.how,
        why=trace.why,
        notes=_notes(trace, parameters, calls, names),
    )


def _parameters(reads: list[tuple[str, Use]], model: nn.Module, names: _Names) -> dict[str, ParameterInfo]:
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


def _size(model: nn.Module, paths: tuple[str, ...]) -> int:
    """Elements of the parameters in some modules."""
    return sum(parameter.numel() for path in paths for parameter in model.get_submodule(path).parameters())


def _notes(
    trace: Trace, parameters: dict[str, ParameterInfo], calls: Counter[str], names: _Names
) -> list[str]:
    """What remains unclear."""
    notes = [
        f"{name}: {_owner(name) or 'the model'} runs, but no read of this parameter was seen"
        for name, info in parameters.items()
        if not info.calls and calls[names.modules[_owner(name)]]
    ]
    if trace.how == "hooks":
        notes.append("read by hooks: what is computed without torch functions was not seen")
    return notes
