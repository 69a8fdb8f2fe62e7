"""Small problems over levels, with ties and levels without cost, and slow, obvious oracles for the solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve


@st.composite
def problems(draw: st.DrawFn, kinds: Sequence[str] = ("cost",), whole: bool = True) -> list[Curve]:
    """A few layers of a few levels in any order: ties, equal levels, free levels, curves that are not convex."""
    curves = []
    for index in range(draw(st.integers(1, 4))):
        levels = draw(st.integers(1, 5))
        distortion = draw(st.lists(st.integers(0, 9), min_size=levels, max_size=levels))
        numbers = st.integers(0, 7) if whole else st.floats(0.0, 7.0).map(lambda value: round(value, 6))
        costs = {
            kind: np.array(draw(st.lists(numbers, min_size=levels, max_size=levels)), dtype=float)
            for kind in kinds
        }
        curves.append(Curve(f"layer{index}", 7, np.array(distortion, dtype=float), costs))
    return curves


def pruned_network(
    seed: int, layers: int, levels: int, *, noise: float = 0.0, most: int = 5000, spread: float = 2.0
) -> list[Curve]:
    """Layers of many sizes whose distortion grows with sparsity (not smoothly with ``noise``), at scales that
    differ by ``spread`` (of their logarithm) between layers.
    """
    random = np.random.default_rng(seed)
    curves = []
    for index in range(layers):
        size = int(np.exp(random.uniform(np.log(3), np.log(most))))
        zeros = np.rint(np.linspace(0.0, 1.0, levels) * size)
        distortion = random.lognormal(0.0, spread) * np.expm1(random.uniform(2.0, 8.0) * zeros / size)
        distortion = (
            np.maximum.accumulate(distortion * random.lognormal(0.0, noise, levels)) if noise else distortion
        )
        costs = {NONZEROS: size - zeros, "flops": (size - zeros) * float(random.integers(1, 500))}
        curves.append(Curve(f"layer{index}", size, distortion, costs))
    return curves


def brute_force(curves: Sequence[Curve], budgets: Mapping[str, float]) -> tuple[float, float] | None:
    """Least distortion within all budgets and the least first cost it can be had for; None where nothing fits."""
    best: tuple[float, float] | None = None
    for levels in product(*(range(curve.distortion.size) for curve in curves)):
        totals = {
            kind: sum(curve.costs[kind][level] for curve, level in zip(curves, levels, strict=True))
            for kind in budgets
        }
        if all(totals[kind] <= budget for kind, budget in budgets.items()):
            value = sum(curve.distortion[level] for curve, level in zip(curves, levels, strict=True))
            found = (float(value), float(next(iter(totals.values()))))
            best = found if best is None else min(best, found)
    return best


def table_oracle(curves: Sequence[Curve], kind: str, budget: int) -> float:
    """Least distortion within the budget, by dynamic programming over a dictionary of reachable costs."""
    states = {0: 0.0}
    for curve in curves:
        grown: dict[int, float] = {}
        for spent, distortion in states.items():
            for cost, more in zip(curve.costs[kind].tolist(), curve.distortion.tolist(), strict=True):
                total = spent + round(cost)
                if total <= budget and distortion + more < grown.get(total, np.inf):
                    grown[total] = distortion + more
        states = grown
    return min(states.values())
