"""`dbs`: groups, penalties, what becomes of finished beams; the contract of its kind is checked from `EXAMPLES`."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.generate import DiverseBeamSearch
from laconic.generate._dbs import cumulative_penalty, hamming_penalty, ngram_penalty
from laconic.testing import Example


def chain(generator, vocabulary=4):
    """Log-probabilities of the next token, given the last."""
    table = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)
    return lambda tokens: table[tokens[:, -1]]


def problem(seed=0, vocabulary=8):
    return chain(torch.Generator().manual_seed(seed), vocabulary), torch.tensor([1])


EXAMPLES = [
    Example(
        lambda options=options: DiverseBeamSearch(steps=3, end=0, **options),
        kind="Decoder",
        inputs=lambda g: [chain(g), torch.tensor([1])],
        stated={"vocabulary": 4, "end": 0, "steps": 3},
    )
    for options in (
        {"beams": 64, "groups": 1},
        {"beams": 192, "groups": 3},
        {"beams": 128, "groups": 2, "penalty": "cumulative"},
        {"beams": 128, "groups": 2, "penalty": "ngram"},
    )
]


def run_vector(case):
    args = case.args
    table, start = case.array("log_prob_table"), case.array("start").reshape(1)
    beams, steps, end = (int(case.array(role)) for role in ("beams", "steps", "end"))
    for role in ("groups", "diversity"):  # where they are arrays too, they say what the arguments say
        if role in case:
            assert float(case.array(role)) == args[role]
    decoder = DiverseBeamSearch(
        beams=beams,
        groups=args["groups"],
        diversity=args["diversity"],
        steps=steps,
        end=end,
        finished_score=args["finished_score"] if args["finished_beams_still_extended_and_counted"] else None,
    )
    groups = decoder.by_group(lambda tokens: table[tokens[:, -1]], start)
    if args["sort"].startswith("raw"):
        groups = [sorted(group, key=lambda one: -one.log_prob) for group in groups]

    def padded(tokens):
        return [*tokens, *[args["padding"]] * (steps - len(tokens))]

    return {
        "sequences": [torch.tensor([padded(one.tokens) for one in group]) for group in groups],
        "augmented_scores": [torch.tensor([one.score for one in group], dtype=torch.float64) for group in groups],
        "raw_scores": [torch.tensor([one.log_prob for one in group], dtype=torch.float64) for group in groups],
    }


def plain_beam_search(step, start, *, width, steps, end):
    """(tokens, log-probability) of all that ended, best first."""
    going, done = [((), 0.0)], []
    for index in range(steps):
        longer = [
            ((*tokens, v), score + float(p))
            for tokens, score in going
            for v, p in enumerate(step(torch.tensor([[*start.tolist(), *tokens]]))[0])
        ]
        best = sorted(longer, key=lambda pair: -pair[1])[:width]
        going = [pair for pair in best if pair[0][-1] != end]
        done += [pair for pair in best if pair[0][-1] == end or index == steps - 1]
    return sorted(done, key=lambda pair: -pair[1])


@pytest.mark.parametrize("options", [{"groups": 1, "diversity": 9.0}, {"groups": 3, "diversity": 0.0}])
@pytest.mark.parametrize("seed", range(4))
def test_one_group_or_no_diversity_is_plain_beam_search(seed, options):
    step, start = problem(seed)
    width = 6 // options["groups"]
    want = plain_beam_search(step, start, width=width, steps=5, end=0)
    for group in DiverseBeamSearch(beams=6, steps=5, end=0, **options).by_group(step, start):
        assert [one.tokens for one in group] == [tokens for tokens, _ in want]
        assert [one.log_prob for one in group] == pytest.approx([score for _, score in want])
        assert [one.score for one in group] == pytest.approx([score for _, score in want])


def test_the_first_group_is_not_penalized():
    step, start = problem(1)
    first = DiverseBeamSearch(beams=6, groups=3, diversity=5.0, steps=5, end=0).by_group(step, start)[0]
    assert [one.tokens for one in first] == [t for t, _ in plain_beam_search(step, start, width=2, steps=5, end=0)]


def test_a_strong_penalty_keeps_groups_apart_at_every_step():
    step, start = problem(2)
    decoder = DiverseBeamSearch(beams=4, groups=4, diversity=100.0, steps=6, end=None)
    sequences = [group[0].tokens for group in decoder.by_group(step, start)]
    assert all(len(set(column)) == 4 for column in zip(*sequences, strict=True))


def test_the_score_holds_the_penalties_and_the_log_probability_does_not():
    step, start = problem(3)
    groups = DiverseBeamSearch(beams=2, groups=2, diversity=0.1, steps=4, end=None).by_group(step, start)
    first, second = groups[0][0], groups[1][0]
    alike = sum(a == b for a, b in zip(first.tokens, second.tokens, strict=True))
    assert alike > 0, "the example shows nothing"
    assert second.score == pytest.approx(second.log_prob - 0.1 * alike)


def test_penalties_by_hand():
    earlier = [(1, 2, 3), (1, 2, 2), (0, 1)]
    assert hamming_penalty((5, 5), earlier, 4).tolist() == [0, 0, 1, 1]  # the third has ended before
    assert hamming_penalty((5,), earlier, 4).tolist() == [0, 1, 2, 0]
    assert ngram_penalty((3, 1), earlier, 4, order=2).tolist() == [0, 0, 2, 0]
    assert ngram_penalty((), earlier, 4, order=2).tolist() == [0, 0, 0, 0]
    assert ngram_penalty((), earlier, 4, order=1).tolist() == [1, 3, 3, 1]
    assert ngram_penalty((1, 2), earlier, 4, order=3).tolist() == [0, 0, 1, 1]
    assert ngram_penalty((0, 1, 2), earlier, 4, order=3).tolist() == [0, 0, 1, 1]
    e = math.exp
    got = cumulative_penalty((1, 0), earlier[:2], 4, temperature=2.0).tolist()  # both are one token away by now
    assert got == pytest.approx([2 * e(-1), 2 * e(-1), e(-0.5) + e(-1), e(-0.5) + e(-1)])


def test_ngrams_of_sequences_that_have_ended_count():
    # 1 -> 0 (the end) is all that the first group says; the second then avoids the pair.
    table = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.1, 0.3], [0.5, 0.0, 0.5]], dtype=torch.float64).log()
    decoder = DiverseBeamSearch(beams=2, groups=2, diversity=3.0, penalty="ngram", order=1, steps=3, end=0)
    first, second = decoder.by_group(lambda tokens: table[tokens[:, -1]], torch.tensor([1]))
    assert first[0].tokens == (0,)
    assert second[0].tokens == (2, 2, 2)


def test_a_finished_beam_leaves_or_stays_as_released():
    # The first group ends at once. As released it goes on behind its end, by token 0, which the second then avoids.
    table = torch.tensor([[0.9, 0.05, 0.05], [0.9, 0.06, 0.04], [0.1, 0.3, 0.6]], dtype=torch.float64).log()
    options = {"beams": 2, "groups": 2, "diversity": 5.0, "steps": 2, "end": 0}

    def search(**more):
        groups = DiverseBeamSearch(**options, **more).by_group(lambda t: table[t[:, -1]], torch.tensor([1]))
        return [[one.tokens for one in group] for group in groups]

    assert search() == [[(0,)], [(1, 0)]]
    assert search(finished_score=-1000.0) == [[(0,)], [(1, 1)]]


@pytest.mark.parametrize("seed", range(10))
def test_in_plain_beam_search_it_does_not_matter_whether_finished_beams_stay(seed):
    step, start = problem(seed, vocabulary=3)
    left, stayed = (
        DiverseBeamSearch(beams=3, groups=1, steps=6, end=0, finished_score=score).by_group(step, start)
        for score in (None, -1000.0)
    )
    assert left == stayed


def test_equal_sequences_of_two_groups_are_given_once():
    step, start = problem(0)
    found = DiverseBeamSearch(beams=6, groups=3, diversity=0.0, steps=4, end=0)(step, start)
    assert len(found) == 2
    found = DiverseBeamSearch(beams=6, groups=3, diversity=3.0, steps=4, end=0)(step, start)
    tokens = [tuple(t.tolist()) for t, _ in found]
    assert len(set(tokens)) == len(tokens) > 2


def test_a_length_penalty_orders_by_the_mean():
    step, start = problem(1)
    plain = DiverseBeamSearch(beams=6, groups=1, steps=5, end=0)(step, start)
    mean = DiverseBeamSearch(beams=6, groups=1, steps=5, end=0, length_penalty=1.0)(step, start)
    want = sorted(((score / len(t), t.tolist()) for t, score in plain), reverse=True)
    assert [(pytest.approx(score), t.tolist()) for t, score in mean] == want


def test_the_model_is_called_once_a_step():
    step, start = problem(0)
    calls = []
    DiverseBeamSearch(beams=6, groups=3, steps=5, end=None)(lambda t: calls.append(len(t)) or step(t), start)
    assert calls == [3, 6, 6, 6, 6]


def test_tokens_that_are_impossible_are_never_chosen():
    table = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).log()
    found = DiverseBeamSearch(beams=6, groups=2, steps=3, end=0)(lambda t: table[t[:, -1]], torch.tensor([1]))
    assert [(t.tolist(), score) for t, score in found] == [([1, 1, 1], 0.0)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beams": 5, "groups": 2}, "5 beams cannot be split into 2"),
        ({"beams": 0}, "beams is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"penalty": "typo"}, "typo"),
        ({"diversity": -1.0}, "diversity is -1"),
        ({"diversity": math.nan}, "diversity is nan"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"order": 0}, "order is 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DiverseBeamSearch(**{"steps": 3, "end": 0, **options})


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (lambda t: torch.zeros(4), r"\(4,\) for 3 prefixes"),
        (lambda t: torch.zeros(2, 4), r"\(2, 4\) for 3 prefixes"),
        (lambda t: torch.full((len(t), 4), torch.nan), "NaN"),
    ],
)
def test_a_step_that_is_wrong_is_refused(step, says):
    with pytest.raises(ValueError, match=says):
        DiverseBeamSearch(steps=3, end=0)(step, torch.tensor([1]))
