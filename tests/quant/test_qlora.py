"""`qlora`: codes and nested scales as bitsandbytes has them, packed layers that hold them, adapters that train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.nn import is_packed, unpack_parameter
from laconic.numerics import NAMED, NestedScales, NotFinite, pack
from laconic.numerics.levels import normal_float
from laconic.numerics.nested import dynamic_map, nest
from laconic.quant import (
    NF4,
    LoRALinear,
    add_lora_,
    four_bit,
    load_lora_state_,
    lora_layers,
    lora_state,
    merge_lora_,
    nibbles,
    qlora_,
)
from laconic.testing import Case, Example, check

TABLES = {"nf4": "nf4", "fp4": "fp4_bnb"}
BITSANDBYTES = 65535  # even steps that scales are taken to first, where it runs on a CPU


def two_layers(generator: torch.Generator) -> list:
    model = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return [model.eval(), torch.randn(6, 128, generator=generator)]


class Tied(nn.Module):
    """An output layer that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.words(ids)))


def refused() -> tuple[nn.Module, list, str]:
    return Tied().eval(), [torch.tensor([[1, 2]])], "words"


EXAMPLES = [
    Example(lambda: NF4(), kind="Pass", inputs=two_layers, stated={"bound": 0.15, "refused": refused}),
    Example(lambda: NF4(NAMED["nf4"].plain), kind="Pass", inputs=two_layers, stated={"bound": 0.15, "refused": refused}),
]


ADAPTER = Example(
    lambda: LoRALinear(nn.Linear(5, 4), 2, 3.0),
    kind="Layer",
    traits=("batch_independent_eval",),
    inputs=[(3, 2, 5)],
    wrong=[(3, 2, 6)],
    stated={"output": (3, 2, 4)},
)


def run_vector(case: Case):
    """NF4 and FP4 of bitsandbytes, plain and nested, and the two maps."""
    args = case.args
    if case.what == "forward" and "max_exponent_bits" in args:
        return {"code": _padded(dynamic_map(args["total_bits"], args["max_exponent_bits"], args["signed"]))}
    if case.what == "forward" and "use_extra_value" in args:
        levels = normal_float((args["levels"] - 1).bit_length(), args["offset"], extra=args["use_extra_value"])
        return {"code": _padded(torch.tensor(levels))}
    if args.get("quant_type") not in TABLES:
        return NotImplemented
    assert args["nibble_order"] == "first element high" and args["flatten"] == "row-major"
    nested = None
    if args["double_quant"]:
        assert args["offset_rule"] == "mean of absmax"
        nested = NestedScales(block=args["nested_blocksize"])
    made = four_bit(case.array("input"), TABLES[args["quant_type"]], args["blocksize"], nested)
    if nested is not None:
        theirs = nest(made.absmax, nested.block, grid=BITSANDBYTES).codes
        ours = made.stored["scale_codes"].view(torch.uint8).flatten()[: len(theirs)]
        near = (theirs.int() - ours.int()).abs() <= 1
        assert bool((near | (theirs == 0)).all())
        made.stored["scale_codes"] = pack(theirs[None], 8)
    # Its last byte is filled up with the code of 0.
    filled = torch.cat([made.codes, (made.levels == 0).nonzero()[0, :1].to(made.codes)])
    found = {
        "packed": nibbles(filled[: len(made.codes) + len(made.codes) % 2])[:, None],
        "absmax": made.absmax,
        "code": made.levels,
        "output": made.dequantize(),
    }
    if nested is not None:
        codes = made.stored["scale_codes"].view(torch.uint8).flatten()[: len(made.absmax)]
        found |= {
            "nested_code": dynamic_map(),
            "absmax_code": codes,
            "offset": made.stored["scale_offset"],
            "nested_absmax": made.stored["scale_absmax"],
        }
    return found


def _padded(levels: torch.Tensor) -> torch.Tensor:
    """As many levels as there are bytes, zeros among them."""
    return torch.cat([levels, levels.new_zeros(256 - len(levels))]).sort().values


def packed(model: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    run_pass(NF4(**options), Context(model, Structure.build(model, ((x,), {}))))
    return model


def test_the_packed_layer_holds_what_the_blocks_hold():
    model, x = two_layers(torch.Generator().manual_seed(0))
    weight = model[0].weight.detach().clone()
    packed(model, x)
    want = four_bit(weight, nested=NestedScales()).dequantize()  # 128 is twice 64: blocks end with the rows
    assert torch.equal(unpack_parameter(model[0], "weight"), want)
    torch.testing.assert_close(model[0](x), x @ want.t() + model[0].bias, rtol=1e-4, atol=1e-4)
    names = set(model[0].state_dict())
    assert names == {"bias"} | {
        f"weight_{s}" for s in ("packed", "shape", "scale_codes", "scale_absmax", "scale_offset")
    }


def test_the_adapter_keeps_the_contract_of_a_layer():
    check(ADAPTER).raise_if_failed()


def test_bits_per_weight():
    model = packed(nn.Sequential(nn.Linear(1024, 256, bias=False)), torch.zeros(1, 1024))
    stored = sum(t.nbytes for name, t in model.state_dict().items() if "shape" not in name)
    assert stored * 8 / (1024 * 256) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_nested_scales_keep_their_type_and_move():
    model, x = two_layers(torch.Generator().manual_seed(0))
    packed(model, x)
    model.to(torch.bfloat16)
    assert model[0].weight_scale_absmax.dtype == model[0].weight_scale_offset.dtype == torch.float32
    assert model[0](x.bfloat16()).dtype == torch.bfloat16 and model[0].weight.dtype == torch.bfloat16
    scale = model[0].packed_operands("weight")[1]
    assert scale.shape == (32, 2) and scale.dtype == torch.float32
    assert model[0]._packed["weight"].scheme.scale.outer == NestedScales()
    again = copy.deepcopy(model)
    assert torch.equal(again[0].weight, model[0].weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_scales(bits, dtype):
    scale = torch.rand(7, 5, generator=torch.Generator().manual_seed(bits)) + 0.1
    how = NestedScales("linear", bits, 8, dtype)
    stored = how.encode(scale)
    flat, top = scale.flatten(), 2**bits - 1
    want = []
    for begin in range(0, 35, 8):
        run = flat[begin : begin + 8] - flat.min()
        a = run.max().to(getattr(torch, dtype)).float()
        want.append((run * (top / a)).round().clamp(max=top) * (a / top) + flat.min())
    torch.testing.assert_close(how.decode(stored, 35), torch.cat(want))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in stored.items()} == how.tensors(35)
    constant = how.decode(how.encode(torch.full((9,), 0.3)), 9)
    torch.testing.assert_close(constant, torch.full((9,), 0.3))


def test_training_moves_the_adapters_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4))
    target = copy.deepcopy(model)
    with torch.no_grad():
        target[0].weight.add_(torch.outer(torch.randn(96), torch.randn(64)), alpha=0.05)
    done = qlora_(model, rank=4, alpha=8)
    assert done.packed == done.adapted == ["0", "2"] and not done.left
    assert isinstance(model[0], LoRALinear) and is_packed(model[0].base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(128, 64)
    y = target(x).detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
    want = model.eval()(x)
    assert merge_lora_(model) == ["0", "2"] and type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_the_gradient_goes_through_the_packed_weight():
    layer = nn.Sequential(nn.Linear(64, 8))
    qlora_(layer, rank=2)
    x, g = torch.randn(3, 64, requires_grad=True), torch.randn(3, 8)
    layer(x).backward(g)
    torch.testing.assert_close(x.grad, g @ unpack_parameter(layer[0].base, "weight"), rtol=1e-4, atol=1e-4)
    assert layer[0].lora_B.grad.any() and not layer[0].lora_A.grad.any(), "B is zero, so A has no gradient yet"


def test_adapters_go_through_files_of_peft():
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))

    first, second = made(), made()
    for model in (first, second):
        qlora_(model, rank=2)
    with torch.no_grad():
        for layer in lora_layers(first).values():
            layer.lora_B.normal_()
    state = lora_state(first)
    assert set(state) == {f"base_model.model.{i}.lora_{m}.weight" for i in (0, 2) for m in "AB"}
    load_lora_state_(second, state)
    x = torch.randn(3, 64)
    assert torch.equal(first(x), second(x))
    with pytest.raises(BadInput, match="it lacks base_model.model.0.lora_A.weight"):
        load_lora_state_(second, {k: v for k, v in state.items() if ".0.lora_A" not in k})
    with pytest.raises(BadInput, match=r"is \(3, 64\), and \(2, 64\) in the model"):
        load_lora_state_(second, {**state, "base_model.model.0.lora_A.weight": torch.zeros(3, 64)})


def test_peft_takes_the_packed_layers():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = packed(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), torch.zeros(1, 64))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    x, y = torch.randn(32, 64), torch.randn(32, 16)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (adapted(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_conv1d_ties_and_what_is_packed_already():
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(32, 64), nn.Linear(32, 8))
    before = model[0].weight.detach().clone()
    assert qlora_(model, rank=2).packed == ["0", "1"]
    assert model[0].base.weight.shape == (64, 32)
    assert float((model[0].base.weight - before).norm() / before.norm()) < 0.15
    x = torch.randn(3, 64)
    want = model(x)
    merge_lora_(model)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    tied = Tied()
    done = qlora_(tied, rank=2)
    assert done.packed == ["inner"] and "tied: words.weight = head.weight" in done.left["head"]
    assert tied.head.weight is tied.words.weight and done.adapted == ["inner", "head"]
    again = packed(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 32)), torch.zeros(1, 64))
    assert qlora_(again, rank=2).packed == ["0", "1"]


def test_short_rows_and_zero_blocks():
    x = torch.zeros(3, 50)
    x[1] = torch.linspace(-2, 1, 50)
    made = four_bit(x)
    assert made.absmax.tolist() == pytest.approx([2.0, 1.0, 0.0], abs=0.6) and made.absmax[2] == 0
    assert torch.equal(made.dequantize()[0], x[0]) and torch.equal(made.dequantize()[2], x[2])
    assert made.dequantize()[1, 0] == -2, "NF4 has 0 and both ends exactly"
    assert nibbles(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x12, 0x30]
    assert four_bit(torch.empty(0, 4)).dequantize().shape == (0, 4)


def test_refusals():
    with pytest.raises(NotFinite, match="w: 1 nan"):
        four_bit(torch.tensor([float("nan"), 1.0]), name="w")
    bad = nn.Sequential(nn.Linear(64, 8))
    bad[0].weight.data[0, 0] = float("inf")
    with pytest.raises(BadInput, match="0.weight: 0 nan and 1 inf"):
        qlora_(bad, 2)
    assert type(bad[0]) is nn.Linear, "nothing is changed where something is refused"
    with pytest.raises(BadInput, match="ReLU has no linear layer to adapt"):
        add_lora_(nn.ReLU())
    with pytest.raises(BadInput, match="the model: it is the model itself"):
        qlora_(nn.Linear(8, 8))
    with pytest.raises(BadInput, match="rank=0"):
        qlora_(nn.Sequential(nn.Linear(8, 8)), 0)
    with pytest.raises(BadInput, match="no layer with an adapter"):
        merge_lora_(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="for linear layers, not for a Conv2d"):
        LoRALinear(nn.Conv2d(2, 2, 1), 2)
    for wrong in ({"levels": "log"}, {"bits": 4}, {"block": 0}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="scales"):
            NestedScales(**wrong)
    attention = nn.Sequential(nn.MultiheadAttention(16, 2))
    with pytest.raises(BadInput, match="0.out_proj: MultiheadAttention reads its weight"):
        add_lora_(attention)
