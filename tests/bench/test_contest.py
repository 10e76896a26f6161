"""Contestants: who there is, who can take part, and what the problems are."""

from __future__ import annotations

import pytest
import torch

from laconic.bench import contest, machine
from laconic.bench.contest import OURS, PEERS, Ready, contestant, contestants, cycling
from laconic.bench.problems import Encoder, LanguageModel, Load, Problem, Product, agreement
from laconic.bench.work import find, works
from laconic.errors import BadInput


class Sum(Problem):
    """A problem that nobody else solves."""


@pytest.fixture
def registry(monkeypatch):
    """Contestants of a test leave no trace."""
    contestants(Sum())  # the real ones register themselves when they are imported, once
    monkeypatch.setattr(contest, "_registered", list(contest._registered))


def test_a_contestant_registers_once_for_a_problem(registry):
    @contestant("b", "torch", Sum, needs=("nosuchmodule",))
    @contestant("a", OURS, Sum, when=lambda problem: "too large")
    def prepare(problem):
        return Ready(lambda: None)

    ours, theirs = contestants(Sum())
    assert ours.why_not(Sum()) == "too large"
    assert theirs.why_not(Sum()) == "nosuchmodule is not installed (pip install 'laconic[bench]')"
    assert contestants(Sum(), ["openvino"]) == [ours]
    with pytest.raises(ValueError, match="there is a contestant 'a' for Sum already"):
        contestant("a", OURS, Sum)(prepare)
    with pytest.raises(ValueError, match="the peer 'tensorflow' is none of"):
        contestant("c", "tensorflow", Sum)


def test_every_peer_takes_part_somewhere_and_ours_in_every_kind():
    kinds = {type(work.problem()): work.problem() for work in works()}
    assert set(kinds) == {Product, Encoder, LanguageModel, Load}
    everyone = [one for problem in kinds.values() for one in contestants(problem)]
    assert {one.peer for one in everyone} == {OURS, *PEERS}
    for problem in kinds.values():
        assert contestants(problem)[0].peer == OURS


def test_every_baseline_and_every_rival_exists():
    for work in works():
        names = [one.name for one in contestants(work.problem())]
        assert work.baseline in names
        for aim in work.aims:
            assert all(any(name.startswith(rival) for name in names) for rival in aim.rivals), (work.name, aim)
            assert aim.text


def test_works_are_found_by_name_and_by_group():
    assert [work.name for work in find(["gemm-512x4096x4096-int8"])] == ["gemm-512x4096x4096-int8"]
    assert {work.name.partition("-")[0] for work in find(["gemv", "llama-decode"])} == {"gemv", "llama"}
    assert names(find(["gemv", "gemv-4096x4096-int8"])) == names(find(["gemv"]))
    assert names(find([])) == names(works())
    with pytest.raises(
        BadInput, match="no work is called 'gemw'; the groups are gemv, batch, gemm, minilm, load, llama"
    ):
        find(["gemw"])


def names(found):
    return [work.name for work in found]


def test_names_of_works_are_unique():
    assert len(set(names(works()))) == len(works())


def test_copies_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr("laconic.bench.problems.cache_bytes", lambda: 1 << 20)
    problem = Product(1, 64, 64, "int4", 32)
    assert problem.turns(1 << 20) == 4 and problem.turns(1 << 30) == 1 and problem.turns(100) == 64
    first, *others = problem.copies(torch.zeros(1 << 18))
    assert len(others) == 3 and len({x.data_ptr() for x in (first, *others)}) == 4


def test_cycling_takes_one_after_another():
    call = cycling([1, 2, 3], lambda x: 10 * x)
    assert [call() for _ in range(5)] == [10, 20, 30, 10, 20]


def test_a_product_is_what_it_says_and_forgets():
    problem = Product(3, 40, 24, "int8")
    assert problem.x.shape == (3, 40) and problem.weight.shape == (24, 40)
    torch.testing.assert_close(problem.expected, problem.x @ problem.weight.T)
    assert problem.operations == 2 * 3 * 40 * 24 and problem.traffic == 4 * 3 * 64
    again = Product(3, 40, 24, "int8")
    assert torch.equal(again.weight, problem.weight) and torch.equal(again.x, problem.x)
    problem.release()
    assert "weight" not in vars(problem) and "expected" not in vars(problem)


@pytest.mark.parametrize(("weights", "values"), [("ternary", 3), ("binary", 2)])
def test_weights_of_few_values(weights, values):
    weight = Product(1, 256, 8, weights, 128).weight
    assert all(len(row.unique()) == values for row in weight)
    assert torch.equal(weight.abs().amax(1), weight.amax(1)) and len(weight.amax(1).unique()) == 8


def test_inputs_of_one_bit_are_signs():
    x = Product(4, 64, 8, "binary", None, 1).x
    assert set(x.unique().tolist()) == {-1.0, 1.0}


def test_agreement():
    y = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    same = agreement(y, y)
    assert same == {"cosine": pytest.approx(1), "least_cosine": pytest.approx(1), "max_error": 0.0}
    turned = agreement(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), y)
    assert turned["cosine"] == pytest.approx(0.5) and turned["least_cosine"] == pytest.approx(0)
    assert turned["max_error"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="the answer has shape"):
        agreement(y[:1], y)


def test_the_sizes_of_the_language_model_are_those_of_its_name():
    problem = LanguageModel(1, 16)
    assert round(problem.parameters / 1e6) == 411
    assert problem.operations > 2 * (problem.parameters + problem.head)


def test_what_the_machine_can_do_is_measured():
    found = machine.probes()
    assert set(found) == {machine.READ, machine.FLOAT32, machine.INT8} == set(machine.how())
    assert found[machine.READ][1] >= 8 * machine.cache_bytes() > 0
    for probe, amount in found.values():
        probe.call()
        assert amount > 0
