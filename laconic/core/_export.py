"""The first tracer: `torch.export`, whose graph keeps the path of the module that ran each operation."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from ._trace import CASTS, Names, Step, Trace
from ._tracing import Example, calls_recorded, op_name, quiet, returned

__all__ = ["by_export"]


def by_export(shadow: nn.Module, example: Example, mode: FakeTensorMode, names: Names) -> Trace:
    """Trace by `torch.export`, whose graph keeps the path of the module that ran each operation."""
    trace = Trace("export")
    with (
        calls_recorded(shadow, names, trace.order),
        quiet(),
        redirect_stderr(io.StringIO()),  # a failing export prints the graph that it has so far
        torch.no_grad(),
    ):
        # The last hook: export refuses to return what it does not know, such as a cache of keys and values.
        shadow.register_forward_hook(lambda *call: list(returned(call[-1])))
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


def _add_graph(trace: Trace, graph: fx.GraphModule, values: dict[fx.Node, Any], names: Names) -> Any:
    """Append the steps of a graph, given the values of its placeholders; returns the output's values."""
    for node in graph.graph.nodes:
        if node.op == "output":
            return map_arg(node.args[0], values.get)
        if node.op == "get_attr" and not isinstance(_attribute(graph, node.target), fx.GraphModule):
            values[node] = trace.new(_shape(node))
        elif node.op == "call_function" and not node.name.startswith("_assert"):
            values[node] = _add_node(trace, graph, node, values, names)
    return ()


def _add_node(trace: Trace, graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], names: Names) -> Any:
    """Append one node as a step, or the steps of the graph that it wraps; returns its value or values."""
    bodies = [
        _attribute(graph, argument.target)
        for argument in node.all_input_nodes
        if argument.op == "get_attr" and argument not in values
    ]
    if bodies:  # an autocast or no_grad region, or control flow: its body is a graph of its own
        return _add_bodies(trace, bodies, [values[n] for n in node.all_input_nodes if n in values], names)
    if op_name(node.target) == "getitem":
        whole: Any = values[node.all_input_nodes[0]]
        if isinstance(whole, (tuple, list)):
            index: Any = node.args[1]
            return whole[index]
    inputs, options = _node_arguments(node, values)
    if _returns_its_input(node):
        return inputs[0][1]
    module, call = _node_module(node, names)
    value = trace.new(_shape(node))
    trace.steps.append(Step(op_name(node.target), module, call, inputs, (value,), options))
    return value


def _returns_its_input(node: fx.Node) -> bool:
    """Whether a node is a cast to the dtype that its tensor has already.

    Such a cast returns the tensor itself, so export lets later readers of that tensor, in whatever module
    they are, read the cast: the step must vanish, or a norm would seem to hand its input to the residual sum.
    """
    if op_name(node.target) not in CASTS - {"clone"}:
        return False
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.shape == after.shape


def _add_bodies(trace: Trace, bodies: list[fx.GraphModule], operands: list[Any], names: Names) -> Any:
    """Append the steps of the graphs that a node wraps; the first one's results stand for the node."""
    results = []
    for body in bodies:
        inner = body.graph.find_nodes(op="placeholder")
        given = operands[len(operands) - len(inner) :]
        results.append(_add_graph(trace, body, dict(zip(inner, given, strict=True)), names))
    for result in results[1:]:  # of another branch: where these values go is not followed
        trace.results.update(_flat(result))
    return results[0]


def _node_arguments(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[tuple[tuple[str, int], ...], dict[str, Any]]:
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


def _node_module(node: fx.Node, names: Names) -> tuple[str, str]:
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
