"""The contract of a Pass: `plan`, `solve` and `apply` of `laconic.core.passes`.

    Example(lambda: RTN(bits=4), kind="Pass", inputs=lambda g: [model(), batch(g)], stated={"bound": 0.1, ...})

`inputs`: a small model in evaluation mode, and the arguments of its forward. `stated["context"]`: from (model, structure,
arguments) the further fields of `Context` that solving needs (`hessians`, ...). `stated["bound"]`: how far the output may
be off, relative to its norm, unless the trait "exact" is declared. `stated["refused"]`: (model, arguments, path), made by
a function: something at that path that the pass cannot do.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from laconic.core.passes import STAGES, Context, Decision, Pass, run
from laconic.core.record import Record
from laconic.core.structure import Structure
from laconic.errors import BadInput

from ..contract import Broken, LeftOut, require
from ..example import Example
from ..tensors import close, floats, module_state, require_unchanged, same

_SCOPES = ("module", "block", "model")


def check_pass_declares(example: Example) -> None:
    """It says its id, stage, scope and needs."""
    one = example.build()
    require(isinstance(one, Pass), f"{type(one).__name__} lacks a part of laconic.core.passes.Pass")
    require(one.stage in STAGES, f"the stage {one.stage!r} is none of {', '.join(STAGES)}")
    require(one.scope in _SCOPES, f"the scope {one.scope!r} is none of {', '.join(_SCOPES)}")
    require(isinstance(one.needs, frozenset), f"needs is a {type(one.needs).__name__}, not a frozenset")


def check_pass_plans_from_shapes(example: Example) -> None:
    """The plan of a skeleton on meta is that of the model, is plain JSON, and says why it leaves things alone."""
    model, structure, _ = _setting(example)
    before = module_state(model)
    decision = example.build().plan(structure, model)
    require_unchanged(model, before, "plan")
    require(decision.units, "the plan changes nothing in this model: give one that it changes")
    blank = example.build().plan(structure, copy.deepcopy(model).to("meta"))
    require(blank == decision, "the plan of a skeleton on meta is another")
    for path, reason in decision.skipped.items():
        require(reason.strip(), f"{path} is left alone without a reason")
    try:
        json.dumps(decision.units)
    except TypeError as error:
        raise Broken(f"the plan holds what JSON cannot write: {error}") from error


def check_pass_solving_changes_nothing(example: Example) -> None:
    """`solve` leaves the model as it is, and gives the same record again."""
    model, structure, arguments = _setting(example)
    one, ctx = example.build(), _context(example, model, structure, arguments)
    decision = one.plan(structure, model)
    before = module_state(model)
    for path in decision.units:
        first, second = (one.solve(path, decision, ctx) for _ in range(2))
        require(first.to_json() == second.to_json(), f"solving {path} twice gives different records")
        same(first.tensors, second.tensors, f"solving {path} twice gives different tensors")
    require_unchanged(model, before, "solve")


def check_pass_output(example: Example) -> None:
    """The rewritten model computes the same, or is off by no more than stated."""
    model, arguments, _, _ = _rewritten(example)
    want, got = _outputs(_setting(example)[0], arguments), _outputs(model, arguments)
    if "exact" in example.traits:
        close(got, want, "the rewritten model computes something else")
        return
    if "bound" not in example.stated:
        raise BadInput(f"the example {example.name} states no bound: give stated={{'bound': ...}}, or declare 'exact'")
    for a, b in zip(got, want, strict=True):
        off = float((a - b).norm() / b.norm())
        require(
            off <= example.stated["bound"], f"the output is off by {off:.3g}, and {example.stated['bound']} is stated"
        )


def check_pass_applies_again(example: Example) -> None:
    """The records alone make the same model from a fresh copy, also after a journey through JSON and safetensors."""
    model, arguments, records, _ = _rewritten(example)
    fresh, one = _setting(example)[0], example.build()
    for record in records:
        written = json.loads(json.dumps(record.to_json()))
        read = Record.from_json(written)
        read.tensors = load(save({k: t.contiguous() for k, t in record.tensors.items()}))
        one.apply(fresh, read)
    same(fresh.state_dict(), model.state_dict(), "the records, written and read, make another model")
    same(
        _outputs(fresh, arguments), _outputs(model, arguments), "the records, written and read, compute something else"
    )


def check_pass_applies_on_meta(example: Example) -> None:
    """On a skeleton on meta the records give the same names, shapes and types."""
    model, _, records, _ = _rewritten(example)
    skeleton, one = _setting(example)[0].to("meta"), example.build()
    for record in records:
        one.apply(skeleton, record)
    want = {k: (tuple(t.shape), t.dtype) for k, t in model.state_dict().items()}
    got = {k: (tuple(t.shape), t.dtype) for k, t in skeleton.state_dict().items()}
    other = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    require(not other, f"on meta {other[:3]} are other than in the model")


def check_pass_leaves_the_rest_alone(example: Example) -> None:
    """What changed is named by a record."""
    model, _, records, _ = _rewritten(example)
    before, after = _setting(example)[0].state_dict(), model.state_dict()
    changed = [
        k for k in before.keys() | after.keys() if k not in before or k not in after or _other(before[k], after[k])
    ]
    named = {text for record in records for text in _texts(record.to_json())}
    # A record names parameters or modules: what it says of a module covers what lies in it.
    strays = [k for k in sorted(changed) if not any(k == n or k.startswith((f"{n}.", f"{n}_")) for n in named)]
    require(not strays, f"{strays[:3]} changed, and no record names them")


def check_pass_refuses_what_it_cannot_do(example: Example) -> None:
    """What it cannot do is refused, or left alone with a reason, by the module's path."""
    if "refused" not in example.stated:
        raise BadInput(f"the example {example.name} names nothing that is refused: give stated={{'refused': ...}}")
    model, arguments, path = example.stated["refused"]()
    one = example.build()
    try:
        decision: Decision = one.plan(Structure.build(model, (tuple(arguments), {})), model)
    except (BadInput, ValueError) as error:
        require(path in str(error), f"the refusal does not name {path}: {error}")
        return
    inside = [unit for unit in decision.units if unit == path or unit.startswith(f"{path}.")]
    require(not inside, f"{inside[:1]} is planned, though it cannot be done")
    said = [key for key in decision.skipped if key == path or key.startswith(f"{path}.")]
    require(said, f"{path} is left alone without a word")


def check_pass_keeps_ties(example: Example) -> None:
    """What was one tensor under two names still is."""
    model, structure, _ = _setting(example)
    groups = [names for names in structure.ties if len(names) > 1]
    if not groups:
        raise LeftOut("its example's model has no tied parameters")
    model, _, _, _ = _rewritten(example)
    state = model.state_dict(keep_vars=True)
    for names in groups:
        stored = [{k.removeprefix(name): t for k, t in state.items() if k.startswith(name)} for name in names]
        for other in stored[1:]:
            alike = stored[0].keys() == other.keys() and all(_one(stored[0][k], other[k]) for k in other)
            require(alike, f"{' and '.join(names)} were one tensor and are not any more")


def _setting(example: Example) -> tuple[nn.Module, Structure, tuple]:
    """A fresh model, the same each time, its structure and the arguments of its forward."""
    model, *arguments = example.arguments()
    model.eval()
    return model, Structure.build(model, (tuple(arguments), {})), tuple(arguments)


def _context(example: Example, model: nn.Module, structure: Structure, arguments: tuple) -> Context:
    fields: Any = example.stated.get("context", lambda *_: {})(model, structure, arguments)
    return Context(model, structure, seed=example.seed, **fields)


def _rewritten(example: Example) -> tuple[nn.Module, tuple, list[Record], dict[str, str]]:
    model, structure, arguments = _setting(example)
    records, skipped = run(example.build(), _context(example, model, structure, arguments))
    return model, arguments, records, skipped


def _outputs(model: nn.Module, arguments: tuple) -> list[Tensor]:
    with torch.no_grad():
        return floats(model(*arguments))


def _other(a: Tensor, b: Tensor) -> bool:
    return a.dtype != b.dtype or not torch.equal(a, b)


def _one(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [t for k, v in value.items() for t in (*_texts(k), *_texts(v))]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _texts(v)]
    return [value] if isinstance(value, str) and value else []
