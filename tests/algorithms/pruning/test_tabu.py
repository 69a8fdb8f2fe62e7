from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.pruning import tabu
from pot_sparsity.algorithms.pruning.parallel import RowPool
from pot_sparsity.algorithms.pruning.problem import LayerProblem, row_errors
from pot_sparsity.algorithms.pruning.tabu import Plan, TabuSearch
from tests.algorithms.pruning.layers import brute_force, make_layer, oracle_error, oracle_refit


def _mask(seed: int, shape: tuple[int, ...], kept: int) -> Bool:
    mask = np.zeros(int(np.prod(shape)), np.bool_)
    mask[np.random.default_rng(seed).permutation(mask.size)[:kept]] = True
    return mask.reshape(shape)


def _row_errors(target: Float64, second: Float64, mask: Bool) -> Float64:
    return row_errors(oracle_refit(target, second, mask), target, second)


def _error(target: Float64, second: Float64, mask: Bool) -> float:
    return oracle_error(oracle_refit(target, second, mask), target, second)


def _searched(
    target: Float64, second: Float64, mask: Bool, rounds: int, steps: int = 20, workers: int = 1
) -> tuple[TabuSearch, Bool]:
    errors = _row_errors(target, second, mask)
    with RowPool(workers) as pool:
        search = TabuSearch(LayerProblem.of(target, second), mask, errors, steps, pool, lambda: False)
        search.walk(mask, errors, rounds, 0)
        return search, search.best()


@given(st.integers(0, 999), st.integers(1, 2), st.integers(1, 3), st.integers(1, 12), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_the_count_stays_the_error_falls_and_all_it_remembers_is_true(
    seed: int, groups: int, rows: int, cols: int, density: float
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    mask = _mask(seed, target.shape, round(density * target.size))
    search, found = _searched(target, second, mask, rounds=2, steps=8)
    energy = oracle_error(np.zeros_like(target), target, second)
    assert found.sum() == mask.sum()
    assert _error(target, second, found) <= _error(target, second, mask) + 1e-9 * energy
    for row, place in np.argwhere(np.isfinite(search._errors)).tolist():
        group, index = divmod(row, rows)
        kept = search._masks[row, place]
        assert kept.sum() == mask[group, index].sum() + place - search._errors.shape[1] // 2
        alone = _error(target[group, None, None, index], second[group, None], kept[None, None])
        assert search._errors[row, place] == pytest.approx(alone, rel=1e-5, abs=1e-8 * energy)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_all_masks_is_found(seed: int) -> None:
    target, second = make_layer(seed, 1, 2, 6)
    _, near = _searched(target, second, _mask(seed, target.shape, 5), rounds=3)
    # The second search is priced where the first one ended.
    _, found = _searched(target, second, near, rounds=3)
    assert _error(target, second, found) == pytest.approx(brute_force(target, second, 7), rel=1e-9)


def test_narrow_cores_find_their_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    target, second = make_layer(7, 1, 6, 30)
    mask = _mask(7, target.shape, 60)
    _, wide = _searched(target, second, mask, rounds=12)
    monkeypatch.setattr(tabu, "_WIDTH", 4)
    _, narrow = _searched(target, second, mask, rounds=12)
    start, least = _error(target, second, mask), _error(target, second, wide)
    assert _error(target, second, narrow) - least < 0.1 * (start - least)


def test_workers_change_nothing() -> None:
    target, second = make_layer(8, 2, 11, 24)
    mask = _mask(8, target.shape, 200)
    _, one = _searched(target, second, mask, rounds=3)
    _, four = _searched(target, second, mask, rounds=3, workers=4)
    np.testing.assert_array_equal(one, four)


def test_a_start_with_rows_too_full_is_mended() -> None:
    target, second = make_layer(9, 1, 3, 40)
    mask = np.zeros(target.shape, np.bool_)
    mask[..., :20] = True
    errors = _row_errors(target, second, mask)
    other = np.zeros(target.shape, np.bool_)
    other[0, 0] = True
    other[0, 1:, :10] = True
    with RowPool(1) as pool:
        search = TabuSearch(LayerProblem.of(target, second), mask, errors, 10, pool, lambda: False)
        search.walk(other, _row_errors(target, second, other), 2, 0)
        found = search.best()
    assert found.sum() == mask.sum()
    assert _error(target, second, found) < errors.sum()


def test_no_time_means_no_walk() -> None:
    target, second = make_layer(10, 1, 3, 12)
    mask = _mask(10, target.shape, 12)
    errors = _row_errors(target, second, mask)
    with RowPool(1) as pool:
        search = TabuSearch(LayerProblem.of(target, second), mask, errors, 10, pool, lambda: True)
        search.walk(mask, errors, 5, 0)
        np.testing.assert_array_equal(search.best(), mask)


def test_pruned_and_dead_weights_do_not_grow() -> None:
    target, second = make_layer(11, 1, 3, 12)
    target[..., :3] = 0.0
    second[:, 3:5] = second[:, :, 3:5] = 0.0
    mask = np.zeros(target.shape, np.bool_)
    mask[..., 8:] = True
    problem = LayerProblem.of(target, second)
    weight = oracle_refit(target, problem.second, mask)
    errors = row_errors(weight, target, problem.given)
    with RowPool(1) as pool:
        search = TabuSearch(problem, mask, errors, 20, pool, lambda: False)
        search.walk(mask, errors, 3, 0)
        assert not search.best()[..., :5].any()


@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_is_exact(seed: int) -> None:
    random = np.random.default_rng(seed)
    target, second = make_layer(seed, 1, 3, 30)
    mask = np.zeros(target.shape, np.bool_)
    mask[..., :15] = True
    with RowPool(1) as pool:
        search = TabuSearch(LayerProblem.of(target, second), mask, np.ones((1, 3)), 1, pool, lambda: False)
    width = search._errors.shape[1]
    search._errors[:] = np.where(random.random((3, width)) < 0.3, np.inf, random.random((3, width)))
    search._errors[:, width // 2] = 1.0
    for row, place in np.ndindex(3, width):
        search._masks[row, place] = np.arange(30) < 15 + place - width // 2
    best = min(
        sum(search._errors[row, place] for row, place in enumerate(choice))
        for choice in product(range(width), repeat=3)
        if sum(choice) == 3 * (width // 2)
    )
    found = search.best()
    places = found[0].sum(axis=1) - 15 + width // 2
    assert found.sum() == mask.sum()
    assert sum(search._errors[row, place] for row, place in enumerate(places)) == pytest.approx(best)


def test_wide_layers_are_searched_less() -> None:
    small, large = (_mask(0, shape, size) for shape, size in (((1, 8, 40), 160), ((1, 64, 600), 19200)))
    assert Plan.of(small, 4.0, 40).rounds == 40
    assert 0 < Plan.of(large, 4.0, 40).rounds < 40
    assert Plan.of(large, 0.01, 40).rounds == 0
    assert Plan.of(small, 4.0, 40).steps <= Plan.of(large, 4.0, 40).steps
