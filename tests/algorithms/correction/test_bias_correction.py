from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.correction import activation_bias_correction

sizes = st.integers(1, 6)


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, sizes, st.integers(0, 2**32 - 1))
def test_the_mean_of_the_output_is_restored(groups: int, rows: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    dense = random.normal(size=(groups, rows, cols))
    sparse = np.where(random.random(dense.shape) < 0.5, 0.0, dense)
    inputs = random.normal(1.0, 1.0, size=(groups, cols, 50))
    bias = random.normal(size=(groups, rows))

    corrected = activation_bias_correction(dense, sparse, inputs.mean(axis=2), bias)

    for group in range(groups):
        before = dense[group] @ inputs[group] + bias[group][:, None]
        after = sparse[group] @ inputs[group] + corrected[group][:, None]
        np.testing.assert_allclose(after.mean(axis=1), before.mean(axis=1), atol=1e-10)


def test_nothing_pruned_leaves_the_bias_to_the_bit() -> None:
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(2, 3, 4)), random.normal(size=(2, 3))
    result = activation_bias_correction(weight, weight, random.normal(size=(2, 4)), bias)
    np.testing.assert_array_equal(result, bias)


def test_shapes_that_do_not_fit() -> None:
    weight = np.zeros((2, 3, 4))
    with pytest.raises(
        ValueError, match=r"needs a mean \[2, 4\] and a bias \[2, 3\], got \[4\] and \[2, 3\]"
    ):
        activation_bias_correction(weight, weight, np.zeros(4), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"got \[2, 4\] and \[6\]"):
        activation_bias_correction(weight, weight, np.zeros((2, 4)), np.zeros(6))
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] dense and \[2, 3, 5\] sparse"):
        activation_bias_correction(weight, np.zeros((2, 3, 5)), np.zeros((2, 4)), np.zeros((2, 3)))
