"""The contract of a Probe: `probe(model, data) -> Finding`; it looks and does not touch.

    Example(lambda: CalibrationProbe(), kind="Probe", inputs=lambda g: [model(), batches(g)])

A finding has `table` (a list of rows, each a mapping of plain values), `plot()` (an SVG text) and `cost` (what it took:
passes, examples, seconds, as a mapping or a sentence). `inputs`: the model and whatever else the probe is called with.
`stated["time"]`: keys of rows that measure time, which may differ from run to run.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from laconic.errors import BadInput

from ..contract import Broken, require
from ..example import Example
from ..tensors import copied, module_state, require_unchanged, same


def check_probe_changes_nothing(example: Example) -> None:
    """Parameters, buffers, gradients, modes, hooks and data are as they were, whatever mode the model was in."""
    for training in (True, False):
        arguments = example.arguments()
        model = _model(arguments).train(training)
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        before, data = module_state(model), copied(arguments[1:])
        example.build()(*arguments)
        require_unchanged(model, before, "the probe")
        same(copied(arguments[1:]), data, "the probe changed the data")


def check_probe_table(example: Example) -> None:
    """The table has rows of plain values, all with the same keys."""
    table = _found(example).table
    require(isinstance(table, Sequence) and len(table) > 0, f"the table is {table!r}, not a list of rows")
    require(all(isinstance(row, Mapping) for row in table), "a row of the table is no mapping")
    require(len({tuple(row) for row in table}) == 1, "the rows of the table have different keys")
    try:
        json.dumps(list(map(dict, table)), allow_nan=True)
    except TypeError as error:
        raise Broken(f"the table holds what JSON cannot write: {error}") from error


def check_probe_plot(example: Example) -> None:
    """The plot is a well-formed SVG."""
    drawn = _found(example).plot()
    require(isinstance(drawn, str), f"plot() gives {type(drawn).__name__}, not the text of an SVG")
    try:
        root = ElementTree.fromstring(drawn)
    except ElementTree.ParseError as error:
        raise Broken(f"plot() gives no well-formed SVG: {error}") from error
    require(root.tag.rpartition("}")[2] == "svg", f"plot() gives <{root.tag}>, not <svg>")
    require(len(root) > 0, "the plot is empty")


def check_probe_cost(example: Example) -> None:
    """The finding says what it cost."""
    cost = getattr(_found(example), "cost", None)
    require(isinstance(cost, (str, Mapping)) and len(cost) > 0, f"the cost is {cost!r}: say what it took")


def check_probe_repeats(example: Example) -> None:
    """The same model and data give the same table."""
    first, second = (_comparable(example, _found(example).table) for _ in range(2))
    require(first == second, "two runs give different tables")


def _found(example: Example) -> Any:
    return example.build()(*example.arguments())


def _model(arguments: tuple) -> nn.Module:
    if not isinstance(arguments[0], nn.Module):
        raise BadInput(f"the first input of a probe is the model, not {type(arguments[0]).__name__}")
    return arguments[0]


def _comparable(example: Example, table: Any) -> str:
    timed = set(example.stated.get("time", ()))
    return json.dumps([{k: v for k, v in row.items() if k not in timed} for row in table], default=str)
