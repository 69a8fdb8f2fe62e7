"""1-swap polish: drop one kept weight and grow one pruned weight wherever that lowers the layer error.

For one row with kept set S (refitted), excluded set E, ``P = (H_SS)^-1``, ``a = P H_SE``, ``s_j = H_jj -
H_jS P H_Sj`` and ``g = ((w* - w) H)_E``: growing j gains ``g_j^2 / s_j``, dropping i costs ``w_i^2 / P_ii``,
and both together change the error by exactly ``w_i^2/P_ii - (g_j + w_i a_ij/P_ii)^2 / (s_j + a_ij^2/P_ii)``.

All of it stands in one symmetric tableau T, H swept on S: ``T_SS = -P``, ``T_SE = a``, ``T_EE`` the Schur
complement. Only the columns of S and the diagonal are kept; a line of ``T_EE`` is computed when its weight
grows. Rows share the number of zeros, so a drop in one row pays for a grow in another: their costs are
independent.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dger
from scipy.linalg.lapack import dtrtri

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern
from pot_sparsity.algorithms.pruning.parallel import RowPool
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
# How many drops and grows a row offers to other rows per round, chosen among so many single best ones.
_OFFERS = 8
_POOL = 32
# Swaps after which a row's tableau is computed afresh, so that rounding does not build up.
_FRESH = 200

_Row: TypeAlias = tuple[int, int]
_Prices: TypeAlias = list[tuple[int, float]]
# (column, price) to drop and to grow, each list to be used from its start.
_Offers: TypeAlias = tuple[_Prices, _Prices]


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
    """One row's H (unit diagonal) swept on its kept set.

    Attributes
    ----------
    support
        Columns of S, in the order of the tableau's columns.
    lines
        ``T[:, S]``, ``[cols, kept]``.
    diagonal
        ``T_jj``: ``-P_jj`` on S, ``s_j`` on E.
    state
        ``w`` on S, ``g`` on E.
    """

    def __init__(self, correlation: Float64, target: Float64, kept: Bool, growable: Bool) -> None:
        self.correlation, self.growable = correlation, growable
        self.kept = kept.copy()
        self.support = np.flatnonzero(kept)
        self.damping = 0.0
        self.lines: Float64 = np.zeros((len(target), 0))
        self.diagonal: Float64 = np.ones(len(target))
        self.state: Float64 = np.asarray(target @ correlation)
        if self.support.size:
            self._fill(target)

    def _fill(self, target: Float64) -> None:
        """Sweep H on the support, from its Cholesky factor."""
        rest = np.flatnonzero(~self.kept)
        rows = self.correlation[self.support]
        cross = rows[:, rest]
        factor, self.damping = damped_cholesky(rows[:, self.support], 1.0)
        root, _ = dtrtri(factor, lower=1)
        inverse = root.T @ root
        spread = cross.T @ inverse
        moved = target[rest] @ spread
        self.lines = np.empty((len(target), len(rows)))
        self.lines[rest], self.lines[self.support] = spread, -inverse
        self.diagonal[rest] += self.damping - np.einsum("es,se->e", spread, cross)
        self.diagonal[self.support] = -inverse.diagonal()
        gap = target.copy()
        gap[self.support] = -moved
        self.state = np.asarray(gap @ self.correlation + self.damping * gap)
        self.state[self.support] = target[self.support] + moved

    def drop_costs(self) -> Float64:
        """``w_i^2 / P_ii`` of each member of the support."""
        inner = np.maximum(-self.diagonal[self.support], 1e-300)
        return np.asarray(self.state[self.support] ** 2 / inner)

    def grow_gains(self) -> Float64:
        """``g_j^2 / s_j`` on the part of E that may grow, 0 elsewhere."""
        able = ~self.kept & self.growable & (self.diagonal > _DEPENDENT)
        return np.where(able, self.state**2 / np.where(able, self.diagonal, 1.0), 0.0)

    def swap(self, drop: int, grow: int) -> None:
        """Drop a kept column and let a pruned one take its place: two sweeps."""
        place = int(np.flatnonzero(self.support == drop)[0])
        self._sweep(drop, self.lines[:, place].copy(), self.lines[drop].copy(), -1.0)
        row = self.correlation[grow]
        inside = row[self.support]
        inside[place] = 0.0
        line = row - self.lines @ inside
        line[grow] += self.damping
        across = self.lines[grow].copy()
        across[place] = 0.0
        self.kept[[drop, grow]] = False, True
        others = np.delete(self.support, place)
        line[others] = self.lines[grow, np.arange(len(self.support)) != place]
        self._sweep(grow, line, across, 1.0)
        self.lines[:, place] = line / line[grow]
        self.lines[grow, place] = -1.0 / line[grow]
        self.support[place] = grow

    def _sweep(self, column: int, line: Float64, across: Float64, sign: float) -> None:
        """Sweep on one column: ``line`` is ``T[:, column]``, ``across`` is ``T[column, S]``."""
        pivot, value = float(line[column]), float(self.state[column])
        self.lines = dger(-1.0 / pivot, across, line, a=self.lines.T, overwrite_a=True).T
        self.lines[column] = sign * across / pivot
        self.diagonal -= line * line / pivot
        self.diagonal[column] = -1.0 / pivot
        self.state -= line * (value / pivot)
        self.state[column] = sign * value / pivot

    def best_swap(self, groups: NDArray[np.intp] | None) -> tuple[float, int, int]:
        """Exact best (change, drop, grow) over all pairs; a pair must share its group where groups are given.

        A pair never gains more than its grow alone, so columns are evaluated in falling order of that bound
        and the rest is left out as soon as the bound is worse than the best pair.
        """
        gains = self.grow_gains()
        order = np.argsort(-gains, kind="stable")[: np.count_nonzero(gains)]
        best = (0.0, -1, -1)
        inner = np.maximum(-self.diagonal[self.support], 1e-300)
        if not self.support.size:
            return best
        weight = self.state[self.support]
        cost, ratio = weight**2 / inner, weight / inner
        begin, width = 0, _FIRST
        while begin < len(order) and gains[order[begin]] > -best[0]:
            some = order[begin : begin + width]
            spread = self.lines[some]
            change = cost - (self.state[some, None] + ratio * spread) ** 2 / (
                self.diagonal[some, None] + spread**2 / inner
            )
            if groups is not None:
                change[groups[some][:, None] != groups[self.support]] = np.inf
            grow, drop = np.unravel_index(int(change.argmin()), change.shape)
            if change[grow, drop] < best[0]:
                best = (float(change[grow, drop]), int(self.support[drop]), int(some[grow]))
            begin, width = begin + width, 2 * width
        return best

    def offers(self) -> _Offers:
        """The next few (column, price) to drop and to grow, each after those before; a gain is negative."""
        costs, gains = self.drop_costs(), self.grow_gains()
        place = np.argsort(costs, kind="stable")[:_POOL]
        chosen = self.support[place]
        drops = _in_turn(-self.lines[chosen][:, place], self.state[chosen], drop=True)
        some = np.argsort(-gains, kind="stable")[: min(_POOL, np.count_nonzero(gains))]
        schur = self.correlation[some][:, some] - self.lines[some] @ self.correlation[self.support][:, some]
        schur[np.diag_indices(len(some))] = self.diagonal[some]
        grows = _in_turn(schur, self.state[some], drop=False)
        return (
            [(int(chosen[at]), price) for at, price in drops],
            [(int(some[at]), -price) for at, price in grows],
        )


def _in_turn(matrix: Float64, state: Float64, *, drop: bool) -> _Prices:
    """Sweep ``matrix`` on the cheapest (or most gainful) of its columns, a few times: (position, price)."""
    matrix, state = matrix.copy(), state.copy()
    open_: Bool = np.ones(len(state), np.bool_)
    taken: _Prices = []
    while len(taken) < min(_OFFERS, len(state)):
        diagonal = matrix.diagonal()
        open_ &= diagonal > (0.0 if drop else _DEPENDENT)
        if not open_.any():
            break
        price = state**2 / np.where(open_, diagonal, 1.0)
        at = int(np.where(open_, price, np.inf).argmin() if drop else np.where(open_, price, -1.0).argmax())
        taken.append((at, float(price[at])))
        line = matrix[at] / matrix[at, at]
        state -= line * state[at]
        matrix -= np.outer(line, matrix[at])
        open_[at] = False
    return taken


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
    offers: _Offers


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
    offers: dict[_Row, _Offers] = {}
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
    make = partial(_Tableau, problem.correlation[group], target, growable=~problem.free[row])
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
    offers: _Offers = tableau.offers() if sections is None else ([], [])
    return _Visit(tableau.kept, optimal, tableau.damping, offers)


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
