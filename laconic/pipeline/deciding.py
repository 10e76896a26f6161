"""Deciding: a recipe in hand, the float model rewritten by it, and a scheme for every parameter under the ceilings.

What is decided depends on what options cost (`decide`), on plans that are tried on the select split (`tryout`), on
milliseconds (`timed`) or on an order of layers (`orders`). See `run` for what becomes of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laconic.core.record import Record
from laconic.errors import BadInput
from laconic.kernels import native
from laconic.kernels.inputs import INT8_TOKENS, int8_tensor, static_scale
from laconic.nn.default_cache import CacheOptions
from laconic.numerics import Scheme
from laconic.tasks import Comparison, Evaluation
from laconic.tasks import compare as compare_evaluations

from .budget import Budget
from .cache_bits import attention_for, cache_shapes, calibrated, options_of, step_of, token_bytes
from .decide import fisher, option_costs
from .distribute import Team
from .explain import explain
from .measure import latency_ms, machine, run_batch
from .observe import data_digest, input_scales, rounded_inputs
from .orders import bisected, by_blocks, check_allocation, sensitivity_order, uniform
from .plan import Ground, check_possible
from .reading import CALIBRATION_TOKENS, Options, Progress, Reading
from .recipe import LEARNED, Inputs, Recipe
from .rewrite import Sight, rewrite
from .solve import Solving, as_solved, column_power, owner
from .source_base import bytes_of
from .source_weights import few
from .stream import sample
from .tensorfile import tensor_digest
from .timed import find_timed, packed_records, set_inputs, ways_of
from .timing import LayerTimes, blank_model, rows_seen
from .tryout import Choice, fit, try_plans
from .workspace import Workspace, digest

SENSITIVITY_TOKENS = 4096
QUICK = 10.0  # seconds: a select evaluation slower than this is not repeated for the sake of the plot


class Deciding(Reading):
    """What is done to a model that was read, before its weights are solved.

    Attributes:
        workspace: where decisions and solutions are kept.
        digests, identity: hashes of the float values, and of all that a decision depends on.
        rewrites: records of what was done to the float model, and to norms after rounding.
        tried: plans that were measured, for the plot.
        dropped: passes whose work the model in hand does not hold.
        cache: how `generate` keeps keys and values, or None.
    """

    workspace: Workspace
    digests: dict[str, str]
    identity: str

    def __init__(self, options: Options, budget: Budget, progress: Progress):
        super().__init__(options, budget, progress)
        self.tried: list[dict[str, Any]] = []
        self.rewrites: list[Record] = []
        self.dropped: set[str] = set()
        self.explained: dict[str, Any] | None = None
        self.latency_ceiling: float | None = None
        self.cache: CacheOptions | None = None
        self.team = Team()
        self._costs: dict[str, list[float]] | None = None
        self._select_before: Evaluation | None = None

    # --- a recipe in hand ---------------------------------------------------------------------------------------------

    def take(self, recipe: Recipe) -> None:
        """Have a recipe in hand: the float model rewritten by it, and what its solutions depend on."""
        self.recipe = recipe
        self._costs = self.explained = None
        self.rewrite()
        with self.stage("hash"):
            self.digests = self._digests()
            self.identity = digest(
                "run", 4, self.digests, self.budget.text, recipe.model_dump(), self.options.seed,
                list(self.options.keep), list(self.options.exclude), self._data_digest(), torch.__version__,
                torch.get_num_threads(), self.options.batch, self.options.seq, self.ground.streamed, self.options.device,
                self.options.max_ram is None,
            )  # fmt: skip

    def restore(self, recipe: Recipe) -> None:
        """The float model as it was before any recipe, and what another one may do to it."""
        self.recipe = recipe
        self.ground = self.ground_in_memory(self.ground.source)

    def rewrite(self) -> None:
        """Change the float model as the recipe says, which leaves what it computes, and remember how."""
        steps = self.recipe.rewrites
        self.rewrites = []
        if not steps:
            return
        with self.stage("rewrite"):
            batches = self.batches("calibrate", CALIBRATION_TOKENS, batch=8)
            o = self.options
            sight = Sight(self.task, batches, o.exclude, o.seed, self.note)
            self.rewrites = rewrite(self.ground, steps, sight, self._look_again)
            if not self.ground.streamed:
                check_possible(self.ground, self.budget)

    def _look_again(self, ground: Ground) -> None:
        """Find structure and units anew, after a change of names, shapes, or what turns inputs as they come."""
        known, self._structures = self._structures, {}  # what the names and shapes say alone is not all of it
        fresh = self._ground(ground.source, ground.model)
        self._structures = known
        ground.structure, ground.units, ground.others = fresh.structure, fresh.units, fresh.others

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

    # --- the decision -------------------------------------------------------------------------------------------------

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
            self.note(
                f"generate keeps keys and values in {options.name}: {after:,.0f} bytes a token, not {before:,.0f}"
            )

    def _decide(self, method: str) -> Choice:
        step = self.recipe.quantize
        kept = self.workspace.read_json("decision.json")
        if kept is not None and kept.get("identity") == self.identity:
            self.tried, self.explained = kept["tried"], kept["explained"]
            for note in kept["notes"]:
                self.note(note)
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
        ceiling = self.ceiling if self.ceiling is not None else ground.source.size_before // 4
        batches = self.batches("calibrate", SENSITIVITY_TOKENS, batch=4)
        measures = how != "bisect" or (self.task is not None and "select" in self.task.splits)
        check_allocation(ground, how, self.budget, bool(batches) and measures)
        if how == "uniform":
            return uniform(ground, ceiling)
        if how == "blocks":
            return by_blocks(ground, self.task, batches, ceiling)
        assert self.task is not None and self.budget.drop is not None
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
            self.note(
                "linear layers round their inputs to 8 bits a token: without that, no plan keeps the latency ceiling"
            )
        slow = [
            u
            for u in ground.packable
            if found.decision.get(u.name) is None and times.extra(u, u.options[0], found.inputs) > 0
        ]
        if slow:
            self.note(
                f"left as they are, since packed they would be slower at this batch: {few([u.name for u in slow])}"
            )
        return found.decision

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
            self.note(f"inputs are rounded by tokens, since they do not run on the calibration data: {few(left)}")

    def _inputs(self) -> Inputs:
        """How packed linear layers take their inputs, as a recipe says it."""
        if any(static_scale(unit.inputs) for unit in self.ground.units):
            return "int8_static"
        return "int8" if self._int8() else "float"

    def _int8(self) -> bool:
        """Whether packed linear layers round their inputs."""
        return any(unit.inputs for unit in self.ground.units)

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

    def rounding(self) -> str:
        """The method that weights are rounded by: the recipe's, or to nearest where there is nothing to calibrate with."""
        step = self.recipe.quantize
        return step.method if step is not None and self.batches("calibrate", 1) else "rtn"

    # --- what options cost --------------------------------------------------------------------------------------------

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
            costs = option_costs(read, weights, ground.units, lambda d, t: self.progress("options", d, t))
            self._costs = as_solved(costs, ground.packable, self.rounding())
        return self._costs

    def _fisher(self) -> dict[str, Tensor] | None:
        batches = self.batches("calibrate", SENSITIVITY_TOKENS, batch=4)
        if not batches:
            return None
        report = lambda d, t: self.progress("sensitivity", d, t)  # noqa: E731
        try:
            return fisher(self.ground.model, self.task, batches, self.ground.units, self.options.seed, report)
        except (RuntimeError, NotImplementedError) as error:
            self.note(f"sensitivity is that of the weights alone: no gradient ({str(error).splitlines()[0]})")
            return None

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

    # --- what is measured on the way ----------------------------------------------------------------------------------

    def _select_float(self) -> None:
        """The float model on the select split, once."""
        assert self.task is not None
        if self._select_before is None:
            self._select_before = self.task.evaluate_float(self.ground.model, "select")
        names = {n for u in self.ground.units for n in u.names}
        self._old_biases = {
            n: p.detach().clone() for n, p in self.ground.model.named_parameters() if n in names and p.dim() == 1
        }

    def _float_on_select(self) -> Evaluation:
        self._select_float()
        assert self._select_before is not None
        return self._select_before

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
            kept = [step for step in self.recipe.passes if step.action not in self.dropped]
            one["passes"] = self.recipe.model_copy(update={"passes": kept}).model_dump(by_alias=True)
            one["units"] = {n: str(s) if s is not None else None for n, s in decision.items()}
        if one not in self.tried:  # the chosen recipe is solved again after others were tried
            self.tried.append(one)

    def interval(self, found: Comparison) -> tuple[float | None, float | None]:
        """The interval; where nothing changed at all, zero changes in n examples still allow about 3/n (rule of three).

        One number has none, and neither has an infinite drop.
        """
        low, high = found.span
        metric = self.task.metric if self.task else None
        if metric is not None and metric.bounded and not metric.against_float and low == high == 0.0:
            high = 300.0 / found.n
        return low, high

    def _holds_select(self) -> bool:
        """Whether what is solved is measured on the select split."""
        there = self.task is not None and not self.ground.streamed and "select" in self.task.splits
        repairs = self.recipe.correct_biases or self.recipe.norm_tweak is not None
        return there and (self.budget.drop is not None or repairs or self.options.search == "always")

    def _latency_batch(self) -> Any:
        """A batch of the user's size, or None where the task has no inputs."""
        n = self.options.batch or 1
        batches = self.batches("verify", 10**9, batch=n, limit=n)
        return batches[0] if batches else None
