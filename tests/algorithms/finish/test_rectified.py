"""Fits behind an activation, against a slow general-purpose minimiser."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.finish import Positions, fit_rectified, rectified_error


def problem(
    seed: int, low: float, high: float, *, skip: bool, groups: int = 1, count: int = 160
) -> tuple[Float64, Float64, Positions]:
    """A half-zero weight, its bias, and noisy inputs against the outputs of the dense weight on clean ones."""
    random = np.random.default_rng(seed)
    rows, cols = 3, 6
    dense = random.normal(size=(groups, rows, cols))
    clean = random.normal(size=(groups, cols, count))
    noisy = clean + 0.3 * random.normal(size=clean.shape)
    branch = random.normal(size=(groups, rows, count))
    inputs = np.concatenate([noisy, np.ones((groups, 1, count))], axis=1)
    weight = np.where(random.random(dense.shape) < 0.5, dense, 0.0)
    return (
        weight,
        np.zeros((groups, rows)),
        Positions(
            inputs.astype(np.float32),
            (dense @ clean + branch).astype(np.float32),
            (branch + 0.1 * random.normal(size=branch.shape)).astype(np.float32) if skip else None,
            low,
            high,
        ),
    )


def objective(joined: Float64, positions: Positions, slack: float) -> float:
    """The convex objective of the module's text, position by position."""
    value = joined @ positions.inputs.astype(np.float64)
    if positions.skip is not None:
        value = value + positions.skip
    target = positions.target.astype(np.float64)
    plain = (value - target) ** 2
    below, above = target <= positions.low, target >= positions.high
    edge = np.zeros_like(value)
    if np.isfinite(positions.low):
        edge = np.where(below, np.maximum(value - positions.low, 0.0) ** 2, edge)
    if np.isfinite(positions.high):
        edge = np.where(above, np.minimum(value - positions.high, 0.0) ** 2, edge)
    mixed = (1.0 - slack) * edge + slack * plain
    return float(np.where(below | above, mixed, plain).sum())


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (-1.0, 1.5), (-np.inf, np.inf)])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("slack", [0.0, 0.3])
def test_reaches_the_minimum(low: float, high: float, skip: bool, slack: float) -> None:
    weight, bias, positions = problem(3, low, high, skip=skip)
    free = np.concatenate([weight != 0, np.ones((1, 3, 1), bool)], axis=-1)

    def slow(values: Float64) -> float:
        joined = np.zeros(free.shape)
        joined[free] = values
        return objective(joined, positions, slack)

    best = minimize(slow, np.zeros(int(free.sum())), method="BFGS", options={"gtol": 1e-4})
    found = fit_rectified(weight, bias, positions, slack=slack, ridge=0.0, iterations=200)
    reached = objective(np.concatenate([found[0], found[1][..., None]], axis=-1), positions, slack)
    assert reached <= best.fun * (1 + 1e-4)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 3),
    count=st.integers(1, 60),
    slack=st.floats(0.0, 1.0),
    skip=st.booleans(),
)
def test_keeps_zeros_and_lowers_the_objective(
    seed: int, groups: int, count: int, slack: float, skip: bool
) -> None:
    weight, bias, positions = problem(seed, 0.0, np.inf, skip=skip, groups=groups, count=count)
    found, moved = fit_rectified(weight, bias, positions, slack=slack, iterations=20)
    assert np.all(found[weight == 0.0] == 0.0)
    before, after = (
        objective(np.concatenate([w, b[..., None]], axis=-1), positions, slack)
        for w, b in ((weight, bias), (found, moved))
    )
    assert after <= before * (1 + 1e-3) + 1e-4


def test_serves_the_activation_better_than_least_squares() -> None:
    weight, bias, positions = problem(5, 0.0, np.inf, skip=True, count=2000)
    plain = rectified_error(*fit_rectified(weight, bias, positions, slack=1.0), positions)
    aware = rectified_error(*fit_rectified(weight, bias, positions, slack=0.0, iterations=50), positions)
    assert aware < 0.95 * plain


def test_leaves_a_perfect_layer_alone() -> None:
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(1, 4, 5)), random.normal(size=(1, 4))
    x = random.normal(size=(1, 5, 100))
    inputs = np.concatenate([x, np.ones((1, 1, 100))], axis=1).astype(np.float32)
    positions = Positions(inputs, (weight @ x + bias[..., None]).astype(np.float32), None, 0.0)
    found, moved = fit_rectified(weight, bias, positions)
    np.testing.assert_allclose(found, weight, atol=1e-5)
    np.testing.assert_allclose(moved, bias, atol=1e-5)
    assert rectified_error(found, moved, positions) < 1e-9


def test_refuses_what_does_not_fit() -> None:
    weight, bias, positions = problem(0, 0.0, np.inf, skip=False)
    with pytest.raises(ValueError, match="does not fit inputs"):
        fit_rectified(weight[..., :-1], bias, positions)
    inputs = positions.inputs.copy()
    inputs[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        fit_rectified(weight, bias, Positions(inputs, positions.target, None, 0.0))
