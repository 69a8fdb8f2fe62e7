"""What the quantizers of a layer share: the call they obey, the checked problem, the result they report.

A quantizer places the kept weights of ``W [groups, rows, cols]`` on a given :class:`Grid` so that
``sum_g tr((W - W*) H (W - W*)^T)`` becomes small. Zeros stay zeros and take no part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.pruning.problem import LayerProblem, layer_error
from pot_sparsity.algorithms.pruning.refit import damped_cholesky, refit
from pot_sparsity.algorithms.quantization.grid import Grid, Integers


@dataclass(frozen=True)
class QuantizerOptions:
    """Settings of the quantizers; each reads those it knows.

    Attributes
    ----------
    order
        GPTQ: ``diagonal`` rounds the columns of largest H_jj first, ``columns`` goes as they stand.
    damping
        Multiple of mean(diag H) added to the diagonal from the start (OBQ and GPTQ); it grows where a
        factorisation fails.
    sweeps
        Descent: most sweeps over all columns; it stops when nothing moves.
    refit_scale
        Descent: after each convergence also fit the scale of every row (only where the grid is free).
    """

    order: Literal["diagonal", "columns"] = "diagonal"
    damping: float = 0.0
    sweeps: int = 50
    refit_scale: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.damping < np.inf:
            raise ValueError(f"damping must not be negative, got {self.damping}")
        if self.sweeps < 0:
            raise ValueError(f"sweeps must not be negative, got {self.sweeps}")


DEFAULT_OPTIONS = QuantizerOptions()


@dataclass(frozen=True)
class QuantizedResult:
    """What a quantizer returns.

    Attributes
    ----------
    integers
        int32 ``[groups, rows, cols]``; the zero point where a weight is pruned.
    weight
        What the integers stand for, float64; pruned entries are exactly 0.0.
    grid
        The grid, the given one unless its scales were refitted.
    error
        ``sum_g tr((W - W*) H (W - W*)^T)`` on the *undamped* H.
    relative_error
        ``error / sum_g tr(W* H W*^T)`` (0 where the denominator is 0).
    damping
        Relative damping that was used.
    """

    integers: Integers
    weight: Float64
    grid: Grid
    error: float
    relative_error: float
    damping: float = 0.0


class Quantizer(Protocol):
    """A quantizer of one layer: pure function of the target, the second moment and the grid.

    Parameters
    ----------
    target
        ``W*``, float64 ``[groups, rows, cols]``.
    second
        ``H``, float64 ``[groups, cols, cols]``, centred or not.
    grid
        Where weights may stand.
    mask
        True where a weight is kept; None keeps the target's non-zeros. Kept weights are refitted first where
        the mask takes something from the target.
    options
        Settings.

    Raises
    ------
    ValueError
        Where shapes disagree or a value is not finite.
    numpy.linalg.LinAlgError
        Where no damping makes H definite.
    """

    def __call__(
        self,
        target: Float64,
        second: Float64,
        grid: Grid,
        mask: Bool | None = None,
        *,
        options: QuantizerOptions = ...,
    ) -> QuantizedResult:
        """Quantize one layer."""
        ...


@dataclass(frozen=True)
class GridProblem:
    """A checked layer with its support. Build it with :meth:`of`.

    Attributes
    ----------
    layer
        The checked target and second moment.
    mask
        True where kept, ``[groups, rows, cols]``.
    start
        Best real weights on the support: what the integers have to come near to.
    damping
        Relative damping the refit of ``start`` needed.
    """

    layer: LayerProblem
    mask: Bool = field(repr=False)
    start: Float64 = field(repr=False)
    damping: float = 0.0

    @classmethod
    def of(cls, target: Float64, second: Float64, mask: Bool | None = None) -> GridProblem:
        """Check everything (ValueError) and refit the kept weights where the mask prunes."""
        layer = LayerProblem.of(target, second)
        kept = layer.target != 0.0 if mask is None else np.asarray(mask, np.bool_)
        if kept.shape != layer.target.shape:
            raise ValueError(f"mask must have shape {layer.target.shape}, got {kept.shape}")
        if not (layer.target[~kept] != 0.0).any():
            return cls(layer, kept, layer.target)
        start, damping = refit(layer, kept)
        return cls(layer, kept, start, damping)

    def check(self, grid: Grid) -> None:
        """Raise ValueError where the grid has not one scale per row."""
        if grid.scale.shape != self.mask.shape[:2]:
            raise ValueError(f"the grid must have scales {self.mask.shape[:2]}, got {grid.scale.shape}")

    def nearest(self, grid: Grid) -> Integers:
        """The start rounded to the grid."""
        self.check(grid)
        return grid.quantize(self.start)

    def result(self, integers: Integers, grid: Grid, damping: float) -> QuantizedResult:
        """Put the exact zeros in place and measure the error on H as given."""
        placed = np.where(self.mask, integers, grid.zero_point[..., None]).astype(np.int32)
        weight = grid.dequantize(placed)
        error = layer_error(weight, self.layer.target, self.layer.given)
        energy = layer_error(np.zeros_like(weight), self.layer.target, self.layer.given)
        relative = error / energy if energy > 0 else 0.0
        return QuantizedResult(placed, weight, grid, error, relative, max(damping, self.damping))


def damped_factor(matrix: Float64, damping: float) -> tuple[Float64, float]:
    """Lower Cholesky factor of ``matrix + d * mean(diag) * I`` for the least d from ``damping`` on that works.

    Returns the factor and d; raises numpy.linalg.LinAlgError where none does.
    """
    mean = float(np.einsum("ii->", matrix)) / len(matrix)
    damped = matrix
    if damping:
        damped = matrix.copy()
        np.einsum("ii->i", damped)[...] += damping * mean
    factor, more = damped_cholesky(damped, mean)
    return factor, damping + more
