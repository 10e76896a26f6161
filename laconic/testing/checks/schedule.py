"""The contract of a Schedule: a `torch.optim.lr_scheduler.LRScheduler`, stepped once per optimizer step.

    Example(lambda optimizer: WarmupCosine(optimizer, warmup=5, total=20), kind="Schedule", reference=closed_form)

`make` gets an optimizer with two groups, of base learning rates 0.1 and 0.01. `reference(step, base)`: the learning rate
at that step (0 is the first) of a group with that base, in closed form. `stated["steps"]`: how many are compared (20).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from laconic.errors import BadInput

from ..contract import require
from ..example import Example
from ..tensors import deep, plain

_BASES = (0.1, 0.01)


def check_schedule_values(example: Example) -> None:
    """Every group follows the closed form."""
    if example.reference is None:
        raise BadInput(f"the example {example.name} has no closed form: give Example(reference=lambda step, base: ...)")
    _, rates = _walk(example, _steps(example))
    for step, found in enumerate(rates):
        for base, rate in zip(_BASES, found, strict=True):
            want = float(example.reference(step, base))
            require(
                math.isclose(rate, want, rel_tol=1e-9, abs_tol=1e-15), f"step {step}, base {base}: {rate} for {want}"
            )


def check_schedule_finite(example: Example) -> None:
    """Learning rates are finite and not negative, also past the end."""
    _, rates = _walk(example, 2 * _steps(example))
    for step, found in enumerate(rates):
        require(
            all(math.isfinite(rate) and rate >= 0 for rate in found), f"step {step}: the learning rates are {found}"
        )


def check_schedule_resumes(example: Example) -> None:
    """Resumed from its state dict in the middle, it goes on with the same bits, and the state needs no pickle."""
    total = _steps(example)
    _, want = _walk(example, total)
    optimizer, schedule = _made(example)
    _go(optimizer, schedule, total // 2)
    state, other = deep(schedule.state_dict()), deep(optimizer.state_dict())
    require(plain(state), "the state dict holds what cannot be written without pickle")
    optimizer, schedule = _made(example)
    optimizer.load_state_dict(other)
    schedule.load_state_dict(state)
    got = [_rates(optimizer), *_go(optimizer, schedule, total - total // 2)]
    require(got == want[total // 2 :], f"a resumed schedule goes another way: {got[:3]} for {want[total // 2 :][:3]}")


def check_schedule_sets_groups(example: Example) -> None:
    """What `get_last_lr` says is what the groups of the optimizer have."""
    optimizer, schedule = _made(example)
    for step in range(_steps(example)):
        said, found = [float(rate) for rate in schedule.get_last_lr()], _rates(optimizer)
        require(said == found, f"step {step}: get_last_lr says {said}, and the groups have {found}")
        _go(optimizer, schedule, 1)


def _steps(example: Example) -> int:
    return int(example.stated.get("steps", 20))


def _made(example: Example) -> tuple[torch.optim.Optimizer, Any]:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": base} for base in _BASES]
    optimizer = torch.optim.SGD(groups, lr=_BASES[0])
    return optimizer, example.build(optimizer)


def _walk(example: Example, steps: int) -> tuple[Any, list[list[float]]]:
    optimizer, schedule = _made(example)
    return schedule, [_rates(optimizer), *_go(optimizer, schedule, steps)]


def _go(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        found.append(_rates(optimizer))
    return found


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]
