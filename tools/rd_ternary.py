"""The dynamic program of rate-distortion pruning with ternary search for its minimum, as section 4.6 has it.

Ternary search finds the lowest point of what falls and then rises; on curves with other ups and downs it ends
anywhere. The package searches all levels, so this is here for the comparison alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.allocation.fill import fill

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
#: Parts that the number of zeros is cut into.
BUCKETS = 4000


def allocate_by_ternary_search(curves: Sequence[Curve], total: int) -> Int64:
    """Zeros of each layer, ``total`` together; equations 10 to 12 over buckets, the rest filled up.

    Parameters
    ----------
    curves
        One for each layer, with the cost ``nonzeros``.
    total
        Number of zeros over all layers, at least 1.
    """
    sizes = np.array([curve.size for curve in curves], dtype=np.int64)
    unit = max(1, -(-total // BUCKETS))
    states = total // unit
    best = np.where(np.arange(states + 1) == 0, 0.0, np.inf)
    reachable, chosen = 0, []
    for curve in curves:
        most = min(curve.size // unit, states)
        own = curve.at(np.arange(most + 1, dtype=np.int64) * unit)
        here = np.arange(states + 1)
        lowest = np.maximum(here - reachable, 0)
        highest = np.minimum(here, most)
        found = _ternary(best, own, here, lowest, highest)
        inside = lowest <= highest
        best = np.where(inside, _value(best, own, here, found), np.inf)
        reachable += most
        chosen.append(found)
    zeros = np.zeros(len(curves), dtype=np.int64)
    left = min(states, reachable)
    for index in reversed(range(len(curves))):
        zeros[index] = chosen[index][left] * unit
        left -= int(chosen[index][left])
    return fill(curves, zeros, total, np.zeros_like(sizes), sizes)


def _ternary(best: Float64, own: Float64, here: Int64, lowest: Int64, highest: Int64) -> Int64:
    """Where the search ends between two bounds, for every state at once."""
    low, high = lowest.copy(), np.maximum(highest, lowest)
    while (high - low > 2).any():
        third = (high - low) // 3
        first, second = low + third, high - third
        falls = _value(best, own, here, first) > _value(best, own, here, second)
        wide = high - low > 2
        low, high = np.where(wide & falls, first, low), np.where(wide & ~falls, second, high)
    candidates = np.stack([low, np.minimum(low + 1, high), high])
    values = np.stack([_value(best, own, here, candidate) for candidate in candidates])
    return np.asarray(np.take_along_axis(candidates, values.argmin(axis=0)[None], axis=0)[0])


def _value(best: Float64, own: Float64, here: Int64, at: Int64) -> Float64:
    """Distortion of each state with ``at`` buckets of zeros in the layer; infinite where it has none so many."""
    inside = at < own.size
    rest = np.clip(here - at, 0, best.size - 1)
    return np.where(inside, best[rest] + own[np.minimum(at, own.size - 1)], np.inf)
