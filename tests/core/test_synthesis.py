"""Data out of the model: statistics by hand, swinging convolutions, trained inputs, text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.core.synthesis import Pixels, generated_text, matched_inputs, statistics_loss, swinging, watched
from laconic.errors import BadInput


def test_statistics_by_hand() -> None:
    torch.manual_seed(0)
    x, mean, var = torch.randn(3, 2, 4, 5), torch.randn(2), torch.rand(2) + 0.5
    image = 0.0
    for b in range(3):
        for c in range(2):
            plane = x[b, c]
            image += float((mean[c] - plane.mean()) ** 2) / 3
            image += float(((var[c] + 1e-6).sqrt() - (plane.var() + 1e-6).sqrt()) ** 2) / 3
    assert float(statistics_loss(x, mean, var)) == pytest.approx(image, rel=1e-5)
    batch = 0.0
    for c in range(2):
        batch += float((mean[c] - x[:, c].mean()) ** 2 + ((var[c] + 1e-6).sqrt() - x[:, c].std()) ** 2) / 2
    assert float(statistics_loss(x, mean, var, per="batch")) == pytest.approx(batch, rel=1e-5)
    with pytest.raises(ValueError, match="1 numbers"):
        statistics_loss(torch.ones(2, 3, 1, 1), 0, 1)
    with pytest.raises(ValueError, match="rows"):
        statistics_loss(x, 0, 1, divide_by="rows")


def test_strided_convolutions_swing_by_one_place() -> None:
    conv = nn.Conv2d(1, 1, 1, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.arange(36.0).view(1, 1, 6, 6)
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    windows = {tuple(padded[0, 0, a : a + 6 : 2, b : b + 6 : 2].flatten().tolist()) for a in range(3) for b in range(3)}
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), conv)
    nn.init.ones_(model[0].weight)
    torch.manual_seed(1)
    with swinging(model):
        seen = {tuple(model(x).flatten().tolist()) for _ in range(100)}
    assert seen == windows and len(seen) == 9
    assert torch.equal(model(x), x[..., ::2, ::2])


def test_inputs_come_to_what_the_norms_remember() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    model[0].running_mean.copy_(torch.tensor([1.0, -2.0]))
    model[0].running_var.copy_(torch.tensor([4.0, 0.25]))
    found = matched_inputs(model, lambda: Pixels((3, 2, 6, 6)), steps=80, include_input=False)
    assert found.losses[-1] < 1e-2 * found.losses[0]
    torch.testing.assert_close(found.inputs.mean((2, 3)), torch.tensor([[1.0, -2.0]] * 3), rtol=0, atol=0.1)
    torch.testing.assert_close(found.inputs.std((2, 3)), torch.tensor([[2.0, 0.5]] * 3), rtol=0, atol=0.1)


def test_what_has_no_batch_norms_is_refused() -> None:
    with pytest.raises(BadInput, match="no batch norms"), watched(nn.Linear(2, 2)):
        pass
    with pytest.raises(BadInput, match="model.eval"):
        matched_inputs(nn.BatchNorm2d(2), lambda: Pixels((2, 2, 3, 3)), steps=1)


class Counting(nn.Module):
    """After token t comes t + 1, most likely, or t + 2."""

    def forward(self, ids: Tensor) -> Tensor:
        self.seen = max(getattr(self, "seen", 0), ids.shape[1])
        logits = torch.full((*ids.shape, 10), -torch.inf)
        logits.scatter_(-1, ((ids + 1) % 10)[..., None], 1.0)
        return logits.scatter_(-1, ((ids + 2) % 10)[..., None], 0.0)


def test_text_begins_as_told_goes_on_surely_and_is_then_drawn() -> None:
    model = Counting().eval()
    ids = generated_text(model, 40, 12, first_tokens=[3, 5], greedy=(4, 4), context=3, batch=16, seed=1)
    assert ids.shape == (40, 12) and set(ids[:, 0].tolist()) == {3, 5} and model.seen == 3
    steps = (ids[:, 1:] - ids[:, :-1]) % 10
    assert bool((steps[:, :4] == 1).all()) and set(steps[:, 4:].unique().tolist()) == {1, 2}
    assert torch.equal(
        ids, generated_text(model, 40, 12, first_tokens=[3, 5], greedy=(4, 4), context=3, batch=16, seed=1)
    )
    cold = generated_text(model, 4, 12, greedy=(0, 0), temperature=1e-3)
    assert bool(((cold[:, 1:] - cold[:, :-1]) % 10 == 1).all())


def test_text_that_cannot_be_written() -> None:
    model = Counting().eval()
    with pytest.raises(BadInput, match="some of the 10"):
        generated_text(model, 1, 4, first_tokens=[10])
    with pytest.raises(BadInput, match="some of the 10"):
        generated_text(model, 1, 4, first_tokens=[])
    with pytest.raises(BadInput, match="model.eval"):
        generated_text(model.train(), 1, 4)
    with pytest.raises(BadInput, match="n=0"):
        generated_text(model.eval(), 0, 4)
    broken = nn.Sequential(nn.Embedding(5, 5)).eval()
    nn.init.constant_(broken[0].weight, torch.nan)
    with pytest.raises(BadInput, match="not finite after 1"):
        generated_text(broken, 1, 4)


def test_batch_norms_behind_the_last_pooling_have_no_statistics_of_an_image() -> None:
    torch.manual_seed(0)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), *pooled).eval()
    x = torch.randn(3, 1, 6, 6)
    with watched(model) as found:
        model(x)
    assert len(found) == 1
    with watched(model, per="batch") as found:
        model(x)
    assert len(found) == 2
    with pytest.raises(BadInput, match="no batch norm of Sequential has places"):
        matched_inputs(nn.Sequential(*pooled).eval(), lambda: Pixels((3, 4, 6, 6)), steps=1)
