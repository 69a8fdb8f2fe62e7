"""What the moments of a layer with few samples are shrunk towards.

A classifier behind a global average pooling sees one vector for each sample, often fewer than it has columns. Each of
them is the mean of many positions, and how these vary within the samples tells which directions of the input there are:
a better guess at the covariance of new samples than the unit matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from pot_sparsity.algorithms.arrays import Float64, Moments
from pot_sparsity.graph.graph import Graph
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.pooling import before_pooling
from pot_sparsity.pipeline.solve import DenseLayer

#: Part of the unit matrix in every prior, so that directions without any variance are not free.
UNIT = 0.01


def layers_before_pooling(graph: Graph, layers: Sequence[Layer]) -> list[Layer]:
    """Those of the layers that read a mean over space, as if they read what it is the mean of."""
    found = (before_pooling(graph, layer) for layer in layers)
    return [layer for layer in found if layer is not None]


def with_priors(
    dense: Sequence[DenseLayer], moments: Mapping[str, Moments], positions: Mapping[str, Moments]
) -> list[DenseLayer]:
    """The layers, those with moments of single ``positions`` with a prior; ``moments`` are those of their means."""
    return [
        replace(item, prior=prior_matrix(positions[item.layer.name], moments[item.layer.name]))
        if item.layer.name in positions
        else item
        for item in dense
    ]


def prior_matrix(positions: Moments, means: Moments) -> Float64:
    """Covariance within samples, scaled to a mean diagonal of 1, with a little of the unit matrix.

    ``[groups, cols, cols]``, float64; what the second moments of positions and of their means over each sample
    differ by (the law of total variance).
    """
    cols = means.mean.shape[-1]
    unit = np.eye(cols)
    within = positions.second - means.second
    level = np.einsum("gcc->g", within)[:, None, None] / cols
    # Rounding alone where every sample is constant over space: such a group has no prior of its own.
    varies = level > 1e-6 * np.einsum("gcc->g", means.second)[:, None, None] / cols
    scaled = np.divide(within, level, out=np.zeros_like(within), where=varies)
    return np.where(varies, (1.0 - UNIT) * scaled + UNIT * unit, unit)
