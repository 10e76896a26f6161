"""`confidence_neurons`: planted neurons are found, the shares are exact where they must be, and nothing is misread."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.errors import BadInput
from laconic.norm import (
    ConfidenceNeurons,
    entropy_neurons,
    find_readout,
    look,
    mean_ablation,
    neuron_table,
    norm_mediated,
    token_frequency_neurons,
)
from laconic.testing import Example, Ints


class Tiny(nn.Module):
    """A residual stream with one MLP: ids (n, t) -> logits (n, t, V)."""

    def __init__(self, norm: nn.Module | None, vocabulary: int = 12, width: int = 8, hidden: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm, self.head = norm, nn.Linear(width, vocabulary)
        # The head does not look at the last direction; neuron 3 writes there alone, and much.
        with torch.no_grad():
            if norm is not None:
                norm.weight.uniform_(0.5, 1.5)
            self.head.weight[:, -1] = 0
            self.down.weight[:, 3] = 0
            self.down.weight[-1, 3] = 3.0

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x if self.norm is None else self.norm(x))


def tokens(g=None):
    return torch.randint(12, (6, 10), generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example(
        lambda: ConfidenceNeurons(top=2, k=1), kind="Probe", inputs=lambda g: [Tiny(nn.RMSNorm(8)), Ints((3, 9), 12)]
    )
]


def test_what_is_called_last_is_found():
    assert find_readout(Tiny(nn.LayerNorm(8)), tokens()) == ("down", "norm", "head")
    assert find_readout(Tiny(None), tokens()) == ("down", None, "head")


def test_a_planted_neuron_is_the_first_and_acts_through_the_norm():
    model = Tiny(nn.RMSNorm(8))
    assert entropy_neurons(model, tokens(), k=1, top=1) == [3]
    seen = look(model, tokens())
    table = neuron_table(seen, 1)
    assert table["rho"][3].item() == pytest.approx(1, abs=1e-4) and table["logit_var"][3] == 0
    total, direct, share = norm_mediated(seen, [3])
    assert total > 0 and direct < 1e-5 and share > 0.99


def test_without_a_norm_the_share_is_exactly_zero():
    seen = look(Tiny(None), tokens())
    for n in (0, 5, 9):
        total, direct, share = norm_mediated(seen, [n])
        assert total == direct > 0 and share == 0.0


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5)])
def test_the_equation(norm):
    """An ablation by hand: the model itself with the neuron's activation overwritten."""
    model, ids = Tiny(norm).eval(), tokens()
    seen = look(model, ids)
    found = mean_ablation(seen, [5])
    mean = seen.activations[:, 3:, 5].mean()

    def hold(module, arguments):
        x = arguments[0].clone()
        x[..., 5] = mean
        return (x,)

    handle = model.down.register_forward_pre_hook(hold)
    logits = model(ids)
    handle.remove()
    want = F.cross_entropy(logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert found.loss_after == pytest.approx(want.item(), rel=1e-5)
    base = F.cross_entropy(model(ids)[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert found.loss == pytest.approx(base.item(), rel=1e-5)


def test_a_neuron_along_the_frequencies():
    """Neuron 7 writes what the head turns into log p: frozen along it, nothing is left of its effect."""
    model, ids = Tiny(None), tokens()
    p = torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.1
    p = p / p.sum()
    with torch.no_grad():
        u = p.log() - p.log().mean()
        model.head.weight[:, 0] = u
        model.down.weight[:, 7] = 0
        model.down.weight[0, 7] = 5.0
    seen = look(model, ids)
    assert mean_ablation(seen, [7]).effect > 1e-3
    assert mean_ablation(seen, [7], "unigram", p).effect < 1e-5
    assert token_frequency_neurons(model, ids, p, top=1)[0] == (7, pytest.approx(1, abs=1e-2))


def test_a_model_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=12, n_positions=16)).eval()
    assert find_readout(model, tokens()) == ("transformer.h.1.mlp.c_proj", "transformer.ln_f", "lm_head")
    assert len(ConfidenceNeurons(2)(model, tokens()).table) == 4


def test_refusals():
    seen = look(Tiny(None), tokens())
    for call, message in (
        (lambda: mean_ablation(seen, [99]), r"neurons \[99\] of 16"),
        (lambda: mean_ablation(seen, [1], "all"), "not 'all'"),
        (lambda: neuron_table(seen, 8), "between 1 and 7"),
        (lambda: ConfidenceNeurons(0), "at least one neuron"),
        (lambda: look(Tiny(None), torch.zeros(2, 3, dtype=torch.int64)), "t of at least 5"),
        (lambda: look(Tiny(None), torch.zeros(2, 9)), "tokens"),
    ):
        with pytest.raises(BadInput, match=message):
            call()
    model = Tiny(nn.LayerNorm(8))
    model.register_forward_hook(lambda m, a, output: 2 * output)
    with pytest.raises(BadInput, match="something else stands between"):
        look(model, tokens())
