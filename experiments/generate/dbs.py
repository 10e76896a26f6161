"""The claim of `dbs`: how different six continuations are, against plain beam search with as many beams.

The model predicts the next character of Moby Dick from the last four, by interpolated counts (Witten and Bell): it is
the same for both arms, and the seed draws its training windows. Prompts are the beginnings of test windows.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from laconic.generate import DiverseBeamSearch
from laconic.tasks.small import small

ORDER, PROMPT, STEPS, BEAMS, N = 4, 16, 24, 6, 4


class Counts:
    """p(v | c) = (count(c v) + kinds(c) p(v | c without its first)) / (count(c) + kinds(c)), and uniform before all."""

    def __init__(self, windows: Tensor, vocabulary: int):
        self.vocabulary = vocabulary
        self.following: dict[tuple[int, ...], Counter] = defaultdict(Counter)
        for window in windows.tolist():
            for i, token in enumerate(window):
                for length in range(min(i, ORDER) + 1):
                    self.following[tuple(window[i - length : i])][token] += 1
        self.cached = functools.cache(self._probabilities)

    def _probabilities(self, context: tuple[int, ...]) -> Tensor:
        uniform = torch.full((self.vocabulary,), 1 / self.vocabulary, dtype=torch.float64)
        below = self.cached(context[1:]) if context else uniform
        found = self.following.get(context)
        if not found:
            return below
        counts = torch.zeros(self.vocabulary, dtype=torch.float64)
        counts[list(found)] = torch.tensor(list(found.values()), dtype=torch.float64)
        return (counts + len(found) * below) / (counts.sum() + len(found))

    def step(self, prefixes: Tensor) -> Tensor:
        """(n, t) prefixes -> (n, vocabulary) log-probabilities."""
        return torch.stack([self.cached(tuple(row)) for row in prefixes[:, -ORDER:].tolist()]).log()


@functools.cache
def problem(seed: int, quick: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The model and the prompts (n, PROMPT); both arms of a seed share them."""
    task = small("chars", seed=seed, size=100 if quick else 4000)
    model = Counts(task.train_data().columns[0], len(task.alphabet) + 1)
    prompts = task.data["test"].columns[0][:, :PROMPT]
    chosen = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[: 3 if quick else 50]
    return model.step, prompts[chosen]


def distinct(sequences: list[tuple[int, ...]], n: int) -> float:
    """Share of the n-grams of all sequences that are different ones."""
    grams = [sequence[i : i + n] for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams)


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Distinct 4-grams among the six continuations, averaged over prompts; `quick` tests the code and shows nothing."""
    step, prompts = problem(seed, quick)
    groups = BEAMS if arm == "dbs" else 1
    decoder = DiverseBeamSearch(beams=BEAMS, groups=groups, diversity=0.5, steps=STEPS, end=None)
    shares = []
    for prompt in prompts:
        found = decoder.by_group(step, prompt)
        shares.append(distinct([one.tokens for group in found for one in group], N))
    return sum(shares) / len(shares)
