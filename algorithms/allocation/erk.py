"""Erdos-Renyi-Kernel: density from the shape of a layer alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import LayerWeights, find_limits, named, share_out


def erk(
    layers: Sequence[LayerWeights], sparsity: float, *, max_layer_sparsity: float = 1.0, power: float = 1.0
) -> dict[str, int]:
    """Make each layer's density proportional to ``(sum of dimensions / product of dimensions) ** power``.

    The dimensions are input channels per group, output channels and the kernel's; a linear layer has only the
    first two. Layers whose density would exceed 1 stay dense and the others are rescaled, repeatedly.

    Parameters
    ----------
    layers, sparsity, max_layer_sparsity
        As for :class:`~pot_sparsity.algorithms.allocation.base.Allocation`.
    power
        0 makes it uniform, 1 is the published form, 0.5 a common compromise; 0..10.

    Returns
    -------
    dict
        Number of zeros by layer name.

    References
    ----------
    Evci et al., "Rigging the lottery", ICML 2020, section 3.
    """
    if not 0.0 <= power <= 10.0:
        raise ValueError(f"power must be between 0 and 10, got {power}")
    limits = find_limits(layers, sparsity, max_layer_sparsity)
    density = np.array([_density(layer) for layer in layers]) ** power
    kept = share_out(
        int(limits.sizes.sum()) - limits.zeros,
        density * limits.sizes,
        limits.sizes - limits.upper,
        limits.sizes - limits.lower,
    )
    return named(layers, limits.sizes - kept)


def _density(layer: LayerWeights) -> float:
    dimensions = (layer.in_channels_per_group, layer.out_channels, *layer.kernel)
    return sum(dimensions) / math.prod(dimensions)
