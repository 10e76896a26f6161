"""SmoothQuant: exact on every norm of the zoo that it takes, and it says why where it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.structure import Structure
from laconic.quant import SmoothQuant, apply_smooth, smooth_norm, smooth_scales
from laconic.testing import Example
from tests.zoo import ZOO, outputs


class _Readers(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        x = self.norm(x)
        return self.a(x) * self.b(x)


def _block(g):
    model = _Readers(nn.LayerNorm(8))
    for p in model.parameters():
        nn.init.normal_(p, generator=g)
    return [model.eval(), torch.randn(4, 8, generator=g)]


class _Leaking(_Readers):
    def forward(self, x):
        x = self.norm(x)
        return self.a(x) * self.b(x) + x.sum()


def _leak():
    return _Leaking(nn.LayerNorm(8)).eval(), [torch.randn(4, 8)], "norm"


def _absmax(model, structure, arguments):
    with torch.no_grad():
        return {"absmax": {"norm": model.norm(*arguments).abs().amax(0)}}


EXAMPLES = [
    Example(
        lambda: SmoothQuant(),
        kind="Pass",
        traits=("exact",),
        inputs=_block,
        stated={"context": _absmax, "refused": _leak},
    )
]


# How many norms at least: parallel readers, (in, out) weights of GPT-2, Gemma's 1 + w, fused experts, images.
TAKEN = {"llama": 4, "gpt2": 4, "gemma2": 4, "mixtral": 2, "vit": 4, "bert": 0}


def amplitudes(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {norm: model.get_submodule(norm).weight.numel() for norm in structure.norms}
    return {norm: torch.exp(2 * torch.randn(size, generator=generator)) for norm, size in sizes.items()}


@pytest.mark.parametrize("name", TAKEN)
def test_outputs_stay(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    example = entry.example(model)
    structure = Structure.build(model, example)
    amax = amplitudes(model, structure)
    before = outputs(model, example)
    old = copy.deepcopy(model.state_dict())
    done = apply_smooth(model, structure, amax, alpha=0.5)
    after = outputs(model, example)
    for a, b in zip(after, before, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()  # a scale that is missed changes outputs by much more
    taken = [entry for entry in done if entry.scale is not None]
    assert [entry.norm for entry in done] == list(amax)
    assert len(taken) >= TAKEN[name]
    touched = set()
    for entry in taken:
        assert not torch.equal(model.get_submodule(entry.norm).weight, old[f"{entry.norm}.weight"])
        assert set(entry.readers) == set(structure.readers(entry.norm))
        touched |= {f"{entry.norm}.weight", f"{entry.norm}.bias", *structure.norms[entry.norm].weights}
    for entry in done:
        assert (entry.scale is None) == bool(entry.reason)
    for key, value in model.state_dict().items():
        assert key in touched or torch.equal(value, old[key]), f"{key} was not to be touched"


def test_scales_follow_the_formula() -> None:
    amax = torch.tensor([4.0, 1.0, 0.0, 2.0])
    ws = [torch.tensor([[1.0, -4.0, 1.0, 0.0]]), torch.tensor([[-2.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.0]])]
    assert smooth_scales(amax, ws, 0.5).tolist() == pytest.approx([2**0.5, 0.5, 1.0, 1.0])
    assert smooth_scales(amax, ws, 1.0).tolist() == pytest.approx([4.0, 1.0, 1.0, 1.0])
    assert smooth_scales(amax, ws, 0.0).tolist() == pytest.approx([0.5, 0.25, 1.0, 1.0])
    s = smooth_scales(amax, ws, 0.5)
    for j in (0, 1):  # both sides meet
        assert amax[j] / s[j] == pytest.approx(float(max(w[:, j].abs().max() for w in ws) * s[j]))


@pytest.mark.parametrize(
    ("amax", "widths", "alpha", "match"),
    [
        (torch.ones(3), [3], 1.5, "alpha=1.5"),
        (torch.ones(3), [4], 0.5, r"3 channels do not fit weights of shapes \[\(2, 4\)\]"),
        (torch.ones(3), [], 0.5, "do not fit"),
        (torch.tensor([1.0, torch.nan, 1.0]), [3], 0.5, "finite"),
        (torch.tensor([1.0, -1.0, 1.0]), [3], 0.5, "not negative"),
    ],
)
def test_bad_arguments(amax: Tensor, widths: list[int], alpha: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        smooth_scales(amax, [torch.ones(2, width) for width in widths], alpha)


class Residual(nn.Module):
    """A norm whose output goes around its linear layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.linear(h)


def test_incomplete_readers_are_refused_with_the_reason() -> None:
    model = Residual().eval()
    structure = Structure.build(model, ((torch.zeros(2, 8),), {}))
    before = copy.deepcopy(model.state_dict())
    (entry,) = apply_smooth(model, structure, {"norm": torch.ones(8)})
    assert entry.scale is None and "also goes to add" in entry.reason
    with pytest.raises(ValueError, match=r"norm: cannot be smoothed: .*also goes to add"):
        smooth_norm(model, structure, "norm", torch.ones(8))
    (unknown,) = apply_smooth(model, structure, {"linear": torch.ones(8)})
    assert "not a norm" in unknown.reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_solved_scale_can_be_applied_again() -> None:
    entry = ZOO["llama"]
    model, again = entry.build(), entry.build()
    structure = Structure.build(model, entry.example(model))
    for done in apply_smooth(model, structure, amplitudes(model, structure)):
        if done.scale is not None:
            smooth_norm(again, structure, done.norm, done.scale)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="needs 48 positive scales"):
        smooth_norm(model, structure, "model.layers.0.input_layernorm", torch.zeros(48))
