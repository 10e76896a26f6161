"""`blame`: which parameters of an artifact cost the quality, and what it would cost to have it back; `repair` does it.

How far the artifact's model is from the float one is measured on the select split, on outputs f (float) and g:

    D = mean over positions of KL(softmax f || softmax g)        where the output is logits
    D = sum |f - g|^2 / sum |f - mean f|^2                       elsewhere

What a set of parameters costs is D less the D with these put back to their float values. The parameters are searched by
bisection, the set that costs most first, until it is one: about 2 n log2(N) measurements find the n worst of N, where
measuring each alone would take N. Each of them is then tried at more bits, rounded to nearest, until most of what it costs
is back: that is its repair, with its price in bytes. The task's metric is measured with each repair at the end, on the same
examples, with its interval; what many small culprits cost together is no sum of these.
"""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.record import owner_of
from laconic.core.units import BITS, Unit
from laconic.errors import BadInput
from laconic.numerics import Scheme
from laconic.tasks import TASKS, Task
from laconic.tasks import compare as compare_evaluations

from .artifact import MANIFEST
from .budget import UNBOUNDED, Budget, parse_bytes
from .compress import Result, compress
from .deciding import Deciding
from .load import load
from .observe import rounded_inputs
from .reading import Options, Progress
from .recipe import Recipe, load_recipe
from .solve import owner
from .tryout import rounded

__all__ = ["blame", "repair"]

TOKENS = 4096  # positions on which the distance is measured
LOGITS = 1 << 26  # elements of float logits that are kept for it
BACK = 0.8  # of what a parameter costs that its repair gives back


def blame(
    artifact: str | os.PathLike[str],
    data: Any = None,
    *,
    task: str | Task | None = None,
    model: Any = None,
    columns: Mapping[str, str] | None = None,
    most: int = 5,
    batch: int | None = None,
    seq: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the packed parameters that cost most, and what more bits for each would cost and give back.

    Args:
        artifact: a folder that `compress` wrote.
        data, task, columns, batch, seq, seed: as in `compress`; the task that the artifact's report names by default.
        model: the float model; the one that the report names by default.
        most: culprits to find.
        trust_remote_code, allow_pickle, example: as in `compress`.
        progress: is called with (stage, done, total).

    Returns:
        A record: `distance` (of the whole), `drop` (on the select split, of the metric), `culprits` (worst first: `name`,
        `scheme`, `share` of the distance, and `repair`: `scheme`, `bytes` more, `share` that it gives back, `points` with
        `low` and `high`), `sentences`, `measured` (how often the model ran over the examples), `size`.

    Raises:
        BadInput: no artifact, no data, a float model that is not there or is another one.
    """
    if most < 1:
        raise BadInput(f"most is {most}: at least one culprit is looked for")
    begin, show = time.perf_counter(), progress or (lambda stage, done, total: None)
    folder, recipe, told = _read(artifact)
    data = _data(data, task, told, folder)
    options = Options(
        recipe=_with(recipe, bits=list(BITS)), seed=seed, batch=batch, seq=seq, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    run = Deciding(options, UNBOUNDED, show)
    run.prepare(model if model is not None else _model(told, data), data, columns, example)
    if run.task is None or "select" not in run.task.splits:
        raise BadInput("blame compares outputs on the select split, which this data has not: give a task or examples")
    run.rewrite()
    with torch.no_grad():
        mixed = _Mixed(run, folder, show)
        found = _culprits(mixed, most)
        culprits = [_priced(mixed, unit, cost) for unit, cost in found]
        record = _measured(mixed, culprits, seed)
    record |= {
        "artifact": os.fspath(artifact), "model": run.ground.source.name, "task": run.task.id, "split": "select",
        "metric": run.task.metric.name, "unit": "points" if run.task.metric.bounded else "%", "seed": seed,
        "size": run.ground.layout(mixed.decision).total_bytes, "distance": mixed.whole, "distance_is": mixed.kind,
        "packed": len(mixed.units), "measured": mixed.measured, "seconds": time.perf_counter() - begin,
        "notes": list(run.notes),
    }  # fmt: skip
    record["sentences"] = [_sentence(one, record["unit"]) for one in record["culprits"]]
    return record


def repair(
    artifact: str | os.PathLike[str],
    data: Any = None,
    *,
    out: str | os.PathLike[str],
    changes: Mapping[str, str | None] | None = None,
    within: str | int | None = None,
    task: str | Task | None = None,
    model: Any = None,
    columns: Mapping[str, str] | None = None,
    most: int = 5,
    batch: int | None = None,
    seq: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    example: Any = None,
    progress: Progress | None = None,
) -> Result:
    """Write an artifact again with more bits where they are missed, and measure it.

    Args:
        artifact, data, task, model, columns, most, batch, seq, seed: as in `blame`.
        out: folder of the new artifact.
        changes: parameter -> scheme, a number of bits, or None for float; what `blame` finds by default.
        within: bytes that may be added, as "0.5MB": of the repairs found, those that give most back for each byte. All of
            them by default.
        overwrite, trust_remote_code, allow_pickle, example, progress: as in `compress`.

    Returns:
        The result of `compress`; `record["repaired"]` says what was changed.

    Raises:
        BadInput: as in `blame`; a parameter that is not packed, a scheme that does not parse, nothing to repair, or
            nothing that fits within.
    """
    folder, recipe, told = _read(artifact)
    data = _data(data, task, told, folder)
    common = {
        "columns": columns, "batch": batch, "seq": seq, "seed": seed, "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle, "example": example, "progress": progress,
    }  # fmt: skip
    model = model if model is not None else _model(told, data)
    if changes is None:
        room = parse_bytes(within, "within") if isinstance(within, str) else within
        found = blame(artifact, data, model=model, most=most, **common)
        changes = _affordable(found, room)
    units = _units(recipe)
    units |= {name: _scheme_text(name, wanted, units) for name, wanted in changes.items()}
    budget = Budget(text=f"repair of {folder.name}")
    result = compress(model, data, budget, out=out, recipe=_with(recipe, units=units), overwrite=overwrite, **common)
    result.record["repaired"] = {name: units[name] for name in changes}
    return result


def _read(artifact: str | os.PathLike[str]) -> tuple[Path, Recipe, dict[str, Any]]:
    """The folder, its recipe with every choice written out, and its report."""
    folder = Path(artifact)
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"{artifact} is no artifact: it has no {MANIFEST}; `laconic compress` writes one")
    if not (folder / "recipe.yaml").is_file() or not (folder / "report.json").is_file():
        raise BadInput(f"{artifact} has no recipe.yaml and report.json: only what `compress` wrote can be blamed")
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.quantize is None or recipe.quantize.units is None:
        raise BadInput(f"{artifact}/recipe.yaml packs nothing: there is nothing to blame")
    return folder, recipe, json.loads((folder / "report.json").read_text())


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with fields of its quantize pass replaced."""
    passes = [step.model_copy(update=changes) if step is recipe.quantize else step for step in recipe.passes]
    return recipe.model_copy(update={"passes": passes})


def _units(recipe: Recipe) -> dict[str, str | None]:
    assert recipe.quantize is not None and recipe.quantize.units is not None
    return dict(recipe.quantize.units)


def _data(data: Any, task: Any, told: Mapping[str, Any], folder: Path) -> Any:
    if data is not None and task is not None:
        raise BadInput("both data and a task were given: a task brings its own data, so give one of them")
    given = data if data is not None else task
    if given is not None:
        return given
    named = (told.get("task") or {}).get("id")
    if named in TASKS:
        return named
    raise BadInput(f"the report of {folder} names no task that can be opened by name: pass --data or --task")


def _model(told: Mapping[str, Any], data: Any) -> Any:
    """The float model that the report names; None where the task brings it."""
    named = told["model"]["name"]
    return None if isinstance(data, str) and data in TASKS else named


def _scheme_text(name: str, wanted: str | int | None, units: Mapping[str, str | None]) -> str | None:
    """A scheme in full, from a scheme or a number of bits beside what the parameter has."""
    if name not in units:
        raise BadInput(f"{name} is no parameter that the artifact's recipe names; `laconic blame` lists them")
    if wanted is None or str(wanted).lower() in ("float", "none"):
        return None
    now = units[name]
    if str(wanted).isdigit():
        if now is None:
            raise BadInput(f"{name} is not packed: write the whole scheme instead of {wanted} bits")
        parts = now.split("/")
        wanted = "/".join([parts[0], f"int{wanted}", *parts[2:]])
    try:
        return str(Scheme.parse(str(wanted)))
    except ValueError as error:
        raise BadInput(f"{name}: {error}") from error


def _affordable(found: Mapping[str, Any], room: int | None) -> dict[str, str | None]:
    """The repairs that give most back for their bytes, as many as fit."""
    repairs = {one["name"]: one["repair"] for one in found["culprits"] if one["repair"] is not None}
    if not repairs:
        raise BadInput("nothing to repair: no packed parameter was found whose float values bring the outputs nearer")
    chosen: dict[str, str | None] = {}
    for name, one in sorted(repairs.items(), key=lambda item: -item[1]["share"] / max(1, item[1]["bytes"])):
        if room is None or one["bytes"] <= room:
            chosen[name] = one["scheme"]
            room = None if room is None else room - one["bytes"]
    if not chosen:
        cheapest = min(repairs.values(), key=lambda one: one["bytes"])
        raise BadInput(f"no repair fits within that: the cheapest takes {cheapest['bytes']:,} bytes more")
    return chosen


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class _Culprit:
    unit: Unit
    cost: float
    scheme: Scheme | None
    bytes: int
    back: float


class _Mixed:
    """The float model, of which some parameters hold what their packed form stands for."""

    def __init__(self, run: Deciding, folder: Path, show: Progress):
        self.run, self.ground, self.show = run, run.ground, show
        assert run.task is not None
        self.task = run.task
        self.measured = 0
        assert run.recipe.quantize is not None
        named = run.recipe.quantize.units or {}
        self.decision = {u.name: Scheme.parse(s) for u in self.ground.packable if (s := named.get(u.name)) is not None}
        self.units = [u for u in self.ground.packable if u.name in self.decision]
        if not self.units:
            raise BadInput(f"{folder} has no packed parameter: there is nothing to blame")
        self.float = {n: p.detach().clone() for n, p in self.ground.model.named_parameters()}
        self.batches, self.reference = self._seen()
        self.logits = self.task.metric.name in ("perplexity", "accuracy") and self.reference[0].dim() >= 2
        self.kind = "KL divergence to the float model" if self.logits else "relative squared error of the output"
        self.spread = 0.0
        if not self.logits:
            mean = torch.cat([r.reshape(-1, r.shape[-1]) for r in self.reference]).mean(0)
            self.spread = sum(float((r - mean).square().sum()) for r in self.reference)
        self.packed = self._packed_values(folder)
        self.beside = self._beside()
        self.whole = self.distance({})

    def _seen(self) -> tuple[list[Any], list[Tensor]]:
        """Batches of the select split, and what the float model gives for them, as far as that is kept."""
        batches, outputs = [], []
        for batch in self.run.batches("select", TOKENS, batch=8):
            output = self._output(batch)
            if outputs and output.numel() + sum(kept.numel() for kept in outputs) > LOGITS:
                break
            batches.append(batch)
            outputs.append(output)
        if not batches:
            raise BadInput(f"{self.task.id} has no inputs on its select split: blame compares outputs")
        return batches, outputs

    def _packed_values(self, folder: Path) -> dict[str, Tensor]:
        """What the artifact's parameters stand for, by name; units learn how their layers round inputs."""
        into = None if self.ground.source.kind == "transformers" else self.ground.source.skeleton()
        packed = load(folder, into=into)
        values: dict[str, Tensor] = {}
        units = {unit.name: unit for unit in self.units}
        for name, value in self.float.items():
            module, attribute = owner_of(packed, name)
            held = getattr(module, attribute)
            if not isinstance(held, Tensor) or held.shape != value.shape:
                raise BadInput(
                    f"{name} of {folder} is not that of {self.ground.source.name}: name the float model it came from"
                )
            if name in self.decision or not torch.equal(held, value):
                values[name] = held.detach().to(value.dtype).clone()
            if name in units:
                units[name].inputs = module._packed[attribute].inputs  # type: ignore[operator,index,union-attr]
        return values

    def _beside(self) -> dict[str, list[str]]:
        """Parameters that changed with a packed one: its layer's bias, corrected. What has no such layer stays as packed."""
        by_owner = {owner(u): u.name for u in self.units}
        found: dict[str, list[str]] = {u.name: [u.name] for u in self.units}
        for name in self.packed:
            if name not in found and (unit := by_owner.get(name.rpartition(".")[0])) is not None:
                found[unit].append(name)
        return found

    def distance(self, instead: Mapping[str, Scheme | None]) -> float:
        """D with some parameters float (None) or rounded to nearest by another scheme, and all others as packed."""
        self._hold(instead)
        self.measured += 1
        self.show("blame", self.measured, self.measured + 1)
        total, count = 0.0, 0
        with self._rounding(instead):
            for batch, wanted in zip(self.batches, self.reference, strict=True):
                got = self._output(batch)
                if self.logits:
                    total += float(
                        nn.functional.kl_div(
                            got.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True
                        )
                    )
                    count += wanted[..., 0].numel()
                else:
                    total += float((got - wanted).square().sum())
        found = total / count if self.logits else total / (self.spread or 1.0)
        return found if found == found else float("inf")

    def evaluate(self, instead: Mapping[str, Scheme | None]) -> Any:
        """The task's own measure of the same."""
        self._hold(instead)
        self.measured += 1
        self.show("blame", self.measured, self.measured + 1)
        with self._rounding(instead):
            return self.task.evaluate(self.ground.model, "select")

    def _output(self, batch: Any) -> Tensor:
        return self.task.forward(self.ground.model.eval(), batch).detach().float()

    def _hold(self, instead: Mapping[str, Scheme | None]) -> None:
        values = dict(self.packed)
        for name, scheme in instead.items():
            for beside in self.beside[name]:
                values.pop(beside, None)
            if scheme is not None:
                values[name] = rounded(next(u for u in self.units if u.name == name), scheme, self.float[name])
        for name, value in self.float.items():
            self.ground.model.get_parameter(name).data.copy_(values.get(name, value))

    def _rounding(self, instead: Mapping[str, Scheme | None]) -> AbstractContextManager[None]:
        """Inputs rounded where the artifact rounds them."""
        packed = [u for u in self.units if u.name not in instead or instead[u.name] is not None]
        return rounded_inputs(self.ground.model, packed)


def _culprits(mixed: _Mixed, most: int) -> list[tuple[Unit, float]]:
    """The units that cost most, and what each costs: sets are halved, the one that costs most first."""

    def cost(units: Sequence[Unit]) -> float:
        return mixed.whole - mixed.distance({u.name: None for u in units})

    order = 0
    heap: list[tuple[float, int, list[Unit], float]] = []

    def push(units: list[Unit]) -> None:
        nonlocal order
        found = cost(units)
        order += 1
        heapq.heappush(heap, (-found, order, units, found))

    push(mixed.units)
    culprits: list[tuple[Unit, float]] = []
    while heap and len(culprits) < most:
        _, _, units, found = heapq.heappop(heap)
        if found <= 0:
            break
        if len(units) == 1:
            culprits.append((units[0], found))
            continue
        push(units[: len(units) // 2])
        push(units[len(units) // 2 :])
    return culprits


def _priced(mixed: _Mixed, unit: Unit, cost: float) -> _Culprit:
    """The cheapest way to have most of it back: more bits, or float values."""
    now = mixed.decision[unit.name]
    room = unit.stored(now)
    wider = sorted((s for s in unit.options if s.bits > now.bits), key=lambda s: unit.stored(s))
    for scheme in wider:
        back = mixed.whole - mixed.distance({unit.name: scheme})
        if back >= BACK * cost:
            return _Culprit(unit, cost, scheme, unit.stored(scheme) - room, back)
    return _Culprit(unit, cost, None, unit.nbytes - room, cost)


def _measured(mixed: _Mixed, culprits: list[_Culprit], seed: int) -> dict[str, Any]:
    """The task's metric: of the artifact against the float model, and with each repair against the artifact."""
    metric = mixed.task.metric
    reference, packed = mixed.evaluate({u.name: None for u in mixed.units}), mixed.evaluate({})
    whole = compare_evaluations(reference, packed, metric, seed)
    rows = []
    for one in culprits:
        repaired = mixed.evaluate({one.unit.name: one.scheme})
        without, with_ = (compare_evaluations(reference, e, metric, seed).drop for e in (packed, repaired))
        gained = compare_evaluations(repaired, packed, metric, seed)
        # Scores against the float model are not against each other.
        low, high = (None, None) if metric.against_float else gained.span
        rows.append(
            {
                "name": one.unit.name, "scheme": str(mixed.decision[one.unit.name]),
                "bits": mixed.decision[one.unit.name].bits, "share": one.cost / mixed.whole,
                "repair": {
                    "scheme": None if one.scheme is None else str(one.scheme),
                    "bits": 8 * one.unit.dtype.itemsize if one.scheme is None else one.scheme.bits,
                    "bytes": one.bytes, "share": one.back / mixed.whole, "points": without - with_,
                    "low": low, "high": high,
                },
            }
        )  # fmt: skip
    low, high = whole.span
    return {"drop": whole.drop, "low": low, "high": high, "n": whole.n, "culprits": rows}


def _sentence(one: Mapping[str, Any], unit: str) -> str:
    """As "encoder.layer.3.output.dense.weight to 8 bits: +0.40 MB, gets back 1.1 points"."""
    repair = one["repair"]
    to = "as it was (float)" if repair["scheme"] is None else f"to {repair['bits']:g} bits"
    span = "" if repair["low"] is None else f" (95 %: {repair['low']:.2f} to {repair['high']:.2f})"
    return (
        f"{one['name']} {to}: {repair['bytes'] / 1e6:+.2f} MB, gets back {repair['points']:.2f} {unit}{span} and "
        f"{100 * repair['share']:.0f} % of the distance"
    )
