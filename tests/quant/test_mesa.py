"""`mesa`: what is kept and how exactly, running ranges, what is left alone, and that training goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.errors import BadInput
from laconic.quant import MaskReLU, SavedTensorQuant, mask_relus_
from laconic.testing import Example

EXAMPLES = [
    Example(
        lambda: MaskReLU(),
        kind="Layer",
        traits=("batch_independent_eval",),
        inputs=[(3, 5)],
        expected_failures={"check_layer_refuses_wrong_shape": "it takes any shape, as ReLU does"},
    ),
]


class Attention(nn.Module):
    """A small transformer block: products, softmax, layer norm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(x)))


def gradients(model: nn.Module, x: torch.Tensor, saved: SavedTensorQuant | None) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    if saved is None:
        y = model(x)
    else:
        with saved:
            y = model(x)
    y.square().mean().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def noise(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_the_forward_pass_is_exact_and_the_gradient_near():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 12, 32)
    y, want = gradients(model, x, None)
    off = {}
    for bits in (8, 4, 2):
        saved = SavedTensorQuant(model, bits)
        again, got = gradients(model, x, saved)
        assert torch.equal(again, y)
        off[bits] = noise(got, want)
        assert saved.float_bytes * bits / 32 <= saved.bytes < saved.float_bytes * bits / 32 * 1.05
    assert off[8] < 0.02 and off[8] * 8 < off[4] < off[2]


def test_the_gradient_of_a_linear_layer_is_right_on_average():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 4, bias=False), torch.randn(32, 16)
    _, want = gradients(layer, x, None)
    got = torch.stack([gradients(layer, x, SavedTensorQuant(layer, 2, seed=seed))[1] for seed in range(300)])
    spread = got.std(0) / 300**0.5
    assert ((got.mean(0) - want).abs() < 5 * spread + 1e-7).all() and noise(got[0], want) > 0.05


def test_the_equations_of_the_running_ranges():
    layer = nn.Linear(8, 3, bias=False)
    saved = SavedTensorQuant(layer, 8, groups=4, momentum=0.75)
    span = low = None
    for step in range(3):
        x = torch.randn(40, 8, generator=torch.Generator().manual_seed(step)) * (step + 1)
        gradients(layer, x, saved)
        parts = x.view(40, 4, 2).transpose(0, 1).flatten(1)
        now = parts.amax(1) - parts.amin(1), parts.amin(1)
        span = now[0] if span is None else 0.75 * span + 0.25 * now[0]
        low = now[1] if low is None else 0.75 * low + 0.25 * now[1]
        (_, got_span, got_low), *_ = saved._ranges.values()
        torch.testing.assert_close(got_span, span)
        torch.testing.assert_close(got_low, low)
    _, gradient = gradients(layer, x, saved)
    assert torch.isfinite(gradient).all()
    other = SavedTensorQuant(layer, 8, groups=4, momentum=0.75)
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert torch.equal(gradients(layer, x, saved)[1], gradients(layer, x, other)[1])


@pytest.mark.parametrize(("groups", "better"), [(None, True), (4, True), (1, False)])
def test_groups_of_their_own_ranges_are_nearer(groups, better):
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    x = torch.randn(64, 32) * torch.logspace(-2, 1, 32)
    small = lambda flat: flat[: 8 * 32].view(8, 32)[:, :8]  # noqa: E731  the gradient of small inputs' weights
    _, want = gradients(layer, x, None)
    off = noise(small(gradients(layer, x, SavedTensorQuant(layer, 4, groups))[1]), small(want))
    assert (off < 0.3) == better


def test_a_tensor_is_packed_once_and_parameters_never():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x) + F.linear(x, self.a.weight.t().contiguous().t())

    model, x = Twice(), torch.randn(64, 32)
    saved = SavedTensorQuant(model)
    gradients(model, x, saved)
    assert saved.float_bytes == x.nbytes or saved.float_bytes == x.nbytes + model.a.weight.nbytes
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)))
    _, want = gradients(deep, x, None)
    assert noise(gradients(deep, x, SavedTensorQuant(deep))[1], want) < 0.02, (
        "freed memory that is used again is no hit"
    )


def test_what_is_small_or_whole_is_kept():
    model = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 4))
    saved = SavedTensorQuant(model)
    with saved:
        y = model(torch.randint(0, 9, (2, 3)))
    assert saved.bytes == 0
    y.sum().backward()
    halves = nn.Linear(32, 4).bfloat16()
    with saved:
        halves(torch.randn(64, 32).bfloat16()).sum().backward()
    assert saved.float_bytes == 64 * 32 * 2 and halves.weight.grad.dtype == torch.bfloat16


def test_training_goes_on():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    y = torch.randn(64, 4)
    final = []
    for bits in (None, 4):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        assert mask_relus_(model).changed[0].after == "MaskReLU"
        saved = SavedTensorQuant(model, bits, None) if bits else None
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            if saved is None:
                loss = (model(x) - y).square().mean()
            else:
                with saved:
                    loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        final.append(loss.item())
    assert final[1] < 1.2 * final[0] + 0.02


def test_a_mask_is_one_bit_a_number_and_exact():
    x = torch.randn(7, 9, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = MaskReLU()(x)
    assert sum(t.nbytes for t in kept) == 8, "63 bits in two words"
    g = torch.randn(7, 9)
    y.backward(g)
    assert torch.equal(x.grad, g * (x > 0)) and torch.equal(y, x.relu())


def test_refusals():
    model = nn.Linear(32, 4)
    for wrong, said in (
        ({"bits": 9}, "1 to 8 bits, not 9"),
        ({"groups": 0}, "not 0"),
        ({"momentum": 1.0}, "momentum=1.0"),
    ):
        with pytest.raises(BadInput, match=said):
            SavedTensorQuant(model, **wrong)
    x = torch.randn(32, 32)
    x[0, 0] = float("nan")
    saved = SavedTensorQuant(model)
    with pytest.raises(BadInput, match=r"shape \(32, 32\) is not finite"), saved:
        model(x)
    with saved, pytest.raises(BadInput, match="entered already"), saved:
        pass
