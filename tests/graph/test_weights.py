"""Reading and writing weights of real models of both formats, judged by what the engines compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry, Float32, Float64
from pot_sparsity.algorithms.patches import unfold
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.layers import Layer, LayerKind, Layout
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.openvino_model import OpenVINOModel
from pot_sparsity.graph.weights import (
    count_zeros,
    from_matrix,
    read_bias,
    read_weight,
    to_matrix,
    write_bias,
    write_weight,
)

FORMATS = ("onnx", "openvino")
RNG = np.random.default_rng(7)


def normal(*shape: int) -> Float32:
    return RNG.normal(size=shape).astype(np.float32)


def proto(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, AnyArray],
    x: Sequence[int | str],
    opset: int = 17,
) -> onnx.ModelProto:
    for index, node in enumerate(nodes):
        node.name = node.name or f"n{index}"
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def load(model: onnx.ModelProto, form: str) -> Model:
    if form == "onnx":
        return OnnxModel(model)
    return OpenVINOModel(ov.Core().read_model(model.SerializeToString()))


def run(model: Model, x: AnyArray, outputs: Sequence[str] | None = None) -> list[Float64]:
    part = model.extract(outputs)
    if isinstance(part.model, bytes):
        options = ort.SessionOptions()
        # Otherwise a DequantizeLinear and its MatMul become one operator that quantizes the activation too.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(part.model, options, providers=["CPUExecutionProvider"])
        return [np.asarray(y, dtype=np.float64) for y in session.run(None, {session.get_inputs()[0].name: x})]
    assert isinstance(part.model, ov.Model)
    compiled = ov.Core().compile_model(part.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled([x])
    return [np.array(result[index], dtype=np.float64) for index in range(len(part.outputs))]


def only(model: Model) -> Layer:
    found = find_layers(model.graph)
    assert len(found.layers) == 1, found
    return found.layers[0]


def assert_round_trip(model: Model, layer: Layer) -> None:
    """Writing what was read changes no stored bit; writing another matrix reads back as that matrix."""
    before = np.array(model.graph.value(layer.constant))
    matrix = read_weight(model, layer)
    assert matrix.dtype == np.float64
    assert matrix.shape == (layer.groups, layer.rows, layer.cols)
    np.testing.assert_array_equal(write_weight(model, layer, matrix), matrix)
    np.testing.assert_array_equal(model.graph.value(layer.constant), before)
    half = matrix.copy()
    half[..., ::2] = 0.0
    np.testing.assert_array_equal(write_weight(model, layer, half), half)
    np.testing.assert_array_equal(read_weight(model, layer), half)
    assert count_zeros(model, layer) == np.count_nonzero(half == 0)
    assert model.graph.value(layer.constant).dtype == before.dtype
    write_weight(model, layer, matrix)


CONVOLUTIONS: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("Conv", (2, 3, 8, 7), (5, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    ("Conv", (2, 6, 8, 8), (4, 3, 3, 3), {"group": 2, "dilations": [2, 1]}),
    ("Conv", (2, 4, 8, 8), (4, 1, 3, 3), {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", (2, 4, 8, 8), (8, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    ("Conv", (2, 3, 9), (5, 3, 4), {"strides": [3], "pads": [2, 1]}),
    ("Conv", (2, 4, 5, 6, 4), (6, 2, 2, 3, 2), {"group": 2, "strides": [1, 2, 1]}),
    ("ConvTranspose", (2, 3, 5, 4), (3, 4, 3, 2), {"strides": [2, 1], "pads": [1, 0, 0, 1]}),
    ("ConvTranspose", (2, 4, 5, 5), (4, 3, 3, 3), {"group": 2, "strides": [2, 2], "output_padding": [1, 0]}),
    ("ConvTranspose", (2, 4, 6), (4, 1, 3), {"group": 4, "strides": [2]}),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("op", "x", "w", "attrs"), CONVOLUTIONS)
def test_weight_matrix_times_patches_is_what_the_engine_computes(
    form: str, op: str, x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Any]
) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], **attrs)
    model = load(proto([node], {"w": normal(*w)}, x), form)
    layer = only(model)
    place = layer.places[0]
    assert isinstance(place.geometry, ConvGeometry)
    data = normal(*x)
    (y,) = run(model, data, [place.output])
    product = read_weight(model, layer) @ unfold(data.astype(np.float64), place.geometry)
    # [groups, rows, (n, positions)] -> [n, channels, positions]
    expected = product.reshape(layer.channels, y.shape[0], -1).transpose(1, 0, 2).reshape(y.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert_round_trip(model, layer)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("x", "w", "left"), [((4, 5), (5, 7), False), ((2, 3, 5), (5, 7), False), ((5, 4), (7, 5), True)]
)
def test_matmul_on_either_side(form: str, x: tuple[int, ...], w: tuple[int, ...], left: bool) -> None:
    node = helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"])
    model = load(proto([node], {"w": normal(*w)}, x), form)
    layer = only(model)
    data = normal(*x)
    (y,) = run(model, data)
    matrix = read_weight(model, layer)[0]
    moved = np.moveaxis(data, layer.places[0].geometry.feature_axis, -1)  # type: ignore[union-attr]
    expected = np.moveaxis(moved @ matrix.T, -1, layer.places[0].channel_axis)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert_round_trip(model, layer)


@pytest.mark.parametrize("form", FORMATS)
def test_stack_of_matrices(form: str) -> None:
    model = load(
        proto([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(3, 5, 7)}, (2, 3, 4, 5)), form
    )
    layer = only(model)
    data = normal(2, 3, 4, 5)
    (y,) = run(model, data)
    matrices = read_weight(model, layer)
    assert matrices.shape == (3, 7, 5)
    np.testing.assert_allclose(y, np.einsum("nbmi,boi->nbmo", data, matrices), rtol=1e-4, atol=1e-5)
    assert_round_trip(model, layer)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_with_every_factor_and_transpose(form: str, trans_a: int, trans_b: int) -> None:
    node = helper.make_node(
        "Gemm", ["x", "w", "c"], ["y"], transA=trans_a, transB=trans_b, alpha=0.3, beta=-1.7
    )
    w = normal(*((7, 5) if trans_b else (5, 7)))
    x = normal(*((5, 4) if trans_a else (4, 5)))
    model = load(proto([node], {"w": w, "c": normal(7)}, x.shape), form)
    layer = only(model)
    place = layer.places[0]
    features = x.T if trans_a else x
    (y,) = run(model, x)
    matrix = read_weight(model, layer)
    assert matrix.shape == (1, 7, 5)
    if form == "onnx":  # OpenVINO reads alpha as a Multiply between the product and the bias
        bias = read_bias(model, layer, place)
        assert bias is not None
        np.testing.assert_allclose(y, features @ matrix[0].T + bias[0], rtol=1e-4, atol=1e-5)
        written = write_bias(model, layer, place, bias + 1.0)
        np.testing.assert_allclose(run(model, x)[0], y + 1.0, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(written, read_bias(model, layer, place))
    assert_round_trip(model, layer)


def test_left_gemm_has_its_bias_along_the_other_axis() -> None:
    node = helper.make_node("Gemm", ["w", "x", "c"], ["y"], beta=0.5)
    model = load(proto([node], {"w": normal(7, 5), "c": normal(7, 1)}, (5, 4)), "onnx")
    layer = only(model)
    bias = read_bias(model, layer, layer.places[0])
    assert bias is not None
    x = normal(5, 4)
    expected = read_weight(model, layer)[0] @ x + bias[0][:, None]
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-4, atol=1e-5)


CHAINS: dict[str, tuple[list[onnx.NodeProto], AnyArray]] = {
    "identity": ([helper.make_node("Identity", ["w"], ["v"])], normal(6, 4, 3, 3)),
    "reshape": ([helper.make_node("Reshape", ["w", "shape"], ["v"])], normal(6, 36)),
    "transpose": ([helper.make_node("Transpose", ["w"], ["v"], perm=[3, 2, 0, 1])], normal(3, 3, 4, 6)),
    "squeeze": ([helper.make_node("Squeeze", ["w", "axes"], ["v"])], normal(1, 6, 4, 3, 3)),
    "float16": ([helper.make_node("Cast", ["w"], ["v"], to=1)], normal(6, 4, 3, 3).astype(np.float16)),
    "several": (
        [
            helper.make_node("Cast", ["w"], ["a"], to=1),
            helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
            helper.make_node("Identity", ["b"], ["c"]),
            helper.make_node("Reshape", ["c", "shape"], ["v"]),
        ],
        normal(36, 6).astype(np.float16),
    ),
    "int8 per tensor": (
        [helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["v"])],
        RNG.integers(-128, 128, (6, 4, 3, 3)).astype(np.int8),
    ),
}
CHAIN_CONSTANTS = {
    "shape": np.array([6, 4, 3, 3]),
    "axes": np.array([0]),
    "scale": np.float32(0.013),
    "zero": np.int8(-7),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", CHAINS)
def test_weight_behind_a_chain(form: str, name: str) -> None:
    nodes, stored = CHAINS[name]
    read = {tensor for node in nodes for tensor in node.input}
    constants = {key: np.asarray(value) for key, value in CHAIN_CONSTANTS.items() if key in read}
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    conv = helper.make_node("Conv", ["x", "v"], ["y"], name="conv")
    model = load(proto([*copies, conv], {"w": stored, **constants}, (1, 4, 5, 5)), form)
    layer = only(model)
    assert layer.chain or name == "identity"  # OpenVINO drops an Identity while reading
    data = normal(1, 4, 5, 5)
    place = layer.places[0]
    (y,) = run(model, data)
    assert isinstance(place.geometry, ConvGeometry)
    product = read_weight(model, layer) @ unfold(data.astype(np.float64), place.geometry)
    np.testing.assert_allclose(y, product.reshape(y.shape), rtol=1e-4, atol=1e-4)
    assert_round_trip(model, layer)


def _quantized(axis: int, zeros: AnyArray, opset: int = 17, **attrs: Any) -> Model:
    node = helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["v"], axis=axis, **attrs)
    stored = RNG.integers(0, 256, (6, 8)).astype(zeros.dtype)
    scale = RNG.uniform(0.01, 0.1, zeros.shape).astype(np.float32)
    nodes = [node, helper.make_node("MatMul", ["x", "v"], ["y"])]
    return load(proto(nodes, {"w": stored, "scale": scale, "zero": zeros}, (2, 6), opset), "onnx")


@pytest.mark.parametrize(
    ("axis", "zeros", "attrs"),
    [
        (1, np.arange(120, 128, dtype=np.uint8), {}),
        (-2, np.arange(6, dtype=np.uint8), {}),
        (0, np.full((2, 8), 9, np.uint8), {"block_size": 3, "opset": 21}),
        (1, np.zeros(8, np.int8), {}),
    ],
)
def test_integer_weights_per_channel_and_blocked(axis: int, zeros: AnyArray, attrs: dict[str, int]) -> None:
    model = _quantized(axis, zeros, **attrs)
    layer = only(model)
    x = normal(2, 6)
    np.testing.assert_allclose(run(model, x)[0], x @ read_weight(model, layer)[0].T, rtol=1e-4, atol=1e-4)
    assert_round_trip(model, layer)


def test_integer_weights_are_rounded_clipped_and_zero_is_the_zero_point() -> None:
    zeros = np.arange(120, 128, dtype=np.uint8)
    model = _quantized(1, zeros)
    layer = only(model)
    matrix = read_weight(model, layer)
    scale = np.asarray(model.graph.value("scale"), dtype=np.float64)
    matrix[0, :, 0] = 0.0
    matrix[0, :, 1] = 1e6
    matrix[0, :, 2] = -1e6
    matrix[0, :, 3] = 10.4 * scale
    written = write_weight(model, layer, matrix)
    stored = model.graph.value("w").astype(np.int64)  # [in, out]
    np.testing.assert_array_equal(stored[0], zeros)
    np.testing.assert_array_equal(stored[1], 255)
    np.testing.assert_array_equal(stored[2], 0)
    np.testing.assert_array_equal(stored[3], zeros.astype(np.int64) + 10)
    assert np.all(written[0, :, 0] == 0)
    np.testing.assert_allclose(written[0, :, 3], 10 * scale, rtol=1e-6)


@pytest.mark.parametrize("zero_dtype", [np.uint8, np.float32])
def test_openvino_decompression_of_integers(zero_dtype: type[np.generic]) -> None:
    x = ops.parameter([2, 6], np.float32, name="x")
    stored = RNG.integers(0, 256, (8, 6)).astype(np.uint8)
    zero = np.arange(100, 108).reshape(8, 1).astype(zero_dtype)
    wide = ops.convert(ops.constant(stored), "f16")
    centred = ops.subtract(wide, ops.convert(ops.constant(zero), "f16"))
    scaled = ops.multiply(centred, ops.constant(RNG.uniform(0.01, 0.1, (8, 1)).astype(np.float16)))
    product = ops.matmul(x, ops.convert(scaled, "f32"), False, True)
    model = OpenVINOModel(ov.Model([ops.result(product)], [x], "test"))
    layer = only(model)
    assert len(layer.chain) == 4
    matrix = read_weight(model, layer)
    assert_round_trip(model, layer)
    data = normal(2, 6)
    np.testing.assert_allclose(run(model, data)[0], data @ matrix[0].T, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", FORMATS)
def test_float16_storage_rounds_and_counts_zeros_after_the_cast(form: str) -> None:
    cast = helper.make_node("Cast", ["w"], ["v"], to=1)
    conv = helper.make_node("Conv", ["x", "v"], ["y"])
    model = load(proto([cast, conv], {"w": normal(6, 4, 1, 1).astype(np.float16)}, (1, 4, 2, 2)), form)
    layer = only(model)
    matrix = np.full((1, 6, 4), 1e-9)
    matrix[0, 0] = 1.0 / 3.0
    written = write_weight(model, layer, matrix)
    assert count_zeros(model, layer) == 20
    np.testing.assert_array_equal(written[0, 0], np.float64(np.float16(1.0 / 3.0)))
    with pytest.raises(ValueError, match="finite"):
        write_weight(model, layer, matrix * 1e9)


@pytest.mark.parametrize("form", FORMATS)
def test_bias_of_grouped_convolution_is_read_by_group(form: str) -> None:
    conv = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=2)
    bias = normal(6)
    model = load(proto([conv], {"w": normal(6, 2, 3, 3), "b": bias}, (1, 4, 5, 5)), form)
    layer = only(model)
    place = layer.places[0]
    np.testing.assert_array_equal(read_bias(model, layer, place), bias.reshape(2, 3))
    x = normal(1, 4, 5, 5)
    before = run(model, x)[0]
    shift = np.arange(6.0).reshape(2, 3)
    write_bias(model, layer, place, bias.reshape(2, 3) + shift)
    after = run(model, x)[0]
    np.testing.assert_allclose(
        after - before, np.broadcast_to(np.arange(6.0)[:, None, None], (1, 6, 3, 3)), atol=1e-5
    )


@pytest.mark.parametrize("form", FORMATS)
def test_subtracted_bias_behind_a_chain(form: str) -> None:
    nodes = [
        helper.make_node("Reshape", ["b", "shape"], ["c"]),
        helper.make_node("Conv", ["x", "w"], ["z"]),
        helper.make_node("Sub", ["z", "c"], ["y"]),
    ]
    constants = {"w": normal(6, 4, 3, 3), "b": normal(6), "shape": np.array([1, 6, 1, 1])}
    model = load(proto(nodes, constants, (1, 4, 5, 5)), form)
    layer = only(model)
    place = layer.places[0]
    np.testing.assert_array_equal(read_bias(model, layer, place), -constants["b"].astype(np.float64)[None])
    x = normal(1, 4, 5, 5)
    before = run(model, x)[0]
    bias = read_bias(model, layer, place)
    assert bias is not None
    write_bias(model, layer, place, bias + 2.0)
    np.testing.assert_allclose(run(model, x)[0], before + 2.0, atol=1e-5)


def test_wrong_shapes_and_missing_biases_are_refused() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    model = load(proto([conv], {"w": normal(6, 4, 3, 3)}, (1, 4, 5, 5)), "onnx")
    layer = only(model)
    with pytest.raises(ValueError, match="is \\(1, 6, 36\\), got"):
        write_weight(model, layer, np.zeros((6, 36)))
    assert read_bias(model, layer, layer.places[0]) is None
    with pytest.raises(ValueError, match="has no bias"):
        write_bias(model, layer, layer.places[0], np.zeros((1, 6)))


@pytest.mark.parametrize("form", FORMATS)
def test_shared_weight_is_written_once_for_all_places(form: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["z", "w"], ["y"], strides=[2, 2]),
    ]
    model = load(proto(nodes, {"w": normal(4, 4, 3, 3)}, (1, 4, 7, 7)), form)
    layer = only(model)
    assert layer.shared
    x = normal(1, 4, 7, 7)
    before = run(model, x)[0]
    write_weight(model, layer, read_weight(model, layer) * 2)
    np.testing.assert_allclose(run(model, x)[0], before * 4, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from(["oi", "io", "goi", "gio"]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    inputs=st.integers(1, 4),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_every_layout_is_viewed_element_by_element(
    layout: Layout, groups: int, rows: int, inputs: int, kernel: list[int]
) -> None:
    shape = {
        "oi": (groups * rows, inputs),
        "io": (groups * inputs, rows),
        "goi": (groups, rows, inputs),
        "gio": (groups, inputs, rows),
    }[layout] + tuple(kernel)
    area = int(np.prod(kernel))
    kind: LayerKind = "convolution_transpose" if "io" in layout else "convolution"
    layer = Layer("layer", kind, "w", (), (), shape, groups, rows, inputs * area, layout)
    operand = np.arange(1.0, np.prod(shape) + 1).reshape(shape)
    matrix = to_matrix(layer, operand)
    for g in range(groups):
        for o in range(rows):
            for i in range(inputs):
                index = {
                    "oi": (g * rows + o, i),
                    "io": (g * inputs + i, o),
                    "goi": (g, o, i),
                    "gio": (g, i, o),
                }[layout]
                expected = operand[index].ravel()
                np.testing.assert_array_equal(matrix[g, o, i * area : (i + 1) * area], expected)
    np.testing.assert_array_equal(from_matrix(layer, matrix), operand)
