"""Demands rounded to shared levels: near to what was asked, never less sparse as a whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation.level_grid import level_grid, round_to_levels


def test_levels_are_powers_of_the_ratio_between_the_bounds() -> None:
    assert level_grid(0, 1000, 1000, 0.5).tolist() == [
        0,
        500,
        750,
        875,
        938,
        969,
        984,
        992,
        996,
        998,
        999,
        1000,
    ]
    assert level_grid(600, 950, 1000, 0.5).tolist() == [600, 750, 875, 938, 950]
    assert level_grid(3, 3, 3, 0.9).tolist() == [3]
    assert level_grid(0, 1, 1, 0.9).tolist() == [0, 1]


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, float("nan")])
def test_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio of densities"):
        level_grid(0, 10, 10, ratio)


@pytest.mark.parametrize(("lower", "upper"), [(-1, 5), (6, 5), (0, 11)])
def test_bounds_out_of_range(lower: int, upper: int) -> None:
    with pytest.raises(ValueError, match="bounds must satisfy"):
        level_grid(lower, upper, 10, 0.9)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    parts=st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6),
    ratio=st.sampled_from([0.5, 0.9, 0.97]),
)
def test_the_whole_keeps_its_bound_and_no_layer_could_give_more_back(
    sizes: list[int], parts: list[float], ratio: float
) -> None:
    widths = np.array(sizes, dtype=np.int64)
    demand = np.array([round(part * size) for part, size in zip(parts, sizes, strict=False)], dtype=np.int64)
    grids = [level_grid(0, size, size, ratio) for size in sizes]
    found = round_to_levels(demand, widths, grids, lambda zeros: bool(zeros.sum() >= demand.sum()))
    assert found.sum() >= demand.sum()
    for zeros, asked, grid in zip(found.tolist(), demand.tolist(), grids, strict=True):
        assert zeros in (
            max(level for level in grid if level <= asked),
            min(level for level in grid if level >= asked),
        )
    for index, zeros in enumerate(
        found.tolist()
    ):  # one layer at its upper level too many would be given back
        below = max(level for level in grids[index] if level <= demand[index])
        assert zeros == below or found.sum() - zeros + below < demand.sum()


def test_the_nearer_level_is_taken_where_the_bound_allows_it() -> None:
    grids = [np.array([0, 500, 750], np.int64), np.array([0, 500, 750], np.int64)]
    demand, sizes = np.array([520, 730], np.int64), np.array([1000, 1000], np.int64)
    assert round_to_levels(demand, sizes, grids, lambda zeros: bool(zeros.sum() >= 1250)).tolist() == [
        500,
        750,
    ]
    assert round_to_levels(demand, sizes, grids, lambda zeros: bool(zeros.sum() >= 1251)).tolist() == [
        750,
        750,
    ]
