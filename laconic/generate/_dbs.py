"""`dbs`: beam search in groups, each of which is pushed away from what the groups before it chose.

B beams are split into G groups of B' = B / G. At every step the groups choose one after another. For beam b of group g,
with what the groups h < g have chosen by now, every token v of the vocabulary gets

    log q(v | b) = log p(v | b) - diversity * penalty(v)
    hamming      penalty(v) = number of beams of earlier groups that chose v at this step
    cumulative   penalty(v) = sum_h exp(-(places where b and h differ so far, this step with v included) / temperature)
    ngram        penalty(v) = how often the n-gram that v would end occurs in the sequences of earlier groups

and the group goes on with the B' best extensions by the sum of log q over all steps. So the first group is plain beam
search with B' beams, and so is everything with G = 1 or diversity 0. A sequence ends with the end token or at the last
step. Its reported score is sum log p, without penalties, divided by length^length_penalty.

Source: "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models", Vijayakumar, Cogswell, Selvaraju,
Sun, Lee, Crandall, Batra, 2016, arXiv 1610.02424. Official code: ashwinkalyan/dbs (Lua, no licence), which has the
Hamming penalty. There a finished beam stays in its group at a score of -1000, and its meaningless continuation counts
for the penalty once the group has nothing else (`finished_score=-1000` does that). Here it leaves the group. The paper
writes the cumulative penalty with one exponential over all earlier beams; ours is one term for each.

Use it where several answers are wanted (captions, suggestions, candidates to rerank). For the one most probable
sequence plain beam search is better, for unbiased samples draw.

Example:
    >>> import torch
    >>> from laconic.generate import DiverseBeamSearch
    >>> table = torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]).log()
    >>> decode = DiverseBeamSearch(beams=2, groups=2, diversity=1.0, steps=3, end=0)
    >>> for tokens, score in decode(lambda prefixes: table[prefixes[:, -1]], torch.tensor([1])):
    ...     print(tokens.tolist(), round(score, 2))
    [2, 0] -1.2
    [1, 2, 0] -2.41
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from laconic.core.card import Card

PENALTIES = ("hamming", "cumulative", "ngram")

Tokens = tuple[int, ...]


def hamming_penalty(prefix: Tokens, earlier: Sequence[Tokens], vocabulary: int) -> Tensor:
    """(vocabulary,): how many earlier sequences have each token at the place after `prefix`."""
    found = torch.zeros(vocabulary, dtype=torch.float64)
    for sequence in earlier:
        if len(sequence) > len(prefix):
            found[sequence[len(prefix)]] += 1
    return found


def cumulative_penalty(prefix: Tokens, earlier: Sequence[Tokens], vocabulary: int, *, temperature: float) -> Tensor:
    """(vocabulary,): sum over earlier sequences of exp(-(places that differ) / temperature): 0 once far apart."""
    found = torch.zeros(vocabulary, dtype=torch.float64)
    for sequence in earlier:
        if len(sequence) > len(prefix):
            apart = sum(a != b for a, b in zip(prefix, sequence, strict=False))
            found += math.exp(-(apart + 1) / temperature)
            found[sequence[len(prefix)]] += math.exp(-apart / temperature) - math.exp(-(apart + 1) / temperature)
    return found


def ngram_penalty(prefix: Tokens, earlier: Sequence[Tokens], vocabulary: int, *, order: int) -> Tensor:
    """(vocabulary,): how often the n-gram that each token would end occurs in earlier sequences, at any place."""
    found = torch.zeros(vocabulary, dtype=torch.float64)
    if len(prefix) < order - 1:
        return found
    context = prefix[len(prefix) - order + 1 :]
    for sequence in earlier:
        for i in range(len(sequence) - order + 1):
            if sequence[i : i + order - 1] == context:
                found[sequence[i + order - 1]] += 1
    return found


@dataclass(frozen=True)
class Hypothesis:
    """A sequence.

    Attributes:
        tokens: what follows the start, the end token included.
        score: sum of log q, by which it was chosen.
        log_prob: sum of log p.
        finished: whether it has ended.
    """

    tokens: Tokens = ()
    score: float = 0.0
    log_prob: float = 0.0
    finished: bool = False


@dataclass
class _Group:
    """Beams that go on, and sequences that have ended."""

    beams: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    done: list[Hypothesis] = field(default_factory=list)


class DiverseBeamSearch:
    """The decoder.

    Args:
        beams: B, sequences in all.
        groups: G, which divides B.
        diversity: strength of the penalty.
        steps: the longest sequence.
        end: the token that ends one; None if there is none.
        penalty: "hamming", "cumulative" or "ngram".
        temperature: of the cumulative penalty, in tokens.
        order: n of the n-grams.
        length_penalty: power of the length that reported scores are divided by; 0 leaves them log-probabilities.
        finished_score: None lets a finished beam leave its group; a number keeps it there at this score.

    Raises:
        ValueError: an argument cannot be right, by name.
    """

    def __init__(
        self,
        *,
        beams: int = 6,
        groups: int = 3,
        diversity: float = 0.5,
        steps: int,
        end: int | None,
        penalty: str = "hamming",
        temperature: float = 1.0,
        order: int = 2,
        length_penalty: float = 0.0,
        finished_score: float | None = None,
    ):
        for name, value in (("beams", beams), ("groups", groups), ("steps", steps), ("order", order)):
            if value < 1:
                raise ValueError(f"dbs: {name} is {value}: it must be at least 1")
        if beams % groups:
            raise ValueError(f"dbs: {beams} beams cannot be split into {groups} groups of one size")
        if penalty not in PENALTIES:
            raise ValueError(f"dbs: penalty is {penalty!r}: it must be one of {', '.join(PENALTIES)}")
        if not 0 <= diversity < math.inf:
            raise ValueError(f"dbs: diversity is {diversity}: it must be finite and not negative")
        if not temperature > 0:
            raise ValueError(f"dbs: temperature is {temperature}: it must be positive")
        self.beams, self.groups, self.diversity, self.steps, self.end = beams, groups, diversity, steps, end
        self.penalty, self.temperature, self.order = penalty, temperature, order
        self.length_penalty, self.finished_score = length_penalty, finished_score

    def __call__(self, step: Callable[[Tensor], Tensor], start: Tensor) -> list[tuple[Tensor, float]]:
        """Sequences and their scores, best first: the best B / G of every group, equal ones once.

        Args:
            step: (n, t) prefixes, start included -> (n, vocabulary) log-probabilities of the next token.
            start: (s,) what every prefix begins with; it is not part of the sequences.

        Raises:
            ValueError: `step` gives another shape, or NaN.
        """
        kept = [one for group in self.by_group(step, start) for one in group[: self.beams // self.groups]]
        scores = {one.tokens: one.log_prob / len(one.tokens) ** self.length_penalty for one in kept}
        best = sorted(scores.items(), key=lambda item: -item[1])
        return [(start.new_tensor(tokens), score) for tokens, score in best]

    @torch.no_grad()
    def by_group(self, step: Callable[[Tensor], Tensor], start: Tensor) -> list[list[Hypothesis]]:
        """Every sequence that was finished, for each group, best first by what the group was searching for: log q.

        Raises:
            ValueError: `step` gives another shape, or NaN.
        """
        groups = [_Group() for _ in range(self.groups)]
        for index in range(self.steps):
            if all(beam.finished for group in groups for beam in group.beams):
                break
            earlier: list[Tokens] = []
            for group, table in zip(groups, self._tables(step, start, groups), strict=True):
                if group.beams:
                    self._advance(group, table, earlier, last=index == self.steps - 1)
                said = [*group.done, *group.beams] if self.finished_score is None else group.beams
                earlier += [one.tokens for one in said]
        return [sorted(group.done, key=lambda one: -one.score) for group in groups]

    def _tables(self, step: Callable[[Tensor], Tensor], start: Tensor, groups: list[_Group]) -> list[Tensor]:
        """log p (beams, vocabulary) of each group, from one call of the model for all."""
        beams = [beam for group in groups for beam in group.beams]
        prefixes = torch.stack([torch.cat([start, start.new_tensor(beam.tokens)]) for beam in beams])
        table = step(prefixes)
        if table.ndim != 2 or len(table) != len(beams):
            raise ValueError(f"dbs: step gives {tuple(table.shape)} for {len(beams)} prefixes, not (n, vocabulary)")
        table = table.detach().double().cpu()
        if table.isnan().any():
            raise ValueError("dbs: step gives NaN")
        return list(table.split([len(group.beams) for group in groups]))

    def _advance(self, group: _Group, table: Tensor, earlier: list[Tokens], *, last: bool) -> None:
        """One step of beam search in one group, by the augmented log-probabilities."""
        vocabulary = table.shape[1]
        augmented = table - self.diversity * torch.stack(
            [self._penalty(beam.tokens, earlier, vocabulary) for beam in group.beams]
        )
        totals = (augmented + table.new_tensor([[beam.score] for beam in group.beams])).flatten()
        best = totals.topk(min(self.beams // self.groups, totals.numel()))
        following = []
        for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if total == -math.inf:
                continue  # impossible, and so is all that would follow
            row, token = divmod(place, vocabulary)
            beam = group.beams[row]
            log_prob = beam.log_prob + float(table[row, token])
            one = Hypothesis((*beam.tokens, token), total, log_prob, beam.finished or token == self.end)
            ends = not beam.finished and (one.finished or last)
            if ends:
                group.done.append(one)
            if self.finished_score is not None:
                following.append(replace(one, score=self.finished_score) if ends else one)
            elif not ends:
                following.append(one)
        group.beams = following

    def _penalty(self, prefix: Tokens, earlier: list[Tokens], vocabulary: int) -> Tensor:
        if self.penalty == "hamming":
            return hamming_penalty(prefix, earlier, vocabulary)
        if self.penalty == "cumulative":
            return cumulative_penalty(prefix, earlier, vocabulary, temperature=self.temperature)
        return ngram_penalty(prefix, earlier, vocabulary, order=self.order)


CARD = Card(
    id="dbs",
    title="Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models",
    authors="Vijayakumar, Cogswell, Selvaraju, Sun, Lee, Crandall, Batra",
    year=2016,
    source="arXiv 1610.02424",
    family="generate",
    summary="Beam search in groups that avoid each other's choices: several different answers for the cost of one.",
    objects={"DiverseBeamSearch": "Decoder"},
    use="When several answers are wanted that differ: captions, suggestions, candidates for a second model to rank.",
    avoid="When only the most probable sequence counts (plain beam search), or unbiased samples are needed.",
    vectors=("dbs",),
    code="github.com/ashwinkalyan/dbs, no licence",
    claim={
        "text": "With six beams, six groups and a diversity of 0.5 the share of distinct 4-grams among the six "
        "continuations is higher than with plain beam search of six beams.",
        "metric": "distinct 4-grams",
        "direction": "higher",
        "margin": 0.05,
        "arms": ("beam search", "dbs"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
