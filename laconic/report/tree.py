"""What `laconic inspect` prints: bytes, operations, milliseconds and outliers along the module tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from . import text
from .record import clean, get

__all__ = ["Node", "inspect_tree"]

COLUMNS = (("bytes", 9), ("MACs", 8), ("time", 9), ("outliers", 8))


@dataclass
class Node:
    """A module (or a unit, where it has no children) and the sums of what lies below it."""

    name: str
    bytes: float = 0
    macs: float | None = None
    ms: float | None = None
    outlier: float | None = None  # the largest below
    alike: int = 1  # how many siblings this node stands for
    children: dict[str, Node] = field(default_factory=dict)

    def add(self, bytes_: float, macs: float | None, ms: float | None, outlier: float | None) -> None:
        """Count one unit in."""
        self.bytes += bytes_
        self.macs = _plus(self.macs, macs)
        self.ms = _plus(self.ms, ms)
        self.outlier = max((v for v in (self.outlier, outlier) if v is not None), default=None)


def _plus(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b


def build(record: Mapping) -> Node:
    """The tree of a record's units, by the dots in their names."""
    root = Node(str(get(record, "model", "name") or "model"))
    for unit in record.get("units") or []:
        size = unit.get("bytes", unit.get("bytes_before")) or 0
        outlier = unit.get("outlier_ratio")
        if outlier is None:
            outlier = get(unit, "histogram", "outlier_ratio")
        figures = (size, unit.get("macs"), unit.get("ms"), outlier)
        node = root
        node.add(*figures)
        for part in str(unit.get("name")).split("."):
            node = node.children.setdefault(part, Node(part))
            node.add(*figures)
    return root


def _form(node: Node) -> tuple:
    """What two repeated blocks must have in common: names and bytes, all the way down."""
    return (node.bytes, tuple((name, _form(child)) for name, child in node.children.items()))


def _sum(nodes: list[Node], name: str) -> Node:
    """Nodes of one form as one: figures added up, position by position."""
    total = Node(name, alike=nodes[0].alike)
    for node in nodes:
        total.add(node.bytes, node.macs, node.ms, node.outlier)
    for key in nodes[0].children:
        total.children[key] = _sum([node.children[key] for node in nodes], key)
    return total


def collapse(node: Node) -> Node:
    """The same tree, where runs of numbered siblings that are alike are one node, `0-11`."""
    runs: list[list[Node]] = []
    for child in map(collapse, node.children.values()):
        last = runs[-1][-1] if runs else None
        if last and last.name.isdigit() and child.name.isdigit() and _form(last) == _form(child):
            runs[-1].append(child)
        else:
            runs.append([child])
    children = {}
    for run in runs:
        if len(run) > 1:
            one = _sum(run, f"{run[0].name}-{run[-1].name}")
            one.alike = len(run)
        else:
            one = run[0]
        children[one.name] = one
    return replace(node, children=children)


def _label(cells: tuple[str, ...], style: str = "") -> Table:
    """Name and figures; the figures stand in fixed columns at the right edge, whatever the depth."""
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis", style=style)
    for _, width in COLUMNS:
        grid.add_column(justify="right", width=width, no_wrap=True, style=style)
    grid.add_row(*(Text(cell) for cell in cells))
    return grid


def _cells(node: Node, name: str) -> tuple[str, ...]:
    outlier = "" if node.outlier is None else text.amount(node.outlier)
    macs = "" if node.macs is None else text.count(node.macs)
    return name, text.bytes_(node.bytes), macs, "" if node.ms is None else text.ms(node.ms), outlier


def _grow(tree: Tree, node: Node) -> None:
    for child in node.children.values():
        name = child.name
        while len(child.children) == 1 and child.alike == 1:  # a.b.c with nothing beside it is one line
            child = next(iter(child.children.values()))
            name += f".{child.name}"
        if child.alike > 1:
            name += f"  ({child.alike} alike)"
        _grow(tree.add(_label(_cells(child, name), "" if child.children else "dim")), child)


def inspect_tree(record: Mapping, *, repeated: bool = False) -> Tree:
    """Where the bytes, the operations, the milliseconds and the outliers are, as sums along the module paths.

    Args:
        record: `model` {name} and `units`, each with `name`, `bytes` (or `bytes_before`), `macs`, `ms` and
            `outlier_ratio` (or its `histogram`'s); any figure may be missing.
        repeated: show numbered blocks that are alike one by one, not summed up as one.
    """
    root = build(clean(record))
    if not repeated:
        root = collapse(root)
    head = Table.grid(expand=True)
    head.add_row(_label(("", *(name for name, _ in COLUMNS)), "dim"))
    head.add_row(_label(_cells(root, root.name), "bold"))
    tree = Tree(head, guide_style="dim")
    _grow(tree, root)
    return tree
