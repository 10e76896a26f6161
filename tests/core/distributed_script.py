"""What `torchrun` runs in test_fit_distributed: python distributed_script.py OUT. What each process finds goes to OUT."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from laconic.core.fit import NotFinite, fit
from laconic.core.hooks import EarlyStop, Hook
from laconic.errors import BadInput
from tests.core.training import Average, Crash, Points, weights


class Poisoned(Points):
    """NaN for one example, which only one process sees."""

    id = "poisoned"

    def __init__(self):
        super().__init__()
        self.x[40] = float("nan")


class Steps(Hook):
    """Counts on every process."""

    def start(self, run):
        self.examples = 0

    def batch(self, run, batch):
        self.examples += len(batch[0])
        return batch


def main(out: Path) -> None:
    options = {"steps": 30, "accumulate": 2, "clip": 0.7, "evaluate_every": 10, "save_every": 4}
    optimizer = lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)  # noqa: E731

    task, counter = Points(), Steps()
    result = fit(task.model(0), task, optimizer, out=out / "plain", hooks=[counter], **options)
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    history = torch.tensor([[row["loss"], row["gradient_norm"]] for row in result.history])
    tensors = {"weights": weights(result.model), "history": history, "value": torch.tensor(result.value)}
    save_file(tensors | {"examples": torch.tensor(counter.examples)}, str(out / f"plain-{rank}.safetensors"))

    # Dropout, a hook with state; cut off and resumed.
    def dropped(where: str, fail_at: int = 0, resume: bool = False) -> torch.Tensor:
        task = Points(fail_at=fail_at)
        model = nn.Sequential(nn.Dropout(0.2), task.model(0))
        hooks = [Average(), EarlyStop(99)]
        return weights(fit(model, task, optimizer, out=out / where, resume=resume, hooks=hooks, **options).model)

    straight = dropped("straight")
    with suppress(Crash):
        dropped("cut", fail_at=37)
    resumed = dropped("cut", resume=True)
    save_file({"straight": straight, "resumed": resumed}, str(out / f"resumed-{rank}.safetensors"))

    # The same model again, with a parameter that takes no part.
    model = nn.Sequential(result.model)
    model.register_parameter("idle", nn.Parameter(torch.ones(1)))
    # 93 examples: an epoch ends with micro-batches of 8, 8 and 5, and with shares of 3 and 2.
    again = fit(model, Points(93), optimizer, steps=9, accumulate=3, find_unused_parameters=True)
    save_file({"weights": weights(again.model)}, str(out / f"again-{rank}.safetensors"))

    said = ""
    try:
        task = Poisoned()
        fit(task.model(0), task, optimizer, steps=30)
    except NotFinite as error:
        said = str(error)
    (out / f"poisoned-{rank}.txt").write_text(said)

    said = ""
    try:
        dropped("one-process", resume=True)
    except BadInput as error:
        said = str(error)
    (out / f"refused-{rank}.txt").write_text(said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
