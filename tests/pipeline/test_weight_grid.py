"""Weights placed on NNCF's grid: exact integers in the written file, smaller layer errors, biases made up for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nncf
import numpy as np
import onnx
import openvino as ov
import pytest

from pot_sparsity.algorithms.arrays import AnyArray, Float64, Moments
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import PotSparsityError, RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.openvino_model import OpenVINOModel
from pot_sparsity.graph.passes import fuse_batchnorm
from pot_sparsity.graph.weights import read_bias, read_weight, write_weight
from pot_sparsity.pipeline import optimize, weight_grid
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.weight_grid import StoredGrid, candidates, place_weights, read_grid
from pot_sparsity.quantization import lost_zeros, quantize
from pot_sparsity.recipe import QuantizationSettings, load_recipe
from tests.pipeline.nets import (
    conv_net,
    dataset,
    images,
    node,
    normal,
    plain_net,
    proto,
    run_openvino,
)

FORMATS = ("onnx", "openvino")
SAMPLES = images(300)


def view(model: onnx.ModelProto, form: str) -> Model:
    return (
        OnnxModel(model) if form == "onnx" else OpenVINOModel(ov.Core().read_model(model.SerializeToString()))
    )


def layers(model: Model) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(model.graph).layers}


def grids(model: Model) -> dict[str, StoredGrid]:
    found = {name: read_grid(model, layer) for name, layer in layers(model).items()}
    return {name: grid for name, grid in found.items() if grid is not None}


def moments_of(model: Model, samples: AnyArray) -> dict[str, Moments]:
    return collect_moments(
        model,
        list(layers(model).values()),
        get_engine("openvino", threads=1),
        dataset(model, samples),
        batch_size=16,
        threads=1,
        max_positions=None,
        progress=Silent(),
    )


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest) -> tuple[Model, Model, Mapping[str, Moments]]:
    """A sparse network, what NNCF made of it, and the moments of its layers' inputs."""
    model = view(conv_net(), request.param)
    fuse_batchnorm(model)
    for layer in layers(model).values():
        weight = read_weight(model, layer)
        weight.reshape(-1)[::2] = 0.0
        weight[0, 0] = 0.0
        write_weight(model, layer, weight)
    quantized = quantize(model, dataset(model, SAMPLES), QuantizationSettings(samples=32))
    return model, quantized, moments_of(model, SAMPLES)


def errors(weight: Float64, target: Float64, moments: Moments, free_bias: bool) -> float:
    second = moments.centred if free_bias else moments.second
    return float(np.einsum("grc,gcd,grd->", weight - target, second, weight - target))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_written_file_holds_the_solved_integers(
    case: tuple[Model, Model, Mapping[str, Moments]], bits: int, tmp_path: Path
) -> None:
    sparse, quantized, moments = case
    before = grids(quantized)
    placed, placements = place_weights(sparse, quantized, moments, bits=bits)
    assert [item.layer for item in placements] == list(layers(placed))
    assert not any(item.left for item in placements)
    solved = grids(placed)
    again = load_model(placed.save(tmp_path, "model")[0])
    stored = grids(again)
    assert len(solved) == len(layers(sparse)) == 5
    for name, grid in solved.items():
        np.testing.assert_array_equal(stored[name].integers, grid.integers)
        np.testing.assert_array_equal(stored[name].scale, before[name].scale)
        assert np.abs(grid.integers).max() <= before[name].limit
        for row in grid.integers.reshape(-1, grid.integers.shape[-1]):
            assert len(np.unique(row)) <= 2**bits
        if bits < 8:
            assert set(np.unique(grid.integers)) != set(np.unique(before[name].integers))
    assert lost_zeros(sparse, again) == {}
    assert grids(quantized).keys() == before.keys()
    for name, grid in grids(quantized).items():
        np.testing.assert_array_equal(grid.integers, before[name].integers)


def test_layer_errors_fall(case: tuple[Model, Model, Mapping[str, Moments]]) -> None:
    sparse, quantized, moments = case
    placed, placements = place_weights(sparse, quantized, moments)
    sources, targets = layers(sparse), layers(placed)
    ratios = []
    for item in placements:
        layer = targets[item.layer]
        free = layer.places[0].bias is not None
        target = read_weight(sparse, sources[item.layer])
        old = errors(read_weight(quantized, layers(quantized)[item.layer]), target, moments[item.layer], free)
        new = errors(read_weight(placed, layer), target, moments[item.layer], free)
        energy = errors(np.zeros_like(target), target, moments[item.layer], free)
        assert new <= old
        assert item.after == pytest.approx(new / energy, rel=1e-4)
        assert item.before == pytest.approx(old / energy, rel=1e-4)
        ratios.append(new / old)
    assert min(ratios) < 0.8
    assert np.mean(ratios) < 0.97


def test_means_of_outputs_stay_what_nncf_made_them(
    case: tuple[Model, Model, Mapping[str, Moments]],
) -> None:
    sparse, quantized, moments = case
    placed, _ = place_weights(sparse, quantized, moments, bits=3)
    old_layers, checked = layers(quantized), 0
    for name, layer in layers(placed).items():
        mean = moments[name].mean
        found, expected = (
            read_bias(placed, layer, layer.places[0]),
            read_bias(quantized, old_layers[name], old_layers[name].places[0]),
        )
        if found is None or expected is None:
            assert found is expected
            continue
        found = found + np.einsum("grc,gc->gr", read_weight(placed, layer), mean)
        expected = expected + np.einsum("grc,gc->gr", read_weight(quantized, old_layers[name]), mean)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        checked += 1
    assert checked >= 3


def test_threads_and_start_from_nearest_change_no_guarantee(
    case: tuple[Model, Model, Mapping[str, Moments]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, quantized, moments = case
    one, first = place_weights(sparse, quantized, moments)
    two, second = place_weights(sparse, quantized, moments, threads=3)
    assert first == second
    for (name, a), b in zip(grids(one).items(), grids(two).values(), strict=True):
        np.testing.assert_array_equal(a.integers, b.integers, err_msg=name)
    _, careful = place_weights(sparse, quantized, moments, bits=4)
    monkeypatch.setattr(weight_grid, "_FACTOR_BUDGET", 0.0)
    _, quick = place_weights(sparse, quantized, moments, bits=4)
    assert all(a.after <= b.after * (1 + 1e-9) for a, b in zip(careful, quick, strict=True))
    assert any(a.after < b.after for a, b in zip(careful, quick, strict=True))
    _, wide = place_weights(sparse, quantized, moments)
    assert all(item.after <= item.before for item in wide)
    assert sum(item.after < item.before for item in wide) >= 3


def test_few_samples_are_not_trusted(
    case: tuple[Model, Model, Mapping[str, Moments]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a ridge that drowns all correlations, rounding to the nearest is best."""
    sparse, quantized, moments = case
    few = {name: Moments(3.0, part.mean, part.second) for name, part in moments.items()}
    monkeypatch.setattr(weight_grid, "_RIDGE", 1e6)
    moved = []
    for given in (few, moments):
        placed, _ = place_weights(sparse, quantized, given)
        pairs = zip(grids(placed).values(), grids(quantized).values(), strict=True)
        moved.append(sum(int((a.integers != b.integers).sum()) for a, b in pairs))
    assert moved[1] > 20
    assert moved[0] < moved[1] / 5


def test_layers_that_are_not_as_expected_are_left_with_a_reason(
    case: tuple[Model, Model, Mapping[str, Moments]],
) -> None:
    sparse, quantized, moments = case
    changed = sparse.copy()
    name, layer = next(iter(layers(changed).items()))
    write_weight(changed, layer, read_weight(changed, layer) * 1.5)
    some = {key: value for key, value in moments.items() if key != "branch2"}
    placed, placements = place_weights(changed, quantized, some)
    assert {item.layer: item.left for item in placements if item.left} == {
        name: "NNCF changed its weights by more than rounding"
    }
    for key in (name, "branch2"):
        np.testing.assert_array_equal(grids(placed)[key].integers, grids(quantized)[key].integers)
    assert "branch2" not in {item.layer for item in placements}
    _, floats = place_weights(sparse, sparse, moments)
    assert {item.left for item in floats} == {"it has no integer weights with a scale per row"}


def test_a_model_that_does_not_store_what_is_written_is_an_error(
    case: tuple[Model, Model, Mapping[str, Moments]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_grid, "write_weight", lambda model, layer, matrix: matrix)
    with pytest.raises(PotSparsityError, match=r"layer '.*': the model did not store the integers written"):
        place_weights(*case, bits=4)


def test_coarse_grids_lie_on_the_stored_one() -> None:
    stored = StoredGrid(np.zeros((1, 2, 3), np.int32), np.array([[0.5, 2.0]]), 127)
    (whole,) = candidates(stored, 8)
    assert (whole.low, whole.high) == (-127, 127)
    coarse = candidates(stored, 4)
    steps = [grid.scale / stored.scale for grid in coarse]
    assert [float(step[0, 0]) for step in steps] == list(range(15, 4, -1))
    assert all((grid.low, grid.high) == (-8, 7) for grid in coarse)
    assert max(8 * float(step.max()) for step in steps) <= 127
    narrow = candidates(StoredGrid(stored.integers, stored.scale, 3), 3)
    assert [float((grid.scale / stored.scale)[0, 0]) for grid in narrow] == [1.0]


def linear_net() -> onnx.ModelProto:
    constants = {
        "first": normal(31, 16, 32, scale=0.3),
        "middle": normal(32, 32),
        "last": normal(33, 32, 8, scale=0.3),
        "bias": normal(34, 8, scale=0.1),
    }
    nodes = [
        node("MatMul", ["x", "first"], "m0"),
        node("Add", ["m0", "middle"], "a0"),
        node("Relu", ["a0"], "r0"),
        node("MatMul", ["r0", "last"], "m1"),
        node("Add", ["m1", "bias"], "y"),
    ]
    return proto(nodes, constants, ["n", 10, 16])


@pytest.mark.parametrize("form", FORMATS)
def test_what_smooth_quant_did_is_derived_again(form: str, tmp_path: Path) -> None:
    model = view(linear_net(), form)
    inputs = normal(1, 40, 10, 16) * np.exp(1.5 * normal(2, 16)).astype(np.float32)
    weight = read_weight(model, layers(model)["m0"])
    weight.reshape(-1)[::3] = 0.0
    write_weight(model, layers(model)["m0"], weight)
    key: str | int = "x" if form == "onnx" else 0
    native = nncf.quantize(
        model.copy().native,
        nncf.Dataset([{key: inputs[i : i + 1]} for i in range(40)]),
        subset_size=40,
        model_type=nncf.ModelType.TRANSFORMER,
    )
    quantized = load_model(native)
    assert np.abs(read_weight(quantized, layers(quantized)["m0"]) / np.where(weight, weight, 1)).max() > 2
    placed, placements = place_weights(model, quantized, moments_of(model, inputs))
    assert [item.left for item in placements] == ["", ""]
    assert all(item.after < item.before < 1e-3 for item in placements)
    assert lost_zeros(model, placed) == {}
    stored = grids(load_model(placed.save(tmp_path, "model")[0]))
    for name, grid in grids(placed).items():
        np.testing.assert_array_equal(stored[name].integers, grid.integers)
    expected, before, after = (run_openvino(m.native, inputs) for m in (model, quantized, placed))
    assert np.square(after - expected).mean() < 1.05 * np.square(before - expected).mean()


@pytest.mark.parametrize("weights", ["obq", "auto"])
def test_the_run_decides_and_reports(weights: str) -> None:
    settings = {
        "sparsity": 0.4,
        "quantization": {"samples": 16, "ranges": "default", "bias_correction": "fast", "weights": weights},
    }
    result = optimize(
        plain_net(), {"x": SAMPLES}, recipe=settings, measure_latency=False, baseline_int8=weights == "obq"
    )
    found = [d for d in result.report.decisions if d.what.endswith("weights placed by layer error")]
    names = ["sparse INT8", "dense INT8"] if weights == "obq" else ["sparse INT8"]
    assert [d.what.partition(":")[0] for d in found] == names
    for decision in found:
        assert decision.reason.startswith("2 layers, median layer error 0.")
        assert decision.reason.endswith("times that of NNCF's rounding")
        assert decision.measure.endswith("on held-out samples")
        assert decision.before is not None
        assert decision.after is not None
        assert decision.kept == (weights == "obq" or decision.after < decision.before)


def test_fewer_levels_need_placing() -> None:
    with pytest.raises(
        RecipeError, match="recipe key 'quantization': weight_bits below 8 needs 'weights: obq'"
    ):
        load_recipe(None, ["quantization.weight_bits=4"])
    recipe = load_recipe(None, ["quantization.weight_bits=4", "quantization.weights=obq"])
    result = optimize(plain_net(), {"x": SAMPLES}, recipe=recipe, measure_latency=False, baseline_int8=False)
    final = load_model(result.model)
    for grid in grids(final).values():
        assert all(len(np.unique(row)) <= 16 for row in grid.integers.reshape(-1, grid.integers.shape[-1]))
