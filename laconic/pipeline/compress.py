"""`compress`: plan, measure, decide, solve, write, verify, report.

The road, and where each step lives: the source of the model (`source`), its structure (`laconic.core`), units and their
options (`units`), the plan (`plan`), sensitivity and allocation (`decide`), solving (`solve`), the artifact
(`artifact`), loading it back (`load`), and the paired comparison on the verify split (`laconic.tasks`).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.record import FOLD, Record
from laconic.core.structure import Structure
from laconic.errors import BadInput, Impossible, LaconicError
from laconic.kernels import native
from laconic.nn import storage_names
from laconic.numerics import Scheme
from laconic.tasks import Comparison, Evaluation, Task, load_task
from laconic.tasks import compare as compare_evaluations

from .budget import Budget, parse_budget, parse_bytes
from .decide import choose, fisher, option_costs
from .measure import latency_ms, machine, peak_rss, run_batch, versions
from .plan import METADATA, RUNTIME, Ground, check_possible, other_tensors, plan_record
from .recipe import Recipe, load_recipe
from .solve import Solving, solve
from .source import Source, check_finite, resolve
from .source_base import bytes_of
from .stream import check_weights, solve_streamed
from .tensorfile import TensorWriter, tensor_digest
from .units import find_units
from .workspace import Workspace, digest, write_whole

CALIBRATION_TOKENS = 16384  # positions that calibration sees; more helps little and costs time in proportion
SENSITIVITY_TOKENS = 4096
TRIED = (1.0, 0.85, 0.7, 0.55)  # shares of the byte ceiling at which plans are tried on the select split
LADDER = (3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)  # ratios tried where only the drop is bounded, while it holds
RETREAT = (3.0, 2.5, 2.0, 1.5)  # and where it does not hold at the first of them
QUICK = 10.0  # seconds: a select evaluation slower than this is not repeated for the sake of the plot

Progress = Callable[[str, int, int], None]


@dataclass
class Result:
    """What came of a compression.

    Attributes:
        out: the artifact's folder.
        record: everything measured, as written to report.json.
        exit_code: 0 met, 3 missed.
    """

    out: Path
    record: dict[str, Any]
    exit_code: int

    def __getattr__(self, name: str) -> Any:
        """Figures of the JSON line: `result.ratio`, `result.drop`, `result.met` ..."""
        from laconic.report import json_line

        fields = json.loads(json_line(self.__dict__["record"])) if "record" in self.__dict__ else {}
        if name in fields:
            return fields[name]
        raise AttributeError(name)


@dataclass
class Options:
    """Options of `compress` beyond model, data and budget."""

    recipe: Recipe = field(default_factory=Recipe)
    max_ram: int | None = None
    seed: int = 0
    resume: bool = False
    batch: int | None = None
    seq: int | None = None
    exclude: Sequence[str] = ()
    keep: Sequence[str] = ()
    overwrite: bool = False
    min_coverage: float = 0.0
    trust_remote_code: bool = False
    allow_pickle: bool = False
    command: str = ""


def compress(
    model: Any,
    data: Any = None,
    budget: str | Budget | None = None,
    *,
    out: str | os.PathLike[str],
    task: str | Task | None = None,
    columns: Mapping[str, str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    max_ram: str | int | None = None,
    seed: int = 0,
    resume: bool = False,
    batch: int | None = None,
    seq: int | None = None,
    threads: int | None = None,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    device: str = "cpu",
    overwrite: bool = False,
    min_coverage: float = 0.0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    progress: Progress | None = None,
) -> Result:
    """Compress a model within a budget, write the artifact to `out`, and say what was measured.

    Args:
        model: a folder, a fetched name, `module:function`, or an `nn.Module`; None where `task` brings its own.
        data: a file, a folder of images, the name of a task, or something that scores a model. Without data only
            data-free methods are used and no quality is claimed.
        budget: as `"size=4x, drop=1"`; "size=4x" by default.
        out: folder of the artifact; work goes to `out` + ".partial" until it is complete.
        task: instead of `data`, a task by name or a `Task`.
        columns: which column of the data is what.
        recipe: passes and options; the one that an artifact carries gives that artifact again.
        max_ram: bound on peak resident memory, as "8GB".
        seed: of every random choice.
        resume: go on where an earlier run was stopped.
        batch, seq: examples in a batch and tokens in an example, for calibration and latency.
        threads: torch threads.
        exclude, keep: patterns of parameters that no pass may touch, and that stay float.
        device: "cpu".
        overwrite: replace `out` if it exists.
        min_coverage: fail if a smaller share of the elements was packed.
        trust_remote_code, allow_pickle: as in `resolve`.
        example: inputs for tracing, for an `nn.Module`.
        progress: is called with (stage, done, total).

    Raises:
        BadInput: something given cannot be worked with; nothing was written.
        Impossible: the budget is out of reach of the model's shapes; nothing was written.
    """
    _check_device(device)
    if threads:
        torch.set_num_threads(threads)
    options = Options(
        load_recipe(recipe), _ram(max_ram), seed, resume, batch, seq, exclude, keep, overwrite, min_coverage,
        trust_remote_code, allow_pickle, " ".join(map(shlex.quote, sys.argv)),
    )  # fmt: skip
    run = _Run(options, parse_budget(budget), progress or (lambda stage, done, total: None))
    workspace = Workspace(out, resume=resume, overwrite=overwrite)
    if data is not None and task is not None:
        raise BadInput("both data and a task were given: a task brings its own data, so give one of them")
    _check_apart(workspace.out, model, data)
    run.prepare(model, data if data is not None else task, columns, example)
    return run.execute(workspace)


def plan(
    model: Any,
    data: Any = None,
    budget: str | Budget | None = None,
    *,
    task: str | Task | None = None,
    columns: Mapping[str, str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    max_ram: str | int | None = None,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    **ignored: Any,
) -> dict[str, Any]:
    """What `compress` would do, from shapes alone: sizes, memory, time, kernel and reason per unit. Writes nothing.

    Raises:
        Impossible: the budget is out of reach; the message has the least figure.
    """
    options = Options(load_recipe(recipe), _ram(max_ram), exclude=exclude, keep=keep)
    options.trust_remote_code, options.allow_pickle = trust_remote_code, allow_pickle
    run = _Run(options, parse_budget(budget), lambda stage, done, total: None)
    run.check_budget(data is not None or task is not None)
    source = run.find_source(model, data if data is not None else task, example)
    ground = run.ground_on_meta(source)
    ceiling = check_possible(ground, run.budget)
    fixed = run.fixed(ground)
    decision = fixed or _by_shape(ground, ceiling if ceiling is not None else source.size_before // 4)
    return plan_record(ground, run.budget, ceiling, decision, CALIBRATION_TOKENS if data or task else 0)


class _Run:
    """One compression, step by step."""

    def __init__(self, options: Options, budget: Budget, progress: Progress):
        self.options, self.budget, self.progress = options, budget, progress
        self.begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.task: Task | None = None
        self.notes: list[str] = []
        self.tried: list[dict[str, Any]] = []

    # --- what was given ---------------------------------------------------------------------------------------------

    def prepare(self, model: Any, data: Any, columns: Mapping[str, str] | None, example: Any) -> None:
        """Find the model and the data, and refuse what cannot be done before anything is written."""
        self.check_budget(data is not None)
        with self.stage("read"):
            source = self.find_source(model, data, example)
            meta = self.ground_on_meta(source)
            streamed = self._must_stream(meta)
            if streamed and meta.folded:  # folding needs the values of whole layers
                meta = self._ground(source, source.skeleton())
            self.ceiling = check_possible(meta, self.budget)
            self.fixed(meta)
            if data is not None:
                self.task = load_task(
                    data, source, columns, self.options.seed, batch=self.options.batch, seq=self.options.seq
                )
                self.notes += self.task.notes
            if streamed:
                check_weights(source)
            self.ground = meta if streamed else self.ground_in_memory(source)
            self.ground.streamed = streamed
        if self.task is not None and not streamed:
            self._try_forward()

    def check_budget(self, has_data: bool) -> None:
        """Refuse what no plan can promise."""
        if self.budget.latency:
            raise BadInput(
                "a latency ceiling needs fast low-bit kernels, which this version does not have yet: leave latency out "
                "of the budget (it is measured and reported anyway)"
            )
        if self.budget.memory:
            raise BadInput("memory is measured and reported, not yet a ceiling: leave it out, or bound the size")
        if self.budget.drop is not None and not has_data:
            raise BadInput("a drop can only be held on data: pass --data or --task, or leave drop out of the budget")

    def find_source(self, model: Any, data: Any, example: Any) -> Source:
        """The model's source; a task named alone brings its own."""
        if model is None:
            name = _own_model(data)
            if name is None:
                raise BadInput("no model was named: give a folder, a fetched name, module:function, or a task with its own")
            model = name
        o = self.options
        return resolve(model, example=example, trust_remote_code=o.trust_remote_code, allow_pickle=o.allow_pickle)

    def ground_on_meta(self, source: Source) -> Ground:
        """The model's units from shapes alone."""
        return self._ground(source, source.skeleton(), fold=self.options.recipe.fold)

    def ground_in_memory(self, source: Source) -> Ground:
        """The float model, checked and with batch norms folded."""
        model = source.load()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            check_finite(name, tensor)
        return self._ground(source, model, fold=self.options.recipe.fold)

    def _fold(self, structure: Structure, model: nn.Module) -> list[tuple[str, str]]:
        from laconic.norm import fold_batchnorm, foldable
        from laconic.pipeline.units import matches

        folded = []
        for layer, norm, reason in foldable(structure, model):
            touched = [f"{path}.weight" for path in (layer, norm)]
            if reason:
                note = f"{norm} was not folded: {reason}"
                self.notes += [note] if note not in self.notes else []
            elif not any(matches(p, name) for p in self.options.exclude for name in touched):
                fold_batchnorm(model, layer, norm)
                folded.append((layer, norm))
        return folded

    def _ground(self, source: Source, model: nn.Module, fold: bool = False) -> Ground:
        structure = Structure.build(model, source.example())
        folded = self._fold(structure, model) if fold else []
        if folded:
            structure = Structure.build(model, source.example())
        step = self.options.recipe.quantize
        bits = step.bits if step else ()
        units = find_units(model, structure, keep=self.options.keep, exclude=self.options.exclude, bits=bits)
        return Ground(source, model, structure, units, other_tensors(model, units), False, folded)

    def _must_stream(self, meta: Ground) -> bool:
        if self.options.max_ram is None:
            return False
        floats = sum(u.nbytes for u in meta.units)
        if self.options.max_ram < RUNTIME + (150 << 20):
            raise BadInput(
                f"--max-ram is {self.options.max_ram:,} bytes; Python, torch and transformers alone take about "
                f"{RUNTIME:,}, so at least {RUNTIME + (150 << 20):,} are needed"
            )
        return RUNTIME + 4 * floats > self.options.max_ram

    def _try_forward(self) -> None:
        """A forward that fails on the data fails now, with the place."""
        assert self.task is not None
        if "calibrate" not in self.task.splits:
            return  # a scoring function without inputs: nothing to run
        try:
            batches = self.task.batches("calibrate", limit=1)
            if batches:
                run_batch(self.task, self.ground.model, batches[0])
        except LaconicError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises is their message
            where = _innermost_module(self.ground.model, error)
            raise BadInput(
                f"the model's forward fails on the data{where}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error

    # --- the work ---------------------------------------------------------------------------------------------------

    def execute(self, workspace: Workspace) -> Result:
        """Decide, solve, write, verify, report."""
        ceiling = self.ceiling if self.ceiling is not None else self.ground.source.size_before // 4
        workspace.open(2 * ceiling)  # the records of solved units, and the file
        try:
            return self._execute(workspace)
        except BadInput:
            workspace.abandon()
            raise

    def _execute(self, workspace: Workspace) -> Result:
        ground = self.ground
        with self.stage("hash"):
            digests = self._digests()
            identity = digest(
                "run", 1, digests, self.budget.text, self.options.recipe.model_dump(), self.options.seed,
                list(self.options.keep), list(self.options.exclude), self._data_digest(), torch.__version__,
                torch.get_num_threads(), self.options.batch, self.options.seq, ground.streamed,
            )  # fmt: skip
        decision, method = self._decide(workspace, identity)
        coverage = self._coverage(decision)
        if coverage < self.options.min_coverage:
            raise BadInput(
                f"coverage is {coverage:.3f}, below --min-coverage {self.options.min_coverage}: the ledger of `laconic plan` "
                "says what is left alone and why"
            )
        with self.stage("solve"):
            packed = self._solve(workspace, decision, method, digests, identity)
        records = [Record(FOLD, layer, {"norm": norm}) for layer, norm in ground.folded] + packed
        with self.stage("write"):
            self._write(workspace, decision, records, method)
        return self._verify(workspace, decision, records, coverage, method)

    def _decide(self, workspace: Workspace, identity: str) -> tuple[dict[str, Scheme | None], str]:
        step = self.options.recipe.quantize
        method = step.method if step and self.task is not None and not self.ground.streamed and self._batches("calibrate", 1) else "rtn"
        kept = workspace.read_json("decision.json")
        if kept is not None and kept.get("identity") == identity:
            self.tried = kept["tried"]
            self.notes += kept["notes"]
            units = kept["units"]
            in_order = [u.name for u in self.ground.units if u.name in units]
            return {n: Scheme.parse(units[n]) if units[n] else None for n in in_order}, kept["method"]
        before = len(self.notes)
        with self.stage("decide"):
            if step is None:
                decision: dict[str, Scheme | None] = {}
            else:
                decision = self.fixed(self.ground) or self._allocate()
        workspace.write_json(
            "decision.json",
            {
                "identity": identity, "method": method, "budget": self.budget.text, "ceiling": self.ceiling,
                "units": {n: str(s) if s is not None else None for n, s in decision.items()},
                "tried": self.tried, "notes": self.notes[before:], "machine": machine(), "seconds": self.seconds,
            },
        )  # fmt: skip
        return decision, method

    def fixed(self, ground: Ground) -> dict[str, Scheme | None] | None:
        """The decision that the recipe states, if it states one."""
        step = self.options.recipe.quantize
        units = step.units if step else None
        if not units:
            return None
        known = {u.name: u for u in ground.units}
        strange = sorted(set(units) - set(known))
        if strange:
            raise BadInput(f"the recipe names {strange[0]!r}, which {ground.source.name} does not have")
        return {n: Scheme.parse(s) if (s := units[n]) and u.options else None for n, u in known.items() if n in units}

    def _allocate(self) -> dict[str, Scheme | None]:
        ground, seed = self.ground, self.options.seed
        weights = None
        batches = self._batches("calibrate", SENSITIVITY_TOKENS, batch=4) if not ground.streamed else []
        if batches:
            try:
                weights = fisher(
                    ground.model, self.task, batches, ground.units, seed, lambda d, t: self.progress("sensitivity", d, t)
                )
            except (RuntimeError, NotImplementedError) as error:
                self.notes.append(f"sensitivity is that of the weights alone: no gradient ({str(error).splitlines()[0]})")
        read = ground.source.read if ground.streamed else lambda name: ground.model.get_parameter(name)
        if ground.streamed:
            read = _sampled(ground)
        costs = option_costs(read, weights, ground.units, lambda d, t: self.progress("options", d, t))
        if self.task is None or ground.streamed or "select" not in self.task.splits:
            return _fit(ground, costs, self.ceiling if self.ceiling is not None else ground.source.size_before // 4)
        return self._try_plans(costs)

    def _try_plans(self, costs: dict[str, list[float]]) -> dict[str, Scheme | None]:
        """Measure plans, rounded to nearest, on the select split; the one to solve."""
        assert self.task is not None
        ground, least = self.ground, self.ground.least()
        start = time.perf_counter()
        self.select_before = self.task.evaluate(ground.model, "select")
        once = time.perf_counter() - start
        original = {u.name: ground.model.get_parameter(u.name).detach().clone() for u in ground.packable}

        def attempt(ceiling: int) -> tuple[dict[str, Scheme | None], bool]:
            """The cheapest plan under a ceiling, and whether its drop is allowed."""
            self.progress("try", len(self.tried), len(TRIED) if self.ceiling is not None else len(LADDER))
            decision = _fit(ground, costs, ceiling)
            self._round(decision, original)
            found = compare_evaluations(
                self.select_before, self.task.evaluate(ground.model, "select"), self.task.metric, self.options.seed
            )
            size = ground.layout(decision).total_bytes
            self._tried(f"rounded, {ground.source.size_before / size:.2f}x", size, found, "select")
            return decision, found.drop <= (self.budget.drop or 0.0)

        if self.ceiling is not None:
            ceilings = [int(self.ceiling * share) for share in TRIED[: len(TRIED) if once < QUICK else 1]]
            chosen = [attempt(ceiling)[0] for ceiling in ceilings if ceiling >= least][0]
        else:
            up, down = ([int(ground.source.size_before / r) for r in ratios] for ratios in (LADDER, RETREAT))
            chosen = _smallest(attempt, [c for c in up if c >= least], [c for c in down if c >= least] or [least])
        self._restore(original)
        return chosen

    def _round(self, decision: Mapping[str, Scheme | None], original: dict[str, Tensor]) -> None:
        from laconic.nn import matrix_view, restore_view
        from laconic.numerics import fake_quantize

        for unit in self.ground.packable:
            scheme = decision.get(unit.name)
            value = original[unit.name]
            if scheme is not None:
                matrix = fake_quantize(matrix_view(value, unit.view), scheme, unit.name)
                value = restore_view(matrix, unit.spec(scheme))
            self.ground.model.get_parameter(unit.name).data.copy_(value)

    def _restore(self, original: dict[str, Tensor]) -> None:
        for name, value in original.items():
            self.ground.model.get_parameter(name).data.copy_(value)

    def _tried(self, name: str, size: int, found: Comparison, split: str, chosen: bool = False) -> None:
        low, high = _interval(found, self.task.metric if self.task else None)
        self.tried.append(
            {"name": name, "size": size, "drop": found.drop, "low": low, "high": high, "split": split, "chosen": chosen}
        )

    def _solve(
        self, workspace: Workspace, decision: dict[str, Scheme | None], method: str, digests: dict[str, str], identity: str
    ) -> list[Record]:
        ground = self.ground
        report = lambda done, total, name: self.progress("solve", done, total)  # noqa: E731
        if ground.streamed:
            return solve_streamed(ground, decision, workspace, digests, self.options.max_ram, report)
        batches = self._batches("calibrate", CALIBRATION_TOKENS, batch=8) if method == "gptq" else []
        if not batches:
            method = "rtn"
        if self.task is not None:
            self._measure_float()
        self.histograms = self._histograms(decision, batches[:1])
        key = digest(identity, {n: str(s) for n, s in decision.items()}, native.load() is not None)
        job = Solving(
            ground.model, self.task, batches, ground.units, decision, ground.structure, workspace, key, digests, method, report
        )
        return solve(job)

    def _measure_float(self) -> None:
        """The float model on the verify split, while it is still float: read once, at the end, by the packed one."""
        assert self.task is not None
        if "verify" in self.task.splits:
            with self.stage("verify float"):
                self.before = self.task.evaluate(
                    self.ground.model, "verify", lambda d, t: self.progress("verify float", d, t)
                )

    def _histograms(self, decision: Mapping[str, Scheme | None], batches: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """Histograms of weights and of inputs of every packed unit."""
        found: dict[str, dict[str, Any]] = {}
        handles = []
        for unit in self.ground.packable:
            if decision.get(unit.name) is None:
                continue
            entry = found[unit.name] = {"histogram": histogram(self.ground.model.get_parameter(unit.name)), "activation": None}
            if unit.op in ("linear", "conv") and batches:
                module = self.ground.model.get_submodule(unit.name.rpartition(".")[0])
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, args, e=entry: e.__setitem__("activation", histogram(args[0])) if args else None
                    )
                )
        try:
            for batch in batches:
                run_batch(self.task, self.ground.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _write(
        self, workspace: Workspace, decision: Mapping[str, Scheme | None], records: list[Record], method: str
    ) -> None:
        from .artifact import write_artifact_files

        ground = self.ground
        packed = {r.path: r for r in records if r.action != FOLD}
        recipe = self.options.recipe.with_units(dict(decision), method)
        with TensorWriter(workspace.partial / "model.safetensors", ground.specs(decision), METADATA) as writer:
            for unit in ground.units:
                record = packed.get(unit.name)
                if record is None:
                    writer.write(unit.name, self._float(unit.name))
                    continue
                tensors = record.tensors or workspace.read(record.data["key"]) or {}
                for suffix, name in storage_names(unit.name, record.spec).items():
                    writer.write(name, tensors[suffix])
            for name in ground.others:
                writer.write(name, self._float(name))
            self.header, self.padding = writer.header_bytes, writer.padding_bytes
        self.ledger = self._ledger(decision, packed)
        total = sum(row["bytes"] for row in self.ledger) + self.header + self.padding
        self.size_after = (workspace.partial / "model.safetensors").stat().st_size
        if total != self.size_after:
            raise LaconicError(f"the ledger sums to {total:,} bytes and the file has {self.size_after:,}: this is a defect")
        write_whole(workspace.partial / "recipe.yaml", recipe.to_yaml().encode())
        for record in records:
            record.data.pop("key", None)
        write_artifact_files(workspace.partial, source=ground.source, records=records, ledger=self.ledger, versions=versions())

    def _float(self, name: str) -> Tensor:
        """A tensor that is left as it is."""
        if self.ground.streamed:
            return self.ground.source.read(name)
        from .source_base import all_tensors

        return all_tensors(self.ground.model)[name].detach()

    def _ledger(self, decision: Mapping[str, Scheme | None], packed: Mapping[str, Record]) -> list[dict[str, Any]]:
        rows = []
        for unit in self.ground.units:
            scheme = decision.get(unit.name)
            size = unit.nbytes if scheme is None else unit.spec(scheme)
            if not isinstance(size, int):
                size = sum(_nbytes(dtype, shape) for dtype, shape in size.tensors().values())
            rows.append(
                {
                    "name": unit.name, "names": list(unit.names), "dtype": str(unit.dtype).removeprefix("torch."),
                    "shape": list(unit.shape), "bytes": size, "scheme": str(scheme) if scheme is not None else None,
                    "method": packed[unit.name].data["method"] if unit.name in packed else None,
                    "reason": None if scheme is not None else unit.reason or "left as it is: the budget allows it",
                    "speed": None if scheme is None else "packed op" if unit.op != "parameter" else "no speed: dequantized on access",
                }
            )  # fmt: skip
        for name, buffer in self.ground.others.items():
            rows.append(
                {
                    "name": name, "names": [name], "dtype": str(buffer.dtype).removeprefix("torch."),
                    "shape": list(buffer.shape), "bytes": _nbytes(buffer.dtype, tuple(buffer.shape)), "scheme": None,
                    "method": None, "reason": "a buffer, not a weight", "speed": None,
                }
            )  # fmt: skip
        return rows

    def _coverage(self, decision: Mapping[str, Scheme | None]) -> float:
        """Elements stored below source width, over all elements of unique storages."""
        total = sum(u.numel for u in self.ground.units) + sum(b.numel() for b in self.ground.others.values())
        packed = sum(u.numel for u in self.ground.units if decision.get(u.name) is not None)
        return packed / total if total else 0.0

    # --- the proof --------------------------------------------------------------------------------------------------

    def _verify(
        self, workspace: Workspace, decision: Mapping[str, Scheme | None], records: list[Record], coverage: float, method: str
    ) -> Result:
        """Load what was written, compare it with the float model, report."""
        from .load import load
        from .report_record import build_record

        found: Comparison | None = None
        latency: dict[str, Any] | None = None
        after: Evaluation | None = None
        with self.stage("verify"):
            if self.task is not None and "verify" in self.task.splits and self._fits_packed():
                into = None if self.ground.source.kind == "transformers" else self.ground.source.skeleton()
                packed = load(workspace.partial, into=into)
                after = self.task.evaluate(packed, "verify", lambda d, t: self.progress("verify", d, t))
                before = getattr(self, "before", None)
                if before is not None:
                    found = compare_evaluations(before, after, self.task.metric, self.options.seed)
                    name = f"{method}, verified, {self.ground.source.size_before / self.size_after:.2f}x"
                    self._tried(name, self.size_after, found, "verify", chosen=True)
                latency = self._latency(packed)
        record = build_record(self, workspace, decision, records, coverage, found, after, latency)
        from laconic.report import write_report

        record["seconds"] = {"total": time.perf_counter() - self.begin, "stages": self.seconds}
        record["peak_rss_bytes"] = peak_rss()
        write_report(record, workspace.partial / "report.html")
        workspace.write_json("report.json", record)
        out = workspace.finish()
        return Result(out, record, record["verdict"]["exit_code"])

    def _fits_packed(self) -> bool:
        return self.options.max_ram is None or not self.ground.streamed or RUNTIME + 2 * self.size_after < self.options.max_ram

    def _latency(self, packed: nn.Module) -> dict[str, Any] | None:
        """Milliseconds of the float and the packed model on one batch of the user's size."""
        assert self.task is not None
        n = self.options.batch or 1
        batches = self._batches("verify", 10**9, batch=n, limit=n)
        if not batches:
            return None
        runs: dict[str, Callable[[], Any]] = {"after": lambda: run_batch(self.task, packed, batches[0])}
        if not self.ground.streamed:
            # The model in memory holds the values that the packed weights stand for: same shapes, same float work.
            runs["before"] = lambda: run_batch(self.task, self.ground.model, batches[0])
        with self.stage("latency"):
            found = latency_ms(runs)
        return {"before": found.get("before"), "after": found["after"], "batch": n, "seq": self.options.seq, "rounds": 7}

    # --- small things -----------------------------------------------------------------------------------------------

    def _batches(self, split: str, tokens: int, batch: int | None = None, limit: int | None = None) -> list[Any]:
        """Batches of a split, up to about so many positions."""
        if self.task is None or not {"calibrate", split} <= set(self.task.splits):
            return []  # a task without inputs to calibrate with has none at all: it is a scoring function
        found = self.task.batches(split, batch=batch, seq=self.options.seq, limit=limit)
        kept, seen = [], 0
        for one in found:
            kept.append(one)
            seen += positions(one)
            if seen >= tokens:
                break
        return kept

    def _digests(self) -> dict[str, str]:
        ground = self.ground
        if ground.streamed:
            return {u.name: ground.source.digest(u.name) for u in ground.units}
        return {
            u.name: tensor_digest(p.dtype, tuple(p.shape), iter([bytes_of(p.contiguous())]))
            for u in ground.units
            for p in [ground.model.get_parameter(u.name).detach()]
        }

    def _data_digest(self) -> str:
        parts = []
        for split in ("calibrate", "select"):
            for batch in self._batches(split, CALIBRATION_TOKENS):
                tensors = batch.values() if isinstance(batch, Mapping) else batch
                parts += [tensor_digest(t.dtype, tuple(t.shape), iter([bytes_of(t.contiguous())])) for t in tensors]
        return digest("data", parts)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        self.progress(name, 0, 1)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def positions(batch: Any) -> int:
    """Positions that a batch gives a layer: tokens, or pixels by a stride of 8."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    if first.is_floating_point():
        return max(first.shape[0], first.shape[0] * first[0].numel() // 192)
    return first.numel()


def histogram(x: Tensor, bins: int = 48) -> dict[str, Any]:
    """Counts over the range of a tensor, and how far its largest magnitude stands out of the mean square."""
    flat = x.detach().float().reshape(-1)
    if flat.numel() > 1 << 18:
        flat = flat[:: flat.numel() >> 18]
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        high = low + 1.0
    counts = torch.histc(flat, bins, low, high)
    rms = float(flat.square().mean().sqrt())
    absmax = float(flat.abs().max())
    return {
        "edges": [low + (high - low) * i / bins for i in range(bins + 1)],
        "counts": [int(c) for c in counts],
        "absmax": absmax,
        "outlier_ratio": absmax / rms if rms else 0.0,
    }


def _interval(found: Comparison, metric: Any) -> tuple[float, float]:
    """The interval; where nothing changed at all, zero changes in n examples still allow about 3/n (rule of three)."""
    low, high = found.low, found.high
    if metric is not None and metric.bounded and not metric.against_float and low == high == 0.0:
        high = 300.0 / found.n
    return low, high


def _fit(ground: Ground, costs: dict[str, list[float]], ceiling: int) -> dict[str, Scheme | None]:
    """The cheapest decision whose exact file fits under the ceiling."""
    fixed = ground.layout({}).total_bytes - sum(u.nbytes for u in ground.packable)
    room = ceiling - fixed
    for _ in range(8):
        try:
            decision = choose(ground.units, costs, room)
        except Impossible:
            break
        excess = ground.layout(decision).total_bytes - ceiling
        if excess <= 0:
            return decision
        room -= excess + 64
    return {u.name: u.options[-1] for u in ground.packable}


def _smallest(attempt: Callable[[int], tuple[Any, bool]], up: Sequence[int], down: Sequence[int]) -> Any:
    """The last plan that holds while ceilings fall along `up`; else the first that holds as they rise along `down`."""
    best = None
    for ceiling in up:
        found, holds = attempt(ceiling)
        if not holds:
            break
        best = found
    if best is not None:
        return best
    for ceiling in down:
        found, holds = attempt(ceiling)
        if holds:
            break
    return found


def _by_shape(ground: Ground, ceiling: int) -> dict[str, Scheme | None]:
    """A decision from shapes alone: every halving of a weight's step counts four times, every weight alike."""
    costs = {u.name: [u.numel * 4.0**-s.bits for s in u.options] for u in ground.packable}
    return _fit(ground, costs, max(ceiling, ground.least()))


def _sampled(ground: Ground) -> Callable[[str], Tensor]:
    """Read a few rows of a parameter where reading all of it would take too much memory."""

    def read(name: str) -> Tensor:
        shape = ground.source.spec(name)[1]
        per_row = max(1, _nbytes(torch.uint8, shape[1:]))
        rows = max(1, min(shape[0], (1 << 20) // per_row))
        return ground.source.read(name, 0, rows) if len(shape) == 2 and rows < shape[0] else ground.source.read(name)

    return read


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    total = dtype.itemsize
    for n in shape:
        total *= n
    return total


def _own_model(data: Any) -> str | None:
    from laconic.tasks import TASKS

    if isinstance(data, Task):
        return data.model_name
    if isinstance(data, str) and data in TASKS:
        return load_task_model(data)
    return None


def load_task_model(name: str) -> str | None:
    """The model that a task of ours brings."""
    return {"minilm-bbc": "minilm", "cifar-cnn": "cifar-cnn", "smollm-moby": "smollm", "tiny-lm": "tiny-lm"}.get(name)


def _ram(value: str | int | None) -> int | None:
    return parse_bytes(value, "--max-ram") if isinstance(value, str) else value


def _check_apart(out: Path, model: Any, data: Any) -> None:
    """What is read is not what is replaced in the end."""
    for what in (model, data):
        if isinstance(what, (str, os.PathLike)) and Path(what).exists() and out.exists():
            given, target = Path(what).resolve(), out.resolve()
            if target == given or target in given.parents:
                raise BadInput(f"{out} holds {what}, which is read: name another folder for the output")


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise BadInput(f"device {device!r} is not known: cpu or cuda")
    if not torch.cuda.is_available():
        raise BadInput(f"device {device!r} was asked for, and torch sees no GPU here: leave --device out to use the CPU")
    raise BadInput("this version compresses on the CPU only: leave --device out; the artifact runs on a GPU afterwards")


def _innermost_module(model: nn.Module, error: BaseException) -> str:
    """Where in the model a forward failed, from the traceback's frames."""
    paths = {id(m): name for name, m in model.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            found = paths[id(owner)]
        trace = trace.tb_next
    return f" in {found}" if found else ""
