"""What a training is, so that a checkpoint is only taken up by the training that wrote it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["differences", "environment", "fingerprint", "identity"]

FOREIGN = ("torch", "transformers", "builtins")  # known by their versions, not by their source
HASHED = ("source of", "the training data")  # entries whose value says nothing to a reader
SHOWN = 6  # differences that a message lists


def identity(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, task: Any, hooks: Iterable[Any], **options: Any
) -> dict[str, Any]:
    """Everything that the weights at a given step depend on, by a name that a reader understands.

    Parameters and buffers count by name, shape and dtype, code by the source of the classes, the optimizer by its
    hyperparameters as they are before the first step.
    """
    hooks = list(hooks)
    found: dict[str, Any] = {"the model's class": _name(type(model)), "the optimizer's class": _name(type(optimizer))}
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            found[f"{kind} {name}"] = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    for number, group in enumerate(optimizer.param_groups):
        found[f"number of parameters in optimizer group {number}"] = len(group["params"])
        for key, value in group.items():
            if key != "params":
                found[f"optimizer group {number}: {key}"] = _plain(value)
    found["schedule"] = _name(type(schedule)) if schedule is not None else "none"
    found["task"] = str(getattr(task, "id", _name(type(task))))
    found["hooks"] = ", ".join(_name(type(hook)) for hook in hooks) or "none"
    found |= {key.replace("_", " "): _plain(value) for key, value in options.items()}
    for cls in sorted({*map(type, [task, optimizer, *hooks, *model.modules()])}, key=_name):
        if cls.__module__.split(".")[0] not in FOREIGN:
            found[f"source of {_name(cls)}"] = _source(cls)
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed, one phrase each; empty if nothing has."""
    then = json.loads(json.dumps(then))
    now = json.loads(json.dumps(now))
    found = []
    for key in [*then, *(key for key in now if key not in then)]:
        if key not in now:
            found.append(f"{key} is gone")
        elif key not in then:
            found.append(f"{key} is new")
        elif then[key] != now[key]:
            says = "has changed" if key.startswith(HASHED) else f"was {then[key]}, is {now[key]}"
            found.append(f"{key} {says}")
    rest = len(found) - SHOWN
    return [*found[:SHOWN], f"and {rest} more"] if rest > 0 else found


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of tensors' values, shapes and dtypes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{list(tensor.shape)} {tensor.dtype};".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, str]:
    """What the last bits of a result may depend on besides: a change is told, not refused."""
    return {"torch": torch.__version__, "device": device.type, "threads": str(torch.get_num_threads())}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _source(cls: type) -> str:
    """Hash of a class's source; of its names alone where there is no source (typed into an interpreter)."""
    try:
        text = inspect.getsource(cls)
    except (OSError, TypeError):
        text = " ".join(sorted(vars(cls)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
