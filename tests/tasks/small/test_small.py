"""What every small task promises, on made-up data; the real data and the stated baselines where they are fetched."""

from __future__ import annotations

import time

import pytest
import torch

from laconic.errors import BadInput
from laconic.tasks.small import SMALL, SmallTask, small

from .caches import make_cache

# A size that the made-up data has, and names in place of NAME.
SIZES = {
    "digits": 100, "mnist-mlp": 60, "mnist-cnn": 60, "cifar-small": 60, "spam": 20, "bbc": 20, "chars": 40,
    "table-colours": 20, "karate": 6, "kg-nations": 5,
}  # fmt: skip
REAL = (
    "digits",
    "mnist-mlp",
    "mnist-cnn",
    "cifar-small",
    "spam",
    "bbc",
    "chars",
    "table-magic",
    "karate",
    "kg-nations",
)
QUICK = ("digits", "karate", "kg-nations", "table-magic", "mnist-mlp")  # under three seconds of training


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), pictures=True)


@pytest.fixture(params=SIZES)
def name(request):
    return request.param


def same(a: SmallTask, b: SmallTask, split: str) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.data[split].columns, b.data[split].columns, strict=True))


def test_every_task_is_tested():
    assert {task.split("-")[0] for task in SIZES} == {task.split("-")[0] for task in SMALL}
    assert {task.split("-")[0] for task in REAL} == {task.split("-")[0] for task in SMALL}


def test_it_is_a_function_of_seed_and_size(name, cache):
    size = SIZES[name]
    one, again, other = (small(name, seed=seed, size=size, cache=cache) for seed in (1, 1, 2))
    assert one.id == name and one.seed == 1
    assert all(same(one, again, split) for split in ("train", "validate", "test"))
    assert not same(one, other, "train")
    assert len(one.train_data()) == (2 * size if name.startswith("kg") else size)
    assert len(one.data["validate"]) and len(one.data["test"])


def test_the_network_is_a_function_of_its_seed(name, cache):
    task = small(name, size=SIZES[name], cache=cache)
    before = torch.get_rng_state()
    one, again, other = (task.model(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_it_trains_and_measures(name, cache):
    task = small(name, size=SIZES[name], cache=cache)
    model = task.model(0)
    batch = task.train_data()[torch.arange(4)]
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters())
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    found = task.evaluate(model)
    assert [module.training for module in model.modules()] == modes
    assert found.value == task.evaluate(model).value == pytest.approx(task.metric.value(found.per_example))
    assert len(found.per_example) == len(task.data["test"])
    with pytest.raises(BadInput, match=f"the small task {name} has no 'verify' split; it has .*validate"):
        task.evaluate(model, "verify")


def test_training_by_the_library_lowers_the_loss(name, cache):
    task = small(name, size=SIZES[name], cache=cache)
    model, rows = task.model(0), task.train_data()
    with torch.no_grad():
        before = task.loss(model, rows[:]).item()
    fitted = task.train(model, seed=0, epochs=5)
    model.train()
    with torch.no_grad():
        assert task.loss(model, rows[:]).item() < before
    assert fitted.clock.epoch == 5
    other = task.model(0)
    task.train(other, seed=0, steps=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), task.model(0).parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("mnist-mlp", "mnist"), ("mnist-cnn", "mnist"), ("cifar-small", "cifar10"), ("spam", "spam-assassin"),
        ("bbc", "bbc"), ("chars", "moby-dick"), ("table-magic", "keel"), ("kg-umls", "pykeen"),
    ],
)  # fmt: skip
def test_data_that_is_not_fetched_is_named_with_the_command(tmp_path, name, package):
    with pytest.raises(BadInput, match=f"the small task {name} reads .*run `laconic fetch {package}` .*licence"):
        small(name, cache=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "mnist-rnn", "table", "table-", "kg", "", "Digits"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(BadInput, match="there is no small task .*Known are: digits, mnist-mlp"):
        small(name)


def test_a_near_name_is_suggested():
    with pytest.raises(BadInput, match=r"did you mean mnist-mlp\?"):
        small("mnist-mpl")


@pytest.mark.parametrize("size", [0, -5])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(BadInput, match=f"at least 1, not {size}"):
        small("digits", size=size)


def test_a_size_that_the_data_lacks_is_refused(name, cache):
    with pytest.raises(BadInput, match=f"the small task {name} has .*"):
        small(name, size=1_000_000, cache=cache)


@pytest.mark.parametrize("name", ["digits", "mnist-mlp", "bbc"])
def test_a_size_below_the_number_of_classes_is_refused(name, cache):
    with pytest.raises(BadInput, match="classes: a size of 2 is too small"):
        small(name, size=2, cache=cache)


def check_baseline(name: str) -> None:
    start = time.process_time()
    try:
        task = small(name)
    except BadInput as error:
        pytest.skip(str(error))
    assert time.process_time() - start < 10
    model = task.model(0)
    before = task.evaluate(model).value
    task.train(model, seed=0)
    stated, found = task.baseline, task.evaluate(model).value
    assert abs(found - stated.value) <= stated.spread
    assert abs(before - stated.value) > stated.spread  # an untrained network could not pass


@pytest.mark.fetched
@pytest.mark.parametrize("name", QUICK)
def test_the_stated_baseline_is_reached(name):
    check_baseline(name)


@pytest.mark.fetched
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REAL if name not in QUICK])
def test_the_stated_baseline_is_reached_slowly(name):
    check_baseline(name)
