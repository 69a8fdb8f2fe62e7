"""Small layers and slow, obvious versions of what the quantizers do, one row at a time in float64."""

from __future__ import annotations

from itertools import product

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.quantization.grid import Grid, Integers


def make_layer(seed: int, groups: int, rows: int, cols: int) -> tuple[Float64, Float64]:
    """Weights and a well conditioned second moment of correlated inputs."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(groups, cols, 4 * cols + 8)) + random.normal(size=(groups, 1, 4 * cols + 8))
    return random.normal(size=(groups, rows, cols)), inputs @ inputs.swapaxes(1, 2) / inputs.shape[-1]


def make_grid(seed: int, groups: int, rows: int, *, symmetric: bool) -> Grid:
    """Grids of 8 points whose range cuts some weights off."""
    random = np.random.default_rng(seed + 1)
    scale = random.uniform(0.3, 0.6, (groups, rows))
    if symmetric:
        return Grid(scale, np.zeros((groups, rows), np.int32), -4, 3)
    return Grid(scale, random.integers(0, 8, (groups, rows)).astype(np.int32), 0, 7)


def nearest(value: float, scale: float, zero: int, low: int, high: int) -> int:
    return int(min(max(np.rint(value / scale) + zero, low), high))


def textbook_obq(target: Float64, second: Float64, grid: Grid, kept: np.ndarray) -> Integers:
    """Algorithm 3 with a materialised inverse per row on the kept columns, outliers first."""
    integers = np.broadcast_to(grid.zero_point[..., None], target.shape).copy()
    for group, row in np.ndindex(target.shape[:2]):
        scale, zero = float(grid.scale[group, row]), int(grid.zero_point[group, row])
        left = [int(c) for c in np.flatnonzero(kept[group, row])]
        weight = target[group, row].copy()
        if not left:
            continue
        inverse = np.zeros_like(second[group])
        inverse[np.ix_(left, left)] = np.linalg.inv(second[group][np.ix_(left, left)])
        while left:
            points = {c: nearest(weight[c], scale, zero, grid.low, grid.high) for c in left}
            errors = {c: weight[c] - scale * (points[c] - zero) for c in left}
            worst = max(left, key=lambda c, e=errors: abs(e[c]))  # type: ignore[misc]
            p = min(left, key=lambda c, e=errors, d=inverse: e[c] ** 2 / d[c, c])  # type: ignore[misc]
            if abs(errors[worst]) > scale / 2 * (1 + 1e-6):
                p = worst
            integers[group, row, p] = points[p]
            weight = weight - errors[p] / inverse[p, p] * inverse[p]
            inverse = inverse - np.outer(inverse[p], inverse[p]) / inverse[p, p]
            left.remove(p)
    return integers


def textbook_gptq(target: Float64, second: Float64, grid: Grid, kept: np.ndarray, diagonal: bool) -> Integers:
    """The same elimination, columns in a fixed order."""
    integers = np.broadcast_to(grid.zero_point[..., None], target.shape).copy()
    for group, row in np.ndindex(target.shape[:2]):
        scale, zero = float(grid.scale[group, row]), int(grid.zero_point[group, row])
        left = [int(c) for c in np.flatnonzero(kept[group, row])]
        if diagonal:
            left.sort(key=lambda c, h=second[group]: -h[c, c])  # type: ignore[misc]
        weight = target[group, row].copy()
        while left:
            inverse = np.linalg.inv(second[group][np.ix_(left, left)])
            p = left[0]
            integers[group, row, p] = nearest(weight[p], scale, zero, grid.low, grid.high)
            error = weight[p] - scale * (integers[group, row, p] - zero)
            weight[left] -= error / inverse[0, 0] * inverse[0]
            left = left[1:]
    return integers


def best_possible(target: Float64, second: Float64, scale: float, zero: int, low: int, high: int) -> float:
    """Least error of one row over all integers."""
    errors = []
    for points in product(range(low, high + 1), repeat=len(target)):
        difference = scale * (np.array(points, np.float64) - zero) - target
        errors.append(float(difference @ second @ difference))
    return min(errors)
