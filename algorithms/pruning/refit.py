"""Exact least squares on a fixed support: the optimum that layer-wise fine-tuning walks towards.

With kept set S of a row, ``w_S = (H_SS)^-1 (w* H)_S`` minimises ``(w - w*) H (w - w*)^T``. H is not damped
unless a factorisation fails; then ``(H_SS + d I) w_S = (w* H)_S + d w*_S`` is solved, which leaves an
unpruned row alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.linalg.lapack import dtrtri

from pot_sparsity.algorithms.arrays import Bool, Float32, Float64, PruningResult
from pot_sparsity.algorithms.pruning.parallel import RowPool, slices
from pot_sparsity.algorithms.pruning.problem import DAMPING_STEPS, PIVOT_FLOOR, LayerProblem

# Up to this many columns all rows are solved at once as identity-padded systems.
_BATCHED_COLS = 48
_BATCHED_ELEMENTS = 2**22
# Conjugate gradients take about this many products with H; beyond that Cholesky is cheaper.
_EXPECTED_PRODUCTS = 120
_MAX_PRODUCTS = 400
# Layers whose Cholesky factors would take more multiplications than this are only brought close, where there is
# a start: rounds (the last only judges the one before) of so many products in float32.
_DEAR = 2e11
_ROUNDS = 2
_PRODUCTS = 50
# Where the caller asks for few products: layers below so many multiplications are solved exactly all the same.
_BRIEF = 1e10
# Rows that share the products of conjugate gradients; an eighth of it are solved in one go by Cholesky.
_ROWS = 128
# Relative residual; the error it leaves is of second order (1e-7 of the layer error at a condition of 1e5).
_TOLERANCE = 1e-7


def refit(
    problem: LayerProblem,
    mask: Bool,
    start: Float64 | None = None,
    *,
    only: Bool | None = None,
    workers: int = 1,
    products: int | None = None,
) -> tuple[Float64, float]:
    """Best weights on a support, by batched solves, Cholesky per row or conjugate gradients, whichever is
    cheapest.

    Parameters
    ----------
    problem
        The layer.
    mask
        True where kept, ``[groups, rows, cols]``.
    start
        Where conjugate gradients start; the target by default.
    only
        Rows to solve, ``[groups, rows]``; the others are left at the target.
    workers
        Threads over rows; the result does not depend on it.
    products
        Products with H after which conjugate gradients in float32 end in layers where an exact solution would
        take seconds; None asks for the exact one.

    Returns
    -------
    weight, damping
        float64 ``[groups, rows, cols]``, exactly 0 off the support; the largest relative damping any row
        needed.

    Raises
    ------
    numpy.linalg.LinAlgError
        Where no damping makes a system solvable.
    """
    weight = np.where(mask, problem.target, 0.0)
    busy: Bool = np.any(~mask & ~problem.free, axis=-1) & np.any(mask, axis=-1)
    if only is not None:
        busy &= only
    if not busy.any():
        return weight, 0.0
    if problem.target.shape[-1] <= _BATCHED_COLS:
        return weight, _refit_batched(problem, mask, busy, problem.target @ problem.second, weight)
    damping = 0.0
    with RowPool(workers) as pool:
        for group in np.flatnonzero(busy.any(axis=1)).tolist():
            rows = np.flatnonzero(busy[group])
            used = _refit_group(problem, mask, rows, group, start, weight, pool, products)
            damping = max(damping, used)
    return weight, damping


def _refit_group(
    problem: LayerProblem,
    mask: Bool,
    rows: NDArray[np.intp],
    group: int,
    start: Float64 | None,
    weight: Float64,
    pool: RowPool,
    products: int | None,
) -> float:
    """Solve these rows of one group in place, by Cholesky or conjugate gradients; returns the damping."""
    second, target = problem.second[group], problem.target[group]
    kept = np.count_nonzero(mask[group, rows], axis=1).astype(np.float64)
    cost = float((kept**3).sum()) / 6
    by_gradients = 2 * cost > _EXPECTED_PRODUCTS * 2.0 * len(rows) * len(second) ** 2
    near: int | None = None  # products that bring it near
    if products is not None and cost > _BRIEF:
        near = products
    elif start is not None and cost > _DEAR:
        near = _PRODUCTS
    first = target if start is None else start[group]

    def solve(part: slice) -> float:
        some = rows[part]
        right = target[some] @ second
        if near is not None:
            weight[group, some] = _approach(second, right, mask[group, some], first[some], near)
            return 0.0
        if by_gradients:
            solved, damping = conjugate_gradients(second, right, mask[group, some], target[some], first[some])
            weight[group, some] = solved
            return damping
        damping = 0.0
        for row, wanted in zip(some, right, strict=True):
            support = np.flatnonzero(mask[group, row])
            weight[group, row, support], used = solve_support(second, wanted, target[row], support)
            damping = max(damping, used)
        return damping

    together = _ROWS if by_gradients or near is not None else _ROWS // 8
    return max(pool.map(solve, slices(len(rows), together)))


def refitted(
    problem: LayerProblem, mask: Bool, *, workers: int = 1, products: int | None = None
) -> PruningResult:
    """The layer with the weights of a support refitted, as solvers return it; raises as :func:`refit`."""
    weight, damping = refit(problem, mask, workers=workers, products=products)
    return problem.result(weight, mask, damping)


def solve_support(
    second: Float64, right: Float64, target: Float64, support: np.ndarray
) -> tuple[Float64, float]:
    """Solve one row on ``support`` by Cholesky; returns the kept weights and the damping that was needed."""
    sub = second[support][:, support]
    factor, damping = damped_cholesky(sub, float(np.einsum("ii->", second)) / len(second))
    wanted = right[support]
    if damping:
        wanted = wanted + damping * (float(np.einsum("ii->", second)) / len(second)) * target[support]
    return cho_solve((factor, True), wanted, check_finite=False), damping


def damped_cholesky(matrix: Float64, mean: float) -> tuple[Float64, float]:
    """Lower Cholesky factor of ``matrix + damping * mean * I`` for the least damping that works.

    A pivot below 1e-12 of its diagonal entry counts as failure: the matrix is rank deficient to working
    precision.

    Returns
    -------
    factor, damping
        Lower factor and the relative damping (0.0 where none was needed).

    Raises
    ------
    numpy.linalg.LinAlgError
        Where even the largest damping fails.
    """
    for damping in (0.0, *DAMPING_STEPS):
        damped = matrix.copy()
        np.einsum("ii->i", damped)[...] += damping * mean
        diagonal = damped.diagonal().copy()
        try:
            factor = cholesky(damped.T, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        if (factor.diagonal() ** 2 > PIVOT_FLOOR * diagonal).all():
            return np.asarray(factor), damping
    raise np.linalg.LinAlgError(
        f"second moment of the input is too indefinite: damping {DAMPING_STEPS[-1]} x mean(diag H) fails"
    )


def damped_inverse(matrix: Float64) -> tuple[Float64, float]:
    """Inverse of ``matrix + damping * mean(diag) * I`` for the least damping that works, and that damping."""
    factor, damping = damped_cholesky(matrix, float(np.trace(matrix)) / len(matrix))
    root, _ = dtrtri(factor, lower=1)
    return np.asarray(root.T @ root), damping


def _refit_batched(problem: LayerProblem, mask: Bool, busy: Bool, right: Float64, weight: Float64) -> float:
    """Solve all busy rows of all groups as stacks of small systems, in place; returns the damping."""
    cols = mask.shape[-1]
    groups, rows = np.nonzero(busy)
    means = np.einsum("gcc->g", problem.second) / cols
    step = max(1, _BATCHED_ELEMENTS // cols**2)
    worst = 0.0
    for begin in range(0, len(groups), step):
        group, row = groups[begin : begin + step], rows[begin : begin + step]
        kept = mask[group, row]
        pair = kept[:, :, None] & kept[:, None, :]
        system = np.where(pair, problem.second[group], np.eye(cols))
        damping = _least_damping(system, kept, means[group])
        worst = max(worst, float(damping.max()))
        shift = (damping * means[group])[:, None] * kept
        np.einsum("ncc->nc", system)[...] += shift
        wanted = np.where(kept, right[group, row], 0.0) + shift * problem.target[group, row]
        weight[group, row] = np.where(kept, np.linalg.solve(system, wanted[..., None])[..., 0], 0.0)
    return worst


def _least_damping(system: Float64, kept: Bool, means: Float64) -> Float64:
    """Relative damping each system ``[n, cols, cols]`` of a stack needs, ``[n]``."""
    damping = np.zeros(len(system))
    left = np.flatnonzero(~_definite(system))
    for level in DAMPING_STEPS:
        if not left.size:
            return damping
        damped = system[left]
        np.einsum("ncc->nc", damped)[...] += (level * means[left])[:, None] * kept[left]
        good = _definite(damped)
        damping[left[good]] = level
        left = left[~good]
    if left.size:
        raise np.linalg.LinAlgError(
            f"second moment of the input is too indefinite: damping {DAMPING_STEPS[-1]} x mean(diag H) fails"
        )
    return damping


def _definite(stack: Float64) -> Bool:
    """Which matrices of a stack have a sound Cholesky factor; halves the stack where one of it fails."""
    try:
        factor = np.linalg.cholesky(stack)
    except np.linalg.LinAlgError:
        if len(stack) == 1:
            return np.zeros(1, np.bool_)
        half = len(stack) // 2
        return np.concatenate([_definite(stack[:half]), _definite(stack[half:])])
    pivots = np.einsum("ncc->nc", factor) ** 2
    good: Bool = (pivots > PIVOT_FLOOR * np.einsum("ncc->nc", stack)).all(axis=1)
    return good


def conjugate_gradients(
    second: Float64, right: Float64, mask: Bool, target: Float64, start: Float64
) -> tuple[Float64, float]:
    """Masked, diagonally preconditioned conjugate gradients; all rows share one product with H per iteration.

    Parameters
    ----------
    second
        H of one group, float64 ``[cols, cols]``.
    right
        ``W* H``, float64 ``[rows, cols]``.
    mask, target, start
        Support, target and first guess, ``[rows, cols]``.

    Returns
    -------
    weight, damping
        float64 ``[rows, cols]``, 0 off the support, and the relative damping used.
    """
    mean = float(np.einsum("ii->", second)) / len(second)
    for damping in (0.0, *DAMPING_STEPS):
        shift = damping * mean
        weight = _gradients(second, right + shift * target, mask, start, shift)
        if weight is not None:
            return weight, damping
    raise np.linalg.LinAlgError("conjugate gradients met an indefinite second moment that no damping mends")


def _approach(second: Float64, right: Float64, mask: Bool, start: Float64, products: int) -> Float64:
    """Come close by conjugate gradients in float32: rounds that each work on the float64 residual of the last.

    For layers so wide that Cholesky takes minutes. ADMM ends within 1e-3 of the least error of its support, and
    from there one round comes within 1e-6 (measured on 2,304 columns at a condition of 5e5).
    """
    single = second.astype(np.float32)
    inverse = np.where(mask, 1.0 / second.diagonal(), 0.0)
    weight, best = np.where(mask, start, 0.0), np.full(len(mask), np.inf)
    goal = _TOLERANCE**2 * np.einsum("rc,rc,rc->r", right, right, inverse)
    found = weight
    for _ in range(_ROUNDS):
        residual = np.where(mask, right - found @ second, 0.0)
        energy = np.einsum("rc,rc,rc->r", residual, residual, inverse)
        better = energy < best
        weight = np.where(better[:, None], found, weight)
        best = np.minimum(energy, best)
        if not (better & (energy > goal)).any():
            break
        found = weight + _correction(
            single, residual.astype(np.float32), inverse.astype(np.float32), products
        )
    return weight


def _correction(second: Float32, residual: Float32, inverse: Float32, products: int) -> Float32:
    """Conjugate gradients from 0 until the residual is a thousandth; a row stops where rounding shows."""
    weight = np.zeros_like(residual)
    scaled = residual * inverse
    direction = scaled.copy()
    energy = np.einsum("rc,rc->r", residual, scaled)
    goal = 1e-6 * energy
    active = energy > goal
    for _ in range(products):
        product = direction @ second
        product[inverse == 0.0] = 0.0
        curvature = np.einsum("rc,rc->r", direction, product)
        active &= (energy > goal) & (curvature > 0.0)
        if not active.any():
            break
        step = np.where(active, energy / np.where(active, curvature, 1.0), np.float32(0.0))[:, None]
        weight += step * direction
        residual -= step * product
        scaled = residual * inverse
        fresh = np.einsum("rc,rc->r", residual, scaled)
        direction = scaled + (fresh / np.where(energy > 0, energy, 1.0))[:, None] * direction
        energy = fresh
    return weight


def _gradients(second: Float64, right: Float64, mask: Bool, start: Float64, shift: float) -> Float64 | None:
    """One run on ``H + shift I``; None where a direction of negative curvature shows."""
    inverse = np.where(mask, 1.0 / (second.diagonal() + shift), 0.0)
    weight = np.where(mask, start, 0.0)
    residual = np.where(mask, right - weight @ second - shift * weight, 0.0)
    scaled = residual * inverse
    direction = scaled.copy()
    energy = np.einsum("rc,rc->r", residual, scaled)
    goal = _TOLERANCE**2 * np.einsum("rc,rc,rc->r", right, right, inverse)
    for _ in range(_MAX_PRODUCTS):
        active = energy > goal
        if not active.any():
            return weight
        product = np.where(mask, direction @ second + shift * direction, 0.0)
        curvature = np.einsum("rc,rc->r", direction, product)
        if (curvature[active] <= 0).any():
            return None
        step = np.where(active, energy / np.where(active, curvature, 1.0), 0.0)[:, None]
        weight += step * direction
        residual -= step * product
        scaled = residual * inverse
        fresh = np.einsum("rc,rc->r", residual, scaled)
        direction = scaled + (fresh / np.where(energy > 0, energy, 1.0))[:, None] * direction
        energy = fresh
    return weight
