"""Solving: from a float model and a decision to packed tensors, unit by unit, each kept as soon as it is done.

Units are solved in the order of the forward pass, each with the inputs that the *already compressed* layers before it
give. A stage is a set of units solved on one collection of inputs: a block of the repeated chain that `Structure` found,
or a few layers elsewhere.

- In the chain, activations are carried from block to block: one float pass to collect Hessians, one compressed pass to
  move on. Whether a model really is such a chain is tried on the first batch, not assumed.
- Elsewhere the model runs from its start once per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.record import PACK, Record, owner_of
from laconic.core.structure import Structure
from laconic.nn import matrix_view, pack_tensors, restore_view
from laconic.numerics import Scheme, dequantize
from laconic.quant import Hessian, gptq_matrix, round_to_nearest, tune, tune_scales

from .units import Unit
from .workspace import Workspace, digest

Progress = Callable[[int, int, str], None]
RERUN_STAGES = 12  # at most this many runs from the start for layers outside the chain
# From here down, scales are searched by squared error and codes refined once more: worth its time only here.
COARSE_BITS = 2
GPTQ_BITS = 7  # at 8 bits rounding errors are lost in the noise of everything else


class _Stop(Exception):
    """Ends a forward when what was wanted has been seen."""


@dataclass
class Solving:
    """Everything that solving needs.

    Attributes:
        model: float, in memory; its weights are replaced by what the packed ones stand for as units are solved.
        units: all units; `decision` says which are packed and how.
        base_key: hash of what all data-aware solutions depend on.
        digests: of every unit's float values.
        method: "gptq" or "rtn".
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
    progress: Progress = lambda done, total, name: None  # noqa: E731


def solve(job: Solving) -> list[Record]:
    """Records of all packed units, in the model's order."""
    todo = [u for u in job.units if job.decision.get(u.name) is not None]
    state = _State(job, total=len(todo))
    aware = [u for u in todo if _method(job, u) == "gptq"]
    for unit in todo:
        if unit not in aware:
            state.finish(unit, "rtn", None)
    with torch.no_grad():
        _walk(job, state, aware)
    order = {u.name: i for i, u in enumerate(job.units)}
    return sorted(state.records, key=lambda r: order[r.path])


def solve_one(unit: Unit, scheme: Scheme, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Round one unit to nearest: what is stored, and what is said of it."""
    matrix = matrix_view(weight.detach(), unit.view)
    solved = round_to_nearest(matrix, scheme, unit.name)
    power = float(matrix.float().square().sum(dtype=torch.float64)) or 1.0
    tensors = pack_tensors(unit.spec(scheme), solved.codes, solved.scale, solved.zero)
    return tensors, {"method": "rtn", "loss": solved.loss / power}


def record_of(unit: Unit, scheme: Scheme, tensors: dict[str, Tensor], said: dict[str, Any]) -> Record:
    """The record of a solved unit."""
    data = {"spec": unit.spec(scheme).to_json(), "aliases": list(unit.names[1:]), "op": unit.op, **said}
    return Record(PACK, unit.name, data, tensors)


def _method(job: Solving, unit: Unit) -> str:
    scheme = job.decision[unit.name]
    fits = unit.op in ("linear", "conv") and len(unit.names) == 1 and scheme is not None and scheme.bits <= GPTQ_BITS
    return "gptq" if job.method == "gptq" and fits else "rtn"


class _State:
    """Records so far, and how a unit becomes one."""

    def __init__(self, job: Solving, total: int):
        self.job, self.total = job, total
        self.records: list[Record] = []
        self.chain = ""  # hash over everything solved with data so far: later solutions depend on it

    def key(self, unit: Unit, method: str) -> str:
        """Name of a unit's solution: everything that its bits depend on."""
        scheme = str(self.job.decision[unit.name])
        upstream = (self.job.base_key, self.chain) if method == "gptq" else ()
        return digest("unit", 1, unit.name, scheme, method, self.job.digests[unit.name], *upstream)

    def known(self, unit: Unit, method: str) -> dict[str, Tensor] | None:
        """The solution of an earlier run, if there is one."""
        return self.job.workspace.load(self.key(unit, method))

    def finish(self, unit: Unit, method: str, hessian: Hessian | None, key: str | None = None) -> None:
        """Solve a unit, keep it, and put what it stands for into the model."""
        job, scheme = self.job, self.job.decision[unit.name]
        assert scheme is not None
        key = key or self.key(unit, method)
        owner, name = owner_of(job.model, unit.name)
        weight = owner._parameters[name]
        assert weight is not None
        tensors = job.workspace.load(key)
        if tensors is None:
            if hessian is None:
                tensors, said = solve_one(unit, scheme, weight)
            else:
                tensors, said = _with_hessian(unit, scheme, weight, hessian)
            tensors["loss"] = torch.tensor(said["loss"], dtype=torch.float64)
            job.workspace.save(key, tensors)
        tensors = dict(tensors)
        said = {"method": method, "loss": float(tensors.pop("loss"))}
        record = record_of(unit, scheme, tensors, said)
        weight.data.copy_(value_of(record).to(weight.dtype))
        self.records.append(record)
        job.progress(len(self.records), self.total, unit.name)


def value_of(record: Record) -> Tensor:
    """float32 parameter that a pack record stands for."""
    from laconic.kernels.ops import dequantize_rows, unpack_zero

    spec, t = record.spec, record.tensors
    zero = unpack_zero(t.get("zero_point", t.get("zero")), t["scale"].shape[0], spec.scheme)
    return restore_view(dequantize_rows(t["packed"], t["scale"], zero, spec.scheme, spec.matrix[1]), spec)


def _with_hessian(
    unit: Unit, scheme: Scheme, weight: Tensor, hessian: Hessian
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """GPTQ, then repair: least-squares scales for the codes that it chose, and at few bits the codes once more."""
    W, H = matrix_view(weight.detach(), unit.view).float(), hessian.matrix
    coarse = scheme.bits <= COARSE_BITS
    search = scheme.with_(rule="mse") if coarse else scheme
    ordered = not coarse and scheme.scale.granularity == "group"
    solved = gptq_matrix(W, H, search, act_order=ordered, static_groups=ordered, name=unit.name)
    scale = solved.scale
    if H.dim() == 2 and coarse:
        solved = tune(W, H, solved, scheme)
        scale = solved.scale
    elif H.dim() == 2:
        scale = tune_scales(W, H, solved.codes, scale, solved.zero, scheme).scale
    tensors = pack_tensors(unit.spec(scheme), solved.codes, scale, solved.zero)
    error = dequantize(solved.codes, scale, solved.zero, scheme).sub_(W)
    return tensors, {"method": "gptq", "loss": _relative(error, W, H)}


def _relative(error: Tensor, W: Tensor, H: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T): share of the output's energy that is error."""
    grouped = H.dim() == 3  # a grouped convolution: one Hessian per group of rows
    pairs = list(zip(error.chunk(len(H)), W.chunk(len(H)), H, strict=True)) if grouped else [(error, W, H)]
    above = sum(float((e @ h * e).sum()) for e, _, h in pairs)
    below = sum(float((w @ h * w).sum()) for _, w, h in pairs)
    return above / below if below > 0 else 0.0


# --- walking the model ----------------------------------------------------------------------------------------------


def _walk(job: Solving, state: _State, aware: list[Unit]) -> None:
    """Solve data-aware units stage by stage, in the order of the forward pass."""
    if not aware:
        return
    order = _call_order(job, aware)
    aware = sorted(aware, key=lambda u: order.get(_owner(u), len(order)))
    never = [u for u in aware if _owner(u) not in order]
    for unit in never:  # not reached on this data: nothing to learn from
        state.finish(unit, "rtn", None)
    aware = [u for u in aware if u not in never]
    blocks = [b for b in job.structure.blocks if any(_inside(u, b) for u in aware)]
    chain = _Chain.of(job) if len(blocks) > 1 else None
    in_chain = [u for u in aware if chain is not None and any(_inside(u, b) for b in job.structure.blocks)]
    first = min((order[_owner(u)] for u in in_chain), default=-1)
    before = [u for u in aware if u not in in_chain and (chain is None or order[_owner(u)] < first)]
    after = [u for u in aware if u not in in_chain and u not in before]
    for stage in _stages(before):
        _solve_stage(job, state, stage, lambda modules: _run_all(job, modules))
    if chain is not None:
        chain.start()
        for block in job.structure.blocks:
            stage = [u for u in in_chain if _inside(u, block)]
            if stage:
                _solve_stage(job, state, stage, lambda modules, block=block: chain.run(block, modules))
            chain.advance(block)
    for stage in _stages(after):
        _solve_stage(job, state, stage, lambda modules: _run_all(job, modules))


def _solve_stage(job: Solving, state: _State, stage: list[Unit], collect: Callable) -> None:
    """Collect Hessians for the stage's units and solve them; reuse what an earlier run left."""
    keys = {u.name: state.key(u, "gptq") for u in stage}
    missing = [u for u in stage if not (job.workspace.records / f"{keys[u.name]}.safetensors").exists()]
    hessians = collect({_owner(u): job.model.get_submodule(_owner(u)) for u in missing}) if missing else {}
    for unit in stage:
        state.finish(unit, "gptq", hessians.get(_owner(unit)), keys[unit.name])
    state.chain = digest(state.chain, sorted(keys.values()))


class _Collector:
    """Hooks that add the inputs of modules to Hessians; modules that read the same tensor share one."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self.leader: dict[str, str] = {}
        self.hessians: dict[str, Hessian] = {}
        self._seen: list[tuple[Tensor, str]] = []

    def __enter__(self) -> _Collector:
        self._handles = [
            m.register_forward_pre_hook(
                lambda mod, args, kwargs, path=path: self._add(path, mod, args, kwargs), with_kwargs=True
            )
            for path, m in self.modules.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def next_batch(self) -> None:
        """Forget the tensors of the last run."""
        self._seen.clear()

    def _add(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        conv = isinstance(module, nn.modules.conv._ConvNd)
        if not conv:
            same = next((p for t, p in self._seen if t is x), None)
            if path not in self.leader:
                self.leader[path] = same if same is not None else path
            if self.leader[path] != path and self.leader[path] == same:
                return
            self.leader[path] = path
            self._seen.append((x, path))
        if path not in self.hessians:
            self.hessians[path] = Hessian.of(module) if conv else Hessian(x.shape[-1])
        if conv:
            self.hessians[path].add_conv(x if x.dim() == len(module.kernel_size) + 2 else x[None], module)
        else:
            self.hessians[path].add(x)

    def result(self) -> dict[str, Hessian]:
        """Path -> Hessian, shared ones under every path."""
        return {p: self.hessians[self.leader.get(p, p)] for p in self.modules if self.leader.get(p, p) in self.hessians}


def _run_all(job: Solving, modules: dict[str, nn.Module]) -> dict[str, Hessian]:
    with _Collector(modules) as collector:
        for batch in job.batches:
            job.task.forward(job.model, batch)
            collector.next_batch()
        return collector.result()


class _Chain:
    """Activations carried along the repeated blocks."""

    def __init__(self, job: Solving, constant: bool):
        self.job, self.constant = job, constant
        self.hidden: list[Tensor] = []
        self.rest: list[dict[str, tuple[tuple, dict]]] = []

    @classmethod
    def of(cls, job: Solving) -> _Chain | None:
        """The chain, if running the blocks one after the other on the first batch gives what the model gives."""
        blocks = job.structure.blocks
        if any(job.structure.calls.get(b) != 1 for b in blocks):
            return None
        seen, outputs = _capture(job, job.batches[0], blocks, stop_at=None)
        if set(seen) != set(blocks):
            return None
        for previous, block in zip(blocks, blocks[1:], strict=False):
            if not seen[block][0] or seen[block][0][0] is not _first(outputs[previous]):
                return None
        first_args, first_kwargs = seen[blocks[0]]
        constant = all(
            _same(seen[b][0][1:], first_args[1:]) and _same(tuple(seen[b][1].items()), tuple(first_kwargs.items()))
            for b in blocks[1:]
        )
        return cls(job, constant)

    def start(self) -> None:
        """Run every batch up to the chain and keep what its blocks are called with."""
        blocks = self.job.structure.blocks
        for batch in self.job.batches:
            stop = blocks[0] if self.constant else None
            seen, _ = _capture(self.job, batch, blocks, stop_at=stop)
            self.hidden.append(seen[blocks[0]][0][0])
            rest = {b: (a[1:], k) for b, (a, k) in seen.items()}
            self.rest.append(dict.fromkeys(blocks, rest[blocks[0]]) if self.constant else rest)

    def run(self, block: str, modules: dict[str, nn.Module]) -> dict[str, Hessian]:
        """Hessians of modules inside a block."""
        with _Collector(modules) as collector:
            for number in range(len(self.hidden)):
                self._call(block, number)
                collector.next_batch()
            return collector.result()

    def advance(self, block: str) -> None:
        """Replace the activations by the block's outputs."""
        for number in range(len(self.hidden)):
            self.hidden[number] = _first(self._call(block, number))

    def _call(self, block: str, number: int) -> Any:
        args, kwargs = self.rest[number][block]
        return self.job.model.get_submodule(block)(self.hidden[number], *args, **kwargs)


def _capture(job: Solving, batch: Any, blocks: Sequence[str], stop_at: str | None) -> tuple[dict, dict]:
    """Arguments and outputs of every block in one forward (outputs of none where it stops at the first)."""
    seen: dict[str, tuple[tuple, dict]] = {}
    outputs: dict[str, Any] = {}

    def before(path: str, args: tuple, kwargs: dict) -> None:
        seen[path] = (args, kwargs)
        if path == stop_at:
            raise _Stop

    def after(path: str, output: Any) -> None:
        outputs[path] = output

    handles = []
    for path in blocks:
        module = job.model.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(lambda m, a, k, path=path: before(path, a, k), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda m, a, out, path=path: after(path, out)))
    try:
        job.task.forward(job.model, batch)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _same(a: tuple, b: tuple) -> bool:
    """Whether two tuples hold the same objects (tensors by identity, nested tuples by members)."""
    if len(a) != len(b):
        return False
    return all(
        x is y or (isinstance(x, tuple) and isinstance(y, tuple) and _same(x, y)) or (not _has_tensor(x) and x == y)
        for x, y in zip(a, b, strict=True)
    )


def _has_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and any(_has_tensor(v) for v in x))


def _call_order(job: Solving, units: list[Unit]) -> dict[str, int]:
    """Module path -> place in the forward pass, from the first batch."""
    order: dict[str, int] = {}

    def note(path: str) -> None:
        order.setdefault(path, len(order))

    handles = [
        job.model.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: note(path))
        for path in {_owner(u): None for u in units}
    ]
    try:
        job.task.forward(job.model, job.batches[0])
    finally:
        for handle in handles:
            handle.remove()
    return order


def _stages(units: list[Unit]) -> list[list[Unit]]:
    """Runs of units in order, at most RERUN_STAGES of them."""
    length = max(1, -(-len(units) // RERUN_STAGES))
    return [units[i : i + length] for i in range(0, len(units), length)]


def _owner(unit: Unit) -> str:
    return unit.name.rpartition(".")[0]


def _inside(unit: Unit, block: str) -> bool:
    return unit.name.startswith(block + ".")
