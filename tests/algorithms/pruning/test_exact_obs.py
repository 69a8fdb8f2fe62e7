from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64, Pattern
from pot_sparsity.algorithms.pruning import obs_trace
from pot_sparsity.algorithms.pruning.exact_obs import exact_obs
from pot_sparsity.algorithms.pruning.parallel import RowPool
from tests.algorithms.pruning.layers import make_layer, textbook_obs


@given(st.integers(0, 9999), st.integers(1, 2), st.integers(1, 5), st.integers(1, 14), st.floats(0, 1))
@settings(deadline=None, max_examples=80)
def test_masks_equal_the_textbook(seed: int, groups: int, rows: int, cols: int, sparsity: float) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    zeros = round(sparsity * target.size)
    result = exact_obs(target, second, zeros)
    np.testing.assert_array_equal(result.mask, textbook_obs(target, second, zeros))


@pytest.mark.parametrize(("lazy", "ahead"), [(1, 2), (3, 1), (7, 9), (7, 40)])
def test_columns_computed_ahead_change_nothing(
    lazy: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, second = make_layer(1, 1, 5, 23)
    monkeypatch.setattr(obs_trace, "_LAZY", lazy)
    monkeypatch.setattr(obs_trace, "_AHEAD", ahead)
    monkeypatch.setattr(obs_trace, "_MEMORY", 2 * 8 * 23**2)
    for zeros in (30, 60, 100):
        np.testing.assert_array_equal(
            exact_obs(target, second, zeros).mask, textbook_obs(target, second, zeros)
        )


def test_single_precision_orders_wide_layers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    target, second = make_layer(2, 1, 4, 40)
    exact = exact_obs(target, second, 80)
    monkeypatch.setattr(obs_trace, "_SINGLE_COLS", 1)
    single = exact_obs(target, second, 80)
    assert single.error == pytest.approx(exact.error, rel=1e-2)


def test_rows_that_need_more_than_the_first_trace_are_traced_on() -> None:
    target, second = make_layer(3, 1, 6, 30)
    target[0, 0] *= 1e-3
    result = exact_obs(target, second, 60)
    assert np.count_nonzero(~result.mask[0, 0]) == 30
    np.testing.assert_array_equal(result.mask, textbook_obs(target, second, 60))


def _block_trace(weight: Float64, inverse: Float64, size: int) -> list[tuple[int, float]]:
    """Block OBS as printed, on a materialised inverse."""
    weight, inverse, trace = weight.copy(), inverse.copy(), []
    left = list(range(len(weight) // size))
    while left:
        losses = []
        for b in left:
            p = slice(b * size, (b + 1) * size)
            losses.append(float(weight[p] @ np.linalg.solve(inverse[p, p], weight[p])))
        b = left.pop(int(np.argmin(losses)))
        p = slice(b * size, (b + 1) * size)
        trace.append((b, min(losses)))
        gain = np.linalg.solve(inverse[p, p], inverse[p])
        weight = weight - weight[p] @ gain
        inverse = inverse - inverse[:, p] @ gain
    return trace


@pytest.mark.parametrize("size", [2, 3])
def test_blocks_go_in_the_textbook_order(size: int) -> None:
    target, second = make_layer(4, 1, 3, 12)
    inverse = np.linalg.inv(second[0])
    count = 12 // size
    with RowPool(1) as pool:
        order, losses = obs_trace.trace_blocks(target[0], inverse, size, count, pool)
    for row in range(3):
        expected = _block_trace(target[0, row], inverse, size)
        assert order[row].tolist() == [block for block, _ in expected]
        np.testing.assert_allclose(losses[row], [loss for _, loss in expected], rtol=1e-6)


def test_n_of_m_goes_in_the_textbook_order() -> None:
    target, second = make_layer(5, 1, 4, 12)
    mask = exact_obs(target, second, 0, Pattern("n:m", n=1, m=3)).mask
    for row in range(4):
        weight, inverse = target[0, row].copy(), np.linalg.inv(second[0])
        gone: list[int] = []
        for _ in range(8):
            able = [p for p in range(12) if p not in gone and sum(q // 3 == p // 3 for q in gone) < 2]
            p = min(able, key=lambda p: weight[p] ** 2 / inverse[p, p])
            gone.append(p)
            weight -= weight[p] / inverse[p, p] * inverse[p]
            inverse -= np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        assert sorted(gone) == np.flatnonzero(~mask[0, row]).tolist()
