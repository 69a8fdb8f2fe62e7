"""Correction: repairing the statistics that pruning disturbed, without gradients."""

from __future__ import annotations

from pot_sparsity.algorithms.correction.batch_norm import UNBOUNDED, FusedBatchNorm, reestimated_statistics
from pot_sparsity.algorithms.correction.bias import activation_bias_correction
from pot_sparsity.algorithms.correction.differential import (
    ChannelStatistics,
    differential_correction,
    output_statistics,
)
from pot_sparsity.algorithms.correction.weight_statistics import (
    exact_weight_correction,
    pot_weight_correction,
)

__all__ = [
    "UNBOUNDED",
    "ChannelStatistics",
    "FusedBatchNorm",
    "activation_bias_correction",
    "differential_correction",
    "exact_weight_correction",
    "output_statistics",
    "pot_weight_correction",
    "reestimated_statistics",
]
