"""GPTQ: round the columns in one order for all rows, each rounding making up for the errors before it.

Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, section 3. With ``H = L L^T`` in the reverse of the order of
rounding, ``tr((W - Q) H (W - Q)^T) = |(W - Q) L|^2``, and the update by the inverse of the weights not yet
rounded equals back substitution: the weight in column j is moved by ``sum_i (w_i - q_i) L_ij / L_jj`` over
the columns i rounded before it. So one factor does, and no inverse is formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.pruning.problem import row_errors
from pot_sparsity.algorithms.quantization.grid import Grid, Integers, merge_grids
from pot_sparsity.algorithms.quantization.problem import (
    DEFAULT_OPTIONS,
    GridProblem,
    QuantizedResult,
    QuantizerOptions,
    damped_factor,
)

# Columns between two products that carry the errors on.
_BLOCK = 64
# Bytes of factors in flight where every row has its own.
_MEMORY = 48 * 2**20


def gptq(
    target: Float64,
    second: Float64,
    grid: Grid,
    mask: Bool | None = None,
    *,
    options: QuantizerOptions = DEFAULT_OPTIONS,
) -> QuantizedResult:
    """Ordered rounding with exact compensation (a :class:`Quantizer`)."""
    problem = GridProblem.of(target, second, mask)
    integers, chosen, damping = round_columns(problem, [grid], options)
    return problem.result(integers, chosen, damping)


def round_columns(
    problem: GridProblem, grids: Sequence[Grid], options: QuantizerOptions
) -> tuple[Integers, Grid, float]:
    """Round on every grid and keep for each row the one of least error.

    Returns
    -------
    integers, grid, damping
        int32 ``[groups, rows, cols]``, the grid chosen for each row, the largest relative damping used.
    """
    for grid in grids:
        problem.check(grid)
    layer = problem.layer
    integers = np.broadcast_to(grids[0].zero_point[..., None], layer.target.shape).copy()
    take = np.zeros((len(grids), *problem.mask.shape[:2]), np.bool_)
    damping = 0.0
    for group, matrix in enumerate(layer.second):
        order = _backwards(matrix, options)
        for rows, columns, factor, used in _factors(matrix, problem.mask[group], order, options.damping):
            damping = max(damping, used)
            start = _gather(problem.start[group, rows], columns)
            lowest = np.full(len(rows), np.inf)
            for index, grid in enumerate(grids):
                scale, zero = grid.scale[group, rows], grid.zero_point[group, rows].astype(np.float64)
                steps = _round(start, factor, scale, grid.low - zero, grid.high - zero)
                found = _scatter(steps, columns, layer.target.shape[-1])
                weight = (found * scale[:, None])[None]
                error = row_errors(weight, layer.target[group : group + 1, rows], layer.given[group][None])[0]
                better = error < lowest
                lowest = np.minimum(error, lowest)
                integers[group, rows[better]] = (found + zero[:, None])[better].astype(np.int32)
                take[:index, group, rows[better]] = False
                take[index, group, rows[better]] = True
    chosen = grids[0]
    for grid, taken in zip(grids[1:], take[1:], strict=True):
        chosen = merge_grids(chosen, grid, taken)
    return integers, chosen, damping


def _backwards(matrix: Float64, options: QuantizerOptions) -> np.ndarray:
    """Columns in the reverse of the order they are rounded in."""
    if options.order == "columns":
        return np.arange(len(matrix))[::-1]
    return np.argsort(matrix.diagonal(), kind="stable")


def _factors(
    matrix: Float64, mask: Bool, order: np.ndarray, damping: float
) -> Iterator[tuple[np.ndarray, np.ndarray, Float64, float]]:
    """Rows that share a batch, their kept columns (padded with ``cols``), their factor(s) and the damping.

    Rows that keep everything share one factor ``[1, cols, cols]``; others have one each, ``[rows, m, m]``,
    padded with the identity. Rows that keep nothing do not appear.
    """
    cols = len(matrix)
    kept = mask.sum(axis=1)
    full = np.flatnonzero(kept == cols)
    if full.size:
        factor, used = damped_factor(matrix[np.ix_(order, order)], damping)
        yield full, np.broadcast_to(order, (len(full), cols)), factor[None], used
    some = np.flatnonzero((kept < cols) & (kept > 0))
    some = some[np.argsort(kept[some], kind="stable")]
    while some.size:
        # The widest row comes last and sets the size of its batch.
        width = int(kept[some[-1]])
        count = int(np.clip(_MEMORY // (8 * width**2), 1, len(some)))
        rows, some = some[len(some) - count :], some[: len(some) - count]
        columns = np.full((count, width), cols)
        factors = np.tile(np.eye(width), (count, 1, 1))
        worst = 0.0
        for at, row in enumerate(rows):
            support = order[mask[row, order]]
            size = len(support)
            factors[at, :size, :size], used = damped_factor(matrix[np.ix_(support, support)], damping)
            columns[at, :size] = support
            worst = max(worst, used)
        yield rows, columns, factors, worst


def _gather(weight: Float64, columns: np.ndarray) -> Float64:
    """Weights ``[rows, cols]`` in the order of ``columns [rows, m]``; padding is 0."""
    padded = np.concatenate([weight, np.zeros((len(weight), 1))], axis=1)
    return np.take_along_axis(padded, columns, axis=1)


def _scatter(steps: Float64, columns: np.ndarray, cols: int) -> Float64:
    """Inverse of :func:`_gather`."""
    full = np.zeros((len(steps), cols + 1))
    np.put_along_axis(full, columns, steps, axis=1)
    return full[:, :cols]


def _round(weight: Float64, factor: Float64, scale: Float64, low: Float64, high: Float64) -> Float64:
    """Round ``[rows, m]`` from the last column to the first; returns steps from zero, ``low`` to ``high``.

    ``factor`` is lower triangular, ``[1, m, m]`` or ``[rows, m, m]``.
    """
    rows, width = weight.shape
    steps, errors = np.empty((rows, width)), np.zeros((rows, width))
    for end in range(width, 0, -_BLOCK):
        begin = max(0, end - _BLOCK)
        done = factor[:, end:, begin:end]
        moved = weight[:, begin:end].copy()
        diagonal = np.einsum("bii->bi", factor[:, begin:end, begin:end])
        pull = errors[:, end:] @ done[0] if len(factor) == 1 else (errors[:, None, end:] @ done)[:, 0]
        for column in range(end - 1, begin - 1, -1):
            at = column - begin
            value = moved[:, at] + pull[:, at] / diagonal[:, at]
            step = np.clip(np.rint(value / scale), low, high)
            steps[:, column] = step
            error = moved[:, at] - step * scale
            errors[:, column] = error
            pull[:, :at] += error[:, None] * factor[:, column, begin:column]
    return steps
