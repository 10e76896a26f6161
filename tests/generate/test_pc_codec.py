"""`pc_codec`: probabilities by enumeration, EM, exact integers, sizes; the contracts are checked from `EXAMPLES`."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from laconic.errors import BadInput
from laconic.generate import HCLT, PCCodec, chow_liu_tree, learn_hclt, quantize_pmf
from laconic.testing import Example, Ints

PARENTS = [-1, 0, 0, 1, 1]


def rows(n=200, seed=0):
    """A chain of five variables with four values: each repeats the one before, or is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(4, (n, 5), generator=generator)
    keeps = torch.rand(n, 5, generator=generator) < 0.8
    for v in range(1, 5):
        drawn[:, v] = torch.where(keeps[:, v], drawn[:, v - 1], drawn[:, v])
    return drawn


@functools.cache
def trained(leaf_latents=True):
    return learn_hclt(rows(), 4, latents=4, steps=20, leaf_latents=leaf_latents)


def drawn_circuit(parents=PARENTS, leaf_latents=True, latents=3, categories=3):
    torch.manual_seed(0)
    return HCLT(parents, latents, categories, leaf_latents=leaf_latents)


EXAMPLES = [
    Example(
        lambda: HCLT(PARENTS, latents=3, categories=4),
        kind="Model",
        inputs=[Ints((6, 5), 4)],
        stated={"parameters": 5 * (3 * 3 + 3 * 4)},
    ),
    *(
        Example(
            lambda leaf_latents=leaf_latents: PCCodec(trained(leaf_latents)),
            kind="Codec",
            traits=("checksum",),
            inputs=[Ints((40, 5), 4), torch.zeros(0, 5, dtype=torch.int64), torch.full((1, 5), 3), rows(50, seed=1)],
            stated={"bound": lambda message: 2 * message.numel() + 12},
        )
        for leaf_latents in (True, False)
    ),
]


def circuit_of(case):
    """The circuit of a case, with its root's row moved to where ours is."""
    args = case.args
    parents = [-1 if p == args["root_parent"] else p for p in case.array("parents").tolist()]
    theta, leaf = torch.stack(case.arrays("theta")), torch.stack(case.arrays("leaf"))
    circuit = HCLT(
        parents,
        theta.shape[-1],
        leaf.shape[-1],
        leaf_latents=args["leaf_variables_have_latent"],
        dtype=theta.dtype,
    )
    circuit.set_probabilities(_root_rolled(theta, parents, -args["root_uses_theta_row"]), leaf)
    return circuit


def _root_rolled(theta, parents, by):
    root = parents.index(-1)
    theta = theta.clone()
    theta[root] = theta[root].roll(by, 0)
    return theta


def run_vector(case):
    if case.what == "quantize":
        args = case.args
        assert args["total"] == 2 ** args["precision_bits"]
        return {"freq": torch.from_numpy(quantize_pmf(case.array("pmf").numpy(), args["precision_bits"]))}
    circuit, x, row = circuit_of(case), case.array("input"), case.args["root_uses_theta_row"]
    if "mask" in case:
        mask = case.array("mask")
        observed = mask if case.args["mask_true"] == "observed" else ~mask
        return {"log_marginal": circuit.log_prob(x, observed)}
    if case.what == "backward":
        theta, leaf = circuit.flows(x)
        return {"flow_theta": list(_root_rolled(theta, circuit.parents, row)), "flow_leaf": list(leaf)}
    if case.what == "steps":
        pseudocount = float(case.array("pseudocount"))
        for _ in range(case.args["steps"]):
            circuit.em_step(x, step_size=case.args["step_size"], pseudocount=pseudocount)
        return {
            "theta_after": list(_root_rolled(circuit.theta, circuit.parents, row)),
            "leaf_after": list(circuit.leaf),
            "total_log_prob_after": circuit.log_prob(x).sum(),
        }
    found = circuit.log_prob(x)
    return {"log_prob": found, "total_log_prob": found.sum()}


def enumerated(circuit, x):
    """p(x) as the sum over all hidden states of the product of all factors."""
    theta, leaf, parents = circuit.theta, circuit.leaf, circuit.parents
    total = 0.0
    owners = [v for v in range(len(parents)) if circuit.owns_latent(v)]
    for states in itertools.product(range(circuit.latents), repeat=len(owners)):
        z = dict(zip(owners, states, strict=True))
        product = 1.0
        for v, value in enumerate(x):
            above = z[parents[v]] if parents[v] >= 0 else 0
            if v in z:
                product *= float(theta[v, above, z[v]])
            product *= float(leaf[v, z.get(v, above), value])
        total += product
    return total


@pytest.mark.parametrize("leaf_latents", [True, False])
@pytest.mark.parametrize("parents", [PARENTS, [-1], [1, 2, -1], [3, 3, 3, -1]])
def test_the_equation(parents, leaf_latents):
    circuit = drawn_circuit(parents, leaf_latents, latents=2)
    every = torch.tensor(list(itertools.product(range(3), repeat=len(parents))))
    got = circuit.log_prob(every).detach().exp()
    assert math.isclose(float(got.sum()), 1.0, rel_tol=1e-12)
    for x, p in zip(every[::7], got[::7], strict=True):
        assert math.isclose(float(p), enumerated(circuit, x.tolist()), rel_tol=1e-10)


@pytest.mark.parametrize("leaf_latents", [True, False])
def test_marginals_sum_out_what_is_not_observed(leaf_latents):
    circuit = drawn_circuit(leaf_latents=leaf_latents)
    x = torch.tensor([[0, 1, 2, 0, 1]])
    for hidden in ((), (0,), (3, 4), (1, 2, 3), (0, 1, 2, 3, 4)):
        observed = torch.ones(1, 5, dtype=torch.bool)
        observed[0, list(hidden)] = False
        total = 0.0
        for values in itertools.product(range(3), repeat=len(hidden)):
            filled = x.clone()
            filled[0, list(hidden)] = torch.tensor(values, dtype=torch.int64)
            total += float(circuit.log_prob(filled).detach().exp())
        # What stands at places that are not observed does not matter.
        got = circuit.log_prob(torch.where(observed, x, 99), observed).detach()
        assert math.isclose(float(got.exp()), total, rel_tol=1e-10)


def test_flows_count_every_variable_once_per_row():
    of_theta, of_leaf = drawn_circuit().flows(torch.randint(3, (7, 5)))
    assert torch.allclose(of_theta.sum((1, 2)), torch.full((5,), 7.0, dtype=torch.float64))
    assert torch.allclose(of_leaf.sum((1, 2)), torch.full((5,), 7.0, dtype=torch.float64))
    assert (of_theta[0, 1:] == 0).all(), "the root uses row 0 alone"


@pytest.mark.parametrize("leaf_latents", [True, False])
def test_em_raises_the_likelihood(leaf_latents):
    torch.manual_seed(0)
    circuit, x = HCLT(PARENTS, 4, 4, leaf_latents=leaf_latents), rows()
    found = []
    for _ in range(15):
        found.append(float(circuit.log_prob(x).detach().sum()))
        circuit.em_step(x, pseudocount=0.0)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(found)) and found[-1] > found[0] + 50
    for table in (circuit.theta, circuit.leaf):
        assert torch.allclose(table.sum(-1), torch.ones(table.shape[:-1], dtype=torch.float64))


def test_a_small_step_goes_part_of_the_way():
    before, x = trained(), rows(seed=3)
    circuits = [HCLT(before.parents, 4, 4) for _ in range(2)]
    for circuit, eta in zip(circuits, (1.0, 0.25), strict=True):
        circuit.set_probabilities(before.theta, before.leaf)
        circuit.em_step(x, step_size=eta)
    assert torch.allclose(circuits[1].leaf, 0.75 * before.leaf + 0.25 * circuits[0].leaf)


def test_learning_from_batches():
    x = rows()
    circuit = learn_hclt(x, 4, latents=4, steps=100, batch_size=50)
    other = learn_hclt(x, 4, latents=4, steps=100, batch_size=50)
    assert float(circuit.log_prob(x).detach().mean()) > -5 * math.log(4) + 1
    assert torch.equal(circuit.leaf, other.leaf), "the seed does not fix the batches"


def test_the_tree_of_a_chain_is_the_chain():
    parents = chow_liu_tree(rows(2000), 4)
    assert parents == [1, 2, -1, 2, 3], "a chain of five, rooted in its middle"
    assert chow_liu_tree(rows(50)[:, :1], 4) == [-1]


def test_merged_levels_find_the_same_tree():
    x = rows(2000) * 60 + 5
    assert chow_liu_tree(x, 256) == chow_liu_tree(rows(2000), 4)


def test_the_tree_has_the_largest_mutual_information():
    x = rows(300)[:, :4]
    joint = {
        (a, b): torch.histogramdd(x[:, [a, b]].double(), bins=[4, 4], range=[0.0, 4.0, 0.0, 4.0]).hist / 300
        for a, b in itertools.combinations(range(4), 2)
    }
    info = {
        pair: float(torch.xlogy(p, p / (p.sum(1, keepdim=True) * p.sum(0))).nan_to_num(0).sum())
        for pair, p in joint.items()
    }
    trees = [edges for edges in itertools.combinations(info, 3) if {v for edge in edges for v in edge} == set(range(4))]
    best = max(trees, key=lambda edges: sum(info[e] for e in edges))
    parents = chow_liu_tree(x, 4, pseudocount=0.0)
    assert {tuple(sorted((v, p))) for v, p in enumerate(parents) if p >= 0} == set(best)


def test_frequencies_are_positive_and_sum_to_the_total():
    pmf = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [1e-9, 1 - 2e-9, 1e-9]])
    for bits in (8, 16):
        found = quantize_pmf(pmf, bits)
        assert (found.sum(1) == 2**bits).all() and (found >= 1).all()
    assert quantize_pmf(pmf, 8)[0].tolist() == [254, 1, 1]


@pytest.mark.parametrize("leaf_latents", [True, False])
def test_a_message_takes_what_its_probability_says(leaf_latents):
    circuit, x = trained(leaf_latents), rows(4000, seed=5)
    ideal = -float(circuit.log_prob(x).detach().sum()) / math.log(2)
    bits = 8 * len(PCCodec(circuit).encode(x))
    assert ideal < bits < 1.01 * ideal + 8 * 12


def test_beliefs_do_not_depend_on_the_batch():
    codec, x = PCCodec(trained()), rows(9, seed=2).numpy()

    def frequencies(part):
        walk, found = codec._walk(len(part)), []
        step = next(walk)
        for _ in range(x.shape[1]):
            found.append(step[1])
            try:
                step = walk.send(part[:, step[0]])
            except StopIteration:
                break
        return np.stack(found)

    whole = frequencies(x)
    assert whole.shape == (5, 9, 4)
    for n in range(9):
        assert (frequencies(x[n : n + 1])[:, 0] == whole[:, n]).all()


def test_the_integers_stay_exact_at_their_limits():
    torch.manual_seed(0)
    circuit = HCLT([-1, 0, 1, 1], latents=64, categories=300, perturbation=30.0)
    x = torch.randint(300, (20, 4))
    codec = PCCodec(circuit)
    assert torch.equal(codec.decode(codec.encode(x)), x)
    beliefs = torch.randint(2**23, 2**24 + 1, (5, 64)).double().numpy()
    for table in (codec.theta[1], codec.leaf[1]):
        exact = beliefs.astype(object) @ table.astype(np.int64).astype(object)  # Python's whole numbers
        assert (beliefs @ table == exact.astype(np.float64)).all() and exact.sum(1).max() < 2**53


def test_a_chain_of_many_variables_does_not_recurse():
    circuit = HCLT([-1, *range(2999)], latents=2, categories=2)
    x = torch.randint(2, (2, 3000))
    codec = PCCodec(circuit)
    assert torch.equal(codec.decode(codec.encode(x)), x)
    assert circuit.log_prob(x).isfinite().all()


def test_another_machine_reads_it_from_the_integers():
    codec, x = PCCodec(trained()), rows(30, seed=4)
    other = PCCodec.from_state_dict(codec.state_dict())
    assert torch.equal(other.decode(codec.encode(x)), x) and other.encode(x) == codec.encode(x)


def test_another_circuit_is_noticed():
    x = rows(30, seed=4)
    packed = PCCodec(trained()).encode(x)
    for other in (trained(leaf_latents=False), learn_hclt(rows(seed=9), 4, latents=4, steps=20)):
        with pytest.raises(BadInput, match="another circuit"):
            PCCodec(other).decode(packed)


def test_training_on_does_not_change_a_codec():
    circuit, x = learn_hclt(rows(), 4, latents=2, steps=3), rows(30, seed=4)
    codec = PCCodec(circuit)
    packed = codec.encode(x)
    circuit.em_step(x)
    assert torch.equal(codec.decode(packed), x)


def test_the_model_is_counted():
    assert PCCodec(drawn_circuit()).model_bytes == 2 * (3 + 4 * 9 + 5 * 9)
    assert PCCodec(drawn_circuit(leaf_latents=False)).model_bytes == 2 * (3 + 1 * 9 + 5 * 9)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: HCLT([0, -1, -1]), "one root"),
        (lambda: HCLT([]), "one root"),
        (lambda: HCLT([-1, 2, 1]), "cycle"),
        (lambda: HCLT([-1, 7]), "parent of variable 1 is 7"),
        (lambda: HCLT([-1], latents=0), "latents is 0"),
        (lambda: drawn_circuit().log_prob(torch.zeros(2, 4, dtype=torch.int64)), r"\(N, 5\), not \(2, 4\)"),
        (lambda: drawn_circuit().em_step(torch.full((2, 5), 3)), "0 .. 2 are known"),
        (lambda: drawn_circuit().em_step(torch.zeros(2, 5, dtype=torch.int64), step_size=0.0), "a step of 0"),
        (lambda: learn_hclt(rows(0), 4), "no rows"),
        (lambda: learn_hclt(torch.rand(3, 5), 4), "whole numbers"),
        (lambda: PCCodec(trained()).encode(torch.full((1, 5), 4)), "0 .. 3 are known"),
        (lambda: PCCodec(trained()).encode(torch.full((1, 5), -1)), "from -1"),
        (lambda: PCCodec(trained()).encode(torch.zeros(1, 6, dtype=torch.int64)), r"\(N, 5\) are needed"),
        (lambda: quantize_pmf(np.full((1, 300), 1 / 300), 8), "300 categories do not fit"),
    ],
)
def test_what_cannot_be_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
