"""Bisection of the sparsity: what it finds is what a scan finds, in few trials; it never gives what was refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.bisection import Bisection

Drop = Callable[[float], float]


def values(highest: float, resolution: float) -> list[float]:
    """All that may be tried, falling."""
    found = [highest]
    while (value := round(highest - len(found) * resolution, 12)) > 1e-12:
        found.append(value)
    return found


def scan(drop: Drop, highest: float, resolution: float, limit: float) -> float | None:
    """The first value from the top that respects the limit."""
    return next((value for value in values(highest, resolution) if drop(value) <= limit), None)


def run(search: Bisection, drop: Drop) -> list[float]:
    tried = []
    while (value := search.propose()) is not None:
        tried.append(value)
        search.add(value, drop(value))
    return tried


@given(
    st.sampled_from([0.3, 0.5, 0.9, 0.95, 1.0]),
    st.sampled_from([0.005, 0.01, 0.03, 0.1]),
    st.floats(0.05, 5.0),
    st.lists(st.floats(-0.5, 60.0), min_size=2, max_size=12),
)
@settings(deadline=None, max_examples=300)
def test_rising_drops_are_found_as_by_a_scan(
    highest: float, resolution: float, limit: float, heights: list[float]
) -> None:
    def drop(value: float) -> float:
        return float(np.interp(value, np.linspace(0, 1, len(heights)), sorted(heights)))

    search = Bisection(highest, resolution, limit, 1000)
    tried = run(search, drop)
    assert search.best() == scan(drop, highest, resolution, limit)
    assert len(tried) == len(set(tried))
    assert set(tried) <= set(values(highest, resolution))
    assert len(tried) <= 3 * math.log2(len(values(highest, resolution)) + 1) + 3


def test_drops_that_grow_by_a_factor_take_few_trials() -> None:
    """Halving takes eight, the first included, for a resolution of 1 in 95."""
    numbers = []
    for rate in np.linspace(6.0, 30.0, 13):
        for at in np.linspace(0.3, 0.9, 13):

            def drop(value: float, rate: float = rate, at: float = at) -> float:
                return math.exp(rate * (value - at))

            search = Bisection(0.95, 0.01, 1.0, 1000)
            numbers.append(len(run(search, drop)))
            assert search.best() == scan(drop, 0.95, 0.01, 1.0)
    assert np.mean(numbers) < 6
    assert max(numbers) <= 8


@given(st.lists(st.floats(0.0, 10.0), min_size=20, max_size=20), st.integers(1, 8), st.floats(0.0, 5.0))
@settings(deadline=None, max_examples=200)
def test_whatever_the_drops_the_best_was_tried_and_respects_the_limit(
    drops: list[float], tries: int, limit: float
) -> None:
    by_value = dict(zip(values(1.0, 0.05), drops, strict=True))
    search = Bisection(1.0, 0.05, limit, tries)
    tried = run(search, by_value.__getitem__)
    assert len(tried) <= tries
    good = [value for value in tried if by_value[value] <= limit + 1e-9]
    assert search.best() == (max(good) if good else None)


def test_the_highest_value_comes_first_and_may_be_the_answer() -> None:
    search = Bisection(0.8, 0.01, 1.0, 10)
    assert search.best() is None
    assert run(search, lambda value: 0.5) == [0.8]
    assert search.best() == 0.8


@pytest.mark.parametrize(("highest", "expected"), [(0.0, [0.0]), (0.01, [0.01]), (0.02, [0.02, 0.01])])
def test_small_ranges(highest: float, expected: list[float]) -> None:
    search = Bisection(highest, 0.01, 1.0, 10)
    assert run(search, lambda value: 2.0) == expected
    assert search.best() is None


def test_no_drop_allowed_is_plain_bisection() -> None:
    search = Bisection(0.8, 0.1, 0.0, 10)
    assert run(search, lambda value: max(0.0, value - 0.35)) == [0.8, 0.4, 0.2, 0.3]
    assert search.best() == 0.3


def test_drops_that_are_no_numbers_are_refused() -> None:
    search = Bisection(0.9, 0.1, 1.0, 10)
    run(search, lambda value: math.nan if value > 0.45 else 0.0)
    assert search.best() == 0.4


@given(st.floats(0.0, 0.9), st.floats(3.0, 20.0), st.floats(0.4, 0.9))
@settings(deadline=None, max_examples=100)
def test_what_int8_costs_on_top_is_expected_elsewhere(extra: float, rate: float, at: float) -> None:
    """A constant extra drop: at most two values are confirmed, and the second is the answer."""

    def drop(value: float) -> float:
        return math.exp(rate * (value - at))

    search = Bisection(0.95, 0.01, 1.0, 1000)
    confirmed = []
    while True:
        run(search, drop)
        best = search.best()
        if best is None:
            break
        confirmed.append(best)
        if drop(best) + extra <= 1.0:
            break
        search.refuse(best, drop(best) + extra)
    assert len(confirmed) <= 2
    assert best == scan(lambda value: drop(value) + extra, 0.95, 0.01, 1.0)


def test_without_trials_left_those_not_refused_are_given() -> None:
    search = Bisection(0.4, 0.1, 1.0, 3)
    run(search, lambda value: {0.4: 9.0, 0.3: 0.9, 0.2: 0.8, 0.1: 0.7}[value])
    assert search.best() == 0.3
    search.refuse(0.3, 5.0)
    left = search.best()
    assert left is None or left < 0.3
    if left is not None:
        search.refuse(left, math.nan)
    assert search.best() is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((1.1, 0.01, 1.0, 5), "highest sparsity must be between 0 and 1"), ((0.5, 0.0, 1.0, 5), "resolution")],
)
def test_bad_arguments(arguments: tuple[float, float, float, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Bisection(*arguments)
