"""Re-estimating batch normalization: the statistics it would take from the sparse model's own activations.

Absolute, so it inherits whatever distinguishes the calibration samples from those the network was trained on: it
changes a dense model too, unlike :func:`~pot_sparsity.algorithms.correction.differential.differential_correction`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.correction.differential import ChannelStatistics

#: Gains are bounded by the normalization's epsilon alone.
UNBOUNDED = (float(np.finfo(np.float64).tiny), float("inf"))


@dataclass(frozen=True)
class FusedBatchNorm:
    """The normalization ``gamma (z - mean) / sqrt(variance + epsilon) + beta`` that a layer absorbed.

    The mean is not kept: new statistics replace it whatever it was.

    Attributes
    ----------
    gamma, beta, variance
        Float64 ``[channels]``.
    epsilon
        What is added to the variance.
    """

    gamma: Float64
    beta: Float64
    variance: Float64
    epsilon: float


def reestimated_statistics(norm: FusedBatchNorm, output: ChannelStatistics) -> ChannelStatistics:
    """Mean and variance that a layer's output gets when its normalization takes new statistics from it.

    With ``s`` the variance of the output as it is, the variance before the normalization is
    ``v = s (variance + epsilon) / gamma^2``; normalized by ``v`` the output has the mean ``beta`` and the variance
    ``gamma^2 v / (v + epsilon)``.

    Parameters
    ----------
    norm
        The normalization that was fused into the layer.
    output
        Statistics of the layer's present output.

    Returns
    -------
    ChannelStatistics
        The target of a correction of the layer's scale and bias.

    Raises
    ------
    ValueError
        Where the numbers of channels differ.
    """
    if norm.gamma.shape != output.var.shape:
        raise ValueError(
            f"a normalization of {norm.gamma.size} channels does not fit an output of {output.var.size}"
        )
    power = np.square(norm.gamma)
    before = output.var * (norm.variance + norm.epsilon)  # v gamma^2
    denominator = before + norm.epsilon * power
    share = np.divide(before, denominator, out=np.zeros_like(before), where=denominator > 0.0)
    return ChannelStatistics(output.count, norm.beta, power * share)
