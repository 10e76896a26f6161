"""`llm_int8`: the decomposition written out, its gradient, ties, types, what is left alone, the recorded vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.passes import Context, run
from laconic.core.record import apply_records
from laconic.core.structure import Structure
from laconic.quant import LLMInt8, int8_linear, int8_rows, round_inputs
from laconic.testing import Example
from laconic.testing.vectors import Case
from tests.zoo import ZOO, outputs


def two_layers(generator: torch.Generator) -> list:
    """A model, and inputs with an outlier feature."""
    model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    x = torch.randn(6, 48, generator=generator)
    x[:, 5] *= 20
    return [model.eval(), x]


class Tied(nn.Module):
    """An output layer that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.words(ids)))


def refused() -> tuple[nn.Module, list, str]:
    return Tied().eval(), [torch.tensor([[1, 2]])], "head"


EXAMPLES = [
    Example(lambda: LLMInt8(), kind="Pass", inputs=two_layers, stated={"bound": 0.02, "refused": refused}),
]


def run_vector(case: Case) -> dict[str, Tensor]:
    """Rows in 8 bits, or a product."""
    x, threshold = case.array("input"), case.args["threshold"]
    if case.what == "quantize":
        rows = int8_rows(x, threshold)
        found = {"codes": rows.codes, "row_absmax": rows.absmax}
        return found | ({"outlier_columns": rows.outliers} if "outlier_columns" in case else {})
    weight = case.array("weight")
    stored = int8_rows(weight)
    floats = weight if case.args.get("has_fp16_weights") else None
    bias = case.array("bias") if "bias" in case else None
    output = int8_linear(x.flatten(0, -2), stored.codes, stored.absmax, bias, threshold, outlier_weight=floats)
    output = output.view(*x.shape[:-1], len(weight))
    return {"weight_codes": stored.codes, "weight_row_absmax": stored.absmax, "output": output}


def rewritten(model: nn.Module, x: Tensor, **options) -> tuple[nn.Module, dict[str, str]]:
    model = copy.deepcopy(model)
    _, skipped = run(LLMInt8(**options), Context(model, Structure.build(model, ((x,), {}))))
    return model, skipped


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_equation(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 10, generator=generator), torch.randn(4, 10, generator=generator)
    x[1, 7] = -9.0
    b = w.abs().amax(1)
    wq = torch.round(127 * w / b[:, None])
    outlier = {7} if threshold else set()
    for t in range(3):
        kept = [k for k in range(10) if not threshold or abs(float(x[t, k])) < threshold]
        a = max(abs(float(x[t, k])) for k in kept)
        for n in range(4):
            value = 0.0
            for k in range(10):
                if k in outlier:
                    value += float(x[t, k]) * float(wq[n, k]) * float(b[n]) / 127
                else:
                    value += round(127 * float(x[t, k]) / a) * float(wq[n, k]) * a * float(b[n]) / 127**2
            stored = int8_rows(w)
            got = int8_linear(x, stored.codes, stored.absmax, None, threshold)
            assert float(got[t, n]) == pytest.approx(value, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("width", [48, 49, 50, 51])
def test_a_packed_layer_is_the_product(width: int) -> None:
    layer, x = nn.Linear(width, 30), torch.randn(7, width)
    x[2, 5] = 40.0
    packed, _ = rewritten(nn.Sequential(layer), x)
    rows = int8_rows(layer.weight.detach())
    expected = int8_linear(x, rows.codes, rows.absmax, layer.bias.detach())
    torch.testing.assert_close(packed(x).detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[0].weight, rows.codes * rows.absmax[:, None] / 127)


def test_outliers_ruin_plain_rounding_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(50, 64, generator=generator), int8_rows(torch.randn(32, 64, generator=generator))
    x[:, 5] = 100.0
    exact = x @ (weight.codes.float() * weight.absmax[:, None] / 127).T
    plain, decomposed = (int8_linear(x, weight.codes, weight.absmax, None, h) - exact for h in (0.0, 6.0))
    assert float(decomposed.norm()) < 0.1 * float(plain.norm())


def test_nothing_in_a_row() -> None:
    rows = int8_rows(torch.tensor([[0.0, 0.0], [7.0, 8.0]]), 6.0)
    assert rows.codes.tolist() == [[0, 0], [0, 0]] and rows.absmax.tolist() == [0.0, 0.0]
    assert rows.outliers.tolist() == [0, 1]
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.data[3] = 0
    x = torch.randn(2, 16)
    packed, _ = rewritten(model, x)
    assert torch.equal(packed[0].weight[3], torch.zeros(16))
    assert torch.equal(packed(x[:0]), torch.empty(0, 16))
    assert torch.isfinite(packed(torch.zeros(1, 16))).all()


def test_the_gradient_is_that_of_the_stored_weights() -> None:
    model, x = two_layers(torch.Generator().manual_seed(2))
    packed, _ = rewritten(model, x)
    x = x.view(2, 3, 48).requires_grad_()
    upstream = torch.randn(2, 3, 16)
    packed(x).backward(upstream)
    alive = (packed[0](x.detach()) > 0).float()
    expected = ((upstream @ packed[2].weight) * alive) @ packed[0].weight
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(packed[0].bias.grad, ((upstream @ packed[2].weight) * alive).sum((0, 1)))


def test_half_precision_comes_back() -> None:
    model, x = two_layers(torch.Generator().manual_seed(3))
    packed, _ = rewritten(model.bfloat16(), x.bfloat16())
    out = packed(x.bfloat16())
    assert out.dtype == torch.bfloat16 and packed[0].weight_scale.dtype == torch.float32
    want = model.float()(x.bfloat16().float())
    assert ((out.float() - want).norm() / want.norm()).item() < 0.02


def test_the_record_alone_gives_the_same_weights() -> None:
    model, x = two_layers(torch.Generator().manual_seed(4))
    structure = Structure.build(model, ((x,), {}))
    mine, other = copy.deepcopy(model), copy.deepcopy(model)
    records, _ = run(LLMInt8(), Context(mine, structure))
    apply_records(other, records)
    assert torch.equal(mine[0].weight, other[0].weight)
    assert sum(t.numel() * t.element_size() for t in mine[0].state_dict().values()) < 0.4 * 4 * 48 * 32
    for record in records:
        assert 0 < record.data["loss"] < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_whole_models(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    example = entry.example(model)
    before = outputs(model, example)
    _, skipped = run(LLMInt8(), Context(model, Structure.build(model, example)))
    assert any(name.startswith("lm_head") for name in skipped)
    for a, b in zip(outputs(model, example), before, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05


def test_what_is_left_alone_says_why() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(4, 4)).eval()
    torch.nn.utils.parametrizations.weight_norm(model[1])
    packed, skipped = rewritten(model, torch.randn(2, 16), skip=("0",))
    assert skipped == {
        "0.weight": "named by skip='0'",
        "1.weight": "a parametrization computes it",
        "2.weight": skipped["2.weight"],
        "3.weight": skipped["3.weight"],
    }
    assert "elements" in skipped["2.weight"] and packed.state_dict().keys() == model.state_dict().keys()
    _, tied = rewritten(Tied(), torch.tensor([[1]]))
    assert "tied" in tied["head.weight"] and list(tied) == ["head.weight"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="threshold=-1"):
        LLMInt8(-1)
    with pytest.raises(ValueError, match="Linear: inputs are rounded for weights packed as v1/int8/channel"):
        round_inputs(nn.Linear(2, 2))
    model, x = two_layers(torch.Generator().manual_seed(5))
    packed, _ = rewritten(model, x)
    with pytest.raises(RuntimeError, match="takes 48 features"):
        packed(torch.ones(2, 47))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0.weight"):
        rewritten(model, x)
