"""Running a model on calibration data stage by stage, and what is collected on the way.

A stage is a set of modules that see one collection of inputs: a block of the repeated chain that `Structure` found, or a
few layers elsewhere.

- In the chain, activations are carried from block to block (`Chain`): a block runs once to be looked at and once to move
  on. Whether a model really is such a chain is tried on one example, not assumed.
- Elsewhere the model runs from its start once per stage (`run_all`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.calls import Stop, capture, first_output, has_tensor
from laconic.core.statistics import column_sums
from laconic.core.structure import Structure
from laconic.quant import Hessian, attention_weights, fast_products, weighted_hessian

from .distribute import Elsewhere, Shares, Team
from .residency import Activations, InMemory, Streamed

Residency = InMemory | Streamed
Modules = Mapping[str, nn.Module]


class Inputs:
    """Hooks that add the inputs of modules to statistics; modules that read the same tensor share one.

    Args:
        modules: path -> module.
        full: paths whose second moments are wanted; the others get the mean and the mean square of each column alone.
        once: every module runs once in a forward, so a run may end when all have been seen.
        shares: which process collects what; all of it is this one's where there are no others.
    """

    def __init__(self, modules: Modules, full: set[str], once: bool = False, shares: Shares | None = None):
        self.modules, self.full, self.once, self.shares = modules, full, once, shares
        self.tokens: Tensor | None = None  # r (N, T): how much each token of the batch counts; None: all alike
        self._waiting = set(modules)
        self.leader: dict[str, str] = {}
        self.found: dict[str, Hessian | Columns | Elsewhere] = {}
        self._seen: list[tuple[Tensor, str]] = []

    def __enter__(self) -> Inputs:
        self._handles = [
            m.register_forward_pre_hook(
                lambda mod, args, kwargs, path=path: self._note(path, mod, args, kwargs), with_kwargs=True
            )
            for path, m in self.modules.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One run of the model, which may end before its end."""
        self._waiting = set(self.modules)
        try:
            yield
        except Stop:
            pass
        finally:
            self._seen.clear()

    def _note(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._add(path, module, args, kwargs)
        self._waiting.discard(path)
        if self.once and not self._waiting:
            raise Stop

    def _add(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        conv = isinstance(module, nn.modules.conv._ConvNd)
        if not conv:
            same = next((p for t, p in self._seen if t is x and (p in self.full) == (path in self.full)), None)
            if path not in self.leader:
                self.leader[path] = same if same is not None else path
                if self.shares is not None and same is not None:
                    self.shares.of(path, same)
            if self.leader[path] != path and self.leader[path] == same:
                return
            self.leader[path] = path
            self._seen.append((x, path))
        if path not in self.found:
            self.found[path] = self._new(path, module, x, conv)
        stats = self.found[path]
        if isinstance(stats, Elsewhere):
            return
        if conv and isinstance(stats, Hessian):
            stats.add_conv(x if x.dim() == len(module.kernel_size) + 2 else x[None], module)
        elif isinstance(stats, Hessian) and self.tokens is not None and self.tokens.shape == x.shape[:-1]:
            weighted_hessian(stats, x, self.tokens)
        else:
            stats.add(x)

    def _new(self, path: str, module: nn.Module, x: Tensor, conv: bool) -> Hessian | Columns | Elsewhere:
        if self.shares is not None and (rank := self.shares.of(path, path)) != self.shares.team.rank:
            return Elsewhere(rank)
        if conv:  # the mean of unfolded windows comes with their second moments
            return Hessian.of(module, device=x.device)
        return Hessian(x.shape[-1], device=x.device) if path in self.full else Columns(x.shape[-1], x.device)

    def result(self) -> dict[str, Hessian | Columns | Elsewhere]:
        """Path -> statistics, shared ones under every path."""
        return {p: self.found[self.leader.get(p, p)] for p in self.modules if self.leader.get(p, p) in self.found}


class Columns:
    """Mean and mean square of every column of inputs (..., K), in float64."""

    def __init__(self, k: int, device: torch.device | None = None):
        self.tokens = 0
        self._sum = torch.zeros(k, dtype=torch.float64, device=device)
        self._squares = torch.zeros(k, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs (..., K)."""
        x = x.detach().reshape(-1, x.shape[-1])
        self._sum += column_sums(x)
        self._squares += column_sums(x.float().square())
        self.tokens += x.shape[0]

    @property
    def mean(self) -> Tensor:
        """(K,) float32."""
        return (self._sum / max(1, self.tokens)).float()

    @property
    def power(self) -> Tensor:
        """(K,) float32 mean square."""
        return (self._squares / max(1, self.tokens)).float()


def run_all(model: nn.Module, task: Any, batches: Sequence[Any], inputs: Inputs) -> None:
    """Run a model on all batches with hooks in place."""
    with inputs, fast_products():
        for batch in batches:
            with inputs.batch():
                task.forward(model, batch)


class Chain:
    """Activations carried along the repeated blocks.

    Attributes:
        blocks: paths, in the order in which they run.
        constant: whether all blocks are called with the same further arguments.
    """

    def __init__(self, model: nn.Module, task: Any, batches: Sequence[Any], blocks: Sequence[str], constant: bool):
        self.model, self.task, self.batches, self.blocks, self.constant = model, task, batches, blocks, constant
        self.residency: Residency = InMemory()
        self.team = Team()
        self.hidden = Activations(None)
        self.rest: list[dict[str, tuple[tuple, dict]]] = []

    @classmethod
    def find(
        cls, model: nn.Module, structure: Structure, task: Any, batches: Sequence[Any], residency: Residency
    ) -> Chain | str:
        """The chain, if running the blocks one after the other on an example gives what the model gives; else why not."""
        blocks = structure.blocks
        if len(blocks) < 2:
            return "it is no chain of repeated blocks"
        if any(structure.calls.get(b) != 1 for b in blocks):
            return "its blocks run more than once"
        with residency.running(), fast_products():
            seen, outputs = capture(
                model, lambda: task.forward(model, first_rows(batches[0], 1)), blocks, last=blocks[-1]
            )
        if set(seen) != set(blocks):
            return "some of its blocks do not run on this data"
        for previous, block in zip(blocks, blocks[1:], strict=False):
            if not seen[block][0] or seen[block][0][0] is not first_output(outputs.get(previous)):
                return f"{block} reads more than the output of {previous}"
        first_args, first_kwargs = seen[blocks[0]]
        constant = all(
            _same(seen[b][0][1:], first_args[1:]) and _same(tuple(seen[b][1].items()), tuple(first_kwargs.items()))
            for b in blocks[1:]
        )
        if residency.streamed and not constant:
            return "its blocks are called with different arguments"
        chain = cls(model, task, batches, blocks, constant)
        chain.residency = residency
        return chain

    def start(self, spill: Path | None = None) -> None:
        """Run every batch up to the chain and keep what its blocks are called with; activations in `spill`, if given."""
        self.hidden, self.rest = Activations(spill), []
        with self.residency.running():
            for batch in self.batches:
                seen, _ = capture(
                    self.model,
                    lambda batch=batch: self.task.forward(self.model, batch),
                    self.blocks,
                    first=self.blocks[0] if self.constant else None,
                )
                self.hidden.append(seen[self.blocks[0]][0][0])
                rest = {b: (a[1:], k) for b, (a, k) in seen.items()}
                self.rest.append(dict.fromkeys(self.blocks, rest[self.blocks[0]]) if self.constant else rest)

    def look(self, block: str, inputs: Inputs, by_attention: bool = False) -> None:
        """Run a block on every batch with hooks in place; with `by_attention` tokens count by the attention they get."""
        weights: list[Tensor | None] = [None] * len(self.hidden)
        with fast_products():
            if by_attention:
                weights = [attention_weights(partial(self._call, block, number)) for number in range(len(weights))]
            with inputs:
                for number, inputs.tokens in enumerate(weights):
                    with inputs.batch():
                        self._call(block, number)

    def advance(self, block: str) -> None:
        """Replace the activations by the block's outputs."""
        with fast_products():
            for number in self.team.mine(len(self.hidden)):
                self.hidden[number] = first_output(self._call(block, number))
        self.team.exchange(self.hidden)

    @contextmanager
    def block(self, block: str) -> Iterator[None]:
        """The weights of a block are there; on leaving, the activations have moved past it, if another one follows."""
        with self.residency.hold(block):
            yield
            if block != self.blocks[-1]:
                self.advance(block)

    def _call(self, block: str, number: int) -> Any:
        args, kwargs = self.rest[number][block]
        return self.model.get_submodule(block)(self.hidden[number], *args, **kwargs)


def call_order(model: nn.Module, task: Any, batch: Any, paths: Sequence[str]) -> dict[str, int]:
    """Module path -> place in the forward pass, which ends when all have been reached."""
    order: dict[str, int] = {}
    wanted = dict.fromkeys(paths)

    def note(path: str) -> None:
        order.setdefault(path, len(order))
        if len(order) == len(wanted):
            raise Stop

    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: note(path)) for path in wanted
    ]
    try:
        with fast_products():
            task.forward(model, batch)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return order


def first_rows(batch: Any, n: int) -> Any:
    """The first examples of a batch."""
    if isinstance(batch, Mapping):
        return {name: value[:n] for name, value in batch.items()}
    return tuple(value[:n] for value in batch)


def _same(a: tuple, b: tuple) -> bool:
    """Whether two tuples hold the same objects (tensors by identity, nested tuples by members)."""
    if len(a) != len(b):
        return False
    return all(
        x is y or (isinstance(x, tuple) and isinstance(y, tuple) and _same(x, y)) or (not has_tensor(x) and x == y)
        for x, y in zip(a, b, strict=True)
    )
