"""Zeros per layer rounded to a grid of levels, so that models of many budgets share the solutions of their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.arrays import Float64


def level_grid(lower: int, upper: int, size: int, ratio: float) -> Int64:
    """Numbers of zeros whose densities are ``ratio^i``, between two bounds, and the bounds themselves; ascending.

    Parameters
    ----------
    lower, upper
        Fewest and most zeros, ``0 <= lower <= upper <= size``.
    size
        Weights of the layer.
    ratio
        Of neighbouring densities, above 0 and below 1.

    Raises
    ------
    ValueError
        Bounds or ratio out of range.
    """
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"the ratio of densities must be above 0 and below 1, got {ratio:g}")
    if not 0 <= lower <= upper <= size:
        raise ValueError(f"bounds must satisfy 0 <= lower <= upper <= {size}, got {lower} and {upper}")
    steps = np.arange(int(np.ceil(np.log(max(size, 2)) / -np.log(ratio))) + 1)
    zeros = np.rint((1.0 - ratio**steps) * size).astype(np.int64)
    inside = zeros[(zeros > lower) & (zeros < upper)]
    return np.unique(np.concatenate([[lower], inside, [upper]])).astype(np.int64)


def round_to_levels(
    demand: Int64, sizes: Int64, grids: Sequence[Int64], keeps: Callable[[Int64], bool]
) -> Int64:
    """A level for each layer, near to what it was asked for, such that the whole keeps its bound.

    Every layer takes the nearer of its two levels around the demand, by the logarithm of the density. If that breaks
    the bound, layers go up, those nearest to their upper level first; then they go down again, those nearest to their
    lower level first, wherever the bound allows it.

    Parameters
    ----------
    demand
        Zeros asked of each layer, ``[layers]``; they keep the bound.
    sizes
        Weights of each layer, ``[layers]``.
    grids
        Levels of each layer, ascending, with levels on both sides of (or at) its demand.
    keeps
        Whether numbers of zeros ``[layers]`` keep the bound; more zeros never break it.

    Returns
    -------
    array
        ``[layers]``.
    """
    above = np.array([grid[np.searchsorted(grid, zeros)] for grid, zeros in zip(grids, demand, strict=True)])
    below = np.array(
        [grid[np.searchsorted(grid, zeros, "right") - 1] for grid, zeros in zip(grids, demand, strict=True)]
    )
    part = _part_of_gap(sizes - demand, sizes - below, sizes - above)
    order = np.argsort(-part, kind="stable")
    chosen = np.where(part >= 0.5, above, below)
    for index in order:
        if keeps(chosen):
            break
        chosen[index] = above[index]
    for index in order[::-1]:
        if chosen[index] > below[index]:
            chosen[index] = below[index]
            if not keeps(chosen):
                chosen[index] = above[index]
    return np.asarray(chosen, dtype=np.int64)


def _part_of_gap(kept: Int64, most: Int64, fewest: Int64) -> Float64:
    """How far along from ``most`` kept weights to ``fewest`` each layer is, 0 to 1, ``[layers]``."""
    logs = [np.log1p(counts.astype(np.float64)) for counts in (kept, most, fewest)]
    gap = logs[1] - logs[2]
    return np.asarray(np.divide(logs[1] - logs[0], gap, out=np.zeros_like(gap), where=gap > 0.0))
