"""Solving: from a float model and a decision to packed tensors, unit by unit, each kept on disk as soon as it is done.

Units without use for data are rounded to nearest, some rows at a time. The others are solved in the order of the forward
pass (`walk`), each with the inputs that the *already compressed* layers before it give: by GPTQ, and where the layer has a
bias, that takes up the mean of what rounding changed.

A model that does not fit under `--max-ram` takes the same road with its weights and activations on disk (`residency`);
layers outside its chain of blocks, and those whose Hessian is too large, are rounded to nearest there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.record import Record, owner_of
from laconic.core.structure import Structure
from laconic.core.units import Unit
from laconic.nn import matrix_view, pack_tensors, restore_view
from laconic.numerics import Int, Scheme, read_scales
from laconic.quant import Hessian, Matrix, bias_correction, clip_calibrated, solve_calibrated

from .distribute import Elsewhere, Shares, Team
from .learned import learn, learnable
from .recipe import LEARNED
from .residency import InMemory, Streamed
from .source import Source
from .stream import round_rows
from .walk import Chain, Columns, Inputs, call_order, first_rows, run_all
from .workspace import Workspace, digest

Progress = Callable[[int, int, str], None]
RERUN_STAGES = 12  # at most this many runs from the start for layers outside the chain
BY_INPUTS = ("gptq", "rsq", "awq")  # methods that weigh errors by the second moments of the inputs
# The share of what rounding to nearest loses that methods leave of it, about. By it bits go from layers to embeddings, which no
# method helps. Of 1, 1/2, 1/4 and 1/10 a quarter lost least, or as little as another, in eight of nine plans: those of chars,
# tiny-lm and MiniLM (without 1/2) at 4, 3 and 2 bits.
SOLVED: dict[str, float] = {"gptq": 0.25, "rsq": 0.25}
GPTQ_BITS = 7  # at 8 bits rounding errors are lost in the noise of everything else


@dataclass
class Solving:
    """Everything that solving needs.

    Attributes:
        model: float, in memory, its weights replaced by what the packed ones stand for as units are solved; or a skeleton.
        source: of the float tensors of a skeleton; None for a model in memory.
        units: all units; `decision` says which are packed and how.
        base_key: hash of what all data-aware solutions depend on.
        digests: of every unit's float values.
        method: of `recipe.Quantize`.
        steps: of Adam for each layer, of methods that learn how to round.
        correct_biases: whether the biases of solved layers take up the mean of the error.
        max_ram: bytes for everything, or None.
        notes: sentences for the report are added here.
        team: the processes that share the work.
    """

    model: nn.Module
    task: Any
    batches: Sequence[Any]
    units: Sequence[Unit]
    decision: dict[str, Scheme | None]
    structure: Structure
    workspace: Workspace
    base_key: str
    digests: dict[str, str]
    method: str = "gptq"
    steps: int = 500
    seed: int = 0
    correct_biases: bool = False
    progress: Progress = lambda done, total, name: None  # noqa: E731
    source: Source | None = None
    max_ram: int | None = None
    notes: list[str] = field(default_factory=list)
    team: Team = field(default_factory=Team)


def solve(job: Solving) -> list[Record]:
    """Records of all packed units, in the model's order; `data["key"]` names their tensors in the workspace."""
    todo = [u for u in job.units if job.decision.get(u.name) is not None]
    state = _State(job, total=len(todo))
    aware = [u for u in todo if job.batches and _looks_at_data(job, u)]
    teacher = copy.deepcopy(job.model) if aware and job.method in LEARNED and job.source is None else None
    state.round_all([u for u in todo if u not in aware])
    with torch.no_grad():
        if teacher is not None:
            _learn(job, state, aware, teacher)
        elif aware and job.source is None:
            _walk(job, state, aware)
        elif aware:
            _walk_streamed(job, state, aware)
    order = {u.name: i for i, u in enumerate(job.units)}
    return sorted(state.records.values(), key=lambda r: order[r.path])


def rounds_by_data(method: str, unit: Unit, scheme: Scheme | None) -> bool:
    """Whether a method looks at data to round a unit to a scheme; what it has no way with goes to nearest."""
    if method in LEARNED:
        return _has_grid(scheme) and learnable(unit)
    return method in BY_INPUTS and _reads_inputs(unit, scheme)


def as_solved(costs: dict[str, list[float]], units: Sequence[Unit], method: str) -> dict[str, list[float]]:
    """Costs of rounding to nearest, less where a method with data will do better; embeddings and the like none can help.

    At all widths of a layer alike: what is given out among layers is not touched.
    """
    left = SOLVED.get(method, 1.0)
    helped = {u.name for u in units if any(rounds_by_data(method, u, s) for s in u.options)}
    return {name: [left * c for c in found] if name in helped else found for name, found in costs.items()}


def _looks_at_data(job: Solving, unit: Unit) -> bool:
    scheme = job.decision[unit.name]
    if job.method in LEARNED or job.method in BY_INPUTS:
        return rounds_by_data(job.method, unit, scheme)
    return _reads_inputs(unit, scheme) and _bias(job, unit) is not None


def _has_grid(scheme: Scheme | None) -> bool:
    """Integers, under scales that are not coded, which would follow from the whole matrix at once."""
    return scheme is not None and isinstance(scheme.element, Int) and scheme.scale.plain


def _reads_inputs(unit: Unit, scheme: Scheme | None) -> bool:
    few_bits = scheme is not None and scheme.bits <= GPTQ_BITS
    return few_bits and _has_grid(scheme) and unit.op in ("linear", "conv") and len(unit.names) == 1


def _learn(job: Solving, state: _State, units: list[Unit], teacher: nn.Module) -> None:
    """Train how layers round, all of them anew where one is missing: each has seen what those before it gave."""
    keys = {u.name: state.key(u, job.method) for u in units}
    found = {u.name: job.workspace.load(keys[u.name]) for u in units}
    if any(tensors is None for tensors in found.values()):
        solved = learn(
            job.method, job.model, teacher, job.task, job.batches, units, job.decision, job.steps, job.seed
        )  # fmt: skip
        for unit in [u for u in units if u.name not in solved]:
            state.round(unit)  # it does not run on this data
        for name, tensors in solved.items():
            found[name] = {key: tensor.cpu() for key, tensor in tensors.items()}
            job.workspace.save(keys[name], tensors)
    for unit in units:
        if unit.name not in state.records:
            state.keep(unit, job.method, keys[unit.name], found[unit.name] or {}, f"{owner(unit)}.bias".lstrip("."))


def _bias(job: Solving, unit: Unit) -> str | None:
    """Name of the bias that may take up what rounding a unit shifts."""
    name = f"{owner(unit)}.bias".lstrip(".")
    module = job.model.get_submodule(owner(unit))
    mine = {n: u for u in job.units for n in u.names}.get(name)
    if not job.correct_biases or mine is None or mine.protected or len(mine.names) > 1:
        return None
    if job.decision.get(name) is not None:
        return None
    return name if isinstance(getattr(module, "bias", None), Tensor) else None


class _State:
    """Records so far, and how a unit becomes one."""

    def __init__(self, job: Solving, total: int):
        self.job, self.total = job, total
        self.records: dict[str, Record] = {}
        self.chain = ""  # hash over everything solved with data so far: later solutions depend on it
        self.leaders: dict[str, str] = {}  # what `Shares` learns from stage to stage

    def key(self, unit: Unit, method: str) -> str:
        """Name of a unit's solution: everything that its bits depend on."""
        job = self.job
        upstream = (job.base_key, self.chain, _bias(job, unit)) if method != "rounded" else ()
        return digest("unit", 2, unit.name, str(job.decision[unit.name]), method, job.digests[unit.name], *upstream)

    def round_all(self, units: Sequence[Unit]) -> None:
        """Round units to nearest; of several processes, each does its share."""
        job, team = self.job, self.job.team
        if team.size > 1:
            keys = {self.key(unit, "rounded"): unit for unit in units}
            missing = team.agree(job.workspace, keys)
            wanted = [key for key in keys if key in missing]
            made = dict(zip(wanted, team.deal([keys[key].numel for key in wanted]), strict=True))
            for key in (key for key, rank in made.items() if rank == team.rank):
                scheme = job.decision[keys[key].name]
                assert scheme is not None
                job.workspace.save(key, round_rows(self._reader(keys[key]), keys[key], scheme))
            team.share(job.workspace, made)
            job.workspace.fresh.update(made)
        for unit in units:
            self.round(unit)

    def round(self, unit: Unit) -> None:
        """Round a unit to nearest, some rows at a time."""
        job, scheme = self.job, self.job.decision[unit.name]
        assert scheme is not None
        key = self.key(unit, "rounded")
        tensors = job.workspace.load(key)
        if tensors is None:
            tensors = round_rows(self._reader(unit), unit, scheme)
            job.workspace.save(key, tensors)
        self.keep(unit, "rtn", key, tensors)

    def finish(self, units: Sequence[Unit], keys: dict[str, str], stats: Hessian | Columns | None) -> None:
        """Keep what an earlier run left of `units`, which read the same inputs, and solve the rest.

        All are solved together, also where only some are missing: the bits of a product may depend on how many rows it has.
        """
        job = self.job
        found = {u.name: job.workspace.load(keys[u.name]) for u in units}
        if any(tensors is None for tensors in found.values()):
            assert stats is not None
            mean = stats.mean.cpu()
            for unit, tensors in zip(units, self._solved(units, stats), strict=True):
                if found[unit.name] is None:
                    found[unit.name] = self._save(unit, keys[unit.name], tensors, mean)
        for unit in units:
            self.keep(unit, job.method, keys[unit.name], found[unit.name] or {}, _bias(job, unit))

    def _solved(self, units: Sequence[Unit], stats: Hessian | Columns) -> list[dict[str, Tensor]]:
        """What is stored of units that read the same inputs."""
        job = self.job
        schemes = [s for u in units if (s := job.decision[u.name]) is not None]
        if job.method not in BY_INPUTS or not isinstance(stats, Hessian):
            return [round_rows(self._held(u), u, s) for u, s in zip(units, schemes, strict=True)]
        weights = [matrix_view(job.model.get_parameter(u.name).detach(), u.view) for u in units]
        wanted = [Matrix(u.name, w, s) for u, w, s in zip(units, weights, schemes, strict=True)]
        solved = clip_calibrated(wanted, stats) if job.method == "awq" else solve_calibrated(wanted, stats)
        stored = []
        for unit, scheme, one in zip(units, schemes, solved, strict=True):
            tensors = pack_tensors(unit.spec(scheme), one.solved.codes, one.solved.scale, one.solved.zero)
            stored.append({**tensors, "loss": torch.tensor(one.loss, dtype=torch.float64)})
        return stored

    def _save(self, unit: Unit, key: str, tensors: dict[str, Tensor], mean: Tensor) -> dict[str, Tensor]:
        """Keep a solution, with the corrected bias where there is one."""
        bias = _bias(self.job, unit)
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        if bias is not None:
            scheme = self.job.decision[unit.name]
            assert scheme is not None
            weight = matrix_view(self.job.model.get_parameter(unit.name).detach(), unit.view).cpu()
            value = matrix_view(Packed(unit.record(scheme), tensors).value(), unit.view)
            old = self.job.model.get_parameter(bias).detach().cpu()
            tensors["bias"] = bias_correction(mean, weight, value, old)
        self.job.workspace.save(key, tensors)
        return tensors

    def keep(self, unit: Unit, method: str, key: str, tensors: dict[str, Tensor], bias: str | None = None) -> None:
        """Put what a solution stands for into the model, with the bias of this name if it has one, and remember its record."""
        job = self.job
        said: dict[str, Any] = {"method": method, "loss": float(tensors["loss"]), "key": key}
        if "bias" in tensors:
            said["bias"] = bias
        scheme = job.decision[unit.name]
        assert scheme is not None
        record = self.records[unit.name] = unit.record(scheme, **said)
        parameter = owner_of(job.model, unit.name)[0]._parameters[unit.name.rpartition(".")[2]]
        assert parameter is not None
        if parameter.device.type != "meta":
            parameter.data.copy_(Packed(record, tensors).value())
            if "bias" in tensors:
                job.model.get_parameter(said["bias"]).data.copy_(tensors["bias"])
        job.progress(len(self.records), self.total, unit.name)

    def _held(self, unit: Unit) -> Callable[[int, int], Tensor]:
        parameter = self.job.model.get_parameter(unit.name).detach()
        return lambda begin, end: parameter[begin:end]

    def _reader(self, unit: Unit) -> Callable[[int, int], Tensor]:
        source = self.job.source
        return self._held(unit) if source is None else lambda begin, end: source.read(unit.name, begin, end)


@dataclass(frozen=True)
class Packed:
    """A packed parameter's record and tensors."""

    record: Record
    tensors: dict[str, Tensor]

    def value(self) -> Tensor:
        """float32 parameter that it stands for."""
        return restore_view(self._dequantized(slice(None)), self.record.spec)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of a matrix that is stored by rows."""
        return self._dequantized(ids)

    def _dequantized(self, rows: Any) -> Tensor:
        from laconic.kernels.ops import dequantize_rows, unpack_zero

        t, spec = self.tensors, self.record.spec
        scale = read_scales(t, spec.scheme, spec.scheme.scales(*spec.matrix))
        shared = scale.shape[0] != t["packed"].shape[0]  # one scale for the whole tensor
        stored = t[spec.scheme.beside] if spec.scheme.beside else None
        zero = unpack_zero(stored, scale.shape[0], spec.scheme)
        zero = zero if zero is None or shared or spec.scheme.zero == "none" else zero[rows]
        scale = scale if shared else scale[rows]
        return dequantize_rows(t["packed"][rows], scale, zero, spec.scheme.plain, spec.matrix[1])


@dataclass(frozen=True)
class Corrected:
    """A bias that took up the mean of its layer's rounding errors."""

    bias: Tensor

    def value(self) -> Tensor:
        """The bias."""
        return self.bias

    def rows(self, ids: Tensor) -> Tensor:
        """Some of its elements."""
        return self.bias[ids]


# --- walking the model ----------------------------------------------------------------------------------------------


def _walk(job: Solving, state: _State, aware: list[Unit]) -> None:
    """Solve data-aware units of a model in memory stage by stage, in the order of the forward pass."""
    order = call_order(job.model, job.task, first_rows(job.batches[0], 1), [owner(u) for u in aware])
    state.round_all([u for u in aware if owner(u) not in order])  # not reached on this data: nothing to learn from
    aware = sorted((u for u in aware if owner(u) in order), key=lambda u: order[owner(u)])
    chain = Chain.find(job.model, job.structure, job.task, job.batches, InMemory())
    blocks = job.structure.blocks if isinstance(chain, Chain) else ()
    in_chain = [u for u in aware if any(inside(u, b) for b in blocks)]
    first = min((order[owner(u)] for u in in_chain), default=len(order))
    before = [u for u in aware if u not in in_chain and order[owner(u)] < first]
    after = [u for u in aware if u not in in_chain and u not in before]
    for stage in _stages(before):
        _solve_stage(job, state, stage, lambda inputs: run_all(job.model, job.task, job.batches, inputs))
    if isinstance(chain, Chain) and in_chain:
        _walk_chain(job, state, chain, in_chain, None)
    for stage in _stages(after):
        _solve_stage(job, state, stage, lambda inputs: run_all(job.model, job.task, job.batches, inputs))


def _walk_streamed(job: Solving, state: _State, aware: list[Unit]) -> None:
    """Solve the units of a skeleton's chain block by block, and round what lies elsewhere."""
    assert job.source is not None
    found = find_streamed_chain(job, lambda name: _solved(job, state, name))
    if isinstance(found, str):
        job.notes.append(f"the model does not fit under --max-ram and {found}: its layers were rounded to nearest")
    blocks = job.structure.blocks if isinstance(found, Chain) else ()
    large = [u for u in aware if any(inside(u, b) for b in blocks) and not _hessian_fits(job, u)]
    if large:
        job.notes.append(
            f"{len(large)} layers were rounded to nearest: the Hessian of {large[0].name} takes more memory than "
            "--max-ram leaves"
        )
    in_chain = [u for u in aware if any(inside(u, b) for b in blocks) and u not in large]
    state.round_all([u for u in aware if u not in in_chain])
    if isinstance(found, Chain) and in_chain:
        _walk_chain(job, state, found, in_chain, job.workspace.activations)


def find_streamed_chain(job: Solving, solved: Callable[[str], Packed | Corrected | None]) -> Chain | str:
    """The chain of a skeleton, or why there is none."""
    assert job.source is not None
    residency = Streamed(job.model, job.source, solved)
    try:
        return Chain.find(job.model, job.structure, job.task, job.batches, residency)
    except (RuntimeError, NotImplementedError) as error:  # something reads a tensor of a module that does not run
        return f"it does not run module by module ({str(error).splitlines()[0]})"


def _walk_chain(job: Solving, state: _State, chain: Chain, units: list[Unit], spill: Path | None) -> None:
    chain.team = job.team
    chain.start(spill)
    for block in chain.blocks:
        stage = [u for u in units if inside(u, block)]
        with chain.block(block):
            if stage:
                look = partial(chain.look, block, by_attention=job.method == "rsq")
                _solve_stage(job, state, stage, look)


def _solve_stage(job: Solving, state: _State, stage: list[Unit], look: Callable[[Inputs], None]) -> None:
    """Collect statistics for the stage's units and solve them; reuse what an earlier run left."""
    keys = {u.name: state.key(u, job.method) for u in stage}
    missing = job.team.agree(job.workspace, keys.values())  # also what was torn as it was written
    full = {owner(u) for u in stage if job.method in BY_INPUTS}
    stats: dict[str, Hessian | Columns | Elsewhere] = {}
    if missing:
        modules = {owner(u): job.model.get_submodule(owner(u)) for u in stage}
        shares = _shares(job, state, stage) if job.team.size > 1 else None
        inputs = Inputs(modules, full, once=all(job.structure.calls.get(path) == 1 for path in modules), shares=shares)
        look(inputs)
        stats = inputs.result()
        del inputs
    groups: dict[int, list[Unit]] = {}
    for unit in stage:
        found = stats.get(owner(unit))
        groups.setdefault(id(found) if found is not None else -1, []).append(unit)
    made: dict[str, int] = {}  # by which process
    unseen, others = [], []
    for units in groups.values():
        shared = stats.get(owner(units[0]))
        for unit in units:
            stats.pop(owner(unit), None)  # each is given up as soon as it is used: they are large
        if shared is None:  # all of them known, or not reached on this data
            unseen += [u for u in units if keys[u.name] in missing]
            others += [u for u in units if keys[u.name] not in missing]
            continue
        rank = shared.rank if isinstance(shared, Elsewhere) else job.team.rank
        made |= {keys[u.name]: rank for u in units if keys[u.name] in missing}
        if isinstance(shared, Elsewhere):
            others += units
        else:
            state.finish(units, keys, shared)
    if made:
        job.team.share(job.workspace, made)
    for unit in others:
        state.finish([unit], keys, None)
    if unseen:
        state.round_all(unseen)
    state.chain = digest(state.chain, sorted(keys.values()))


def _shares(job: Solving, state: _State, stage: list[Unit]) -> Shares:
    """Who collects what of a stage."""
    shape: dict[str, tuple[int, int]] = {}
    for unit in stage:
        scheme = job.decision[unit.name]
        assert scheme is not None
        rows, k = unit.spec(scheme).matrix
        shape[owner(unit)] = k, shape.get(owner(unit), (k, 0))[1] + rows
    return Shares(job.team, shape, state.leaders)


def _solved(job: Solving, state: _State, name: str) -> Packed | Corrected | None:
    """What a tensor has become, read from the workspace."""
    for record in state.records.values():
        if name in (record.path, *record.data["aliases"]):
            return Packed(record, job.workspace.read(record.data["key"]) or {})
        if record.data.get("bias") == name:
            return Corrected((job.workspace.read(record.data["key"]) or {})["bias"])
    return None


def _hessian_fits(job: Solving, unit: Unit) -> bool:
    """Whether solving a unit stays under the bound: its Hessian, a factor of it and a copy, beside its block."""
    from .plan import RUNTIME

    if job.max_ram is None:
        return True
    block = next(b for b in job.structure.blocks if inside(unit, b))
    beside = [u for u in job.units if inside(u, block)]
    lengths = {u.numel // u.shape[0] for u in beside if len(u.shape) == 2}  # one Hessian each, at least
    rows, k = unit.shape[0], unit.numel // unit.shape[0]
    needed = sum(u.nbytes for u in beside) + sum(4 * n * n for n in lengths) + 8 * k * k + 16 * rows * k
    return RUNTIME + needed < job.max_ram


def column_power(job: Solving, units: Iterable[Unit]) -> dict[str, Tensor]:
    """Mean square of every input column of the chain's units: one pass of the float model, its weights on disk.

    Returns:
        unit's name -> (K,); nothing where the model is no chain.
    """
    chain = find_streamed_chain(job, lambda name: None)
    wanted = [u for u in units if u.op == "linear"]
    if isinstance(chain, str):
        return {}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        chain.start(job.workspace.activations)
        for number, block in enumerate(chain.blocks):
            here = [u for u in wanted if inside(u, block)]
            with chain.block(block):
                modules = {owner(u): job.model.get_submodule(owner(u)) for u in here}
                inputs = Inputs(modules, set(), once=all(job.structure.calls.get(path) == 1 for path in modules))
                chain.look(block, inputs)
                stats = inputs.result()
                found |= {u.name: s.power for u in here if isinstance(s := stats.get(owner(u)), Columns)}
            job.progress(number + 1, len(chain.blocks), block)
    return found


def _stages(units: list[Unit]) -> list[list[Unit]]:
    """Runs of units in order, at most RERUN_STAGES of them."""
    length = max(1, -(-len(units) // RERUN_STAGES))
    return [units[i : i + length] for i in range(0, len(units), length)]


def owner(unit: Unit) -> str:
    """Path of the module that holds a unit."""
    return unit.name.rpartition(".")[0]


def inside(unit: Unit, block: str) -> bool:
    """Whether a unit belongs to a block."""
    return unit.name.startswith(block + ".")
