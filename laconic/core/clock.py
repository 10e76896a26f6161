"""`Clock`: where a training stands, counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Clock"]


@dataclass
class Clock:
    """The one count of a training that schedules, hooks and checkpoints go by.

    A step is one step of the optimizer, whatever number of micro-batches was accumulated for it and whatever
    number of processes took part, so that what is tied to the clock means the same on any machine.

    Attributes:
        step: optimizer steps taken.
        epoch: epochs completed.
        examples: training examples seen, over all processes; an example counts anew in each epoch.
        step_in_epoch: optimizer steps taken of the epoch that is under way.
        steps_per_epoch: optimizer steps that an epoch has; 0 where it is not known.
        total: optimizer steps that the training is to have; 0 where it is not known.
    """

    step: int = 0
    epoch: int = 0
    examples: int = 0
    step_in_epoch: int = 0
    steps_per_epoch: int = 0
    total: int = 0

    @property
    def progress(self) -> float:
        """The share of the training that is done, in [0, 1]; 0 where the total is not known."""
        return min(self.step / self.total, 1.0) if self.total else 0.0

    def every(self, steps: int) -> bool:
        """Whether the step just taken completes another `steps` of them."""
        return self.step > 0 and self.step % steps == 0

    def advance(self, examples: int) -> bool:
        """Count a step on so many examples; returns whether it completed an epoch."""
        self.step += 1
        self.step_in_epoch += 1
        self.examples += examples
        if self.step_in_epoch != self.steps_per_epoch:
            return False
        self.epoch += 1
        self.step_in_epoch = 0
        return True

    def state_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where an earlier training stood."""
        for field in fields(self):
            setattr(self, field.name, int(state[field.name]))
