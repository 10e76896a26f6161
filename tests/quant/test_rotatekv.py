"""`rotatekv`: rounding written out, the recorded values, the packed cache, whole models exact at many bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.passes import Context, run
from laconic.core.record import apply_records
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.nn.rotated import RestoreOutput
from laconic.quant import RotatedCache, RotateKV, calibrate_kv, kv_codes, kv_round, kv_values, sink_tokens
from laconic.quant._rotatekv import channel_order, grouped_size, rotate_heads, sink_mask
from laconic.testing import Example
from laconic.testing.vectors import Case
from tests.quant.test_rotate import IDS, llama
from tests.zoo import ZOO, outputs


class Fused(nn.Module):
    """Keys and values come out of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))


class Odd(nn.Module):
    """Values that groups of 4 do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(10, 10) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 5)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def at_eight_bits() -> RotateKV:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    return RotateKV(8, 8, group=4, sinks=3, orders={"layers.0.attention.branch.k": order})


EXAMPLES = [
    Example(
        at_eight_bits, kind="Pass", inputs=lambda g: [llama(g), IDS],
        stated={"bound": 0.05, "refused": lambda: (Odd().eval(), [torch.randn(1, 3, 10)], "v")},
    )
]  # fmt: skip


def run_vector(case: Case) -> dict[str, Tensor]:
    """Rounding in groups, or the tokens of the largest entries."""
    args = case.args
    if case.what == "select":
        hidden = case.array("input")
        assert hidden.shape[-1] == args["hidden_size"]
        return {"token_index": sink_tokens(hidden, args["top"])}
    x, group = case.array("input"), int(case.array("group"))
    assert group == args["group"] and args["maxq"] == 2 ** args["bits"] - 1 and not args["symmetric"]
    moved = x.movedim(args["axis"], -1)
    return {"output": kv_round(moved, args["bits"], group, args["clip"]).movedim(-1, args["axis"])}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_equation(bits: int) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) + 2
    got, top = kv_round(x, bits, 4), 2**bits - 1
    clip = 0.8 if bits == 2 else 1.0
    for i in range(2):
        for t in range(3):
            for g in (slice(0, 4), slice(4, 8)):
                part = x[i, t, g]
                s = (part.max() - part.min()) * clip / top
                z = torch.round(-clip * part.min() / s)
                want = s * ((torch.round(part / s) + z).clamp(0, top) - z)
                torch.testing.assert_close(got[i, t, g], want)


def test_constant_groups_and_halves() -> None:
    for value in (0.0, 3.0, -7.25, 1e-3):
        x = torch.full((1, 2, 4), value)
        assert torch.equal(kv_round(x, 2, 4), x)
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    stored = kv_codes(x, 2, 16, dtype=torch.float16)
    assert stored.scale.dtype == stored.zero.dtype == torch.float16 and stored.codes.max() <= 3
    assert (kv_values(stored) - x).norm() < 0.7 * x.norm()


def test_the_packed_cache_gives_back_what_rounding_does() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values, hidden = (torch.randn(2, 9, n, generator=generator) for n in (24, 24, 10))
    order = torch.randperm(24, generator=generator).tolist()
    restore = RestoreOutput(12, order)
    cache = RotatedCache(24, (3, 2), group=8, sinks=4, restore=restore, dtype=torch.float32)
    stored = rotate_heads(keys, 12)[..., order]
    cache.append(stored, values, hidden)
    more = torch.randn(2, 1, 24, generator=generator)
    cache.append(rotate_heads(more, 12)[..., order], more)
    mask = sink_mask(hidden, 4)
    got = cache.keys()
    torch.testing.assert_close(got[:, :9][mask], keys[mask])  # sinks come back as they were
    want = restore.restored(kv_round(stored, 3, 8))
    torch.testing.assert_close(got[:, :9][~mask], want[~mask])
    torch.testing.assert_close(cache.values()[:, 9:], kv_round(more, 2, 8))
    plain = RotatedCache(128, (2, 2), group=128)
    plain.append(*(torch.randn(1, 16, 128, generator=generator) for _ in range(2)))
    assert plain.nbytes * 8 / (2 * 16 * 128) == 2.25


def test_sinks_and_orders() -> None:
    hidden = torch.zeros(1, 4, 3)
    hidden[0, 2] = torch.tensor([9.0, -8.0, 0.0])
    hidden[0, 1, 1] = 5
    assert sink_tokens(hidden, 3).tolist() == [[2, 2, 1]] and sink_mask(hidden, 3).tolist() == [
        [False, True, True, False]
    ]
    assert channel_order(torch.tensor([3.0, -1.0, 2.0])).tolist() == [1, 2, 0]
    assert [grouped_size(h, d) for h, d in ((8, 64), (6, 16), (1, 12), (4, 10), (4, 7))] == [256, 32, 12, 40, 28]


@pytest.mark.parametrize("name", ["llama", "ours"])
def test_rotations_alone_change_nothing(name: str) -> None:
    model = llama() if name == "ours" else ZOO[name].build()
    example = ((IDS,), {}) if name == "ours" else ZOO[name].example(model)
    batch = IDS if name == "ours" else example[1] or example[0]
    orders = calibrate_kv(model, [batch])
    assert orders and all(sorted(order) == list(range(len(order))) for order in orders.values())
    before = outputs(model, example)
    structure = Structure.build(model, example)
    other = copy.deepcopy(model)
    one = RotateKV(2, 2, group=12, sinks=0, orders=orders)
    records, skipped = run(one, Context(other, structure))
    assert not skipped and len(records) == 2 * len(structure.mixers)
    apply_records(model, records)  # without the cache's rounding
    for a, b, c in zip(outputs(model, example), before, outputs(other, example), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max() and (c - b).abs().max() > 1e-5 * b.abs().max()


def test_the_order_is_by_rising_sums_of_rotated_keys() -> None:
    model = llama()
    (path, order), *_ = calibrate_kv(model, [IDS, IDS[:1]]).items()
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    with torch.no_grad():
        model(IDS), model(IDS[:1])
    handle.remove()
    total = sum(rotate_heads(y, 12).sum((0, 1)) for y in seen)
    assert total[order].diff().min() >= 0


def test_large_channels_cost_less_after_rotation() -> None:
    x = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0))
    x[..., [3, 40]] += 12
    plain = (kv_round(x, 2, 32) - x)[..., :3].norm()
    turned = rotate_heads(x, 64)
    order = channel_order(turned.sum((0, 1)))
    restore = RestoreOutput(64, order.tolist())
    rotated = (restore.restored(kv_round(turned[..., order], 2, 32)) - x)[..., :3].norm()
    assert rotated < 0.7 * plain


def test_refusals() -> None:
    with pytest.raises(BadInput, match="groups of 5 do not divide 8 channels"):
        kv_round(torch.ones(1, 8), 2, 5)
    with pytest.raises(BadInput, match="bits=9"):
        kv_round(torch.ones(1, 8), 9, 8)
    with pytest.raises(BadInput, match="clip=1.5"):
        kv_round(torch.ones(1, 8), 2, 8, 1.5)
    with pytest.raises(BadInput, match="0 bits"):
        RotateKV(0)
    with pytest.raises(BadInput, match="no calibration data"):
        calibrate_kv(llama(), [])
    with pytest.raises(BadInput, match="no attention of Fused"):
        calibrate_kv(Fused().eval(), [torch.randn(1, 3, 8)])
    with pytest.raises(BadInput, match="the cache is empty"):
        RotatedCache(8).keys()
    with pytest.raises(ValueError, match="keys: 1 nan"):
        RotatedCache(8, group=8).append(
            torch.ones(1, 1, 8).index_fill(2, torch.tensor([0]), torch.nan), torch.ones(1, 1, 8)
        )
    with pytest.raises(ValueError, match="no permutation"):
        RestoreOutput(4, [0, 1, 1, 3])
