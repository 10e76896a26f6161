"""`mix_ln`: which layers are Post-LN, by share and by number; the function itself is tested with `core.placing`."""

from __future__ import annotations

import pytest
import torch

from laconic.errors import BadInput
from laconic.norm import mix_ln, place
from laconic.zoo import LlamaLM, LlamaLMConfig


@pytest.mark.parametrize(("layers", "post"), [(12, 3), (24, 6), (10, 2), (3, 0), (1, 0)])
def test_a_quarter_is_rounded_down_as_published(layers: int, post: int) -> None:
    for scheme in (mix_ln(), mix_ln(post=post)):
        places = [scheme(layer, layers) for layer in range(1, layers + 1)]
        assert [p.norm_after_add for p in places] == [True] * post + [False] * (layers - post)
        assert [p.norm_in for p in places] == [False] * post + [True] * (layers - post)


def test_the_equation() -> None:
    torch.manual_seed(0)
    model = LlamaLM(place(LlamaLMConfig(23, 16, 4), mix_ln(0.5))).double()
    x, cos, sin = torch.randn(1, 5, 16, dtype=torch.float64), torch.ones(5, 2).double(), torch.zeros(5, 2).double()
    for number, layer in enumerate(model.layers):
        a, m = layer.attention, layer.perceptron
        if number < 2:
            h = a.norm_after_add(x + a.branch(x, cos, sin))
            want = m.norm_after_add(h + m.branch(h))
        else:
            h = x + a.branch(a.norm_in(x), cos, sin)
            want = h + m.branch(m.norm_in(h))
        torch.testing.assert_close(layer(x, cos, sin), want)
        x = want
    assert model.norm.weight.shape == (16,)  # the norm behind a Pre-LN stack stays


def test_refusals() -> None:
    with pytest.raises(BadInput, match="a share of -0.1"):
        mix_ln(-0.1)
    with pytest.raises(BadInput, match="-1 layers cannot be Post-LN"):
        mix_ln(post=-1)
    with pytest.raises(BadInput, match="5 Post-LN layers are asked for, and the model has 4"):
        LlamaLM(LlamaLMConfig(23, 16, 4, placement=mix_ln(post=5)))
