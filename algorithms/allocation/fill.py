"""The last few weights: from an allocation close to the total to exactly the number of zeros asked for."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.curves import Curve


def fill(curves: Sequence[Curve], zeros: Int64, total: int, lower: Int64, upper: Int64) -> Int64:
    """Add or take away zeros where the curves are flattest or steepest, until there are ``total``.

    Zeros are added where the next one costs least distortion, and taken away where that gains most, from one
    level of a curve to the next; with convex curves the change has the least distortion possible. Equal slopes:
    the earlier layer first.

    Parameters
    ----------
    curves
        One for each layer, with the cost ``nonzeros``. Beyond its last level a layer only goes when all others
        are at their bounds; below its first level it comes for free.
    zeros
        Number of zeros per layer to start from, ``[layers]``; brought between the bounds first.
    total
        Number of zeros over all layers.
    lower, upper
        Bounds of each layer, ``[layers]``.

    Returns
    -------
    Int64
        ``[layers]``, ``total`` together.

    Raises
    ------
    ValueError
        ``total`` is not between the sums of the bounds.

    Notes
    -----
    Time ``O((layers + levels crossed) log layers)``.
    """
    if not int(lower.sum()) <= total <= int(upper.sum()):
        raise ValueError(
            f"{total} zeros cannot be reached: the bounds of the layers allow {int(lower.sum())} to {int(upper.sum())}"
        )
    counts = np.clip(zeros, lower, upper)
    missing = total - int(counts.sum())
    sign = 1 if missing > 0 else -1
    ends = upper if sign > 0 else lower
    heap = [(_slope(curves[index], int(counts[index]), sign)[0], index) for index in range(len(curves))]
    heapq.heapify(heap)
    while missing != 0:
        _, index = heapq.heappop(heap)
        at = int(counts[index])
        reach = _slope(curves[index], at, sign)[1]
        step = min(abs(missing), abs(int(ends[index]) - at), reach)
        if step == 0:
            continue
        counts[index] += sign * step
        missing -= sign * step
        heapq.heappush(heap, (_slope(curves[index], int(counts[index]), sign)[0], index))
    return counts


def _slope(curve: Curve, at: int, sign: int) -> tuple[float, int]:
    """Rise of distortion per zero in one direction, and the number of zeros to the next level there."""
    zeros, distortion = curve.knots
    beyond = int(
        np.searchsorted(zeros, at, side="right" if sign > 0 else "left")
    )  # first knot above, or at or above
    if beyond == zeros.size:
        # Past the last level: the last to go, the first to come back.
        return (np.inf, curve.size) if sign > 0 else (-np.inf, at - int(zeros[-1]))
    if beyond == 0:
        return 0.0, (int(zeros[0]) - at if sign > 0 else curve.size)
    slope = (distortion[beyond] - distortion[beyond - 1]) / float(zeros[beyond] - zeros[beyond - 1])
    return float(sign * slope), int(zeros[beyond] - at if sign > 0 else at - zeros[beyond - 1])
