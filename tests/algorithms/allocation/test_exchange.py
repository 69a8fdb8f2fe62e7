"""Exchanges between layers on objectives where distortions do not add up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.allocation.exchange import exchange
from pot_sparsity.algorithms.allocation.rate_distortion import allocate_zeros
from pot_sparsity.algorithms.arrays import Float64
from tests.algorithms.allocation.level_problems import pruned_network


def bounds_of(curves: list[Curve]) -> tuple[Int64, Int64]:
    sizes = np.array([curve.size for curve in curves], dtype=np.int64)
    return np.zeros_like(sizes), sizes


def coupled(curves: list[Curve], seed: int) -> Callable[[Int64], float]:
    """A distance in which layers matter more or less than their curves say, amplify each other, and saturate."""
    random = np.random.default_rng(seed)
    factors = random.lognormal(0.0, 0.5, len(curves))
    mixing = random.normal(size=(len(curves), len(curves)))
    mixing = mixing @ mixing.T / len(curves)
    scale = sum(float(curve.distortion.max()) for curve in curves)

    def distance(zeros: Int64) -> float:
        alone = factors * [float(curve.at(count)) for curve, count in zip(curves, zeros, strict=True)]
        return float(np.tanh((alone.sum() + 0.3 * np.sqrt(alone) @ mixing @ np.sqrt(alone)) / scale))

    return distance


@pytest.mark.parametrize("seed", range(3))
def test_a_few_dozen_evaluations_find_better_allocations(seed: int) -> None:
    curves = pruned_network(seed, 20, 20, spread=0.5)
    lower, upper = bounds_of(curves)
    total = int(0.8 * upper.sum())
    start = allocate_zeros(curves, total, lower, upper)
    distance = coupled(curves, seed)
    seen: list[Int64] = []

    def evaluate(zeros: Int64) -> float:
        seen.append(zeros)
        return distance(zeros)

    result = exchange(start, curves, evaluate, lower=lower, upper=upper, tries=40)

    assert len(seen) == 1 + len(result.trials) <= 41
    assert all(zeros.sum() == total for zeros in seen)
    assert all(((zeros >= lower) & (zeros <= upper)).all() for zeros in seen)
    assert result.before == distance(start)
    assert result.after == distance(result.zeros) < 0.98 * result.before
    kept = [trial.value for trial in result.trials if trial.kept]
    assert (np.diff([result.before, *kept]) < 0.0).all()
    assert kept[-1] == result.after
    assert np.sum([trial.kept for trial in result.trials]) >= 5
    again = exchange(start, curves, distance, lower=lower, upper=upper, tries=40)
    assert again.trials == result.trials


def test_trials_go_where_they_pay() -> None:
    """Two layers whose curves are wrong are found among twenty within a dozen evaluations of 380 exchanges."""
    zeros = np.linspace(0.0, 1000.0, 11)
    curves = [Curve(f"l{index}", 1000, zeros**2, {"nonzeros": 1000.0 - zeros}) for index in range(20)]
    factors = np.ones(20)
    factors[7], factors[13] = 0.1, 5.0
    lower, upper = bounds_of(curves)

    def distance(counts: Int64) -> float:
        return float(factors @ [float(curve.at(count)) for curve, count in zip(curves, counts, strict=True)])

    result = exchange(np.full(20, 500), curves, distance, lower=lower, upper=upper, tries=12)

    assert result.zeros[7] > 500
    assert result.zeros[13] < 500
    assert result.after < 0.9 * result.before


def test_additive_objectives_are_left_at_their_optimum() -> None:
    curves = pruned_network(3, 12, 30)
    lower, upper = bounds_of(curves)
    start = allocate_zeros(curves, int(0.7 * upper.sum()), lower, upper)

    def distance(zeros: Int64) -> float:
        return sum(float(curve.at(count)) for curve, count in zip(curves, zeros, strict=True))

    result = exchange(start, curves, distance, lower=lower, upper=upper, tries=30)

    assert result.before * 0.98 <= result.after <= result.before


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 6), priced=st.booleans(), data=st.data())
def test_cost_never_rises_and_bounds_hold(seed: int, layers: int, priced: bool, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    curves = pruned_network(seed, layers, 6, most=200)
    sizes = np.array([curve.size for curve in curves])
    lower = np.array([data.draw(st.integers(0, int(size))) for size in sizes])
    upper = np.array(
        [data.draw(st.integers(int(low), int(size))) for low, size in zip(lower, sizes, strict=True)]
    )
    start = np.array(
        [data.draw(st.integers(int(low), int(high))) for low, high in zip(lower, upper, strict=True)]
    )
    prices: Float64 | None = random.integers(1, 9, layers).astype(float) if priced else None
    weights = np.ones(layers) if prices is None else prices
    cost = weights @ (sizes - start)
    values = iter([0.5, *np.where(random.random(15) < 0.9, random.random(15), np.nan)])

    def evaluate(zeros: Int64) -> float:
        assert ((zeros >= lower) & (zeros <= upper)).all()
        assert weights @ (sizes - zeros) <= cost
        if prices is None:
            assert zeros.sum() == start.sum()
        return float(next(values))

    result = exchange(start, curves, evaluate, lower=lower, upper=upper, tries=15, prices=prices)

    assert result.after <= result.before


def test_bad_starts_are_refused() -> None:
    curves = pruned_network(0, 2, 5)
    lower, upper = bounds_of(curves)
    with pytest.raises(ValueError, match="outside its bounds"):
        exchange(upper + 1, curves, lambda zeros: 1.0, lower=lower, upper=upper, tries=1)
    with pytest.raises(ValueError, match="the distance at the start is nan"):
        exchange(lower, curves, lambda zeros: np.nan, lower=lower, upper=upper, tries=1)
    with pytest.raises(ValueError, match="prices must be positive"):
        exchange(lower, curves, lambda zeros: 1.0, lower=lower, upper=upper, tries=1, prices=np.zeros(2))
