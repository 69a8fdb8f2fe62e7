from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.pruning.problem import LayerProblem
from pot_sparsity.algorithms.pruning.tableau import Tableau
from tests.algorithms.pruning.layers import make_layer


@given(st.integers(0, 999), st.integers(1, 10), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=40)
def test_a_core_is_a_part_of_the_swept_matrix(seed: int, cols: int, width: int, data: st.DataObject) -> None:
    target, second = make_layer(seed, 1, 1, cols)
    kept = np.zeros(cols, np.bool_)
    kept[np.random.default_rng(seed).permutation(cols)[: data.draw(st.integers(0, cols))]] = True
    problem = LayerProblem.of(target, second)
    matrix, wanted = problem.correlation[0], target[0, 0] * problem.scale[0, 0]
    tableau = Tableau(matrix, wanted, kept, np.ones(cols, np.bool_))
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    swept, state = np.zeros((cols, cols)), np.zeros(cols)
    inverse = np.linalg.inv(matrix[np.ix_(inside, inside)])
    across = inverse @ matrix[np.ix_(inside, outside)]
    swept[np.ix_(inside, inside)] = -inverse
    swept[np.ix_(inside, outside)], swept[np.ix_(outside, inside)] = across, across.T
    swept[np.ix_(outside, outside)] = (
        matrix[np.ix_(outside, outside)] - matrix[np.ix_(outside, inside)] @ across
    )
    state[inside] = inverse @ matrix[inside] @ wanted
    state[outside] = ((wanted - np.where(kept, state, 0.0)) @ matrix)[outside]
    core = tableau.core(width)
    assert core.kept == min(width, len(inside))
    assert kept[core.columns].tolist() == [True] * core.kept + [False] * (len(core.columns) - core.kept)
    np.testing.assert_allclose(
        core.matrix, swept[np.ix_(core.columns, core.columns)], rtol=1e-6, atol=1e-8 * abs(swept).max()
    )
    np.testing.assert_allclose(core.state, state[core.columns], rtol=1e-6, atol=1e-8 * (1 + abs(state).max()))
    change, drop, grow = tableau.best_swap(None)
    if change < 0.0:
        assert {drop, grow} <= set(core.columns.tolist())


def test_columns_that_may_not_grow_are_in_no_core() -> None:
    target, second = make_layer(1, 1, 1, 9)
    problem = LayerProblem.of(target, second)
    kept, growable = np.arange(9) < 3, np.arange(9) < 6
    tableau = Tableau(problem.correlation[0], target[0, 0] * problem.scale[0, 0], kept, growable)
    assert tableau.core(9).columns.max() < 6
    assert tableau.core(2).matrix.shape == (4, 4)
    assert tableau.drop_costs() == pytest.approx(tableau.state[:3] ** 2 / -tableau.diagonal[:3])
