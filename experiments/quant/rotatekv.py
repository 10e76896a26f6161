"""The claim of `rotatekv`: a character model with planted outliers in its keys, keys and values in 2 bits.

Both arms train the same transformer. Then a pair of channels that positions turn together is multiplied by 10 in the keys
and divided by 10 in the queries, which changes nothing of the function. One arm rounds keys and values by token, in groups of
a head, as they are; the other after `RotateKV`'s rotations and reordering, with the tokens of 5 entries kept.
"""

from __future__ import annotations

import torch

from laconic.core.passes import Context
from laconic.core.passes import run as run_pass
from laconic.core.structure import Structure
from laconic.quant import RotateKV, calibrate_kv, kv_round
from laconic.tasks.small import small
from laconic.zoo import LlamaLM, LlamaLMConfig

WINDOWS, CALIBRATION, FACTOR, SINKS = 4000, 32, 10.0, 5
WIDTH, HEADS = 64, 4


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per character of one arm from one seed; `quick` tests the code and shows nothing."""
    task = small("chars", seed=seed, size=64 if quick else WINDOWS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaLM(LlamaLMConfig(len(task.alphabet) + 1, width=WIDTH, layers=2, heads=HEADS, hidden=160))
    task.train(model, seed)
    plant(model.eval())
    each = WIDTH // HEADS
    if arm == "plain":
        for layer in model.layers:
            for linear in (layer.attention.branch.k, layer.attention.branch.v):
                linear.register_forward_hook(lambda _, args, y: kv_round(y, 2, each))
        return task.evaluate(model).value
    windows = task.data["train"].columns[0][: 4 if quick else CALIBRATION]
    one = RotateKV(2, 2, group=each, sinks=SINKS, orders=calibrate_kv(model, [windows]))
    run_pass(one, Context(model, Structure.build(model, ((windows[:2],), {})), seed=seed))
    return task.evaluate(model).value


@torch.no_grad()
def plant(model: LlamaLM) -> None:
    """Large channels in the keys of one head of each layer."""
    each = WIDTH // HEADS
    pair = torch.tensor([each // 2 - 1, each - 1])  # they turn together, and slowest
    for layer in model.layers:
        layer.attention.branch.k.weight[pair] *= FACTOR
        layer.attention.branch.q.weight[pair] /= FACTOR
