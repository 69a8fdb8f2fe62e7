"""Every allocation by weights against its published formula, evaluated slowly in float64 on awkward networks.

Ties, layers of a few weights, groups, zeros that exist, gains of fused normalizations, limits per layer, protected
layers: the oracles below know all of them, and none of the code they judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation import LayerWeights, get_allocation
from pot_sparsity.algorithms.arrays import Float64


def layer(
    name: str, weight: Float64, kernel: tuple[int, ...] = (), gain: Float64 | None = None
) -> LayerWeights:
    groups, rows, cols = weight.shape
    return LayerWeights(name, weight, kernel, cols // math.prod(kernel), groups * rows, groups, gain)


@st.composite
def networks(draw: st.DrawFn) -> list[LayerWeights]:
    """Up to six layers; the weights of some are small integers, some hold zeros, some have gains (of zero, too)."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = []
    for index in range(draw(st.integers(1, 6))):
        kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2,)]))
        groups, rows, inputs = (draw(st.integers(1, 4)) for _ in range(3))
        weight = random.normal(size=(groups, rows, inputs * math.prod(kernel)))
        weight *= draw(st.sampled_from([0.01, 1.0, 30.0]))
        if draw(st.booleans()):
            weight = np.round(weight)
        weight[random.random(weight.shape) < draw(st.sampled_from([0.0, 0.2]))] = 0.0
        gain = random.choice([-4.0, 0.0, 0.25, 1.0, 2.0], size=(groups, rows))
        if draw(st.booleans()):
            weight, given_gain = weight * gain[:, :, None], gain
            layers.append(layer(f"layer{index}", weight, kernel, given_gain))
        else:
            layers.append(layer(f"layer{index}", weight, kernel))
    return layers


# scores with one threshold


def magnitudes(item: LayerWeights) -> list[float]:
    return [abs(w) for w in item.weight.ravel().tolist()]


def unfused_magnitudes(item: LayerWeights) -> list[float]:
    """``|w| / |gain|``, weight by weight; what a gain of zero has wiped out is a zero."""
    found = []
    groups, rows, cols = item.weight.shape
    for group in range(groups):
        for row in range(rows):
            gain = 1.0 if item.gain is None else abs(float(item.gain[group, row]))
            for col in range(cols):
                w = abs(float(item.weight[group, row, col]))
                found.append(w / gain if w else 0.0)
    return found


def l2_normalized(item: LayerWeights) -> list[float]:
    norm = math.sqrt(sum(w * w for w in magnitudes(item)))
    return [w / norm if w else 0.0 for w in magnitudes(item)]


def lamp(item: LayerWeights) -> list[float]:
    """``w_u^2 / sum_{v >= u} w_v^2`` in a stable ascending order."""
    weights = magnitudes(item)
    order = sorted(range(len(weights)), key=lambda index: weights[index])
    scores = [0.0] * len(weights)
    for position, index in enumerate(order):
        if weights[index]:
            scores[index] = weights[index] ** 2 / sum(weights[other] ** 2 for other in order[position:])
    return scores


SCORES: dict[str, tuple[str, dict[str, bool], Callable[[LayerWeights], list[float]]]] = {
    "magnitude": ("magnitude", {}, magnitudes),
    "unfused magnitude": ("magnitude", {"unfused": True}, unfused_magnitudes),
    "l2": ("l2_normalized_magnitude", {}, l2_normalized),
    "lamp": ("lamp", {}, lamp),
}


def caps(layers: Sequence[LayerWeights], limit: float) -> list[int]:
    """Most zeros of each layer: the limit, rounded up to a whole weight, or what it has."""
    return [
        max(math.ceil(limit * item.size - 1e-9), sum(w == 0.0 for w in magnitudes(item))) for item in layers
    ]


@pytest.mark.parametrize("name", SCORES)
@settings(deadline=None, max_examples=80)
@given(layers=networks(), sparsity=st.floats(0.0, 1.0), limit=st.sampled_from([1.0, 1.0, 0.9, 0.6]))
def test_scores(name: str, layers: list[LayerWeights], sparsity: float, limit: float) -> None:
    """Weights are removed one after the other by score, ties in the order of layers, until the total is reached."""
    method, options, score = SCORES[name]
    total = round(sparsity * sum(item.size for item in layers))
    most = caps(layers, limit)
    existing = [sum(w == 0.0 for w in magnitudes(item)) for item in layers]
    assume(sum(existing) <= total <= sum(most))
    counts = list(get_allocation(method, max_layer_sparsity=limit, **options)(layers, sparsity).values())
    assert sum(counts) == total

    pool = []
    for index, item in enumerate(layers):
        own = sorted(score(item))[existing[index] : most[index]]
        pool += [(value, index) for value in own]
    removed = sorted(pool)[: total - sum(existing)]
    expected = [existing[i] + sum(index == i for _, index in removed) for i in range(len(layers))]
    threshold = removed[-1][0] if removed else 0.0
    # Scores are compared in float32: what is closer to the threshold than its rounding may fall either way.
    near = [0] * len(layers)
    for value, index in pool:
        near[index] += abs(value - threshold) <= 1e-6 * threshold
    if sum(count > 0 for count in near) <= 1 or name == "magnitude":
        assert counts == expected
    for found, wanted, either_way in zip(counts, expected, near, strict=True):
        assert abs(found - wanted) <= either_way


# shares


def share(total: float, demand: Sequence[float], lower: Sequence[int], upper: Sequence[int]) -> list[float]:
    """``clip(t demand, lower, upper)`` for the t at which it adds up to the total, by bisection."""

    def at(factor: float) -> list[float]:
        return [min(max(factor * d, low), high) for d, low, high in zip(demand, lower, upper, strict=True)]

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    return at(high)


def assert_shares(counts: Sequence[int], exact: Sequence[float], total: int) -> None:
    """Whole numbers that add up exactly, each within a weight of its share."""
    assert sum(counts) == total
    for count, wanted in zip(counts, exact, strict=True):
        assert abs(count - wanted) < 1.0 + 1e-6 * wanted


@settings(deadline=None, max_examples=100)
@given(
    layers=networks(),
    sparsity=st.floats(0.0, 1.0),
    limit=st.sampled_from([1.0, 0.9, 0.6]),
    protected=st.booleans(),
)
def test_uniform(layers: list[LayerWeights], sparsity: float, limit: float, protected: bool) -> None:
    total = round(sparsity * sum(item.size for item in layers))
    most = caps(layers, limit)
    existing = [sum(w == 0.0 for w in magnitudes(item)) for item in layers]
    assume(sum(existing) <= total <= sum(most))
    allocate = get_allocation("uniform", max_layer_sparsity=limit, protect_first_last=protected)
    counts = list(allocate(layers, sparsity).values())
    sizes = [float(item.size) for item in layers]
    ends = {0, len(layers) - 1} if protected else set()
    inner = [existing[i] if i in ends else most[i] for i in range(len(layers))]
    if total <= sum(inner):
        assert_shares(counts, share(total, sizes, existing, inner), total)
        assert all(counts[i] == existing[i] for i in ends)
    else:  # the others are full
        assert_shares(counts, share(total, sizes, inner, most), total)


@settings(deadline=None, max_examples=100)
@given(
    layers=networks(),
    sparsity=st.floats(0.0, 1.0),
    limit=st.sampled_from([1.0, 0.9, 0.6]),
    power=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_erk(layers: list[LayerWeights], sparsity: float, limit: float, power: float) -> None:
    total = round(sparsity * sum(item.size for item in layers))
    most = caps(layers, limit)
    existing = [sum(w == 0.0 for w in magnitudes(item)) for item in layers]
    assume(sum(existing) <= total <= sum(most))
    allocate = get_allocation("erk", max_layer_sparsity=limit, power=power)
    counts = list(allocate(layers, sparsity).values())
    density = []
    for item in layers:
        dimensions = [item.in_channels_per_group, item.out_channels, *item.kernel]
        density.append((sum(dimensions) / math.prod(dimensions)) ** power)
    demand = [d * item.size for d, item in zip(density, layers, strict=True)]
    sizes = [item.size for item in layers]
    kept = share(
        sum(sizes) - total,
        demand,
        [size - m for size, m in zip(sizes, most, strict=True)],
        [size - e for size, e in zip(sizes, existing, strict=True)],
    )
    assert_shares([size - count for size, count in zip(sizes, counts, strict=True)], kept, sum(sizes) - total)


# normalizations that were fused


def test_unfused_scores_are_those_of_the_weights_before_fusing() -> None:
    random = np.random.default_rng(0)
    before = [random.normal(size=shape) for shape in ((1, 8, 9), (2, 4, 12), (1, 5, 16))]
    gains = [np.exp(random.normal(size=weight.shape[:2])) for weight in before]
    fused = [
        layer(f"l{i}", weight * gain[:, :, None], (), gain)
        for i, (weight, gain) in enumerate(zip(before, gains, strict=True))
    ]
    plain = [layer(f"l{i}", weight) for i, weight in enumerate(before)]
    for sparsity in (0.1, 0.5, 0.83):
        wanted = get_allocation("magnitude")(plain, sparsity)
        assert get_allocation("magnitude", unfused=True)(fused, sparsity) == wanted
        assert get_allocation("magnitude")(fused, sparsity) != wanted
        assert get_allocation("magnitude", unfused=True)(plain, sparsity) == wanted


def test_a_channel_with_a_gain_of_zero_is_gone() -> None:
    weight = np.arange(1.0, 13.0).reshape(1, 3, 4)
    gain = np.array([[2.0, 0.0, -0.5]])
    dead = layer("dead", weight * gain[:, :, None], (), gain)
    other = layer("other", np.full((1, 3, 4), 9.5))
    allocate = get_allocation("magnitude", unfused=True)
    assert allocate([dead, other], 4 / 24) == {"dead": 4, "other": 0}
    assert allocate([dead, other], 8 / 24) == {"dead": 8, "other": 0}  # 1 to 4 fall before 9 and 9.5
    assert allocate([dead, other], 9 / 24) == {"dead": 9, "other": 0}
    assert allocate([dead, other], 20 / 24) == {"dead": 9, "other": 11}
    revived = layer("dead", np.where(gain[:, :, None] == 0.0, 1e-3, dead.weight), (), gain)
    assert allocate([revived, other], 4 / 24) == {"dead": 4, "other": 0}  # counts as it is


@pytest.mark.parametrize("name", ["uniform", "l2_normalized_magnitude", "lamp", "erk"])
def test_only_magnitude_looks_at_gains(name: str) -> None:
    with pytest.raises(ValueError, match="has no option 'unfused'"):
        get_allocation(name, unfused=True)
