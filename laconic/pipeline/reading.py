"""What a run was given: the model, as units from its shapes and with its values, the task, and what cannot be done.

Everything here comes before anything is written. `plan` needs no more of it than shapes; see `run` for the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from laconic.core import passes
from laconic.core.structure import Structure
from laconic.core.units import find_units, matches
from laconic.errors import BadInput, LaconicError
from laconic.norm import FoldBatchNorm
from laconic.numerics import Scheme
from laconic.tasks import Task, load_task, own_model
from laconic.tasks.base import call_arguments, inputs_on

from . import interrupt
from .budget import Budget
from .cache_bits import cache_refusal, cache_shapes, check_fits, options_of
from .decide import offered
from .look import SEEN, look, tokenizer_of
from .measure import run_batch
from .memory import Memory, memory_of
from .observe import batches_of, innermost_module
from .plan import RUNTIME, Ground, check_possible, other_tensors
from .recipe import Recipe
from .source import Source, check_finite, resolve
from .source_base import all_tensors
from .source_module import ModuleSource
from .strategies import Searching
from .stream import check_weights
from .tryout import Choice

CALIBRATION_TOKENS = SEEN

Progress = Callable[[str, int, int], None]


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


class Reading:
    """A model, data and a budget, read and checked.

    Attributes:
        ground: the model and its units.
        ceiling: bytes that the file may have, or None.
        recipe: the one in hand, where several are tried.
        notes: sentences for the report.
        seconds: of every stage.
    """

    ground: Ground
    ceiling: int | None

    def __init__(self, options: Options, budget: Budget, progress: Progress):
        self.options, self.budget, self.progress = options, budget, progress
        self.recipe = options.recipe
        self.begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.task: Task | None = None
        self.notes: list[str] = []
        self.memory: Memory | None = None
        self._structures: dict[Any, Structure] = {}

    # --- what was given -----------------------------------------------------------------------------------------------

    def prepare(self, model: Any, data: Any, columns: Mapping[str, str] | None, example: Any) -> None:
        """Find the model and the data, and refuse what cannot be done before anything is written."""
        self.check_budget(data is not None)
        with self.stage("read"):
            source = self.find_source(model, data, example)
            self.example_from_data(source, data, columns)
            meta = self.ground_on_meta(source)
            streamed = self.must_stream(meta)
            if streamed and meta.folded:  # folding needs the values of whole layers
                meta = self._ground(source, source.skeleton())
            self.ceiling = check_possible(meta, self.budget)
            self.plan_cache(meta, data is not None)
            self.fixed(meta)
            if data is not None:
                self.task = self.task or self._load_task(data, source, columns)
                self.notes += self.task.notes
                self._look(source, meta)
            if streamed:
                check_weights(source)
            self.ground = meta if streamed else self.ground_in_memory(source)
            self.ground.streamed = streamed
        if self.task is not None and not streamed:
            self._try_forward()

    def _load_task(self, data: Any, source: Source, columns: Mapping[str, str] | None) -> Task:
        o = self.options
        return load_task(data, source, columns, o.seed, batch=o.batch, seq=o.seq)

    def example_from_data(self, source: Source, data: Any, columns: Mapping[str, str] | None) -> None:
        """Trace a plain module that came without an example with the data's first inputs, where there are some."""
        if data is None or not isinstance(source, ModuleSource) or not source.lacks_example:
            return
        self.task = self._load_task(data, source, columns)
        first = self.batches("calibrate", 1, batch=2, limit=2)
        if first:
            with inputs_on("cpu"):
                source.take_example(call_arguments(source.skeleton(), first[0]))

    def _look(self, source: Source, meta: Ground) -> None:
        """Say what is wrong with the examples before anything is calibrated on them."""
        if self.task is None or "calibrate" not in self.task.splits:
            return
        for seen in look(self.task, meta.packable, lambda: tokenizer_of(source), self.options.seq):
            if seen.state == "warning":
                self.note(f"calibration data: {seen.sentence}")

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
                self.note(f"memory counts the weights alone: {cache_refusal(ground.model)}")

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
            self.note(f"{norm} was not folded: {reason}")
        folded = []
        for layer, said in decision.units.items():
            touched = [f"{path}.weight" for path in (layer, said["norm"])]
            if not any(matches(p, name) for p in self.options.exclude for name in touched):
                fold.apply(model, fold.solve(layer, decision, ctx))
                folded.append((layer, said["norm"]))
        return folded

    def must_stream(self, meta: Ground) -> bool:
        """Whether the float model does not fit under --max-ram.

        Raises:
            BadInput: nothing fits, or a budget needs the float model whole.
        """
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

    # --- small things -------------------------------------------------------------------------------------------------

    def batches(self, split: str, tokens: int, batch: int | None = None, limit: int | None = None) -> list[Any]:
        """Batches of a split, up to about so many positions."""
        return batches_of(self.task, split, tokens, batch=batch, seq=self.options.seq, limit=limit)

    def note(self, sentence: str) -> None:
        """Add a sentence to the report, once."""
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
