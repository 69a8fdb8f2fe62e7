"""ExactOBS: remove the weight (or block) whose loss is least, one at a time, updating the others after each.

Frantar and Alistarh, Optimal Brain Compression, Algorithm 1 and section 4. The order of removals inside a
row is found by :mod:`~pot_sparsity.algorithms.pruning.obs_trace`; here the rows are put together and
refitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.obs_trace import trace_blocks, trace_weights
from pot_sparsity.algorithms.pruning.parallel import RowPool
from pot_sparsity.algorithms.pruning.problem import DEFAULT_OPTIONS, UNSTRUCTURED, LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.projection import block_count, pattern_index, top_k_mask
from pot_sparsity.algorithms.pruning.refit import damped_inverse, refit
from pot_sparsity.algorithms.pruning.swap import polish

# A row is first traced this much further than the layer's mean sparsity asks for.
_AHEAD = 1.15


@dataclass(frozen=True)
class _Layout:
    """Columns in the order of the pattern: ``index [count, size]``, ``cols`` standing for "no column"."""

    index: NDArray[np.intp]
    cols: int

    @property
    def padded(self) -> int:
        return int(self.index.size)

    def weights(self, weight: Float64) -> Float64:
        """Reorder ``[rows, cols]`` to ``[rows, padded]``; missing columns are 0."""
        return np.concatenate([weight, np.zeros((len(weight), 1))], axis=1)[:, self.index.ravel()]

    def matrix(self, matrix: Float64) -> Float64:
        """Reorder ``[cols, cols]`` to ``[padded, padded]``; missing columns stand alone with 1."""
        order = self.index.ravel()
        real = np.flatnonzero(order < self.cols)
        full = np.eye(len(order))
        full[np.ix_(real, real)] = matrix[np.ix_(order[real], order[real])]
        return full


def exact_obs(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Greedy exact elimination, one mask for the whole layer, exact refit (a :class:`Solver`).

    The order inside a row never depends on other rows, so the heap over rows equals a threshold on each row's
    running maximum of losses. ``n:m`` stops touching a group that has lost ``m - n``; ``block:c`` removes
    blocks.
    """
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    size = 1 if pattern.kind == "unstructured" else pattern.m
    cols = problem.target.shape[-1]
    layout = _Layout(pattern_index(cols, size, pattern.stride), cols)
    inverses, damping = [], 0.0
    for matrix in problem.second:
        inverse, used = damped_inverse(matrix)
        inverses.append(layout.matrix(inverse))
        damping = max(damping, used)
    start = np.where(problem.free, 0.0, problem.target)
    with RowPool(options.workers) as pool:
        mask = (
            _prune_groups(start, inverses, layout, pattern.n, pool)
            if pattern.kind == "n:m"
            else _prune_blocks(start, inverses, layout, zeros, pool)
        )
    weight, used = refit(problem, mask, workers=options.workers)
    result = problem.result(weight, mask, max(damping, used))
    if not options.polish:
        return result
    polished = polish(
        problem,
        mask,
        pattern,
        swaps=options.polish_swaps,
        seconds=options.polish_seconds,
        workers=options.workers,
    )
    better = problem.result(polished.weight, polished.mask, max(result.damping, polished.damping))
    return better if better.error <= result.error else replace(result, damping=better.damping)


def _prune_groups(start: Float64, inverses: list[Float64], layout: _Layout, keep: int, pool: RowPool) -> Bool:
    """``n:m``: every row runs until each group has lost ``m - n``; no choice is left between rows."""
    count, size = layout.index.shape
    steps = count * (size - keep)
    mask = np.ones((*start.shape[:-1], layout.cols + 1), np.bool_)
    for group, inverse in enumerate(inverses):
        order, _ = trace_weights(layout.weights(start[group]), inverse, steps, (size, size - keep), pool)
        np.put_along_axis(mask[group], layout.index.ravel()[order], False, axis=1)
    return mask[..., : layout.cols]


def _prune_blocks(
    start: Float64, inverses: list[Float64], layout: _Layout, zeros: int, pool: RowPool
) -> Bool:
    """Unstructured and ``block:c``: trace every row, then threshold all running maxima at once."""
    groups, rows, cols = start.shape
    count, size = layout.index.shape
    wanted = block_count(zeros, start.size, groups * rows * count) if size > 1 else zeros
    mask = np.ones((groups, rows, cols + 1), np.bool_)
    if wanted == 0:
        return mask[..., :cols]
    order = np.zeros((groups, rows, count), np.intp)
    losses = np.full((groups, rows, count), np.inf)
    todo: Bool = np.ones((groups, rows), np.bool_)
    steps = min(count, int(np.ceil(_AHEAD * wanted / (groups * rows))) + 4)
    while True:
        for group, inverse in enumerate(inverses):
            some = np.flatnonzero(todo[group])
            if some.size:
                weights = layout.weights(start[group, some])
                traced, loss = (
                    trace_weights(weights, inverse, steps, None, pool)
                    if size == 1
                    else trace_blocks(weights, inverse, size, steps, pool)
                )
                order[group, some, :steps] = traced
                losses[group, some, :steps] = np.maximum.accumulate(loss, axis=1)
        # A stable choice among equals keeps removals of a row in their order: losses never fall along a row.
        removed = ~top_k_mask(np.where(np.isinf(losses), np.finfo(np.float64).max, losses), wanted)
        todo &= (removed.sum(axis=2) >= steps) & (steps < count)
        if not todo.any():
            break
        steps = min(count, steps + max(8, steps // 4))
    for group in range(groups):
        for row in range(rows):
            mask[group, row, layout.index[order[group, row, removed[group, row]]].ravel()] = False
    return mask[..., :cols]
