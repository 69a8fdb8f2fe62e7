from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Bool
from pot_sparsity.algorithms.pruning.magnitude import magnitude_refit
from pot_sparsity.algorithms.pruning.problem import (
    LayerProblem,
    Solver,
    SolverOptions,
    layer_error,
    row_errors,
)
from pot_sparsity.algorithms.pruning.refit import conjugate_gradients, damped_cholesky, refit
from pot_sparsity.algorithms.pruning.wanda import wanda_refit
from tests.algorithms.pruning.layers import make_layer, oracle_error, oracle_refit


def _mask(seed: int, shape: tuple[int, ...], density: float) -> Bool:
    mask: Bool = np.random.default_rng(seed).random(shape) < density
    return mask


@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 60), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_refit_is_the_least_squares_optimum(
    seed: int, groups: int, rows: int, cols: int, density: float
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    mask = _mask(seed, target.shape, density)
    weight, damping = refit(LayerProblem.of(target, second), mask)
    assert damping == 0.0
    assert (weight[~mask] == 0.0).all()
    np.testing.assert_allclose(weight, oracle_refit(target, second, mask), rtol=1e-6, atol=1e-7)
    gradient = np.where(mask, (weight - target) @ second, 0.0)
    assert np.abs(gradient).max() <= 1e-8 * np.abs(target @ second).max()


@pytest.mark.parametrize("rank", [None, 5])
def test_very_wide_layers_come_close_in_single_precision(
    rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, second = make_layer(5, 1, 9, 90, rank)
    mask = _mask(6, target.shape, 0.5)
    problem = LayerProblem.of(target, second)
    exact, _ = refit(problem, mask)
    monkeypatch.setattr("pot_sparsity.algorithms.pruning.refit._DEAR", 0.0)
    best, begin = layer_error(exact, target, second), exact + 0.01 * mask
    close, damping = refit(problem, mask, begin)
    energy = layer_error(np.zeros_like(target), target, second)
    assert damping == 0.0
    assert (close[~mask] == 0.0).all()
    assert layer_error(close, target, second) <= best + 1e-4 * (layer_error(begin, target, second) - best)
    worse = np.zeros_like(target)
    assert layer_error(refit(problem, mask, worse)[0], target, second) <= best + 0.05 * energy
    unmoved, _ = refit(problem, mask, exact)
    assert layer_error(unmoved, target, second) <= best + 1e-9 * energy


def test_cholesky_and_conjugate_gradients_agree() -> None:
    target, second = make_layer(3, 1, 7, 80)
    mask = _mask(4, target.shape, 0.6)
    weight, damping = conjugate_gradients(second[0], (target @ second)[0], mask[0], target[0], target[0])
    expected = oracle_refit(target, second, mask)
    best = oracle_error(expected, target, second)
    assert damping == 0.0
    assert oracle_error(weight[None], target, second) == pytest.approx(best, rel=1e-6)


def test_wide_layers_are_solved_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    target, second = make_layer(5, 2, 6, 64)
    mask = _mask(6, target.shape, 0.7)
    monkeypatch.setattr("pot_sparsity.algorithms.pruning.refit._EXPECTED_PRODUCTS", 0)
    weight, _ = refit(LayerProblem.of(target, second), mask)
    best = oracle_error(oracle_refit(target, second, mask), target, second)
    assert oracle_error(weight, target, second) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("cols", [12, 70])
def test_rank_deficient_moments_are_damped_and_reported(cols: int) -> None:
    target, second = make_layer(7, 2, 3, cols, rank=cols // 3)
    mask = _mask(8, target.shape, 0.8)
    weight, damping = refit(LayerProblem.of(target, second), mask)
    assert 0 < damping <= 1e-4
    assert np.isfinite(weight).all()
    least = 0.0
    for group, row in np.ndindex(*target.shape[:2]):
        kept = np.flatnonzero(mask[group, row])
        right = target[group, row] @ second[group]
        solution = np.linalg.lstsq(second[group][np.ix_(kept, kept)], right[kept], rcond=1e-12)[0]
        full = np.zeros(cols)
        full[kept] = solution
        least += float((full - target[group, row]) @ second[group] @ (full - target[group, row]))
    energy = oracle_error(np.zeros_like(target), target, second)
    assert oracle_error(weight, target, second) <= least + 1e-4 * energy


def test_conjugate_gradients_damp_an_indefinite_matrix() -> None:
    matrix = np.array([[1.0, 0.0, 1.0001], [0.0, 2.0, 0.0], [1.0001, 0.0, 1.0]])
    target = np.array([[1.0, -1.0, 2.0]])
    mask = np.array([[True, False, True]])
    weight, damping = conjugate_gradients(matrix, target @ matrix, mask, target, np.array([[1.0, 0.0, -1.0]]))
    assert damping > 0
    assert np.isfinite(weight).all()


def test_a_hopeless_matrix_is_an_error() -> None:
    with pytest.raises(np.linalg.LinAlgError, match="too indefinite"):
        damped_cholesky(-100.0 * np.eye(3), 1.0)
    huge = np.array([[1.0, 1e9], [1e9, 1.0]])[None]
    target = np.array([[[1.0, 2.0]]])
    problem = LayerProblem.of(
        np.tile(target, (1, 1, 2))[..., :3], np.pad(huge, ((0, 0), (0, 1), (0, 1))) + np.eye(3)
    )
    with pytest.raises(np.linalg.LinAlgError, match="too indefinite"):
        refit(problem, np.array([[[True, True, False]]]))


def test_dead_inputs_keep_their_weight_or_lose_it_without_harm() -> None:
    target, second = make_layer(9, 1, 2, 6)
    second[0, 2] = second[0, :, 2] = 0.0
    problem = LayerProblem.of(target, second)
    assert problem.dead.tolist() == [[False, False, True, False, False, False]]
    mask = np.ones(target.shape, np.bool_)
    mask[0, :, 0] = False
    weight, damping = refit(problem, mask)
    np.testing.assert_allclose(weight[0, :, 2], target[0, :, 2])
    mask[0, :, 2] = False
    without, _ = refit(problem, mask)
    assert damping == 0.0
    assert layer_error(without, target, second) == pytest.approx(layer_error(weight, target, second))


def test_a_free_support_returns_the_target_unchanged() -> None:
    target, second = make_layer(10, 1, 3, 5)
    target[0, :, 1] = 0.0
    weight, damping = refit(LayerProblem.of(target, second), target != 0.0)
    np.testing.assert_array_equal(weight, target)
    assert damping == 0.0


def test_layer_error_against_its_definition() -> None:
    target, second = make_layer(11, 2, 3, 4)
    weight = target + 0.5
    assert layer_error(weight, target, second) == pytest.approx(oracle_error(weight, target, second))
    assert row_errors(weight, target, second).shape == (2, 3)
    assert layer_error(weight, target, -second) == 0.0


@pytest.mark.parametrize("method", [magnitude_refit, wanda_refit])
def test_few_products_end_near_the_optimum_of_large_layers(
    method: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, second = make_layer(8, 2, 9, 90)
    zeros = target.size * 6 // 10
    brief = SolverOptions(refit_products=24)
    exact = method(target, second, zeros)
    np.testing.assert_array_equal(method(target, second, zeros, options=brief).weight, exact.weight)
    monkeypatch.setattr("pot_sparsity.algorithms.pruning.refit._BRIEF", 0.0)
    near = method(target, second, zeros, options=brief)
    np.testing.assert_array_equal(near.mask, exact.mask)
    assert (near.weight[~near.mask] == 0.0).all()
    assert exact.relative_error <= near.relative_error <= 1.1 * exact.relative_error
    far = method(target, second, zeros, options=SolverOptions(refit_products=1))
    assert far.relative_error > near.relative_error
    both = method(target, second, zeros, options=SolverOptions(refit_products=24, workers=2))
    np.testing.assert_array_equal(both.weight, near.weight)
    error = layer_error(near.weight, target, second) / layer_error(np.zeros_like(target), target, second)
    assert near.relative_error == pytest.approx(error, rel=1e-9)
