"""L-OBS: score all weights once by optimal brain surgery, remove them at once, correct the rest jointly.

Dong et al., Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon (arXiv 1705.07565):
the loss of removing weight q alone is ``w_q^2 / (2 (H^-1)_qq)`` (equation 7), all from the dense inverse. The
paper then adds up the updates of the single removals (equation 6), each of which disturbs the zeros of the
others. Here the set M goes together, ``w -= w_M ((H^-1)_MM)^-1 (H^-1)_M:``, the same formula for a set: on a
given set nothing can be better, and it equals the least squares refit of the kept weights.
"""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.problem import DEFAULT_OPTIONS, UNSTRUCTURED, LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.projection import pattern_mask
from pot_sparsity.algorithms.pruning.refit import damped_inverse, refit


def l_obs(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Zero the weights of least one-shot loss and refit the others (a :class:`Solver`)."""
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    inverses = [damped_inverse(matrix) for matrix in problem.second]
    diagonal = np.stack([inverse.diagonal() for inverse, _ in inverses])[:, None, :]
    score = np.where(problem.free, -1.0, problem.target**2 / diagonal)
    mask = pattern_mask(score, zeros, pattern)
    weight, damping = refit(problem, mask, workers=options.workers)
    return problem.result(weight, mask, max(damping, *(used for _, used in inverses)))
