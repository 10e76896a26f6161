"""Budgets as users write them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from laconic.errors import BadInput
from laconic.pipeline.budget import UNITS, Budget, parse_budget, parse_bytes

RATIO = st.floats(1.001, 1e6).map(lambda x: round(x, 3))
SPACE = st.sampled_from(["", " ", "  "])


@given(RATIO, SPACE, SPACE)
def test_a_ratio(ratio, a, b):
    found = parse_budget(f"{a}size{b}={a}{ratio}x{b}")
    assert (found.size_ratio, found.size, found.drop) == (ratio, None, None)
    assert found.ceiling(10**9) == int(10**9 / ratio)


@given(st.integers(1, 10**9), st.sampled_from(sorted(UNITS)), st.booleans(), SPACE)
def test_bytes(number, unit, upper, space):
    text = f"{number}{space}{unit.upper() if upper else unit}"
    assert parse_bytes(text) == int(number * UNITS[unit])
    assert parse_budget(f"size={text}").ceiling(123) == int(number * UNITS[unit])


@given(RATIO, st.floats(0, 100).map(lambda x: round(x, 2)), st.booleans(), st.sampled_from(["", "%"]))
def test_both_in_any_order(ratio, drop, swapped, percent):
    parts = [f"size={ratio}x", f"drop={drop}{percent}"]
    found = parse_budget(", ".join(parts[::-1] if swapped else parts))
    assert (found.size_ratio, found.drop) == (ratio, drop)


@given(st.text(max_size=30))
def test_any_text_is_a_budget_or_refused_in_a_sentence(text):
    try:
        found = parse_budget(text)
    except BadInput as error:
        assert str(error)
    else:
        assert isinstance(found, Budget)


@given(
    st.from_regex(r"(size|drop|memory|latency)=[0-9eE.+\-xX%infa ]{0,400}(x|MB|GiB|%|ms)?", fullmatch=True)
)
def test_numbers_of_any_kind_are_finite_and_positive_or_refused(text):
    try:
        found = parse_budget(text)
    except BadInput as error:
        assert repr(text) in str(error)
        return
    bounds = [b for b in (found.size, found.size_ratio, found.memory) if b is not None]
    assert all(0 < b < float("inf") for b in bounds)
    assert found.drop is None or 0 <= found.drop < float("inf")


def test_none_is_four_times_smaller_and_a_budget_is_itself():
    assert parse_budget(None).ceiling(400) == 100
    budget = Budget(size=7)
    assert parse_budget(budget) is budget
    assert parse_budget("drop=1").ceiling(400) is None
