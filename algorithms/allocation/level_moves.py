"""What the solvers over levels share: which levels are worth their price, what a budget allows, and local moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.curves import Choice, Curve, choose
from pot_sparsity.algorithms.arrays import Bool, Float64

# A cost fits if it is above the budget by no more than the rounding of a sum.
_ROUNDING = 1e-12
# Levels around the present one that moves may go to, over all layers, and the most moves made.
_MOVES = 1600
_STEPS = 200


def affordable(cost: Float64, budget: float) -> Bool:
    """Whether each cost fits the budget, up to the rounding of a sum of floats."""
    return np.asarray(cost <= budget * (1.0 + _ROUNDING), dtype=np.bool_)


def check_budget(curves: Sequence[Curve], budgets: Mapping[str, float]) -> None:
    """Refuse what no choice can satisfy; ValueError names the budget and the least that is possible."""
    if not curves:
        raise ValueError("no curves to choose levels from")
    if not budgets:
        raise ValueError("no budget to keep")
    for kind, budget in budgets.items():
        if not np.isfinite(budget):
            raise ValueError(f"the budget of {kind!r} must be finite, got {budget}")
        least = float(sum(float(curve.cost(kind).min()) for curve in curves))
        if least > budget * (1.0 + _ROUNDING):
            raise ValueError(
                f"a budget of {budget:g} {kind!r} is out of reach: the cheapest levels of all {len(curves)} layers "
                f"cost {least:g} together; raise the budget or measure cheaper levels"
            )


def pareto_levels(cost: Float64, distortion: Float64) -> Int64:
    """Levels that no other is as cheap as and at least as good as, by ascending cost and falling distortion.

    Of equal levels the first is kept.
    """
    order = np.lexsort((distortion, cost))
    falling = distortion[order]
    best_before = np.append(np.inf, np.minimum.accumulate(falling)[:-1])
    return np.asarray(order[falling < best_before], dtype=np.int64)


def improve_levels(curves: Sequence[Curve], budgets: Mapping[str, float], levels: Int64) -> Choice:
    """Change the level of one layer, or of two at once, as long as that lowers the distortion within all budgets.

    The best move of all is made each time; of equals the first. Networks of many layers and levels only try the
    levels around the present one, so that one step looks at a million pairs at most.

    Parameters
    ----------
    curves
        One for each layer.
    budgets
        By kind of cost. The levels given must keep them.
    levels
        ``[layers]``.
    """
    layers = _Layers(curves, list(budgets))
    limits = np.array([budget * (1.0 + _ROUNDING) for budget in budgets.values()])
    current = levels.copy()
    least = 1e-12 * max(float(np.abs(layers.distortion).max()), 1e-300)
    for _ in range(_STEPS):
        move = layers.best_move(current, limits)
        if move is None or not move[0] < -least:
            break
        for entry in move[1]:
            current[layers.owner[entry]] = layers.level[entry]
    return choose(curves, current)


class _Layers:
    """All levels of all layers in one list, ``[entries]``, the levels of a layer by ascending first cost."""

    def __init__(self, curves: Sequence[Curve], kinds: Sequence[str]) -> None:
        orders = [np.lexsort((curve.distortion, curve.cost(kinds[0]))) for curve in curves]
        self.level = np.concatenate(orders)
        self.owner = np.repeat(np.arange(len(curves)), [order.size for order in orders])
        self.distortion = np.concatenate(
            [curve.distortion[order] for curve, order in zip(curves, orders, strict=True)]
        )
        self.costs = np.stack(
            [
                np.concatenate([curve.cost(kind)[order] for curve, order in zip(curves, orders, strict=True)])
                for kind in kinds
            ]
        )
        ends = np.cumsum([order.size for order in orders])
        self.starts = np.append(0, ends[:-1])
        # Entry of each level of each layer.
        self.entry = [np.argsort(order, kind="stable") for order in orders]
        self.reach = max(1, _MOVES // (2 * len(curves)))

    def best_move(self, levels: Int64, limits: Float64) -> tuple[float, list[int]] | None:
        """Change of distortion, and entries to move to: the best single or double move within the limits."""
        here = np.array(
            [
                start + entry[level]
                for start, entry, level in zip(self.starts, self.entry, levels, strict=True)
            ]
        )
        present = here[self.owner]
        gain = self.distortion - self.distortion[present]
        cost = self.costs - self.costs[:, present]
        room = limits - self.costs[:, here].sum(axis=1)
        near = np.abs(np.arange(self.owner.size) - present) <= self.reach
        better = np.flatnonzero(near & (gain < 0.0))
        if better.size == 0:
            return None
        # A second move only pays by lowering some cost; entry -1 is not to move a second layer.
        paying = np.append(-1, np.flatnonzero(near & (cost < 0.0).any(axis=0)))
        total = gain[better][:, None] + np.where(paying < 0, 0.0, gain[paying])[None, :]
        allowed = self.owner[better][:, None] != np.where(paying < 0, -1, self.owner[paying])[None, :]
        for row, left in zip(cost, room, strict=True):
            allowed &= row[better][:, None] + np.where(paying < 0, 0.0, row[paying])[None, :] <= left
        total[~allowed] = np.inf
        first, second = np.unravel_index(int(total.argmin()), total.shape)
        entries = [int(better[first])] + ([int(paying[second])] if paying[second] >= 0 else [])
        return float(total[first, second]), entries
