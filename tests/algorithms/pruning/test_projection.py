from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.algorithms.pruning.projection import block_count, pattern_index, pattern_mask, top_k_mask


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=40), st.data())
@settings(deadline=None, max_examples=100)
def test_top_k_prunes_exactly_the_first_lowest(values: list[int], data: st.DataObject) -> None:
    zeros = data.draw(st.integers(0, len(values)))
    scores = np.array(values, np.float64).reshape(1, 1, -1)
    expected = np.ones(len(values), np.bool_)
    expected[np.argsort(scores.ravel(), kind="stable")[:zeros]] = False
    np.testing.assert_array_equal(top_k_mask(scores, zeros).ravel(), expected)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(2, 5), st.integers(0, 999), st.data())
@settings(deadline=None, max_examples=60)
def test_n_of_m_keeps_the_best_of_every_group(
    channels: int, stride: int, m: int, seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = np.random.default_rng(seed).random((2, 3, channels * stride))
    mask = pattern_mask(scores, 0, Pattern("n:m", n=n, m=m, stride=stride))
    for tap in range(stride):
        for begin in range(0, channels, m):
            members = [c * stride + tap for c in range(begin, min(begin + m, channels))]
            kept = mask[..., members]
            assert (kept.sum(axis=-1) == min(n, len(members))).all()
            worst_kept = np.where(kept, scores[..., members], np.inf).min(axis=-1)
            best_gone = np.where(kept, -np.inf, scores[..., members]).max(axis=-1)
            assert (worst_kept > best_gone).all()


@given(st.integers(1, 9), st.integers(1, 3), st.integers(2, 5), st.floats(0, 1), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_blocks_go_as_a_whole(channels: int, stride: int, size: int, sparsity: float, seed: int) -> None:
    cols = channels * stride
    scores = np.random.default_rng(seed).random((2, 3, cols))
    zeros = round(sparsity * scores.size)
    mask = pattern_mask(scores, zeros, Pattern("block", m=size, stride=stride))
    blocks = [index[index < cols] for index in pattern_index(cols, size, stride)]
    means = np.stack([scores[..., block].mean(axis=-1) for block in blocks], axis=-1)
    kept = np.stack([mask[..., block].all(axis=-1) for block in blocks], axis=-1)
    gone = np.stack([(~mask[..., block]).all(axis=-1) for block in blocks], axis=-1)
    assert (kept ^ gone).all()
    assert gone.sum() == block_count(zeros, scores.size, means.size)
    if kept.any() and gone.any():
        assert means[gone].max() < means[kept].min()


def test_every_column_stands_in_one_group() -> None:
    index = pattern_index(21, 4, 3)
    assert index.shape == (6, 4)
    assert sorted(index[index < 21]) == list(range(21))
    assert index[0].tolist() == [0, 3, 6, 9]


def test_block_count_reaches_both_ends() -> None:
    assert [block_count(zeros, 40, 10) for zeros in (0, 1, 2, 4, 39, 40)] == [0, 0, 1, 1, 10, 10]


def test_a_stride_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="stride 9 does not divide the layer's 10 columns"):
        pattern_index(10, 4, 9)
