"""One compression, step by step: what `compress` does once its arguments are in order.

Read (`reading`), decide (`deciding`), solve (`solve`), repair, write (`artifact`, `ledger`), verify, report. What needs the
float model is measured before solving replaces its values; nothing is looked at on the verify split before the end but the
float model itself.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core import passes
from laconic.core.checkpoint import write_whole
from laconic.core.record import CACHE, FOLD, PACK, Record
from laconic.errors import BadInput, Impossible, LaconicError
from laconic.nn import storage_names
from laconic.numerics import Scheme
from laconic.quant import NormTweak, no_fast_products
from laconic.tasks import Comparison, Evaluation
from laconic.tasks import compare as compare_evaluations

from . import interrupt
from .budget import Budget
from .cache_bits import measured
from .deciding import Deciding
from .distribute import follow
from .ledger import coverage, ledger
from .measure import latency_ms, peak_rss, run_batch, tight_heap, versions
from .observe import arguments, histograms, rows_within
from .orders import uniform
from .plan import METADATA, RUNTIME
from .reading import CALIBRATION_TOKENS, Options, Progress
from .recipe import LEARNED, Recipe
from .search import candidates, told
from .solve import solve
from .source_base import all_tensors
from .source_weights import few
from .tensorfile import TensorWriter
from .timing import fuse_records
from .tryout import Choice, grown
from .workspace import Workspace

BATCH_TOKENS = 1024  # of a batch that is carried through the layers: what they make of more leaves a core's cache
ROUNDS = 3  # plans that are solved at most, each larger than the one before, where the drop is missed


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
class Attempt:
    """A recipe that was solved, and stands in the model.

    Attributes:
        recipe, decision, method: what was done.
        packed: the records of packed parameters.
        drop: on the select split; None where it was not measured.
        size: bytes of its file.
    """

    recipe: Recipe
    decision: Choice
    method: str
    packed: list[Record]
    drop: float | None
    size: int


class Run(Deciding):
    """One compression.

    Attributes:
        before: the float model on the verify split.
        histograms: of weights and inputs of what is packed.
    """

    def __init__(self, options: Options, budget: Budget, progress: Progress):
        super().__init__(options, budget, progress)
        self.before: Evaluation | None = None
        self.histograms: dict[str, dict[str, Any]] = {}

    # --- the work, and recipes that are tried -------------------------------------------------------------------------

    def execute(self, workspace: Workspace) -> Result:
        """Decide, solve, write, verify, report."""
        ceiling = self.ceiling if self.ceiling is not None else self.ground.source.size_before // 4
        workspace.open(2 * ceiling)  # the records of solved units, and the file
        self.workspace = workspace
        if self.options.max_ram is not None:
            tight_heap()
        try:
            if not self.budget.latency:  # else when there is work: their coming would disturb what is timed
                self.team.begin()
            with no_fast_products() if self.options.max_ram is not None else nullcontext():
                return self._execute()
        except BadInput:
            workspace.abandon()
            raise

    def _execute(self) -> Result:
        if self.team.rank:
            ended = follow(self)
            return Result(Path(ended["out"]), ended["record"], ended["exit_code"])
        if self.recipe.kv_cache is not None or self.memory is not None:
            with self.stage("cache"):
                self._settle_cache()
        self.said = list(self.notes)  # before any recipe was tried
        found = self._attempt(self.recipe)
        if self._searches(found):
            found = self._search(found)
        for _ in range(ROUNDS - 1):
            larger = self._next_plan(found)
            if larger is None:
                break
            found = self._solved(larger, found.method)
        ground, decision, method = self.ground, found.decision, found.method
        records = [Record(FOLD, layer, {"norm": norm}) for layer, norm in ground.folded] + self.rewrites + found.packed
        records += self._fuse(records)
        if self.cache is not None:
            records.append(Record(CACHE, "", {"cache": self.cache.to_json()}))
        with self.stage("write"):
            self._write(decision, records, method)
        return self._verify(decision, records, coverage(ground, decision), method)

    def _attempt(self, recipe: Recipe, decision: Choice | None = None) -> Attempt:
        """Solve a recipe on a float model: with a decision that was made for it, or after making one."""
        self.notes, self.dropped = list(self.said), set()
        self.take(recipe)
        step, method = recipe.quantize, self.rounding()
        if step is not None and method != step.method and self.task is not None:
            self.note(f"{step.method} was left out: {self.task.id} gives no examples to calibrate with; weights go to nearest")
        self.name = told(recipe) if step is None or method == step.method else method
        if decision is None:
            decision = self._decide(method)
        share = coverage(self.ground, decision)
        if share < self.options.min_coverage:
            raise BadInput(
                f"coverage is {share:.3f}, below --min-coverage {self.options.min_coverage}: the ledger of `laconic plan` "
                "says what is left alone and why"
            )
        self._measure_float(decision)
        return self._solved(decision, method)

    def _solved(self, decision: Choice, method: str) -> Attempt:
        """A decision solved on the float model that is in hand."""
        self._explain(decision)
        self._write_decision(decision, method)
        packed = self._solve(decision, method)
        size = self.ground.layout(decision).total_bytes
        return Attempt(self.recipe, decision, method, packed, self.select_drop, size)

    def _searches(self, found: Attempt) -> bool:
        """Whether other recipes are tried beside the one that was solved."""
        if self.options.search == "never" or self.recipe.quantize is None or self.fixed(self.ground) is not None:
            return False
        if found.drop is None:
            why = "it compares recipes on the select split, which is not there"
        elif self.budget.latency:
            why = "each recipe would have to be timed again under the latency ceiling"
        else:
            missed = self.budget.drop is not None and found.drop > self.budget.drop
            return missed or self.options.search == "always"
        if self.options.search == "always":
            self.note(f"no other recipes were tried: {why}")
        return False

    def _search(self, first: Attempt) -> Attempt:
        """The recipe that loses least on the select split under the byte ceiling, of those that fit the model."""
        tried = [first]
        standing: Attempt | None = first  # the one whose values the model holds
        ground, filled = self.ground, 0.0
        if self.ceiling is not None:
            filled = ground.layout(uniform(ground, self.ceiling)).total_bytes / self.ceiling
        for recipe in candidates(first.recipe, ground.structure, ground.model, filled):
            self.restore(recipe)
            standing = None
            try:
                standing = self._attempt(recipe)
                tried.append(standing)
            except (BadInput, Impossible) as error:  # a head of its own, for instance, and no room for it
                self.said.append(f"{told(recipe)} was not tried: {error}")
        best = min(tried, key=self._rank)
        unit = "points" if self.task is not None and self.task.metric.bounded else "%"
        drops = ", ".join(f"{told(one.recipe)} {one.drop:.2f}" for one in tried)
        self.said.append(f"recipes tried on the select split, and their drop in {unit}: {drops}")
        if best is standing:
            self.notes.append(self.said[-1])
            return best
        self.restore(best.recipe)
        return self._attempt(best.recipe, best.decision)

    def _rank(self, one: Attempt) -> tuple[float, float]:
        """Least is best: the drop under a ceiling of bytes; without one the bytes, among those that hold the drop."""
        assert one.drop is not None
        if self.ceiling is None and self.budget.drop is not None and one.drop <= self.budget.drop:
            return 0.0, one.size
        return one.drop if self.ceiling is not None else 1.0, one.drop

    def _next_plan(self, found: Attempt) -> Choice | None:
        """A larger plan where the solved one misses the drop on the select split and the size leaves room.

        The model is float again where there is one, and as it was solved where there is none.
        """
        missed = self.budget.drop is not None and found.drop is not None and found.drop > self.budget.drop
        if not missed or self.fixed(self.ground) is not None or self.recipe.quantize is None:
            return None
        if self.budget.latency:
            self.note("the drop is missed on the select split; a larger plan would have to be timed again")
            return None
        with self.stage("decide"):
            weighed = self._costs is not None  # else options are weighed here, on float values
            if not weighed:
                self._reload()
            larger = grown(self.ground, self._option_costs(), found.decision, self.ceiling)
            if larger is not None and weighed:
                self._reload()
        if larger is None:
            self.note("the drop is missed on the select split, and the size leaves no room for a larger plan")
            if not weighed:  # the model is written as it was solved
                self._solve(found.decision, found.method)
        return larger

    def _reload(self) -> None:
        """Put the float values back into the model, rewritten as they were; options and inputs of units stay."""
        units = {unit.name: unit for unit in self.ground.units}
        self.restore(self.recipe)
        self.rewrite()
        self.ground.units = [units[unit.name] for unit in self.ground.units]

    def _fuse(self, records: Sequence[Record]) -> list[Record]:
        """Which transformer blocks will run as compiled code."""
        if not self.recipe.fuse:
            return []
        fused, left = fuse_records(self.ground.source.skeleton(), records)
        for reason in sorted(set(left.values())):
            paths = [path for path, said in left.items() if said == reason]
            self.note(f"{len(paths)} transformer blocks run layer by layer, since {reason}: {few(paths)}")
        return fused

    # --- solving and repair -------------------------------------------------------------------------------------------

    def _measure_float(self, decision: Choice) -> None:
        """The float model on the verify split, while it is still float: read once, at the end, by the packed one."""
        if self.ground.streamed:
            return
        if self.task is not None and "verify" in self.task.splits and self.before is None:
            with self.stage("verify float"):
                report = lambda d, t: self.progress("verify float", d, t)  # noqa: E731
                self.before = self.task.evaluate_float(self.ground.model, "verify", report)
        chosen = [u for u in self.ground.packable if decision.get(u.name) is not None]
        batches = self.batches("calibrate", 1, batch=8)
        self.histograms = histograms(self.ground.model, self.task, chosen, batches)
        if self._holds_select():
            self._select_float()

    def _solve(self, decision: Choice, method: str) -> list[Record]:
        teacher, self.dropped = None, set()
        if self.recipe.norm_tweak is not None:
            batches = self.batches("calibrate", CALIBRATION_TOKENS, batch=8)
            if batches and not self.ground.streamed:
                teacher = copy.deepcopy(self.ground.model)
            else:
                why = "the float model does not fit under --max-ram" if self.ground.streamed else "it needs data"
                self.note(f"norm_tweak was left out: {why}")
        with self.stage("solve"):
            if method not in LEARNED:  # which train a layer on what those before it give: no two at once
                self._tell_team(decision, method)
            records = self.solve_share(decision, method)
        with self.stage("repair"):
            if teacher is not None:
                self.dropped.add("norm_tweak")  # not yet
            self._repair(decision, method, records)
            if teacher is not None:
                self._tweak(decision, teacher, batches)
        return records

    def solve_share(self, decision: Choice, method: str) -> list[Record]:
        """Solve a decision together with the other processes of the run, if there are any."""
        rows = rows_within(self.task, "calibrate", BATCH_TOKENS, seq=self.options.seq)
        batches = self.batches("calibrate", CALIBRATION_TOKENS, batch=8 if method in LEARNED else rows)
        return solve(self._job(decision, method, self.digests, batches, "solve"))

    def _tell_team(self, decision: Choice, method: str) -> None:
        """Let the other processes begin on a decision."""
        size, packed = self.team.size, sum(1 for scheme in decision.values() if scheme is not None)
        if size > packed:
            self.note(f"{size} processes shared {packed} parameters: fewer would have done")
        said = {name: str(scheme) if scheme is not None else None for name, scheme in decision.items()}
        inputs = {unit.name: unit.inputs for unit in self.ground.units if unit.inputs}
        recipe = self.recipe.model_dump(by_alias=True, mode="json")
        self.team.order(self, {"recipe": recipe, "decision": said, "method": method, "inputs": inputs})

    def _repair(self, decision: Choice, method: str, records: list[Record]) -> None:
        """Keep corrected biases only where the select split does not get worse by them."""
        self.select_drop: float | None = None
        if not self._holds_select():
            return
        by_mean = self.recipe.correct_biases and method not in LEARNED
        corrected = {r.data["bias"]: r for r in records if r.data.get("bias")} if by_mean else {}
        model = self.ground.model
        if corrected:
            new = {name: model.get_parameter(name).detach().clone() for name in corrected}
            with_biases = self._measure_select(f"{self.name} + bias correction", decision)
            for name in corrected:
                model.get_parameter(name).data.copy_(self._old_biases[name])
            self.dropped.add("bias_correction")
            without = self._measure_select(self.name, decision)
            if with_biases <= without:
                self.dropped.discard("bias_correction")
                for name, value in new.items():
                    model.get_parameter(name).data.copy_(value)
            else:
                for record in corrected.values():
                    record.data.pop("bias")
                self.note("bias correction was not kept: the select split got worse by it")
            self.select_drop = min(with_biases, without)
        else:
            self.select_drop = self._measure_select(self.name, decision)

    def _tweak(self, decision: Choice, teacher: nn.Module, batches: Sequence[Any]) -> None:
        """Train norms after rounding, kept only where the select split does not get worse by it."""
        ground, step = self.ground, self.recipe.norm_tweak
        assert step is not None
        calls = [arguments(ground.model, self.task, batch) for batch in batches]
        ctx = passes.Context(ground.model, ground.structure, batches=calls, teacher=teacher, seed=self.options.seed)
        self.dropped.discard("norm_tweak")
        one = NormTweak(step.lr, step.lr_scale, step.iters)
        old = {name: p.detach().clone() for name, p in ground.model.named_parameters() if p.dim() == 1}
        with torch.enable_grad():
            records, left = passes.run(one, ctx)
        for reason in dict.fromkeys(left.values()):
            self.note(f"norm_tweak left {few([p for p, r in left.items() if r == reason])} alone: {reason}")
        if self.select_drop is not None and records:
            after = self._measure_select(self.name, decision)
            if after > self.select_drop:
                for name, value in old.items():
                    ground.model.get_parameter(name).data.copy_(value)
                self.note("norm_tweak was not kept: the select split got worse by it")
                self.dropped.add("norm_tweak")
                return
            self.select_drop = after
        self.rewrites += [Record(r.action, r.path, r.data) for r in records]

    # --- writing ------------------------------------------------------------------------------------------------------

    def _write(self, decision: Choice, records: list[Record], method: str) -> None:
        from .artifact import write_artifact_files

        ground, partial = self.ground, self.workspace.partial
        packed = {r.path: r for r in records if r.action == PACK}
        biases = {r.data["bias"]: r.data["key"] for r in packed.values() if r.data.get("bias")}
        with TensorWriter(partial / "model.safetensors", ground.specs(decision), METADATA) as writer:
            for unit in ground.units:
                record = packed.get(unit.name)
                if record is None:
                    writer.write(unit.name, self._float(unit.name, biases.get(unit.name)))
                    continue
                tensors = self.workspace.read(record.data["key"]) or {}
                for suffix, name in storage_names(unit.name, record.spec).items():
                    writer.write(name, tensors[suffix])
            for name in ground.others:
                writer.write(name, self._float(name))
            self.header, self.padding = writer.header_bytes, writer.padding_bytes
        self.ledger = ledger(ground, decision, packed, set(biases))
        total = sum(row["bytes"] for row in self.ledger) + self.header + self.padding
        self.size_after = (partial / "model.safetensors").stat().st_size
        if total != self.size_after:
            raise LaconicError(
                f"the ledger sums to {total:,} bytes and the file has {self.size_after:,}: this is a defect"
            )
        recipe = self.recipe.with_units(decision, method, self.dropped, self._inputs())
        write_whole(partial / "recipe.yaml", recipe.to_yaml().encode())
        self._write_frontier(partial / "plans", method)
        for record in records:
            record.data.pop("key", None)
        write_artifact_files(partial, source=ground.source, records=records, ledger=self.ledger, versions=versions())

    def _write_frontier(self, folder: Path, method: str) -> None:
        """The recipes of the plans that were tried and that no other one beats in both size and drop."""
        from laconic.report.charts.pareto import frontier

        best = {id(one) for one in frontier([one for one in self.tried if one["split"] == "select"])}
        for one in self.tried:
            units, passed = one.pop("units", None), one.pop("passes", None)
            if units is None or id(one) not in best:
                continue
            decision = {name: Scheme.parse(text) if text else None for name, text in units.items()}
            its = Recipe.model_validate(passed)
            how = its.quantize.method if its.quantize is not None and method != "rtn" else method
            recipe = its.with_units(decision, how, (), self._inputs())
            folder.mkdir(exist_ok=True)
            file = folder / f"{one['size']}.yaml"
            write_whole(file, recipe.to_yaml().encode())
            one["recipe"] = f"{folder.name}/{file.name}"

    def _float(self, name: str, solved: str | None = None) -> Tensor:
        """A tensor that is left as it is, or a bias that was corrected with the solution kept under a key."""
        if self.ground.streamed:
            tensors = self.workspace.read(solved) if solved is not None else None
            return self.ground.source.read(name) if tensors is None else tensors["bias"]
        return all_tensors(self.ground.model)[name].detach().cpu()

    # --- the proof ----------------------------------------------------------------------------------------------------

    def _verify(self, decision: Choice, records: list[Record], share: float, method: str) -> Result:
        """Load what was written, compare it with the float model, report."""
        from laconic.report import clean, write_report

        from .load import load
        from .report_record import build_record

        found: Comparison | None = None
        latency: dict[str, Any] | None = None
        after: Evaluation | None = None
        ground, workspace = self.ground, self.workspace
        with self.stage("verify"):
            if self.task is not None and "verify" in self.task.splits and self._fits_packed():
                into = None if ground.source.kind == "transformers" else ground.source.skeleton()
                packed = load(workspace.partial, into=into, device=self.options.device)
                after = self._packed_on_verify(packed)
                if self.before is not None:
                    found = compare_evaluations(self.before, after, self.task.metric, self.options.seed)
                    name = f"{self.name}, verified, {ground.source.size_before / self.size_after:.2f}x"
                    self._tried(name, self.size_after, found, "verify", chosen=True)
                latency = self._latency(packed)
        record = build_record(self, workspace, decision, records, share, found, after, latency)
        record["seconds"] = {"total": time.perf_counter() - self.begin, "stages": self.seconds}
        record["peak_rss_bytes"] = peak_rss()
        record = clean(record)
        write_report(record, workspace.partial / "report.html")
        workspace.write_json("report.json", record)
        interrupt.check()
        out = workspace.finish()
        result = Result(out, record, record["verdict"]["exit_code"])
        self.team.end({"out": str(out), "record": record, "exit_code": result.exit_code})
        return result

    def _packed_on_verify(self, packed: nn.Module) -> Evaluation:
        """The packed model on the verify split, through its cache where it packs one."""
        assert self.task is not None
        report = lambda d, t: self.progress("verify", d, t)  # noqa: E731
        if self.cache is not None:
            try:
                return measured(packed, self.task, "verify", self.cache, progress=report)
            except BadInput as error:
                self.note(f"quality was measured without the cache: {error}")
        return self.task.evaluate(packed, "verify", report)

    def _fits_packed(self) -> bool:
        bound = self.options.max_ram
        return bound is None or not self.ground.streamed or RUNTIME + 2 * self.size_after < bound

    def _latency(self, packed: nn.Module) -> dict[str, Any] | None:
        """Milliseconds of the float and the packed model on one batch of the user's size."""
        batch = self._latency_batch()
        if batch is None:
            return None
        runs: dict[str, Callable[[], Any]] = {"after": lambda: run_batch(self.task, packed, batch)}
        if not self.ground.streamed:
            # The model in memory holds the values that the packed weights stand for: same shapes, same float work.
            runs["before"] = lambda: run_batch(self.task, self.ground.model, batch)
        with self.stage("latency"):
            found = latency_ms(runs)
        n = self.options.batch or 1
        return {
            "before": found.get("before"),
            "after": found["after"],
            "batch": n,
            "seq": self.options.seq,
            "rounds": 7,
            "spread": found.spread,
        }
