"""Wanda: drop the weights whose product with the size of their input is least (Sun et al., arXiv 2306.11695).

The score is ``|w_ij| sqrt(H_jj)`` (its square here): what dropping that one weight costs when all others stay
as they are. The paper compares within a row; here, as everywhere in this package, the whole layer is
compared, which lets rows share the zeros.
"""

from __future__ import annotations

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.problem import DEFAULT_OPTIONS, UNSTRUCTURED, LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.projection import pattern_mask
from pot_sparsity.algorithms.pruning.refit import refitted


def wanda(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Zero the weights of least score and leave the others as they are (a :class:`Solver`)."""
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    return problem.result(problem.target, wanda_mask(problem, zeros, pattern), 0.0)


def wanda_refit(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Zero the weights of least score and refit the others exactly (a :class:`Solver`)."""
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    mask = wanda_mask(problem, zeros, pattern)
    return refitted(problem, mask, workers=options.workers, products=options.refit_products)


def wanda_mask(problem: LayerProblem, zeros: int, pattern: Pattern) -> Bool:
    """Mask that keeps the largest ``|w_ij| sqrt(H_jj)``, ``[groups, rows, cols]``; free weights go first."""
    return pattern_mask(problem.saliency, zeros, pattern)
