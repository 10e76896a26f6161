"""`Distill`: hangs a teacher on a training; what a student's modules give is matched to what the teacher's give.

The loss of a step becomes

    task_weight * L + sum_m weight_m * loss_m(student_m, teacher_m)

where L is the task's and each `Match` m names a module of either network whose output is compared. The teacher is
called with exactly the arguments that the student was called with, so both see the same augmentation. It runs in
evaluation mode and without gradients. Losses with parameters of their own (adapters) are trained with the student, by
its optimizer, and never become a part of it: what is saved of the student holds none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laconic.core.hooks import Hook, Run
from laconic.errors import BadInput


@dataclass(frozen=True)
class Match:
    """Two outputs that are to become alike.

    Attributes:
        loss: of (the student's, the teacher's) output; a mean over examples.
        weight: of this loss in the sum.
        student: path of the student's module; "" is the whole network.
        teacher: path of the teacher's module; the same path by default.
        pick: makes a tensor of what a module returned; by default a tensor as it is, `.logits` where there are any, or
            the first of a tuple.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0
    student: str = ""
    teacher: str | None = None
    pick: Callable[[Any], Tensor] | None = None

    @property
    def taught(self) -> str:
        """Path of the teacher's module."""
        return self.student if self.teacher is None else self.teacher

    def tensor(self, output: Any) -> Tensor:
        """What is compared, of a module's output."""
        if self.pick is not None:
            return self.pick(output)
        if isinstance(output, Tensor):
            return output
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return logits
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            return output[0]
        raise BadInput(f"{self.student or 'the model'} returns {type(output).__name__}: give Match(pick=...)")


@dataclass
class _Taps:
    """Outputs of some modules in the latest call, by path."""

    seen: dict[str, Any] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def put(self, model: nn.Module, paths: Sequence[str], whose: str, only_training: bool) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for path in dict.fromkeys(paths):
            if path not in modules:
                raise BadInput(f"the {whose} has no module {path!r} to match; it has {_some(modules)}")

            def keep(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                if torch.is_grad_enabled() or not only_training:
                    self.seen[path] = output

            self.handles.append(modules[path].register_forward_hook(keep))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.seen.clear()


class Distill(Hook):
    """The hook.

    Args:
        teacher: moved to the student's device; its modes come back at the end.
        matches: what to compare.
        task_weight: of the task's own loss; 0 trains on the teacher alone.

    Raises:
        BadInput: nothing to compare.
    """

    def __init__(self, teacher: nn.Module, matches: Sequence[Match], *, task_weight: float = 1.0):
        if not matches:
            raise BadInput("Distill: give one Match at least")
        self.teacher, self.matches, self.task_weight = teacher, tuple(matches), task_weight
        self._student, self._taught = _Taps(), _Taps()
        self._call: tuple[tuple, dict[str, Any]] | None = None
        self._modes: list[tuple[nn.Module, bool]] = []

    def start(self, run: Run) -> None:
        self._let_go()
        self._student.put(run.model, [match.student for match in self.matches], "student", only_training=True)
        self._taught.put(self.teacher, [match.taught for match in self.matches], "teacher", only_training=False)
        self._student.handles.append(run.model.register_forward_pre_hook(self._keep_call, with_kwargs=True))
        self._modes = [(module, module.training) for module in self.teacher.modules()]
        self.teacher.to(run.device).eval()
        for match in self.matches:
            if isinstance(match.loss, nn.Module):
                match.loss.to(run.device).train()
        # Into a group that is there: schedules have counted the groups already.
        group = run.optimizer.param_groups[0]["params"]
        held = {id(p) for g in run.optimizer.param_groups for p in g["params"]}
        group.extend(p for p in self._adapters() if id(p) not in held)
        if run.world > 1:
            for p in self._adapters():
                torch.distributed.broadcast(p.detach(), 0)

    def loss(self, run: Run, loss: Tensor, batch: Any, output: Any) -> Tensor:
        if self._call is None:
            raise BadInput("Distill: the task's loss does not call the model, so the teacher cannot be asked the same")
        args, kwargs = self._call
        with torch.no_grad():
            self.teacher(*args, **kwargs)
        total, parts = self.task_weight * loss, {}
        for i, match in enumerate(self.matches):
            missing = [path for path, taps in ((match.student, self._student), (match.taught, self._taught))
                       if path not in taps.seen]  # fmt: skip
            if missing:
                raise BadInput(f"{missing[0]} was not called, so its output cannot be matched")
            student, teacher = self._student.seen[match.student], self._taught.seen[match.taught]
            value = match.loss(match.tensor(student), match.tensor(teacher).detach())
            parts[f"match_{i}"] = float(value.detach())
            total = total + match.weight * value
        run.log(task_loss=float(loss.detach()), **parts)
        self._forget()
        return total

    def gradients(self, run: Run) -> None:
        if run.world > 1:  # the student's gradients are shared by its wrapper, which knows of no adapters
            for p in self._adapters():
                if p.grad is not None:
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= run.world

    def end(self, run: Run) -> None:
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": [m.loss.state_dict() if isinstance(m.loss, nn.Module) else {} for m in self.matches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for match, kept in zip(self.matches, state["losses"], strict=True):
            if isinstance(match.loss, nn.Module):
                match.loss.load_state_dict(kept)

    def _adapters(self) -> Iterator[nn.Parameter]:
        for loss in dict.fromkeys(match.loss for match in self.matches):
            if isinstance(loss, nn.Module):
                yield from (p for p in loss.parameters() if p.requires_grad)

    def _keep_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._call = args, kwargs

    def _forget(self) -> None:
        """Outputs hold the graph: let them go with the step."""
        self._call = None
        self._student.seen.clear()
        self._taught.seen.clear()

    def _let_go(self) -> None:
        self._student.remove()
        self._taught.remove()
        self._call = None
        for module, mode in self._modes:
            module.training = mode
        self._modes = []


def regressor(student: int, teacher: int, places: int = 0, *, norm: bool = False) -> nn.Module:
    """An adapter from features of `student` channels to those of `teacher` channels, as in FitNets.

    Args:
        student: channels.
        teacher: channels.
        places: axes after the channels, 0 to 3: 0 is a linear layer over the last axis, 2 a 1 x 1 convolution.
        norm: batch normalization after it, for `places` above 0.
    """
    if not 0 <= places <= 3 or (norm and not places):
        raise ValueError(f"regressor: places={places}, norm={norm}: places is 0 to 3, and norm needs one at least")
    if not places:
        return nn.Linear(student, teacher)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[places - 1](student, teacher, 1, bias=not norm)
    return nn.Sequential(conv, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[places - 1](teacher)) if norm else conv


def layer_map(student: int, teacher: int, what: str = "hidden") -> list[tuple[int, int]]:
    """Which of the teacher's layers each of the student's is matched with, as in TinyBERT.

    Args:
        student: layers of the student.
        teacher: layers of the teacher, a multiple of them.
        what: "hidden" states, where 0 is what the embeddings give, or "attention" maps.

    >>> layer_map(2, 6), layer_map(2, 6, "attention")
    ([(0, 0), (1, 3), (2, 6)], [(0, 2), (1, 5)])
    """
    if student < 1 or teacher % student or what not in ("hidden", "attention"):
        raise ValueError(f"layer_map({student}, {teacher}, {what!r}): layers that divide, and 'hidden' or 'attention'")
    step = teacher // student
    if what == "hidden":
        return [(i, i * step) for i in range(student + 1)]
    return [(i, (i + 1) * step - 1) for i in range(student)]


def _some(modules: Mapping[str, nn.Module]) -> str:
    names = [name for name in modules if name]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


CARD = None  # what distilling methods share; it is none itself
