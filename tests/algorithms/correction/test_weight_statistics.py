from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.correction import exact_weight_correction, pot_weight_correction

Correction = Callable[[Float64, Float64], Float64]

BOTH = pytest.mark.parametrize("correct", [pot_weight_correction, exact_weight_correction])


@st.composite
def pruned(draw: st.DrawFn) -> tuple[Float64, Float64]:
    """A dense weight and its magnitude-pruned form."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 30)))
    dense = random.normal(draw(st.sampled_from([0.0, 0.3])), 10 ** random.uniform(-3, 3), size=shape)
    threshold = np.quantile(np.abs(dense), draw(st.floats(0.0, 0.95)))
    return np.where(np.abs(dense) < threshold, 0.0, dense), dense


def pot_row(sparse: list[float], dense: list[float]) -> list[float]:
    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    def deviation(values: list[float]) -> float:
        return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))

    factor = deviation(dense) / (deviation(sparse) + 1e-9)
    shift = mean(dense) - mean([factor * value for value in sparse])
    return [factor * value + shift if value != 0.0 else 0.0 for value in sparse]


@settings(deadline=None, max_examples=60)
@given(pruned())
def test_published_form(weights: tuple[Float64, Float64]) -> None:
    sparse, dense = weights
    corrected = pot_weight_correction(sparse, dense)
    for group in range(sparse.shape[0]):
        for row in range(sparse.shape[1]):
            expected = pot_row(sparse[group, row].tolist(), dense[group, row].tolist())
            scale = np.abs(dense[group, row]).max()
            np.testing.assert_allclose(corrected[group, row], expected, rtol=1e-6, atol=1e-6 * scale)
    assert not corrected[sparse == 0.0].any()


@settings(deadline=None, max_examples=100)
@given(pruned())
def test_exact_form_restores_both_moments_where_it_can(weights: tuple[Float64, Float64]) -> None:
    sparse, dense = weights
    corrected = exact_weight_correction(sparse, dense)
    assert not corrected[sparse == 0.0].any()
    cols = dense.shape[2]
    for row in np.ndindex(*dense.shape[:2]):
        number = np.count_nonzero(sparse[row])
        mean, square = dense[row].mean(), np.square(dense[row]).mean()
        reachable = number > 1 and cols * square > (cols * mean) ** 2 / number * (1 + 1e-9)
        if reachable:
            assert corrected[row].mean() == pytest.approx(mean, rel=1e-6, abs=1e-9 * math.sqrt(square))
            assert np.square(corrected[row]).mean() == pytest.approx(square, rel=1e-6)
        elif number <= 1 or cols * square < (cols * mean) ** 2 / number * (1 - 1e-9):
            np.testing.assert_array_equal(corrected[row], sparse[row])


def test_exact_form_by_hand() -> None:
    """Kept 1 and 3 of (1, 3, 0.5, -0.5): n mu = 4, n q = 10.5, so a = sqrt(2.5 / 2), c = 2 - 2 a."""
    dense = np.array([[[1.0, 3.0, 0.5, -0.5]]])
    sparse = np.array([[[1.0, 3.0, 0.0, 0.0]]])
    a = math.sqrt(1.25)
    expected = [[[a + 2 - 2 * a, 3 * a + 2 - 2 * a, 0.0, 0.0]]]
    np.testing.assert_allclose(exact_weight_correction(sparse, dense), expected, rtol=1e-14)


def test_masking_costs_the_published_form_its_moments() -> None:
    random = np.random.default_rng(0)
    dense = random.normal(0.05, 1.0, size=(1, 4, 200))
    sparse = np.where(np.abs(dense) < 1.0, 0.0, dense)
    published, exact = pot_weight_correction(sparse, dense), exact_weight_correction(sparse, dense)
    assert np.abs(exact.std(axis=2) - dense.std(axis=2)).max() < 1e-12
    assert np.abs(exact.mean(axis=2) - dense.mean(axis=2)).max() < 1e-12
    assert np.abs(published.mean(axis=2) - dense.mean(axis=2)).max() > 1e-3


@pytest.mark.parametrize(
    ("sparse", "dense"),
    [
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),  # everything pruned
        ([0.0, 0.0, 3.0], [1.0, 2.0, 3.0]),  # a single kept weight
        ([0.0, 2.0, 2.0], [1.0, 2.0, 2.0]),  # kept weights all alike
        ([0.0, 2.0, 2.1], [2.0, 2.0, 2.1]),  # (n mu)^2 / K > n q: two weights cannot carry the mean of three
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([5.0, 5.0, 5.0], [5.0, 5.0, 5.0]),
    ],
)
def test_exact_form_leaves_rows_it_cannot_correct(sparse: list[float], dense: list[float]) -> None:
    weight = np.array([[sparse]])
    np.testing.assert_array_equal(exact_weight_correction(weight, np.array([[dense]])), weight)


def test_exact_form_leaves_unpruned_rows_to_the_bit() -> None:
    dense = np.random.default_rng(0).normal(size=(2, 5, 33))
    sparse = dense.copy()
    sparse[0, 0, ::2] = 0.0
    corrected = exact_weight_correction(sparse, dense)
    np.testing.assert_array_equal(corrected[0, 1:], dense[0, 1:])
    np.testing.assert_array_equal(corrected[1], dense[1])
    assert (corrected[0, 0, 1::2] != sparse[0, 0, 1::2]).any()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_published_form_on_constant_rows(value: float) -> None:
    dense = np.full((1, 2, 4), value)
    np.testing.assert_allclose(pot_weight_correction(dense, dense), dense)


def test_published_form_on_a_row_without_kept_weights() -> None:
    dense = np.array([[[1.0, 2.0, 3.0]]])
    assert not pot_weight_correction(np.zeros_like(dense), dense).any()


@BOTH
def test_arguments_are_not_changed(correct: Correction) -> None:
    dense = np.random.default_rng(0).normal(size=(1, 3, 8))
    sparse = np.where(np.abs(dense) < 0.5, 0.0, dense)
    before = sparse.copy(), dense.copy()
    correct(sparse, dense)
    np.testing.assert_array_equal(sparse, before[0])
    np.testing.assert_array_equal(dense, before[1])


@BOTH
def test_shapes_that_differ(correct: Correction) -> None:
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] sparse and \[1, 2, 4\] dense"):
        correct(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match=r"\[groups, rows, cols\]"):
        correct(np.zeros((2, 3)), np.zeros((2, 3)))
