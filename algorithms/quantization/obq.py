"""OBQ: round the weight whose rounding costs least, one at a time, moving the others after each.

Frantar and Alistarh, Optimal Brain Compression, section 5 (equation 7) and Algorithm 3: exact elimination
with the target ``quant(w_p)`` in place of 0. As in pruning, all rows start from one inverse and keep what was
eliminated as factors ``U`` (``Hinv - U^T U``); every few dozen roundings it is rebuilt on what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.quantization.grid import Grid
from pot_sparsity.algorithms.quantization.problem import (
    DEFAULT_OPTIONS,
    GridProblem,
    QuantizedResult,
    QuantizerOptions,
    damped_factor,
)

# Roundings between two rebuilds of a row's inverse.
_LAZY = 128
# Bytes of inverses in flight.
_MEMORY = 64 * 2**20
_ROWS = 64
# From here on single precision chooses and updates, as the reference code does throughout.
_SINGLE_COLS = 768
_TINY = 1e-30
# An error this far beyond half a step is an outlier, not rounding of a tie.
_OUTLIER = 0.5 * (1 + 1e-6)

_Floating: TypeAlias = NDArray[np.floating]
_Order: TypeAlias = NDArray[np.intp]


def obq(
    target: Float64,
    second: Float64,
    grid: Grid,
    mask: Bool | None = None,
    *,
    options: QuantizerOptions = DEFAULT_OPTIONS,
) -> QuantizedResult:
    """Greedy rounding with exact compensation, outliers first (a :class:`Quantizer`)."""
    problem = GridProblem.of(target, second, mask)
    problem.check(grid)
    cols = problem.mask.shape[-1]
    kind: type[np.float32] | type[np.float64] = np.float32 if cols >= _SINGLE_COLS else np.float64
    integers = np.broadcast_to(grid.zero_point[..., None], problem.mask.shape).copy()
    damping = 0.0
    for group, matrix in enumerate(problem.layer.second):
        for rows, columns, inverse, used in _inverses(matrix, problem.mask[group], kind, options.damping):
            damping = max(damping, used)
            padded = np.concatenate([problem.start[group, rows], np.zeros((len(rows), 1))], axis=1)
            zero = grid.zero_point[group, rows].astype(np.float64)
            walk = _Walk(
                np.take_along_axis(padded, columns, axis=1).astype(kind),
                columns,
                inverse,
                grid.scale[group, rows, None].astype(kind),
                (grid.low - zero)[:, None].astype(kind),
                (grid.high - zero)[:, None].astype(kind),
                cols,
            )
            integers[group, rows] = (walk.run() + zero[:, None]).astype(np.int32)
    return problem.result(integers, grid, damping)


def _inverses(
    matrix: Float64, mask: Bool, kind: type[np.float32] | type[np.float64], damping: float
) -> Iterator[tuple[_Order, _Order, _Floating, float]]:
    """Rows of a batch, their kept columns (padded with ``cols``), their inverse(s) of H and the damping.

    Rows that keep everything share one inverse ``[cols, cols]``; others have one each, ``[rows, m, m]``, padded
    with the identity. Rows that keep nothing do not appear.
    """
    cols = len(matrix)
    size = np.dtype(kind).itemsize
    kept = mask.sum(axis=1)
    full = np.flatnonzero(kept == cols)
    if full.size:
        shared, used = _inverse(matrix, damping)
        batch = int(np.clip(_MEMORY // (size * cols**2), 1, _ROWS))
        for begin in range(0, len(full), batch):
            rows = full[begin : begin + batch]
            yield rows, np.tile(np.arange(cols), (len(rows), 1)), shared.astype(kind), used
    some = np.flatnonzero((kept < cols) & (kept > 0))
    some = some[np.argsort(kept[some], kind="stable")]
    while some.size:
        width = int(kept[some[-1]])
        count = int(np.clip(_MEMORY // (size * width**2), 1, min(len(some), _ROWS)))
        rows, some = some[len(some) - count :], some[: len(some) - count]
        columns = np.full((count, width), cols)
        inverses: _Floating = np.tile(np.eye(width, dtype=kind), (count, 1, 1))
        worst = 0.0
        for at, row in enumerate(rows):
            support = np.flatnonzero(mask[row])
            part, used = _inverse(matrix[np.ix_(support, support)], damping)
            inverses[at, : len(support), : len(support)] = part
            columns[at, : len(support)] = support
            worst = max(worst, used)
        yield rows, columns, inverses, worst


def _inverse(matrix: Float64, damping: float) -> tuple[Float64, float]:
    factor, used = damped_factor(matrix, damping)
    root = np.linalg.inv(factor)
    return root.T @ root, used


class _Walk:
    """One batch of rows on its way from real weights to steps of the grid."""

    def __init__(
        self,
        weight: _Floating,
        columns: _Order,
        inverse: _Floating,
        scale: _Floating,
        low: _Floating,
        high: _Floating,
        cols: int,
    ) -> None:
        self.weight = weight
        self.alive = columns
        self.inverse = inverse
        self.scale, self.low, self.high = scale, low, high
        diagonal = np.einsum("...cc->...c", inverse)
        self.diagonal: _Floating = np.broadcast_to(diagonal, weight.shape).copy()
        #: Steps from zero, one extra column for padding.
        self.steps = np.zeros((len(weight), cols + 1))

    def run(self) -> Float64:
        """Round everything; returns steps from zero, float64 ``[rows, cols]``."""
        left = self.weight.shape[1]
        while left:
            count = min(left, _LAZY)
            factors, gone = self._round(count)
            left -= count
            if left:
                self._rebuild(factors, np.nonzero(~gone)[1].reshape(len(gone), -1))
        return self.steps[:, :-1]

    def _round(self, count: int) -> tuple[_Floating, Bool]:
        """Round ``count`` weights of every row; returns ``U [rows, count, alive]`` and what is done."""
        weight, diagonal = self.weight, self.diagonal
        rows = len(weight)
        line = np.arange(rows)
        factors = np.empty((rows, count, weight.shape[1]), weight.dtype)
        gone = np.zeros(weight.shape, np.bool_)
        for step in range(count):
            nearest = np.clip(np.rint(weight / self.scale), self.low, self.high)
            error = np.where(gone, 0, weight - nearest * self.scale)
            chosen = self._choose(error, gone)
            self.steps[line, self.alive[line, chosen]] = nearest[line, chosen]
            column = self.inverse[line, chosen] if self.inverse.ndim == 3 else self._shared(chosen)
            if step:
                used = factors[:, :step]
                column = column - (used[line, :, chosen][:, None, :] @ used)[:, 0]
            root = np.sqrt(np.maximum(column[line, chosen], _TINY))[:, None]
            update = np.divide(column, root, out=factors[:, step])
            weight -= (error[line, chosen][:, None] / root) * update
            diagonal -= update * update
            np.maximum(diagonal, _TINY, out=diagonal)
            gone[line, chosen] = True
        return factors, gone

    def _choose(self, error: _Floating, gone: Bool) -> _Order:
        """The weight of least ``error^2 / Hinv_pp``; where outliers stand, the worst of them."""
        squared = error * error
        chosen = np.where(gone, np.inf, squared / self.diagonal).argmin(axis=1)
        worst = squared.argmax(axis=1)
        beyond = np.sqrt(squared[np.arange(len(error)), worst]) > _OUTLIER * self.scale[:, 0]
        picked: _Order = np.where(beyond, worst, chosen)
        return picked

    def _shared(self, chosen: _Order) -> _Floating:
        line = np.arange(len(chosen))
        column: _Floating = self.inverse[self.alive[line, chosen][:, None], self.alive]
        return column

    def _rebuild(self, factors: _Floating, keep: _Order) -> None:
        """Each row's ``Hinv - U^T U`` on the columns still alive."""
        rows, left = keep.shape
        rebuilt = np.empty((rows, left, left), self.weight.dtype)
        for row, at in enumerate(keep):
            own = self.inverse.ndim == 3
            source, index = (self.inverse[row], at) if own else (self.inverse, self.alive[row, at])
            update = factors[row].take(at, axis=1)
            np.subtract(source.take(index, axis=0).take(index, axis=1), update.T @ update, out=rebuilt[row])
        self.inverse = rebuilt
        self.alive = np.take_along_axis(self.alive, keep, axis=1)
        self.weight = np.take_along_axis(self.weight, keep, axis=1)
        self.diagonal = np.take_along_axis(self.diagonal, keep, axis=1)
