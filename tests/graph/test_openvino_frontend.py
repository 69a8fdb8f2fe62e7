from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import openvino as ov
import pytest
from openvino import opset1, opset5, opset13, opset15

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry
from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.openvino_frontend import build_graph, source_port
from pot_sparsity.graph.openvino_nodes import NamedModel

RNG = np.random.default_rng(0)


def constant(*shape: int, dtype: type = np.float32) -> Any:
    return opset13.constant(RNG.normal(size=shape).astype(dtype))


def graph_of(output: Any, *parameters: Any) -> Graph:
    return build_graph(NamedModel(ov.Model([output], list(parameters))))


def only(graph: Graph, op: str) -> Node:
    (node,) = [node for node in graph if node.op == op]
    return node


def parameter(*shape: int, dtype: type = np.float32) -> Any:
    return opset13.parameter(list(shape), dtype, name="x")


@pytest.mark.parametrize(
    ("auto_pad", "mode"),
    [
        ("explicit", "explicit"),
        ("same_upper", "same_upper"),
        ("same_lower", "same_lower"),
        ("valid", "valid"),
    ],
)
def test_convolution(auto_pad: str, mode: str) -> None:
    x = parameter(-1, 3, 9, 8)
    conv = opset13.convolution(x, constant(4, 3, 3, 2), [2, 1], [1, 0], [0, 1], [1, 2], auto_pad)
    node = only(graph_of(conv, x), "Convolution")
    geometry = node.attrs["geometry"]
    assert isinstance(geometry, ConvGeometry)
    assert node.attrs["weight_layout"] == "oi"
    assert node.source_type == "Convolution"
    assert (geometry.kernel, geometry.strides, geometry.dilations) == ((3, 2), (2, 1), (1, 2))
    assert (geometry.groups, geometry.pad_mode, geometry.transposed) == (1, mode, False)
    if mode == "explicit":
        assert (geometry.pads_begin, geometry.pads_end) == ((1, 0), (0, 1))


def test_group_convolution_takes_its_groups_from_the_weight() -> None:
    x = parameter(1, 6, 9)
    conv = opset13.group_convolution(x, constant(3, 4, 2, 5), [1], [2], [2], [1])
    node = only(graph_of(conv, x), "Convolution")
    assert node.attrs["weight_layout"] == "goi"
    assert node.attrs["geometry"] == ConvGeometry((5,), (1,), (1,), (2,), (2,), groups=3)


def test_group_convolution_behind_a_reshape() -> None:
    x = parameter(1, 4, 7, 7)
    weight = opset13.reshape(constant(4, 1, 3, 3), opset13.constant(np.array([4, 1, 1, 3, 3])), False)
    graph = graph_of(opset13.group_convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1]), x)
    assert only(graph, "Convolution").attrs["geometry"] == ConvGeometry(
        (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), groups=4
    )
    reshape = only(graph, "Reshape")
    assert graph.tensor(reshape.output).shape == (4, 1, 1, 3, 3)
    assert graph.is_constant(reshape.inputs[0])


def test_three_dimensional_transposed_group_convolution() -> None:
    x = parameter(1, 4, 5, 5, 5)
    conv = opset1.group_convolution_backprop_data(
        x, constant(2, 2, 3, 2, 3, 4), [2, 2, 2], None, [0, 1, 1], [0, 1, 2], output_padding=[1, 0, 0]
    )
    node = only(graph_of(conv, x), "ConvolutionTranspose")
    assert node.attrs["weight_layout"] == "gio"
    assert node.attrs["geometry"] == ConvGeometry(
        (2, 3, 4),
        (2, 2, 2),
        (1, 1, 1),
        (0, 1, 1),
        (0, 1, 2),
        groups=2,
        transposed=True,
        output_padding=(1, 0, 0),
    )


def transposed_by_hand(x: Any, w: Any, geometry: ConvGeometry) -> Any:
    """Scatter, then crop: the definition of a transposed convolution with explicit pads, one group, 2-D."""
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.strides, geometry.dilations
    n, _, h, width = x.shape
    full = [
        s * (size - 1) + d * (k - 1) + 1 + extra
        for s, size, d, k, extra in zip(
            (sh, sw), (h, width), (dh, dw), (kh, kw), geometry.output_padding, strict=True
        )
    ]
    y = np.zeros((n, w.shape[1], *full))
    for i in range(h):
        for j in range(width):
            for a in range(kh):
                for b in range(kw):
                    y[:, :, i * sh + a * dh, j * sw + b * dw] += x[:, :, i, j] @ w[:, :, a, b]
    begin, end = geometry.pads_begin, geometry.pads_end
    return y[:, :, begin[0] : full[0] - end[0], begin[1] : full[1] - end[1]]


@pytest.mark.parametrize("auto_pad", ["explicit", "same_upper", "same_lower", "valid"])
@pytest.mark.parametrize("size", [None, (9, 11), (10, 12), (11, 13), (13, 15)])
@pytest.mark.parametrize("extra", [(0, 0), (1, 0)])
def test_transposed_convolution_is_described_exactly(
    auto_pad: str, size: tuple[int, int] | None, extra: tuple[int, int]
) -> None:
    x = parameter(2, 3, 5, 6)
    weight = RNG.normal(size=(3, 4, 3, 2)).astype(np.float32)
    begin = [1, 0] if auto_pad == "explicit" else [0, 0]
    shape = None if size is None else opset13.constant(np.array(size, dtype=np.int64))
    conv = opset1.convolution_backprop_data(
        x, opset13.constant(weight), [2, 2], shape, begin, [0, 0], [1, 2], auto_pad, list(extra)
    )
    model = ov.Model([conv], [x])
    node = only(build_graph(NamedModel(model)), "ConvolutionTranspose")
    assert node.attrs["weight_layout"] == "io"
    geometry = node.attrs["geometry"]
    assert isinstance(geometry, ConvGeometry)
    assert geometry.pad_mode == "explicit"
    assert geometry.transposed
    value = RNG.normal(size=(2, 3, 5, 6)).astype(np.float32)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = compiled(value)[0]
    np.testing.assert_allclose(transposed_by_hand(value, weight, geometry), expected, atol=1e-4)


def test_what_cannot_be_described_stays_opaque() -> None:
    x = parameter(1, 3, -1, -1)
    size = opset13.constant(np.array([8, 8], dtype=np.int64))
    conv = opset1.convolution_backprop_data(x, constant(3, 4, 3, 3), [2, 2], size, auto_pad="same_upper")
    assert only(graph_of(conv, x), "ConvolutionBackpropData*").source_type == "ConvolutionBackpropData"
    y = parameter(2, 3)
    order = opset13.convert(opset13.parameter([2], np.int32, name="order"), "i64")
    graph = graph_of(opset13.transpose(y, order), y, order.input_value(0).get_node())
    assert only(graph, "Transpose*").attrs == {}


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, True), (True, False)])
def test_matmul(transpose_a: bool, transpose_b: bool) -> None:
    x = parameter(4, 4)
    graph = graph_of(opset13.matmul(x, constant(4, 4), transpose_a, transpose_b), x)
    assert only(graph, "MatMul").attrs == {
        "transpose_a": transpose_a,
        "transpose_b": transpose_b,
        "alpha": 1.0,
        "beta": 1.0,
    }


@pytest.mark.parametrize("opset", [opset1, opset5])
def test_batch_norm_ports_are_in_the_canonical_order(opset: Any) -> None:
    x = parameter(1, 3, 4, 4)
    gamma, beta, mean, variance = (opset13.constant(np.full(3, v, np.float32)) for v in (1, 2, 3, 4))
    norm = opset.batch_norm_inference(x, gamma, beta, mean, variance, 1e-3)
    graph = graph_of(norm, x)
    node = only(graph, "BatchNormalization")
    assert node.attrs["epsilon"] == pytest.approx(1e-3)
    assert node.inputs[0] == graph.inputs[0]
    assert [graph.value(tensor)[0] for tensor in node.inputs[1:]] == [1, 2, 3, 4]
    for port, tensor in enumerate(node.inputs):
        name = norm.input_value(source_port(norm, port)).get_node().get_friendly_name()
        assert tensor == f"{name}:0"


def test_chain_operators() -> None:
    x = parameter(2, 3, 4)
    y = opset13.transpose(x, opset13.constant(np.array([2, 0, 1])))
    y = opset13.transpose(y, opset13.constant(np.array([], dtype=np.int64)))
    y = opset13.unsqueeze(y, opset13.constant(np.array([0])))
    y = opset13.squeeze(y, opset13.constant(np.array([0])))
    y = opset13.convert(y, "f16")
    graph = graph_of(y, x)
    kinds = [node.op for node in graph if node.op != "Constant"]
    assert kinds == ["Parameter", "Transpose", "Transpose", "Unsqueeze", "Squeeze", "Convert", "Result"]
    perms = [node.attrs["perm"] for node in graph if node.op == "Transpose"]
    assert perms == [(2, 0, 1), (2, 1, 0)]
    assert only(graph, "Convert").attrs == {"dtype": np.dtype(np.float16)}
    assert [graph.tensor(node.output).shape for node in graph if node.op.endswith("queeze")] == [
        (1, 3, 2, 4),
        (3, 2, 4),
    ]


def test_elementwise_operators_with_another_broadcast_are_opaque() -> None:
    x = parameter(2, 3, 4)
    graph = graph_of(opset13.add(x, constant(2, 3, 4)), x)
    assert only(graph, "Add").inputs[0] == "x:0"
    y = parameter(2, 3, 4)
    assert only(graph_of(opset1.add(y, constant(2, 3, 4), "pdpd"), y), "Add*").source_type == "Add"


def test_names_and_tensors() -> None:
    x = opset13.parameter(ov.PartialShape([-1, 4]), np.float32, name="x")
    one, two, three = (
        opset13.relu(x, name="same"),
        opset13.relu(x, name="same"),
        opset13.relu(x, name="same#2"),
    )
    split = opset13.split(opset13.add(opset13.add(one, two), three), opset13.constant(1), 2, name="split")
    model = ov.Model([split.output(1), split.output(0)], [x])
    named = NamedModel(model)
    graph = build_graph(named)
    assert graph.inputs == ("x:0",)
    assert graph.outputs == ("split:1", "split:0")
    assert {node.name for node in graph if node.op == "Relu"} == {"same", "same#2", "same#3"}
    assert graph.tensor("x:0").shape == (None, 4)
    assert graph.tensor("split:1").dtype == np.float32
    assert [name for name, _ in named.clone()] == [name for name, _ in named]
    assert [node.name for node in build_graph(named.clone())] == [node.name for node in graph]


def test_unknown_rank() -> None:
    x = opset13.parameter(ov.PartialShape.dynamic(), np.float32, name="x")
    assert graph_of(opset13.relu(x), x).tensor("x:0").shape is None


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_]
)
def test_constants_are_read_in_their_own_type(dtype: type) -> None:
    value: AnyArray = np.array([[1, 0, 3]]).astype(dtype)
    node = opset13.constant(value, name="c")
    graph = graph_of(opset13.convert(node, "f32"))
    assert graph.value("c:0").dtype == value.dtype
    np.testing.assert_array_equal(graph.value("c:0"), value)
    graph.value("c:0")[...] = 0
    np.testing.assert_array_equal(graph.value("c:0"), value)


def test_bfloat16_and_opaque_constants() -> None:
    half = ov.op.Constant(ov.Type.bf16, ov.Shape([2]), [1.5, -2.0])
    half.set_friendly_name("half")
    graph = graph_of(opset13.convert(half, "f32"))
    assert graph.value("half:0").dtype == np.dtype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(graph.value("half:0").astype(np.float32), [1.5, -2.0])
    packed = ov.op.Constant(ov.Type.u4, ov.Shape([2]), [1, 2])
    packed.set_friendly_name("packed")
    graph = graph_of(opset13.convert(packed, "f32"))
    assert graph.tensor("packed:0").dtype is None
    assert not graph.is_constant("packed:0")


def test_compressed_weights_appear_as_chains() -> None:
    x = parameter(2, 3)
    weight = opset13.convert(opset13.constant(np.ones((3, 4), np.int8), name="w"), "f32")
    scaled = opset13.multiply(opset13.subtract(weight, constant(1, 4)), constant(1, 4))
    graph = graph_of(opset13.matmul(x, scaled, False, False), x)
    chain = []
    tensor = only(graph, "MatMul").inputs[1]
    while (node := graph.producer(tensor)) is not None and node.inputs:
        chain.append(node.op)
        tensor = node.inputs[0]
    assert chain == ["Multiply", "Subtract", "Convert"]
    assert tensor == "w:0"


def test_other_operators_keep_their_name() -> None:
    x = parameter(1, 3, 4, 4)
    low, high = (opset13.constant(np.float32(v)) for v in (-1, 1))
    graph = graph_of(opset15.fake_quantize(x, low, high, low, high, 256), x)
    assert only(graph, "FakeQuantize").attrs == {}
