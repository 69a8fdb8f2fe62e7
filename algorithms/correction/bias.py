"""Activation-bias correction: put the mean that pruning took from a layer's output into its bias."""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Float64


def activation_bias_correction(
    dense_weight: Float64, sparse_weight: Float64, mean: Float64, bias: Float64
) -> Float64:
    """``b' = b + (W* - W) E[x]``, the one-shot correction on the dense model's inputs (POT section 3).

    The paper's ``b + E(f(W_dense, X)) - E(f(W_corr, X))``, exact because a layer is linear in its unfolded
    input.

    Parameters
    ----------
    dense_weight, sparse_weight
        Weight before and after pruning, ``[groups, rows, cols]``.
    mean
        Mean of the layer's unfolded input, ``[groups, cols]``.
    bias
        Bias before, ``[groups, rows]``; zeros where the layer has none.

    Returns
    -------
    ndarray
        Corrected bias, float64 ``[groups, rows]``.

    Raises
    ------
    ValueError
        Where the shapes do not fit.
    """
    if dense_weight.ndim != 3 or sparse_weight.shape != dense_weight.shape:
        raise ValueError(
            f"weights must both be [groups, rows, cols], got {list(dense_weight.shape)} dense and "
            f"{list(sparse_weight.shape)} sparse"
        )
    groups, rows, cols = dense_weight.shape
    if mean.shape != (groups, cols) or bias.shape != (groups, rows):
        raise ValueError(
            f"a weight {[groups, rows, cols]} needs a mean {[groups, cols]} and a bias {[groups, rows]}, "
            f"got {list(mean.shape)} and {list(bias.shape)}"
        )
    return np.asarray(bias + np.einsum("grc,gc->gr", dense_weight - sparse_weight, mean))
