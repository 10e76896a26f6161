"""The claim of `codebook_features`: a small transformer that learns walks through a random finite-state machine.

20 states, 11 tokens; from each state three tokens lead on, each to a random state. A codebook of 100 codes, one to a place,
lies behind the last block, and is trained with the rest. Then at places of new walks a code is forced: the one that was taken
most often in some other state (code_of_state), or any that is in use (random_code). What counts is the probability that
the model gives to tokens that are possible in that state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.quant import add_codebooks_, recorded_codes
from laconic.tasks.small.networks import CharacterModel

STATES, TOKENS, EDGES = 20, 11, 3
CONTEXT, WIDTH, CODES, STEPS, BATCH, LR = 24, 48, 100, 600, 48, 2e-3
TRIALS = 400


class Machine:
    """A random machine: in state s each of `tokens[s]` (EDGES,) is as likely, and leads to `after[s, token]`."""

    def __init__(self, generator: torch.Generator):
        self.tokens = torch.stack([torch.randperm(TOKENS, generator=generator)[:EDGES] for _ in range(STATES)])
        self.after = torch.randint(STATES, (STATES, TOKENS), generator=generator)

    def walks(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (count, CONTEXT + 1), and the states (count, CONTEXT + 1) that they lead to."""
        state = torch.randint(STATES, (count,), generator=generator)
        tokens, states = [], []
        for _ in range(CONTEXT + 1):
            token = self.tokens[state, torch.randint(EDGES, (count,), generator=generator)]
            state = self.after[state, token]
            tokens.append(token)
            states.append(state)
        return torch.stack(tokens, 1), torch.stack(states, 1)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean probability of possible tokens under a forced code; `quick` tests the code and shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    machine = Machine(generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharacterModel(TOKENS, CONTEXT, width=WIDTH, heads=4, layers=2)
        last = f"blocks.{len(model.blocks) - 1}"
        example = ((machine.walks(2, generator)[0][:, :-1],), {})
        layer = add_codebooks_(model, example, after=last, num_codes=CODES, k=1)[last]
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    for _ in range(5 if quick else STEPS):
        tokens, _ = machine.walks(BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    model.eval()
    return _steered(arm, model, layer, machine, generator, TRIALS // 20 if quick else TRIALS)


@torch.no_grad()
def _steered(arm: str, model, layer, machine: Machine, generator: torch.Generator, trials: int) -> float:
    tokens, states = machine.walks(500, generator)
    settled = slice(CONTEXT // 2, None)  # before, the state may not be known yet
    with recorded_codes(model) as found:
        model(tokens[:, :-1])
    codes = next(iter(found.values()))[0][:, settled, 0, 0].flatten()
    reached = states[:, :-1][:, settled].flatten()
    counts = torch.zeros(STATES, CODES, dtype=torch.int64)
    counts.index_put_((reached, codes), torch.ones_like(codes), accumulate=True)
    used, visited = counts.sum(0).nonzero()[:, 0], counts.sum(1).nonzero()[:, 0]
    total = 0.0
    for _ in range(trials):
        state = visited[torch.randint(len(visited), (), generator=generator)]
        drawn = used[torch.randint(len(used), (), generator=generator)]
        code = int(counts[state].argmax() if arm == "code_of_state" else drawn)
        walk = machine.walks(1, generator)[0][:, :-1]
        where = torch.arange(CONTEXT) == CONTEXT - 1
        with layer.forced_code(code, where=where):
            chances = model(walk)[0, -1].softmax(-1)
        total += float(chances[machine.tokens[state]].sum())
    return total / trials
