from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64, Moments
from pot_sparsity.algorithms.correction import (
    ChannelStatistics,
    differential,
    differential_correction,
    output_statistics,
)

SEEDS = st.integers(0, 2**32 - 1)


def statistics(output: Float64) -> ChannelStatistics:
    """The oracle: output ``[groups, rows, samples]``, two passes in float64."""
    flat = output.reshape(-1, output.shape[-1])
    return ChannelStatistics(float(flat.shape[1]), flat.mean(axis=1), flat.var(axis=1))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data(), SEEDS)
def test_statistics_of_any_channel_axis(shape: list[int], data: st.DataObject, seed: int) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor = np.random.default_rng(seed).normal(3.0, 2.0, size=shape).astype(np.float32)
    found = ChannelStatistics.of(tensor, axis)
    values = np.moveaxis(tensor.astype(np.float64), axis, 0).reshape(tensor.shape[axis], -1)
    assert found.count == values.shape[1]
    np.testing.assert_allclose(found.mean, values.mean(axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.var, values.var(axis=1), rtol=1e-10, atol=1e-12)


def test_statistics_of_channels_spread_over_axes() -> None:
    """A stack of three matrix products: output [N, 3, m, out], channel = (stack, out)."""
    tensor = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    found = ChannelStatistics.of(tensor, (-3, -1))
    values = tensor.transpose(1, 3, 0, 2).reshape(15, 8)
    assert found.count == 8
    np.testing.assert_allclose(found.mean, values.mean(axis=1), atol=1e-14)
    np.testing.assert_allclose(found.var, values.var(axis=1), atol=1e-14)


@pytest.mark.parametrize("shape", [(40, 3, 31, 29), (200_000, 3, 1, 1), (1, 3, 400, 300)])
def test_statistics_over_many_chunks_with_a_large_mean(shape: tuple[int, ...]) -> None:
    assert np.prod(shape) > differential.CHUNK
    tensor = np.random.default_rng(0).normal(1e4, 1e-2, size=shape)
    found = ChannelStatistics.of(tensor, 1)
    np.testing.assert_allclose(found.mean, tensor.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.var, tensor.var(axis=(0, 2, 3)), rtol=1e-8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), SEEDS)
def test_merging_equals_the_union(lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [random.normal(random.normal() + 1e5, 1.0, size=(length, 4)) for length in lengths]
    merged = ChannelStatistics.merge([ChannelStatistics.of(part, 1) for part in parts])
    union = np.concatenate(parts)
    assert merged.count == len(union)
    np.testing.assert_allclose(merged.mean, union.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.var, union.var(axis=0), rtol=1e-8, atol=1e-8)


def test_merging_step_by_step_keeps_a_small_spread_on_a_large_mean() -> None:
    random = np.random.default_rng(0)
    batches = random.normal(1e6, 1e-3, size=(200, 16, 2))
    merged = ChannelStatistics.of(batches[0], 1)
    for batch in batches[1:]:
        merged = ChannelStatistics.merge([merged, ChannelStatistics.of(batch, 1)])
    np.testing.assert_allclose(merged.var, batches.reshape(-1, 2).var(axis=0), rtol=1e-5)


def test_merging_and_taking_statistics_of_nothing() -> None:
    with pytest.raises(ValueError, match="no statistics given"):
        ChannelStatistics.merge([])
    with pytest.raises(ValueError, match="zero values"):
        ChannelStatistics.merge([ChannelStatistics(0.0, np.zeros(2), np.zeros(2))])
    with pytest.raises(ValueError, match=r"no values to take statistics of: the tensor is \[0, 3\]"):
        ChannelStatistics.of(np.zeros((0, 3)), 1)
    with pytest.raises(ValueError, match=r"a tensor \[2, 3\] has no channel axis 2"):
        ChannelStatistics.of(np.zeros((2, 3)), 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), SEEDS)
def test_output_statistics_from_moments(groups: int, rows: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs = random.normal(random.normal(), 1.0, size=(groups, cols, 30))
    weight, bias = random.normal(size=(groups, rows, cols)), random.normal(size=(groups, rows))
    moments = Moments(30.0, inputs.mean(axis=2), inputs @ inputs.transpose(0, 2, 1) / 30)

    found = output_statistics(weight, bias, moments)

    expected = statistics(weight @ inputs + bias[:, :, None])
    assert found.count == 30.0
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-10)
    np.testing.assert_allclose(found.var, expected.var, atol=1e-10)


def test_output_variance_is_never_negative() -> None:
    moments = Moments(5.0, np.full((1, 2), 1e8), np.full((1, 2, 2), 1e16 - 8.0))
    found = output_statistics(np.ones((1, 3, 2)), np.zeros((1, 3)), moments)
    assert (found.var == 0.0).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), SEEDS)
def test_correction_restores_mean_and_spread(groups: int, rows: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs = random.normal(1.0, 1.0, size=(groups, cols, 60))
    dense, bias = random.normal(size=(groups, rows, cols)), random.normal(size=(groups, rows))
    sparse = np.where(np.abs(dense) < 0.6, 0.0, dense)
    before = statistics(dense @ inputs + bias[:, :, None])
    pruned = statistics(sparse @ inputs + bias[:, :, None])

    weight, new_bias, gamma = differential_correction(sparse, bias, before, pruned)

    after = statistics(weight @ inputs + new_bias[:, :, None])
    np.testing.assert_array_equal(weight == 0.0, sparse == 0.0)
    assert gamma.shape == (groups, rows)
    np.testing.assert_allclose(after.mean, before.mean, atol=1e-10)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(before.var / pruned.var)
    dead = (sparse == 0.0).all(axis=2).ravel()
    expected = np.where(dead, 1.0, np.clip(ratio, 0.5, 2.0))
    np.testing.assert_allclose(gamma.ravel(), expected, rtol=1e-9)
    met = ~dead & (ratio > 0.5) & (ratio < 2.0)
    np.testing.assert_allclose(after.var[met], before.var[met], rtol=1e-8)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), SEEDS, st.booleans())
def test_equal_statistics_change_nothing_to_the_bit(groups: int, rows: int, seed: int, scale: bool) -> None:
    random = np.random.default_rng(seed)
    weight, bias = random.normal(size=(groups, rows, 4)), random.normal(size=(groups, rows))
    outputs = random.normal(5.0, 3.0, size=(7, groups * rows, 3)).astype(np.float32)
    one, other = ChannelStatistics.of(outputs, 1), ChannelStatistics.of(outputs.copy(), 1)

    new_weight, new_bias, gamma = differential_correction(weight, bias, one, other, scale=scale)

    assert (gamma == 1.0).all()
    np.testing.assert_array_equal(new_weight, weight)
    np.testing.assert_array_equal(new_bias, bias)


def channels(mean: list[float], var: list[float]) -> ChannelStatistics:
    return ChannelStatistics(10.0, np.array(mean), np.array(var))


def test_gamma_is_clipped_and_one_where_the_output_is_constant() -> None:
    dense = channels([0.0, 0.0, 1.0, 1.0, 3.0], [100.0, 0.01, 4.0, 4.0, 0.0])
    sparse = channels([0.0, 0.0, 0.0, 1e6, 3.0], [1.0, 1.0, 0.0, 1e-3, 0.0])
    weight, bias = np.ones((1, 5, 1)), np.arange(5.0)[None]

    new_weight, new_bias, gamma = differential_correction(weight, bias, dense, sparse)
    np.testing.assert_array_equal(gamma, [[2.0, 0.5, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(new_weight[0, :, 0], gamma[0])
    np.testing.assert_allclose(new_bias, dense.mean - gamma * (sparse.mean - bias))

    wider = differential_correction(weight, bias, dense, sparse, clip=(0.01, 20.0))[2]
    np.testing.assert_allclose(wider, [[10.0, 0.1, 1.0, 1.0, 1.0]])


def test_without_scale_only_the_bias_moves() -> None:
    dense, sparse = channels([1.0, 2.0], [4.0, 4.0]), channels([0.5, 3.0], [1.0, 9.0])
    weight, bias = np.ones((2, 1, 3)), np.array([[0.1], [0.2]])
    new_weight, new_bias, gamma = differential_correction(weight, bias, dense, sparse, scale=False)
    np.testing.assert_array_equal(new_weight, weight)
    np.testing.assert_array_equal(gamma, np.ones((2, 1)))
    np.testing.assert_allclose(new_bias, [[0.6], [-0.8]])


@pytest.mark.parametrize("clip", [(0.0, 2.0), (1.1, 2.0), (0.5, 0.9), (-1.0, 2.0), (float("nan"), 2.0)])
def test_clip_out_of_range(clip: tuple[float, float]) -> None:
    stats = channels([0.0], [1.0])
    with pytest.raises(ValueError, match="clip must be"):
        differential_correction(np.ones((1, 1, 1)), np.zeros((1, 1)), stats, stats, clip=clip)


def test_shapes_that_do_not_fit() -> None:
    two, three = channels([0.0] * 2, [1.0] * 2), channels([0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="3 dense and 2 sparse channels do not fit together"):
        differential_correction(np.ones((1, 2, 1)), np.zeros((1, 2)), three, two)
    with pytest.raises(ValueError, match="do not fit together"):
        differential_correction(np.ones((1, 2, 1)), np.zeros(2), two, two)
