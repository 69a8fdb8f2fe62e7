"""Zeros per layer within budgets on anything that zeros make cheaper: operations, bytes, seconds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.budget_dp import solve_bucketed
from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.allocation.hull import solve_hull
from pot_sparsity.algorithms.allocation.joint_budgets import solve_joint
from pot_sparsity.algorithms.allocation.level_moves import affordable
from pot_sparsity.algorithms.allocation.rate_distortion import LevelSolver
from pot_sparsity.algorithms.arrays import Float64


@dataclass(frozen=True)
class CostTable:
    """What a layer costs as a function of its number of zeros: straight lines that never rise.

    Attributes
    ----------
    zeros
        Numbers of zeros, ascending, not necessarily whole, ``[knots]``; the cost is constant beyond the outermost.
    costs
        Not negative and not rising, ``[knots]``.

    Raises
    ------
    ValueError
        Shapes that differ, no knots, numbers of zeros that do not ascend, costs that rise, are negative or not finite.
    """

    zeros: Float64
    costs: Float64

    def __post_init__(self) -> None:
        if self.zeros.ndim != 1 or self.zeros.size == 0 or self.zeros.shape != self.costs.shape:
            raise ValueError(
                f"a cost table needs as many costs as numbers of zeros, at least one: got {self.costs.shape} and "
                f"{self.zeros.shape}"
            )
        if not (np.diff(self.zeros) > 0.0).all():
            raise ValueError("the numbers of zeros of a cost table must ascend")
        if not (np.isfinite(self.costs).all() and (self.costs >= 0.0).all()):
            raise ValueError("costs must be finite and not negative")
        if (np.diff(self.costs) > 0.0).any():
            raise ValueError("costs must not rise with the number of zeros")

    def at(self, zeros: Int64) -> Float64:
        """Costs of these numbers of zeros, the shape of ``zeros``."""
        return np.asarray(np.interp(zeros, self.zeros, self.costs), dtype=np.float64)

    def cost(self, zeros: int) -> float:
        """Cost of one number of zeros."""
        return float(np.interp(zeros, self.zeros, self.costs))


#: The tables of one layer by kind of cost.
LayerTables = Mapping[str, CostTable]


def add_costs(curve: Curve, tables: LayerTables) -> Curve:
    """The curve with further kinds of cost, read off at the zeros of each level."""
    further = {kind: table.at(curve.zeros) for kind, table in tables.items()}
    return replace(curve, costs={**curve.costs, **further})


def allocate_within(
    curves: Sequence[Curve],
    tables: Sequence[LayerTables],
    budgets: Mapping[str, float],
    lower: Int64,
    upper: Int64,
    *,
    solver: LevelSolver = "dynamic_program",
) -> Int64:
    """Numbers of zeros with the least sum of distortions that keep every budget, and waste nothing of them.

    Parameters
    ----------
    curves
        One for each layer, with the cost ``nonzeros``.
    tables
        One for each layer, with every kind that has a budget.
    budgets
        Most that all layers together may cost, by kind.
    lower, upper
        Fewest and most zeros of each layer, ``[layers]``.
    solver
        How levels are chosen for one budget; several are
        :func:`~pot_sparsity.algorithms.allocation.joint_budgets.solve_joint`'s.

    Raises
    ------
    ValueError
        A budget is out of reach even with the most zeros in every layer, or there is none.

    Notes
    -----
    Costs never rise with zeros, so the layers' last levels are the cheapest in every kind: what each budget alone
    allows, all together allow.
    """
    bounded = [
        add_costs(curve.bounded(low, high), {kind: table[kind] for kind in budgets})
        for curve, table, low, high in zip(curves, tables, lower.tolist(), upper.tolist(), strict=True)
    ]
    if len(budgets) == 1:
        ((kind, budget),) = budgets.items()
        choice = (solve_hull if solver == "hull" else solve_bucketed)(bounded, kind, budget)
    else:
        choice = solve_joint(bounded, budgets)
    zeros = np.array(
        [curve.zeros[level] for curve, level in zip(bounded, choice.levels, strict=True)], dtype=np.int64
    )
    return give_back(bounded, tables, budgets, zeros, lower)


def give_back(
    curves: Sequence[Curve],
    tables: Sequence[LayerTables],
    budgets: Mapping[str, float],
    zeros: Int64,
    lower: Int64,
) -> Int64:
    """Take zeros away as long as every budget holds: what solvers of whole levels leave over.

    The layer whose distortion falls most for the largest part it takes of what a budget has left comes first, one level
    at a time, the last of them down to single weights. Equally good layers: the earlier one.

    Parameters
    ----------
    curves, tables, budgets, lower
        As for :func:`allocate_within`.
    zeros
        ``[layers]``; keeps the budgets.

    Returns
    -------
    Int64
        ``[layers]``: one zero less in any layer would break a budget, unless the layer is at its lower bound.
    """
    counts = zeros.copy()
    limits = {kind: budget * (1.0 + 1e-12) for kind, budget in budgets.items()}
    spent = {
        kind: sum(table[kind].cost(int(count)) for table, count in zip(tables, counts, strict=True))
        for kind in budgets
    }

    def extra(index: int, fewer: int) -> dict[str, float]:
        at = int(counts[index])
        return {kind: tables[index][kind].cost(at - fewer) - tables[index][kind].cost(at) for kind in budgets}

    def fits(index: int, fewer: int) -> bool:
        return all(spent[kind] + cost <= limits[kind] for kind, cost in extra(index, fewer).items())

    def entry(index: int) -> tuple[float, int, int]:
        known, distortion = curves[index].knots
        at, low = int(counts[index]), int(lower[index])
        before = int(np.searchsorted(known, at, side="left")) - 1
        step = at - max(low, int(known[before]) if before >= 0 else low)
        gain = float(np.interp(at, known, distortion) - np.interp(at - step, known, distortion))
        part = max(
            cost / max(limits[kind] - spent[kind], 1e-300) for kind, cost in extra(index, step).items()
        )
        return (-gain / part if part > 0.0 else -np.inf, index, step)

    heap = [entry(index) for index in range(len(curves)) if counts[index] > lower[index]]
    heapq.heapify(heap)
    while heap:
        _, index, step = heapq.heappop(heap)
        most = _most(step, partial(fits, index))
        for kind, cost in extra(index, most).items():
            spent[kind] += cost
        counts[index] -= most
        if most == step and counts[index] > lower[index]:  # else not even one more weight fits, now or later
            heapq.heappush(heap, entry(index))
    return counts


def fewest_zeros(
    allocate: Callable[[int], Int64],
    excess: Callable[[Int64], float],
    low: tuple[int, float],
    high: tuple[int, float],
) -> Int64:
    """The allocation of the fewest zeros that keeps all budgets, for allocations that know a total only.

    Parameters
    ----------
    allocate
        Zeros per layer ``[layers]`` for a total.
    excess
        How far an allocation is beyond the budgets, falling with the total; 0 or less keeps them.
    low, high
        A total that does not keep the budgets and a larger one that does, each with its excess.

    Notes
    -----
    Between the two, straight lines through excesses say where to look (the Illinois method, which halves the excess
    of an end that stays), and the middle where that has not halved the interval: about ten allocations instead of
    one for every bit of the total.
    """
    (bad, over), (good, under) = low, high
    best: Int64 | None = None
    width, last = good - bad, 0
    while good - bad > 1:
        slow = 2 * (good - bad) > width
        width = good - bad
        guess = bad + round(width * over / (over - under)) if not (slow and last) else (bad + good) // 2
        total = min(max(guess, bad + 1), good - 1)
        found = allocate(total)
        value = excess(found)
        if value <= 0.0:
            best, good, under = found, total, value
            over = over / 2.0 if last == 1 else over
            last = 1
        else:
            bad, over = total, value
            under = under / 2.0 if last == -1 else under
            last = -1
    return allocate(good) if best is None else best


def budget_excess(tables: Sequence[LayerTables], budgets: Mapping[str, float], zeros: Int64) -> float:
    """How far these zeros ``[layers]`` are beyond the budget that they exceed most, as a part of what no zeros cost.

    0 or less keeps all budgets, up to the rounding of a sum.
    """
    parts = []
    for kind, budget in budgets.items():
        total = sum(table[kind].cost(int(count)) for table, count in zip(tables, zeros, strict=True))
        over = (total - budget) / (sum(table[kind].cost(0) for table in tables) or 1.0)
        parts.append(min(over, 0.0) if affordable(np.array(total), budget) else over)
    return max(parts)


def keeps_all(tables: Sequence[LayerTables], budgets: Mapping[str, float], zeros: Int64) -> bool:
    """Whether these zeros ``[layers]`` keep every budget."""
    return budget_excess(tables, budgets, zeros) <= 0.0


def _most(step: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``step`` that fits; 0 always does, and what is smaller than one that fits."""
    if fits(step):
        return step
    low, high = 0, step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
