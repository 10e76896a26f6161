"""From the tensor names on disk to those of a transformers module, by transformers' own conversion tables.

Checkpoints keep the names of their day: `LayerNorm.gamma`, one tensor per expert where the module has one for
all, fused projections where the module has three, a base model's prefix or none. `from_pretrained` bridges
that with tables of renamings and converters. Here the same tables are asked the other way round, before
anything is read: which tensors on disk make up this one of the module? So one tensor can be had by reading
only its own sources.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Origin", "map_names"]

Read = Callable[[str], Tensor]


@dataclass
class Origin:
    """How one or more tensors of the module come about from tensors on disk.

    Attributes:
        first: the module name under which the sources were gathered (the first target of a converter).
        sources: `(source pattern, disk name)`, in the order in which transformers gathers them.
        converter: transformers' converter, or None where one tensor is taken as it is.
    """

    first: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    def convert(self, read: Read, model: Any, rows: slice | None = None) -> dict[str, Tensor]:
        """Run the converter on what `read` returns for each source; the result is keyed by module name.

        Args:
            read: `(disk name) -> tensor`.
            model: the skeleton, whose config and shapes some converters ask.
            rows: with `takes_rows`, which rows of the result to make.
        """
        converter = copy.deepcopy(self.converter)  # it keeps what it is given
        for pattern, names in self._by_pattern().items():
            for name in names[rows] if rows is not None else names:
                converter.add_tensor(self.first, name, pattern, read(name))
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def takes_rows(self) -> bool:
        """Whether row i of the result comes from the i-th tensor of every source pattern: stacked experts."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        if self.converter is None or not isinstance(self.converter.operations[0], MergeModulelist):
            return False
        keeps_rows = all(
            (isinstance(step, Concatenate) and step.dim > 0 and step.num_shards_attribute is None)
            or (isinstance(step, Transpose) and min(step.dim0, step.dim1) > 0)
            for step in self.converter.operations[1:]
        )
        counts = {len(names) for names in self._by_pattern().values()}
        return self.converter.operations[0].dim == 0 and keeps_rows and len(counts) == 1

    def _by_pattern(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for pattern, name in self.sources:
            groups.setdefault(pattern, []).append(name)
        return groups


def map_names(model: Any, names: Iterable[str]) -> tuple[list[Origin], list[str]]:
    """Which tensors on disk make up which tensors of the module.

    Args:
        model: a transformers model, on meta, not yet tied.
        names: the names on disk.

    Returns:
        The origins, and the names on disk that the module has no place for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    of_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    places = model.state_dict()
    origins: dict[str, Origin] = {}
    unused = []
    # The order matters: some renamings remember what they saw, and stacked experts follow it.
    for disk in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(disk, renamings, converters, model.base_model_prefix, places)
        if name not in places and disk in places:  # it should not have been renamed, or only by the prefix
            name, pattern = rename_source_key(disk, [], [], model.base_model_prefix, places)
        if name not in places or (
            pattern is None and name in origins
        ):  # two spellings of one: the first counts
            unused.append(disk)
        elif pattern is None:
            origins[name] = Origin(name, [(disk, disk)])
        else:
            origin = origins.setdefault(name, Origin(name, converter=of_pattern[pattern]))
            origin.sources.append((pattern, disk))
    return list(origins.values()), unused


def meta_reader(spec: Callable[[str], tuple[torch.dtype, tuple[int, ...]]]) -> Read:
    """A `read` that gives tensors without data, to learn what a converter would make."""

    def read(name: str) -> Tensor:
        dtype, shape = spec(name)
        return torch.empty(shape, dtype=dtype, device="meta")

    return read
