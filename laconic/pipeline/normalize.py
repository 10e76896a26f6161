"""`normalize`: other norms in a model that is trained, exactly where that is possible, and trained on a little where not.

- "rmsnorm": exact where layer norms read a stream of their own (Pre-LN), see `laconic.norm.to_pre_rmsnorm`; a model that
  has RMSNorm loses its gains. Norms behind sums (BERT) are exchanged and the model is trained to say what it said.
- "crmsnorm": exact, or refused.
- "repbn": layer norms fade into batch norms, which are folded into the layers around them; where that cannot be, a product
  and a sum by channel stay.
- "none": layer norms are frozen one by one and folded away.

What is not exact is distilled from the model as it was, on the calibration split of the data, for a stated number of
optimizer steps. The result is an artifact that `laconic.load` opens.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.affine import as_affine
from laconic.core.fit import TrainTask, fit
from laconic.core.hooks import Hook, Run
from laconic.core.outputs import main_output
from laconic.core.passes import Context
from laconic.core.record import RENORM, Record, apply_records
from laconic.core.structure import Example, Structure
from laconic.errors import BadInput, LaconicError
from laconic.norm import (
    AdvanceNorms,
    FoldAffine,
    LayerNormRemover,
    RemovalSchedule,
    fading,
    fold_gains,
    to_pre_crmsnorm,
    to_pre_rmsnorm,
    to_prepbn,
)  # fmt: skip
from laconic.tasks import TASKS, Task, load_task, own_model
from laconic.tasks import compare as compare_evaluations

from .artifact import write_artifact_files
from .measure import latency_ms, machine, peak_rss, run_batch, versions
from .observe import innermost_module
from .source import Source, resolve
from .source_base import all_tensors, first_line, stored_names
from .tensorfile import SINGLE, TensorWriter
from .workspace import Workspace

__all__ = ["TARGETS", "normalize"]

TARGETS = ("rmsnorm", "crmsnorm", "repbn", "none")
TRAINED = ("repbn", "none")  # never exact
WARM, FADE = 0.1, 0.8  # shares of the steps: before a schedule begins, and until it ends


def normalize(
    model: Any,
    to: str,
    data: Any = None,
    *,
    out: str | os.PathLike[str],
    task: str | Task | None = None,
    columns: Mapping[str, str] | None = None,
    steps: int = 200,
    lr: float = 1e-4,
    batch: int | None = None,
    seq: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Exchange the norms of a model, write it to `out`, and say what that did to it.

    Args:
        model: a folder, a fetched name, `module:function`, or an `nn.Module`; None where `task` brings its own.
        to: of `TARGETS`.
        data: as `compress` takes it; needed for what is not exact, and used to measure with what is.
        out: folder of the artifact.
        task: instead of `data`, a task by name.
        columns: which column of the data is what.
        steps: of the optimizer, where training is needed.
        lr: its learning rate.
        batch, seq: examples in a batch and tokens in an example.
        seed: of every random choice.
        overwrite: replace `out` if it exists.
        trust_remote_code, allow_pickle, example: as in `resolve`.
        progress: is called with (stage, done, total).

    Returns:
        A record: `norms` (path -> what it is now), `left` (path -> why), `exact`, `relative_error` of the output on an
        example, `before` and `after` (metric, latency), `training`, and `folding`, None where nothing was to be folded:
        `folded` (path -> layers), `unfolded` (path -> why), `bound` (the largest of a layer, relative, see
        `laconic.core.affine.rounding_bound`) and `relative_error` (of the output, by folding alone).

    Raises:
        BadInput: no such target, a model that cannot be converted (with the module, the reason and the way out), data
            that is needed and missing, or too few steps for a schedule; nothing was written.
    """
    if to not in TARGETS:
        raise BadInput(f"norms cannot become {to!r}; there are {', '.join(TARGETS)}")
    if steps < 1 or not lr > 0:
        raise BadInput(f"steps={steps}, lr={lr}: both must be positive")
    if data is not None and task is not None:
        raise BadInput("both data and a task were given: a task brings its own data, so give one of them")
    begin = time.perf_counter()
    workspace = Workspace(out, overwrite=overwrite)
    source = resolve(
        _named(model, task), example=example, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    given = data if data is not None else task
    measured = None if given is None else load_task(given, source, columns, seed, batch=batch, seq=seq)
    if measured is None and to in TRAINED:
        raise BadInput(
            f"{to} changes what {source.name} computes, and the model must be trained on: name --data or --task"
        )
    show = progress or (lambda stage, done, total: None)
    net = source.load().eval()
    before = copy.deepcopy(net)
    surgery = _Surgery(net, before, source, measured, steps, lr, seed, batch, seq, show)
    surgery.perform(to)
    found = {
        "command": " ".join(sys.argv), "model": source.name, "class": type(net).__name__, "to": to, "seed": seed,
        "exact": surgery.training is None, "norms": surgery.norms, "left": surgery.left, "untied": surgery.untied,
        "training": surgery.training, "folding": surgery.folding, **_compared(source, before, net, measured, batch or 1, seq, seed, show),
        "bytes": [_bytes(before), _bytes(net)], "notes": [*source.notes, *surgery.notes],
    }  # fmt: skip
    _write(workspace, source, net, surgery.records, to)
    return found | {
        "out": str(workspace.out), "seconds": time.perf_counter() - begin, "peak_rss_bytes": peak_rss(), "machine": machine(),
        "versions": versions(),
    }  # fmt: skip


def _named(model: Any, task: str | Task | None) -> Any:
    if model is not None:
        return model
    if not isinstance(task, str):
        raise BadInput("no model was named: give a folder, a fetched name, module:function, or --task")
    brought = own_model(task)
    if brought is None:
        raise BadInput(f"{task} is not one of the tasks {', '.join(TASKS)}: give one of them, or a model")
    return brought


# --- the operation ----------------------------------------------------------------------------------


class _Surgery:
    """One model under the knife, and what was done to it.

    Attributes:
        norms: path -> what it is now.
        left: path -> why it stays.
        untied: names of parameters that are their own now.
        records: for the artifact.
        training: how it was trained on, or None.
        folding: what went into the layers around it, or None.
        notes: sentences.
    """

    def __init__(
        self, net: nn.Module, teacher: nn.Module, source: Source, task: Task | None, steps: int, lr: float, seed: int,
        batch: int | None, seq: int | None, show: Callable[[str, int, int], None],
    ):  # fmt: skip
        self.net, self.teacher, self.source, self.task = net, teacher, source, task
        self.steps, self.lr, self.seed, self.batch, self.seq, self.show = steps, lr, seed, batch, seq, show
        self.norms: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.untied: list[str] = []
        self.records: list[Record] = []
        self.training: dict[str, Any] | None = None
        self.folding: dict[str, Any] | None = None
        self.notes: list[str] = []

    def perform(self, to: str) -> None:
        """Exchange the norms."""
        layer_norms = {p: m for p, m in self.net.named_modules() if isinstance(m, nn.LayerNorm)}
        if not layer_norms and to != "rmsnorm":
            raise BadInput(
                f"{type(self.net).__name__} has no layer norm that could become {to}: --to rmsnorm folds the gains of RMSNorm"
            )
        if to == "rmsnorm":
            self._rms(layer_norms)
        elif to == "crmsnorm":
            self._took(to_pre_crmsnorm(self.net, self.source.example()))
        elif to == "repbn":
            self._repbn()
        else:
            self._none(len(layer_norms))

    def _took(self, done: Any) -> None:
        self.norms |= done.norms
        self.left |= done.left
        self.untied += done.untied
        self.records += done.records

    def _rms(self, layer_norms: Mapping[str, nn.Module]) -> None:
        example = self.source.example()
        if not layer_norms:
            done = fold_gains(self.net, example)
            if not done.norms:
                why = "; ".join(f"{path}: {reason}" for path, reason in list(done.left.items())[:2]) or "it has no norm"
                raise BadInput(f"no norm of {type(self.net).__name__} can be changed: {why}")
            self._took(done)
            return
        if any(not stream.reason for stream in Structure.build(self.net, example).streams):
            self._took(to_pre_rmsnorm(self.net, example))
        rest = {path: norm for path, norm in layer_norms.items() if path not in self.norms}
        plain = {path: norm for path, norm in rest.items() if type(norm) is nn.LayerNorm and norm.weight is not None}
        if not rest:
            return
        if self.task is None:
            path = next(iter(rest))
            if not self.norms:
                raise BadInput(
                    f"{path} of {type(self.net).__name__} cannot become RMSNorm exactly: "
                    f"{self.left.get(path, 'it reads no stream of its own')}; with --data it is exchanged and trained on"
                )
            self.notes.append(f"{len(rest)} norms stay, {path} for one: with --data they are exchanged and trained on")
            return
        record = _exchange({path: (norm, "rms") for path, norm in plain.items()})
        apply_records(self.net, [record])
        self.records.append(record)
        self.norms |= dict.fromkeys(plain, "rms (trained on)")
        self.left = {path: reason for path, reason in self.left.items() if path not in plain}
        self._distil(())

    def _repbn(self) -> None:
        warm = int(WARM * self.steps)
        changed = to_prepbn(self.net, max(1, int(FADE * self.steps) - warm), warm, alpha=0.0)
        norms: dict[str, Any] = dict(fading(self.net))
        for norm in norms.values():  # begin where the layer norm is
            with torch.no_grad():
                norm.new.weight.copy_(norm.old.weight)
                if norm.old.bias is not None:
                    norm.new.bias.copy_(norm.old.bias)
        self._distil((AdvanceNorms(),))
        records, self.folding = folded(self.net, tuple(norms), self.source.example())
        self.records += records
        self.norms |= dict.fromkeys(self.folding["folded"], "folded into the layers around (RepBN)")
        held = {}
        for path in self.folding["unfolded"]:
            affine = as_affine(norms[path])
            if affine is None:
                raise LaconicError(f"{path} is not affine after its schedule")
            held[path] = (affine, "none")
        if held:
            record = _exchange(held)
            apply_records(self.net, [record])
            self.records.append(record)
            self.norms |= dict.fromkeys(held, "a product and a sum by channel (RepBN)")
        self.left |= changed.left

    def _none(self, count: int) -> None:
        start = int(WARM * self.steps)
        gap = (int(FADE * self.steps) - start) // (count + 2)
        if gap < 1:
            need = int((count + 2) / (FADE - WARM)) + 2
            raise BadInput(f"{count} norms cannot go one by one in {self.steps} steps: give --steps {need} or more")
        schedule = RemovalSchedule(start, gap, gap, gap, 2 * gap)
        longest = max(2, _width(self._rows()))
        remover = LayerNormRemover(
            self.net, schedule, n_ctx=max(longest, _positions(self.net)), example=self.source.example()
        )
        self._distil((remover,))
        records = remover.fold()
        self.records += records
        self.untied += [name for record in records for name in record.data.get("untie", ())]
        self.norms |= {path: "folded away" for record in records for path in record.data.get("norms", ())}

    def _rows(self) -> Any:
        assert self.task is not None
        return self.task.rows("calibrate", self.seq)

    def _distil(self, hooks: tuple[Hook, ...]) -> None:
        assert self.task is not None
        lesson = _Lesson(self.task, self.teacher, self._rows(), self.batch or min(self.task.batch, 16))
        watch = _Shown(self.show)
        fit(
            self.net, lesson, torch.optim.AdamW(self.net.parameters(), self.lr, weight_decay=0.0), steps=self.steps,
            hooks=(*hooks, watch), seed=self.seed, clip=1.0, quiet=True, device="cpu",
        )  # fmt: skip
        self.net.eval()
        self.training = {
            "steps": self.steps, "lr": self.lr, "batch": lesson.batch_size, "examples": len(lesson.rows),
            "loss_first": watch.first, "loss_last": watch.last,
        }  # fmt: skip


@torch.no_grad()
def folded(net: nn.Module, paths: Iterable[str], example: Example) -> tuple[list[Record], dict[str, Any]]:
    """Fold the affine norms at `paths` into the layers around them, in place, where that can be.

    Args:
        net: in evaluation mode.
        paths: of norms whose schedules have ended.
        example: (args, kwargs) of one call.

    Returns:
        The records, and `folding` of `normalize`.
    """
    args, kwargs = example
    want = main_output(net(*args, **kwargs))
    method, ctx = FoldAffine(), Context(net, Structure.build(net, example))
    decision = method.plan(ctx.structure, net)
    records: list[Record] = []
    unfolded: dict[str, str] = {}
    for path in paths:
        if path in decision.units:
            records.append(method.solve(path, decision, ctx))
            method.apply(net, records[-1])
        else:
            unfolded[path] = decision.skipped.get(path, "the example does not reach it")
    got = main_output(net(*args, **kwargs))
    layers = {record.path: record.data["layers"] for record in records}
    return records, {
        "folded": {path: [layer["path"] for layer in into] for path, into in layers.items()}, "unfolded": unfolded,
        "bound": max((layer["bound"] for into in layers.values() for layer in into), default=0.0),
        "relative_error": float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)),
    }  # fmt: skip


def _exchange(norms: Mapping[str, tuple[Any, str]]) -> Record:
    """A record that puts a norm of another kind, with these gains and biases, at each path."""
    said: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path, (held, kind) in norms.items():
        gain: Any = held.weight if isinstance(held, nn.Module) else held.scale
        bias: Any = held.bias if isinstance(held, nn.Module) else held.shift
        eps = float(getattr(held, "eps", 0.0))
        said[path] = {"kind": kind, "width": len(gain), "eps": eps, "affine": True, "bias": bias is not None}
        tensors[f"{path}.weight"] = gain.detach().clone()
        if bias is not None:
            tensors[f"{path}.bias"] = bias.detach().clone()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    data = {"pass": "normalize", "method": "normalize", "norms": said, "shapes": shapes}
    return Record(RENORM, next(iter(norms)), data, tensors)


class _Rows:
    """The rows of a batch, by index."""

    deterministic = True

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())) if isinstance(self.rows, Mapping) else self.rows[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.rows, Mapping):
            return {name: value[index] for name, value in self.rows.items()}
        return tuple(value[index] for value in self.rows)


class _Lesson(TrainTask):
    """Saying what another model says: the squared error of the output, relative to its square."""

    def __init__(self, task: Task, teacher: nn.Module, rows: Any, batch_size: int):
        self.id, self.metric = f"{task.id} (distilled)", task.metric
        self.task, self.teacher, self.rows = task, teacher.eval(), _Rows(rows)
        self.batch_size = min(batch_size, len(self.rows))

    def train_data(self) -> _Rows:
        return self.rows

    def model(self, seed: int) -> nn.Module:
        return self.teacher

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            want = self.task.forward(self.teacher, batch)
        got = self.task.forward(model, batch)
        return (got - want).float().square().sum() / want.float().square().sum().clamp_min(1e-12)

    def evaluate(self, model: nn.Module, split: str = "select") -> Any:
        return self.task.evaluate(model, split)


class _Shown(Hook):
    """Progress, and the losses of the first and the last step."""

    def __init__(self, show: Callable[[str, int, int], None]):
        self.show = show
        self.first: float | None = None
        self.last: float | None = None

    def step(self, run: Run) -> None:
        self.last = run.loss
        self.first = run.loss if self.first is None else self.first
        self.show("train on", run.clock.step, run.clock.total)


def _width(rows: Any) -> int:
    value = next(iter(rows.values())) if isinstance(rows, Mapping) else rows[0]
    return value.shape[1] if value.ndim == 2 else 0


def _positions(net: nn.Module) -> int:
    config = getattr(net, "config", None)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2 + 2  # with a class token, and one for a distilled head
    found = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings"))
    return next((int(value) for value in found if value), 0)


# --- before and after -------------------------------------------------------------------------------


def _compared(
    source: Source, before: nn.Module, after: nn.Module, task: Task | None, batch: int, seq: int | None, seed: int,
    show: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """The error of the output, the metric on the verify split, and latency, of both models."""
    args, kwargs = source.example()
    runs: dict[str, Callable[[], Any]]
    one: Any = None
    if task is not None:
        try:
            one = task.batches("verify", batch=batch, seq=seq, limit=batch)[0]
        except (BadInput, NotImplementedError, IndexError):
            one = None
    with torch.inference_mode():
        if one is not None and task is not None:
            want, got = run_batch(task, before, one), run_batch(task, after, one)
            runs = {"before": lambda: run_batch(task, before, one), "after": lambda: run_batch(task, after, one)}
        else:
            want, got = (main_output(model(*args, **kwargs)) for model in (before, after))
            runs = {"before": lambda: before(*args, **kwargs), "after": lambda: after(*args, **kwargs)}
        error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
        times = latency_ms(runs)
    record: dict[str, Any] = {
        "relative_error": error, "metric": None, "before": {"value": None, "latency_ms": times["before"]},
        "after": {"value": None, "latency_ms": times["after"]},
        "latency_ratio": times["before"] / times["after"] if times["after"] else None,
    }  # fmt: skip
    if task is not None:
        evaluations: list[Any] = []
        for name, net in (("before", before), ("after", after)):
            try:
                evaluations.append(task.evaluate(net, "verify", functools.partial(show, name)))
            except LaconicError:
                raise
            except Exception as error_:  # whatever the forward of a model raises is its message
                where = innermost_module(net, error_)
                raise BadInput(f"{source.name} fails on {task.id}{where}: {first_line(error_)}") from error_
        found = compare_evaluations(evaluations[0], evaluations[1], task.metric, seed)
        record["metric"] = task.metric.name
        record["before"]["value"], record["after"]["value"] = found.before, found.after
        low, high = found.span
        record |= {"drop": found.drop, "drop_low": low, "drop_high": high}
    return record


def _bytes(net: nn.Module) -> int:
    tensors = all_tensors(net)
    return sum(tensors[name].numel() * tensors[name].element_size() for name in stored_names(net))


def _write(workspace: Workspace, source: Source, net: nn.Module, records: list[Record], to: str) -> None:
    tensors = all_tensors(net)
    names = stored_names(net)
    workspace.open(_bytes(net))
    specs = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    with TensorWriter(workspace.partial / SINGLE, specs, {"format": "pt"}) as writer:
        for name in names:
            writer.write(name, tensors[name].detach())
    write_artifact_files(
        workspace.partial, source=source, records=records, recipe_text=f"normalize: {to}\n", versions=versions()
    )
    workspace.finish()
