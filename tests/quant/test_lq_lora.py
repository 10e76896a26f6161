"""`lq_lora`: the quantizer block by block, weighted approximation, allocation against brute force, and the vectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from laconic.errors import BadInput, Impossible
from laconic.nn import is_packed
from laconic.numerics.levels import normal_float
from laconic.quant import (
    LoRALinear,
    LQLoRA,
    NFConfig,
    allocate_bits,
    configurations,
    fisher_information,
    low_rank,
    lq_decompose,
    lq_lora_,
)
from laconic.testing import Case, Example

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SMALL = NFConfig(3, block=16, scale_block=16)


def two_layers(generator: torch.Generator) -> list:
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.Linear(16, 32))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return [model.eval(), torch.randn(6, 32, generator=generator)]


def narrow() -> tuple[nn.Module, list, str]:
    model = nn.Sequential(nn.Linear(32, 30), nn.Linear(30, 16)).eval()
    return model, [torch.zeros(2, 32)], "1.weight"


EXAMPLES = [
    Example(
        lambda: LQLoRA(4, SMALL, iterations=5), kind="Pass", inputs=two_layers, stated={"bound": 0.4, "refused": narrow}
    )
]


def config_of(args) -> NFConfig:
    return NFConfig(
        args["bits"],
        args["scale_bits"],
        DTYPES[args["scale_scale_dtype"]],
        args["block_size"],
        args["scale_block_size"],
    )


def run_vector(case: Case):
    """Levels, the blockwise quantizer, and decompositions."""
    args = case.args
    if "construction" in args:
        return {"levels": torch.tensor(normal_float(args["bits"], args["offset"]))}
    x = case.array("input")
    assert args["scale_offset"] == "min over the tensor"
    config = config_of(args)
    if case.what == "quantize":
        return {"output": config.quantize(x), "bits_per_weight": torch.tensor(config.bits_per_weight)}
    assert args["svd"] == "exact" and args["returns"] == "last iterate"
    fisher = case.array("fisher") if "fisher" in case else None
    heuristic = {"col": "column"}.get(args["fisher_heuristic"], args["fisher_heuristic"])
    assert (fisher is None) == (heuristic is None)
    found = lq_decompose(
        x, args["rank"], config, fisher, heuristic=heuristic or "two-sided", iterations=args["max_iterations"], keep="last"
    )  # fmt: skip
    assert len(found.errors) == args["iterations_run"]
    return {
        "low_rank": found.left @ found.right,
        "quantized": found.quantized,
        "errors": torch.tensor(found.errors),
    }


def test_the_quantizer_block_by_block():
    config = NFConfig(2, 3, "float32", 8, 4)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    blocks = x.view(-1, 8)
    absmax = blocks.abs().amax(1)
    levels = torch.tensor(normal_float(2))
    want = []
    for begin in range(0, 15, 4):
        run = absmax[begin : begin + 4] - absmax.min()
        scales = (run * 7 / run.max()).round() * run.max() / 7 + absmax.min()
        for block, scale in zip(blocks[begin : begin + 4], scales, strict=True):
            want.append(scale * levels[(block[:, None] / scale - levels).abs().argmin(1)])
    torch.testing.assert_close(config.quantize(x), torch.cat(want).view(5, 24), rtol=1e-5, atol=1e-6)
    assert config.bits_per_weight == 2 + 3 / 8 + 32 / 32
    assert NFConfig(scale_dtype="bfloat16").bits_per_weight == 3 + 8 / 64 + 16 / (64 * 256)
    assert not config.quantize(torch.zeros(4, 8)).any()


def test_weighted_approximation_is_exact_for_weights_of_rank_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    d, e = torch.rand(12, generator=generator).double() + 0.3, torch.rand(9, generator=generator).double() + 0.3
    left, right = low_rank(x, 3, d, e)
    off = (d[:, None] * (x - left @ right) * e).norm()
    rest = torch.linalg.svdvals(d[:, None] * x * e)[3:].norm()
    torch.testing.assert_close(off, rest)
    plain = low_rank(x, 3)
    torch.testing.assert_close((x - plain[0] @ plain[1]).norm(), torch.linalg.svdvals(x)[3:].norm())
    low = torch.randn(40, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    first, second = (low_rank(low, 4, oversampling=5, seed=3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0] @ first[1], low, rtol=1e-3, atol=1e-3)


def test_the_best_iterate_is_kept():
    W = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    found, last = (lq_decompose(W, 4, SMALL, iterations=60, keep=keep) for keep in ("best", "last"))
    assert found.errors == last.errors and len(found.errors) < 60
    assert found.best == found.errors.index(min(found.errors)) == len(found.errors) - 2 and last.best == found.best + 1
    off = (W - found.quantized - found.left @ found.right).norm()
    assert float(off) == pytest.approx(min(found.errors)) and min(found.errors) < found.errors[0]


def test_fisher_weighs_what_matters():
    generator = torch.Generator().manual_seed(0)
    W, F = torch.randn(32, 32, generator=generator), torch.rand(32, 32, generator=generator)
    F[:8] *= 100
    F[:, 3] = 0
    plain, weighted = lq_decompose(W, 4, SMALL), lq_decompose(W, 4, SMALL, F)
    off = [((W - one.quantized - one.left @ one.right) * F.sqrt()).norm() for one in (plain, weighted)]
    assert off[1] < off[0] and torch.isfinite(weighted.left).all()


def test_fisher_information_is_by_example():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    x = torch.randn(5, 3)
    found = fisher_information(model, x.split(1), lambda m, one: m(one).sum())
    torch.testing.assert_close(found["0.weight"], x.square().sum(0).expand(2, 3))
    with pytest.raises(BadInput, match="no examples"):
        fisher_information(model, [], lambda m, one: m(one).sum())
    with pytest.raises(BadInput, match="0.weight: its Fisher information: 6 nan"):
        fisher_information(model, [x], lambda m, one: m(one).sum() * float("nan"))


def test_allocation_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: s * torch.randn(16, k, generator=generator) for n, s, k in (("a", 1.0, 32), ("b", 3.0, 16), ("c", 0.2, 48))
    }
    configs = configurations((2, 3, 4), blocks=(16, 32), scale_blocks=(16,))
    assert len(configurations()) == 12
    assert len(configurations((2, 3, 4, 8), (2, 3, 4, 8), DTYPES.values(), (16, 32, 64), (16, 64, 256))) == 432
    budget = 3.4
    chosen = allocate_bits(weights, budget, 2, configs, iterations=1, oversampling=None)
    costs = {
        (n, c): lq_decompose(W, 2, c, iterations=1).errors[0] ** 2
        for n, W in weights.items()
        for c in configs
        if W.shape[1] % c.block == 0
    }
    best = float("inf")
    for combination in itertools.product(configs, repeat=3):
        pairs = list(zip(weights, combination, strict=True))
        size = sum(c.bits_per_weight * weights[n].numel() for n, c in pairs)
        if all(pair in costs for pair in pairs) and size <= budget * sum(W.numel() for W in weights.values()):
            best = min(best, sum(costs[pair] for pair in pairs))
    assert sum(costs[pair] for pair in chosen.items()) == pytest.approx(best)
    with pytest.raises(Impossible, match="more than the budget"):
        allocate_bits(weights, 1.5, 2, configs, iterations=1)


def test_a_model_starts_nearer_and_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.Linear(32, 5))
    x = torch.randn(64, 64)
    y = model(x).detach()
    fisher = fisher_information(model, x[:8].split(1), lambda m, one: m(one).square().sum())
    done = lq_lora_(model, 6, 3.0, fisher, iterations=8)
    assert set(done) == {"0.weight", "2.weight", "3.weight"}
    assert sum(c.bits_per_weight * n for c, n in zip(done.values(), (64 * 48, 48 * 32, 160), strict=True)) <= 3 * (
        64 * 48 + 48 * 32 + 160
    )
    assert isinstance(model[0], LoRALinear) and is_packed(model[0].base) and model[3].rank == 5
    assert model[0].base._packed["weight"].scheme.scale.outer.levels == "linear"
    first = float((model(x) - y).detach().square().mean())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_refusals():
    with pytest.raises(ValueError, match="nf5"):
        NFConfig(5)
    W = torch.randn(4, 16)
    with pytest.raises(ValueError, match="rank=0"):
        lq_decompose(W, 0, SMALL)
    with pytest.raises(ValueError, match="heuristic is 'both'"):
        lq_decompose(W, 2, SMALL, W.square(), heuristic="both")
    with pytest.raises(ValueError, match=r"\(2, 2\) for \(4, 16\), or negative"):
        lq_decompose(W, 2, SMALL, torch.ones(2, 2))
    with pytest.raises(BadInput, match="b: its Fisher information is missing"):
        allocate_bits({"a": W, "b": W}, 3, 2, [SMALL], {"a": W.square()})
    with pytest.raises(BadInput, match="a: its rows of 15 are no whole blocks"):
        allocate_bits({"a": W[:, :15]}, 3, 2, [SMALL])
    with pytest.raises(BadInput, match="Sequential has no linear layer to decompose"):
        lq_lora_(nn.Sequential(nn.Linear(15, 4)), 2, SMALL)
    bad = nn.Sequential(nn.Linear(16, 4))
    bad[0].weight.data[0, 0] = float("nan")
    with pytest.raises(BadInput, match="0.weight: 1 nan"):
        lq_lora_(bad, 2, SMALL)


def test_without_a_heuristic_fisher_counts_in_errors_alone():
    generator = torch.Generator().manual_seed(2)
    W, F = torch.randn(16, 64, generator=generator), torch.rand(16, 64, generator=generator)
    config = NFConfig(3, block=32, scale_block=16)
    plain = lq_decompose(W, 4, config, iterations=1, oversampling=None)
    found = lq_decompose(W, 4, config, F, heuristic="none", iterations=1, oversampling=None)
    torch.testing.assert_close(found.left @ found.right, plain.left @ plain.right)
    off = W - found.quantized - found.left @ found.right
    assert found.errors == pytest.approx([float((off * F.sqrt()).norm())])
