"""The order in which exact elimination removes the weights (or blocks) of a row, at the speed of matrix
products.

All rows start from one inverse. After k removals a row's inverse is ``Hinv - U^T U`` with ``U [k, cols]``
kept per row: a removal needs its diagonal and one column of it, never a rank-1 update of a whole matrix. Every
few dozen removals the columns of the weights that are likely to go next are computed together, in one product.
"""

from __future__ import annotations

import threading
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.pruning.parallel import RowPool, slices

# Removals between two computations of columns, and how many columns are computed.
_LAZY = 128
_AHEAD = 160
# Bytes of U in flight per thread; bytes of U for blocks.
_MEMORY = 24 * 2**20
_CACHE = 24 * 2**20
_ROWS = 64
# U is packed to the weights still alive once they are fewer than this part of its width.
_PACK = 0.8
# From here on single precision chooses the order, as the reference code does throughout; the refit does not.
_SINGLE_COLS = 768
_TINY = 1e-30

Order: TypeAlias = NDArray[np.intp]
_Floating: TypeAlias = NDArray[np.floating]


def trace_weights(
    weight: Float64, inverse: Float64, steps: int, limit: tuple[int, int] | None, pool: RowPool
) -> tuple[Order, Float64]:
    """Remove ``steps`` single weights from each row, cheapest ``w_p^2 / Hinv_pp`` first (OBC, equations 3
    and 4).

    Parameters
    ----------
    weight, inverse
        float64 ``[rows, cols]`` and ``[cols, cols]``.
    steps
        Removals per row; at most ``cols``, and with ``limit`` at most what it leaves.
    limit
        (size, most): of every ``size`` adjacent columns at most ``most`` may go; None is no limit.
    pool
        Threads for batches of rows.

    Returns
    -------
    order, losses
        Columns in the order of their removal and what each removal cost, ``[rows, steps]``.
    """
    rows, cols = weight.shape
    kind: type[np.float32] | type[np.float64] = np.float32 if cols >= _SINGLE_COLS else np.float64
    shared: _Floating = inverse.astype(kind)
    batch = int(np.clip(_MEMORY // (shared.itemsize * cols * max(1, steps)), 1, min(_ROWS, rows)))
    order = np.empty((rows, steps), np.intp)
    losses = np.empty((rows, steps))
    own = _Room((batch, steps, cols), kind)

    def trace(part: slice) -> None:
        _trace_weights(weight[part].astype(kind), shared, limit, order[part], losses[part], own)

    pool.map(trace, slices(rows, batch))
    return order, losses


class _Room(threading.local):
    """Room for U and for the columns computed ahead, one per thread: fresh memory of this size is slow."""

    def __init__(self, shape: tuple[int, int, int], kind: type[np.float32] | type[np.float64]) -> None:
        batch, _, cols = shape
        self.factors: _Floating = np.empty(shape, kind)
        self.columns: _Floating = np.empty((batch, min(_AHEAD, cols), cols), kind)


def _trace_weights(
    weight: _Floating,
    shared: _Floating,
    limit: tuple[int, int] | None,
    order: Order,
    losses: Float64,
    room: _Room,
) -> None:
    """Trace one batch of rows into ``order`` and ``losses``; a weight that may not go is set to infinity."""
    rows, cols = weight.shape
    line = np.arange(rows)
    alive: Order = np.broadcast_to(np.arange(cols), (rows, cols))
    diagonal = np.repeat(shared.diagonal()[None], rows, axis=0)
    gone = np.zeros((rows, cols), np.bool_)
    lost = np.zeros((rows, 0 if limit is None else cols // limit[0]), np.intp)
    steps = order.shape[1]
    for begin in range(0, steps, _LAZY):
        if cols - begin < _PACK * alive.shape[1]:
            keep = np.nonzero(~gone)[1].reshape(rows, -1)
            for row in range(rows):
                packed = room.factors[row, :begin, : alive.shape[1]].take(keep[row], axis=1)
                room.factors[row, :begin, : keep.shape[1]] = packed
            alive = np.take_along_axis(alive, keep, axis=1)
            weight = np.take_along_axis(weight, keep, axis=1)
            diagonal = np.take_along_axis(diagonal, keep, axis=1)
            gone = np.zeros(alive.shape, np.bool_)
        factors = room.factors[:rows, :, : alive.shape[1]]
        place = _look_ahead(weight * weight / diagonal, shared, alive, factors[:, :begin], room.columns)
        for step in range(begin, min(steps, begin + _LAZY)):
            chosen = (weight * weight / diagonal).argmin(axis=1)
            column = alive[line, chosen]
            value, pivot = weight[line, chosen], diagonal[line, chosen]
            order[:, step], losses[:, step] = column, value * value / pivot
            at = place[line, chosen]
            update = room.columns[line, at, : alive.shape[1]]
            for row in np.flatnonzero(at < 0).tolist():
                used = factors[row, :begin]
                update[row] = shared[column[row], alive[row]] - used[:, chosen[row]] @ used
            if step > begin:
                recent = factors[:, begin:step]
                update -= (recent[line, :, chosen][:, None, :] @ recent)[:, 0]
            root = np.sqrt(np.maximum(update[line, chosen], _TINY))[:, None]
            update = np.divide(update, root, out=factors[:, step])
            weight -= (value[:, None] / root) * update
            diagonal -= update * update
            np.maximum(diagonal, _TINY, out=diagonal)
            weight[line, chosen] = np.inf
            diagonal[line, chosen] = 1.0
            gone[line, chosen] = True
            if limit is not None:
                lost[line, column // limit[0]] += 1
                weight[lost[line[:, None], alive // limit[0]] == limit[1]] = np.inf


def _look_ahead(
    score: _Floating, shared: _Floating, alive: Order, factors: _Floating, columns: _Floating
) -> Order:
    """Fill ``columns`` with those of ``Hinv - U^T U`` whose weights score lowest; where each stands, or -1."""
    rows, width = alive.shape
    count = min(columns.shape[1], width)
    likely = np.argpartition(score, count - 1, axis=1)[:, :count]
    place = np.full((rows, width), -1, np.intp)
    np.put_along_axis(place, likely, np.arange(count)[None], axis=1)
    for row, at in enumerate(likely):
        out = columns[row, :count, :width]
        used = factors[row]
        np.matmul(used[:, at].T, used, out=out)
        np.subtract(shared[alive[row, at]][:, alive[row]], out, out=out)
    return place


def trace_blocks(
    weight: Float64, inverse: Float64, size: int, steps: int, pool: RowPool
) -> tuple[Order, Float64]:
    """Remove ``steps`` blocks of ``size`` adjacent columns from each row; see :func:`_trace_blocks`."""
    padded = inverse.shape[0]
    batch = int(np.clip(_CACHE // (8 * padded * max(1, steps * size)), 1, _ROWS))
    parts = pool.map(
        lambda part: _trace_blocks(weight[part], inverse, size, steps), slices(len(weight), batch)
    )
    return np.concatenate([order for order, _ in parts]), np.concatenate([loss for _, loss in parts])


def _trace_blocks(
    weight: Float64, inverse: Float64, size: int, steps: int
) -> tuple[NDArray[np.intp], Float64]:
    """Remove ``steps`` blocks of ``size`` adjacent columns from each row, cheapest first.

    With P the block: ``loss = w_P (Hinv_PP)^-1 w_P^T``; ``w -= w_P (Hinv_PP)^-1 Hinv_P:``;
    ``Hinv -= Hinv_:P (Hinv_PP)^-1 Hinv_P:`` (OBC, equations 3 to 5).

    Parameters
    ----------
    weight, inverse
        float64 ``[rows, padded]`` and ``[padded, padded]``, in the order of the layout.
    size, steps
        Columns per block (at least 2) and removals per row.

    Returns
    -------
    order, losses
        Blocks in the order of their removal and what each removal cost, ``[rows, steps]``.
    """
    rows, padded = weight.shape
    weight = weight.copy()
    line = np.arange(rows)
    count = padded // size
    blocks = np.arange(padded).reshape(count, size)
    diagonal = np.repeat(inverse[blocks[:, :, None], blocks[:, None, :]][None], rows, axis=0)
    factors = np.empty((rows, steps * size, padded))
    gone = np.zeros((rows, count), np.bool_)
    order = np.empty((rows, steps), np.intp)
    losses = np.empty((rows, steps))
    for step in range(steps):
        scores = _scores(weight.reshape(rows, count, size), diagonal)
        scores[gone] = np.inf
        chosen = scores.argmin(axis=1)
        order[:, step], losses[:, step] = chosen, scores[line, chosen]
        columns = inverse[blocks[chosen]]
        if step:
            used = factors[:, : step * size]
            inner = used.reshape(rows, step * size, count, size)[line, :, chosen]
            columns -= inner.swapaxes(1, 2) @ used
        corner = _corner(np.take_along_axis(columns, blocks[chosen][:, None, :], axis=2))
        update = np.linalg.solve(corner, columns)
        part = weight[line[:, None], blocks[chosen]]
        pull = np.linalg.solve(corner, part[..., None]).swapaxes(1, 2)
        weight -= (pull @ update)[:, 0]
        weight[line[:, None], blocks[chosen]] = 0.0
        factors[:, step * size : (step + 1) * size] = update
        tiles = update.reshape(rows, size, count, size).transpose(0, 2, 3, 1)
        diagonal -= tiles @ tiles.swapaxes(2, 3)
        diagonal[line, chosen] = np.eye(size)
        gone[line, chosen] = True
    return order, losses


def _scores(weight: Float64, diagonal: Float64) -> Float64:
    """``w_P (Hinv_PP)^-1 w_P^T`` of every block, ``[rows, count]``."""
    solved = np.linalg.solve(diagonal, weight[..., None])[..., 0]
    loss: Float64 = np.maximum(np.einsum("rbc,rbc->rb", weight, solved), 0.0)
    return loss


def _corner(block: Float64) -> Float64:
    """Lower Cholesky factor of each ``Hinv_PP [rows, size, size]``, floored against rounding."""
    floored = block.copy()
    diagonal = np.einsum("rcc->rc", floored)
    diagonal[...] = np.maximum(diagonal, _TINY)
    diagonal *= 1 + 1e-13
    return np.asarray(np.linalg.cholesky(floored), np.float64)
