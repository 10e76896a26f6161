"""What every pass offers: `plan` from shapes, `solve` unit by unit, `apply` as often as wanted.

- `plan(structure, model)` says what the pass would do and what it leaves alone, and why. It reads no value: the model may
  be a skeleton on meta.
- `solve(path, decision, ctx)` works out one of the planned changes and changes nothing.
- `apply(model, record)` makes that change. It is a function of the record alone; on a skeleton on meta it gives the same
  names and shapes.

The options of a pass are the fields of the object. Its **stage** says where in a recipe it may stand, since every stage
spoils something that an earlier one needs: rewrites need float weights, repair needs weights that are already rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from laconic.core.record import Record
from laconic.core.structure import Structure

STAGES = ("fold", "reshape", "rewrite", "quantize", "repair", "cache", "export")
Stage = Literal["fold", "reshape", "rewrite", "quantize", "repair", "cache", "export"]
Scope = Literal["module", "block", "model"]


@dataclass(frozen=True)
class Decision:
    """What a pass would do.

    Attributes:
        units: path of what is changed -> JSON options that `solve` and a reader need.
        skipped: path of what one would expect to be changed -> why it is left alone.
    """

    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What solving may look at.

    Attributes:
        model: with the values that earlier changes left.
        structure: of the model.
        hessians: path of a module -> second moment and mean of its inputs (`laconic.quant.Hessian`), where calibration
            reached it.
        absmax: path of a module -> largest magnitude of every channel of its output.
        values: path of a parameter -> (value before rounding, value after), where it was rounded.
        batches: calibration data, each what `laconic.core.calls.call` takes.
        teacher: the float model, where `model` is being rounded and is compared with it.
        seed: of every random choice.
    """

    model: nn.Module
    structure: Structure
    hessians: Mapping[str, Any] = field(default_factory=dict)
    absmax: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    batches: Sequence[Any] = ()
    teacher: nn.Module | None = None
    seed: int = 0


@runtime_checkable
class Pass(Protocol):
    """A rewriting of models in three steps.

    Attributes:
        id: of the method.
        stage: where in a recipe it may stand.
        scope: what `solve` has to see at once; "module" and "block" can be streamed.
        needs: "data" where `solve` looks at calibration data, "float" where it needs weights that are not yet rounded.
    """

    id: ClassVar[str]
    stage: ClassVar[Stage]
    scope: ClassVar[Scope]
    needs: ClassVar[frozenset[str]]

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """What would be done, from shapes alone."""
        ...

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """One of the planned changes, worked out; the model stays as it is.

        Raises:
            KeyError: the decision does not hold `path`.
            ValueError: the context lacks what the pass needs there.
        """
        ...

    def apply(self, model: nn.Module, record: Record) -> None:
        """Change the model as the record says."""
        ...


def run(one: Pass, ctx: Context) -> tuple[list[Record], dict[str, str]]:
    """Plan, solve and apply a pass on a model in memory.

    Returns:
        The records, and what was left alone: path -> why.
    """
    decision = one.plan(ctx.structure, ctx.model)
    records = []
    for path in decision.units:
        record = one.solve(path, decision, ctx)
        one.apply(ctx.model, record)
        records.append(record)
    return records, decision.skipped


def misplaced(stages: list[tuple[str, str]]) -> str:
    """Why an order of (pass, stage) cannot be, as a sentence; "" if it can."""
    for (before, earlier), (after, later) in zip(stages, stages[1:], strict=False):
        if STAGES.index(later) < STAGES.index(earlier):
            return (
                f"{after} ({later}) stands after {before} ({earlier}), and {earlier} spoils what {later} needs: "
                f"the order of stages is {', '.join(STAGES)}"
            )
    names = [name for name, _ in stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    return f"{twice} stands twice" if twice else ""
