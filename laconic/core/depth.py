"""Depth: the residual blocks of any model, found by running it once, and watched while it runs.

A residual block is a module of a list (`nn.ModuleList`, `nn.Sequential`) that adds to what it reads: somewhere in its
call is a sum one side of which is its input, an earlier such sum, or a layer norm of these (Post-LN). That side is the
**stream**, the other the **branch**. Attention and perceptron of a transformer's layer are two sums of one block; a norm
or an activation (ResNet) behind the last sum ends a block as well as nothing does (Pre-LN). Modules of the same classes
that do not add to their input itself, as the first block of a stage of a ResNet whose shortcut is a convolution, are
blocks without a sum.

Nothing is known of any architecture here. What cannot be found is named: a pattern of paths says which modules are blocks.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from laconic.errors import BadInput

from ._trace import CASTS
from ._tracing import op_name

__all__ = ["IGNORED", "Batch", "Block", "Moments", "Visit", "blocks_of", "losses", "rows", "watched"]

IGNORED = -100  # a position of a target that does not count, as in torch's cross-entropy
CONTAINERS = (nn.Sequential, nn.ModuleList)
PASSED = CASTS | {"dropout", "layer_norm", "rms_norm"}  # what a stream goes through and stays the stream


class Batch(NamedTuple):
    """What a model is called with, and what it should say.

    Attributes:
        args, kwargs: of the call; tensors whose first axis is examples.
        target: classes (n,), or (n, t) with `IGNORED` where nothing is asked; None where there is no loss.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}  # noqa: RUF012  an empty mapping that nobody writes to
    target: Tensor | None = None

    @property
    def examples(self) -> int:
        """n."""
        return len(next(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)))

    @property
    def mask(self) -> Tensor | None:
        """(n, t), False at padding; None where everything counts."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


@dataclass(frozen=True)
class Block:
    """A block of a model.

    Attributes:
        path: of the module.
        keeps: whether what it gives has the shape of what it reads, so that it could be left out.
        channels: axis of the channels of what it gives, 1 or -1.
    """

    path: str
    keeps: bool
    channels: int


class Visit(NamedTuple):
    """One call of a block.

    Attributes:
        path: of the block.
        before, after: what it read and what it gave.
        sums: mean squares of stream and branch, for every sum in it.
    """

    path: str
    before: Tensor
    after: Tensor
    sums: tuple[tuple[float, float], ...]


# --- finding ----------------------------------------------------------------------------------------


def blocks_of(model: nn.Module, batch: Batch, pattern: str | None = None) -> tuple[Block, ...]:
    """The blocks of a model, in the order in which they run.

    Where blocks lie in blocks, the outer ones are taken, if all of their class keep the shape (layers of T5, made of
    residual sublayers); else the inner ones (stages of a Swin transformer).

    Args:
        model: in evaluation mode.
        batch: to run it on.
        pattern: of the paths of the blocks, as "encoder.layer.*"; a star stands for a part between dots. Without it, the
            blocks that add to what they read.

    Raises:
        BadInput: there is none.
    """
    modules = dict(model.named_modules())
    if pattern is None:
        candidates = _listed(modules)
    else:
        parts = pattern.split(".")
        candidates = [path for path in modules if path and _matches(path.split("."), parts)]
        if not candidates:
            raise BadInput(f"blocks={pattern!r} is the path of no module of {type(model).__name__}")
    visits: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []

    def note(visit: Visit) -> None:
        visits.append((visit.path, tuple(visit.before.shape), tuple(visit.after.shape), len(visit.sums)))

    with torch.no_grad(), watched(model, candidates, note):
        model(*batch.args, **batch.kwargs)
    calls = Counter(path for path, *_ in visits)
    adding = {type(modules[path]) for path, _, _, sums in visits if sums}
    found = {
        path: Block(path, before == after, _channels(modules[path], after))
        for path, before, after, _ in visits
        if calls[path] == 1 and (pattern is not None or type(modules[path]) in adding)
    }
    if not found:
        raise BadInput(_refusal(model, candidates, calls, pattern))
    chosen = _one_level(found, modules)
    ends = {path: number for number, (path, *_) in enumerate(visits)}  # blocks end in the order in which they run
    return tuple(sorted((found[path] for path in chosen), key=lambda block: ends[block.path]))


def _listed(modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules with parts of their own that stand in a list."""
    return [
        path
        for path, module in modules.items()
        if isinstance(modules.get(path.rpartition(".")[0]), CONTAINERS)
        and path
        and not isinstance(module, CONTAINERS)
        and next(module.children(), None) is not None
    ]


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatch.fnmatchcase, path, pattern))


def _one_level(found: Mapping[str, Block], modules: Mapping[str, nn.Module]) -> list[str]:
    """Blocks none of which lies in another one."""
    kept = list(found)
    classes = dict.fromkeys(type(modules[path]) for path in sorted(kept, key=lambda path: path.count(".")))
    for cls in classes:
        own = [path for path in kept if type(modules[path]) is cls]
        inner = [path for path in kept if any(path.startswith(f"{outer}.") for outer in own)]
        gone = set(inner if all(found[path].keeps for path in own) else own) if inner else set()
        kept = [path for path in kept if path not in gone]
    return kept


def _refusal(model: nn.Module, candidates: Sequence[str], calls: Counter[str], pattern: str | None) -> str:
    name = type(model).__name__
    again = next((path for path, count in calls.items() if count > 1), None)
    if again is not None:
        return f"{again} of {name} is called {calls[again]} times, and a block has one depth: name others by blocks=PATTERN"
    if pattern is not None:
        return f"{candidates[0]} of {name}, which blocks={pattern!r} names, is not called"
    return (
        f"{name} has no residual blocks: none of the {len(candidates)} modules in its lists adds to what it reads; name "
        "its blocks by a pattern of their paths, as blocks='encoder.layer.*'"
    )


def _channels(module: nn.Module, shape: tuple[int, ...]) -> int:
    """1 where a convolution makes what a block gives, -1 where the channels are last."""
    for part in module.modules():
        conv = isinstance(part, nn.modules.conv._ConvNd) and len(shape) == 2 + len(part.kernel_size)
        if conv and part.out_channels == shape[1]:
            return 1
    return -1


# --- watching ---------------------------------------------------------------------------------------


@contextmanager
def watched(
    model: nn.Module,
    paths: Sequence[str],
    visit: Callable[[Visit], Tensor | None],
    *,
    mask: Tensor | None = None,
    gradients: bool = False,
) -> Iterator[None]:
    """Within the block every call of the modules at `paths` is visited when it ends.

    Args:
        model: of the modules.
        paths: of modules that read and give a tensor, alone or as the first of several.
        visit: may return a tensor that the module is to have given.
        mask: (n, t); positions of streams (n, t, d) that count for `sums`.
        gradients: make every input a tensor whose gradient can be asked for.

    Raises:
        BadInput: a module reads or gives no floating tensor.
    """
    watcher = _Watcher(mask)
    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            before = module.register_forward_pre_hook(_entering(watcher, path, gradients), with_kwargs=True)
            after = module.register_forward_hook(_leaving(watcher, path, visit))
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(watcher)
        yield


def _entering(watcher: _Watcher, path: str, gradients: bool) -> Callable[..., Any]:
    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        stream = next((value for value in (*args, *kwargs.values()) if _floating(value)), None)
        if stream is None:
            raise BadInput(f"{path}, a {type(module).__name__}, reads no floating tensor: it is no residual block")
        changed = None
        if gradients and not stream.requires_grad:
            old, stream = stream, stream.detach().requires_grad_()
            put = lambda value: stream if value is old else value  # noqa: E731
            changed = tuple(map(put, args)), {name: put(value) for name, value in kwargs.items()}
        watcher.frames.append(_Frame([stream]))
        return changed

    return enter


def _leaving(watcher: _Watcher, path: str, visit: Callable[[Visit], Tensor | None]) -> Callable[..., Any]:
    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        frame = watcher.frames.pop()
        items = output if isinstance(output, (tuple, list)) else (output,)
        after = next((value for value in items if _floating(value)), None)
        if after is None:
            raise BadInput(f"{path} gives {type(output).__name__} without a floating tensor: it is no residual block")
        given = visit(Visit(path, frame.held[0], after, tuple(frame.sums)))
        if given is None or not isinstance(output, (tuple, list)):
            return given
        changed = [given if value is after else value for value in output]
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)

    return leave


@dataclass
class _Frame:
    """A block that runs: the values that are its input or sums with it, and the mean squares at these sums."""

    held: list[Tensor]
    sums: list[tuple[float, float]] = field(default_factory=list)

    def holds(self, value: object) -> bool:
        return any(value is held for held in self.held)


class _Watcher(TorchFunctionMode):
    """Follows the streams of the blocks that run."""

    def __init__(self, mask: Tensor | None):
        super().__init__()
        self.mask = mask
        self.frames: list[_Frame] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the function; note a sum with a stream before it, since it may write into either."""
        op = op_name(func) if self.frames else ""
        following: list[_Frame] = []
        if op == "add" and len(args) == 2 and all(_floating(value) for value in args):
            for frame in self.frames:
                sides = [frame.holds(value) for value in args]
                # x + x is twice the stream, and a bias is no branch.
                if sum(sides) == 1 and args[0].shape == args[1].shape:
                    stream, branch = args if sides[0] else args[::-1]
                    frame.sums.append((self._mean_square(stream), self._mean_square(branch)))
                    following.append(frame)
        elif op in PASSED and args or op == "mul" and len(args) == 2 and any(_is_number(value) for value in args):
            following = [frame for frame in self.frames if any(frame.holds(value) for value in args)]
        output = func(*args, **(kwargs or {}))
        for frame in following:
            frame.held.append(output)
        return output

    @torch.no_grad()
    def _mean_square(self, x: Tensor) -> float:
        if self.mask is not None and x.ndim == 3 and x.shape[:2] == self.mask.shape:
            x = x[self.mask]
        return float(x.detach().double().square().mean())


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or isinstance(value, Tensor) and value.numel() == 1


# --- mathematics ------------------------------------------------------------------------------------


def rows(x: Tensor, channels: int, mask: Tensor | None = None) -> Tensor:
    """(positions, channels) in float64: every position of x that counts.

    Args:
        x: (n, ..., d), or (n, d, ...) with channels=1.
        channels: axis of d.
        mask: (n, t), False where a position of (n, t, d) does not count.
    """
    wide = x.detach().movedim(channels, -1).double()
    if mask is not None and wide.ndim == 3 and wide.shape[:2] == mask.shape:
        return wide[mask]
    return wide.reshape(-1, wide.shape[-1])


class Moments:
    """Mean and variance of channels over all positions of all batches, joined by Chan's rule."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0  # sum of squared distances from the mean, (d,)

    def add(self, x: Tensor) -> None:
        """Take in (positions, d)."""
        if not len(x):
            return
        mean = x.mean(0)
        apart, total = mean - self.mean, self.count + len(x)
        self.squares = self.squares + (x - mean).square().sum(0) + apart.square() * (self.count * len(x) / total)
        self.mean = self.mean + apart * (len(x) / total)
        self.count = total

    @property
    def variance(self) -> float:
        """mean over channels of the variance over positions."""
        return float(torch.as_tensor(self.squares).mean()) / self.count if self.count else float("nan")

    @property
    def squared_mean(self) -> float:
        """mean over channels of the squared mean over positions."""
        return float(torch.as_tensor(self.mean).square().mean()) if self.count else float("nan")


def losses(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every example, (n,): of its class, or the mean over the positions that count; in nats.

    Args:
        output: logits (n, k), or (n, t, k) where the target is (n, t).
        target: (n,) or (n, t).

    Raises:
        BadInput: the shapes do not fit, or a class is beyond the logits.
    """
    logits = output.flatten(1) if target.ndim == 1 else output
    if logits.shape[:-1] != target.shape or int(target.max()) >= logits.shape[-1]:
        raise BadInput(
            f"a model that gives {tuple(output.shape)} has no loss on targets {tuple(target.shape)} up to "
            f"{int(target.max())}: logits (n, k) and classes (n,), or (n, t, k) and (n, t), are needed"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = F.cross_entropy(wide.flatten(0, -2), target.flatten(), reduction="none", ignore_index=IGNORED)
    counts = (target != IGNORED).flatten(1).sum(1) if target.ndim > 1 else torch.ones_like(target)
    return each.view(len(target), -1).sum(1) / counts.clamp_min(1)
