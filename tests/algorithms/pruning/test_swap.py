from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern
from pot_sparsity.algorithms.pruning.problem import LayerProblem
from pot_sparsity.algorithms.pruning.swap import polish
from pot_sparsity.algorithms.pruning.tableau import Tableau
from tests.algorithms.pruning.layers import make_layer, oracle_error, oracle_refit


def _random_mask(seed: int, shape: tuple[int, ...], kept: int) -> Bool:
    mask = np.zeros(int(np.prod(shape)), np.bool_)
    mask[np.random.default_rng(seed).permutation(mask.size)[:kept]] = True
    return mask.reshape(shape)


def _error(target: Float64, second: Float64, mask: Bool) -> float:
    return oracle_error(oracle_refit(target, second, mask), target, second)


@given(st.integers(0, 999), st.integers(2, 8), st.data())
@settings(deadline=None, max_examples=40)
def test_the_best_pair_is_found_and_its_change_is_exact(seed: int, cols: int, data: st.DataObject) -> None:
    target, second = make_layer(seed, 1, 1, cols)
    mask = _random_mask(seed, target.shape, data.draw(st.integers(1, cols - 1)))
    problem = LayerProblem.of(target, second)
    scaled = target[0, 0] * problem.scale[0, 0]
    tableau = Tableau(problem.correlation[0], scaled, mask[0, 0], np.ones(cols, np.bool_))
    start = _error(target, second, mask)
    best = 0.0
    for gone in np.flatnonzero(mask[0, 0]):
        for grown in np.flatnonzero(~mask[0, 0]):
            other = mask.copy()
            other[0, 0, gone], other[0, 0, grown] = False, True
            best = min(best, _error(target, second, other) - start)
    change, drop, grow = tableau.best_swap(None)
    assert change == pytest.approx(best, rel=1e-6, abs=1e-9 * (1 + start))
    if drop >= 0:
        tableau.swap(drop, grow)
        fresh = Tableau(problem.correlation[0], scaled, tableau.kept, np.ones(cols, np.bool_))
        order = [int(np.flatnonzero(fresh.support == column)[0]) for column in tableau.support]
        np.testing.assert_allclose(tableau.lines, fresh.lines[:, order], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(tableau.diagonal, fresh.diagonal, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(tableau.state, fresh.state, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 999), st.integers(1, 2), st.integers(1, 3), st.integers(2, 6), st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=40)
def test_polish_ends_where_no_swap_pays(seed: int, groups: int, rows: int, cols: int, density: float) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    mask = _random_mask(seed, target.shape, round(density * target.size))
    polished = polish(LayerProblem.of(target, second), mask, Pattern())
    assert polished.mask.sum() == mask.sum()
    assume(polished.damping == 0.0)  # a singular H makes no promise
    error = _error(target, second, polished.mask)
    energy = oracle_error(np.zeros_like(target), target, second)
    assert error <= _error(target, second, mask) + 1e-9 * energy
    assert oracle_error(polished.weight, target, second) == pytest.approx(error, rel=1e-6, abs=1e-9 * energy)
    assert polished.optimal
    for drop in np.flatnonzero(polished.mask):
        for grow in np.flatnonzero(~polished.mask):
            other = polished.mask.copy().ravel()
            other[drop], other[grow] = False, True
            assert _error(target, second, other.reshape(mask.shape)) >= error - 1e-6 * energy


def test_polish_moves_weights_across_rows() -> None:
    target, second = make_layer(1, 1, 2, 6)
    target[0, 1] *= 20
    mask = np.ones(target.shape, np.bool_)
    mask[0, 1, :3] = False
    polished = polish(LayerProblem.of(target, second), mask, Pattern())
    assert polished.mask[0, 1].sum() > 3
    assert polished.optimal


def test_budget_ends_early_and_says_so() -> None:
    target, second = make_layer(2, 1, 6, 20)
    mask = _random_mask(2, target.shape, 60)
    problem = LayerProblem.of(target, second)
    some = polish(problem, mask, Pattern(), swaps=3)
    assert some.swaps == 3
    assert not some.optimal
    late = polish(problem, mask, Pattern(), seconds=0.0)
    assert late.swaps == 0
    assert not late.optimal
    full = polish(problem, mask, Pattern())
    assert full.optimal
    assert full.swaps > 3


def test_n_of_m_swaps_stay_in_their_group() -> None:
    target, second = make_layer(3, 1, 4, 12)
    mask = np.zeros(target.shape, np.bool_)
    mask[..., ::2] = True
    pattern = Pattern("n:m", n=2, m=4)
    polished = polish(LayerProblem.of(target, second), mask, pattern)
    assert (polished.mask.reshape(4, 3, 4).sum(axis=-1) == 2).all()
    assert _error(target, second, polished.mask) < _error(target, second, mask)


def test_zeros_of_the_target_do_not_grow() -> None:
    target, second = make_layer(4, 1, 3, 10)
    target[..., :3] = 0.0
    mask = np.zeros(target.shape, np.bool_)
    mask[..., 6:] = True
    polished = polish(LayerProblem.of(target, second), mask, Pattern())
    assert not polished.mask[..., :3].any()


def test_blocks_cannot_be_polished() -> None:
    target, second = make_layer(5, 1, 2, 8)
    with pytest.raises(ValueError, match="not on 'block:4'"):
        polish(LayerProblem.of(target, second), np.ones(target.shape, np.bool_), Pattern("block", m=4))
