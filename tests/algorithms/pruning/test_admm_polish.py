from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.algorithms.pruning.admm import admm
from pot_sparsity.algorithms.pruning.problem import SolverOptions
from tests.algorithms.pruning.layers import make_layer


def test_the_polished_result_does_not_depend_on_workers() -> None:
    target, second = make_layer(1, 2, 10, 40)
    one, three = (
        admm(target, second, 600, options=SolverOptions(polish=True, workers=workers)) for workers in (1, 3)
    )
    np.testing.assert_array_equal(one.mask, three.mask)
    np.testing.assert_array_equal(one.weight, three.weight)


def test_the_search_finds_more_than_swaps_alone() -> None:
    total = np.zeros(3)
    for zeros in (300, 450, 540):
        target, second = make_layer(2, 1, 10, 60)
        plain = admm(target, second, zeros)
        swaps = admm(target, second, zeros, options=SolverOptions(polish=True, polish_swaps=10**6))
        searched = admm(target, second, zeros, options=SolverOptions(polish=True))
        assert searched.mask.sum() == swaps.mask.sum() == target.size - zeros
        errors = np.array([searched.relative_error, swaps.relative_error, plain.relative_error])
        assert (np.diff(errors) >= 0.0).all()
        total += errors
    assert total[0] < total[1] < total[2]


def test_no_time_is_kept_to() -> None:
    target, second = make_layer(3, 1, 8, 40)
    result = admm(target, second, 200, options=SolverOptions(polish=True, polish_seconds=0.0))
    bare = admm(target, second, 200, options=SolverOptions(effort=2.0, restarts=10))
    np.testing.assert_array_equal(result.mask, bare.mask)


def test_groups_of_n_of_m_are_polished_without_the_search() -> None:
    target, second = make_layer(4, 1, 6, 24)
    pattern = Pattern("n:m", n=2, m=4)
    plain, polished = (
        admm(target, second, 0, pattern, options=SolverOptions(polish=polish)) for polish in (False, True)
    )
    assert (polished.mask.reshape(6, 6, 4).sum(axis=-1) == 2).all()
    assert polished.error <= plain.error
