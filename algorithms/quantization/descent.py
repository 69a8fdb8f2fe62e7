"""Cyclic coordinate descent on the integers of kept weights: the error never rises.

Behdin et al., QuantEase, Algorithm 1. With all others fixed, the best place of weight j of a row is the grid
point nearest to ``w_j - g_j / H_jj`` with ``g = (w - w*) H``. Rows share H, so a column of all rows moves at
once; the gradient of a block of columns is kept up to date inside the block and carried on by one product.
"""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.quantization.grid import Grid, Integers
from pot_sparsity.algorithms.quantization.problem import GridProblem, QuantizerOptions

_BLOCK = 64
# Alternations of descent and scale refit; the first few do nearly all.
_REFITS = 10
# A move must lower the error by more than rounding, relative to what moving one step costs alone.
_GAIN = 1e-12


def descend(
    problem: GridProblem, integers: Integers, grid: Grid, options: QuantizerOptions
) -> tuple[Integers, Grid]:
    """Sweep until no single integer can change for the better (or ``options.sweeps`` are done).

    Parameters
    ----------
    problem
        The layer and its support.
    integers
        Where to start, int32 ``[groups, rows, cols]``.
    grid
        Their grid; replaced by one of refitted scales with ``options.refit_scale``.

    Returns
    -------
    integers, grid
        Error at most that of the start, row by row.
    """
    problem.check(grid)
    steps = np.where(problem.mask, integers - grid.zero_point[..., None], 0).astype(np.float64)
    for _ in range(_REFITS if options.refit_scale else 0):
        _sweep_groups(problem, steps, grid, options.sweeps)
        refitted = _refit_scale(problem, steps, grid)
        if np.array_equal(refitted.scale, grid.scale):
            break
        grid = refitted
    _sweep_groups(problem, steps, grid, options.sweeps)
    return (steps + grid.zero_point[..., None]).astype(np.int32), grid


def _sweep_groups(problem: GridProblem, steps: Float64, grid: Grid, sweeps: int) -> None:
    """Sweep every group, in place on ``steps``."""
    for group, second in enumerate(problem.layer.second):
        scale = grid.scale[group]
        zero = grid.zero_point[group].astype(np.float64)
        limits = np.stack([grid.low - zero, grid.high - zero])
        target, mask = problem.layer.target[group], problem.mask[group]
        gradient = (steps[group] * scale[:, None] - target) @ second
        for _ in range(sweeps):
            if not _sweep(steps[group], gradient, second, scale, limits, mask):
                break


def _sweep(
    steps: Float64,
    gradient: Float64,
    second: Float64,
    scale: Float64,
    limits: Float64,
    mask: np.ndarray,
) -> bool:
    """Visit every column once; ``steps`` and ``gradient [rows, cols]`` change in place. False if none moved."""
    cols = steps.shape[1]
    any_moved = False
    for begin in range(0, cols, _BLOCK):
        end = min(cols, begin + _BLOCK)
        moves = np.zeros((len(steps), end - begin))
        local = gradient[:, begin:end].copy()
        for column in range(begin, end):
            at = column - begin
            curvature = second[column, column]
            pull = local[:, at] / (curvature * scale)
            aim = np.clip(np.rint(steps[:, column] - pull), limits[0], limits[1])
            move = aim - steps[:, column]
            # Change of error / (curvature * scale^2) is move * (2 pull + move).
            better = mask[:, column] & (move * (2 * pull + move) < -_GAIN)
            if not better.any():
                continue
            move = np.where(better, move, 0.0)
            steps[:, column] += move
            moves[:, at] = move * scale
            local += moves[:, at, None] * second[column, begin:end]
            any_moved = True
        if moves.any():
            gradient += moves @ second[begin:end]
    return any_moved


def _refit_scale(problem: GridProblem, steps: Float64, grid: Grid) -> Grid:
    """Scale of least error for fixed integers, ``(w* H z) / (z H z)``, where that is positive."""
    product = steps @ problem.layer.second
    power = np.einsum("grc,grc->gr", product, steps)
    wanted = np.einsum("grc,grc->gr", product, problem.layer.target)
    sound = (power > 0) & (wanted > 0)
    fitted = np.divide(wanted, power, out=grid.scale.copy(), where=sound)
    near = np.isclose(fitted, grid.scale, rtol=1e-9, atol=0.0) | ~(np.isfinite(fitted) & (fitted > 0))
    return grid.with_scale(np.where(near, grid.scale, fitted))
