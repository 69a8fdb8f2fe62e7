"""ONNX operators in canonical words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.graph import Node
from pot_sparsity.graph.onnx_model import OnnxModel


def _model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: Sequence[str],
    constants: dict[str, AnyArray] | None = None,
    opset: int = 17,
    **options: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    return helper.make_model(graph, **{"ir_version": 8, "opset_imports": imports, **options})


def _one(
    op: str,
    operands: Sequence[AnyArray],
    shape: Sequence[int | str] = ("n", 4, 9, 9),
    opset: int = 17,
    outputs: Sequence[str] = ("y",),
    **attributes: Any,
) -> Node:
    constants = {f"c{i}": value for i, value in enumerate(operands)}
    node = helper.make_node(op, ["x", *constants], list(outputs), name="it", **attributes)
    model = OnnxModel(_model([node], {"x": shape}, ["y"], constants, opset=opset))
    return model.graph.node("it")


def _zeros(*shape: int) -> AnyArray:
    return np.zeros(shape, np.float32)


def test_convolution_defaults_come_from_the_kernel() -> None:
    node = _one("Conv", [_zeros(6, 4, 3, 2)])
    assert (node.op, node.source_type, node.inputs) == ("Convolution", "Conv", ("x", "c0"))
    assert node.attrs["weight_layout"] == "oi"
    assert node.attrs["geometry"] == ConvGeometry((3, 2), (1, 1), (1, 1), (0, 0), (0, 0))


@pytest.mark.parametrize(
    ("word", "mode"), [("SAME_UPPER", "same_upper"), ("SAME_LOWER", "same_lower"), ("VALID", "valid")]
)
def test_convolution_auto_pad(word: str, mode: str) -> None:
    geometry = _one("Conv", [_zeros(6, 2, 3, 3)], group=2, strides=[2, 1], auto_pad=word).attrs["geometry"]
    assert isinstance(geometry, ConvGeometry)
    assert (geometry.pad_mode, geometry.groups, geometry.strides) == (mode, 2, (2, 1))
    assert geometry.pads_begin == geometry.pads_end == (0, 0)


def test_convolution_explicit() -> None:
    node = _one("Conv", [_zeros(8, 4, 3), _zeros(8)], ("n", 4, 9), pads=[1, 2], dilations=[2], strides=[3])
    assert node.attrs["geometry"] == ConvGeometry((3,), (3,), (2,), (1,), (2,))
    assert node.inputs == ("x", "c0", "c1")


def test_convolution_with_a_computed_weight_uses_kernel_shape() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="it", kernel_shape=[3, 3])]
    model = OnnxModel(_model(nodes, {"x": (1, 4, 9, 9), "w": ("o", "i", "h", "w")}, ["y"]))
    geometry = model.graph.node("it").attrs["geometry"]
    assert isinstance(geometry, ConvGeometry)
    assert geometry.kernel == (3, 3)
    del nodes[0].attribute[:]
    model = OnnxModel(_model(nodes, {"x": (1, 4, 9, 9), "w": ("o", "i", "h", "w")}, ["y"]))
    assert model.graph.node("it").op == "Conv"


def test_transposed_convolution() -> None:
    node = _one(
        "ConvTranspose",
        [_zeros(4, 3, 2, 2)],
        group=2,
        strides=[2, 2],
        output_padding=[1, 0],
        output_shape=[19, 18],
        auto_pad="SAME_LOWER",
    )
    assert (node.op, node.attrs["weight_layout"]) == ("ConvolutionTranspose", "io")
    assert node.attrs["geometry"] == ConvGeometry(
        (2, 2), (2, 2), (1, 1), (0, 0), (0, 0), 2, "same_lower", True, (1, 0), (19, 18)
    )
    geometry = _one("ConvTranspose", [_zeros(4, 3, 2, 2)]).attrs["geometry"]
    assert isinstance(geometry, ConvGeometry)
    assert geometry.output_padding == (0, 0)
    assert geometry.output_size is None


def test_matrix_products() -> None:
    plain = _one("MatMul", [_zeros(4, 5)], ("n", 4))
    assert (plain.op, plain.attrs) == (
        "MatMul",
        {"transpose_a": False, "transpose_b": False, "alpha": 1.0, "beta": 1.0},
    )
    gemm = _one("Gemm", [_zeros(5, 4), _zeros(5)], ("n", 4), transB=1, alpha=0.5, beta=2.0)
    assert (gemm.op, gemm.source_type, gemm.inputs) == ("MatMul", "Gemm", ("x", "c0", "c1"))
    assert gemm.attrs == {"transpose_a": False, "transpose_b": True, "alpha": 0.5, "beta": 2.0}


def test_batch_normalization() -> None:
    operands = [_zeros(4)] * 4
    node = _one("BatchNormalization", operands, epsilon=1e-3)
    assert node.op == "BatchNormalization"
    assert node.attrs["epsilon"] == pytest.approx(1e-3)
    training = _one("BatchNormalization", operands, outputs=("y", "m", "v"), training_mode=1)
    assert training.op == "ai.onnx.BatchNormalization"
    assert _one("BatchNormalization", operands, opset=9, outputs=("y", "m", "v", "a", "b")).op.startswith(
        "ai."
    )
    assert _one("BatchNormalization", operands, opset=9).op == "BatchNormalization"
    assert _one("BatchNormalization", operands, opset=6).op == "ai.onnx.BatchNormalization"
    assert _one("BatchNormalization", operands, opset=6, is_test=1).op == "BatchNormalization"


@pytest.mark.parametrize(
    ("op", "word"), [("Add", "Add"), ("Sub", "Subtract"), ("Mul", "Multiply"), ("Div", "Divide")]
)
def test_arithmetic(op: str, word: str) -> None:
    assert _one(op, [np.ones(9, np.float32)]).op == word
    assert _one(op, [np.ones(4, np.float32)], opset=6, broadcast=1, axis=1).op != word


def test_what_a_weight_may_hide_behind() -> None:
    assert _one("Cast", [], to=TensorProto.FLOAT16).attrs == {"dtype": np.dtype(np.float16)}
    assert _one("Cast", [], to=TensorProto.BFLOAT16).attrs == {"dtype": np.dtype(ml_dtypes.bfloat16)}
    assert _one("Cast", [], to=TensorProto.STRING).op == "Cast"
    assert _one("Transpose", [], perm=[0, 2, 3, 1]).attrs == {"perm": (0, 2, 3, 1)}
    assert _one("Transpose", []).attrs == {"perm": (3, 2, 1, 0)}
    assert _one("Identity", []).op == "Identity"
    constants: dict[str, AnyArray] = {
        "q": np.ones((2, 3), np.int8),
        "s": np.ones(3, np.float32),
        "shape": np.array([3, -1]),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], name="d"),
        helper.make_node("Reshape", ["d", "shape"], ["r"], name="r"),
        helper.make_node("MatMul", ["x", "r"], ["y"], name="fc"),
    ]
    graph = OnnxModel(_model(nodes, {"x": (1, 3)}, ["y"], constants)).graph
    assert graph.node("d").attrs == {"axis": 1, "block_size": 0}
    assert graph.node("r").op == "Reshape"
    assert graph.tensor("r").shape == (3, 2)
    assert graph.tensor("d").dtype == np.float32


def test_operators_of_other_domains_are_opaque() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="m", domain="custom"),
        helper.make_node("QLinearMatMul", ["a"] * 8, ["y"], name="q"),
    ]
    graph = OnnxModel(_model(nodes, {"x": (1, 3)}, ["y"], {"w": _zeros(3, 3)})).graph
    assert graph.node("m").op == "custom.MatMul"
    assert graph.node("q").op == "QLinearMatMul"
    assert graph.tensor("a").dtype is None


def test_constants_of_every_kind() -> None:
    nodes = [
        helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.array([1.0, 2.0]))),
        helper.make_node("Constant", [], ["f"], value_float=1.5),
        helper.make_node("Constant", [], ["fs"], value_floats=[1.5, 2.5]),
        helper.make_node("Constant", [], ["i"], value_int=3),
        helper.make_node("Constant", [], ["is"], value_ints=[3, 4]),
        helper.make_node("Constant", [], ["s"], value_string=b"word"),
        helper.make_node("Identity", ["t"], ["y"]),
    ]
    graph = OnnxModel(_model(nodes, {"x": (1,)}, ["y"], {"w": np.array([7.0], np.float16)})).graph
    expected: dict[str, AnyArray] = {
        "t": np.array([1.0, 2.0]),
        "f": np.array(1.5, np.float32),
        "fs": np.array([1.5, 2.5], np.float32),
        "i": np.array(3),
        "is": np.array([3, 4]),
        "w": np.array([7.0], np.float16),
    }
    for name, value in expected.items():
        assert graph.is_constant(name)
        found = graph.value(name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert graph.tensor(name).shape == value.shape
        assert graph.tensor(name).dtype == value.dtype
        np.testing.assert_array_equal(found, value)
        producer = graph.producer(name)
        assert producer is not None
        assert producer.op == "Constant"
    assert not graph.is_constant("s")
    assert graph.node("Constant_s").op == "ai.onnx.Constant"


def test_initializers_among_the_inputs_are_constants() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = _model(nodes, {"x": (1, 3), "w": (3, 3)}, ["y"], {"w": _zeros(3, 3)}, ir_version=3)
    model = OnnxModel(proto)
    assert model.graph.inputs == ("x",)
    assert model.graph.is_constant("w")


def test_names_are_unique_and_stable() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="same"),
        helper.make_node("Relu", ["a"], ["b"], name="same"),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"], name="Relu_c"),
        helper.make_node("Relu", ["d"], ["y"], name="x"),
    ]
    graph = OnnxModel(_model(nodes, {"x": (1,)}, ["y"])).graph
    assert [node.name for node in graph if node.op == "Relu"] == ["same", "same_1", "Relu_c_1", "Relu_c", "x"]
    assert [node.name for node in graph if node.op in ("Parameter", "Result")] == ["x/parameter", "y/result"]


def test_subgraphs_count_as_consumers() -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"])], "then", [], [onnx.ValueInfoProto(name="z")]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z2"])], "else", [], [onnx.ValueInfoProto(name="z2")]
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=inner, else_branch=other),
        helper.make_node("MatMul", ["x", "w"], ["y2"], name="m"),
    ]
    constants: dict[str, AnyArray] = {"w": _zeros(3, 3), "c": np.array(True)}
    graph = OnnxModel(_model(nodes, {"x": (1, 3)}, ["y", "y2"], constants)).graph
    assert graph.node("if").inputs == ("c", "x", "w")
    assert {(node.name, port) for node, port in graph.consumers("w")} == {("if", 2), ("m", 1)}


def test_local_functions_are_inlined() -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    function = helper.make_function(
        "custom", "Linear", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)]
    )
    nodes = [helper.make_node("Linear", ["x", "w"], ["y"], domain="custom")]
    proto = _model(nodes, {"x": (1, 3)}, ["y"], {"w": _zeros(3, 3)}, functions=[function])
    before = proto.SerializeToString(deterministic=True)
    model = OnnxModel(proto)
    assert [node.op for node in model.graph if node.op not in ("Parameter", "Constant", "Result")] == [
        "MatMul"
    ]
    assert proto.SerializeToString(deterministic=True) == before


def test_shapes_and_batch_size() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Identity", ["i"], ["z"])]
    constants = {"w": _zeros(2, 4, 3, 3)}
    model = OnnxModel(_model(nodes, {"x": ("n", 4, 9, 9), "i": ("n", 6)}, ["y", "z"], constants))
    assert model.graph.tensor("y").shape == (None, 2, 7, 7)
    assert model.graph.tensor("y").dtype == np.float32
    assert model.batch_size is None
    assert OnnxModel(_model(nodes, {"x": (1, 4, 9, 9), "i": (1, 6)}, ["y", "z"], constants)).batch_size == 1
    assert (
        OnnxModel(_model(nodes, {"x": (1, 4, 9, 9), "i": (2, 6)}, ["y", "z"], constants)).batch_size is None
    )


def test_failing_shape_inference_is_survived() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")]
    model = OnnxModel(_model(nodes, {"x": (1, 3, 9, 9)}, ["y"], {"w": _zeros(2, 4, 3, 3)}))
    assert model.graph.node("conv").op == "Convolution"
    assert model.graph.tensor("x").shape == (1, 3, 9, 9)


def test_cycle() -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    with pytest.raises(ModelError, match="cycle"):
        OnnxModel(_model(nodes, {"x": (1,)}, ["b"]))
