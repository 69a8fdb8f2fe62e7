"""Magnitude, L2-normalised magnitude and LAMP against sorting all weights in plain Python."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation import LayerWeights, get_allocation
from pot_sparsity.algorithms.arrays import Float64

Scores = Callable[[list[float]], list[float]]


def magnitude_scores(weights: list[float]) -> list[float]:
    return [abs(w) for w in weights]


def l2_scores(weights: list[float]) -> list[float]:
    norm = sum(w * w for w in weights) ** 0.5
    return [abs(w) / norm for w in weights]


def lamp_scores(weights: list[float]) -> list[float]:
    order = sorted(range(len(weights)), key=lambda index: abs(weights[index]))
    scores = [0.0] * len(weights)
    for position, index in enumerate(order):
        rest = sum(weights[other] ** 2 for other in order[position:])
        scores[index] = weights[index] ** 2 / rest
    return scores


ORACLES: dict[str, Scores] = {
    "magnitude": magnitude_scores,
    "l2_normalized_magnitude": l2_scores,
    "lamp": lamp_scores,
}


def linear(name: str, weight: Float64) -> LayerWeights:
    groups, rows, cols = weight.shape
    return LayerWeights(name, weight, (), cols, groups * rows, groups)


@pytest.mark.parametrize("name", list(ORACLES))
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=5),
    sparsity=st.floats(0.0, 1.0),
)
def test_global_threshold(name: str, seed: int, shapes: list[tuple[int, int, int]], sparsity: float) -> None:
    random = np.random.default_rng(seed)
    layers = [
        linear(f"l{i}", random.normal(size=shape) * 10 ** random.uniform(-2, 2))
        for i, shape in enumerate(shapes)
    ]
    counts = get_allocation(name)(layers, sparsity)

    pooled = []
    for index, item in enumerate(layers):
        pooled += [(score, index) for score in ORACLES[name](item.weight.ravel().tolist())]
    pooled.sort()
    number = round(sparsity * len(pooled))
    threshold = pooled[number - 1][0] if number else -1.0
    for index, item in enumerate(layers):
        own = [score for score, where in pooled if where == index]
        # Scores within rounding of the threshold (the largest weights of LAMP tie at 1) may fall either way.
        surely = sum(score < threshold * (1 - 1e-6) for score in own)
        at_most = sum(score <= threshold * (1 + 1e-6) for score in own)
        assert surely <= counts[item.name] <= at_most


@pytest.mark.parametrize("name", ["l2_normalized_magnitude", "lamp"])
def test_scale_of_a_layer_has_no_influence(name: str) -> None:
    random = np.random.default_rng(1)
    first, second = random.normal(size=(1, 16, 9)), random.laplace(size=(1, 8, 32))
    plain = get_allocation(name)([linear("a", first), linear("b", second)], 0.6)
    scaled = get_allocation(name)([linear("a", first * 1024.0), linear("b", second / 4096.0)], 0.6)
    assert plain == scaled


def test_magnitude_follows_the_scale() -> None:
    weight = np.random.default_rng(2).normal(size=(1, 10, 10))
    counts = get_allocation("magnitude")([linear("small", weight * 1e-3), linear("large", weight * 1e3)], 0.5)
    assert counts == {"small": 100, "large": 0}


@pytest.mark.parametrize("name", list(ORACLES))
def test_equal_scores_fall_in_the_order_of_layers(name: str) -> None:
    layers = [linear(key, np.ones((1, 2, 2))) for key in "abc"]
    counts = get_allocation(name)(layers, 0.5)
    assert sum(counts.values()) == 6
    if name == "lamp":  # equal weights still rank one after the other within a layer: 1/4, 1/3, 1/2, 1
        assert counts == {"a": 2, "b": 2, "c": 2}
    else:
        assert counts == {"a": 4, "b": 2, "c": 0}


@pytest.mark.parametrize("name", list(ORACLES))
def test_cut_off_zeros_go_where_the_threshold_sends_them(name: str) -> None:
    """With the first layer at its limit, the others share the rest as if they were alone."""
    random = np.random.default_rng(3)
    weights = [
        random.normal(size=(1, 20, 20)) ** 3,
        random.normal(size=(1, 10, 30)),
        random.normal(size=(1, 9, 9)),
    ]
    layers = [linear(key, weight) for key, weight in zip("abc", weights, strict=True)]
    free = get_allocation(name)(layers, 0.5)
    limit = 0.55
    assert free["a"] > limit * 400  # heavy tails: many small weights
    counts = get_allocation(name, max_layer_sparsity=limit)(layers, 0.5)
    assert counts["a"] == 220
    rest = (sum(free.values()) - 220) / (300 + 81)
    assert {key: counts[key] for key in "bc"} == get_allocation(name)(layers[1:], rest)


@pytest.mark.parametrize("name", list(ORACLES))
def test_a_layer_of_zeros(name: str) -> None:
    layers = [linear("zero", np.zeros((1, 4, 5))), linear("a", np.arange(1.0, 21.0).reshape(1, 4, 5))]
    assert get_allocation(name)(layers, 0.25) == {"zero": 10, "a": 0}
    assert get_allocation(name)(layers, 0.75) == {"zero": 20, "a": 10}
