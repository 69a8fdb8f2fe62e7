"""Weight correction: give each output channel of a sparse weight the mean and spread of the dense one.

Statistics are taken per row (output channel) over all columns, zeros included. A weight counts as kept where
the sparse weight is not exactly zero; every other one is exactly zero in the result.
"""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Float64

EPSILON = 1e-9  # the paper's constant for numerical stability
RELATIVE_ZERO = 1e-12  # a spread below this part of the sum of squares is rounding, not spread


def pot_weight_correction(sparse: Float64, dense: Float64) -> Float64:
    """Correct mean and standard deviation as published, then put the zeros back.

    ``W_corr = lambda W_s + E(W_dense) - E(lambda W_s)`` with ``lambda = sigma(W_dense) / (sigma(W_s) +
    1e-9)`` (POT section 3). The shift moves the zeros too; masking them afterwards undoes part of the
    correction, so neither moment is met exactly, and a dense row is changed by a relative ``1e-9 / sigma``.
    For exact moments use :func:`exact_weight_correction`.

    Parameters
    ----------
    sparse, dense
        Weight after and before pruning, ``[groups, rows, cols]``.

    Returns
    -------
    ndarray
        Corrected weight, float64 ``[groups, rows, cols]``.

    Raises
    ------
    ValueError
        Where the shapes differ.
    """
    _check_shapes(sparse, dense)
    factor = dense.std(axis=2, keepdims=True) / (sparse.std(axis=2, keepdims=True) + EPSILON)
    scaled = factor * sparse
    corrected = scaled + dense.mean(axis=2, keepdims=True) - scaled.mean(axis=2, keepdims=True)
    return np.where(sparse != 0.0, corrected, 0.0)


def exact_weight_correction(sparse: Float64, dense: Float64) -> Float64:
    """Restore mean and mean square of each dense row with an affine map of the kept weights alone.

    With K of n weights kept, their sum S1 and sum of squares S2, and the dense row's mean mu and mean square
    q, the kept weights become ``a w + c``::

        a = sqrt((n q - (n mu)^2 / K) / (S2 - S1^2 / K)),    c = (n mu - a S1) / K

    A row is left as it is where this has no solution or no meaning: K <= 1, kept weights all alike, or a
    target that K weights cannot reach (``n q <= (n mu)^2 / K``); and where nothing was pruned (equal rows).

    Parameters
    ----------
    sparse, dense
        Weight after and before pruning, ``[groups, rows, cols]``.

    Returns
    -------
    ndarray
        Corrected weight, float64 ``[groups, rows, cols]``.

    Raises
    ------
    ValueError
        Where the shapes differ.
    """
    _check_shapes(sparse, dense)
    kept = sparse != 0.0
    number = kept.sum(axis=2, keepdims=True)
    divisor = np.maximum(number, 1)
    centre = sparse.sum(axis=2, keepdims=True) / divisor
    deviation = np.where(kept, sparse - centre, 0.0)
    target_centre = dense.sum(axis=2, keepdims=True) / divisor
    target_squares = np.square(dense).sum(axis=2, keepdims=True)

    spread = np.square(deviation).sum(axis=2, keepdims=True)  # S2 - S1^2/K, without its cancellation
    target_spread = target_squares - number * np.square(target_centre)
    solvable = (
        (number > 1)
        & (spread > RELATIVE_ZERO * np.square(sparse).sum(axis=2, keepdims=True))
        & (target_spread > RELATIVE_ZERO * target_squares)
        & (sparse != dense).any(axis=2, keepdims=True)
    )
    factor = np.sqrt(np.divide(target_spread, spread, out=np.ones_like(spread), where=solvable))
    return np.where(kept & solvable, factor * deviation + target_centre, sparse)


def _check_shapes(sparse: Float64, dense: Float64) -> None:
    if sparse.ndim != 3 or sparse.shape != dense.shape:
        raise ValueError(
            f"weights must both be [groups, rows, cols], got {list(sparse.shape)} sparse and "
            f"{list(dense.shape)} dense"
        )
