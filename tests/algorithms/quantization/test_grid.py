from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.quantization.grid import Grid, fit_grid, shrunk_grids
from tests.algorithms.quantization.oracles import make_grid, nearest


@given(st.integers(0, 9999), st.integers(1, 2), st.integers(1, 4), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_every_weight_goes_to_its_nearest_point(
    seed: int, groups: int, rows: int, cols: int, symmetric: bool
) -> None:
    grid = make_grid(seed, groups, rows, symmetric=symmetric)
    weight = np.random.default_rng(seed).normal(size=(groups, rows, cols)) * 2
    weight.reshape(-1)[::3] = 0.0
    integers = grid.quantize(weight)
    assert integers.dtype == np.int32
    values = grid.dequantize(integers)
    points = np.arange(grid.low, grid.high + 1)
    for group, row, col in np.ndindex(weight.shape):
        scale, zero = float(grid.scale[group, row]), int(grid.zero_point[group, row])
        expected = nearest(float(weight[group, row, col]), scale, zero, grid.low, grid.high)
        assert integers[group, row, col] == expected
        distances = np.abs(scale * (points - zero) - weight[group, row, col])
        assert abs(values[group, row, col] - weight[group, row, col]) == pytest.approx(distances.min())
    assert (values[weight == 0.0] == 0.0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_the_fitted_grid_is_the_best_of_all_tried(symmetric: bool, norm: float) -> None:
    random = np.random.default_rng(3)
    weight = random.standard_t(3, size=(2, 5, 40))
    importance = random.uniform(0.1, 5, (2, 40))
    found = fit_grid(weight, 3, symmetric=symmetric, norm=norm, importance=importance)

    def errors(grid: Grid) -> np.ndarray:
        difference = np.abs(grid.dequantize(grid.quantize(weight)) - weight)
        return np.asarray((difference**norm * importance[:, None]).sum(axis=-1))

    tried = np.stack([errors(grid) for grid in shrunk_grids(weight, 3, symmetric=symmetric)])
    np.testing.assert_array_equal(errors(found), tried.min(axis=0))
    assert (errors(found) < tried[0]).any()


def test_ranges() -> None:
    weight = np.array([[[-1.0, 0.5, 3.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]])
    symmetric = next(shrunk_grids(weight, 4))
    assert (symmetric.low, symmetric.high) == (-8, 7)
    np.testing.assert_allclose(symmetric.scale, [[6 / 15, 1.0, 4 / 15]])
    skewed = next(shrunk_grids(weight, 4, symmetric=False))
    assert (skewed.low, skewed.high) == (0, 15)
    np.testing.assert_allclose(skewed.scale, [[4 / 15, 1.0, 2 / 15]])
    assert skewed.zero_point.tolist() == [[4, 0, 0]]
    assert skewed.quantize(weight)[0, :, 2].tolist() == [15, 0, 15]


def test_what_cannot_be_a_grid_is_refused() -> None:
    one = np.ones((1, 2))
    zero = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="positive and finite"):
        Grid(one * 0, zero, -4, 3)
    with pytest.raises(ValueError, match=r"zero point must lie in 1\.\.3"):
        Grid(one, zero, 1, 3)
    with pytest.raises(ValueError, match=r"must both be \[groups, rows\]"):
        Grid(one, np.zeros(2, np.int32), -4, 3)
    with pytest.raises(ValueError, match="bits must be between 2 and 16, got 1"):
        fit_grid(np.ones((1, 1, 1)), 1)
    with pytest.raises(ValueError, match="NaN"):
        fit_grid(np.full((1, 1, 1), np.nan), 4)
