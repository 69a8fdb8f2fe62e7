"""Small layers with correlated inputs and slow, obvious oracles for the pruning tests."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float64


def make_layer(
    seed: int, groups: int, rows: int, cols: int, rank: int | None = None
) -> tuple[Float64, Float64]:
    """Heavy-tailed weights and the second moment of correlated inputs of that rank."""
    random = np.random.default_rng(seed)
    samples = 4 * cols + 3 if rank is None else rank
    mixing = random.normal(size=(groups, cols, cols))
    inputs = np.maximum(random.normal(size=(groups, samples, cols)) @ mixing, 0.1)
    inputs *= np.exp(random.normal(size=(groups, 1, cols)) / 2)
    return random.standard_t(5, size=(groups, rows, cols)), inputs.swapaxes(1, 2) @ inputs / samples


def oracle_refit(target: Float64, second: Float64, mask: Bool) -> Float64:
    """Row by row ``np.linalg.solve`` on the support."""
    weight = np.zeros_like(target)
    for group, row in np.ndindex(*target.shape[:2]):
        kept = np.flatnonzero(mask[group, row])
        right = target[group, row] @ second[group]
        weight[group, row, kept] = np.linalg.solve(second[group][np.ix_(kept, kept)], right[kept])
    return weight


def oracle_error(weight: Float64, target: Float64, second: Float64) -> float:
    """Sum of ``d H d^T`` over all rows."""
    return float(
        sum(
            (weight[g, r] - target[g, r]) @ second[g] @ (weight[g, r] - target[g, r])
            for g, r in np.ndindex(*target.shape[:2])
        )
    )


def brute_force(target: Float64, second: Float64, zeros: int) -> float:
    """Least error over every mask with that many zeros."""
    best = np.inf
    for gone in combinations(range(target.size), zeros):
        mask = np.ones(target.size, np.bool_)
        mask[list(gone)] = False
        shaped = mask.reshape(target.shape)
        best = min(best, oracle_error(oracle_refit(target, second, shaped), target, second))
    return best


def textbook_obs(target: Float64, second: Float64, zeros: int) -> Bool:
    """Optimal Brain Compression as printed: a materialised inverse per row, then a heap over all rows."""
    groups, rows, cols = target.shape
    traces: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for group, row in np.ndindex(groups, rows):
        weight, inverse = target[group, row].copy(), np.linalg.inv(second[group])
        left, trace = list(range(cols)), []
        while left:
            losses = [weight[p] ** 2 / inverse[p, p] for p in left]
            p = left.pop(int(np.argmin(losses)))
            trace.append((p, min(losses)))
            weight -= weight[p] / inverse[p, p] * inverse[p]
            inverse -= np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        traces[group, row] = trace
    mask = np.ones(target.shape, np.bool_)
    for _ in range(zeros):
        at = min((key for key in traces if traces[key]), key=lambda key: traces[key][0][1])
        mask[at][traces[at].pop(0)[0]] = False
    return mask
