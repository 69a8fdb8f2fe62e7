"""What every allocation method promises, whatever it prefers."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation import ALLOCATIONS, LayerWeights, get_allocation, total_zeros
from pot_sparsity.algorithms.arrays import Float64

every_method = pytest.mark.parametrize("name", list(ALLOCATIONS))


def layer(name: str, weight: Float64, kernel: tuple[int, ...] = ()) -> LayerWeights:
    groups, rows, cols = weight.shape
    return LayerWeights(name, weight, kernel, cols // math.prod(kernel), groups * rows, groups)


def zeros_of(weight: Float64) -> int:
    return int((weight == 0.0).sum())


@st.composite
def networks(draw: st.DrawFn) -> list[LayerWeights]:
    """A few small layers of any scale, with ties and with zeros of their own (up to whole layers)."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = []
    for index in range(draw(st.integers(1, 5))):
        kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2,)]))
        groups, rows, channels = (draw(st.integers(1, 4)) for _ in range(3))
        weight = random.normal(size=(groups, rows, channels * math.prod(kernel)))
        weight *= draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
        if draw(st.booleans()):
            weight = np.sign(weight) * np.ceil(np.abs(weight))  # many ties
        weight[random.random(weight.shape) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))] = 0.0
        layers.append(layer(f"layer{index}", weight, kernel))
    return layers


@every_method
@settings(deadline=None, max_examples=60)
@given(layers=networks(), sparsity=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)))
def test_total_is_exact_and_existing_zeros_count_first(
    name: str, layers: list[LayerWeights], sparsity: float
) -> None:
    counts = get_allocation(name)(layers, sparsity)

    assert list(counts) == [item.name for item in layers]
    assert sum(counts.values()) == round(sparsity * sum(item.weight.size for item in layers))
    existing = {item.name: zeros_of(item.weight) for item in layers}
    for item in layers:
        assert 0 <= counts[item.name] <= item.weight.size
        if total_zeros(layers, sparsity) >= sum(existing.values()):
            assert counts[item.name] >= existing[item.name]
        else:
            assert counts[item.name] <= existing[item.name]
    assert get_allocation(name)(layers, sparsity) == counts


@every_method
@settings(deadline=None, max_examples=60)
@given(layers=networks(), sparsity=st.floats(0.0, 1.0), limit=st.floats(0.0, 1.0))
def test_layer_limit_moves_zeros_to_other_layers(
    name: str, layers: list[LayerWeights], sparsity: float, limit: float
) -> None:
    allocate = get_allocation(name, max_layer_sparsity=limit)
    allowed = {
        item.name: max(math.ceil(limit * item.weight.size - 1e-9), zeros_of(item.weight)) for item in layers
    }
    if total_zeros(layers, sparsity) > sum(allowed.values()):
        with pytest.raises(ValueError, match=r"allows only \d+ of \d+ weights: raise max_layer_sparsity"):
            allocate(layers, sparsity)
        return
    counts = allocate(layers, sparsity)
    assert sum(counts.values()) == total_zeros(layers, sparsity)
    assert all(counts[key] <= allowed[key] for key in counts)


@every_method
@settings(deadline=None, max_examples=20)
@given(layers=networks(), limit=st.floats(0.0, 1.0))
def test_sparsity_equal_to_the_layer_limit_is_possible(
    name: str, layers: list[LayerWeights], limit: float
) -> None:
    counts = get_allocation(name, max_layer_sparsity=limit)(layers, limit)
    assert sum(counts.values()) == total_zeros(layers, limit)


@every_method
def test_more_sparsity_never_takes_zeros_from_a_layer(name: str) -> None:
    random = np.random.default_rng(0)
    layers = [layer(f"l{i}", random.normal(size=(1, 8, 25)) * 3.0**i) for i in range(4)]
    steps = np.array([list(get_allocation(name)(layers, s).values()) for s in np.linspace(0, 1, 11)])
    assert (np.diff(steps, axis=0) >= -1).all()  # -1: rounding to whole weights


@every_method
def test_weights_are_not_changed(name: str) -> None:
    weight = np.random.default_rng(0).normal(size=(2, 3, 5))
    before = weight.copy()
    get_allocation(name)([layer("a", weight), layer("b", weight)], 0.5)
    np.testing.assert_array_equal(weight, before)


@every_method
def test_extreme_float64_weights(name: str) -> None:
    layers = [layer("tiny", np.full((1, 2, 2), 1e-300)), layer("huge", np.full((1, 2, 2), 1e300))]
    assert sum(get_allocation(name)(layers, 0.5).values()) == 4


@every_method
@pytest.mark.parametrize("sparsity", [-0.01, 1.01, math.nan, math.inf])
def test_sparsity_out_of_range(name: str, sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"^sparsity must be between 0 and 1, got"):
        get_allocation(name)([layer("a", np.ones((1, 2, 2)))], sparsity)


@every_method
@pytest.mark.parametrize("limit", [-0.1, 1.5, math.nan])
def test_layer_limit_out_of_range(name: str, limit: float) -> None:
    with pytest.raises(ValueError, match="max_layer_sparsity must be between 0 and 1"):
        get_allocation(name, max_layer_sparsity=limit)([layer("a", np.ones((1, 2, 2)))], 0.5)


@every_method
def test_layers_that_make_no_sense(name: str) -> None:
    allocate = get_allocation(name)
    with pytest.raises(ValueError, match="no layers"):
        allocate([], 0.5)
    with pytest.raises(ValueError, match="unique, these are not: a"):
        allocate([layer("a", np.ones((1, 1, 2)))] * 2, 0.5)
    with pytest.raises(ValueError, match="layer 'e' has no weights"):
        allocate([layer("e", np.ones((1, 0, 2)))], 0.5)


@pytest.mark.parametrize("name", ["magnitude", "l2_normalized_magnitude", "lamp"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match="layer 'a' holds weights that are NaN or infinite"):
        get_allocation(name)([layer("a", np.array([[[1.0, bad, 2.0]]]))], 0.5)


def test_unknown_method_and_option_list_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'lmap' is not known: use one of uniform, .*lamp, erk"):
        get_allocation("lmap")
    with pytest.raises(ValueError, match=r"'erk' has no option 'pow': it has max_layer_sparsity, power"):
        get_allocation("erk", pow=0.5)


def test_default_is_l2_normalized_magnitude() -> None:
    assert get_allocation() is cast(object, ALLOCATIONS["l2_normalized_magnitude"])
