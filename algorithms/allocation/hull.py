"""All budgets at once: the lower convex hull of each layer's levels, and one greedy path through all of them.

Going from the cheapest choice to the best one, the hull step with the steepest fall of distortion per cost comes
first. Stopped anywhere, that is the optimum of the Lagrangian ``distortion + price * cost`` for some price, hence
the best choice for what it costs. Between two stops a budget leaves something over: no more than one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.curves import Choice, Curve
from pot_sparsity.algorithms.allocation.level_moves import (
    affordable,
    check_budget,
    improve_levels,
    pareto_levels,
)
from pot_sparsity.algorithms.arrays import Float64

# How many steps before the last that a budget allows exchanges may start: on networks of 25 uneven layers these
# bring the gap to the optimum from 0.8 % to 0.1 % on average; more change nothing.
_BACK = (0, 1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Frontier:
    """The sorted breakpoints of all budgets.

    Attributes
    ----------
    start
        Cheapest level of each layer, ``[layers]``.
    layer, level
        Step by step: which layer goes to which level, ``[steps]``.
    cost, distortion
        Sums over all layers before the first step and after each, ``[steps + 1]``: cost rises, distortion falls,
        convex.
    """

    start: Int64
    layer: Int64
    level: Int64
    cost: Float64
    distortion: Float64

    def allocation_at(self, budget: float) -> Int64:
        """Levels ``[layers]`` of the last breakpoint within the budget, by bisection.

        Raises
        ------
        ValueError
            The budget is below the cheapest choice.
        """
        return self.levels_after(self._steps_within(budget))

    def last_within(self, budget: float) -> list[Int64]:
        """Levels of the last breakpoint within the budget and of some before it."""
        steps = self._steps_within(budget)
        return [self.levels_after(steps - back) for back in _BACK if back <= steps]

    def levels_after(self, steps: int) -> Int64:
        """Levels ``[layers]`` after so many steps."""
        levels = self.start.copy()
        levels[self.layer[:steps]] = self.level[:steps]  # of repeated layers numpy keeps the last
        return levels

    def lower_bound(self, budget: float) -> float:
        """Distortion below which no choice within the budget gets: the line between two breakpoints."""
        self._steps_within(budget)
        return float(np.interp(budget, self.cost, self.distortion))

    def _steps_within(self, budget: float) -> int:
        steps = int(np.count_nonzero(affordable(self.cost[:1], budget))) and int(
            np.searchsorted(self.cost, budget * (1.0 + 1e-12), side="right")
        )
        if steps == 0:
            raise ValueError(
                f"a budget of {budget:g} is out of reach: the cheapest choice costs {self.cost[0]:g}"
            )
        return steps - 1


def trace_frontier(curves: Sequence[Curve], kind: str) -> Frontier:
    """The frontier of one kind of cost.

    Time ``O(n log n)`` in the number of levels of all layers. Steps of equal slope go in the order of the layers.

    Raises
    ------
    ValueError
        No curves, or one without this kind of cost.
    """
    if not curves:
        raise ValueError("no curves to choose levels from")
    return merge_hulls([curve.distortion for curve in curves], [curve.cost(kind) for curve in curves])


def solve_hull(curves: Sequence[Curve], kind: str, budget: float) -> Choice:
    """The frontier's choice for one budget, with what the budget leaves over spent by exchanges between layers.

    Exchanges of two layers get stuck where it would take three, so they start from several of the last
    breakpoints, and the best result counts.

    Raises
    ------
    ValueError
        The budget is below what the cheapest levels cost together; no curves.
    """
    check_budget(curves, {kind: budget})
    return min(
        (
            improve_levels(curves, {kind: budget}, levels)
            for levels in trace_frontier(curves, kind).last_within(budget)
        ),
        key=lambda choice: choice.distortion,
    )


def merge_hulls(distortions: Sequence[Float64], costs: Sequence[Float64]) -> Frontier:
    """The frontier of layers given as arrays, each ``[levels]``."""
    hulls = [lower_hull(cost, distortion) for cost, distortion in zip(costs, distortions, strict=True)]
    layer = np.repeat(np.arange(len(hulls)), [hull.size - 1 for hull in hulls])
    level = np.concatenate([hull[1:] for hull in hulls])
    before = np.concatenate([hull[:-1] for hull in hulls])
    rise = _differences(costs, layer, level, before)
    fall = _differences(distortions, layer, level, before)
    order = np.argsort(fall / rise, kind="stable")  # slopes of one layer rise, so its steps stay in order
    first_cost = sum(float(cost[hull[0]]) for cost, hull in zip(costs, hulls, strict=True))
    first_distortion = sum(float(values[hull[0]]) for values, hull in zip(distortions, hulls, strict=True))
    return Frontier(
        np.array([hull[0] for hull in hulls], dtype=np.int64),
        layer[order],
        level[order],
        first_cost + np.append(0.0, np.cumsum(rise[order])),
        first_distortion + np.append(0.0, np.cumsum(fall[order])),
    )


def lower_hull(cost: Float64, distortion: Float64) -> Int64:
    """Levels on the lower convex hull, from the cheapest to the best; levels on a line between two are left out."""
    levels = pareto_levels(cost, distortion)
    hull: list[tuple[float, float, int]] = []
    slopes: list[float] = []
    for x, y, level in zip(cost[levels].tolist(), distortion[levels].tolist(), levels.tolist(), strict=True):
        while hull:
            slope = (y - hull[-1][1]) / (x - hull[-1][0])
            if slopes and slope <= slopes[-1]:
                hull.pop()
                slopes.pop()
                continue
            slopes.append(slope)
            break
        hull.append((x, y, level))
    return np.array([point[2] for point in hull], dtype=np.int64)


def _differences(values: Sequence[Float64], layer: Int64, after: Int64, before: Int64) -> Float64:
    starts = np.append(0, np.cumsum([part.size for part in values])[:-1])[layer]
    flat = np.concatenate(values)
    return np.asarray(flat[starts + after] - flat[starts + before], dtype=np.float64)
