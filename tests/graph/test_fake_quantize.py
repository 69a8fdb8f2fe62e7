"""Quantizers and integer weights in both formats against float64 arithmetic written out here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.algorithms.quantization.grid import fit_grid
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import ModelError, PotSparsityError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.fake_quantize import quantize_inputs, store_integer_weights
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import count_zeros, read_weight, write_weight
from tests.pipeline.nets import conv_net, images, normal, one_dimension, shared_net, to_ir, transposed

NETS = {"conv": conv_net, "transposed": transposed, "one_dimension": one_dimension, "shared": shared_net}


def loaded(name: str, form: str, folder: Path) -> Model:
    native = NETS[name]()
    return load_model(native if form == "onnx" else to_ir(native, folder / "net.xml"))


def layers_of(model: Model) -> dict[str, Layer]:
    """By the name the layer has in the ONNX model."""
    return {layer.name.removesuffix("/WithoutBiases"): layer for layer in find_layers(model.graph).layers}


def feed(name: str, count: int = 6) -> AnyArray:
    if name == "shared":
        return normal(5, count, 7)
    return normal(5, count, 3, 12) if name == "one_dimension" else images(count)


def run(model: Model, x: AnyArray, outputs: list[str] | None = None) -> list[Float64]:
    """Outputs by every engine that can run the model, one after the other."""
    found = []
    for engine in ("openvino", "onnxruntime"):
        if engine == "onnxruntime" and model.format == "openvino":
            continue
        executable = get_engine("openvino" if engine == "openvino" else "onnxruntime", 1).compile(
            model.extract(outputs=outputs)
        )
        values = executable.run({executable.inputs[0]: x})
        found.append(np.asarray(values[executable.outputs[0]], np.float64))
    return found


def simulated(x: AnyArray, low: float, high: float, levels: int) -> Float64:
    """A fake quantizer by the book, in float64."""
    step = (high - low) / (levels - 1)
    return np.asarray(np.rint((np.clip(x, low, high) - low) / step) * step + low)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize(("levels", "zero"), [(16, 0), (16, 5), (256, 0), (256, 100), (4, 3)])
def test_a_quantizer_rounds_as_the_book_says(form: str, levels: int, zero: int, tmp_path: Path) -> None:
    model = loaded("conv", form, tmp_path)
    grid = ActivationGrid(float(np.float32(2.3 / levels)), zero, levels)
    layer = layers_of(model)["conv1"]
    tensor = layer.places[0].input
    plain = model.copy()
    result = model.insert_quantizer(tensor, [(layer.name, 0)], grid)
    x = images(6)
    wanted = simulated(x, grid.low, grid.high, levels)
    np.testing.assert_allclose(grid(x), wanted, atol=1e-6)
    for found in run(model, x, [result]):
        assert np.unique(found.round(5)).size <= levels
        # A value within a rounding of the middle may go either way.
        near = np.abs(np.abs(x / grid.scale - np.rint(x / grid.scale)) - 0.5) < 1e-4
        np.testing.assert_allclose(found[~near], wanted[~near], atol=1e-5)
    # The layer computes what the untouched layer computes from rounded inputs.
    fed = run(plain, np.asarray(grid(x), np.float32))
    for found in run(model, x):
        np.testing.assert_allclose(found, fed[0], atol=2e-3)
    assert [edit.kind for edit in model.edits] == ["fake_quantize"]
    assert plain.edits == []


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_readers_of_one_tensor_share_a_quantizer_or_have_their_own(form: str, tmp_path: Path) -> None:
    model = loaded("conv", form, tmp_path)
    reads = {layer.name: layer.places[0].input for layer in find_layers(model.graph).layers}
    tensor = next(read for read in reads.values() if list(reads.values()).count(read) == 2)
    both = [layer for layer in find_layers(model.graph).layers if layer.places[0].input == tensor]
    names = [layer.name for layer in both]
    coarse, fine = ActivationGrid(0.25, 0, 16), ActivationGrid(0.015625, 0, 256)
    shared = model.copy()
    quantize_inputs(shared, both, {name: {tensor: coarse} for name in names})
    quantize_inputs(model, both, {names[0]: {tensor: coarse}, names[1]: {tensor: fine}})
    assert (len(shared.edits), len(model.edits)) == (1, 2)
    after = {layer.name: layer.places[0].input for layer in find_layers(model.graph).layers}
    assert len({tensor, after[names[0]], after[names[1]]}) == 3
    # The skip of the block still reads the tensor as it was.
    assert any(node.op == "Add" for node, _ in model.graph.consumers(tensor))
    x = images(4)
    rounded = run(model, x, [after[names[0]]])[0]
    before = run(model, x, [tensor])[0]
    np.testing.assert_allclose(rounded, simulated(before, 0.0, 3.75, 16), atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_weights_are_what_was_written(name: str, form: str, bits: int, tmp_path: Path) -> None:
    model = loaded(name, form, tmp_path)
    weights, scales = {}, {}
    for layer in find_layers(model.graph).layers:
        weight = read_weight(model, layer)
        weight[..., ::2] = 0.0
        grid = fit_grid(weight, bits)
        weights[layer.name], scales[layer.name] = grid.dequantize(grid.quantize(weight)), grid.scale
        write_weight(model, layer, weights[layer.name])
    as_floats = model.copy()
    left = store_integer_weights(model, weights, scales)
    layers = {layer.name: layer for layer in find_layers(model.graph).layers}
    assert set(weights) == set(layers)
    for layer in layers.values():
        found = read_weight(model, layer)
        np.testing.assert_allclose(found, weights[layer.name], rtol=1e-6)
        np.testing.assert_array_equal(found == 0.0, weights[layer.name] == 0.0)
        assert max(np.unique(row).size for row in found.reshape(-1, layer.cols)) <= 2**bits
        stored = model.graph.value(layer.constant)
        assert (stored.dtype == np.int8) == (layer.name not in left)
        if layer.name not in left:
            assert -(2 ** (bits - 1)) <= stored.min() <= stored.max() < 2 ** (bits - 1)
    x = feed(name)
    wanted = run(as_floats, x)[0]
    for found in run(model, x):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert set(left) == {layer.name for layer in layers.values() if layer.shared}


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_quantized_files_are_read_back_as_they_were(form: str, tmp_path: Path) -> None:
    model = loaded("conv", form, tmp_path)
    layers = find_layers(model.graph).layers
    weights, scales = {}, {}
    for layer in layers:
        grid = fit_grid(read_weight(model, layer), 4)
        scales[layer.name] = grid.scale
        weights[layer.name] = grid.dequantize(grid.quantize(read_weight(model, layer)))
        write_weight(model, layer, weights[layer.name])
    grids = {layer.name: {layer.places[0].input: ActivationGrid(0.3, 4, 16)} for layer in layers}
    quantize_inputs(model, layers, grids)
    assert store_integer_weights(model, weights, scales) == []
    files = model.save(tmp_path, "written")
    again = load_model(next(path for path in files if path.suffix in (".onnx", ".xml")))
    x = images(6)
    for first, second in zip(run(model, x), run(again, x), strict=True):
        np.testing.assert_array_equal(first, second)
    before, after = (
        {layer.name: count_zeros(each, layer) for layer in find_layers(each.graph).layers}
        for each in (model, again)
    )
    assert before == after
    kinds = [edit.kind for edit in model.edits]
    assert (kinds.count("fake_quantize"), kinds.count("integer_weight")) == (4, 5)
    if form == "onnx":
        onnx.checker.check_model(onnx.load(files[0]), full_check=True)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_weights_off_their_grid_are_refused(form: str, tmp_path: Path) -> None:
    model = loaded("conv", form, tmp_path)
    layer = find_layers(model.graph).layers[0]
    weight = read_weight(model, layer)
    scale = np.abs(weight).max(axis=-1) / 7
    with pytest.raises(PotSparsityError, match="does not lie on its grid"):
        store_integer_weights(model, {layer.name: weight}, {layer.name: scale})
    with pytest.raises(PotSparsityError, match="do not fit into 8 bits"):
        store_integer_weights(
            model, {layer.name: np.rint(weight / scale[..., None]) * 100}, {layer.name: np.ones_like(scale)}
        )


def test_old_opsets_and_half_precision_are_refused(tmp_path: Path) -> None:
    grid = ActivationGrid(0.1, 0, 16)
    native = transposed()
    native.opset_import[0].version = 12
    old = load_model(native)
    with pytest.raises(ModelError, match="opset 13 or later and the model has 12"):
        old.insert_quantizer("x", [("a", 0)], grid)
    native = conv_net()
    native.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for value in native.graph.initializer:
        value.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value).astype(np.float16), value.name)
        )
    for entry in (*native.graph.value_info, *native.graph.output):
        entry.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(ModelError, match="float32"):
        load_model(native).insert_quantizer("x", [("conv1", 0)], grid)
