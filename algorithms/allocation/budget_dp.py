"""The best level of every layer within one budget, by dynamic programming.

Both solvers answer ``min sum_l d_l(k_l)`` subject to ``sum_l c_l(k_l) <= budget`` over the levels ``k_l`` of each
layer. :func:`solve_exact` is rate-distortion pruning's (equations 11 and 12) for whole costs, one state for each
unit of the budget; :func:`solve_bucketed` is SPDY's, which cuts any budget into a fixed number of buckets.

A layer enters with what its levels cost more than its cheapest one: tiny layers and levels without cost need no
care then, and a budget is infeasible exactly where it does not pay for the cheapest levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.curves import Choice, Curve, choose
from pot_sparsity.algorithms.allocation.hull import solve_hull
from pot_sparsity.algorithms.allocation.level_moves import (
    affordable,
    check_budget,
    improve_levels,
    pareto_levels,
)
from pot_sparsity.algorithms.arrays import Float64

#: Buckets a budget is cut into.
BUCKETS = 10_000


def solve_exact(curves: Sequence[Curve], kind: str, budget: int) -> Choice:
    """The choice of least distortion within a budget of whole units.

    Of equally good choices the cheapest, and of these the one with the cheapest level for the layer whose costs
    span most (of equals the last), then for the next.

    Parameters
    ----------
    curves
        One for each layer; costs of ``kind`` are whole numbers.
    kind
        Kind of cost.
    budget
        Most that all layers together may cost.

    Raises
    ------
    ValueError
        The budget is below what the cheapest levels cost together; costs that are not whole; no curves.

    Notes
    -----
    Time ``O(levels * budget)`` over all layers, memory one byte (two with more than 256 levels) per layer and
    unit of the budget: 22 layers and 270,000 weights take 6 MB, so larger networks go to
    :func:`solve_bucketed`. States beyond what the layers so far can cost are never stored.
    """
    check_budget(curves, {kind: float(budget)})
    for curve in curves:
        if not np.array_equal(curve.cost(kind), np.rint(curve.cost(kind))):
            raise ValueError(
                f"curve of layer {curve.name!r}: costs {kind!r} must be whole numbers for the exact solver"
            )
    options = [_Options.of(curve, kind) for curve in curves]
    room = budget - round(sum(option.base for option in options))
    units = [option.extra.astype(np.int64) for option in options]
    best, tables = _fill_tables(options, units, min(room, sum(int(cost[-1]) for cost in units)))
    positions = _trace_back(tables, units, np.array([best.argmin()]))
    return choose(curves, _levels(options, positions[:, 0]))


def solve_bucketed(curves: Sequence[Curve], kind: str, budget: float, *, buckets: int = BUCKETS) -> Choice:
    """A choice of nearly least distortion within a budget of any unit; it never costs more than the budget.

    Parameters
    ----------
    curves, kind, budget
        As for :func:`solve_exact`, with costs of any kind.
    buckets
        Number of states; what the budget leaves above the cheapest levels is cut into as many. Whole costs with
        fewer units than that are solved exactly.

    Raises
    ------
    ValueError
        The budget is below what the cheapest levels cost together; no curves; no buckets.

    Notes
    -----
    Costs are rounded to the nearest bucket, so that errors cancel instead of adding up. The table then holds
    the best choice for every rounded total; of those whose true cost fits, the best is taken and improved by
    exchanges between layers that the rounding missed. It is never worse than the optimum of a budget smaller by
    as many buckets as there are layers, nor than :func:`~pot_sparsity.algorithms.allocation.hull.solve_hull`, which
    can be the better one where many levels are finer than a bucket. Time ``O(levels * buckets)`` over all layers.
    """
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, got {buckets}")
    check_budget(curves, {kind: budget})
    options = [_Options.of(curve, kind) for curve in curves]
    room = max(budget - float(sum(option.base for option in options)), 0.0)
    options = [option.within(room) for option in options]
    most = float(sum(float(option.extra[-1]) for option in options))
    if most <= room:
        return choose(curves, np.array([option.levels[-1] for option in options]))
    whole = all(np.array_equal(option.extra, np.rint(option.extra)) for option in options)
    if whole and room <= buckets:
        unit, limit = 1.0, int(room)
    else:
        unit = room / buckets
        # Rounding may have made a choice that fits look up to half a bucket per layer too expensive.
        limit = buckets + (len(curves) + 1) // 2
    units = [np.rint(option.extra / unit).astype(np.int64) for option in options]
    best, tables = _fill_tables(options, units, min(limit, sum(int(cost[-1]) for cost in units)))
    # Best total so far, from the lowest budget up: each record is a choice worth its price.
    records = np.flatnonzero(best < np.append(np.inf, np.minimum.accumulate(best)[:-1]))
    positions = _trace_back(tables, units, records)
    true_cost = np.sum([option.extra[row] for option, row in zip(options, positions, strict=True)], axis=0)
    fitting = np.flatnonzero(affordable(true_cost, room))
    chosen = positions[:, fitting[-1]] if fitting.size else np.zeros(len(curves), dtype=np.int64)
    rounded = improve_levels(curves, {kind: budget}, _levels(options, chosen))
    greedy = solve_hull(curves, kind, budget)
    return greedy if greedy.distortion < rounded.distortion else rounded


@dataclass(frozen=True)
class _Options:
    """The levels of one layer that are worth their price, cheapest first: ``levels``, ``extra`` cost above
    ``base`` and ``distortion``, each ``[options]``.
    """

    levels: Int64
    base: float
    extra: Float64
    distortion: Float64

    @staticmethod
    def of(curve: Curve, kind: str) -> _Options:
        levels = pareto_levels(curve.cost(kind), curve.distortion)
        cost = curve.cost(kind)[levels]
        return _Options(levels, float(cost[0]), cost - cost[0], curve.distortion[levels])

    def within(self, room: float) -> _Options:
        count = int(np.count_nonzero(affordable(self.extra, room)))
        return _Options(self.levels[:count], self.base, self.extra[:count], self.distortion[:count])


def _fill_tables(
    options: Sequence[_Options], units: Sequence[Int64], limit: int
) -> tuple[Float64, list[NDArray[np.unsignedinteger]]]:
    """Forward pass, min-plus over the levels of one layer after the other, the smallest first.

    Returns the least distortion of all layers together for a cost of exactly 0, 1, ..., limit units (infinite
    where no choice costs that), and for each layer the position chosen in each state it can be reached in.
    """
    best = np.zeros(1)
    tables: list[NDArray[np.unsignedinteger]] = [np.empty(0, np.uint8)] * len(options)
    for index in _order(units):
        option, cost = options[index], units[index]
        states = min(limit, best.size - 1 + int(cost[-1])) + 1
        total = np.full(states, np.inf)
        table: NDArray[np.unsignedinteger] = (
            np.zeros(states, np.uint8) if cost.size <= 256 else np.zeros(states, np.uint16)
        )
        trial = np.empty(best.size)
        lower = np.empty(best.size, dtype=np.bool_)
        for position, (shift, distortion) in enumerate(
            zip(cost.tolist(), option.distortion.tolist(), strict=True)
        ):
            count = min(best.size, states - shift)
            if count <= 0:
                break
            part = slice(shift, shift + count)
            np.add(best[:count], distortion, out=trial[:count])
            np.less(trial[:count], total[part], out=lower[:count])
            np.copyto(total[part], trial[:count], where=lower[:count])
            np.copyto(table[part], position, where=lower[:count])
        best, tables[index] = total, table
    return best, tables


def _trace_back(
    tables: Sequence[NDArray[np.unsignedinteger]], units: Sequence[Int64], states: Int64
) -> Int64:
    """Positions ``[layers, n]`` that lead to each of ``states [n]`` of the last layer."""
    left = states.copy()
    positions = np.zeros((len(tables), states.size), dtype=np.int64)
    for index in reversed(_order(units)):
        positions[index] = tables[index][left]
        left -= units[index][positions[index]]
    return positions


def _order(units: Sequence[Int64]) -> list[int]:
    """Smallest layers first: their tables stay short."""
    return sorted(range(len(units)), key=lambda index: (int(units[index][-1]), index))


def _levels(options: Sequence[_Options], positions: Int64) -> Int64:
    return np.array(
        [option.levels[at] for option, at in zip(options, positions, strict=True)], dtype=np.int64
    )
