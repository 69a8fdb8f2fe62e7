"""Uniform allocation: the same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import LayerWeights, find_limits, named, share_out


def uniform(
    layers: Sequence[LayerWeights],
    sparsity: float,
    *,
    max_layer_sparsity: float = 1.0,
    protect_first_last: bool = False,
) -> dict[str, int]:
    """Give every layer the same sparsity.

    Parameters
    ----------
    layers, sparsity, max_layer_sparsity
        As for :class:`~pot_sparsity.algorithms.allocation.base.Allocation`.
    protect_first_last
        Leave the first and the last layer as they are (POT section 3, "pruning uniformly except for the first
        and the last layers"). They lose weights only where all other layers together cannot hold the total.

    Returns
    -------
    dict
        Number of zeros by layer name.
    """
    limits = find_limits(layers, sparsity, max_layer_sparsity)
    sizes = limits.sizes.astype(np.float64)
    upper = limits.upper.copy()
    if protect_first_last:
        upper[[0, -1]] = limits.lower[[0, -1]]
    counts = share_out(min(limits.zeros, int(upper.sum())), sizes, limits.lower, upper)
    return named(layers, share_out(limits.zeros, sizes, counts, limits.upper))
