"""Reconstruction targets against least squares on the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64, MatMulGeometry
from pot_sparsity.algorithms.moments import CrossMoments, CrossMomentsAccumulator
from pot_sparsity.algorithms.reconstruction import SparseTarget, output_error, sparse_target

GROUPS, ROWS, COLS = 2, 3, 5


def moments(x: Float64, y: Float64) -> CrossMoments:
    """Of inputs ``[samples, groups, cols]`` and outputs ``[samples, groups, rows]``."""
    accumulator = CrossMomentsAccumulator(MatMulGeometry(groups=x.shape[1]))
    accumulator.update(x[:, :, None, :], y[:, :, None, :])
    return accumulator.result()


def problem(
    seed: int, samples: int, noise: float = 0.3, shape: tuple[int, int, int] = (GROUPS, ROWS, COLS)
) -> tuple[Float64, Float64, Float64]:
    """Dense weights, sparse inputs that deviate from the dense ones, dense outputs (with a bias)."""
    groups, rows, cols = shape
    random = np.random.default_rng(seed)
    weight = random.normal(size=shape)
    mixing = random.normal(size=(cols, cols))
    x_d = random.normal(size=(samples, groups, cols)) @ mixing + 1.5
    x_s = 0.8 * x_d + noise * random.normal(size=x_d.shape)
    return weight, x_s, np.einsum("grc,ngc->ngr", weight, x_d) + random.normal(size=(groups, rows))


def least_squares(x: Float64, y: Float64) -> tuple[Float64, Float64]:
    """Best weight and bias of each group, on raw samples with a column of ones."""
    weights, biases = [], []
    for g in range(x.shape[1]):
        design = np.hstack([x[:, g], np.ones((len(x), 1))])
        solution = np.linalg.lstsq(design, y[:, g], rcond=None)[0]
        weights.append(solution[:-1].T)
        biases.append(solution[-1])
    return np.stack(weights), np.stack(biases)


def direct_error(weight: Float64, x: Float64, y: Float64) -> float:
    """Mean squared error with the best bias, on raw samples."""
    residual = y - np.einsum("grc,ngc->ngr", weight, x)
    return float(((residual - residual.mean(axis=0)) ** 2).sum(axis=(1, 2)).mean())


def relative(found: SparseTarget) -> tuple[float, float]:
    return found.error_before, found.error_after


def test_optimum_equals_least_squares_on_the_samples() -> None:
    dense, x, y = problem(0, 400)
    weight, bias = least_squares(x, y)
    found = sparse_target(dense, fit := moments(x, y), None, ridge=1e-12)
    assert found.blend == 1.0
    np.testing.assert_allclose(found.weight, weight, rtol=1e-5, atol=1e-6)
    new_bias = fit.output_mean - np.einsum("grc,gc->gr", found.weight, fit.inputs.mean)
    np.testing.assert_allclose(new_bias, bias, rtol=1e-5, atol=1e-6)


def test_ridge_equals_least_squares_with_extra_samples() -> None:
    """``lam |W - W_d|^2`` is what sqrt(lam) I as further inputs with outputs sqrt(lam) W_d adds."""
    dense, x, y = problem(1, 60)
    fit = moments(x, y)
    ridge = 0.05
    found = sparse_target(dense, fit, None, ridge=ridge)
    for g in range(GROUPS):
        xc, yc = x[:, g] - x[:, g].mean(axis=0), y[:, g] - y[:, g].mean(axis=0)
        level = np.sqrt(ridge * np.trace(fit.inputs.centred[g]) / COLS * len(x))
        design = np.vstack([xc, level * np.eye(COLS)])
        target = np.vstack([yc, level * dense[g].T])
        expected = np.linalg.lstsq(design, target, rcond=None)[0].T
        np.testing.assert_allclose(found.weight[g], expected, rtol=1e-7, atol=1e-9)


def test_errors_are_those_of_the_samples_that_judge() -> None:
    dense, x, y = problem(2, 200)
    other = x[:50] + 0.1, y[:50]
    found = sparse_target(dense, moments(x, y), judge := moments(*other))
    power = float(((other[1] - other[1].mean(axis=0)) ** 2).sum(axis=(1, 2)).mean())
    for weight, reported in zip((dense, found.weight), relative(found), strict=True):
        assert output_error(weight, judge) == pytest.approx(direct_error(weight, *other), rel=1e-6)
        assert reported == pytest.approx(direct_error(weight, *other) / power, rel=1e-6)


def test_equal_inputs_leave_the_dense_weight() -> None:
    dense, x, _ = problem(3, 100)
    y = np.einsum("grc,ngc->ngr", dense, x) + 2.0
    for held_out in (None, moments(x[:20], y[:20])):
        found = sparse_target(dense, moments(x, y), held_out)
        np.testing.assert_allclose(found.weight, dense, rtol=1e-9, atol=1e-9)
        assert found.error_before == pytest.approx(0.0, abs=1e-9)
        assert found.error_after == pytest.approx(0.0, abs=1e-9)


def test_inputs_that_never_vary_leave_the_dense_weight() -> None:
    dense, _, y = problem(4, 30)
    found = sparse_target(dense, moments(np.ones((30, GROUPS, COLS)), y), None)
    np.testing.assert_allclose(found.weight, dense, atol=1e-9)
    constant = sparse_target(dense, moments(np.zeros((9, GROUPS, COLS)), np.ones((9, GROUPS, ROWS))), None)
    assert constant.weight.tolist() == dense.tolist()
    assert relative(constant) == (0.0, 0.0)


def test_inputs_that_vary_by_float32_rounding_only_leave_the_dense_weight() -> None:
    dense, x, y = problem(8, 64)
    x[:, 0] = 0.1 + np.arange(COLS) / 3.0
    narrow = x.astype(np.float32)
    accumulator = CrossMomentsAccumulator(MatMulGeometry(groups=GROUPS))
    accumulator.update(narrow[:, :, None, :], y[:, :, None, :].astype(np.float32))
    fit = accumulator.result()
    assert np.count_nonzero(fit.inputs.centred[0]) == 0
    found = sparse_target(dense, fit, None)
    np.testing.assert_allclose(found.weight[0], dense[0], rtol=1e-9)
    assert not np.allclose(found.weight[1], dense[1], rtol=1e-3)


def test_a_direction_without_data_keeps_its_dense_weights() -> None:
    dense, x, y = problem(5, 200)
    x[:, :, 2] = 0.0
    found = sparse_target(dense, moments(x, y), None)
    np.testing.assert_allclose(found.weight[:, :, 2], dense[:, :, 2], rtol=1e-9)
    assert not np.allclose(found.weight[:, :, 1], dense[:, :, 1], rtol=1e-3)


def test_few_noisy_samples_are_not_trusted() -> None:
    """Fitted to 6 samples of pure noise, judged by many clean ones: the blend stays near the dense weight."""
    dense, x, _ = problem(6, 600, noise=0.0)
    y = np.einsum("grc,ngc->ngr", dense, x)
    noisy = y[:6] + 20.0 * np.random.default_rng(0).normal(size=y[:6].shape)
    found = sparse_target(dense, moments(x[:6], noisy), moments(x[6:], y[6:]))
    assert 0.0 <= found.blend < 0.2
    assert found.error_after <= found.error_before + 1e-12


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(1, 40),
    held=st.integers(1, 30),
    noise=st.floats(0.0, 5.0),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6)),
)
def test_blend_is_a_fraction_and_never_hurts_its_judge(
    seed: int, samples: int, held: int, noise: float, shape: tuple[int, int, int]
) -> None:
    dense, x, y = problem(seed, samples + held, noise, shape)
    judge = moments(x[samples:], y[samples:])
    found = sparse_target(dense, moments(x[:samples], y[:samples]), judge)
    assert np.isfinite(found.weight).all()
    assert 0.0 <= found.blend <= 1.0
    assert found.error_after <= found.error_before * (1 + 1e-9) + 1e-9
    grid = [direct_error(dense, x[samples:], y[samples:])]
    best = sparse_target(dense, moments(x[:samples], y[:samples]), None)
    if found.blend > 0:
        grid += [
            direct_error(dense + t * (best.weight - dense), x[samples:], y[samples:])
            for t in np.linspace(0, 1, 11)
        ]
    reached = direct_error(found.weight, x[samples:], y[samples:])
    assert reached <= min(grid) * (1 + 1e-5) + 1e-7 * (1 + grid[0])
