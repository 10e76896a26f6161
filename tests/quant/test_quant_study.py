"""`quant_study`: the measures written out, common random numbers, real formats, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.errors import BadInput
from laconic.nn import is_packed
from laconic.numerics import TABLES, Scheme, affine_params, dequantize, quantize
from laconic.numerics.nested import dynamic_map, nest
from laconic.quant import QuantStudy, in_format, tempered, tempered_kl, top_k_overlap
from laconic.quant._quant_study import consistency, distinct_pairs, write
from laconic.tasks.small.networks import CharacterModel
from laconic.testing import Example
from laconic.testing.vectors import Case


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return CharacterModel(13, 16, width=64, heads=2, layers=1).eval()


def prompts(n: int = 3, t: int = 4) -> torch.Tensor:
    return torch.randint(13, (n, t), generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example(
        lambda: QuantStudy(("float", "bf16", "int8", "nf4-dq"), (0.5,), (0, 3), max_new_tokens=2, seeds=2),
        kind="Probe",
        inputs=lambda g: [tiny(), prompts()],
        stated={"time": ("tokens_per_second",)},
    )
]


def run_vector(case: Case):
    """The 4-bit formats of the study, as bitsandbytes has them; the file's other formats are others'."""
    table = {"nf4": "nf4", "fp4": "fp4_bnb"}.get(case.args.get("quant_type", ""))
    if table is None:
        return NotImplemented
    x, block = case.array("input"), case.args["blocksize"]
    scheme = Scheme.parse(f"v1/levels{table}/group{block}/float32/minmax/znone/nearest")
    flat = x.reshape(1, -1)
    scale, _ = affine_params(flat, scheme)
    codes = quantize(flat, scale, None, scheme)
    # On a CPU bitsandbytes gives small positive numbers the second of two zeros.
    shown = torch.where((codes == 0) & (flat > 0) & (table == "fp4_bnb"), 8, codes)[0]
    # Its last byte is filled up with the code of 0, and blocks of zeros have the size 0.
    shown = torch.cat([shown, shown.new_full((len(shown) % 2,), TABLES[table].index(0.0))]).to(torch.uint8)
    scale = torch.where(F.pad(flat, (0, -flat.shape[1] % block)).view(-1, block).any(1), scale, 0.0)
    found = {
        "packed": (shown[0::2] << 4 | shown[1::2])[:, None], "absmax": scale[0],
        "code": torch.tensor(TABLES[table], dtype=torch.float32),
    }  # fmt: skip
    if case.args["double_quant"]:
        nested = nest(scale, case.args["nested_blocksize"], grid=65535)
        scale = nested.scales()[None]
        found |= {
            "nested_code": dynamic_map(), "absmax_code": nested.codes, "offset": nested.offset,
            "nested_absmax": nested.absmax,
        }  # fmt: skip
    return found | {"output": dequantize(codes, scale, None, scheme).view_as(x)}


def test_the_divergence_written_out() -> None:
    f, q = torch.randn(2, 5), torch.randn(2, 5)
    for temperature, k in ((0.3, 0), (1.0, 2), (2.0, 9)):
        for row in range(2):
            shares = []
            for z in (f[row].tolist(), q[row].tolist()):
                kept = sorted(z, reverse=True)[: k or 5]
                e = [math.exp(v / temperature) if v >= kept[-1] else 0.0 for v in z]
                shares.append([v / sum(e) * (1 - 1e-6) + 1e-6 / 5 for v in e])
            want = sum(a * math.log(a / b) for a, b in zip(*shares, strict=True))
            assert tempered_kl(f, q, temperature, k)[row].item() == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert tempered_kl(f, f, 0.1).abs().max() < 1e-9
    a, b = torch.tensor([5.0, 4, 3, 0, 0]), torch.tensor([0.0, 4, 5, 0, 3])
    assert top_k_overlap(a, b, 3).item() == pytest.approx(2 / 4) and top_k_overlap(a, b, 0).item() == 1


def test_low_temperatures_raise_the_divergence_of_a_small_error() -> None:
    f = torch.randn(200, 30)
    q = f + 0.01 * torch.randn(200, 30)
    found = [tempered_kl(f, q, t).mean().item() for t in (2.0, 1.0, 0.5)]
    assert found == sorted(found)


def test_measures_of_texts() -> None:
    assert distinct_pairs(torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4]])) == pytest.approx((1 / 3 + 1) / 2)
    assert distinct_pairs(torch.tensor([[1]])) == 1
    texts = torch.tensor([[[1, 2]], [[1, 3]], [[4, 3]]])
    assert consistency(texts) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3) and consistency(texts[:1]) == 1


def test_texts_are_drawn_by_common_random_numbers_from_the_right_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def model(ids):
        return logits.expand(len(ids), ids.shape[1], 4)

    start = torch.zeros(4000, 1, dtype=torch.int64)
    drawn = write(model, start, 1, 0.7, 3, seed=1)
    share = torch.bincount(drawn.flatten(), minlength=4) / 4000
    torch.testing.assert_close(share, tempered(logits, 0.7, 3).exp()[0], rtol=0, atol=0.03)
    assert torch.equal(drawn, write(model, start, 1, 0.7, 3, seed=1))
    assert not torch.equal(drawn, write(model, start, 1, 0.7, 3, seed=2))
    coldest = write(model, start[:5], 2, 1e-3, 0, seed=1)
    assert torch.equal(coldest, torch.zeros(5, 2, dtype=torch.int64))


def test_formats_are_real_and_leave_the_model_alone() -> None:
    model, ids = tiny(), prompts()
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = {name: in_format(model, name, ids) for name in ("float", "bf16", "int8", "nf4", "nf4-dq", "fp4")}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    packed = made["nf4"].model
    assert is_packed(packed.blocks[0].mlp[0]) and not is_packed(packed.head) and not is_packed(packed.characters)
    size = {name: formatted.bytes for name, formatted in made.items()}
    assert size["bf16"] * 2 == size["float"] and size["int8"] < size["float"] / 2
    assert size["nf4-dq"] < size["nf4"] == size["fp4"] < size["int8"]
    inside = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear))
    assert size["nf4"] - size["nf4-dq"] == pytest.approx(inside // 64 * 3, abs=64)
    own = in_format(model, "v1/int2/group32/float16/minmax/zint/nearest", ids)
    with torch.no_grad():
        want = model(ids)
        error = {n: (m(ids).float() - want).norm() for n, m in {k: v.model for k, v in made.items()}.items()}
        assert error["float"] == 0 < error["int8"] < error["nf4"] < (own.model(ids) - want).norm()


def test_what_is_found() -> None:
    found = QuantStudy(("float", "nf4"), (0.5, 1.0), max_new_tokens=3, seeds=2)(tiny(), prompts())
    assert [(row["format"], row["temperature"]) for row in found.table] == [
        ("float", 0.5), ("float", 1.0), ("nf4", 0.5), ("nf4", 1.0),
    ]  # fmt: skip
    same, other = found.table[0], found.table[2]
    assert same["kl"] == pytest.approx(0, abs=1e-9) and same["agreement"] == 1
    assert other["kl"] > 0 and other["kl_low"] < other["kl"] < other["kl_high"]
    assert other["bytes"] < same["bytes"] and same["float_perplexity"] > 1
    one = QuantStudy(("bf16",), (1.0,), max_new_tokens=1, seeds=1, prompt_tokens=1)(
        tiny(), prompts(1, 3)
    )  # one token, one prompt
    assert math.isnan(one.table[0]["kl_low"]) and one.table[0]["kl"] >= 0


def test_what_is_refused() -> None:
    model = tiny()
    for wrong in (torch.zeros(0, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), [[1]]):
        with pytest.raises(BadInput, match=r"prompts are token ids \(n, t\)"):
            QuantStudy()(model, wrong)
    with pytest.raises(BadInput, match="temperatures .* are positive"):
        QuantStudy(temperatures=(0.0,))
    with pytest.raises(BadInput, match="are the least"):
        QuantStudy(seeds=0)
    with pytest.raises(BadInput, match="no format 'int9'"):
        QuantStudy(("int9",))(model, prompts())
    with pytest.raises(BadInput, match="no linear layer that can be packed"):
        QuantStudy(("nf4",), skip=("blocks", "head"))(model, prompts())
    model.head.bias.data[0] = math.nan
    with pytest.raises(BadInput, match="logits are not finite"):
        QuantStudy(("float",), (1.0,), max_new_tokens=2)(model, prompts())
