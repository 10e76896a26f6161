"""What every quantized checkpoint of Hugging Face's kind has: a config that names the method, and tensors a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.errors import BadInput
from laconic.numerics import Int, Scale, Scheme

from .matrix import QuantizedMatrix

__all__ = ["Form", "Read", "Spec", "integer_scheme"]

Read = Callable[[str], Tensor]
Spec = Callable[[str], tuple[torch.dtype, tuple[int, ...]]]
_SCALES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Form(ABC):
    """How one tool stores quantized layers.

    Args:
        config: its `quantization_config`.
        where: the folder, for messages.

    Attributes:
        notes: what of the config is not carried out.
        learnt: path of a layer -> what `learn` has read.

    Raises:
        BadInput: the config asks for what is not read.
    """

    method: ClassVar[str]
    # What follows a layer's path in the names of its tensors, the weight's own name apart.
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, config: Mapping[str, Any], where: object):
        self.config, self.where = dict(config), where
        self.notes: list[str] = []
        self.learnt: dict[str, Any] = {}

    def refused(self, what: str, way: str = "give the original float model") -> BadInput:
        """A refusal that names folder and method."""
        return BadInput(f"{self.where} is quantized by {self.method} {what}, which laconic does not read: {way}")

    @abstractmethod
    def layers(self, names: set[str], spec: Spec) -> dict[str, str]:
        """Name of the float weight -> path of its layer, of every quantized layer among the tensors."""

    def learn(self, path: str, read: Read) -> None:  # noqa: B027 - most have nothing to learn
        """Read what a layer's names and shapes do not tell, once, before anything else is asked of it."""

    @abstractmethod
    def shape(self, path: str, spec: Spec) -> tuple[int, int]:
        """(out, in) of a layer's float weight."""

    @abstractmethod
    def matrix(self, path: str, read: Read, spec: Spec) -> QuantizedMatrix | None:
        """A layer's weight in our numbers, None where they have no form for it."""

    def values(self, path: str, read: Read, spec: Spec) -> Tensor:
        """A layer's weight as floats."""
        found = self.matrix(path, read, spec)
        assert found is not None
        return found.values()


def integer_scheme(bits: int, group: int | None, dtype: torch.dtype, zero: bool) -> Scheme:
    """The scheme of integers with a scale a group, or a row where `group` is None."""
    name = _SCALES.get(dtype, "float32")
    scale = Scale("channel", dtype=name) if group is None else Scale("group", group, name)
    return Scheme(Int(bits), scale, "int" if zero else "none")
