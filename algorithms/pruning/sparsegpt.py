"""SparseGPT: columns from left to right, each pruned weight paid for by the columns to its right.

Frantar and Alistarh, SparseGPT (arXiv 2301.00774), Algorithm 1. All rows share one inverse, because all rows
have lost the same columns: with U the upper Cholesky factor of ``(H + d I)^-1``, the error of a pruned ``w_j``
is ``e_j = w_j / U_jj`` and the columns after it take ``w -= e_j U_j:``. Updates beyond a block of 128 columns
wait and are done in one product. It costs one factorisation and ``rows cols^2`` multiplications, which makes
it the fast method for very wide layers.

As in the reference code: damping 0.01 of mean(diag H); the mask of a block is chosen when the walk arrives
there, by ``w^2 / U_jj^2``, over all rows together; groups of ``n:m`` and blocks are chosen at their first
column. Not as there: every block of columns loses its exact share (the reference prunes one weight too many per
block), and a pattern with a stride is walked one kernel position after the other, so that groups stay adjacent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.magnitude import magnitude_mask
from pot_sparsity.algorithms.pruning.parallel import RowPool
from pot_sparsity.algorithms.pruning.problem import DEFAULT_OPTIONS, UNSTRUCTURED, LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.projection import block_count, pattern_index, top_k_mask
from pot_sparsity.algorithms.pruning.refit import damped_inverse

_BLOCK = 128
_DAMPING = 0.01


def sparsegpt(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Prune columns from left to right as published, without a refit (a :class:`Solver`)."""
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    easy = magnitude_mask(problem, zeros, pattern)
    if not (~easy & ~problem.free).any():
        return problem.result(problem.target, easy, 0.0)
    cols = problem.target.shape[-1]
    index = pattern_index(cols, 1 if pattern.kind == "unstructured" else pattern.m, pattern.stride)
    order = index[index < cols]
    lengths = np.count_nonzero(index < cols, axis=1)
    factors = np.empty_like(problem.second)
    damping = 0.0
    with RowPool(options.workers):
        for matrix, factor in zip(problem.second, factors, strict=True):
            level = _DAMPING * float(np.trace(matrix)) / cols
            inverse, used = damped_inverse(matrix[np.ix_(order, order)] + level * np.eye(cols))
            factor[...] = cholesky(inverse, lower=False, check_finite=False)
            damping = max(damping, _DAMPING + used)
        walk = _Walk(problem, factors, order, lengths, pattern, zeros)
        walk.run()
    restored = np.empty_like(order)
    restored[order] = np.arange(cols)
    return problem.result(walk.weight[..., restored], walk.mask[..., restored], damping)


class _Walk:
    """Weights on their way from the first column to the last, in the order of the pattern."""

    def __init__(
        self,
        problem: LayerProblem,
        factors: Float64,
        order: NDArray[np.intp],
        lengths: NDArray[np.intp],
        pattern: Pattern,
        zeros: int,
    ) -> None:
        self.weight = np.where(problem.free, 0.0, problem.target)[..., order]
        self.free = problem.free[..., order]
        self.mask: Bool = np.ones(self.weight.shape, np.bool_)
        self._factors, self._lengths, self._pattern = factors, lengths, pattern
        places = self.weight[..., 0].size
        if pattern.kind == "block":
            self._due, self._units = block_count(zeros, self.weight.size, places * len(lengths)), 0
        else:
            self._due, self._units = zeros - int(np.count_nonzero(self.free)), 0
        self._total = places * len(lengths) if pattern.kind == "block" else int((~self.free).sum())

    def run(self) -> None:
        """Walk block after block of at least 128 columns, each made of whole groups."""
        stops = np.cumsum(self._lengths)
        begin = first = 0
        while first < len(stops):
            last = min(int(np.searchsorted(stops, begin + _BLOCK)), len(stops) - 1)
            self._block(begin, int(stops[last]), self._lengths[first : last + 1])
            begin, first = int(stops[last]), last + 1

    def _block(self, begin: int, end: int, lengths: NDArray[np.intp]) -> None:
        """Choose what goes in columns ``begin .. end``, then prune column by column."""
        part = slice(begin, end)
        factor = self._factors[:, part, part]
        if self._pattern.kind != "n:m":
            self.mask[..., part] = self._chosen(part, lengths)
        starts = begin + np.cumsum(lengths) - lengths
        errors = np.zeros(self.weight[..., part].shape)
        for column in range(begin, end):
            if self._pattern.kind == "n:m" and (group := np.flatnonzero(starts == column)).size:
                inside = slice(column, column + int(lengths[group[0]]))
                best = np.argsort(-self._score(inside), axis=-1, kind="stable")[..., : self._pattern.n]
                self.mask[..., inside] = False
                np.put_along_axis(self.mask[..., inside], best, True, axis=-1)
            at = column - begin
            gone = ~self.mask[..., column]
            error = np.where(gone, self.weight[..., column] / factor[:, None, at, at], 0.0)
            errors[..., at] = error
            self.weight[..., column:end] -= error[..., None] * factor[:, None, at, at:]
            self.weight[..., column][gone] = 0.0
        self.weight[..., end:] -= errors @ self._factors[:, part, end:]

    def _score(self, part: slice) -> Float64:
        """``w_j^2 / U_jj^2`` as the weights stand now; -1 where a weight is free."""
        diagonal = np.einsum("gcc->gc", self._factors)[:, None, part]
        return np.where(self.free[..., part], -1.0, (self.weight[..., part] / diagonal) ** 2)

    def _chosen(self, part: slice, lengths: NDArray[np.intp]) -> Bool:
        """Mask of a block of columns that takes its share of the zeros that are due."""
        score = self._score(part)
        if self._pattern.kind == "unstructured":
            free = int(np.count_nonzero(self.free[..., part]))
            return top_k_mask(score, free + self._share(score.size - free))
        begins = np.cumsum(lengths) - lengths
        mean = np.add.reduceat(np.maximum(score, 0.0), begins, axis=-1) / lengths
        return np.repeat(top_k_mask(mean, self._share(mean.size)), lengths, axis=-1)

    def _share(self, units: int) -> int:
        """Zeros (or blocks) due among the next units, so that the total comes out exactly."""
        before = self._units * self._due // self._total
        self._units += units
        return self._units * self._due // self._total - before
