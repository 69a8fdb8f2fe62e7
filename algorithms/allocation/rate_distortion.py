"""Allocation by measured output distortion (rate-distortion pruning): curves in, zeros per layer out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64, LayerWeights, find_limits, named
from pot_sparsity.algorithms.allocation.budget_dp import solve_bucketed
from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.algorithms.allocation.fill import fill
from pot_sparsity.algorithms.allocation.hull import solve_hull

LevelSolver: TypeAlias = Literal["dynamic_program", "hull"]


def rate_distortion(
    layers: Sequence[LayerWeights],
    sparsity: float,
    *,
    max_layer_sparsity: float = 1.0,
    curves: Mapping[str, Curve],
    solver: LevelSolver = "dynamic_program",
) -> dict[str, int]:
    """The allocation of least summed distortion of the network's output (equations 8 to 12).

    Parameters
    ----------
    layers, sparsity, max_layer_sparsity
        As for :class:`~pot_sparsity.algorithms.allocation.base.Allocation`.
    curves
        By layer name, with the cost ``nonzeros``.
    solver
        See :func:`allocate_zeros`.

    Raises
    ------
    ValueError
        As for every allocation; and where a layer has no curve or one for another number of weights.
    """
    limits = find_limits(layers, sparsity, max_layer_sparsity)
    for layer in layers:
        if layer.name not in curves:
            raise ValueError(f"layer {layer.name!r} has no rate-distortion curve")
        if curves[layer.name].size != layer.size:
            raise ValueError(
                f"layer {layer.name!r} has {layer.size} weights, but its curve was measured for "
                f"{curves[layer.name].size}"
            )
    ordered = [curves[layer.name] for layer in layers]
    return named(layers, allocate_zeros(ordered, limits.zeros, limits.lower, limits.upper, solver=solver))


def allocate_zeros(
    curves: Sequence[Curve],
    total: int,
    lower: Int64,
    upper: Int64,
    *,
    solver: LevelSolver = "dynamic_program",
) -> Int64:
    """Number of zeros per layer that makes the sum of distortions least, ``total`` together, to the weight.

    Levels between the bounds, and the bounds themselves, are the choices of the solver; what its levels have
    more than ``total`` zeros is given back by :func:`~pot_sparsity.algorithms.allocation.fill.fill`.

    Parameters
    ----------
    curves
        One for each layer, with the cost ``nonzeros``.
    total
        Number of zeros over all layers.
    lower, upper
        Fewest and most zeros of each layer, ``[layers]``. In an iterative procedure ``lower`` is what the layers
        had before.
    solver
        ``dynamic_program`` or ``hull``.

    Raises
    ------
    ValueError
        ``total`` is out of reach within the bounds.
    """
    weights = sum(curve.size for curve in curves)
    if not int(lower.sum()) <= total <= int(upper.sum()):
        raise ValueError(
            f"{total} zeros cannot be reached: the bounds of the layers allow {int(lower.sum())} to {int(upper.sum())}"
        )
    bounded = [
        curve.bounded(low, high)
        for curve, low, high in zip(curves, lower.tolist(), upper.tolist(), strict=True)
    ]
    solve = solve_bucketed if solver == "dynamic_program" else solve_hull
    choice = solve(bounded, NONZEROS, float(weights - total))
    zeros = np.array(
        [curve.zeros[level] for curve, level in zip(bounded, choice.levels, strict=True)], dtype=np.int64
    )
    return fill(bounded, zeros, total, lower, upper)


def round_totals(weights: int, zeros: int, total: int, removed: float = 0.2) -> Iterator[int]:
    """Totals of zeros of an iterative procedure: each round removes a part of the weights that are left.

    Parameters
    ----------
    weights, zeros
        All weights, and those already zero.
    total
        Number of zeros to end with; the last total yielded.
    removed
        Part of the remaining weights that one round removes, above 0 and below 1 (section 4.1: 0.2).

    Raises
    ------
    ValueError
        ``removed`` out of range, or ``total`` not between ``zeros`` and ``weights``.
    """
    if not 0.0 < removed < 1.0:
        raise ValueError(f"the part removed in a round must be above 0 and below 1, got {removed}")
    if not 0 <= zeros <= total <= weights:
        raise ValueError(f"{total} zeros cannot be reached from {zeros} of {weights} weights")
    while zeros < total:
        zeros = min(total, zeros + max(1, round(removed * (weights - zeros))))
        yield zeros
