"""Damped Gauss-Newton steps and the folding of outputs, against plain linear algebra."""

from __future__ import annotations

import numpy as np
import pytest

from pot_sparsity.algorithms.finish import NormalEquations, sketch


@pytest.mark.parametrize("ridge", [1e-9, 0.1, 10.0])
def test_step_is_the_damped_least_squares_solution(ridge: float) -> None:
    random = np.random.default_rng(1)
    jacobian = random.normal(size=(7, 4, 5)).astype(np.float32)
    residual = random.normal(size=(7, 4)).astype(np.float32)
    equations = NormalEquations(5)
    equations.add(jacobian[:3], residual[:3])
    equations.add(jacobian[3:], residual[3:])
    a = jacobian.reshape(-1, 5).astype(np.float64)
    second = a.T @ a
    level = ridge * np.trace(second) / 5
    wanted = np.linalg.solve(second + level * np.eye(5), a.T @ residual.ravel())
    np.testing.assert_allclose(equations.step(ridge), wanted, rtol=1e-4, atol=1e-6)


def test_nothing_moves_what_does_not_matter() -> None:
    equations = NormalEquations(3)
    equations.add(np.zeros((2, 2, 3), np.float32), np.ones((2, 2), np.float32))
    assert np.array_equal(equations.step(0.1), np.zeros(3))


def test_refuses_shapes_and_values() -> None:
    equations = NormalEquations(3)
    with pytest.raises(ValueError, match="does not fit residuals"):
        equations.add(np.zeros((2, 2, 4), np.float32), np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        equations.add(np.full((2, 2, 3), np.nan, np.float32), np.zeros((2, 2), np.float32))


def test_sketch_keeps_lengths_on_average() -> None:
    values = np.random.default_rng(2).normal(size=1000).astype(np.float32)
    lengths = [float(np.sum((sketch(1000, 64, seed) @ values) ** 2)) for seed in range(200)]
    assert np.mean(lengths) == pytest.approx(float(np.sum(values**2)), rel=0.05)
    assert sketch(1000, 64, 0).shape == (64, 1000)


def test_few_outputs_are_not_folded() -> None:
    values = np.arange(5, dtype=np.float32)
    assert np.array_equal(sketch(5, 64, 0) @ values, values)
