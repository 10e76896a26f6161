"""`layernorm`: the cells step by step by hand, masks, sequences without steps, and the recorded vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.norm import LayerNorm, LayerNormGRU, LayerNormLSTM
from laconic.testing import Case, Example

TRAITS = ("gradient:exact", "batch_independent_eval")
CELL = {"kind": "Layer", "traits": TRAITS, "inputs": [(3, 2, 4)], "wrong": [(3, 2, 7)], "stated": {"output": (3, 2, 5)}}
EXAMPLES = [
    Example(lambda: LayerNorm(8), kind="Layer", traits=TRAITS, inputs=[(3, 5, 8)], wrong=[(3, 5, 7)]),
    Example(lambda: LayerNormGRU(4, 5, batch_first=True), **CELL),
    Example(lambda: LayerNormLSTM(4, 5, batch_first=True), **CELL),
    Example(lambda: LayerNormLSTM(4, 5, norm_cell=False, batch_first=True), **CELL),
]

# Where torch's order of gates takes each block from in the recorded one.
ORDER = {"gru": [0, 1, 2], "lstm": [0, 1, 3, 2]}
NORMS = {
    "gru": {"norm_ih_gates": "1", "norm_ih_candidate": "2", "norm_hh_gates": "3", "norm_hh_candidate": "4"},
    "lstm": {"norm_ih": "1", "norm_hh": "2", "norm_c": "3"},
}


def reorder(tensor: Tensor, kind: str, dim: int = 0) -> Tensor:
    """Blocks of gates from the recorded order to ours; for both kinds the permutation is its own inverse."""
    order = ORDER[kind]
    if tensor.shape[dim] % len(order):
        return tensor
    return torch.cat([tensor.chunk(len(order), dim)[i] for i in order], dim)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def to_ours(kind: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recorded parameters, or their gradients, under our names and in our layout."""
    gates = kind == "gru"
    ih = torch.cat([given["W"], given["Wx"]], 1) if gates else given["W"]
    hh = torch.cat([given["U"], given["Ux"]], 1) if gates else given["U"]
    bias = torch.cat([given["b"], given["bx"]]) if gates else given["b"]
    ours = {"weight_ih": reorder(ih.T, kind), "weight_hh": reorder(hh.T, kind), "bias": reorder(bias, kind)}
    for name, number in NORMS[kind].items():
        wide = kind == "lstm" and name != "norm_c"
        for part, letter in (("weight", "s"), ("bias", "b")):
            value = given[f"{letter}{number}"]
            ours[f"{name}.{part}"] = reorder(value, kind) if wide else value
    return ours


def to_recorded(kind: str, ours: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    weight_ih, weight_hh, bias = (reorder(ours[name], kind) for name in ("weight_ih", "weight_hh", "bias"))
    recorded: dict[str, Tensor] = {}
    parts = {"W": weight_ih, "U": weight_hh, "b": bias}
    for name, value in parts.items():
        if kind == "gru":
            recorded[name], recorded[f"{name}x"] = transposed(value[: 2 * hidden]), transposed(value[2 * hidden :])
        else:
            recorded[name] = transposed(value)
    for name, number in NORMS[kind].items():
        for part, letter in (("weight", "s"), ("bias", "b")):
            value = ours[f"{name}.{part}"]
            wide = kind == "lstm" and name != "norm_c"
            recorded[f"{letter}{number}"] = reorder(value, kind) if wide else value
    return recorded


def run_vector(case: Case):
    args, kind = case.args, case.name.partition("_")[0]
    make = LayerNormGRU if kind == "gru" else LayerNormLSTM
    layer = make(args["input_size"], args["hidden_size"], eps=args["eps"])
    names = [role for role in case.roles if f"grad_{role}" in case and role not in ("input", "output")]
    layer.load_state_dict(to_ours(kind, {name: case.array(name) for name in names}))
    x, mask = case.array("input").requires_grad_(), case.array("mask")
    first = torch.full((args["batch"], args["hidden_size"]), float(args["initial_state"]))
    state = first if kind == "gru" else (first, first.clone())
    y, _ = layer(x, state, mask)
    y.backward(case.array("grad_output"))
    gradients = to_recorded(kind, {n: p.grad for n, p in layer.named_parameters()}, args["hidden_size"])
    found = {"output": y, "grad_input": x.grad, **{f"grad_{name}": gradients[name] for name in names}}
    if "cell" in case:
        found["cell"] = layer.cells(x, state, mask)
    return found


def naive_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    rows = []
    for row in x:
        mean = row.sum() / row.numel()
        variance = ((row - mean) ** 2).sum() / row.numel()
        rows.append(norm.weight * (row - mean) / (variance + norm.eps) ** 0.5 + norm.bias)
    return torch.stack(rows)


def shaken(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer.double()


def test_the_equation_of_the_gru():
    torch.manual_seed(0)
    layer, x, h = shaken(LayerNormGRU(3, 4, eps=0.1)), torch.randn(5, 2, 3).double(), torch.randn(2, 4).double()
    got, last = layer(x, h)
    for t, row in enumerate(x):
        from_input, from_state = row @ layer.weight_ih.T + layer.bias, h @ layer.weight_hh.T
        gates = naive_norm(from_state[:, :8], layer.norm_hh_gates) + naive_norm(from_input[:, :8], layer.norm_ih_gates)
        r, u = torch.sigmoid(gates[:, :4]), torch.sigmoid(gates[:, 4:])
        inner = r * naive_norm(from_state[:, 8:], layer.norm_hh_candidate)
        n = torch.tanh(inner + naive_norm(from_input[:, 8:], layer.norm_ih_candidate))
        h = u * h + (1 - u) * n
        torch.testing.assert_close(got[t], h)
    torch.testing.assert_close(last, h)


@pytest.mark.parametrize("norm_cell", [True, False])
def test_the_equation_of_the_lstm(norm_cell):
    torch.manual_seed(0)
    layer, x = shaken(LayerNormLSTM(3, 4, norm_cell, eps=0.1)), torch.randn(5, 2, 3).double()
    h, c = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    got, (_, cell) = layer(x, (h, c))
    for t, row in enumerate(x):
        sums = naive_norm(h @ layer.weight_hh.T, layer.norm_hh) + layer.bias
        sums = sums + naive_norm(row @ layer.weight_ih.T + layer.bias, layer.norm_ih)
        i, f, n, o = sums.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n)
        h = torch.sigmoid(o) * torch.tanh(naive_norm(c, layer.norm_c) if norm_cell else c)
        torch.testing.assert_close(got[t], h)
    torch.testing.assert_close(cell, c)


@pytest.mark.parametrize("make", [LayerNormGRU, LayerNormLSTM])
def test_masked_steps_are_as_if_they_were_not_there(make):
    torch.manual_seed(0)
    layer, x = make(3, 4), torch.randn(5, 2, 3)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0], [1, 0]])
    outputs, _ = layer(x, mask=mask)
    short, _ = layer(x[[0, 2], 1:])
    torch.testing.assert_close(outputs[2:, 1], short[-1].expand(3, 4))
    assert torch.equal(outputs[3], outputs[2])


@pytest.mark.parametrize("make", [LayerNormGRU, LayerNormLSTM])
def test_a_sequence_without_steps_keeps_the_state(make):
    layer, h = make(3, 4), torch.randn(2, 4)
    outputs, last = layer(torch.zeros(0, 2, 3), h if make is LayerNormGRU else (h, h))
    assert outputs.shape == (0, 2, 4)
    assert torch.equal(last if make is LayerNormGRU else last[0], h)


def test_everything_masked_keeps_the_first_state_and_has_finite_gradients():
    layer, x = LayerNormGRU(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    outputs, _ = layer(x, mask=torch.zeros(5, 2))
    assert not outputs.any()
    outputs.sum().backward()
    assert not x.grad.any()


def test_a_large_mean_in_half_precision():
    x = (1000 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0))).half()
    got = LayerNorm(64, dtype=torch.float16)(x)
    torch.testing.assert_close(got.float(), LayerNorm(64)(x.float()), rtol=2e-3, atol=2e-3)


def test_constant_features_are_the_shift():
    layer = LayerNorm(6)
    nn.init.uniform_(layer.bias)
    torch.testing.assert_close(layer(torch.full((2, 6), 3.0)), layer.bias.expand(2, 6))


def test_recurrent_matrices_start_orthogonal():
    for block in LayerNormLSTM(3, 6, dtype=torch.bfloat16).weight_hh.float().split(6):
        torch.testing.assert_close(block @ block.T, torch.eye(6), atol=0.03, rtol=0)


def test_refusals():
    with pytest.raises(ValueError, match="sizes of at least 1"):
        LayerNormGRU(0, 3)
    layer = LayerNormLSTM(3, 4)
    with pytest.raises(ValueError, match=r"a mask of \(2, 5\): it must be \(5, 2\)"):
        layer(torch.zeros(5, 2, 3), mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"a state of \(2, 3\): it must be \(2, 4\)"):
        layer(torch.zeros(5, 2, 3), (torch.zeros(2, 3), torch.zeros(2, 4)))
