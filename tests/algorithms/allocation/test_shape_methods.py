"""Uniform and ERK against freezing and rescaling by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation import LayerWeights, get_allocation

ShapeSpec = tuple[int, int, int, tuple[int, ...]]  # groups, rows, in channels per group, kernel


def dense_layer(name: str, spec: ShapeSpec) -> LayerWeights:
    groups, rows, channels, kernel = spec
    weight = np.ones((groups, rows, channels * math.prod(kernel)))
    return LayerWeights(name, weight, kernel, channels, groups * rows, groups)


specs = st.lists(
    st.tuples(
        st.integers(1, 8), st.integers(1, 20), st.integers(1, 20), st.sampled_from([(), (1, 1), (3, 3), (5,)])
    ),
    min_size=1,
    max_size=6,
)


def erk_oracle(layers: list[LayerWeights], sparsity: float, power: float) -> list[float]:
    """Densities by the published loop: layers over 1 are frozen at 1 and the rest rescaled, repeatedly."""
    raw = []
    for item in layers:
        total = item.in_channels_per_group + item.out_channels + sum(item.kernel)
        raw.append(
            (total / (item.in_channels_per_group * item.out_channels * math.prod(item.kernel))) ** power
        )
    keep = (1.0 - sparsity) * sum(item.weight.size for item in layers)
    frozen: set[int] = set()
    while True:
        left = keep - sum(layers[i].weight.size for i in frozen)
        loose = [i for i in range(len(layers)) if i not in frozen]
        if not loose:
            return [1.0] * len(layers)
        factor = left / sum(raw[i] * layers[i].weight.size for i in loose)
        over = {i for i in loose if factor * raw[i] > 1.0}
        if not over:
            return [1.0 if i in frozen else factor * raw[i] for i in range(len(layers))]
        frozen |= over


@settings(deadline=None, max_examples=80)
@given(shapes=specs, sparsity=st.floats(0.0, 1.0), power=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_erk(shapes: list[ShapeSpec], sparsity: float, power: float) -> None:
    layers = [dense_layer(f"l{i}", spec) for i, spec in enumerate(shapes)]
    counts = get_allocation("erk", power=power)(layers, sparsity)
    for item, density in zip(layers, erk_oracle(layers, sparsity, power), strict=True):
        assert counts[item.name] == pytest.approx((1.0 - density) * item.weight.size, abs=1.5)


def test_erk_of_known_shapes() -> None:
    """64 -> 128 3x3: (64 + 128 + 6) / (64 * 128 * 9); linear 512 -> 10: 522 / 5120."""
    layers = [dense_layer("conv", (1, 128, 64, (3, 3))), dense_layer("linear", (1, 10, 512, ()))]
    counts = get_allocation("erk")(layers, 0.99)
    kept = {item.name: item.weight.size - counts[item.name] for item in layers}
    assert kept["conv"] / kept["linear"] == pytest.approx(198 / 522, abs=0.005)


def test_erk_counts_depthwise_channels_once() -> None:
    layers = [dense_layer("depthwise", (32, 1, 1, (3, 3))), dense_layer("pointwise", (1, 64, 32, (1, 1)))]
    counts = get_allocation("erk")(layers, 0.5)
    assert counts == {"depthwise": 0, "pointwise": 1168}  # (1 + 32 + 6) / 288 leaves it over 1


@pytest.mark.parametrize("power", [-1.0, 11.0, math.nan])
def test_erk_power_out_of_range(power: float) -> None:
    with pytest.raises(ValueError, match="power must be between 0 and 10"):
        get_allocation("erk", power=power)([dense_layer("a", (1, 2, 2, ()))], 0.5)


@settings(deadline=None, max_examples=50)
@given(shapes=specs, sparsity=st.floats(0.0, 1.0))
def test_uniform(shapes: list[ShapeSpec], sparsity: float) -> None:
    layers = [dense_layer(f"l{i}", spec) for i, spec in enumerate(shapes)]
    counts = get_allocation("uniform")(layers, sparsity)
    for item in layers:
        assert counts[item.name] == pytest.approx(sparsity * item.weight.size, abs=1.5)


def test_uniform_leaves_first_and_last_dense_while_it_can() -> None:
    layers = [dense_layer(key, (1, 5, 20, ())) for key in "abcd"]
    allocate = get_allocation("uniform", protect_first_last=True)
    assert allocate(layers, 0.4) == {"a": 0, "b": 80, "c": 80, "d": 0}
    assert allocate(layers, 0.6) == {"a": 20, "b": 100, "c": 100, "d": 20}
    assert allocate(layers, 1.0) == {"a": 100, "b": 100, "c": 100, "d": 100}
    limited = get_allocation("uniform", protect_first_last=True, max_layer_sparsity=0.5)
    assert limited(layers, 0.4) == {"a": 30, "b": 50, "c": 50, "d": 30}


def test_uniform_of_two_layers_that_are_both_protected() -> None:
    layers = [dense_layer(key, (1, 5, 20, ())) for key in "ab"]
    assert get_allocation("uniform", protect_first_last=True)(layers, 0.5) == {"a": 50, "b": 50}


def test_a_sparser_layer_keeps_its_zeros_and_the_rest_share() -> None:
    half = np.ones((1, 10, 10))
    half[0, :5] = 0.0
    layers = [
        LayerWeights("half", half, (), 10, 10, 1),
        dense_layer("a", (1, 10, 10, ())),
        dense_layer("b", (1, 10, 20, ())),
    ]
    assert get_allocation("uniform")(layers, 0.2) == {"half": 50, "a": 10, "b": 20}
