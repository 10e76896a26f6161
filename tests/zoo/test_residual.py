"""The residual block: every published scheme against its equation, written out again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.core.placement import mix, placements
from laconic.errors import BadInput
from laconic.zoo import SCHEMES, Placement, Residual

BLOCK, BLOCKS, WIDTH = 3, 8, 6


def block_of(scheme: str, block: int = BLOCK) -> Residual:
    torch.manual_seed(0)
    made = Residual(nn.Linear(WIDTH, WIDTH), placements(scheme, BLOCKS)[block - 1], lambda: nn.LayerNorm(WIDTH))
    with torch.no_grad():  # gains that are one would hide which norm stands where
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made.double()


EQUATIONS = {
    "pre": lambda r, x: x + r.branch(r.norm_in(x)),
    "post": lambda r, x: r.norm_after_add(x + r.branch(x)),
    "output": lambda r, x: x + r.norm_out(r.branch(x)),
    "sandwich": lambda r, x: x + r.norm_out(r.branch(r.norm_in(x))),
    "peri": lambda r, x: x + r.norm_out(r.branch(r.norm_in(x))),
    "mix": lambda r, x: x + r.branch(r.norm_in(x)),
    "lns": lambda r, x: x + r.branch(r.norm_in(x) / math.sqrt(BLOCK)),
    "deepnorm": lambda r, x: r.norm_after_add((2 * BLOCKS) ** 0.25 * x + r.branch(x)),
    "skipinit": lambda r, x: x + r.scale * r.branch(x),
    "fixup": lambda r, x: x + r.scale * r.branch(x),
    "depth": lambda r, x: x + r.branch(r.norm_in(x)) / math.sqrt(BLOCKS),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_equation_of_every_scheme(scheme: str) -> None:
    block, x = block_of(scheme), torch.randn(4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(block(x), EQUATIONS[scheme](block, x))


def test_mix_is_post_in_the_first_quarter_and_pre_behind_it() -> None:
    assert [place.norm_after_add for place in placements("mix", 10)] == [True] * 2 + [False] * 8
    assert [place.norm_in for place in placements(mix(0.5), 4)] == [False, False, True, True]


def test_a_fresh_skipinit_block_is_the_identity_and_learns_its_scale() -> None:
    block = Residual(nn.Linear(WIDTH, WIDTH), SCHEMES["skipinit"](1, 1), lambda: nn.LayerNorm(WIDTH))
    x = torch.randn(3, WIDTH)
    assert torch.equal(block(x), x)
    block(x).sum().backward()
    assert block.scale.grad.abs() > 0


def test_an_activation_stands_before_the_branch_of_a_normalized_input_and_else_behind_the_sum() -> None:
    x = torch.randn(4, WIDTH)
    before, behind = (
        Residual(nn.Linear(WIDTH, WIDTH), place, lambda: nn.LayerNorm(WIDTH), activation=nn.ReLU())
        for place in (Placement(norm_in=True), Placement(norm_out=True))
    )
    torch.testing.assert_close(before(x), x + before.branch(before.norm_in(x).relu()))
    torch.testing.assert_close(behind(x), (x + behind.norm_out(behind.branch(x))).relu())


def test_no_skip_is_no_skip() -> None:
    block = Residual(nn.Linear(WIDTH, 2), Placement(skip_scale=0.0), lambda: nn.LayerNorm(WIDTH))
    x = torch.randn(4, WIDTH)
    assert torch.equal(block(x), block.branch(x))


def test_a_scheme_of_ones_own() -> None:
    places = placements(lambda block, blocks: Placement(norm_in=True, branch_scale=blocks**-0.5), 4)
    block, x = Residual(nn.Linear(WIDTH, WIDTH), places[0], lambda: nn.LayerNorm(WIDTH)), torch.randn(2, WIDTH)
    torch.testing.assert_close(block(x), x + block.branch(block.norm_in(x)) / 2)
    assert "branch_scale=0.5" in repr(block)


def test_a_fresh_fixup_model_passes_its_input_through() -> None:
    from laconic.zoo import LlamaLM, LlamaLMConfig

    model = LlamaLM(LlamaLMConfig(23, 16, 4, placement="fixup"))
    x = torch.randn(1, 5, 16)
    cos, sin = torch.ones(5, 2), torch.zeros(5, 2)
    assert torch.equal(model.layers[0](x, cos, sin), x)
    assert model.layers[0].perceptron.branch.gate.weight.std() < 0.02


def test_what_is_no_scheme() -> None:
    with pytest.raises(BadInput, match="no placement 'before'; there are pre, post"):
        placements("before", 3)
    with pytest.raises(BadInput, match="at least one block, not 0"):
        placements("pre", 0)
    with pytest.raises(BadInput, match=r"a share of 1.5 of the blocks cannot be"):
        mix(1.5)
