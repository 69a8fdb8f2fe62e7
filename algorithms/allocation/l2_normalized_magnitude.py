"""L2-normalised magnitude: the POT paper's criterion for networks with fused BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import LayerWeights, by_scores
from pot_sparsity.algorithms.arrays import Float64


def l2_normalized_magnitude(
    layers: Sequence[LayerWeights], sparsity: float, *, max_layer_sparsity: float = 1.0
) -> dict[str, int]:
    """Threshold ``I(w) = |w| / ||W_l||_2`` globally (POT section 3, equation for ``I(w_i^l)``).

    ``||W_l||_2`` is the root of the sum of squares of all weights of layer l; a layer's scale has no
    influence.

    Parameters
    ----------
    layers, sparsity, max_layer_sparsity
        As for :class:`~pot_sparsity.algorithms.allocation.base.Allocation`.

    Returns
    -------
    dict
        Number of zeros by layer name.
    """
    return by_scores(layers, sparsity, max_layer_sparsity, _score)


def _score(magnitudes: Float64) -> Float64:
    magnitudes /= (
        magnitudes.max()
    )  # first to 0..1: squares of very small or large weights would leave the range
    magnitudes /= np.sqrt(magnitudes @ magnitudes)
    return magnitudes
