"""Sparse inputs, dense targets: what to fit a layer's weights to once the layers before it have changed.

With the sparse model's input ``x_s`` and the dense model's output ``y_d`` on the same samples, the best dense
weight is ``W* = G_c H_c^-1`` with ``H_c = cov(x_s)`` and ``G_c = cov(y_d, x_s)``; the bias follows as
``E[y_d] - W E[x_s]``. Every solver then runs unchanged on ``(W*, H_c)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.moments import CrossMoments

#: Ridge towards the dense weight, relative to the mean diagonal of H: directions without data stay as they were.
RIDGE = 1e-4
#: Least ridge, relative to the mean second moment: a variance below it is rounding noise of float32 products.
ROUNDING = 1e-8
#: How often the ridge may grow tenfold.
STEPS = 10
#: Blends between the dense weight (0) and the reconstructed target (1) are kept within these bounds.
BLEND_BOUNDS = (0.0, 1.0)


@dataclass(frozen=True)
class SparseTarget:
    """What to prune or refit against.

    Attributes
    ----------
    weight
        ``[groups, rows, cols]``.
    blend
        How far it went from the dense weight (0) to the least-squares optimum (1).
    error_before, error_after
        Relative error of the dense weight and of this one on the slice that chose the blend, bias refitted.
    """

    weight: Float64
    blend: float
    error_before: float
    error_after: float


def output_error(weight: Float64, moments: CrossMoments) -> float:
    """``E|y_d - W x_s - b|^2`` with the best bias, summed over output channels."""
    variance = float((moments.output_power - moments.output_mean**2).sum())
    cross = float((weight * moments.centred_cross).sum())
    energy = float(((weight @ moments.inputs.centred) * weight).sum())
    return max(0.0, variance - 2.0 * cross + energy)


def sparse_target(
    dense: Float64,
    fit: CrossMoments,
    held_out: CrossMoments | None,
    *,
    ridge: float = RIDGE,
    prior: Float64 | None = None,
) -> SparseTarget:
    """Least-squares target on the sparse model's inputs, blended with the dense weight.

    Parameters
    ----------
    dense
        The dense weight, ``[groups, rows, cols]``.
    fit
        Moments of the samples the target is fitted to.
    held_out
        Moments of other samples, which choose the blend (in closed form: the error is a parabola in it);
        None takes the optimum as it is.
    ridge
        Weight of ``|W - W_dense|^2``, relative to the mean diagonal of H.
    prior
        ``[groups, cols, cols]``, positive definite, with a mean diagonal of 1: ``P`` where the ridge is to be
        ``tr((W - W_dense) P (W - W_dense)^T)``.
    """
    centred = fit.inputs.centred
    cols = centred.shape[-1]
    varies = np.einsum("gcc->gc", centred) > 0.0  # a constant input tells nothing: its weights stay dense
    cross = np.where(varies[:, None, :], fit.centred_cross, 0.0)
    level = ridge * np.einsum("gcc->g", centred) / cols
    level = np.maximum(level, ROUNDING * np.einsum("gcc->g", fit.inputs.second) / cols)
    level = np.where(level > 0, level, 1.0)
    metric = np.broadcast_to(np.eye(cols), centred.shape) if prior is None else prior
    best = np.stack(
        [_ridge(centred[g], cross[g], dense[g], float(level[g]), metric[g]) for g in range(len(dense))]
    )
    judge = held_out or fit
    step = best - dense
    curvature = float(((step @ judge.inputs.centred) * step).sum())
    slope = float((step * (judge.centred_cross - dense @ judge.inputs.centred)).sum())
    blend = float(np.clip(slope / curvature, *BLEND_BOUNDS)) if curvature > 0 else 0.0
    if held_out is None and curvature > 0:
        blend = 1.0
    weight = dense + blend * step
    scale = float((judge.output_power - judge.output_mean**2).sum())
    relative = [output_error(w, judge) / scale if scale > 0 else 0.0 for w in (dense, weight)]
    return SparseTarget(weight, blend, relative[0], relative[1])


def _ridge(second: Float64, cross: Float64, dense: Float64, level: float, metric: Float64) -> Float64:
    """``argmin tr(W H W^T) - 2 tr(W G^T) + level |W - W_dense|^2`` in the metric; rounding may ask for more."""
    for _ in range(STEPS):
        try:
            factor = cho_factor(second + level * metric, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            level *= 10.0
            continue
        return np.asarray(cho_solve(factor, (cross + level * dense @ metric).T, check_finite=False).T)
    raise np.linalg.LinAlgError(
        "covariance of the layer's input is too indefinite: no ridge makes it solvable"
    )
