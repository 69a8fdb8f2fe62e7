"""ADMM pruning with an exact refit (ALPS): better than greedy elimination, and cheaper.

Minimise ``1/2 tr((W - W*) H (W - W*)^T)`` over W that obeys the pattern: ``Z`` minimises the quadratic,
``D`` obeys the pattern, ``V`` prices their difference. In columns scaled to ``diag H = 1``::

    Z = (W* H - V + rho D) (H + rho I)^-1
    D = project(Z + V / rho)
    V = V + rho (Z - D)

``rho`` grows a little in every iteration while the support moves (Meng et al., ALPS, arXiv 2406.07831,
section 3, which grows it in large steps; small steps cost more iterations and lower the error by 1 to 2.5 %).
The inverse is renewed every dozen iterations, by Cholesky in float32: that needs no eigendecomposition, and an
iteration takes one product with a ``cols x cols`` matrix instead of two, at the same error.

Restarts, which the paper does not have: from the best point, with the ``V`` that makes it stationary, a lower
``rho`` shakes the support and ADMM settles again. Rows are independent but for the number of weights they
share, so of the two points each row takes the one of less ``error + price * weights kept``, at the price that
keeps the count.

With the polish (unstructured) the best support is walked on from by tabu search, in turn with such restarts,
before the last swaps are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from scipy.linalg.lapack import spotrf, spotri

from pot_sparsity.algorithms.arrays import Bool, Float32, Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.magnitude import magnitude_mask
from pot_sparsity.algorithms.pruning.parallel import RowPool, slices
from pot_sparsity.algorithms.pruning.problem import (
    DEFAULT_OPTIONS,
    UNSTRUCTURED,
    LayerProblem,
    SolverOptions,
    row_errors,
)
from pot_sparsity.algorithms.pruning.projection import pattern_mask
from pot_sparsity.algorithms.pruning.refit import refit
from pot_sparsity.algorithms.pruning.swap import polish
from pot_sparsity.algorithms.pruning.tabu import Plan, TabuSearch

# Growth of rho per iteration while at least this fraction of the kept weights moved.
_GROWTH = ((0.1, 1.02), (0.005, 1.015), (0.0, 1.01))
_ITERATIONS = 400
# Iterations that share one inverse.
_HOLD = 12
# The support must stand still for this many iterations.
_PATIENCE = 3
# Layers that cost less than this many multiplications per iteration try several starting penalties.
_CHEAP = 2e7
# Layers that cost more than this let rho grow faster, up to three times.
_DEAR = 9e8
_RHO = (0.05,)
_RHO_CHEAP = (0.01, 0.05, 0.2)
# Penalties that restarts begin with, in turn: different ones shake different rows.
_RHO_RESTART = (0.1, 0.14)
# With the polish ADMM is given this much more effort, and so many restarts.
_POLISH_EFFORT = 2.0
_POLISH_RESTARTS = 10
# Rounds of tabu search before the polish: as many as an ordinary core makes in so many seconds, up to a bound.
# Every so many rounds ADMM shakes the best support and settles, from these penalties in turn.
_WALK_SECONDS = 4.0
_WALK_ROUNDS = 40
_WALK_PART = 8
_RHO_WALK = (0.1, 0.14, 0.08, 0.2)
# Rows per part, whatever the number of workers.
_ROWS = 64
# Rows and columns of a block that is mirrored at once.
_BLOCK = 128

# (penalty, pace, start=weights) -> support and weights, see _descend.
_Descent: TypeAlias = Callable[..., tuple[Bool, Float64]]


@dataclass(frozen=True)
class _Scaled:
    """The layer with columns scaled to ``diag H = 1``, in float32, which is all that choosing a support needs.

    Weights are divided by ``scale``, ``[groups, 1, cols]``, which a power of two brings near 1, so that squares stay
    within float32 whatever the size of the activations.
    """

    start: Float32
    second: Float32
    right: Float32
    scale: Float64

    @classmethod
    def of(cls, problem: LayerProblem) -> _Scaled:
        """Scale the layer."""
        largest = float(np.abs(problem.target * problem.scale).max())
        scale = np.ldexp(problem.scale, -int(np.frexp(largest)[1]))
        start, second = problem.target * scale, problem.correlation
        right = (start @ second).astype(np.float32)
        return cls(start.astype(np.float32), second.astype(np.float32), right, scale)

    def inverse(self, rho: float) -> Float32:
        """``(H + rho I)^-1`` of every group; negative eigenvalues of an indefinite H count as 0."""
        full = np.empty_like(self.second)
        for matrix, out in zip(self.second, full, strict=True):
            damped = matrix.T.copy(order="F")
            np.einsum("cc->c", damped)[...] += np.float32(rho)
            factor, failed = spotrf(damped, lower=1, overwrite_a=1, clean=0)
            if failed:
                values, vectors = np.linalg.eigh(matrix.astype(np.float64))
                out[...] = (vectors / (np.maximum(values, 0.0) + rho)) @ vectors.T
                continue
            half, _ = spotri(factor, lower=1, overwrite_c=1)
            _mirror(half.T, out)
        return full


def _mirror(upper: Float32, out: Float32) -> None:
    """Write the symmetric matrix whose upper triangle is given, block by block: the other triangle is not read."""
    for part in slices(len(upper), _BLOCK):
        behind = slice(part.stop, None)
        corner = np.triu(upper[part, part])
        out[part, part] = corner + np.triu(corner, 1).T
        out[part, behind] = upper[part, behind]
        out[behind, part] = upper[part, behind].T


@dataclass(frozen=True)
class _Point:
    """A support, its refitted weights ``[groups, rows, cols]``, the damping and what each row costs."""

    mask: Bool
    weight: Float64
    damping: float
    errors: Float64

    @property
    def error(self) -> float:
        """Layer error."""
        return float(self.errors.sum())


def admm(
    target: Float64,
    second: Float64,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    *,
    options: SolverOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Choose the support by ADMM, refit it exactly, keep the best point seen (a :class:`Solver`).

    Reads ``options.rho``, ``options.effort``, ``options.restarts``, ``options.workers`` and the options of
    the polish. Very large layers let ``rho`` grow faster, which costs up to 2 % of error.
    """
    problem = LayerProblem.of(target, second)
    problem.check_zeros(zeros)
    easy = magnitude_mask(problem, zeros, pattern)
    if not (~easy & ~problem.free).any() or not easy.any():
        point = _point(problem, options, easy)
        return problem.result(point.weight, point.mask, point.damping)
    layer = _Scaled.of(problem)
    with RowPool(options.workers) as pool:
        descend = partial(_descend, problem, layer, zeros, pattern, pool=pool)
        best = _search(problem, descend, easy, zeros, pattern, options)
        result = problem.result(best.weight, best.mask, best.damping)
        if not options.polish:
            return result
        until = np.inf if options.polish_seconds is None else time.monotonic() + options.polish_seconds
        support = best.mask
        if pattern.kind == "unstructured" and options.polish_swaps is None:
            support = _walked(problem, descend, best, options, pool, until)
    polished = polish(
        problem,
        support,
        pattern,
        swaps=options.polish_swaps,
        seconds=None if until == np.inf else max(0.0, until - time.monotonic()),
        workers=options.workers,
    )
    better = problem.result(polished.weight, polished.mask, max(best.damping, polished.damping))
    return better if better.error <= result.error else replace(result, damping=better.damping)


def _cost(problem: LayerProblem) -> float:
    """Multiplications per iteration."""
    groups, rows, cols = problem.target.shape
    return float(groups * rows * cols**2)


def _pace(problem: LayerProblem, options: SolverOptions) -> float:
    """How many times slower than usual the penalty grows."""
    return options.effort * float(np.clip(_DEAR / _cost(problem), 1 / 3, 1.0))


def _search(
    problem: LayerProblem,
    descend: _Descent,
    easy: Bool,
    zeros: int,
    pattern: Pattern,
    options: SolverOptions,
) -> _Point:
    """Best point of all starting penalties, then of the restarts."""
    cost, slow = _cost(problem), _pace(problem, options)
    pace = slow * (_POLISH_EFFORT if options.polish else 1.0)
    point = partial(_point, problem, options)
    found = [point(*descend(rho, pace)) for rho in options.rho or (_RHO_CHEAP if cost <= _CHEAP else _RHO)]
    if cost <= _CHEAP:
        found += [point(easy), point(pattern_mask(problem.saliency, zeros, pattern))]
    best = min(found, key=lambda candidate: candidate.error)
    restarts = _POLISH_RESTARTS if options.restarts is None and options.polish else options.restarts or 0
    for turn in range(restarts):
        penalty = _RHO_RESTART[turn % len(_RHO_RESTART)]
        other = point(*descend(penalty, slow, start=best.weight))
        mixed = _mixed(problem, best, other, zeros, pattern, options.workers)
        best = min((best, other, mixed), key=lambda candidate: candidate.error)
    return best


def _walked(
    problem: LayerProblem,
    descend: _Descent,
    best: _Point,
    options: SolverOptions,
    pool: RowPool,
    until: float,
) -> Bool:
    """Support that a tabu search finds from the best point, and from where ADMM settles once it is shaken."""
    plan = Plan.of(best.mask, _WALK_SECONDS, _WALK_ROUNDS)
    if not plan.rounds:
        return best.mask
    search = TabuSearch(
        problem, best.mask, best.errors, plan.steps, pool, over=lambda: time.monotonic() >= until
    )
    for turn, rounds in enumerate(slices(plan.rounds, _WALK_PART)):
        start = best
        if turn:
            if time.monotonic() >= until:
                break
            settled = _point(problem, options, search.best())
            penalty = _RHO_WALK[turn % len(_RHO_WALK)]
            start = _point(problem, options, *descend(penalty, _pace(problem, options), start=settled.weight))
        search.walk(start.mask, start.errors, rounds.stop - rounds.start, turn)
    return search.best()


def _point(problem: LayerProblem, options: SolverOptions, mask: Bool, start: Float64 | None = None) -> _Point:
    """Refit a support and price its rows."""
    weight, damping = refit(problem, mask, start, workers=options.workers)
    return _Point(mask, weight, damping, row_errors(weight, problem.target, problem.given))


def _descend(
    problem: LayerProblem,
    layer: _Scaled,
    zeros: int,
    pattern: Pattern,
    rho: float,
    pace: float,
    *,
    pool: RowPool,
    start: Float64 | None = None,
) -> tuple[Bool, Float64]:
    """Iterate from one penalty until the support stands still.

    Without ``start`` from the dense weights; with it from those sparse weights, as a stationary point.

    Returns
    -------
    mask, weight
        The last support and the weights of the last iteration on it (unscaled), where the refit may start.
    """
    parts = _parts(*layer.start.shape[:2])
    sparse = layer.start if start is None else (start * layer.scale).astype(np.float32)
    dual = np.zeros_like(sparse) if start is None else layer.right - sparse @ layer.second
    candidate, score = np.empty_like(sparse), np.empty_like(sparse)
    mask: Bool = sparse != 0.0
    inverse, penalty, still = layer.second, np.float32(rho), 0

    def step(part: tuple[slice, slice]) -> None:
        dense = (layer.right[part] - dual[part] + penalty * sparse[part]) @ inverse[part[0]]
        np.add(dense, dual[part] / penalty, out=candidate[part])
        np.multiply(candidate[part], candidate[part], out=score[part])
        score[part][problem.free[part]] = -1.0

    for turn in range(int(_ITERATIONS * max(1.0, pace))):
        if turn % _HOLD == 0:
            penalty = np.float32(rho)
            inverse = layer.inverse(rho)
        pool.map(step, parts)
        before, mask = mask, pattern_mask(score, zeros, pattern)
        sparse = candidate * mask
        # V + rho (Z - D), where Z + V / rho is the candidate.
        dual = penalty * (candidate - sparse)
        moved = int(np.count_nonzero(mask & ~before)) / max(1, int(np.count_nonzero(mask)))
        still = still + 1 if moved == 0.0 else 0
        if still == _PATIENCE:
            break
        rho *= next(factor for least, factor in _GROWTH if moved >= least) ** (1 / pace)
    return mask, np.where(mask, sparse / layer.scale, 0.0)


def _parts(groups: int, rows: int) -> list[tuple[slice, slice]]:
    """Cut ``groups x rows`` into parts of about ``_ROWS`` rows; small groups stay whole, several to a part."""
    if rows >= _ROWS or groups == 1:
        return [(slice(group, group + 1), part) for group in range(groups) for part in slices(rows, _ROWS)]
    return [(part, slice(None)) for part in slices(groups, _ROWS // rows)]


def _mixed(
    problem: LayerProblem, first: _Point, second: _Point, zeros: int, pattern: Pattern, workers: int
) -> _Point:
    """Each row from the point that serves it better, at the price per weight that keeps no more than are due.

    The few weights that are then missing are grown where the gradient promises most.
    """
    gain = second.errors - first.errors
    more = second.mask.sum(axis=2) - first.mask.sum(axis=2)
    surplus = int(first.mask.sum()) - int(np.count_nonzero(pattern_mask(problem.saliency, zeros, pattern)))
    # Blocks at the end of a row may be short: then even the fewest weights can be more than are due.
    surplus = min(surplus, -int(more[more < 0].sum()))
    low, high = 0.0, first.error / first.mask.sum() + float(np.abs(gain).max())
    while more[gain + high * more < 0.0].sum() + surplus > 0:
        high *= 2.0
    for _ in range(50):
        price = (low + high) / 2
        if more[gain + price * more < 0.0].sum() + surplus > 0:
            low = price
        else:
            high = price
    taken = (gain + high * more < 0.0)[..., None]
    chosen = np.where(taken, second.mask, first.mask)
    weight = np.where(taken, second.weight, first.weight)
    promise = ((problem.target - weight) @ problem.second / problem.scale) ** 2
    promise /= max(float(promise.max()), 1e-300)
    mask = pattern_mask(np.where(chosen, 2.0, np.where(problem.free, -1.0, promise)), zeros, pattern)
    changed = (mask != chosen).any(axis=2)
    again, damping = refit(problem, mask, weight, only=changed, workers=workers)
    weight = np.where(changed[..., None], again, weight)
    errors = row_errors(weight, problem.target, problem.given)
    return _Point(mask, weight, max(damping, first.damping, second.damping), errors)
