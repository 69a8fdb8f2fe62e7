"""LAMP: layer-adaptive magnitude scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import LayerWeights, by_scores
from pot_sparsity.algorithms.arrays import Float64


def lamp(
    layers: Sequence[LayerWeights], sparsity: float, *, max_layer_sparsity: float = 1.0
) -> dict[str, int]:
    """Threshold ``w_u^2 / sum_{v >= u} w_v^2`` globally, the weights of each layer in ascending order.

    Of weights with equal magnitude the later one in the order has the higher score, as in the paper's
    definition by index, so that every weight of a layer has a place of its own. The largest weight of each
    layer scores 1.

    Parameters
    ----------
    layers, sparsity, max_layer_sparsity
        As for :class:`~pot_sparsity.algorithms.allocation.base.Allocation`.

    Returns
    -------
    dict
        Number of zeros by layer name.

    References
    ----------
    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, equation 4.
    """
    return by_scores(layers, sparsity, max_layer_sparsity, _score)


def _score(magnitudes: Float64) -> Float64:
    magnitudes.sort()  # scores leave in this order; only the values matter, so no index sort is needed
    magnitudes /= magnitudes[-1]  # squares stay in range
    np.square(magnitudes, out=magnitudes)
    return np.asarray(magnitudes / np.cumsum(magnitudes[::-1])[::-1])
