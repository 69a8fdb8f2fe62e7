"""1-swap polish: drop one kept weight and grow one pruned weight wherever that lowers the layer error.

For one row with kept set S (refitted), excluded set E, ``P = (H_SS)^-1``, ``a = P H_SE``, ``s_j = H_jj -
H_jS P H_Sj`` and ``g = ((w* - w) H)_E``: growing j gains ``g_j^2 / s_j``, dropping i costs ``w_i^2 / P_ii``,
and both together change the error by exactly ``w_i^2/P_ii - (g_j + w_i a_ij/P_ii)^2 / (s_j + a_ij^2/P_ii)``.

All of it stands in one symmetric tableau, H swept on S: ``T_SS = -P``, ``T_SE = a``, ``T_EE`` the Schur
complement; ``T`` times the pruned part of ``w*`` gives ``w - w*`` on S and ``g`` on E. A drop or a grow is
one sweep, of rank 1. Rows share the number of zeros, so a drop in one row pays for a grow in another: their
costs are independent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern
from pot_sparsity.algorithms.pruning.problem import LayerProblem, row_errors
from pot_sparsity.algorithms.pruning.projection import pattern_index
from pot_sparsity.algorithms.pruning.refit import damped_cholesky, refit

# A change must lower the row's error by this much of the layer's mean row energy, or rounding could make it
# cycle.
_LEAST = 1e-9
# Columns whose Schur complement is below this (of a unit diagonal) depend linearly on the kept ones.
_DEPENDENT = 1e-9
# Columns evaluated first: those of the largest gain alone.
_FIRST = 32
# How many drops and grows a row offers to other rows per round.
_OFFERS = 8

_Row: TypeAlias = tuple[int, int]
# (column, price) to drop and to grow, each list to be used from its start.
_Offers: TypeAlias = tuple[list[tuple[int, float]], list[tuple[int, float]]]


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


class _Tableau:
    """One row's H (unit diagonal) swept on its kept set."""

    def __init__(self, correlation: Float64, target: Float64, kept: Bool, growable: Bool) -> None:
        self.target, self.kept, self.growable = target, kept.copy(), growable
        support, rest = np.flatnonzero(kept), np.flatnonzero(~kept)
        self.damping = 0.0
        self.table = correlation.copy()
        if support.size:
            sub = correlation[support][:, support]
            factor, self.damping = damped_cholesky(sub, 1.0)
            np.einsum("cc->c", self.table)[...] += self.damping
            root = np.linalg.inv(factor)
            inverse = root.T @ root
            cross = self.table[support][:, rest]
            spread = inverse @ cross
            self.table[np.ix_(support, support)] = -inverse
            self.table[np.ix_(support, rest)] = spread
            self.table[np.ix_(rest, support)] = spread.T
            self.table[np.ix_(rest, rest)] -= cross.T @ spread

    def copy(self) -> _Tableau:
        """Independent copy, to look ahead on."""
        twin = object.__new__(_Tableau)
        twin.__dict__.update(self.__dict__)
        twin.table, twin.kept = self.table.copy(), self.kept.copy()
        return twin

    def state(self) -> tuple[Float64, Float64]:
        """``w`` on S (0 elsewhere) and ``g`` on E (0 elsewhere)."""
        moved = self.table @ np.where(self.kept, 0.0, self.target)
        return np.where(self.kept, self.target + moved, 0.0), np.where(self.kept, 0.0, moved)

    def drop_costs(self, weight: Float64) -> Float64:
        """``w_i^2 / P_ii`` on S, inf elsewhere."""
        diagonal = np.where(self.kept, -self.table.diagonal(), 1.0)
        return np.where(self.kept, weight**2 / np.maximum(diagonal, 1e-300), np.inf)

    def grow_gains(self, gradient: Float64) -> Float64:
        """``g_j^2 / s_j`` on the part of E that may grow, 0 elsewhere."""
        schur = self.table.diagonal()
        able = ~self.kept & self.growable & (schur > _DEPENDENT)
        return np.where(able, gradient**2 / np.where(able, schur, 1.0), 0.0)

    def flip(self, column: int) -> None:
        """Grow a pruned column or drop a kept one: one sweep."""
        line = self.table[column].copy()
        pivot = line[column]
        sign = -1.0 if self.kept[column] else 1.0
        self.table -= np.outer(line / pivot, line)
        self.table[column] = self.table[:, column] = sign * line / pivot
        self.table[column, column] = -1.0 / pivot
        self.kept[column] = not self.kept[column]

    def best_swap(self, groups: NDArray[np.intp] | None) -> tuple[float, int, int]:
        """Exact best (change, drop, grow) over all pairs; a pair must share its group where groups are given.

        A pair never gains more than its grow alone, so columns are evaluated in falling order of that bound
        and the rest is left out as soon as the bound is worse than the best pair.
        """
        weight, gradient = self.state()
        gains = self.grow_gains(gradient)
        support = np.flatnonzero(self.kept)
        order = np.argsort(-gains, kind="stable")[: np.count_nonzero(gains)]
        best = (0.0, -1, -1)
        if not support.size:
            return best
        inner = np.maximum(-self.table.diagonal()[support], 1e-300)
        cost, ratio = weight[support] ** 2 / inner, weight[support] / inner
        begin, width = 0, _FIRST
        while begin < len(order) and gains[order[begin]] > -best[0]:
            some = order[begin : begin + width]
            spread = self.table[some][:, support]
            change = cost - (gradient[some, None] + ratio * spread) ** 2 / (
                self.table.diagonal()[some, None] + spread**2 / inner
            )
            if groups is not None:
                change[groups[some][:, None] != groups[support]] = np.inf
            grow, drop = np.unravel_index(int(change.argmin()), change.shape)
            if change[grow, drop] < best[0]:
                best = (float(change[grow, drop]), int(support[drop]), int(some[grow]))
            begin, width = begin + width, 2 * width
        return best

    def offers(self, drops: bool) -> Iterator[tuple[int, float]]:
        """The next few (column, price) to drop or to grow, each after those before; a gain is negative."""
        ahead = self.copy()
        for _ in range(_OFFERS):
            weight, gradient = ahead.state()
            values = ahead.drop_costs(weight) if drops else -ahead.grow_gains(gradient)
            column = int(values.argmin())
            if not np.isfinite(values[column]) or (values[column] == 0.0 and not drops):
                return
            yield column, float(values[column])
            ahead.flip(column)


class _Budget:
    """What is left of swaps and seconds."""

    def __init__(self, swaps: int | None, seconds: float | None) -> None:
        self.made = 0
        self._swaps = swaps
        self._until = None if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return (self._swaps is not None and self.made >= self._swaps) or (
            self._until is not None and time.monotonic() >= self._until
        )


def polish(
    problem: LayerProblem,
    mask: Bool,
    pattern: Pattern,
    *,
    swaps: int | None = None,
    seconds: float | None = None,
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

    Raises
    ------
    ValueError
        For ``block`` patterns, whose blocks single weights cannot leave.
    """
    if pattern.kind == "block":
        raise ValueError(f"the 1-swap polish works on 'unstructured' and 'n:m', not on {str(pattern)!r}")
    sections = _sections(mask.shape[-1], pattern)
    budget = _Budget(swaps, seconds)
    before, first = refit(problem, mask)
    errors = row_errors(before, problem.target, problem.given)
    energy = row_errors(np.zeros_like(before), problem.target, problem.given)
    least = _LEAST * float(energy.mean())
    final = mask.copy()
    # A row without error still has weights to give to others.
    todo: list[_Row] = list(np.ndindex(*errors.shape)) if errors.sum() > least else []
    offers: dict[_Row, _Offers] = {}
    damping, optimal = 0.0, True
    while todo and not budget.over:
        for g, r in todo:
            growable = ~problem.free[g, r]
            scaled = problem.target[g, r] * problem.scale[g, 0]
            tableau = _Tableau(problem.correlation[g], scaled, final[g, r], growable)
            damping = max(damping, tableau.damping)
            optimal &= _settle(tableau, sections, least, budget)
            final[g, r] = tableau.kept
            if sections is None:
                offers[g, r] = (list(tableau.offers(True)), list(tableau.offers(False)))
        todo = _exchange(final, offers, least, budget)
    weight, used = refit(problem, final)
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


def _settle(tableau: _Tableau, sections: NDArray[np.intp] | None, least: float, budget: _Budget) -> bool:
    """Swap within a row while it pays; True where it ended 1-swap optimal."""
    while not budget.over:
        change, drop, grow = tableau.best_swap(sections)
        if change >= -least:
            return tableau.damping == 0.0
        tableau.flip(drop)
        tableau.flip(grow)
        budget.made += 1
    return False


def _exchange(final: Bool, offers: dict[_Row, _Offers], least: float, budget: _Budget) -> list[_Row]:
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
        budget.made += 1
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
