"""Sensitivity and allocation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.core.structure import Structure
from laconic.core.units import find_units
from laconic.nn import matrix_view, restore_view
from laconic.numerics import fake_quantize
from laconic.pipeline.budget import parse_budget
from laconic.pipeline.compress import compress
from laconic.pipeline.decide import choose, fisher, option_costs
from laconic.pipeline.deciding import Deciding
from laconic.pipeline.plan import Ground, other_tensors
from laconic.pipeline.reading import Options
from laconic.pipeline.recipe import Recipe
from laconic.pipeline.source import resolve
from laconic.pipeline.tryout import RETREAT, by_shape, fit, smallest
from laconic.tasks import load_task

from .runs import save, token_file, trained_classifier


class Uneven(nn.Module):
    """The branch through `weak` hardly reaches the output, that through `strong` does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weak, self.middle, self.strong = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.03 * self.weak(x) + 0.4 * torch.tanh(self.middle(x)) + 3 * self.strong(x)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    import numpy as np

    file = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(file, x=np.random.default_rng(0).normal(size=(80, 32)).astype(np.float32))
    model = Uneven().eval()
    source = resolve(model, example=torch.zeros(2, 32))
    return model, _ground(source, model), load_task(file, source)


def _ground(source, model) -> Ground:
    structure = Structure.build(model, source.example())
    units = find_units(model, structure)
    return Ground(source, model, structure, units, other_tensors(model, units), False, [])


def _measured(model, task, batches, unit, scheme) -> float:
    """Squared change of the output when one unit is rounded."""
    weight = model.get_parameter(unit.name)
    kept = weight.detach().clone()
    with torch.no_grad():
        before = [task.forward(model, b) for b in batches]
        matrix = fake_quantize(matrix_view(kept, unit.view), scheme, unit.name)
        weight.copy_(restore_view(matrix, unit.spec(scheme)))
        after = [task.forward(model, b) for b in batches]
        weight.copy_(kept)
    return sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))


def test_costs_are_about_the_change_of_the_output_that_is_measured(uneven):
    """E_v of the squared gradient estimates the change itself, not just its order."""
    model, ground, task = uneven
    batches = task.batches("calibrate", batch=1)
    weights = fisher(model, task, batches, ground.units, seed=0)
    costs = option_costs(lambda u: model.get_parameter(u.name), weights, ground.units)
    for unit in ground.packable:
        for scheme, cost in zip(unit.options, costs[unit.name], strict=True):
            assert cost == pytest.approx(_measured(model, task, batches, unit, scheme), rel=0.6)


def test_costs_rank_layers_as_brute_force_does(uneven):
    model, ground, task = uneven
    batches = task.batches("calibrate", batch=4)
    costs = option_costs(lambda u: model.get_parameter(u.name), fisher(model, task, batches, ground.units, 0), ground.units)
    measured = {u.name: _measured(model, task, batches, u, u.options[-1]) for u in ground.packable}
    last = {name: found[-1] for name, found in costs.items()}
    assert sorted(last, key=last.get) == sorted(measured, key=measured.get)
    assert sorted(last, key=last.get) == ["weak.weight", "middle.weight", "strong.weight"]


def test_fisher_leaves_the_model_as_it_was(uneven):
    model, ground, task = uneven
    model.middle.weight.requires_grad_(False)
    fisher(model, task, task.batches("calibrate"), ground.units, 0)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())
    model.middle.weight.requires_grad_(True)


def test_the_same_seed_gives_the_same_costs(uneven):
    model, ground, task = uneven
    first, second, other = (
        fisher(model, task, task.batches("calibrate"), ground.units, s) for s in (0, 0, 1)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_fewer_bits_cost_more(uneven):
    model, ground, _ = uneven
    for costs in option_costs(lambda u: model.get_parameter(u.name), None, ground.units).values():
        assert costs == sorted(costs)


def test_allocation_is_monotone_in_the_budget_and_fits(uneven):
    model, ground, task = uneven
    weights = fisher(model, task, task.batches("calibrate"), ground.units, 0)
    costs = option_costs(lambda u: model.get_parameter(u.name), weights, ground.units)
    total = []
    for ceiling in range(ground.least(), ground.source.size_before + 600, 300):
        decision = fit(ground, costs, ceiling)
        assert ground.layout(decision).total_bytes <= ceiling
        total.append(sum(_cost(unit, decision, costs) for unit in ground.packable))
    assert total[-1] == 0 < total[0]
    tolerance = 1e-6 * max(total)  # the solver's absolute gap, of the largest cost
    assert all(later <= earlier + tolerance for earlier, later in zip(total, total[1:], strict=False))


def _cost(unit, decision, costs) -> float:
    scheme = decision[unit.name]
    return 0.0 if scheme is None else costs[unit.name][unit.options.index(scheme)]


def test_bits_go_where_they_matter(uneven):
    model, ground, task = uneven
    weights = fisher(model, task, task.batches("calibrate"), ground.units, 0)
    costs = option_costs(lambda u: model.get_parameter(u.name), weights, ground.units)
    decision = choose(ground.units, costs, sum(u.nbytes for u in ground.packable) // 4 + 1500)
    bits = {name: 32 if s is None else s.bits for name, s in decision.items()}
    assert bits["weak.weight"] < bits["strong.weight"]


def test_a_plan_from_shapes_alone_fits(uneven):
    _, ground, _ = uneven
    for ceiling in (ground.least(), ground.source.size_before // 2):
        assert ground.layout(by_shape(ground, ceiling)).total_bytes <= ceiling


def test_what_a_method_will_solve_costs_a_quarter(tmp_path):
    """Layers that gptq rounds by data; not embeddings, not without data, not by rtn."""
    folder, data = save("llama", tmp_path / "float"), token_file(tmp_path / "tokens.npz")

    def costs(method: str, given: Path | None) -> tuple[dict, Ground]:
        recipe = Recipe().with_passes(method=method)
        run = Deciding(Options(recipe), parse_budget("size=4x"), lambda stage, done, total: None)
        run.prepare(folder, given, None, None)
        return run._option_costs(), run.ground

    (nearest, ground), (solved, _) = costs("rtn", data), costs("gptq", data)
    shares = {
        (unit.op, round(b / a, 6))
        for unit in ground.packable
        for a, b in zip(nearest[unit.name], solved[unit.name], strict=True)
    }
    assert shares == {("linear", 0.25), ("embedding", 1.0)}
    assert costs("gptq", None)[0] == costs("rtn", None)[0]


def test_a_higher_ceiling_never_gives_a_much_smaller_plan():
    """Where many units state a little too much each, all that is too much must not push a plan down to the least."""
    model = nn.Sequential(*(nn.Linear(64, 48, bias=False) if i % 2 else nn.Linear(48, 64, bias=False) for i in range(32)))
    ground = _ground(resolve(model.eval(), example=torch.zeros(1, 48)), model)
    whole, least = ground.source.size_before, ground.least()
    sizes = [ground.layout(by_shape(ground, c)).total_bytes for c in range(least, whole + 2000, (whole - least) // 40)]
    sizes.append(ground.layout(by_shape(ground, whole)).total_bytes)
    assert sizes[-1] > 0.9 * whole
    assert all(later > 0.98 * earlier for earlier, later in zip(sizes[:-1], sizes[1:-1], strict=False)), sizes


def test_scales_too_large_for_float16_are_kept_in_float32():
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).eval()
    model[0].weight.data.normal_().mul_(1e8)
    ground = _ground(resolve(model, example=torch.zeros(1, 64)), model)
    option_costs(lambda u: model.get_parameter(u.name), None, ground.units)
    assert {s.scale.dtype for s in ground.packable[0].options} == {"float32"}


@pytest.mark.parametrize(("bound", "expected"), [(0, 10), (25, 30), (40, 40), (45, 50), (85, 90), (1000, 90)])
def test_the_search_for_the_smallest_size_that_holds(bound, expected):
    """Sizes 40, 30 .. on the way up the ladder and 50, 60 .. back; what holds is a size of at least so many."""
    seen = []

    def attempt(size: int) -> tuple[int, bool]:
        seen.append(size)
        return size, size >= bound

    assert smallest(attempt, [40, 30, 20, 10], [50, 60, 70, 80, 90]) == expected
    assert len(seen) == len(set(seen))


def test_a_bound_on_the_drop_alone_finds_a_size(tmp_path):
    model, data = trained_classifier(tmp_path)
    result = compress(
        model,
        data,
        "drop=1",
        columns={"x": "x"},
        example=torch.zeros(2, 24),
        out=tmp_path / "out",
        keep=["middle"],
    )
    assert result.met and result.drop <= 1.0 and result.ratio > 1
    assert result.ratio < min(RETREAT) + 2  # `middle` is most of it: no ratio of the ladder can be reached
