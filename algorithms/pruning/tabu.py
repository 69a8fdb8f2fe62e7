"""Tabu search on a support: leave the 1-swap optimum that the polish would end in.

At a price per kept weight rows are independent: each makes the best of all drops, grows and swaps, even where
that raises ``error + price * kept``, and leaves the weights it moved alone for some steps, so that it walks away
from where it has been (Glover, Tabu Search, ORSA Journal on Computing 1, 1989). A row walks on the core of its
tableau, which is small whatever the layer's width, and the rows of a part walk in step, as batched matrices.

The best support of each row is remembered for each number of kept weights. One per row, so that the numbers add
up, is a knapsack, solved exactly at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.pruning.parallel import RowPool, slices
from pot_sparsity.algorithms.pruning.problem import LayerProblem
from pot_sparsity.algorithms.pruning.tableau import DEPENDENT, Core, Tableau

# Kept and pruned columns in a core.
_WIDTH = 40
# Steps before the core is chosen anew: few where a tableau is cheap, many where it is dear.
_STEPS = (12, 40)
# Steps a moved weight is left alone, drawn from this range.
_TENURE = (8, 20)
# Rows may keep so many weights more or less than they had at first.
_SPREAD = 8
# How far the first few rows may be off together while the knapsack is solved.
_SLACK = 128
# Rows that walk in step, whatever the number of workers.
_ROWS = 8
# Seconds of one ordinary core for a multiplication in a tableau, a pair, a row's step and a row.
_COST = (2e-10, 1e-8, 3e-5, 2e-4)

_OFFSETS = np.arange(-_SPREAD, _SPREAD + 1)

_Index: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True)
class Plan:
    """How long to search: so many rounds, each of so many steps on newly chosen cores."""

    rounds: int
    steps: int

    @classmethod
    def of(cls, mask: Bool, seconds: float, most: int) -> Plan:
        """As many rounds, up to ``most``, as an ordinary core makes in ``seconds``; the clock is not read."""
        cols = mask.shape[-1]
        kept = mask.sum(axis=-1, dtype=np.float64)
        multiply, pair, step, row = _COST
        build = row * kept.size + float((multiply * cols * kept**2 + pair * kept * (cols - kept)).sum())
        steps = int(np.clip(build / (step * kept.size), *_STEPS))
        return cls(min(most, int(seconds / (build + steps * step * kept.size))), steps)


class TabuSearch:
    """Walks over the supports of a layer, and the best that they met.

    Parameters
    ----------
    problem
        The layer.
    mask, errors
        A refitted support ``[groups, rows, cols]`` and its row errors: what to keep in all, and the first that
        is remembered. A kept weight is priced where the first walk begins, so that should be near an optimum.
    steps
        Steps per round.
    pool
        Threads over rows; the result does not depend on their number.
    over
        Says when the time is up.
    """

    def __init__(
        self,
        problem: LayerProblem,
        mask: Bool,
        errors: Float64,
        steps: int,
        pool: RowPool,
        over: Callable[[], bool],
    ) -> None:
        self._problem, self._steps, self._pool, self._over = problem, steps, pool, over
        self._scaled = (problem.target * problem.scale).reshape(-1, mask.shape[-1])
        self._kept = mask.reshape(self._scaled.shape).sum(axis=1)
        # [rows, kept more or less than at first(, cols)]
        self._errors = np.full((len(self._kept), 2 * _SPREAD + 1), np.inf)
        self._masks: Bool = np.zeros((*self._errors.shape, mask.shape[-1]), np.bool_)
        self._errors[:, _SPREAD] = errors.ravel()
        self._masks[:, _SPREAD] = mask.reshape(self._scaled.shape)
        self._price: float | None = None

    def walk(self, mask: Bool, errors: Float64, rounds: int, seed: int) -> None:
        """Walk from a refitted support and its row errors, for so many rounds.

        Rows that keep too many or too few weights walk from the best that was seen of them; rows whose system
        needs damping stay where they are.
        """
        support, error, offset = self._enter(mask, errors)
        for turn in range(rounds):
            found = self._pool.map(partial(self._core, support), range(len(support)))
            cores = {row: core for row, core in enumerate(found) if core is not None}
            if self._over() or not cores:
                return
            if self._price is None:
                self._price = _fair_price(list(cores.values()))
            rows = np.array(list(cores))
            walks = []
            for part in slices(len(rows), _ROWS):
                some = rows[part]
                best = (self._errors[some] + self._price * _OFFSETS).min(axis=1)
                chosen = [cores[row] for row in some.tolist()]
                walks.append(_Walk(some, chosen, error[some], offset[some], best, self._price))
            self._pool.map(partial(_Walk.run, steps=self._steps, seed=(seed, turn)), walks)
            for each in walks:
                self._remember(each, support)
                error[each.rows], offset[each.rows] = each.error, each.offset
                for row, core, inside in zip(each.rows, each.cores, each.inside, strict=True):
                    support[row, core.columns] = inside[: len(core.columns)]

    def _enter(self, mask: Bool, errors: Float64) -> tuple[Bool, Float64, _Index]:
        """Remember a support; where its rows are to walk from, their errors and their surplus of weights."""
        support, error = mask.reshape(self._scaled.shape).copy(), errors.ravel().copy()
        offset = support.sum(axis=1) - self._kept
        near = np.flatnonzero(np.abs(offset) <= _SPREAD)
        place = offset[near] + _SPREAD
        better = error[near] < self._errors[near, place]
        self._errors[near[better], place[better]] = error[near[better]]
        self._masks[near[better], place[better]] = support[near[better]]
        far = np.flatnonzero(np.abs(offset) > _SPREAD)
        place = (self._errors[far] + (self._price or 0.0) * _OFFSETS).argmin(axis=1)
        support[far], error[far], offset[far] = (
            self._masks[far, place],
            self._errors[far, place],
            _OFFSETS[place],
        )
        return support, error, offset

    def _core(self, support: Bool, row: int) -> Core | None:
        """Core of a row's tableau; None where it has to be damped or the time is up."""
        if self._over():
            return None
        group, index = divmod(row, self._problem.target.shape[1])
        free = self._problem.free[group, index]
        tableau = Tableau(self._problem.correlation[group], self._scaled[row], support[row], ~free)
        return None if tableau.damping else tableau.core(_WIDTH)

    def _remember(self, walked: _Walk, support: Bool) -> None:
        """Keep what a part found, given the supports that its walk began with."""
        better = np.argwhere(walked.best_error < self._errors[walked.rows])
        for at, place in better.tolist():
            row, columns = walked.rows[at], walked.cores[at].columns
            self._errors[row, place] = walked.best_error[at, place]
            self._masks[row, place] = support[row]
            self._masks[row, place, columns] = walked.best_inside[at, place, : len(columns)]

    def best(self) -> Bool:
        """The support of least error that keeps as many weights as the first one, ``[groups, rows, cols]``."""
        count = len(self._errors)
        reach = min(_SLACK, count * _SPREAD)
        error = np.full(2 * reach + 1, np.inf)
        error[reach] = 0.0
        chosen = np.empty((count, len(error)), np.intp)
        for row in range(count):
            padded = np.pad(error, _SPREAD, constant_values=np.inf)
            # [choice, surplus of the rows so far]
            total = sliding_window_view(padded, len(error))[::-1] + self._errors[row, :, None]
            chosen[row] = total.argmin(axis=0)
            error = total.min(axis=0)
        surplus, place = 0, np.empty(count, np.intp)
        for row in range(count - 1, -1, -1):
            place[row] = chosen[row, surplus + reach]
            surplus -= int(_OFFSETS[place[row]])
        return self._masks[np.arange(count), place].reshape(self._problem.target.shape)


def _fair_price(cores: list[Core]) -> float:
    """What a kept weight is worth: between the median row's cheapest drop and its most gainful grow."""
    drops, grows = [], []
    for core in cores:
        alone = core.state**2 / core.matrix.diagonal()
        if core.kept:
            drops.append(-alone[: core.kept].max())
        if core.kept < len(alone):
            grows.append(alone[core.kept :].max())
    if not drops or not grows:
        return 0.0
    return float(np.median(drops) + np.median(grows)) / 2


class _Walk:
    """Rows of a layer that walk in step.

    Attributes
    ----------
    rows
        Which rows of the layer.
    cores
        Their cores.
    inside
        Kept now, ``[rows, size]``, in the order of the core's columns.
    error, offset
        Row errors now, and how many weights more than at first.
    best_error, best_inside
        The best that was met for each offset, ``[rows, 2 * spread + 1(, size)]``.
    """

    def __init__(
        self, rows: _Index, cores: list[Core], error: Float64, offset: _Index, best: Float64, price: float
    ) -> None:
        self.rows, self.cores, self.error, self.offset = rows, cores, error, offset
        self._best, self._price, self._line = best, price, np.arange(len(rows))
        size = max(1, *(len(core.columns) for core in cores))
        shape = (len(rows), size)
        self._real: Bool = np.zeros(shape, np.bool_)
        self.inside: Bool = np.zeros(shape, np.bool_)
        self._matrix, self._state = np.zeros((*shape, size)), np.zeros(shape)
        for at, core in enumerate(cores):
            count = len(core.columns)
            self._real[at, :count] = True
            self.inside[at, : core.kept] = True
            self._matrix[at, :count, :count], self._state[at, :count] = core.matrix, core.state
        self._until = np.zeros(shape, np.intp)
        self.best_error = np.full((len(rows), 2 * _SPREAD + 1), np.inf)
        self.best_inside: Bool = np.zeros((*self.best_error.shape, size), np.bool_)

    def run(self, steps: int, seed: tuple[int, int]) -> None:
        """Make so many steps."""
        random = np.random.default_rng((*seed, int(self.rows[0])))
        for step, tenure in enumerate(
            random.integers(*_TENURE, (steps, 2, len(self.rows)), endpoint=True), 1
        ):
            self._step(step, tenure)

    def _step(self, step: int, tenure: _Index) -> None:
        """Every row makes its best move that is not barred, or any that beats all it has met."""
        line = self._line
        diagonal = np.einsum("rcc->rc", self._matrix)
        able = self._real & np.where(self.inside, diagonal < 0.0, diagonal > DEPENDENT)
        pivot = np.where(able, diagonal, 1.0)
        barred = self._until >= step
        beaten = self._best - (self.error + self._price * self.offset)
        first, second, pair_change = self._best_pair(pivot, able, barred, beaten)
        gain = self._state**2 / pivot
        full = np.where(self.inside, (self.offset <= -_SPREAD)[:, None], (self.offset >= _SPREAD)[:, None])
        alone = np.where(self.inside, -self._price, self._price) - gain
        only, change = _pick(np.where(able & ~full, alone, np.inf), barred, beaten)
        single = change <= pair_change
        moves = np.minimum(change, pair_change) < np.inf
        first = np.where(single, only, first)
        shift = np.where(single & moves, np.where(self.inside[line, first], -1, 1), 0)
        for column, going, wait in ((first, moves, tenure[0]), (second, moves & ~single, tenure[1])):
            self._toggle(column, going)
            self._until[line[going], column[going]] = step + wait[going]
        self.offset = self.offset + shift
        self._note()

    def _best_pair(
        self, pivot: Float64, able: Bool, barred: Bool, beaten: Float64
    ) -> tuple[_Index, _Index, Float64]:
        """Best swap of each row: (column to drop, column to grow, change)."""
        count = np.count_nonzero(self.inside, axis=1)
        if not count.max() or count.min() == self.inside.shape[1]:
            nothing = np.zeros(len(count), np.intp)
            return nothing, nothing, np.full(len(count), np.inf)
        order = np.argsort(~self.inside, axis=1, kind="stable")
        drop, grow = order[:, : count.max()], order[:, count.min() :]
        line = self._line[:, None]
        ratio = self._state / pivot
        gain = self._state * ratio
        across = self._matrix[line[:, :, None], drop[:, :, None], grow[:, None, :]]
        change = across * (2 * ratio[line, drop])[:, :, None] * ratio[line, grow][:, None, :]
        change -= gain[line, drop][:, :, None]
        change -= gain[line, grow][:, None, :]
        # 1 or more for a drop and a grow; what stands in the wrong list is shut out below.
        across *= across
        across /= (-pivot[line, drop])[:, :, None] * pivot[line, grow][:, None, :]
        change /= np.maximum(1.0 + across, 1.0)
        change += np.where(self.inside & able, 0.0, np.inf)[line, drop][:, :, None]
        change += np.where(~self.inside & able, 0.0, np.inf)[line, grow][:, None, :]
        waits = barred[line, drop][:, :, None] | barred[line, grow][:, None, :]
        flat = (len(count), -1)
        at, least = _pick(change.reshape(flat), waits.reshape(flat), beaten)
        row = self._line
        return drop[row, at // grow.shape[1]], grow[row, at % grow.shape[1]], least

    def _toggle(self, column: _Index, going: Bool) -> None:
        """Sweep each row that goes on its column, which is dropped or grown."""
        line = self._line
        across = self._matrix[line, column]
        inverse = np.where(going, 1.0 / np.where(going, across[line, column], 1.0), 0.0)
        scaled = across * inverse[:, None]
        value = self._state[line, column]
        self.error = self.error - value**2 * inverse
        self._state -= scaled * value[:, None]
        self._matrix -= scaled[:, :, None] * across[:, None, :]
        rows, columns = line[going], column[going]
        sign = np.where(self.inside[rows, columns], -1.0, 1.0)
        swept = scaled[rows] * sign[:, None]
        self._matrix[rows, columns], self._matrix[rows, :, columns] = swept, swept
        self._matrix[rows, columns, columns] = -inverse[rows]
        self._state[rows, columns] = sign * value[rows] * inverse[rows]
        self.inside[rows, columns] ^= True

    def _note(self) -> None:
        """Remember where each row stands, if that is better than what it met with as many weights."""
        place = self.offset + _SPREAD
        better = np.flatnonzero(self.error < self.best_error[self._line, place])
        self.best_error[better, place[better]] = self.error[better]
        self.best_inside[better, place[better]] = self.inside[better]
        self._best = np.minimum(self._best, self.error + self._price * self.offset)


def _pick(change: Float64, barred: Bool, beaten: Float64) -> tuple[_Index, Float64]:
    """Least entry of each row that is not barred, or of all where that is below ``beaten``: (place, value)."""
    line = np.arange(len(change))
    place = change.argmin(axis=1)
    least = change[line, place]
    # Mostly the least entry is not barred, or bold enough.
    again = np.flatnonzero(barred[line, place] & (least >= beaten))
    if again.size:
        free = np.where(barred[again], np.inf, change[again])
        place[again] = free.argmin(axis=1)
        least[again] = free[np.arange(len(again)), place[again]]
    return place, least
