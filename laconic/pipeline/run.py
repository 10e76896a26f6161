"""One compression, step by step: what `compress` and `plan` do once their arguments are in order.

Read, plan, decide (`decide`, `tryout`), solve (`solve`), repair, write (`artifact`, `ledger`), verify, report. What needs
the float model is measured before solving replaces its values; nothing is looked at on the verify split before the end but
the float model itself.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core import passes
from laconic.core.checkpoint import write_whole
from laconic.core.record import CACHE, FOLD, PACK, Record
from laconic.core.structure import Structure
from laconic.core.units import find_units, matches
from laconic.errors import BadInput, Impossible, LaconicError
from laconic.kernels import native
from laconic.kernels.inputs import INT8_TOKENS, int8_tensor, static_scale
from laconic.nn import storage_names
from laconic.nn.default_cache import CacheOptions
from laconic.norm import FoldBatchNorm
from laconic.numerics import Scheme
from laconic.quant import NormTweak, no_fast_products
from laconic.tasks import Comparison, Evaluation, Task, load_task, own_model
from laconic.tasks import compare as compare_evaluations

from . import interrupt
from .budget import Budget
from .cache_bits import (
    attention_for,
    cache_refusal,
    cache_shapes,
    calibrated,
    check_fits,
    measured,
    options_of,
    step_of,
    token_bytes,
)
from .decide import fisher, offered, option_costs
from .distribute import Team, follow
from .explain import explain
from .ledger import coverage, ledger
from .look import SEEN, look, tokenizer_of
from .measure import latency_ms, machine, peak_rss, run_batch, tight_heap, versions
from .memory import Memory, memory_of
from .observe import (
    arguments,
    batches_of,
    data_digest,
    histograms,
    innermost_module,
    input_scales,
    rounded_inputs,
    rows_within,
)
from .orders import bisected, by_blocks, sensitivity_order, uniform
from .plan import METADATA, RUNTIME, Ground, check_possible, other_tensors
from .recipe import LEARNED, Inputs, Recipe
from .rewrite import Sight, rewrite
from .search import candidates, told
from .solve import Solving, column_power, owner, solve
from .source import Source, check_finite, resolve
from .source_base import all_tensors, bytes_of
from .source_weights import few
from .strategies import Searching
from .stream import check_weights, sample
from .tensorfile import TensorWriter, tensor_digest
from .timed import find_timed, packed_records, set_inputs, ways_of
from .timing import LayerTimes, blank_model, fuse_records, rows_seen
from .tryout import Choice, fit, grown, try_plans
from .workspace import Workspace, digest

CALIBRATION_TOKENS = SEEN
SENSITIVITY_TOKENS = 4096
BATCH_TOKENS = 1024  # of a batch that is carried through the layers: what they make of more leaves a core's cache
QUICK = 10.0  # seconds: a select evaluation slower than this is not repeated for the sake of the plot
ROUNDS = 3  # plans that are solved at most, each larger than the one before, where the drop is missed

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
    search: Searching = "never"
    max_ram: int | None = None
    seed: int = 0
    resume: bool = False
    batch: int | None = None
    seq: int | None = None
    exclude: Sequence[str] = ()
    keep: Sequence[str] = ()
    device: str = "cpu"
    overwrite: bool = False
    min_coverage: float = 0.0
    trust_remote_code: bool = False
    allow_pickle: bool = False
    command: str = ""


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


class Run:
    """One compression."""

    def __init__(self, options: Options, budget: Budget, progress: Progress):
        self.options, self.budget, self.progress = options, budget, progress
        self.recipe = options.recipe  # the one in hand, where several are tried
        self.begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.task: Task | None = None
        self.notes: list[str] = []
        self.tried: list[dict[str, Any]] = []
        self.rewrites: list[Record] = []  # of the float model, and of norms after rounding
        self.dropped: set[str] = set()  # passes whose work was not kept
        self.before: Evaluation | None = None
        self.histograms: dict[str, dict[str, Any]] = {}
        self._select_before: Evaluation | None = None
        self._costs: dict[str, list[float]] | None = None
        self.explained: dict[str, Any] | None = None
        self.latency_ceiling: float | None = None
        self._structures: dict[Any, Structure] = {}
        self.memory: Memory | None = None
        self.cache: CacheOptions | None = None
        self.team = Team()

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
            self.plan_cache(meta, data is not None)
            self.fixed(meta)
            if data is not None:
                o = self.options
                self.task = load_task(data, source, columns, o.seed, batch=o.batch, seq=o.seq)
                self.notes += self.task.notes
                self._look(source, meta)
            if streamed:
                check_weights(source)
            self.ground = meta if streamed else self.ground_in_memory(source)
            self.ground.streamed = streamed
        if self.task is not None and not streamed:
            self._try_forward()

    def _look(self, source: Source, meta: Ground) -> None:
        """Say what is wrong with the examples before anything is calibrated on them."""
        if self.task is None or "calibrate" not in self.task.splits:
            return
        for seen in look(self.task, meta.packable, lambda: tokenizer_of(source), self.options.seq):
            if seen.state == "warning":
                self._note(f"calibration data: {seen.sentence}")

    def check_budget(self, has_data: bool) -> None:
        """Refuse what no plan can promise."""
        if self.budget.latency and not has_data:
            raise BadInput("a latency is measured on data: pass --data or --task, or leave latency out of the budget")
        if self.budget.latency and torch.device(self.options.device).type != "cpu":
            raise BadInput("a latency ceiling is held on the CPU so far: leave --device or latency out")
        if self.budget.drop is not None and not has_data:
            raise BadInput("a drop can only be held on data: pass --data or --task, or leave drop out of the budget")

    def plan_cache(self, ground: Ground, has_data: bool) -> None:
        """Refuse a cache that the model cannot have, and leave it its part of a memory ceiling."""
        step = self.recipe.kv_cache
        options = options_of(step)
        if options is not None:
            check_fits(options, cache_shapes(ground.model), ground.source.name)
            if options.method == "rotatekv" and (not has_data or self.options.max_ram is not None):
                raise BadInput(
                    "kv_cache: rotatekv orders channels by running the float model on data: pass --data or --task and "
                    "leave --max-ram out, or take method: plain"
                )
        if self.budget.memory:
            fixed = () if step is None else (options,)
            self.memory = memory_of(ground, self.budget.memory, self.options.seq, self.options.batch, fixed)
            self.ceiling = self.memory.ceiling(self.ceiling, self.memory.even())
            if not self.memory.shapes and getattr(ground.model, "can_generate", lambda: False)():
                self._note(f"memory counts the weights alone: {cache_refusal(ground.model)}")

    def find_source(self, model: Any, data: Any, example: Any) -> Source:
        """The model's source; a task named alone brings its own."""
        if model is None:
            model = data.model_name if isinstance(data, Task) else own_model(data) if isinstance(data, str) else None
            if model is None:
                raise BadInput(
                    "no model was named: give a folder, a fetched name, module:function, or a task with its own"
                )
        o = self.options
        return resolve(model, example=example, trust_remote_code=o.trust_remote_code, allow_pickle=o.allow_pickle)

    def ground_on_meta(self, source: Source) -> Ground:
        """The model's units from shapes alone."""
        return self._ground(source, source.skeleton(), fold=self.recipe.fold)

    def ground_in_memory(self, source: Source) -> Ground:
        """The float model on its device, checked and with batch norms folded."""
        model = source.load()
        for name, tensor in all_tensors(model).items():
            check_finite(name, tensor)
        ground = self._ground(source, model, fold=self.recipe.fold)
        ground.model.to(self.options.device)
        ground.others = other_tensors(ground.model, ground.units)
        return ground

    def _ground(self, source: Source, model: nn.Module, fold: bool = False) -> Ground:
        structure = self._structure(source, model)
        folded = self._fold(structure, model) if fold else []
        if folded:
            structure = self._structure(source, model)
        step = self.recipe.quantize
        bits, offer = (step.bits, offered(step)) if step else ((), None)
        units = find_units(
            model, structure, keep=self.options.keep, exclude=self.options.exclude, bits=bits, offer=offer
        )  # fmt: skip
        return Ground(source, model, structure, units, other_tensors(model, units), False, folded)

    def _structure(self, source: Source, model: nn.Module) -> Structure:
        """The structure of a model; that of a skeleton is known again in the model with its values.

        Tracing takes seconds, and reads no values where it is done by export.
        """
        first: dict[int, str] = {}  # a parameter's first name: ties are part of the structure
        tensors = model.named_parameters(remove_duplicate=False)
        key = (
            tuple((path, type(module)) for path, module in model.named_modules(remove_duplicate=False)),
            tuple((name, tuple(p.shape), p.dtype, first.setdefault(id(p), name)) for name, p in tensors),
        )
        if key not in self._structures:
            found = Structure.build(model, source.example())
            if found.how != "export":
                return found
            self._structures[key] = found
        return self._structures[key]

    def _fold(self, structure: Structure, model: nn.Module) -> list[tuple[str, str]]:
        """Fold every batch norm that can be; those named by --exclude are not touched."""
        fold, ctx = FoldBatchNorm(), passes.Context(model, structure)
        decision = fold.plan(structure, model)
        for norm, reason in decision.skipped.items():
            self._note(f"{norm} was not folded: {reason}")
        folded = []
        for layer, said in decision.units.items():
            touched = [f"{path}.weight" for path in (layer, said["norm"])]
            if not any(matches(p, name) for p in self.options.exclude for name in touched):
                fold.apply(model, fold.solve(layer, decision, ctx))
                folded.append((layer, said["norm"]))
        return folded

    def _must_stream(self, meta: Ground) -> bool:
        bound = self.options.max_ram
        if bound is None:
            return False
        floats = sum(u.nbytes for u in meta.units)
        if bound < RUNTIME + (150 << 20):
            raise BadInput(
                f"--max-ram is {bound:,} bytes; Python, torch and transformers alone take about "
                f"{RUNTIME:,}, so at least {RUNTIME + (150 << 20):,} are needed"
            )
        needed = RUNTIME + 4 * floats
        if needed <= bound:
            return False
        if self.budget.drop is not None:
            raise BadInput(
                f"a drop is held against the float model, which does not fit under --max-ram: raise --max-ram to about "
                f"{needed:,} bytes, or leave drop out of the budget"
            )
        if self.budget.latency:
            raise BadInput(
                f"a latency is held against the float model, which does not fit under --max-ram: raise --max-ram to about "
                f"{needed:,} bytes, or leave latency out of the budget"
            )
        return True

    def _try_forward(self) -> None:
        """A forward that fails on the data fails now, with the place."""
        batches = self.batches("calibrate", 1)
        if not batches:
            return  # a scoring function without inputs: nothing to run
        try:
            run_batch(self.task, self.ground.model, batches[0])
        except LaconicError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises is their message
            where = innermost_module(self.ground.model, error)
            said = str(error).splitlines()[0] if str(error) else ""
            raise BadInput(f"the model's forward fails on the data{where}: {type(error).__name__}: {said}") from error

    # --- the work ---------------------------------------------------------------------------------------------------

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

    # --- recipes that are tried -------------------------------------------------------------------------------------

    def _attempt(self, recipe: Recipe, decision: Choice | None = None) -> Attempt:
        """Solve a recipe on a float model: with a decision that was made for it, or after making one."""
        self.notes, self.dropped = list(self.said), set()
        self.take(recipe)
        step = recipe.quantize
        method = step.method if step and self.batches("calibrate", 1) else "rtn"
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

    def take(self, recipe: Recipe) -> None:
        """Have a recipe in hand: the float model rewritten by it, and what its solutions depend on."""
        self.recipe = recipe
        self._costs = self.explained = None
        self.rewrite()
        with self.stage("hash"):
            self.digests = self._digests()
            self.identity = digest(
                "run", 3, self.digests, self.budget.text, recipe.model_dump(), self.options.seed,
                list(self.options.keep), list(self.options.exclude), self._data_digest(), torch.__version__,
                torch.get_num_threads(), self.options.batch, self.options.seq, self.ground.streamed, self.options.device,
                self.options.max_ram is None,
            )  # fmt: skip

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
            self._note(f"no other recipes were tried: {why}")
        return False

    def _search(self, first: Attempt) -> Attempt:
        """The recipe that loses least on the select split under the byte ceiling, of those that fit the model."""
        tried = [first]
        standing: Attempt | None = first  # the one whose values the model holds
        for recipe in candidates(first.recipe, self.ground.structure, self.ground.model):
            self.restore(recipe)
            standing = None
            try:
                standing = self._attempt(recipe)
                tried.append(standing)
            except Impossible as error:  # a head of its own, for instance, and no room for it
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

    def _settle_cache(self) -> None:
        """The cache of keys and values: as the recipe says, or as a memory ceiling needs it, measured on the float model."""
        ground = self.ground
        if self.memory is not None:
            if self.recipe.kv_cache is None and self.memory.shapes:
                task = None if ground.streamed else self.task
                report = lambda d, t: self.progress("cache", d, t)  # noqa: E731
                chosen = self.memory.choose(ground.model, task, self.budget.drop, self._float_on_select, report)
                self.recipe = self.recipe.with_cache(step_of(chosen))
            chosen = options_of(self.recipe.kv_cache)
            self.ceiling = self.memory.ceiling(self.budget.ceiling(ground.source.size_before), chosen)
        options = options_of(self.recipe.kv_cache)
        if options is not None:
            attention = attention_for(ground.model)
            batches = self.batches("calibrate", CALIBRATION_TOKENS, batch=8) if options.method != "plain" else []
            self.cache = replace(calibrated(options, ground.model, batches), attention=attention)
            shapes = cache_shapes(ground.model)
            before, after = token_bytes(shapes, None), token_bytes(shapes, options)
            self._note(f"generate keeps keys and values in {options.name}: {after:,.0f} bytes a token, not {before:,.0f}")

    def _float_on_select(self) -> Evaluation:
        self._select_float()
        assert self._select_before is not None
        return self._select_before

    def rewrite(self) -> None:
        """Change the float model as the recipe says, which leaves what it computes, and remember how."""
        steps = self.recipe.rewrites
        self.rewrites = []
        if not steps:
            return
        with self.stage("rewrite"):
            batches = self.batches("calibrate", CALIBRATION_TOKENS, batch=8)
            o = self.options
            sight = Sight(self.task, batches, o.exclude, o.seed, self._note)
            self.rewrites = rewrite(self.ground, steps, sight, self._look_again)
            if not self.ground.streamed:
                check_possible(self.ground, self.budget)

    def _look_again(self, ground: Ground) -> None:
        """Find structure and units anew, after a change of names, shapes, or what turns inputs as they come."""
        known, self._structures = self._structures, {}  # what the names and shapes say alone is not all of it
        fresh = self._ground(ground.source, ground.model)
        self._structures = known
        ground.structure, ground.units, ground.others = fresh.structure, fresh.units, fresh.others

    def restore(self, recipe: Recipe) -> None:
        """The float model as it was before any recipe, and what another one may do to it."""
        self.recipe = recipe
        self.ground = self.ground_in_memory(self.ground.source)

    def _fuse(self, records: Sequence[Record]) -> list[Record]:
        """Which transformer blocks will run as compiled code."""
        if not self.recipe.fuse:
            return []
        fused, left = fuse_records(self.ground.source.skeleton(), records)
        for reason in sorted(set(left.values())):
            paths = [path for path, said in left.items() if said == reason]
            self._note(f"{len(paths)} transformer blocks run layer by layer, since {reason}: {few(paths)}")
        return fused

    def _decide(self, method: str) -> Choice:
        step = self.recipe.quantize
        kept = self.workspace.read_json("decision.json")
        if kept is not None and kept.get("identity") == self.identity:
            self.tried, self.explained = kept["tried"], kept["explained"]
            for note in kept["notes"]:
                self._note(note)
            units = kept["units"]
            in_order = [u.name for u in self.ground.units if u.name in units]
            decision = {n: Scheme.parse(units[n]) if units[n] else None for n in in_order}
            for unit in self.ground.units:
                unit.inputs = kept["inputs"].get(unit.name, "")
            return decision
        with self.stage("decide"):
            decision = {} if step is None else self.fixed(self.ground) or self._allocate()
        if step is not None and step.inputs == "int8_static":
            with self.stage("inputs"):
                self._static_inputs(decision)
        elif step is not None and (step.inputs == "int8" or self._int8()):
            set_inputs(self.ground.units, decision, INT8_TOKENS)
        return decision

    def _explain(self, decision: Choice) -> None:
        """What was weighed, where something was."""
        if self._costs is not None:
            self.explained = explain(self.ground.packable, self._costs, decision)

    def _write_decision(self, decision: Choice, method: str) -> None:
        self.workspace.write_json(
            "decision.json",
            {
                "identity": self.identity, "method": method, "budget": self.budget.text, "ceiling": self.ceiling,
                "inputs": {unit.name: unit.inputs for unit in self.ground.units if unit.inputs},
                "units": {n: str(s) if s is not None else None for n, s in decision.items()},
                "tried": self.tried, "explained": self.explained, "notes": self.notes, "machine": machine(), "seconds": self.seconds,
            },
        )  # fmt: skip

    def _static_inputs(self, decision: Choice) -> None:
        """One scale for the inputs of each linear layer that is packed, from the calibrate split.

        Raises:
            BadInput: there is no data, or the model does not fit under --max-ram.
        """
        batches = self.batches("calibrate", CALIBRATION_TOKENS, batch=8)
        if self.ground.streamed or not batches:
            why = "does not fit under --max-ram" if self.ground.streamed else "has no data"
            raise BadInput(
                f"inputs: int8_static calibrates a scale for every layer, and the model {why}: say int8, which rounds each "
                "token by a scale of its own"
            )
        ground = self.ground
        set_inputs(ground.units, decision, INT8_TOKENS)
        linear = [unit for unit in ground.units if unit.inputs]
        scales = input_scales(ground.model, self.task, {owner(unit) for unit in linear}, batches)
        for unit in linear:
            if owner(unit) in scales:
                unit.inputs = int8_tensor(scales[owner(unit)])
        if left := [unit.name for unit in linear if owner(unit) not in scales]:
            self._note(f"inputs are rounded by tokens, since they do not run on the calibration data: {few(left)}")

    def _inputs(self) -> Inputs:
        """How packed linear layers take their inputs, as a recipe says it."""
        if any(static_scale(unit.inputs) for unit in self.ground.units):
            return "int8_static"
        return "int8" if self._int8() else "float"

    def _int8(self) -> bool:
        """Whether packed linear layers round their inputs."""
        return any(unit.inputs for unit in self.ground.units)

    def fixed(self, ground: Ground) -> Choice | None:
        """The decision that the recipe states, if it states one.

        Raises:
            BadInput: it names a parameter that is not there, or a scheme for one that cannot be packed.
        """
        step = self.recipe.quantize
        units = step.units if step else None
        if not units:
            return None
        known = {u.name: u for u in ground.units}
        strange = sorted(set(units) - set(known))
        if strange:
            raise BadInput(f"the recipe names {strange[0]!r}, which {ground.source.name} does not have")
        for name, text in units.items():
            if text is not None and not known[name].options:
                raise BadInput(f"the recipe packs {name}, which is left alone: {known[name].reason}")
            if text is not None and (why := (scheme := Scheme.parse(text)).refusal(known[name].spec(scheme).matrix[1])):
                raise BadInput(f"the recipe packs {name} as {scheme}: {why}")
        return {n: Scheme.parse(text) if (text := units[n]) else None for n in known if n in units}

    def _allocate(self) -> Choice:
        step = self.recipe.quantize
        if step is not None and step.allocate != "program":
            return self._in_order(step.allocate)
        ground, costs = self.ground, self._option_costs()
        if self.budget.latency:
            return self._allocate_timed(costs)
        if self.task is None or ground.streamed or "select" not in self.task.splits:
            return fit(ground, costs, self.ceiling if self.ceiling is not None else ground.source.size_before // 4)
        start = time.perf_counter()
        self._select_float()
        return try_plans(
            ground, costs, self.ceiling, self.budget.drop, time.perf_counter() - start < QUICK,
            lambda decision: self._measure_select("rounded", decision), lambda d, t: self.progress("try", d, t),
        )  # fmt: skip

    def _in_order(self, how: str) -> Choice:
        """Bits by another way than the integer program."""
        ground = self.ground
        if ground.streamed:
            raise BadInput(
                f"allocate: {how} needs the model in memory, and it does not fit under --max-ram: say program"
            )
        if self.budget.latency:
            raise BadInput(f"allocate: {how} knows no milliseconds: say program, or leave latency out of the budget")
        ceiling = self.ceiling if self.ceiling is not None else ground.source.size_before // 4
        batches = self.batches("calibrate", SENSITIVITY_TOKENS, batch=4)
        if how == "uniform":
            return uniform(ground, ceiling)
        if how == "blocks":
            return by_blocks(ground, self.task, batches, ceiling)
        if self.budget.drop is None or self.task is None or "select" not in self.task.splits or not batches:
            raise BadInput("allocate: bisect measures whether a drop holds: give data, and a drop in the budget")
        self._select_float()
        order = sensitivity_order(ground, self.task, batches[:1], self.options.seed)
        return bisected(
            ground, order, self.budget.drop, lambda decision: self._measure_select("rounded", decision),
            lambda d, t: self.progress("try", d, t),
        )  # fmt: skip

    def _allocate_timed(self, costs: dict[str, list[float]]) -> Choice:
        """The best plan under the ceilings of bytes and of milliseconds."""
        ground, step = self.ground, self.recipe.quantize
        batch = self._latency_batch()
        if batch is None or step is None:
            raise BadInput("a latency is measured on data with inputs: leave latency out of the budget")
        before = latency_ms({"float": lambda: run_batch(self.task, ground.model, batch)})["float"]
        self.latency_ceiling = self.budget.milliseconds(before)
        assert self.latency_ceiling is not None
        done = 0

        def try_whole(decision: Choice) -> float:
            nonlocal done
            self.progress("time", done, done + 1)
            done += 1
            records = packed_records(ground, decision, self.recipe.fuse)
            model = blank_model(ground.source.skeleton(), records, self.options.device)
            return latency_ms({"packed": lambda: run_batch(self.task, model, batch)})["packed"]

        times = LayerTimes(rows_seen(ground.model, self.task, batch, ground.packable))
        ways = ways_of(step.inputs)
        found, _ = find_timed(ground, costs, times, self.ceiling, before, self.latency_ceiling, ways, try_whole)
        if found.inputs and ways[0] != found.inputs:
            self._note(
                "linear layers round their inputs to 8 bits a token: without that, no plan keeps the latency ceiling"
            )
        slow = [
            u
            for u in ground.packable
            if found.decision.get(u.name) is None and times.extra(u, u.options[0], found.inputs) > 0
        ]
        if slow:
            self._note(
                f"left as they are, since packed they would be slower at this batch: {few([u.name for u in slow])}"
            )
        return found.decision

    def _option_costs(self) -> dict[str, list[float]]:
        """Cost of every option of every unit, worked out once, on the float model."""
        if self._costs is None:
            ground = self.ground
            if ground.streamed:
                read = lambda unit: sample(ground.source, unit)  # noqa: E731
                batches = self.batches("calibrate", SENSITIVITY_TOKENS, batch=4)
                weights = None
                if batches:
                    weights = column_power(self._job({}, "rtn", {}, batches, "sensitivity"), ground.packable)
            else:
                read = lambda unit: ground.model.get_parameter(unit.name)  # noqa: E731
                weights = self._fisher()
            self._costs = option_costs(read, weights, ground.units, lambda d, t: self.progress("options", d, t))
        return self._costs

    def _fisher(self) -> dict[str, Tensor] | None:
        batches = self.batches("calibrate", SENSITIVITY_TOKENS, batch=4)
        if not batches:
            return None
        report = lambda d, t: self.progress("sensitivity", d, t)  # noqa: E731
        try:
            return fisher(self.ground.model, self.task, batches, self.ground.units, self.options.seed, report)
        except (RuntimeError, NotImplementedError) as error:
            self._note(f"sensitivity is that of the weights alone: no gradient ({str(error).splitlines()[0]})")
            return None

    def _measure_float(self, decision: Choice) -> None:
        """The float model on the verify split, while it is still float: read once, at the end, by the packed one."""
        if self.ground.streamed:
            return
        if self.task is not None and "verify" in self.task.splits and self.before is None:
            with self.stage("verify float"):
                report = lambda d, t: self.progress("verify float", d, t)  # noqa: E731
                self.before = self.task.evaluate(self.ground.model, "verify", report)
        chosen = [u for u in self.ground.packable if decision.get(u.name) is not None]
        batches = self.batches("calibrate", 1, batch=8)
        self.histograms = histograms(self.ground.model, self.task, chosen, batches)
        if self._holds_select():
            self._select_float()

    # --- solving and repair -----------------------------------------------------------------------------------------

    def _solve(self, decision: Choice, method: str) -> list[Record]:
        teacher = None
        if self.recipe.norm_tweak is not None:
            batches = self.batches("calibrate", CALIBRATION_TOKENS, batch=8)
            if batches and not self.ground.streamed:
                teacher = copy.deepcopy(self.ground.model)
            else:
                why = "the float model does not fit under --max-ram" if self.ground.streamed else "it needs data"
                self._note(f"norm_tweak was left out: {why}")
        with self.stage("solve"):
            if method not in LEARNED:  # which train a layer on what those before it give: no two at once
                self._tell_team(decision, method)
            records = self.solve_share(decision, method)
        with self.stage("repair"):
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
            self._note(f"{size} processes shared {packed} parameters: fewer would have done")
        said = {name: str(scheme) if scheme is not None else None for name, scheme in decision.items()}
        inputs = {unit.name: unit.inputs for unit in self.ground.units if unit.inputs}
        recipe = self.recipe.model_dump(by_alias=True, mode="json")
        self.team.order(self, {"recipe": recipe, "decision": said, "method": method, "inputs": inputs})

    def _job(
        self, decision: Choice, method: str, digests: dict[str, str], batches: Sequence[Any], stage: str
    ) -> Solving:
        ground, step = self.ground, self.recipe.quantize
        key = digest(self.identity, {n: str(s) for n, s in decision.items()}, native.load() is not None)
        return Solving(
            ground.model, self.task, batches, ground.units, decision, ground.structure, self.workspace, key, digests,
            method, step.steps if step is not None else 0, self.options.seed, self.recipe.correct_biases,
            lambda done, total, name: self.progress(stage, done, total),
            ground.source if ground.streamed else None, self.options.max_ram, self.notes,
            Team() if method in LEARNED else self.team,
        )  # fmt: skip

    def _holds_select(self) -> bool:
        """Whether what is solved is measured on the select split."""
        there = self.task is not None and not self.ground.streamed and "select" in self.task.splits
        repairs = self.recipe.correct_biases or self.recipe.norm_tweak is not None
        return there and (self.budget.drop is not None or repairs or self.options.search == "always")

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
            without = self._measure_select(self.name, decision)
            if with_biases <= without:
                for name, value in new.items():
                    model.get_parameter(name).data.copy_(value)
            else:
                for record in corrected.values():
                    record.data.pop("bias")
                self._note("bias correction was not kept: the select split got worse by it")
                self.dropped.add("bias_correction")
            self.select_drop = min(with_biases, without)
        else:
            self.select_drop = self._measure_select(self.name, decision)

    def _tweak(self, decision: Choice, teacher: nn.Module, batches: Sequence[Any]) -> None:
        """Train norms after rounding, kept only where the select split does not get worse by it."""
        ground, step = self.ground, self.recipe.norm_tweak
        assert step is not None
        calls = [arguments(ground.model, self.task, batch) for batch in batches]
        ctx = passes.Context(ground.model, ground.structure, batches=calls, teacher=teacher, seed=self.options.seed)
        one = NormTweak(step.lr, step.lr_scale, step.iters)
        old = {name: p.detach().clone() for name, p in ground.model.named_parameters() if p.dim() == 1}
        with torch.enable_grad():
            records, left = passes.run(one, ctx)
        for reason in dict.fromkeys(left.values()):
            self._note(f"norm_tweak left {few([p for p, r in left.items() if r == reason])} alone: {reason}")
        if self.select_drop is not None and records:
            after = self._measure_select(self.name, decision)
            if after > self.select_drop:
                for name, value in old.items():
                    ground.model.get_parameter(name).data.copy_(value)
                self._note("norm_tweak was not kept: the select split got worse by it")
                self.dropped.add("norm_tweak")
                return
            self.select_drop = after
        self.rewrites += [Record(r.action, r.path, r.data) for r in records]

    def _next_plan(self, found: Attempt) -> Choice | None:
        """A larger plan where the solved one misses the drop on the select split and the size leaves room.

        The model is float again where there is one, and as it was solved where there is none.
        """
        missed = self.budget.drop is not None and found.drop is not None and found.drop > self.budget.drop
        if not missed or self.fixed(self.ground) is not None or self.recipe.quantize is None:
            return None
        if self.budget.latency:
            self._note("the drop is missed on the select split; a larger plan would have to be timed again")
            return None
        with self.stage("decide"):
            weighed = self._costs is not None  # else options are weighed here, on float values
            if not weighed:
                self._reload()
            larger = grown(self.ground, self._option_costs(), found.decision, self.ceiling)
            if larger is not None and weighed:
                self._reload()
        if larger is None:
            self._note("the drop is missed on the select split, and the size leaves no room for a larger plan")
            if not weighed:  # the model is written as it was solved
                self._solve(found.decision, found.method)
        return larger

    def _reload(self) -> None:
        """Put the float values back into the model, rewritten as they were; options and inputs of units stay."""
        units = {unit.name: unit for unit in self.ground.units}
        self.restore(self.recipe)
        self.rewrite()
        self.ground.units = [units[unit.name] for unit in self.ground.units]

    def _select_float(self) -> None:
        """The float model on the select split, once."""
        assert self.task is not None
        if self._select_before is None:
            self._select_before = self.task.evaluate(self.ground.model, "select")
        names = {n for u in self.ground.units for n in u.names}
        self._old_biases = {
            n: p.detach().clone() for n, p in self.ground.model.named_parameters() if n in names and p.dim() == 1
        }

    def _measure_select(self, name: str, decision: Choice) -> float:
        """The drop on the select split of what the model holds now; the plot shows it."""
        assert self.task is not None and self._select_before is not None
        with rounded_inputs(self.ground.model, self.ground.units):
            after = self.task.evaluate(self.ground.model, "select")
        found = compare_evaluations(self._select_before, after, self.task.metric, self.options.seed)
        size = self.ground.layout(decision).total_bytes
        self._tried(f"{name}, {self.ground.source.size_before / size:.2f}x", size, found, "select", decision)
        return found.drop

    def _tried(
        self, name: str, size: int, found: Comparison, split: str, decision: Choice | None = None, chosen: bool = False
    ) -> None:
        low, high = self.interval(found)
        one = {
            "name": name,
            "size": size,
            "drop": found.drop,
            "low": low,
            "high": high,
            "split": split,
            "chosen": chosen,
        }
        if decision is not None:
            one["passes"] = self.recipe.model_dump(by_alias=True)
            one["units"] = {n: str(s) if s is not None else None for n, s in decision.items()}
        if one not in self.tried:  # the chosen recipe is solved again after others were tried
            self.tried.append(one)

    def interval(self, found: Comparison) -> tuple[float, float]:
        """The interval; where nothing changed at all, zero changes in n examples still allow about 3/n (rule of three)."""
        low, high = found.low, found.high
        metric = self.task.metric if self.task else None
        if metric is not None and metric.bounded and not metric.against_float and low == high == 0.0:
            high = 300.0 / found.n
        return low, high

    # --- writing ----------------------------------------------------------------------------------------------------

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
            recipe = its.with_units(decision, how, self.dropped, self._inputs())
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

    # --- the proof --------------------------------------------------------------------------------------------------

    def _verify(self, decision: Choice, records: list[Record], share: float, method: str) -> Result:
        """Load what was written, compare it with the float model, report."""
        from laconic.report import write_report

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
                self._note(f"quality was measured without the cache: {error}")
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
        }

    def _latency_batch(self) -> Any:
        """A batch of the user's size, or None where the task has no inputs."""
        n = self.options.batch or 1
        batches = self.batches("verify", 10**9, batch=n, limit=n)
        return batches[0] if batches else None

    # --- small things -----------------------------------------------------------------------------------------------

    def batches(self, split: str, tokens: int, batch: int | None = None, limit: int | None = None) -> list[Any]:
        """Batches of a split, up to about so many positions."""
        return batches_of(self.task, split, tokens, batch=batch, seq=self.options.seq, limit=limit)

    def _digests(self) -> dict[str, str]:
        ground = self.ground
        if ground.streamed:
            return {u.name: ground.source.digest(u.name) for u in ground.units}
        return {
            u.name: tensor_digest(p.dtype, tuple(p.shape), iter([bytes_of(p.cpu().contiguous())]))
            for u in ground.units
            for p in [ground.model.get_parameter(u.name).detach()]
        }

    def _data_digest(self) -> str:
        return data_digest(b for split in ("calibrate", "select") for b in self.batches(split, CALIBRATION_TOKENS))

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        interrupt.check()
        start = time.perf_counter()
        self.progress(name, 0, 1)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
