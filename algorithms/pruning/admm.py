"""ADMM pruning with an exact refit (ALPS): better than greedy elimination, and cheaper.

Minimise ``1/2 tr((W - W*) H (W - W*)^T)`` over W that obeys the pattern: ``Z`` minimises the quadratic,
``D`` obeys the pattern, ``V`` prices their difference. In columns scaled to ``diag H = 1`` and with ``H = Q
diag(l) Q^T``::

    Z = (W* H - V + rho D) Q diag(1 / (l + rho)) Q^T
    D = project(Z + V / rho)
    V = V + rho (Z - D)

``rho`` grows a little in every iteration while the support moves (Meng et al., ALPS, arXiv 2406.07831,
section 3, which grows it in large steps; small steps cost more iterations and lower the error by 1 to 2.5 %).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float32, Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.magnitude import magnitude_mask
from pot_sparsity.algorithms.pruning.problem import (
    DEFAULT_OPTIONS,
    UNSTRUCTURED,
    LayerProblem,
    SolverOptions,
)
from pot_sparsity.algorithms.pruning.projection import pattern_mask
from pot_sparsity.algorithms.pruning.refit import refit
from pot_sparsity.algorithms.pruning.swap import polish

# Growth of rho per iteration while at least this fraction of the kept weights moved.
_GROWTH = ((0.1, 1.02), (0.005, 1.015), (0.0, 1.01))
_ITERATIONS = 400
# The support must stand still for this many iterations.
_PATIENCE = 3
# Layers that cost less than this many multiplications per iteration try several starting penalties.
_CHEAP = 2e7
_RHO = (0.05,)
_RHO_CHEAP = (0.01, 0.05, 0.2)


@dataclass(frozen=True)
class _Spectrum:
    """The scaled layer in float32, which is all that choosing a support needs, and H's eigenvectors."""

    right: Float32
    start: Float32
    values: Float32
    vectors: Float32


def admm(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Choose the support by ADMM, refit it exactly, keep the best point seen (a :class:`Solver`).

    Reads ``options.rho``, ``options.effort`` and the options of the polish.
    """
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    groups, rows, cols = problem.target.shape
    easy = magnitude_mask(problem, zeros, pattern)
    if not (~easy & ~problem.free).any() or not easy.any():
        return problem.result(*_with_mask(problem, easy))
    cheap = groups * rows * cols**2 <= _CHEAP
    spectrum = _spectrum(problem)
    found = [
        _best_mask(problem, spectrum, zeros, pattern, rho, options.effort)
        for rho in options.rho or (_RHO_CHEAP if cheap else _RHO)
    ]
    if cheap:
        score = np.where(problem.free, -1.0, (problem.target * problem.scale) ** 2)
        found += [(easy, problem.target), (pattern_mask(score, zeros, pattern), problem.target)]
    best = min(
        (problem.result(*_with_mask(problem, mask, start)) for mask, start in found),
        key=lambda result: result.error,
    )
    if not options.polish:
        return best
    polished = polish(problem, best.mask, pattern, swaps=options.polish_swaps, seconds=options.polish_seconds)
    result = problem.result(polished.weight, polished.mask, max(best.damping, polished.damping))
    return result if result.error <= best.error else replace(best, damping=result.damping)


def _with_mask(
    problem: LayerProblem, mask: Bool, start: Float64 | None = None
) -> tuple[Float64, Bool, float]:
    weight, damping = refit(problem, mask, start)
    return weight, mask, damping


def _spectrum(problem: LayerProblem) -> _Spectrum:
    """Scale the layer and decompose H; negative eigenvalues of an indefinite H count as 0."""
    start = problem.target * problem.scale
    values, vectors = np.linalg.eigh(problem.correlation)
    return _Spectrum(
        (start @ problem.correlation).astype(np.float32),
        start.astype(np.float32),
        np.maximum(values, 0.0).astype(np.float32)[:, None, :],
        vectors.astype(np.float32),
    )


def _best_mask(
    problem: LayerProblem, spectrum: _Spectrum, zeros: int, pattern: Pattern, rho: float, effort: float
) -> tuple[Bool, Float64]:
    """Iterate from one starting penalty until the support stands still.

    Returns
    -------
    mask, weight
        The last support and the weights of the last iteration on it (unscaled), where the refit may start.
    """
    blocked = problem.free
    transposed = spectrum.vectors.swapaxes(1, 2)
    sparse, dual = spectrum.start, np.zeros_like(spectrum.start)
    mask: Bool = np.ones(sparse.shape, np.bool_)
    still = 0
    for _ in range(int(_ITERATIONS * effort)):
        penalty = np.float32(rho)
        rotated = (spectrum.right - dual + penalty * sparse) @ spectrum.vectors
        rotated /= spectrum.values + penalty
        dense = rotated @ transposed
        candidate = dense + dual / penalty
        score = candidate * candidate
        score[blocked] = -1.0
        before, mask = mask, pattern_mask(score, zeros, pattern)
        sparse = candidate * mask
        dual += penalty * (dense - sparse)
        moved = int(np.count_nonzero(mask & ~before)) / max(1, int(np.count_nonzero(mask)))
        still = still + 1 if moved == 0.0 else 0
        if still == _PATIENCE:
            break
        rho *= next(factor for least, factor in _GROWTH if moved >= least) ** (1 / effort)
    return mask, np.where(mask, sparse / problem.scale, 0.0)
