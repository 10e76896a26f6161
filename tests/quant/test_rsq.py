"""`rsq`: importances and weights written out, the recorded Hessians, attention watched in any class, whole models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.numerics import Int, Scale, Scheme
from laconic.quant import (
    RSQ,
    Hessian,
    gptq_matrix,
    rsq,
    token_importance,
    token_weights,
    weighted_hessian,
    weighted_hessians,
)
from laconic.quant._rsq import _seen, attention_concentration, mean_one
from laconic.testing import Example
from laconic.testing.vectors import Case
from tests.quant.test_rotate import IDS, llama
from tests.zoo import ZOO

EIGHT = Scheme(Int(8), Scale("channel"))


def two_layers(generator: torch.Generator) -> list:
    model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return [model.eval(), torch.randn(60, 48, generator=generator)]


def moments(model: nn.Sequential, structure: Structure, arguments: tuple) -> dict:
    found = {path: Hessian.of(model.get_submodule(path)) for path in ("0", "2")}
    x = arguments[0][None]
    r = token_weights(x.norm(dim=-1))
    weighted_hessian(found["0"], x, r)
    weighted_hessian(found["2"], model[:2](x).detach(), r)
    return {"hessians": found}


class NoMatrix(nn.Module):
    """A weight that is read by an operation that cannot be packed for GPTQ."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


EXAMPLES = [
    Example(
        lambda: RSQ(EIGHT), kind="Pass", inputs=two_layers,
        stated={
            "context": moments, "bound": 0.02,
            "refused": lambda: (NoMatrix().eval(), [torch.zeros(1, 2, dtype=torch.long)], "table"),
        },
    )
]  # fmt: skip


def run_vector(case: Case) -> dict[str, Tensor | list[Tensor]]:
    """Token weights by attention or norm, or a Hessian."""
    args = case.args
    if case.what == "forward":
        if args["importance"] == "attention":
            assert args["layout"] == "batch,heads,query,key"
            found = [attention_concentration(p)[0] for p in case.arrays("attention")]
        else:
            found = [token_importance(args["importance"], x)[0] for x in case.arrays("input")]
        assert len(found) == args["sequences"] and args["scale"] is None
        return {"token_weight": [token_weights(c, args["r_min"], args["r_max"]) for c in found]}
    inputs = case.arrays("input")
    hessian = Hessian(inputs[0].shape[-1])
    weights = [w.view(x.shape[:-1]) for w, x in zip(case.arrays("token_weight"), inputs, strict=True)] if args[
        "weighted"
    ] else [None] * len(inputs)  # fmt: skip
    for x, r in zip(inputs, weights, strict=True):
        weighted_hessian(hessian, x, r, args["power"])
    return {"hessian": hessian.matrix}


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_equation(power: float) -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    c = x.norm(dim=-1)
    hessian, want = Hessian(4), torch.zeros(4, 4)
    weighted_hessian(hessian, x, token_weights(c, 0.1, 0.7), power)
    for n in range(2):
        r = [0.1 + float((c[n, t] - c[n].min()) / (c[n].max() - c[n].min())) * 0.6 for t in range(5)]
        total = sum(v**power for v in r)
        for t in range(5):
            want += 5 * r[t] ** power / total * torch.outer(x[n, t], x[n, t])
    torch.testing.assert_close(hessian.matrix, 2 / 2 * want)


def test_importances() -> None:
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    assert token_importance("norm", x).tolist() == [[0, 5, 1]]
    assert token_importance("difference", x, y=x + torch.tensor([0.0, 2.0])).tolist() == [[2, 2, 2]]
    torch.testing.assert_close(token_importance("distance", x), torch.tensor([[13.0, 21.5, 9.5]]))
    assert token_importance("positions", x, first=2).tolist() == [[1, 1, 0]]
    assert token_importance("uniform", x).tolist() == [[1, 1, 1]]
    assert token_weights(torch.ones(1, 3)).tolist() == [[1, 1, 1]]  # no spread, no division by it
    assert mean_one(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]


@pytest.mark.parametrize("name", ["ours", "gpt2", "eager"])
def test_attention_is_seen_in_any_class(name: str) -> None:
    entry = ZOO["gpt2" if name == "gpt2" else "llama"]
    model = llama() if name == "ours" else entry.build()
    if name == "eager":
        model.set_attn_implementation("eager")
    block = {"ours": "layers.0", "gpt2": "transformer.h.1"}.get(name, "model.layers.1")
    ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    x, y, c = _seen(model, block, ids, attention=True)
    heads = 2 if name == "ours" else 4
    assert c is not None and c.shape == (2, 6) and x.shape == y.shape
    torch.testing.assert_close(c.sum(-1), torch.full((2,), heads * 6.0))  # each query gives one away in each head
    if name == "eager":
        with torch.no_grad():
            want = model(ids, output_attentions=True).attentions[1].sum((1, 2))
        torch.testing.assert_close(c, want)


def test_all_tokens_alike_is_gptq_and_weights_matter() -> None:
    model = llama()
    path = "layers.0.perceptron.branch.down"
    found = {
        kind: weighted_hessians(model, "layers.0", [path], [IDS], token_weight=kind)[path].matrix
        for kind in ("uniform", "attention", "norm", "difference", "frequency", "distance", "positions")
    }
    for kind, matrix in found.items():
        same = torch.allclose(matrix, found["uniform"], rtol=1e-3)
        assert same == (kind == "uniform"), kind
    own = weighted_hessians(model, "layers.0", [path], [IDS], token_weight=lambda x: x.norm(dim=-1))[path].matrix
    torch.testing.assert_close(own, found["norm"])


@pytest.mark.parametrize("rotated", [True, False])
def test_a_whole_model(rotated: bool) -> None:
    model = llama(tied=rotated)
    want = model(IDS).detach()
    done = rsq(model, [IDS], EIGHT, rotated=rotated)
    packed = [record for record in done.records if record.action == "pack"]
    assert len(packed) == 7 and done.blocks == ("layers.0",) and "head.weight" in done.left
    assert all(record.data["method"] == "rsq" for record in packed)
    assert float((model(IDS).detach() - want).norm() / want.norm()) < 0.03


def test_weights_that_lie_the_other_way() -> None:
    model = ZOO["gpt2"].build()
    ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    want = model(ids).logits.detach()
    done = rsq(model, [{"input_ids": ids}], EIGHT, token_weight="norm", rotated=False)
    assert len([record for record in done.records if record.action == "pack"]) == 8
    assert float((model(ids).logits.detach() - want).norm() / want.norm()) < 0.03


def test_important_tokens_lose_less() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, 200, 24, generator=generator), torch.randn(32, 24, generator=generator)
    x[:, :20] = x[:, :20] @ torch.randn(24, 24, generator=generator)
    scheme, off = Scheme(Int(2), Scale("channel")), {}
    for kind, r in (("alike", None), ("first", token_weights(token_importance("positions", x, first=20)))):
        hessian = Hessian(24)
        weighted_hessian(hessian, x, r)
        error = gptq_matrix(weight, hessian.matrix, scheme).dequantize(scheme) - weight
        off[kind] = float((x[0, :20] @ error.T).norm())
    assert off["first"] < 0.95 * off["alike"]


def test_refusals() -> None:
    model = llama()
    with pytest.raises(BadInput, match="token_weight='luck'"):
        rsq(model, [IDS], token_weight="luck")
    with pytest.raises(BadInput, match="no calibration data"):
        rsq(model, [])
    with pytest.raises(BadInput, match="r_min=2"):
        rsq(model, [IDS], r_min=2)
    with pytest.raises(BadInput, match="layers.0: inputs of shape .* two tokens or more"):
        weighted_hessians(model, "layers.0", [], [IDS[:, :1]])
    with pytest.raises(BadInput, match="no attention over its tokens was seen"):
        weighted_hessians(model, "layers.0.perceptron", [], [IDS])
    with pytest.raises(BadInput, match="do not fit inputs"):
        weighted_hessian(Hessian(3), torch.ones(1, 2, 3), torch.ones(2))
    with pytest.raises(BadInput, match="'difference' needs"):
        token_importance("difference", torch.ones(1, 2, 3))
