"""Global magnitude: one threshold on ``|w|`` over all layers."""

from __future__ import annotations

from collections.abc import Sequence

from pot_sparsity.algorithms.allocation.base import LayerWeights, by_scores
from pot_sparsity.algorithms.arrays import Float64


def magnitude(
    layers: Sequence[LayerWeights],
    sparsity: float,
    *,
    max_layer_sparsity: float = 1.0,
    unfused: bool = False,
) -> dict[str, int]:
    """Remove the weights that are smallest in the whole network.

    Fusing BatchNorm changes the scale of each layer and misleads this criterion (POT section 3 and table 3:
    18 % top-1 against 69.5 % with normalised scores); it is good where BatchNorm is not fused.

    Parameters
    ----------
    layers, sparsity, max_layer_sparsity
        As for :class:`~pot_sparsity.algorithms.allocation.base.Allocation`.
    unfused
        Score ``|w| / |gain|``, the magnitudes as they were before a normalization was fused. The weights of a
        channel whose gain is zero are gone: they count as zeros that exist.

    Returns
    -------
    dict
        Number of zeros by layer name.
    """
    return by_scores(layers, sparsity, max_layer_sparsity, _score, unfused=unfused)


def _score(magnitudes: Float64) -> Float64:
    return magnitudes
