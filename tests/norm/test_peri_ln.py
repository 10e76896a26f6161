"""`peri_ln`: what a branch adds is bounded by the gain, whatever its weights; the variance grows linearly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.norm import peri_ln, place, stream_variances
from laconic.zoo import LlamaLM, LlamaLMConfig


def model_of(placement, layers: int = 6) -> LlamaLM:
    torch.manual_seed(0)
    return LlamaLM(place(LlamaLMConfig(50, 64, layers), placement))


def test_every_block_has_two_norms_and_the_embeddings_one() -> None:
    for placement in ("peri", peri_ln()):
        model = model_of(placement)
        norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
        assert len(norms) == 6 * 4 + 1 + (placement == "peri")


def test_variance_grows_linearly_however_large_the_weights_are() -> None:
    ids = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(0))
    for size in (1.0, 30.0):
        growth = {}
        for placement in ("peri", "pre"):
            model = model_of(placement)
            with torch.no_grad():
                for layer in model.layers:
                    for linear in layer.carriers():
                        linear.weight.mul_(size)
            growth[placement] = stream_variances(model, model.layers, ids)
        layers = torch.arange(6.0)
        torch.testing.assert_close(torch.tensor(growth["peri"]), 1 + 2 * layers, rtol=0.35, atol=0)
    assert growth["pre"][-1] > 1000 * growth["peri"][-1]


def test_the_last_weight_of_a_branch_cancels_in_the_norm_behind_it() -> None:
    model = model_of("peri", 1).double()
    block = model.layers[0].perceptron
    block.norm_out.eps = 0.0
    x = torch.randn(2, 64, dtype=torch.float64)
    before = block(x)
    block(x).square().sum().backward()
    weight = block.branch.down.weight
    assert abs((weight.grad * weight).sum()) < 1e-8 * weight.grad.norm() * weight.norm()
    with torch.no_grad():
        weight.mul_(7.0)
    torch.testing.assert_close(block(x), before)


def test_variances_of_a_placed_model_of_transformers() -> None:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    place(model, "peri")
    found = stream_variances(model, model.h, torch.randint(50, (2, 16)))
    torch.testing.assert_close(torch.tensor(found), torch.tensor([1.0, 3.0, 5.0]), rtol=0.6, atol=0)
    assert model.training


def test_refusals() -> None:
    model = model_of("peri", 1)
    with pytest.raises(BadInput, match="layer 1 of those given was not called by LlamaLM"):
        stream_variances(model, [model.layers[0], nn.Linear(1, 1)], torch.zeros(1, 3, dtype=torch.long))
