"""1-swap polish: drop one kept weight and grow one pruned weight wherever that lowers the layer error.

All pairs of a row are evaluated exactly (:mod:`tableau`). Rows share the number of zeros, so a drop in one row
pays for a grow in another: their costs are independent.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern
from pot_sparsity.algorithms.pruning.parallel import RowPool
from pot_sparsity.algorithms.pruning.problem import LayerProblem, row_errors
from pot_sparsity.algorithms.pruning.projection import pattern_index
from pot_sparsity.algorithms.pruning.refit import refit
from pot_sparsity.algorithms.pruning.tableau import Offers, Tableau

# A change must lower the row's error by this much of the layer's mean row energy, or rounding could make it
# cycle.
_LEAST = 1e-9
# Swaps after which a row's tableau is computed afresh, so that rounding does not build up.
_FRESH = 200

_Row: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Polished:
    """Outcome of :func:`polish`.

    Attributes
    ----------
    weight, mask
        Refitted weights and support, ``[groups, rows, cols]``.
    damping
        Largest relative damping a row needed.
    swaps
        Swaps made, within rows and across rows.
    optimal
        True where no swap of two weights, in a row or across rows, lowers the error by more than rounding
        (``n:m``: no swap within a group of a row). False where the budget ended first or H had to be damped.
    """

    weight: Float64
    mask: Bool
    damping: float
    swaps: int
    optimal: bool


class _Budget:
    """What is left of swaps and seconds; shared by threads."""

    def __init__(self, swaps: int | None, seconds: float | None) -> None:
        self.made = 0
        self._swaps = swaps
        self._until = None if seconds is None else time.monotonic() + seconds
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether swaps or seconds are spent."""
        return (self._swaps is not None and self.made >= self._swaps) or (
            self._until is not None and time.monotonic() >= self._until
        )

    def spend(self) -> bool:
        """Take one swap; False where none is left."""
        with self._lock:
            if self._swaps is not None and self.made >= self._swaps:
                return False
            self.made += 1
            return True


@dataclass(frozen=True)
class _Visit:
    """One row after it has been settled."""

    kept: Bool
    optimal: bool
    damping: float
    offers: Offers


def polish(
    problem: LayerProblem,
    mask: Bool,
    pattern: Pattern,
    *,
    swaps: int | None = None,
    seconds: float | None = None,
    workers: int = 1,
) -> Polished:
    """Swap weights in and out of a support until no swap pays or the budget is spent; the error never rises.

    Parameters
    ----------
    problem
        The layer.
    mask
        True where kept, ``[groups, rows, cols]``; the number kept stays as it is.
    pattern
        ``unstructured`` swaps within rows and across all rows and groups; ``n:m`` within a group of a row.
    swaps, seconds
        Budget; None is no bound.
    workers
        Threads over rows; the result does not depend on it (one where ``swaps`` is bounded).

    Raises
    ------
    ValueError
        For ``block`` patterns, whose blocks single weights cannot leave.
    """
    if pattern.kind == "block":
        raise ValueError(f"the 1-swap polish works on 'unstructured' and 'n:m', not on {str(pattern)!r}")
    sections = _sections(mask.shape[-1], pattern)
    budget = _Budget(swaps, seconds)
    before, first = refit(problem, mask, workers=workers)
    errors = row_errors(before, problem.target, problem.given)
    energy = row_errors(np.zeros_like(before), problem.target, problem.given)
    least = _LEAST * float(energy.mean())
    final = mask.copy()
    # A row without error still has weights to give to others.
    todo: list[_Row] = list(np.ndindex(*errors.shape)) if errors.sum() > least else []
    offers: dict[_Row, Offers] = {}
    damping, optimal = 0.0, True
    with RowPool(1 if swaps is not None else workers) as pool:
        while todo and not budget.over:
            visits = pool.map(partial(_visit, problem, final, sections, least, budget), todo)
            for row, visit in zip(todo, visits, strict=True):
                final[row] = visit.kept
                damping = max(damping, visit.damping)
                optimal &= visit.optimal
                if sections is None:
                    offers[row] = visit.offers
            todo = _exchange(final, offers, least, budget)
    weight, used = refit(problem, final, workers=workers)
    damping = max(first, damping, used)
    if row_errors(weight, problem.target, problem.given).sum() > errors.sum():
        return Polished(before, mask.copy(), damping, 0, False)
    return Polished(weight, final, damping, budget.made, optimal and not todo)


def _sections(cols: int, pattern: Pattern) -> NDArray[np.intp] | None:
    """Group of each column under ``n:m``; None where any two columns may swap."""
    if pattern.kind == "unstructured":
        return None
    index = pattern_index(cols, pattern.m, pattern.stride)
    section = np.zeros(cols + 1, np.intp)
    section[index] = np.arange(len(index))[:, None]
    return section[:cols]


def _visit(
    problem: LayerProblem,
    final: Bool,
    sections: NDArray[np.intp] | None,
    least: float,
    budget: _Budget,
    row: _Row,
) -> _Visit:
    """Swap within a row while it pays, then price what it could give to other rows and take from them."""
    group, _ = row
    kept = final[row]
    if budget.over or (sections is not None and not kept.any()):
        return _Visit(kept, not kept.any(), 0.0, ([], []))
    target = problem.target[row] * problem.scale[group, 0]
    make = partial(Tableau, problem.correlation[group], target, growable=~problem.free[row])
    tableau = make(kept=kept)
    optimal, made = False, 0
    while not budget.over:
        change, drop, grow = tableau.best_swap(sections)
        if change >= -least:
            optimal = tableau.damping == 0.0
            break
        if not budget.spend():
            break
        tableau.swap(drop, grow)
        made += 1
        if made % _FRESH == 0:
            tableau = make(kept=tableau.kept)
    offers: Offers = tableau.offers() if sections is None else ([], [])
    return _Visit(tableau.kept, optimal, tableau.damping, offers)


def _exchange(final: Bool, offers: dict[_Row, Offers], least: float, budget: _Budget) -> list[_Row]:
    """Pay for the best grows of some rows with the cheapest drops of others, in place; returns the rows
    changed.

    A row only drops or only grows in one round, in the order of its offers, so that all prices stay exact.
    """
    rows = sorted(offers)
    prices = np.array([[_price(side, 0) for side in offers[row]] for row in rows]).reshape(-1, 2)
    used = np.zeros(len(rows), np.intp)
    while len(rows) > 1 and not budget.over:
        change, drop, grow = _cheapest_pair(prices)
        if change >= -least:
            break
        if not budget.spend():
            break
        for kind, at in enumerate((drop, grow)):
            row = rows[at]
            final[row][offers[row][kind][used[at]][0]] = kind == 1
            used[at] += 1
            prices[at, kind], prices[at, 1 - kind] = _price(offers[row][kind], int(used[at])), np.inf
    return [row for row, count in zip(rows, used, strict=True) if count]


def _price(side: list[tuple[int, float]], at: int) -> float:
    """What the offer costs (a gain is a negative cost); inf where there is none left."""
    return side[at][1] if at < len(side) else np.inf


def _cheapest_pair(prices: Float64) -> tuple[float, int, int]:
    """Cheapest (change, drop row, grow row) for prices ``[rows, 2]``, the two taken from different rows."""
    drop, grow = (int(at) for at in prices.argmin(axis=0))
    if drop != grow:
        return float(prices[drop, 0] + prices[grow, 1]), drop, grow
    others = prices.copy()
    others[drop] = np.inf
    drop_other, grow_other = (int(at) for at in others.argmin(axis=0))
    return min(
        (float(others[drop_other, 0] + prices[grow, 1]), drop_other, grow),
        (float(prices[drop, 0] + others[grow_other, 1]), drop, grow_other),
    )
