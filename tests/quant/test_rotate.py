"""`rotate`: whole models stay what they are, outliers do not, ties, packing afterwards, the recorded transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.passes import Context, run
from laconic.core.record import apply_records
from laconic.core.rotation import klt_rotation, rotate_along, rotation, solve_input
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.nn.rotated import RotateInput, rotated_inputs
from laconic.numerics import Int, Scale, Scheme, base_matrix, base_order, fake_quantize, hadamard, hadamard_matrix
from laconic.quant import RTN, Rotate, rotate
from laconic.testing import Example
from laconic.testing.vectors import Case
from laconic.zoo import LlamaLM, LlamaLMConfig
from tests.zoo import ZOO, outputs

IDS = torch.tensor([[1, 5, 2, 7, 3], [0, 4, 4, 6, 8]])


def llama(generator: torch.Generator | None = None, **options) -> LlamaLM:
    """A small transformer with gains that are not 1."""
    generator = generator or torch.Generator().manual_seed(0)
    config = LlamaLMConfig(11, width=24, layers=1, heads=2, kv_heads=1, hidden=40, **options)
    model = LlamaLM(config).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1)
    if config.tied:
        model.head.weight = model.embedding.weight
    return model


class PostNorm(nn.Module):
    """A sum that a norm reads, and then others read what the norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.inner = nn.Embedding(9, 8), nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        return x + self.inner(x)


def refused() -> tuple[nn.Module, list, str]:
    return PostNorm().eval(), [torch.zeros(1, 3, dtype=torch.long)], "norm"


EXAMPLES = [
    Example(lambda: Rotate(heads=True), kind="Pass", inputs=lambda g: [llama(g), IDS], stated={"refused": refused})
]


def run_vector(case: Case) -> dict[str, list[Tensor]]:
    """Base matrices, or transforms with a base order each."""
    args = case.args
    if "orders" in args:
        return {"matrix": [base_matrix(order) for order in args["orders"]]}
    assert args["divide_by"] == "sqrt(n)"
    done = []
    for n, order, x in zip(args["sizes"], args["base_orders"], case.arrays("input"), strict=True):
        assert x.shape[args["axis"]] == n and base_order(n) == order
        turned = hadamard(x.movedim(args["axis"], -1), order=order, transpose=args["transpose_base"])
        done.append(turned.movedim(-1, args["axis"]))
    return {"output": done}


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2"])
def test_whole_models_stay(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    example = entry.example(model)
    before = outputs(model, example)
    done = rotate(model, example, heads=True)
    for a, b in zip(outputs(model, example), before, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert ("stream" in done.units.values()) == (name != "gemma2")
    assert ("values" in done.units.values()) == (name != "gpt2")
    assert all(done.left.values())
    # A tied head is one no more, and transformers does not tie it again.
    if name == "llama_tied":
        assert done.untied == ("lm_head.weight",) and not model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "given"])
@pytest.mark.parametrize("tied", [False, True])
def test_our_transformer_in_float64(kind: str, tied: bool) -> None:
    model = llama(tied=tied).double()
    want = model(IDS)
    q = klt_rotation(torch.diag(torch.arange(1.0, 25.0))) if kind == "given" else kind
    done = rotate(model, ((IDS,), {}), q, heads=True, seed=3)
    torch.testing.assert_close(model(IDS), want, rtol=1e-10, atol=1e-12)
    assert sorted(done.units.values()) == ["input", "input", "stream", "values"]
    assert done.untied == (("head.weight",) if tied else ())
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in model.modules() if isinstance(m, nn.RMSNorm))
    again = llama(tied=tied).double()
    apply_records(again, done.records)
    assert torch.equal(again(IDS), model(IDS)) and len(rotated_inputs(again.layers[0].perceptron.branch.down)) == 1


def test_the_equations() -> None:
    model = llama().double()
    before = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    q = rotation(24, generator=generator)
    rotate(model, ((IDS,), {}), seed=0)
    torch.testing.assert_close(model.embedding.weight, before.embedding.weight @ q)
    old, new = before.layers[0].attention, model.layers[0].attention
    torch.testing.assert_close(new.branch.q.weight, old.branch.q.weight @ torch.diag(old.norm_in.weight) @ q)
    h = torch.block_diag(*[hadamard_matrix(12)] * 2)
    torch.testing.assert_close(new.branch.o.weight, q.T @ old.branch.o.weight @ h)
    torch.testing.assert_close(
        new.branch.v.weight, hadamard_matrix(12).T @ old.branch.v.weight @ torch.diag(old.norm_in.weight) @ q
    )
    old_down, new_down = before.layers[0].perceptron.branch.down, model.layers[0].perceptron.branch.down
    torch.testing.assert_close(new_down.weight, q.T @ old_down.weight @ hadamard_matrix(40))


def test_outliers_are_spread() -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 8.0
    assert hadamard(x).abs().max() == 1.0
    model = llama()
    inner = model.layers[0].perceptron.branch
    inner.up.weight.data[3] *= 20
    inner.down.weight.data[:, 3] /= 20
    want, scheme = model(IDS).detach(), Scheme(Int(4), Scale("token"))

    def off(m: LlamaLM) -> float:
        m = copy.deepcopy(m)
        down = m.layers[0].perceptron.branch.down
        down.register_forward_pre_hook(lambda _, args: (fake_quantize(args[0].flatten(0, 1), scheme).view_as(args[0]),))
        return float((m(IDS).detach() - want).norm())

    plain = off(model)
    rotate(model, ((IDS,), {}), stream=False, value=False)
    assert off(model) < 0.7 * plain


def test_weights_are_packed_after_rotation() -> None:
    model = llama()
    want = model(IDS)
    rotate(model, ((IDS,), {}), heads=True)
    structure = Structure.build(model, ((IDS,), {}))
    run(RTN("v1/int8/channel/float32/minmax/znone/nearest"), Context(model, structure))
    assert float((model(IDS) - want).detach().norm() / want.detach().norm()) < 0.03
    packed = Structure.build(model, ((IDS,), {}))
    decision = Rotate().plan(packed, model)
    assert not decision.units and any("before weights are quantized" in why for why in decision.skipped.values())


def test_equal_variances_by_klt() -> None:
    mixed = (
        torch.randn(400, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12) * torch.arange(1.0, 13)
    )
    x = mixed.double()
    turned = (x - x.mean(0)) @ klt_rotation(torch.cov(x.T), torch.Generator().manual_seed(1))
    variances = turned.var(0)
    assert float(variances.max() / variances.min()) == pytest.approx(1, rel=1e-6)
    assert float(x.var(0).max() / x.var(0).min()) > 5


def test_scales_go_along() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    want = model(x)
    structure = Structure.build(model, ((x,), {}))
    s = torch.rand(8) + 0.5
    writers = {"0.weight": (0, 0, 8), "0.bias": (0, 0, 8)}
    apply_records(model, [solve_input(structure, model, "1", scale=s, writers=writers, method="rotate")])
    torch.testing.assert_close(model(x), want)
    with pytest.raises(BadInput, match="1 needs 8 positive finite scales"):
        solve_input(structure, model, "1", scale=-s, method="rotate")


def test_runs_that_lie_apart() -> None:
    x, q = torch.randn(2, 12, dtype=torch.float64), hadamard_matrix(4)
    want = torch.einsum("nij,ik->nkj", x.view(2, 4, 3), q).reshape(2, 12)
    torch.testing.assert_close(RotateInput(4, 3).rotated(x), want)
    torch.testing.assert_close(rotate_along(x, 1, q, 3), want)
    torch.testing.assert_close(rotate_along(x.T, 0, q, 3), want.T)


def test_refusals() -> None:
    with pytest.raises(BadInput, match="kind='fourier'"):
        Rotate("fourier")
    with pytest.raises(BadInput, match="nothing in Sequential can be rotated"):
        rotate(nn.Sequential(nn.ReLU()).eval(), ((torch.ones(2, 3),), {}))
    with pytest.raises(BadInput, match="is 24 wide, and the rotation is of shape"):
        rotate(llama(), ((IDS,), {}), torch.eye(3))
    with pytest.raises(BadInput, match="not orthogonal"):
        rotate(llama(), ((IDS,), {}), torch.ones(24, 24))
    with pytest.raises(BadInput, match="covariance holds inf or nan"):
        klt_rotation(torch.full((3, 3), torch.nan))
    model = llama(tied=True)
    decision = Rotate().plan(Structure.build(model, ((IDS,), {})), model)
    assert "is tied to" in decision.skipped["layers.0.attention.norm_in"]
    model = llama()
    model.layers[0].perceptron.branch.up.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="perceptron.branch.up.weight: .* inf"):
        rotate(model, ((IDS,), {}))
    model = llama()
    nn.utils.parametrizations.orthogonal(model.layers[0].attention.branch.o)
    decision = Rotate().plan(Structure.build(model, ((IDS,), {})), model)
    assert any("parametriz" in why or "form" in why or "weight of its own" in why for why in decision.skipped.values())
