"""What every layer solver shares: the call they obey, the checked problem, the error they report.

A layer is ``W* [groups, rows, cols]`` with ``H [groups, cols, cols]``, the second moment of its input. A
solver looks for the sparse ``W`` of least error ``sum_g tr((W - W*) H (W - W*)^T)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern, PruningResult

# An input whose second moment is this small beside the group's mean is rounding noise, not signal.
_DEAD = 1e-15
# Relative damping tried when a factorisation fails: 0, then these (multiples of mean(diag H)).
DAMPING_STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# A Cholesky pivot this small (of the diagonal entry it started from) means the matrix is rank deficient.
PIVOT_FLOOR = 1e-12


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the layer solvers; each solver reads those it knows.

    Attributes
    ----------
    rho
        ADMM: starting penalties; the best support found among them wins. Empty lets the size of the layer
        choose.
    effort
        ADMM: how many times slower than usual the penalty grows (1 to 100); costs time, lowers the error.
    restarts
        ADMM: how many times the best point is shaken and settled again, each row keeping the better of the two
        outcomes; None is none, or 10 with the polish.
    workers
        Threads over the rows of a layer; the result does not depend on it.
    polish
        ADMM and ExactOBS: end with the 1-swap polish (unstructured and ``n:m`` only). ADMM takes more effort
        then and, where the pattern is unstructured and the layer not too wide, searches for some seconds first.
    polish_swaps, polish_seconds
        Budget of the polish; None is no bound. A bound on swaps leaves the search out; one in seconds counts
        it in and makes the result depend on the machine.
    refit_products
        Solvers that refit: in layers where the exact solution would take seconds, end after so many products
        with H, near it. None solves to the end.
    """

    rho: tuple[float, ...] = ()
    effort: float = 1.0
    restarts: int | None = None
    workers: int = 1
    polish: bool = False
    polish_swaps: int | None = None
    polish_seconds: float | None = None
    refit_products: int | None = None

    def __post_init__(self) -> None:
        if any(not 0 < rho < np.inf for rho in self.rho):
            raise ValueError(f"rho must hold positive finite numbers, got {self.rho}")
        if not 1 <= self.effort <= 100:
            raise ValueError(f"effort must be between 1 and 100, got {self.effort}")
        if self.restarts is not None and self.restarts < 0:
            raise ValueError(f"restarts must not be negative, got {self.restarts}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.polish_swaps is not None and self.polish_swaps < 0:
            raise ValueError(f"polish_swaps must not be negative, got {self.polish_swaps}")
        if self.polish_seconds is not None and not self.polish_seconds >= 0:
            raise ValueError(f"polish_seconds must not be negative, got {self.polish_seconds}")
        if self.refit_products is not None and self.refit_products < 1:
            raise ValueError(f"refit_products must be at least 1, got {self.refit_products}")


DEFAULT_OPTIONS = SolverOptions()
UNSTRUCTURED = Pattern()


class Solver(Protocol):
    """A layer solver: pure function of the target weights and the second moment of the input.

    Parameters
    ----------
    target
        ``W*``, float64 ``[groups, rows, cols]``.
    second
        ``H``, float64 ``[groups, cols, cols]``, centred or not.
    zeros
        How many weights of the whole layer (all groups and rows) are to be pruned. Met exactly by
        ``unstructured``; ``block:c`` prunes the nearest number of blocks; ``n:m`` ignores it, since the
        pattern fixes the count. Weights that are already 0, and those of dead inputs, are pruned first.
    pattern
        Where zeros may stand.
    options
        Settings.

    Raises
    ------
    ValueError
        Where shapes disagree, a value is not finite, ``zeros`` is out of range or the pattern does not fit.
    """

    def __call__(
        self,
        target: Float64,
        second: Float64,
        zeros: int,
        pattern: Pattern = ...,
        *,
        options: SolverOptions = ...,
    ) -> PruningResult:
        """Prune one layer."""
        ...


def layer_error(weight: Float64, target: Float64, second: Float64) -> float:
    """``sum_g tr((W - W*) H (W - W*)^T)`` in float64; shapes ``[groups, rows, cols]`` and ``[groups, cols,
    cols]``.

    Rounding (and an indefinite H) can make the trace negative; 0 is returned then.
    """
    return float(row_errors(weight, target, second).sum().clip(min=0.0))


def row_errors(weight: Float64, target: Float64, second: Float64) -> Float64:
    """Layer error of each row, float64 ``[groups, rows]``."""
    difference = np.asarray(weight, np.float64) - target
    return np.asarray(np.einsum("grc,grc->gr", difference @ second, difference), np.float64)


@dataclass(frozen=True)
class LayerProblem:
    """A checked layer, ready for solvers. Build it with :meth:`of`.

    Attributes
    ----------
    target
        ``W*``, float64 ``[groups, rows, cols]``.
    given
        ``H`` as given, symmetrised: errors are measured on it.
    second
        ``H`` to solve with: dead inputs have their cross terms cleared and their diagonal set to the group's
        mean, so that a dead weight that is kept stays what it was.
    dead
        True where an input never varies from zero (``H_jj = 0``), ``[groups, cols]``.
    free
        True where pruning costs nothing: the weight is 0 already or its input is dead, ``[groups, rows,
        cols]``.
    """

    target: Float64
    given: Float64 = field(repr=False)
    second: Float64 = field(repr=False)
    dead: Bool = field(repr=False)
    free: Bool = field(repr=False)

    @classmethod
    def of(cls, target: Float64, second: Float64) -> LayerProblem:
        """Check shapes and values (ValueError if they are wrong), symmetrise H, set dead inputs aside."""
        target, second = np.asarray(target, np.float64), np.asarray(second, np.float64)
        if target.ndim != 3 or 0 in target.shape:
            raise ValueError(
                f"target weights must be [groups, rows, cols] and not empty, got shape {target.shape}"
            )
        expected = (target.shape[0], target.shape[2], target.shape[2])
        if second.shape != expected:
            raise ValueError(
                f"second moment must have shape {expected} for target {target.shape}, got {second.shape}"
            )
        if not np.isfinite(target).all():
            raise ValueError("target weights hold NaN or infinite values")
        if not np.isfinite(second).all():
            raise ValueError("second moment of the layer's input holds NaN or infinite values")
        given = (second + second.swapaxes(1, 2)) / 2
        diagonal = np.einsum("gcc->gc", given)
        mean = np.abs(diagonal).mean(axis=1, keepdims=True)
        dead = diagonal <= _DEAD * mean
        solved = given
        if dead.any():
            solved = np.where(dead[:, :, None] | dead[:, None, :], 0.0, given)
            alive = np.maximum((~dead).sum(axis=1, keepdims=True), 1)
            fill = np.where(dead, 0.0, diagonal).sum(axis=1, keepdims=True) / alive
            np.einsum("gcc->gc", solved)[...] += np.where(dead, np.where(fill > 0, fill, 1.0), 0.0)
        return cls(target, given, solved, dead, (target == 0.0) | dead[:, None, :])

    @cached_property
    def scale(self) -> Float64:
        """``sqrt(diag H)`` of the solving H, positive, ``[groups, 1, cols]``."""
        diagonal: Float64 = np.einsum("gcc->gc", self.second)
        return np.asarray(np.sqrt(diagonal)[:, None, :], np.float64)

    @cached_property
    def correlation(self) -> Float64:
        """The solving H with columns scaled to unit diagonal, ``[groups, cols, cols]``."""
        scale = self.scale
        return np.asarray(self.second / (scale * scale.swapaxes(1, 2)), np.float64)

    @property
    def saliency(self) -> Float64:
        """What dropping each weight alone would cost, ``w_ij^2 H_jj``; -1 where it is free."""
        return np.where(self.free, -1.0, (self.target * self.scale) ** 2)

    def check_zeros(self, zeros: int) -> None:
        """Raise ValueError where ``zeros`` is not in ``0 .. number of weights``."""
        if not 0 <= zeros <= self.target.size:
            raise ValueError(f"zeros must be between 0 and {self.target.size}, got {zeros}")

    def result(self, weight: Float64, mask: Bool, damping: float) -> PruningResult:
        """Put the exact zeros in place and measure the error on H as given."""
        kept = np.where(mask, weight, 0.0)
        if not np.isfinite(kept).all():
            raise np.linalg.LinAlgError(
                "the solver produced weights that are not finite: H is too ill-conditioned"
            )
        error = layer_error(kept, self.target, self.given)
        energy = layer_error(np.zeros_like(kept), self.target, self.given)
        return PruningResult(kept, mask, error, error / energy if energy > 0 else 0.0, damping)
