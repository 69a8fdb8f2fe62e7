"""One row's H swept on its kept set: what any drop, grow or swap of its weights would cost, exactly.

For one row with kept set S (refitted), excluded set E, ``P = (H_SS)^-1``, ``a = P H_SE``, ``s_j = H_jj -
H_jS P H_Sj`` and ``g = ((w* - w) H)_E``: growing j gains ``g_j^2 / s_j``, dropping i costs ``w_i^2 / P_ii``,
and both together change the error by exactly ``w_i^2/P_ii - (g_j + w_i a_ij/P_ii)^2 / (s_j + a_ij^2/P_ii)``.

All of it stands in one symmetric tableau T, H swept on S: ``T_SS = -P``, ``T_SE = a``, ``T_EE`` the Schur
complement. Only the columns of S and the diagonal are kept; a line of ``T_EE`` is computed when its weight
grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dger
from scipy.linalg.lapack import dtrtri

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.pruning.refit import damped_cholesky

# Columns whose Schur complement is below this (of a unit diagonal) depend linearly on the kept ones.
DEPENDENT = 1e-9
# Columns evaluated first: those of the largest gain alone.
_FIRST = 32
# How many drops and grows a row offers to other rows per round, chosen among so many single best ones.
_OFFERS = 8
_POOL = 32

Prices: TypeAlias = list[tuple[int, float]]
# (column, price) to drop and to grow, each list to be used from its start.
Offers: TypeAlias = tuple[Prices, Prices]


@dataclass(frozen=True)
class Core:
    """The part of a tableau that matters most: its cheapest kept columns, its most gainful pruned ones.

    Sweeps on columns of a core need nothing else of the tableau.

    Attributes
    ----------
    columns
        Columns of the layer, the kept ones first.
    kept
        How many of them are kept.
    matrix, state
        The tableau and its state on these columns, float64 ``[n, n]`` and ``[n]``.
    """

    columns: NDArray[np.intp]
    kept: int
    matrix: Float64
    state: Float64


class Tableau:
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
        able = ~self.kept & self.growable & (self.diagonal > DEPENDENT)
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
        if not self.support.size:
            return best
        begin, width = 0, _FIRST
        while begin < len(order) and gains[order[begin]] > -best[0]:
            some = order[begin : begin + width]
            change = self._pair_changes(some)
            if groups is not None:
                change[groups[some][:, None] != groups[self.support]] = np.inf
            grow, drop = np.unravel_index(int(change.argmin()), change.shape)
            if change[grow, drop] < best[0]:
                best = (float(change[grow, drop]), int(self.support[drop]), int(some[grow]))
            begin, width = begin + width, 2 * width
        return best

    def _pair_changes(self, grow: NDArray[np.intp]) -> Float64:
        """Exact change of every pair of a grow and a drop, ``[grow, kept]``."""
        inner = np.maximum(-self.diagonal[self.support], 1e-300)
        weight, spread = self.state[self.support], self.lines[grow]
        gain = (self.state[grow, None] + weight / inner * spread) ** 2
        return np.asarray(weight**2 / inner - gain / (self.diagonal[grow, None] + spread**2 / inner))

    def _schur(self, some: NDArray[np.intp]) -> Float64:
        """``T_EE`` on some of E, ``[some, some]``."""
        schur = self.correlation[some][:, some] - self.lines[some] @ self.correlation[self.support][:, some]
        schur[np.diag_indices(len(some))] = self.diagonal[some]
        return np.asarray(schur)

    def core(self, width: int) -> Core:
        """The ``width`` kept and the ``width`` pruned columns that stand in the best pairs."""
        able = np.flatnonzero(self.grow_gains())
        if able.size and self.support.size:
            change = self._pair_changes(able)
            drops, grows = change.min(axis=0), change.min(axis=1)
        else:
            drops, grows = self.drop_costs(), -self.grow_gains()[able]
        place = np.argsort(drops, kind="stable")[:width]
        grow = able[np.argsort(grows, kind="stable")[:width]]
        drop = self.support[place]
        across = self.lines[grow][:, place]
        matrix = np.block([[self.lines[drop][:, place], across.T], [across, self._schur(grow)]])
        columns = np.concatenate([drop, grow])
        return Core(columns, len(drop), np.asarray(matrix), self.state[columns])

    def offers(self) -> Offers:
        """The next few (column, price) to drop and to grow, each after those before; a gain is negative."""
        costs, gains = self.drop_costs(), self.grow_gains()
        place = np.argsort(costs, kind="stable")[:_POOL]
        chosen = self.support[place]
        drops = _in_turn(-self.lines[chosen][:, place], self.state[chosen], drop=True)
        some = np.argsort(-gains, kind="stable")[: min(_POOL, np.count_nonzero(gains))]
        grows = _in_turn(self._schur(some), self.state[some], drop=False)
        return (
            [(int(chosen[at]), price) for at, price in drops],
            [(int(some[at]), -price) for at, price in grows],
        )


def _in_turn(matrix: Float64, state: Float64, *, drop: bool) -> Prices:
    """Sweep ``matrix`` on the cheapest (or most gainful) of its columns, a few times: (position, price)."""
    matrix, state = matrix.copy(), state.copy()
    open_: Bool = np.ones(len(state), np.bool_)
    taken: Prices = []
    while len(taken) < min(_OFFERS, len(state)):
        diagonal = matrix.diagonal()
        open_ &= diagonal > (0.0 if drop else DEPENDENT)
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
