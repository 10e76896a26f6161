"""`layer_bits`: both importances written out, who gets how many bits, blocks of transformers, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.errors import BadInput, Impossible
from laconic.quant import LayerBits, OrderSweep, assign_bits, lim, zd
from laconic.search import Space
from laconic.tasks.small.networks import CharacterModel
from laconic.testing import Example

SPACE = Space({name: (8, 4, 2) for name in "abcd"})
LOSS = (9.0, 0.5, 0.1, 3.0)


def worth(candidate) -> float:
    """Bits saved minus what is lost; best where b and c go one down: the third step of the order."""
    return sum((0.0, 1.0, 1.5)[o] - (0.0, loss, 20 * loss)[o] for o, loss in zip(candidate, LOSS, strict=True))


def tiny(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return CharacterModel(11, 8, width=16, heads=2, layers=layers).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example(lambda: LayerBits(), kind="Probe", inputs=lambda g: [tiny(), ids(2, 8)]),
    Example(
        lambda space, seed: OrderSweep(space, seed, order=(2, 1, 3, 0)),
        kind="Search",
        name="OrderSweep",
        inputs=[SPACE, worth],
        stated={"optimum": (0, 1, 1, 0), "evaluations": 20},
    ),
]


def test_lim_written_out() -> None:
    x, y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    x[0, 1] = 0  # a token of zeros is turned neither way
    total = 0.0
    for a, b in zip(x.view(6, 5).tolist(), y.view(6, 5).tolist(), strict=True):
        lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        total += sum(p * q for p, q in zip(a, b, strict=True)) / lengths if lengths else 0.0
    assert lim(x, y) == pytest.approx(-total / 6)
    assert lim(x[0, 0], 2 * x[0, 0]) == pytest.approx(-1)  # one token


def test_zd_written_out_over_all_weights_as_one() -> None:
    parts = [torch.randn(7, 3), torch.randn(5) * 4 + 1]
    w = torch.cat([p.flatten() for p in parts])
    z = (w - w.mean()) / w.std(correction=0)
    assert zd(parts) == pytest.approx(-float((z > 1).float().mean()))
    assert zd(parts, threshold=0.5, absolute=True) == pytest.approx(-float((z.abs() > 0.5).float().mean()))
    assert zd([torch.full((3,), 2.0)]) == 0.0
    with pytest.raises(BadInput, match="without weights"):
        zd([])


def test_bits_by_size_and_importance() -> None:
    importance, sizes = {"a": 0.3, "b": 0.1, "c": 0.2}, {"a": 100, "b": 300, "c": 100}
    for average, want in ((8, (8, 8, 8)), (7.9, (8, 4, 8)), (5.6, (8, 4, 8)), (5.5, (8, 4, 4)), (4, (4, 4, 4))):
        assert tuple(assign_bits(importance, sizes, bits=(4, 8), average=average).values()) == want
    three = assign_bits(importance, {"a": 1, "b": 1, "c": 1}, bits=(8, 4, 2), average=3.4)
    assert three == {"a": 4, "b": 2, "c": 4}
    with pytest.raises(Impossible):
        assign_bits(importance, sizes, average=3.9)
    with pytest.raises(BadInput, match="importance of b is nan"):
        assign_bits(importance | {"b": math.nan}, sizes, average=5)
    with pytest.raises(BadInput, match="different blocks"):
        assign_bits(importance, {"a": 1}, average=5)


def test_the_probe_sees_the_stream_of_each_block() -> None:
    model, x = tiny(), ids(3, 8)
    found = LayerBits()(model, x)
    h = model.characters(x) + model.places.weight[:8]
    for i, (block, row) in enumerate(zip(model.blocks, found.table, strict=True)):
        after = block(h)
        assert row["block"] == f"blocks.{i}" and row["lim"] == pytest.approx(lim(h, after), rel=1e-5)
        weights = [m.weight for m in block.modules() if isinstance(m, nn.Linear)]
        assert row["zd"] == pytest.approx(zd(weights)) and row["weights"] == sum(w.numel() for w in weights)
        h = after
    ranks = sorted(range(4), key=lambda i: -found.table[i]["lim"])
    assert [found.table[i]["lim_rank"] for i in ranks] == [1, 2, 3, 4]
    parts = LayerBits(["blocks.0", "blocks.2"])(model, [x[:1], (x[1:], "classes")])
    assert parts.table[1]["lim"] == pytest.approx(found.table[2]["lim"])  # batches add up to the same tokens
    bits = found.assign(6.0)
    assert sorted(bits.values()) == [4] * 8 + [8] * 8 and len({b for n, b in bits.items() if "blocks.1." in n}) == 1
    with pytest.raises(BadInput, match="'lim' or 'zd', not by 'size'"):
        found.assign(6.0, by="size")


def test_blocks_of_transformers_called_by_keyword_with_conv1d_and_a_tied_head() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=8)
    found = LayerBits()(GPT2LMHeadModel(config).eval(), {"input_ids": ids(1, 1)})  # one token
    assert [row["block"] for row in found.table] == ["transformer.h.0", "transformer.h.1"]
    assert found.table[0]["weights"] == 16 * 48 + 16 * 16 + 2 * 16 * 64


def test_what_is_refused() -> None:
    model, x = tiny(2), ids(1, 4)
    with pytest.raises(BadInput, match="no data"):
        LayerBits()(model, [])
    with pytest.raises(BadInput, match=r"give blocks=\.\.\."):
        LayerBits()(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(BadInput, match=r"0: lim: inputs \(2, 4\) and outputs \(2, 3\)"):
        LayerBits(["0"])(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(BadInput, match="0 was not called"):
        LayerBits(["0"])(Idle(nn.Linear(4, 4)), torch.randn(2, 4))
    with torch.no_grad():
        model.places.weight[0] = math.nan
    with pytest.raises(BadInput, match=r"blocks\.0: what passes through it is not finite"):
        LayerBits(["blocks.0"])(model, x)
    with pytest.raises(BadInput, match="names each of the 4 decisions once"):
        OrderSweep(SPACE, order=(0, 1, 2, 2))


class Idle(nn.Sequential):
    def forward(self, x):
        return x


def test_a_packed_block_is_refused() -> None:
    from laconic.core.passes import Context, run
    from laconic.core.structure import Structure
    from laconic.quant import RTN

    model = nn.Sequential(nn.Linear(64, 64))
    run(RTN(), Context(model, Structure.build(model, ((torch.randn(2, 64),), {}), how="hooks")))
    with pytest.raises(BadInput, match="0 is packed already"):
        LayerBits(["0"])(model, torch.randn(2, 64))
