from __future__ import annotations

import doctest
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms import schedule
from pot_sparsity.algorithms.schedule import cubic_schedule


@settings(deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 40))
def test_schedule_follows_the_paper(one: float, other: float, iterations: int) -> None:
    initial, final = sorted((one, other))
    steps = cubic_schedule(initial, final, iterations)
    assert len(steps) == iterations + 1
    assert steps[0] == initial
    assert steps[-1] == final
    for t, sparsity in enumerate(steps):
        assert sparsity == pytest.approx(final + (initial - final) * (1 - t / iterations) ** 3, abs=1e-12)
        assert 0.0 <= sparsity <= 1.0
    assert all(after >= before - 1e-15 for before, after in pairwise(steps))


def test_no_iterations_give_the_final_sparsity() -> None:
    assert cubic_schedule(0.1, 0.7, 0) == [0.7]


def test_equal_ends_give_a_constant() -> None:
    assert cubic_schedule(0.3, 0.3, 3) == [0.3] * 4


@pytest.mark.parametrize(
    ("initial", "final", "iterations", "text"),
    [
        (0.6, 0.5, 10, "initial sparsity 0.6 is larger than the final sparsity 0.5"),
        (-0.1, 0.5, 10, "initial sparsity must be between 0 and 1"),
        (0.1, 1.1, 10, "final sparsity must be between 0 and 1"),
        (0.1, math.nan, 10, "final sparsity must be between 0 and 1"),
        (0.1, 0.5, -1, "iterations must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_range(initial: float, final: float, iterations: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        cubic_schedule(initial, final, iterations)


def test_examples_of_the_documentation() -> None:
    assert doctest.testmod(schedule) == (0, 2)
