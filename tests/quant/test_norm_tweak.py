"""`norm_tweak`: rates, which norms are found, what tweaking gains and leaves alone, refusals, the recorded vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.passes import Context, run
from laconic.core.reconstruct import channel_loss
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.numerics import Scheme, fake_quantize
from laconic.quant import NormTweak, norm_tweak
from laconic.quant._norm_tweak import norms_in, tweak_rate
from laconic.testing import Example
from laconic.testing.vectors import Case

TWO_BITS = Scheme.parse("v1/int2/channel/float32/minmax/zint/nearest")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def rounded(path: str, block: nn.Module) -> None:
    """The block's linear layers in 2 bits."""
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = fake_quantize(layer.weight.detach(), TWO_BITS, f"{path}.{name}")


def setting(generator: torch.Generator) -> list:
    model = Model().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return [model, torch.randn(8, 10, 12, generator=generator)]


def off_a_little(generator: torch.Generator) -> list:
    """A model, the float one of which `context` makes out of it: gains are larger there."""
    return setting(generator)


def context(model: nn.Module, structure: Structure, arguments: tuple) -> dict:
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for block in teacher.blocks:
            block.up.weight.mul_(1.05)
    return {"batches": [arguments], "teacher": teacher}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks[1].norm.weight = self.blocks[0].norm.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


EXAMPLES = [
    Example(
        lambda: NormTweak(lr=1e-3),
        kind="Pass",
        inputs=off_a_little,
        stated={
            "bound": 0.1,
            "context": context,
            "refused": lambda: (Shared().eval(), [torch.randn(1, 3, 12)], "blocks.0.norm"),
        },
    )
]


def run_vector(case: Case) -> dict[str, Tensor]:
    """The loss, and its gradient in the rounded output."""
    args = case.args
    f, q = case.array("float_output"), case.array("quantised_output").requires_grad_()
    assert args["grad_of"] == "quantised output only"
    loss = channel_loss(
        f, q, token_dim=args["token_dim"], channel_dim=args["channel_dim"], statistics=args["statistics"],
        unbiased=args["variance_unbiased"], distance=args["distance"], divide_by=args["divide_by"],
        reduction=args["batch_reduction"],
    )  # fmt: skip
    loss.backward()
    return {"loss": loss, "grad_quantised_output": q.grad}


def channels_off(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """How far the channels of the last block's output are from the float model's."""
    with torch.no_grad():
        a, b = x, x
        for one, two in zip(model.blocks, teacher.blocks, strict=True):
            a, b = one(a), two(b)
        return float(channel_loss(b, a))


@pytest.mark.parametrize("loss", ["channel", "mse"])
@pytest.mark.parametrize("target", ["same_input", "float"])
def test_norms_take_back_a_part(loss: str, target: str) -> None:
    teacher, x = setting(torch.Generator().manual_seed(0))
    structure = Structure.build(teacher, ((x[:1],), {}))
    plain, tweaked = copy.deepcopy(teacher), copy.deepcopy(teacher)
    for path, block in plain.blocks.named_children():
        rounded(path, block)
    done = norm_tweak(tweaked, [x], structure, rounded, lr=1e-3, iters=5, loss=loss, target=target)
    assert list(done) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(one.after < one.before for one in done.values())
    assert channels_off(tweaked, teacher, x) < 0.97 * channels_off(plain, teacher, x)
    moved = {
        n for (n, a), b in zip(tweaked.named_parameters(), plain.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert moved == {f"blocks.{i}.norm.{kind}" for i in range(3) for kind in ("weight", "bias")}


def test_the_pass_does_what_the_function_does() -> None:
    teacher, x = setting(torch.Generator().manual_seed(1))
    structure = Structure.build(teacher, ((x[:1],), {}))
    one = copy.deepcopy(teacher)
    for path, block in one.blocks.named_children():
        rounded(path, block)
    other = copy.deepcopy(one)
    norm_tweak(one, [x], structure, teacher=teacher, lr=1e-3)
    records, skipped = run(NormTweak(lr=1e-3), Context(other, structure, batches=[x], teacher=teacher))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert skipped == {"last": "it lies in no repeated block"}
    assert [r.data["lr"] for r in records] == [tweak_rate(1e-3, 5.0, number, 3) for number in range(3)]


def test_rates_rise_with_depth() -> None:
    assert [tweak_rate(1.0, 5.0, number, 5) for number in range(5)] == pytest.approx([1, 2, 3, 4, 5])


def test_norms_without_gain_or_with_a_shared_one_stay() -> None:
    model, x = setting(torch.Generator().manual_seed(2))
    model.blocks[1].norm = nn.LayerNorm(12, elementwise_affine=False)
    structure = Structure.build(model, ((x[:1],), {}))
    assert norms_in(model, structure, "blocks.0") == ["blocks.0.norm"]
    assert norms_in(model, structure, "blocks.1") == [] and norms_in(model, structure, "blocks") != []
    done = norm_tweak(model, [x], structure, rounded)
    assert list(done) == ["blocks.0", "blocks.2"]


def test_refusals() -> None:
    model, x = setting(torch.Generator().manual_seed(3))
    structure = Structure.build(model, ((x[:1],), {}))
    with pytest.raises(BadInput, match="give teacher"):
        norm_tweak(model, [x], structure)
    with pytest.raises(BadInput, match="there is none"):
        norm_tweak(model, [], structure, rounded)
    with pytest.raises(BadInput, match="blocks.0: .* fewer than two tokens"):
        norm_tweak(copy.deepcopy(model), [x[:, :1]], structure, rounded)
    with pytest.raises(BadInput, match="channel or mse"):
        norm_tweak(copy.deepcopy(model), [x], structure, rounded, loss="kl")
    with pytest.raises(ValueError, match="target='both'"):
        NormTweak(target="both")
    with pytest.raises(ValueError, match="teacher"):
        run(NormTweak(), Context(model, structure))
    plain = nn.Sequential(nn.Linear(12, 4)).eval()
    with pytest.raises(BadInput, match="nothing can be tweaked"):
        norm_tweak(plain, [x], Structure.build(plain, ((x,), {})), rounded)
    broken = copy.deepcopy(model)
    broken.blocks[0].up.weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="blocks.0: its outputs"):
        norm_tweak(broken, [x], structure, rounded)
