"""Examples that a model makes itself: texts, pictures, and a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.pipeline.compress import compress
from laconic.pipeline.source import resolve
from laconic.tasks import load_task
from laconic.tasks.fidelity import FidelityTask
from laconic.tasks.language import PerplexityTask
from laconic.tasks.own import NOTE, PICTURES, TEXTS
from tests.pipeline.runs import save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama") / "float")


def convnet() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 40),
    )
    for _ in range(20):
        model(3 * torch.randn(16, 2, 8, 8) + 1)
    return model.eval()


def test_a_language_model_writes(llama: Path) -> None:
    task = load_task("self", resolve(llama), seq=12)
    assert isinstance(task, PerplexityTask) and task.sizes == TEXTS and task.length == 12 and NOTE in task.notes
    assert torch.equal(load_task("self", resolve(llama), seq=12).windows["verify"], task.windows["verify"])
    assert not torch.equal(load_task("self", resolve(llama), seq=12, seed=1).windows["verify"], task.windows["verify"])
    assert len({tuple(row.tolist()) for split in task.windows.values() for row in split}) == sum(TEXTS.values())


def test_batch_norms_remember_pictures() -> None:
    model = convnet()
    task = load_task("self", resolve(model, example=torch.zeros(1, 2, 8, 8)))
    assert isinstance(task, FidelityTask) and task.sizes == PICTURES
    pictures = task.batches("calibrate", batch=64)[0][0]
    with torch.no_grad():
        inside = model[0](pictures)
    made = (inside.mean((0, 2, 3)) - model[1].running_mean).abs().mean()
    noise = (model[0](torch.randn_like(pictures)).mean((0, 2, 3)) - model[1].running_mean).abs().mean()
    assert float(made.detach()) < 0.6 * float(noise.detach()), "nearer than noise; pictures are held to mean 0 as well"


def test_compressing_on_them_says_so(llama: Path, tmp_path: Path) -> None:
    result = compress(llama, "self", "size=3x", out=tmp_path / "out", seq=12)
    assert any(NOTE in note for note in result.record["notes"])
    methods = {unit["method"] for unit in result.record["units"] if "proj" in unit["name"] and unit["method"]}
    assert "gptq" in methods, "calibrated, and not merely rounded"


def test_a_model_without_either_is_refused() -> None:
    with pytest.raises(BadInput, match="neither writes text nor has batch norms"):
        load_task("self", resolve(nn.Sequential(nn.Linear(4, 4)), example=torch.zeros(1, 4)))
    table = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(BadInput, match="networks that read one picture"):
        load_task("self", resolve(table, example=torch.zeros(2, 4)))
    with pytest.raises(BadInput, match="none was given"):
        load_task("self")
    with pytest.raises(BadInput, match="no data"):
        load_task("selv", resolve(table, example=torch.zeros(2, 4)))
