"""Magnitude pruning, the paper's baseline: smallest weights go; with or without an exact refit."""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.problem import DEFAULT_OPTIONS, UNSTRUCTURED, LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.projection import pattern_mask
from pot_sparsity.algorithms.pruning.refit import refitted


def magnitude(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Zero the smallest weights of the layer and leave the others as they are (a :class:`Solver`)."""
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    return problem.result(problem.target, magnitude_mask(problem, zeros, pattern), 0.0)


def magnitude_refit(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Zero the smallest weights and refit the others exactly: AdaPrune's optimum (a :class:`Solver`)."""
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    mask = magnitude_mask(problem, zeros, pattern)
    return refitted(problem, mask, workers=options.workers, products=options.refit_products)


def magnitude_mask(problem: LayerProblem, zeros: int, pattern: Pattern) -> Bool:
    """Mask that keeps the largest weights, ``[groups, rows, cols]``; free weights go first."""
    return pattern_mask(np.where(problem.free, -1.0, np.abs(problem.target)), zeros, pattern)
