"""From curves to exactly the number of zeros asked for."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation import LayerWeights
from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.algorithms.allocation.fill import fill
from pot_sparsity.algorithms.allocation.rate_distortion import (
    LevelSolver,
    allocate_zeros,
    rate_distortion,
    round_totals,
)
from tests.algorithms.allocation.level_problems import pruned_network


@st.composite
def bounded_networks(draw: st.DrawFn, convex: bool = False) -> tuple[list[Curve], Int64, Int64, int]:
    """Layers of a few weights with any levels, bounds, and a total within them."""
    curves, lower, upper = [], [], []
    for index in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 9))
        zeros = np.array(sorted(draw(st.sets(st.integers(0, size), min_size=1))))
        rises = np.array(
            draw(st.lists(st.integers(0, 5), min_size=zeros.size, max_size=zeros.size)), dtype=float
        )
        if convex:
            rises = np.sort(rises) * np.diff(zeros, prepend=zeros[0])
        curves.append(
            Curve(f"layer{index}", size, np.cumsum(rises), {NONZEROS: (size - zeros).astype(float)})
        )
        low = draw(st.integers(0, size))
        lower.append(low)
        upper.append(draw(st.integers(low, size)))
    total = draw(st.integers(sum(lower), sum(upper)))
    return curves, np.array(lower), np.array(upper), total


def predicted(curves: list[Curve], counts: Int64) -> float:
    return sum(float(curve.at(count)) for curve, count in zip(curves, counts, strict=True))


@settings(deadline=None, max_examples=200)
@given(network=bounded_networks(), solver=st.sampled_from(["dynamic_program", "hull"]))
def test_totals_are_exact_and_bounds_are_kept(
    network: tuple[list[Curve], Int64, Int64, int], solver: LevelSolver
) -> None:
    curves, lower, upper, total = network

    counts = allocate_zeros(curves, total, lower, upper, solver=solver)

    assert counts.sum() == total
    assert ((counts >= lower) & (counts <= upper)).all()
    np.testing.assert_array_equal(counts, allocate_zeros(curves, total, lower, upper, solver=solver))


@settings(deadline=None, max_examples=200)
@given(network=bounded_networks(), data=st.data())
def test_fill_reaches_the_total_from_anywhere(
    network: tuple[list[Curve], Int64, Int64, int], data: st.DataObject
) -> None:
    curves, lower, upper, total = network
    start = np.array([data.draw(st.integers(0, curve.size)) for curve in curves])

    counts = fill(curves, start, total, lower, upper)

    assert counts.sum() == total
    assert ((counts >= lower) & (counts <= upper)).all()
    clipped = np.clip(start, lower, upper)
    moved = counts - clipped
    assert (moved >= 0).all() or (moved <= 0).all()  # in one direction only


@settings(deadline=None, max_examples=150)
@given(network=bounded_networks(convex=True))
def test_fill_of_convex_curves_is_the_best_way_up(network: tuple[list[Curve], Int64, Int64, int]) -> None:
    curves, lower, upper, total = network
    upper = np.minimum(
        upper, [max(int(curve.zeros.max()), int(low)) for curve, low in zip(curves, lower, strict=True)]
    )
    total = min(total, int(upper.sum()))

    counts = fill(curves, lower, total, lower, upper)

    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    best = min(predicted(curves, np.array(trial)) for trial in product(*ranges) if sum(trial) == total)
    assert predicted(curves, counts) == pytest.approx(best)


def test_fill_follows_the_slopes_both_ways() -> None:
    costs = {NONZEROS: np.array([100.0, 50.0, 0.0])}
    flat = Curve("flat", 100, np.array([0.0, 1.0, 2.0]), costs)
    steep = Curve("steep", 100, np.array([0.0, 10.0, 30.0]), costs)
    bounds = np.array([0, 0]), np.array([90, 90])

    assert fill([flat, steep], np.array([50, 50]), 120, *bounds).tolist() == [70, 50]
    assert fill([flat, steep], np.array([50, 50]), 150, *bounds).tolist() == [90, 60]
    assert fill([flat, steep], np.array([50, 50]), 80, *bounds).tolist() == [50, 30]
    assert fill([flat, steep], np.array([50, 50]), 20, *bounds).tolist() == [20, 0]


def test_fill_goes_beyond_the_last_level_only_at_the_end() -> None:
    short = Curve("short", 100, np.array([0.0, 1.0]), {NONZEROS: np.array([100.0, 40.0])})
    steep = Curve("steep", 100, np.array([0.0, 1e6]), {NONZEROS: np.array([100.0, 0.0])})
    lower, upper = np.array([0, 0]), np.array([100, 100])

    assert fill([short, steep], np.array([0, 0]), 150, lower, upper).tolist() == [60, 90]
    assert fill([short, steep], np.array([0, 0]), 170, lower, upper).tolist() == [70, 100]
    assert fill([short, steep], np.array([70, 100]), 160, lower, upper).tolist() == [60, 100]
    with pytest.raises(
        ValueError, match="201 zeros cannot be reached: the bounds of the layers allow 0 to 200"
    ):
        fill([short, steep], np.array([0, 0]), 201, lower, upper)


@pytest.mark.parametrize("solver", ["dynamic_program", "hull"])
def test_networks_lose_less_than_with_uniform_sparsity_and_ever_more_with_zeros(solver: LevelSolver) -> None:
    curves = pruned_network(0, 25, 20)
    sizes = np.array([curve.size for curve in curves])
    lower = np.zeros_like(sizes)
    values = []
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        total = round(sparsity * int(sizes.sum()))
        counts = allocate_zeros(curves, total, lower, sizes, solver=solver)
        values.append(predicted(curves, counts))
        assert counts.sum() == total
        assert values[-1] < predicted(curves, np.rint(sparsity * sizes).astype(np.int64))
    assert (np.diff(values) > 0.0).all()


def make_layers(curves: list[Curve], existing: int) -> list[LayerWeights]:
    layers = []
    for curve in curves:
        weight = np.ones((1, 1, curve.size))
        weight[..., : min(existing, curve.size)] = 0.0
        layers.append(LayerWeights(curve.name, weight, (), curve.size, 1, 1))
    return layers


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.83, 0.95])
def test_allocation_counts_existing_zeros_first_and_caps_layers(sparsity: float) -> None:
    curves = pruned_network(1, 8, 10, most=500)
    layers = make_layers(curves, existing=2)
    by_name = {curve.name: curve for curve in curves}

    counts = rate_distortion(layers, sparsity, max_layer_sparsity=0.97, curves=by_name)

    sizes = {layer.name: layer.size for layer in layers}
    assert list(counts) == [layer.name for layer in layers]
    assert sum(counts.values()) == round(sparsity * sum(sizes.values()))
    enough = sum(counts.values()) >= sum(min(2, size) for size in sizes.values())
    for name, size in sizes.items():
        assert counts[name] <= max(np.ceil(0.97 * size), 2)
        assert counts[name] >= min(2, size) if enough else counts[name] <= 2


def test_curves_must_fit_the_layers() -> None:
    curves = pruned_network(2, 2, 5)
    layers = make_layers(curves, existing=0)
    other = {curve.name: Curve(curve.name, curve.size + 1, curve.distortion, curve.costs) for curve in curves}

    with pytest.raises(ValueError, match="layer 'layer1' has no rate-distortion curve"):
        rate_distortion(layers, 0.5, curves={curves[0].name: curves[0]})
    with pytest.raises(
        ValueError, match=r"layer 'layer0' has \d+ weights, but its curve was measured for \d+"
    ):
        rate_distortion(layers, 0.5, curves=other)
    with pytest.raises(ValueError, match="cannot be reached"):
        allocate_zeros(curves, 10**9, np.zeros(2, np.int64), np.ones(2, np.int64))


def test_rounds_remove_a_fifth_of_what_is_left() -> None:
    assert list(round_totals(1000, 0, 500)) == [200, 360, 488, 500]
    assert list(round_totals(1000, 300, 300)) == []
    assert list(round_totals(3, 0, 3)) == [1, 2, 3]
    with pytest.raises(ValueError, match="the part removed in a round"):
        list(round_totals(10, 0, 5, removed=1.0))
    with pytest.raises(ValueError, match="11 zeros cannot be reached from 0 of 10"):
        list(round_totals(10, 0, 11))
