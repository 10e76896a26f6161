"""`codebook_features`: chosen codes and the four gradients, reading and forcing codes, and the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.quant import CodebookLayer, add_codebooks_, nearest_codes, recorded_codes, snap
from laconic.testing import Case, Example

EXAMPLES = [
    Example(
        lambda: CodebookLayer(6, 10, 2),
        kind="Layer",
        traits=("gradient:surrogate", "batch_independent_eval"),
        inputs=[(3, 4, 6)],
        wrong=[(3, 4, 5)],
    ),
    Example(
        lambda: CodebookLayer(6, 5, 1, "euclidean", "fullaeloss", 3),
        kind="Layer",
        traits=("gradient:surrogate", "batch_independent_eval"),
        inputs=[(4, 6)],
        wrong=[(4, 7)],
    ),
]


def run_vector(case: Case):
    args = case.args
    assert not args["layernorm"] and args["reduce"] == "mean of the k codes"
    x, codes = case.array("input").requires_grad_(), case.array("codebook").requires_grad_()
    assert int(case.array("k")) == args["k"] and codes.shape == (args["num_codes"], args["dim"])
    beta = {} if args["beta"] is None else {"beta": args["beta"]}
    y, ids = snap(x, codes, args["k"], similarity=args["similarity"], loss=args["loss"], **beta)
    y.backward(case.array("grad_output"))
    return {"output": y, "ids": ids, "grad_input": x.grad, "grad_codebook": codes.grad}


@pytest.mark.parametrize("similarity", ["inner", "euclidean"])
def test_the_codes_one_by_one(similarity, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    u, codes = torch.randn(9, 4, generator=generator), torch.randn(7, 4, generator=generator)
    monkeypatch.setattr("laconic.quant._codebook_features.CHUNK", 15)  # two rows at a time
    allowed = torch.tensor([True, True, False, True, True, True, True])
    got = nearest_codes(u, codes, 3, similarity, allowed)
    for row, ids in zip(u, got.tolist(), strict=True):
        like = [float(row @ c / c.norm()) if similarity == "inner" else -float((row - c).norm()) for c in codes]
        ranked = sorted((i for i in range(7) if allowed[i]), key=lambda i: -like[i])
        assert ids == ranked[:3]
    assert nearest_codes(u[:0], codes).shape == (0, 1)


@pytest.mark.parametrize("loss", ["base", "aeloss", "vqvae", "fullaeloss"])
def test_gradients_are_those_of_the_written_losses(loss):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    u, codes, g, beta = draw(6, 3).requires_grad_(), draw(8, 3).requires_grad_(), draw(6, 3), 0.7
    y, ids = snap(u, codes, 2, loss=loss, beta=beta)
    y.backward(g)
    got = u.grad.clone(), codes.grad.clone()
    u.grad = codes.grad = None
    mean = codes[ids].mean(1)
    straight = u + (mean - u).detach()
    total = (straight * g).sum()
    if loss != "vqvae":
        total = total + (mean * g).sum()
    if loss != "base":
        total = total + (mean - u.detach()).square().sum(1).mean()
    if loss in ("vqvae", "fullaeloss"):
        total = total + beta * (u - mean.detach()).square().sum()
    total.backward()
    torch.testing.assert_close(got[0], u.grad)
    torch.testing.assert_close(got[1], codes.grad)


def test_groups_are_tables_side_by_side():
    torch.manual_seed(0)
    both, parts = CodebookLayer(8, 5, 2, groups=2), [CodebookLayer(4, 5, 2) for _ in range(2)]
    with torch.no_grad():
        both.weight.uniform_(0.5, 2), both.bias.normal_()
        for i, part in enumerate(parts):
            for name in ("weight", "bias", "codes"):
                getattr(part, name).copy_(getattr(both, name)[i : i + 1])
    x = torch.randn(3, 8)
    torch.testing.assert_close(both(x), torch.cat([part(x[:, 4 * i : 4 * i + 4]) for i, part in enumerate(parts)], 1))


def test_forcing_and_disabling():
    torch.manual_seed(0)
    layer = CodebookLayer(4, 6, 1).eval()
    x = torch.randn(2, 5, 4)
    plain = layer(x)
    with recorded_codes(layer) as found:
        layer(x)
    taken = found[""][0]
    assert taken.shape == (2, 5, 1, 1) and torch.equal(layer.codes[0][taken[..., 0, 0]], plain)
    with layer.forced_code(2, where=torch.tensor([False, True, False, False, False])):
        forced = layer(x)
    assert (forced[:, 1] == layer.codes[0, 2]).all() and torch.equal(forced[:, 2:], plain[:, 2:])
    often = int(taken.flatten().mode().values)
    with layer.disabled([often]), recorded_codes(layer) as found:
        layer(x)
    assert often not in found[""][0] and layer.allowed.all() and torch.equal(layer(x), plain)
    with pytest.raises(BadInput, match="no code 6 of table 0"), layer.forced_code(6):
        pass
    with pytest.raises(BadInput, match="k=1 codes are wanted, and 0 would be left"), layer.disabled(range(6)):
        pass


def test_starting_from_data_and_dead_codes():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0, 0, -3], [-3, 3, 0, 0], [0, -3, 3, 0]])
    x = centres[torch.randint(3, (90,), generator=generator)] + 0.05 * torch.randn(90, 4, generator=generator)
    layer = CodebookLayer(4, 3, 1, "euclidean")
    errors = []
    for seed in range(6):  # k-means may start badly
        layer.start_from_(x, seed=seed)
        errors.append(float((layer(x) - layer.normalized(x)[..., 0, :]).square().mean().detach()))
    assert min(errors) < 1e-2
    layer.steps_used.zero_()
    with torch.no_grad():
        layer.codes[0, 1] = 100.0
    layer.train()(x)
    assert layer.steps_used[0, 1] == 0 and layer.replace_dead_(x) == 1 and not layer.steps_used.any()
    assert layer.codes[0, 1].abs().max() < 3
    with pytest.raises(BadInput, match="3 codes cannot start from 2 inputs"):
        layer.start_from_(x[:2])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.out(self.up(x)))


def test_in_a_model():
    torch.manual_seed(0)
    model, x = Network(), torch.randn(4, 5)
    made = add_codebooks_(model, ((x,), {}), after="u?", before=["head"], groups=2, num_codes=7, k=2)
    assert made["up"].dim == 8 and made["up"].groups == 1 and made["head"].dim == 6 and made["head"].groups == 2
    with recorded_codes(model) as found:
        model(x).sum().backward()
    assert found["up.codebook"][0].shape == (4, 1, 2) and found["head.codebook"][0].shape == (4, 2, 2)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(BadInput, match="up is to have two codebooks"):
        add_codebooks_(model, ((x,), {}), after="up", num_codes=7, k=2)


def test_refusals():
    with pytest.raises(ValueError, match="7 features are not cut into 2"):
        CodebookLayer(7, 5, 1, groups=2)
    with pytest.raises(ValueError, match="k=6 codes out of 5"):
        CodebookLayer(4, 5, 6)
    with pytest.raises(ValueError, match="loss='l2'"):
        CodebookLayer(4, 5, 1, loss="l2")
    with pytest.raises(ValueError, match="similarity is 'cosine'"):
        snap(torch.zeros(2, 3), torch.ones(4, 3), similarity="cosine")
    model, x = Network(), torch.randn(4, 5)
    with pytest.raises(BadInput, match="matches 'mlp'"):
        add_codebooks_(model, ((x,), {}), after="mlp")
    with pytest.raises(BadInput, match="out: codebook_features: 8 features are not cut into 3"):
        add_codebooks_(model, ((x,), {}), before="out", groups=3, num_codes=9, k=1)
    with pytest.raises(BadInput, match="Linear has no codebook"), recorded_codes(nn.Linear(2, 2)):
        pass
