"""Activation grids and names of choices against arithmetic by the book."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64, Pattern
from pot_sparsity.algorithms.quantization.activations import ActivationGrid, fit_activation_grid
from pot_sparsity.algorithms.quantization.choices import BitChoice


def error(values: Float64, low: float, high: float, levels: int) -> float:
    """Squared error of the grid that spans a range, its zero point an integer, in float64."""
    step = (high - low) / (levels - 1)
    zero = np.clip(np.rint(-low / step), 0, levels - 1)
    rounded = (np.clip(np.rint(values / step) + zero, 0, levels - 1) - zero) * step
    return float(np.square(rounded - values).sum())


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 4, 8]),
    shift=st.sampled_from([-3.0, 0.0, 0.4, 5.0]),
    positive=st.booleans(),
)
def test_no_range_of_a_dense_search_is_much_better(
    seed: int, bits: int, shift: float, positive: bool
) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_t(4, 400) + shift
    values = np.maximum(values, 0.0) if positive else values
    grid = fit_activation_grid(values, bits)
    assert grid.low <= 0.0 <= grid.high
    np.testing.assert_array_equal(grid(np.zeros(3)), 0.0)
    found = float(np.square(grid(values).astype(np.float64) - values).sum())
    low, high = min(0.0, values.min()), max(0.0, values.max())
    if high - low == 0.0:
        assert found == 0.0
        return
    shares = np.linspace(0.08, 1.0, 24)
    lows = shares * low if low else [0.0]
    highs = shares * high if high else [0.0]
    best = min(error(values, a, b, 2**bits) for a in lows for b in highs if b > a)
    assert found <= 1.15 * best + 1e-9 * np.square(values).sum()
    assert np.unique(grid(values)).size <= 2**bits


def test_values_far_outside_are_clipped_when_that_pays() -> None:
    values = np.concatenate([np.random.default_rng(0).uniform(0, 1, 5000), [30.0]])
    grid = fit_activation_grid(values, 4)
    assert grid.zero_point == 0
    assert grid.high < 15.0
    assert fit_activation_grid(values[:-1], 8).high == pytest.approx(1.0, abs=0.02)


def test_a_grid_of_nothing_but_zeros_and_of_one_sign() -> None:
    assert fit_activation_grid(np.zeros(5), 4) == ActivationGrid(1.0, 0, 16)
    negative = fit_activation_grid(-np.linspace(0, 2, 50), 4)
    assert negative.zero_point == 15
    assert negative.high == 0.0


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        (np.ones(3), 9, "between 1 and 8"),
        (np.array([]), 4, "at least one"),
        (np.array([np.nan]), 4, "finite"),
    ],
)
def test_ranges_of_what_has_none(values: Float64, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_activation_grid(values, bits)


@pytest.mark.parametrize(
    ("scale", "zero", "levels", "message"),
    [(0.0, 0, 16, "scale"), (1.0, 16, 16, "zero point"), (1.0, 0, 257, "levels"), (np.inf, 0, 16, "scale")],
)
def test_grids_that_are_none(scale: float, zero: int, levels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationGrid(scale, zero, levels)


@pytest.mark.parametrize("text", ["8w8a", "4w4a", "8w4a", "8w8a+2:4", "4w4a+1:4"])
def test_choices_are_read_and_written(text: str) -> None:
    assert str(BitChoice.parse(text)) == text


@pytest.mark.parametrize("text", ["", "8w", "9w8a", "4w1a", "8w8a+block:4", "8w8a+4:2", "8W8A", "8w8a+"])
def test_choices_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="not known"):
        BitChoice.parse(text)


def test_bit_operations_by_hand() -> None:
    assert BitChoice(8, 8).bops(1000) == 64_000
    assert BitChoice(4, 4).bops(1000) == 16_000
    assert BitChoice(4, 8, Pattern.parse("2:4")).bops(1000, 0.5) == 16_000
