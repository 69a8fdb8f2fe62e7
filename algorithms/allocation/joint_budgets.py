"""Several budgets at once, by Lagrange multipliers: one price for each kind of cost.

For fixed prices the kinds merge into one cost, whose frontier (:mod:`pot_sparsity.algorithms.allocation.hull`) holds
the best choice for every overall price level; of its breakpoints, the best that keeps all budgets counts. So only the
ratios of the prices are searched for, one coordinate after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.budget_dp import solve_bucketed
from pot_sparsity.algorithms.allocation.curves import Choice, Curve, choose
from pot_sparsity.algorithms.allocation.hull import merge_hulls
from pot_sparsity.algorithms.allocation.level_moves import affordable, check_budget, improve_levels
from pot_sparsity.algorithms.arrays import Float64

# Factors by which a price is raised and lowered, coarse to fine.
_FACTORS = (16.0, 4.0, 2.0, 1.2)
# Choices improved by exchanges.
_STARTS = 8


def solve_joint(curves: Sequence[Curve], budgets: Mapping[str, float]) -> Choice:
    """A choice of low distortion that keeps every budget.

    Parameters
    ----------
    curves
        One for each layer, with all kinds of cost.
    budgets
        Most that all layers together may cost, by kind.

    Raises
    ------
    ValueError
        A budget that no choice keeps; or no choice was found that keeps all of them together. Where one level of
        each layer is the cheapest in every kind, that never happens; else the search is complete, up to the
        buckets of the dynamic program, for two budgets, and may miss a choice for more.

    Notes
    -----
    Where the best choice for one budget happens to keep the others, that is the answer. Otherwise prices are
    searched for, each set of which takes one sort of all levels; a few dozen are tried. The best choices found are
    improved by exchanges between layers.
    """
    check_budget(curves, budgets)
    for kind, budget in budgets.items():
        alone = solve_bucketed(curves, kind, budget)
        if all(affordable(np.array(alone.costs[other]), limit) for other, limit in budgets.items()):
            return alone
    search = _Search(curves, budgets)
    search.try_prices(np.ones(len(budgets)))
    for index in range(len(budgets)):
        search.try_prices(np.where(np.arange(len(budgets)) == index, 1.0, 0.0))
    for factor in _FACTORS:
        search.refine(factor)
    starts = search.best(_STARTS) or [_any_choice(curves, budgets)]
    return min(
        (improve_levels(curves, budgets, levels) for levels in starts), key=lambda choice: choice.distortion
    )


class _Search:
    """Tries prices, remembers the choices that fit, and the ``prices [budgets]`` of the best."""

    def __init__(self, curves: Sequence[Curve], budgets: Mapping[str, float]) -> None:
        self.curves = curves
        self.budgets = budgets
        # A budget of zero leaves only levels without cost: any scale will do.
        scales = [budget or 1.0 for budget in budgets.values()]
        self.costs: list[Float64] = [
            np.stack([curve.cost(kind) / scale for kind, scale in zip(budgets, scales, strict=True)])
            for curve in curves
        ]
        self.distortions = [curve.distortion for curve in curves]
        self.table = np.concatenate(self.costs, axis=1)
        self.offsets = np.append(0, np.cumsum([curve.distortion.size for curve in curves])[:-1])
        self.limits = np.array([1.0 if budget else 0.0 for budget in budgets.values()])
        self.prices = np.ones(len(budgets))
        self.found: list[tuple[float, Int64]] = []
        self.distortion = np.inf
        self.excess = np.inf

    def try_prices(self, prices: Float64) -> bool:
        """Walk the frontier at these prices; True where it holds something better than so far."""
        frontier = merge_hulls(self.distortions, [prices @ cost for cost in self.costs])
        starts = self.table[:, self.offsets + frontier.start].sum(axis=1)
        totals = starts[:, None] + self._changes(frontier.start, frontier.layer, frontier.level)
        over = (totals - self.limits[:, None]).max(axis=0)
        fits = np.logical_and.reduce(
            [affordable(row, float(limit)) for row, limit in zip(totals, self.limits, strict=True)]
        )
        if not fits.any():
            nearest = float(over.min())
            if not self.found and nearest < self.excess:
                self.excess, self.prices = nearest, prices
                return True
            return False
        # The best that fits, and one or two steps earlier ones as starting points for exchanges.
        fitting = np.flatnonzero(fits)[np.argsort(frontier.distortion[fits], kind="stable")]
        self.found += [(float(frontier.distortion[at]), frontier.levels_after(int(at))) for at in fitting[:3]]
        if not frontier.distortion[fitting[0]] < self.distortion:
            return False
        self.distortion, self.prices = float(frontier.distortion[fitting[0]]), prices
        return True

    def best(self, number: int) -> list[Int64]:
        """The levels ``[layers]`` of the best different choices that fit, the best first."""
        different: dict[tuple[int, ...], Int64] = {}
        for _, levels in sorted(self.found, key=lambda found: found[0]):
            different.setdefault(tuple(levels.tolist()), levels)
        return list(different.values())[:number]

    def refine(self, factor: float) -> None:
        """Raise and lower one price after the other as long as that helps."""
        for index in range(self.prices.size):
            for power in (factor, 1.0 / factor):
                for _ in range(8):
                    # A price of zero can only grow from something.
                    prices = np.where(self.prices > 0.0, self.prices, 1e-3 * self.prices.max())
                    prices[index] *= power
                    if not self.try_prices(prices / prices.max()):
                        break

    def _changes(self, start: Int64, layer: Int64, level: Int64) -> Float64:
        """How much each cost has changed after 0, 1, ... steps, ``[budgets, steps + 1]``."""
        order = np.argsort(layer, kind="stable")  # all steps of one layer after the other
        before = np.empty_like(level)
        before[order] = np.append(0, level[order][:-1])
        first = order[np.flatnonzero(np.diff(layer[order], prepend=-1))]
        before[first] = start[layer[first]]
        changes = self.table[:, self.offsets[layer] + level] - self.table[:, self.offsets[layer] + before]
        return np.cumsum(np.pad(changes, ((0, 0), (1, 0))), axis=1)


def _any_choice(curves: Sequence[Curve], budgets: Mapping[str, float]) -> Int64:
    """Levels that keep all budgets: the least of the other costs together, within the first budget."""
    first, *others = budgets
    summed = [
        Curve(
            curve.name,
            curve.size,
            np.asarray(
                sum(curve.cost(kind) / (budgets[kind] or 1e-300) for kind in others), dtype=np.float64
            ),
            {first: curve.cost(first)},
        )
        for curve in curves
    ]
    levels = solve_bucketed(summed, first, budgets[first]).levels
    costs = choose(curves, levels).costs
    missed = [kind for kind in others if not affordable(np.array(costs[kind]), budgets[kind])]
    if missed:
        reached = ", ".join(f"{costs[kind]:g} {kind!r} for {budgets[kind]:g}" for kind in missed)
        raise ValueError(
            f"no choice of levels keeps all budgets at once ({', '.join(budgets)}): within {budgets[first]:g} "
            f"{first!r} the least found is {reached}; raise one of the budgets"
        )
    return levels
