"""INT8: zeros stay zeros in the file, weights have a scale per channel, nothing of the user's is changed."""

from __future__ import annotations

from pathlib import Path

import nncf
import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest

from pot_sparsity.errors import ModelError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.openvino_model import OpenVINOModel
from pot_sparsity.graph.passes import fuse_batchnorm
from pot_sparsity.graph.weights import count_zeros, read_weight, write_weight
from pot_sparsity.quantization import convert_to_openvino, lost_zeros, quantize
from pot_sparsity.recipe import QuantizationSettings
from tests.pipeline.nets import Array, conv_net, dataset, images, run_onnx, run_openvino

FORMATS = ("onnx", "openvino")


def sparse(form: str) -> Model:
    """The network with BatchNorm fused and every other weight zero; in IR, a Reshape on depthwise weights."""
    proto = conv_net()
    model: Model
    if form == "onnx":
        model = OnnxModel(proto)
    else:
        read = ov.Core().read_model(proto.SerializeToString())
        operands = [
            op.input_value(1).get_node() for op in read.get_ops() if op.get_type_name() == "GroupConvolution"
        ]
        assert [op.get_type_name() for op in operands] == ["Reshape"]
        model = OpenVINOModel(read)
    fuse_batchnorm(model)
    for layer in find_layers(model.graph).layers:
        weight = read_weight(model, layer)
        weight.reshape(-1)[::2] = 0.0
        write_weight(model, layer, weight)
    return model


@pytest.fixture(scope="module", params=FORMATS)
def pair(request: pytest.FixtureRequest) -> tuple[Model, Model, dict[str, Array]]:
    """A sparse model, its INT8 version, and the sparse weights as they were before."""
    model = sparse(request.param)
    before = {layer.name: read_weight(model, layer) for layer in find_layers(model.graph).layers}
    edits = list(model.edits)
    settings = QuantizationSettings.model_validate({"samples": 32})
    result = quantize(model, dataset(model, images(40)), settings)
    assert model.edits == edits
    return model, result, before


def operand(files: list[Path], layer: str) -> Array:
    """What the operator in the written file multiplies with, as its own runtime computes it."""
    if files[0].suffix == ".onnx":
        proto = onnx.load(files[0])
        node = next(node for node in proto.graph.node if node.name == layer)
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[1]))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run([node.input[1]], {"x": images(1)})[0])
    model = ov.Core().read_model(files[0])
    op = next(op for op in model.get_ops() if op.get_friendly_name() == layer)
    compiled = ov.Core().compile_model(ov.Model([op.input_value(1)], []), "CPU")
    return np.array(compiled([])[0])


def test_zeros_stay_zeros_in_the_written_file(
    pair: tuple[Model, Model, dict[str, Array]], tmp_path: Path
) -> None:
    model, quantized, before = pair
    assert lost_zeros(model, quantized) == {}
    files = quantized.save(tmp_path, "model")
    for layer in find_layers(model.graph).layers:
        expected = read_weight(model, layer)
        found = operand(files, layer.name).reshape(expected.shape)
        assert np.count_nonzero(found[expected == 0.0]) == 0
        np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 100)
        assert before[layer.name].tolist() == expected.tolist()
    again = load_model(files[0])
    zeros = {layer.name: count_zeros(again, layer) for layer in find_layers(again.graph).layers}
    assert all(zeros[layer.name] >= layer.size // 2 for layer in find_layers(model.graph).layers)


def test_every_depthwise_channel_has_its_own_scale(
    pair: tuple[Model, Model, dict[str, Array]], tmp_path: Path
) -> None:
    """Weights of a channel are whole multiples of its scale, and that is its largest weight / 127.5."""
    model, quantized, _ = pair
    layer = next(layer for layer in find_layers(model.graph).layers if layer.name == "depthwise")
    assert (layer.groups, layer.rows, layer.cols) == (8, 1, 9)
    expected = read_weight(model, layer)[:, 0]
    found = operand(quantized.save(tmp_path, "model"), "depthwise").reshape(8, 9).astype(np.float64)
    scales = scales_of(quantized, "depthwise")
    assert scales.size == 8
    assert len(np.unique(scales)) == 8
    steps = found / scales.reshape(8, 1)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    np.testing.assert_allclose(scales.reshape(8), np.abs(expected).max(axis=1) / 127.5, rtol=0.01)


def scales_of(model: Model, layer: str) -> Array:
    native = model.native
    if isinstance(native, onnx.ModelProto):
        values = {value.name: onnx.numpy_helper.to_array(value) for value in native.graph.initializer}
        producers = {name: node for node in native.graph.node for name in node.output}
        conv = next(node for node in native.graph.node if node.name == layer)
        node = producers[conv.input[1]]
        assert node.op_type == "DequantizeLinear"
        return np.asarray(values[node.input[1]], np.float64)
    node = next(op for op in native.get_ops() if op.get_friendly_name() == layer).input_value(1).get_node()
    while node.get_type_name() != "Multiply":
        node = node.input_value(0).get_node()
    scale = node.input_value(1).get_node()
    if scale.get_type_name() == "Convert":
        scale = scale.input_value(0).get_node()
    return np.array(scale.get_data(), np.float64)


def test_int8_stays_near_the_sparse_model(pair: tuple[Model, Model, dict[str, Array]]) -> None:
    model, quantized, _ = pair
    x = images(20, 3)
    before, after = run_openvino(model.native, x), run_openvino(quantized.native, x)
    errors = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
    assert np.median(errors) < 0.1
    if isinstance(quantized.native, onnx.ModelProto):
        np.testing.assert_allclose(run_onnx(quantized.native, x), after, atol=0.1 * np.abs(after).max())


def test_lost_zeros_are_found() -> None:
    model, other = sparse("onnx"), sparse("onnx")
    layer = find_layers(model.graph).layers[0]
    weight = read_weight(other, layer)
    weight.reshape(-1)[[0, 2]] = 1.0
    write_weight(other, layer, weight)
    assert lost_zeros(model, other) == {"conv1": 2}
    assert lost_zeros(other, model) == {}


def test_a_scope_that_names_nothing_is_the_users_mistake() -> None:
    model = sparse("onnx")
    scope = nncf.IgnoredScope(names=["no such node"])
    with pytest.raises(ModelError, match=r"NNCF cannot quantize this model .*; run with --no-int8") as caught:
        quantize(model, dataset(model, images(8)), QuantizationSettings(), ignored_scope=scope)
    assert "\n" not in str(caught.value)


def test_conversion_keeps_layers_zeros_and_results() -> None:
    model = sparse("onnx")
    converted = convert_to_openvino(model)
    assert converted.format == "openvino"
    assert converted.edits == model.edits
    assert convert_to_openvino(converted) is converted
    assert lost_zeros(model, converted) == {}
    x = images(5)
    np.testing.assert_allclose(
        run_openvino(converted.native, x), run_onnx(model.native, x), rtol=1e-4, atol=1e-5
    )
