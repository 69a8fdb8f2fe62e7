"""Re-estimated statistics of an absorbed normalization, against one that was never absorbed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.correction import (
    UNBOUNDED,
    ChannelStatistics,
    FusedBatchNorm,
    differential_correction,
    reestimated_statistics,
)

SEEDS = st.integers(0, 2**32 - 1)


def normalized(z: Float64, norm: FusedBatchNorm, mean: Float64, variance: Float64) -> Float64:
    """Batch normalization by the book; ``z`` is ``[channels, values]``."""
    scaled = (z - mean[:, None]) / np.sqrt(variance + norm.epsilon)[:, None]
    return np.asarray(norm.gamma[:, None] * scaled + norm.beta[:, None])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.sampled_from([1e-5, 1e-3, 0.5]), SEEDS)
def test_it_does_what_the_normalization_would_have_done(channels: int, epsilon: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight, bias = random.normal(size=(1, channels, 4)), random.normal(size=channels)
    inputs = random.normal(random.normal(), 1.0, size=(4, 50)) * random.choice([1e-3, 1.0, 30.0])
    gamma = random.normal(size=channels) * random.integers(0, 2, size=channels)
    norm = FusedBatchNorm(gamma, random.normal(size=channels), random.uniform(0.1, 2.0, channels), epsilon)
    mean = random.normal(size=channels)
    factor = gamma / np.sqrt(norm.variance + epsilon)
    fused = factor[None, :, None] * weight, (factor * (bias - mean) + norm.beta)[None]
    output = fused[0][0] @ inputs + fused[1].T
    present = ChannelStatistics(50.0, output.mean(axis=1), output.var(axis=1))

    target = reestimated_statistics(norm, present)
    corrected, shifted, _ = differential_correction(*fused, target, present, UNBOUNDED)

    z = weight[0] @ inputs + bias[:, None]
    expected = normalized(z, norm, z.mean(axis=1), z.var(axis=1))
    np.testing.assert_allclose(corrected[0] @ inputs + shifted.T, expected, atol=1e-7)


def test_its_own_statistics_change_nothing() -> None:
    random = np.random.default_rng(1)
    norm = FusedBatchNorm(random.normal(size=3), random.normal(size=3), random.uniform(0.5, 2.0, 3), 1e-3)
    own = np.square(norm.gamma) * norm.variance / (norm.variance + norm.epsilon)
    target = reestimated_statistics(norm, ChannelStatistics(9.0, norm.beta, own))
    np.testing.assert_allclose(target.var, own, rtol=1e-14)
    np.testing.assert_array_equal(target.mean, norm.beta)


def test_a_constant_output_gets_the_mean_alone() -> None:
    norm = FusedBatchNorm(np.array([1.0, 0.0]), np.array([0.3, 0.4]), np.ones(2), 0.0)
    present = ChannelStatistics(5.0, np.array([7.0, 8.0]), np.zeros(2))
    target = reestimated_statistics(norm, present)
    weight, bias, gain = differential_correction(
        np.ones((1, 2, 1)), np.zeros((1, 2)), target, present, UNBOUNDED
    )
    np.testing.assert_array_equal(gain, 1.0)
    np.testing.assert_array_equal(weight, 1.0)
    np.testing.assert_allclose(bias, [[0.3 - 7.0, 0.4 - 8.0]])


def test_channels_that_do_not_fit_are_refused() -> None:
    norm = FusedBatchNorm(np.ones(2), np.ones(2), np.ones(2), 1e-5)
    with pytest.raises(ValueError, match="a normalization of 2 channels does not fit an output of 3"):
        reestimated_statistics(norm, ChannelStatistics(1.0, np.zeros(3), np.ones(3)))


def test_statistics_about_zero() -> None:
    values = np.random.default_rng(2).normal(1.0, 2.0, size=(40, 3))
    found = ChannelStatistics.of(values, 1).about_zero
    np.testing.assert_array_equal(found.mean, 0.0)
    np.testing.assert_allclose(found.var, np.square(values).mean(axis=0), rtol=1e-12)
