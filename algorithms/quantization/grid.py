"""Grids of integers that weights are placed on: one scale and one zero point per row.

A weight is ``w = scale * (q - zero_point)`` with an integer ``low <= q <= high``. The zero point is an integer
of that range, so an exact zero has an exact place on every grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Float64

Integers: TypeAlias = NDArray[np.int32]

_MAX_BITS = 16
# The search shrinks a row's range to this share of it, in so many steps (OBC: 0.2 and 80).
_SMALLEST = 0.2
_STEPS = 80
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Grid:
    """Uniform grids of all rows of a layer.

    Attributes
    ----------
    scale
        Distance between neighbours, positive, float64 ``[groups, rows]``.
    zero_point
        Integer that stands for 0, ``[groups, rows]``; all 0 for a symmetric grid.
    low, high
        Smallest and largest integer.

    Raises
    ------
    ValueError
        A scale is not positive and finite, or a zero point is outside ``low..high``.
    """

    scale: Float64
    zero_point: Integers
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.scale.ndim != 2 or self.zero_point.shape != self.scale.shape:
            raise ValueError(
                f"scale and zero point must both be [groups, rows], got {self.scale.shape} and {self.zero_point.shape}"
            )
        if not (np.isfinite(self.scale) & (self.scale > 0)).all():
            raise ValueError("every scale of a grid must be positive and finite")
        if ((self.zero_point < self.low) | (self.zero_point > self.high)).any():
            raise ValueError(f"every zero point must lie in {self.low}..{self.high}")

    def quantize(self, weight: Float64) -> Integers:
        """Nearest integers, clipped to the grid; exact zeros become the zero point. Shape of ``weight``."""
        zero = self.zero_point[..., None]
        scaled = np.rint(weight / self.scale[..., None]) + zero
        return np.clip(scaled, self.low, self.high).astype(np.int32)

    def dequantize(self, integers: Integers) -> Float64:
        """What integers ``[groups, rows, cols]`` stand for, float64."""
        steps = integers.astype(np.float64) - self.zero_point[..., None]
        return np.asarray(steps * self.scale[..., None], np.float64)

    def with_scale(self, scale: Float64) -> Grid:
        """The same integers with other scales."""
        return Grid(scale, self.zero_point, self.low, self.high)


def fit_grid(
    weight: Float64,
    bits: int,
    *,
    symmetric: bool = True,
    norm: float = 2.0,
    importance: Float64 | None = None,
) -> Grid:
    """Grid of least rounding error among shrunk ranges of each row.

    Rounding errors are summed as ``importance * |w - q|^norm``. With the diagonal of H as importance and norm
    2 the sum is the layer error without its cross terms, which serves the solvers much better than the
    reference's unweighted norm 2.4.

    Parameters
    ----------
    weight
        float64 ``[groups, rows, cols]``.
    bits
        2 to 16. Symmetric grids run from ``-2^(bits-1)`` to ``2^(bits-1) - 1``, others from 0 to ``2^bits - 1``.
    symmetric
        Zero point 0, or one that makes the grid span the row's own range.
    norm
        Power of the rounding errors.
    importance
        Weight of each column, not negative, ``[groups, cols]``; all alike by default.

    Raises
    ------
    ValueError
        ``bits`` out of range or a weight that is not finite.
    """
    best, lowest = None, np.empty(0)
    for grid in shrunk_grids(weight, bits, symmetric=symmetric):
        error = np.abs(grid.dequantize(grid.quantize(weight)) - weight) ** norm
        total = (error if importance is None else error * importance[:, None, :]).sum(axis=-1)
        if best is None:
            best, lowest = grid, total
            continue
        better = total < lowest
        best, lowest = merge_grids(best, grid, better), np.minimum(total, lowest)
    assert best is not None
    return best


def shrunk_grids(
    weight: Float64, bits: int, *, symmetric: bool = True, steps: int = _STEPS, smallest: float = _SMALLEST
) -> Iterator[Grid]:
    """Grids that span the whole range of each row, then less and less of it down to ``smallest``."""
    if not 2 <= bits <= _MAX_BITS:
        raise ValueError(f"bits must be between 2 and {_MAX_BITS}, got {bits}")
    if not np.isfinite(weight).all():
        raise ValueError("weights hold NaN or infinite values")
    levels = 2**bits - 1
    least = np.minimum(weight.min(axis=-1), 0.0)
    most = np.maximum(weight.max(axis=-1), 0.0)
    if symmetric:
        most = np.maximum(most, -least)
        least = -most
    width = (most - least) / levels
    full = np.where(width > _TINY, width, 1.0)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, levels)
    zero = np.zeros(full.shape) if symmetric else np.clip(np.rint(-least / full), low, high)
    for step in range(steps):
        yield Grid(full * (1 - (1 - smallest) * step / steps), zero.astype(np.int32), low, high)


def merge_grids(first: Grid, second: Grid, take: NDArray[np.bool_]) -> Grid:
    """Rows of ``second`` where ``take [groups, rows]`` says so, else of ``first``; same range of integers."""
    return Grid(
        np.where(take, second.scale, first.scale),
        np.where(take, second.zero_point, first.zero_point),
        first.low,
        first.high,
    )
