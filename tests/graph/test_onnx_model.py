"""Edits of ONNX models: constants in place, and the few structural edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.finite import check_finite
from pot_sparsity.graph.model import Edit
from pot_sparsity.graph.onnx_model import OnnxModel

RNG = np.random.default_rng(7)


def _random(*shape: int) -> Float32:
    return RNG.standard_normal(shape).astype(np.float32)


def _model(
    nodes: Sequence[NodeProto],
    shape: Sequence[int | str],
    outputs: Sequence[str],
    constants: dict[str, AnyArray],
    **options: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    options = {"ir_version": 8, "opset_imports": [helper.make_opsetid("", 17)], **options}
    return helper.make_model(graph, **options)


def _check(proto: onnx.ModelProto) -> None:
    """Valid ONNX, once the shapes of the outputs are filled in."""
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def _run(proto: onnx.ModelProto, x: AnyArray) -> list[Float32]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value, np.float32) for value in session.run(None, {"x": x})]


def _conv_bn(outputs: Sequence[str] = ("y",)) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], name="bn"),
        helper.make_node("Relu", ["n"], ["y"], name="relu"),
    ]
    constants = {
        "w": _random(4, 3, 3, 3),
        "g": _random(4),
        "b": _random(4),
        "m": _random(4),
        "v": np.abs(_random(4)) + 1,
    }
    proto = _model(nodes, ("n", 3, 8, 8), outputs, constants, doc_string="kept")
    proto.graph.value_info.append(helper.make_tensor_value_info("n", TensorProto.FLOAT, ("n", 4, 6, 6)))
    proto.metadata_props.add(key="author", value="somebody")
    _check(proto)
    return proto


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64, ml_dtypes.int4],
)
def test_set_constant_touches_nothing_else(dtype: Any) -> None:
    proto = _conv_bn()
    old = numpy_helper.from_array(RNG.integers(0, 7, (3, 5)).astype(dtype), "extra")
    old.doc_string = "a doc"
    proto.graph.initializer.append(old)
    before = proto.SerializeToString(deterministic=True)
    model = OnnxModel(proto)
    graph = model.graph
    value = RNG.integers(-8 if dtype != np.uint8 else 0, 8, (3, 5)).astype(np.float64)
    stored = model.set_constant("extra", value)
    assert stored.dtype == np.dtype(dtype)
    assert model.graph is graph
    np.testing.assert_array_equal(graph.value("extra").astype(np.float64), value)
    np.testing.assert_array_equal(stored.astype(np.float64), value)
    assert proto.SerializeToString(deterministic=True) == before
    expected = onnx.ModelProto.FromString(before)
    expected.graph.initializer[-1].raw_data = numpy_helper.from_array(value.astype(dtype)).raw_data
    assert model.native.SerializeToString(deterministic=True) == expected.SerializeToString(
        deterministic=True
    )
    assert model.edits == []


def test_set_constant_replaces_typed_data_fields() -> None:
    proto = _conv_bn()
    proto.graph.initializer.append(helper.make_tensor("extra", TensorProto.FLOAT, [2], [1.0, 2.0]))
    model = OnnxModel(proto)
    model.set_constant("extra", np.array([3.0, 0.0]))
    assert not model.native.graph.initializer[-1].float_data
    np.testing.assert_array_equal(model.graph.value("extra"), [3.0, 0.0])


def test_set_constant_of_constant_nodes() -> None:
    nodes = [
        helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(_random(2))),
        helper.make_node("Constant", [], ["f"], value_float=1.5),
        helper.make_node("Constant", [], ["fs"], value_floats=[1.5, 2.5]),
        helper.make_node("Constant", [], ["i"], value_int=3),
        helper.make_node("Constant", [], ["is"], value_ints=[3, 4]),
        helper.make_node("Identity", ["t"], ["y"]),
    ]
    model = OnnxModel(_model(nodes, (1,), ["y"], {}))
    for name in ("t", "f", "fs", "i", "is"):
        old = model.graph.value(name)
        stored = model.set_constant(name, np.full(old.shape, 2.0))
        assert stored.dtype == old.dtype
        np.testing.assert_array_equal(model.graph.value(name), np.full(old.shape, 2, old.dtype))


def test_set_constant_refuses_what_cannot_be_stored() -> None:
    proto = _conv_bn()
    for name, dtype in (("h", np.float16), ("q", np.int8)):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(2, dtype), name))
    model = OnnxModel(proto)
    before = model.native.SerializeToString(deterministic=True)
    with pytest.raises(ValueError, match=r"'h' has shape \(2,\), the new value \(3,\)"):
        model.set_constant("h", np.ones(3))
    with pytest.raises(ValueError, match="'h': a value is not finite in float16"):
        model.set_constant("h", np.array([1.0, 7e4]))
    with pytest.raises(ValueError, match="'w': a value is not finite"):
        model.set_constant("w", np.full((4, 3, 3, 3), np.nan))
    with pytest.raises(ValueError, match="'q': a value does not fit into int8"):
        model.set_constant("q", np.array([1.0, 128.0]))
    with pytest.raises(ValueError, match="'c' is not a constant"):
        model.set_constant("c", np.ones(2))
    assert model.native.SerializeToString(deterministic=True) == before


def test_copies_are_independent() -> None:
    proto = _conv_bn()
    original = OnnxModel(proto)
    weight = original.graph.value("w")
    other = original.copy()
    other.set_constant("w", np.zeros((4, 3, 3, 3)))
    third = other.copy()
    other.bypass("bn", kind="fuse_batchnorm", detail="fused")
    third.set_constant("g", np.ones(4))
    np.testing.assert_array_equal(original.graph.value("w"), weight)
    assert "bn" in original.graph
    assert "bn" in third.graph
    assert "bn" not in other.graph
    assert (original.edits, third.edits, len(other.edits)) == ([], [], 1)
    assert not third.graph.value("w").any()
    assert original.native is proto


def test_bypass_in_the_middle() -> None:
    proto = _conv_bn()
    before = proto.SerializeToString(deterministic=True)
    model = OnnxModel(proto)
    graph = model.graph
    model.bypass("bn", kind="fuse_batchnorm", detail="merged into conv")
    assert model.edits == [Edit("fuse_batchnorm", "bn", "merged into conv")]
    assert model.graph is not graph
    assert model.graph.node("relu").inputs == ("c",)
    assert [t.name for t in model.native.graph.initializer] == ["w"]
    assert not model.native.graph.value_info
    x = _random(2, 3, 8, 8)
    expected = onnx.ModelProto.FromString(before)
    del expected.graph.node[1]
    expected.graph.node[1].input[0] = "c"
    np.testing.assert_array_equal(_run(model.native, x)[0], _run(expected, x)[0])
    assert model.native.metadata_props[0].value == "somebody"
    assert model.native.doc_string == "kept"
    assert proto.SerializeToString(deterministic=True) == before
    _check(model.native)


def test_bypass_keeps_the_name_of_a_model_output() -> None:
    model = OnnxModel(_conv_bn(outputs=("y", "n")))
    conv = OnnxModel(_conv_bn(outputs=("c",)))
    model.bypass("bn", kind="fuse_batchnorm", detail="")
    assert model.graph.outputs == ("y", "n")
    assert model.graph.node("conv").outputs == ("n",)
    assert model.graph.node("relu").inputs == ("n",)
    conv.set_constant("w", model.graph.value("w").astype(np.float64))
    x = _random(1, 3, 8, 8)
    np.testing.assert_array_equal(_run(model.native, x)[1], _run(conv.native, x)[0])


def test_bypass_between_two_outputs_or_right_behind_an_input_leaves_an_identity() -> None:
    model = OnnxModel(_conv_bn(outputs=("c", "n")))
    model.bypass("bn", kind="fuse_batchnorm", detail="")
    assert model.graph.outputs == ("c", "n")
    assert [node.op for node in model.graph if node.op == "Identity"] == ["Identity"]
    c, n = _run(model.native, _random(1, 3, 8, 8))
    np.testing.assert_array_equal(c, n)
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    model = OnnxModel(_model(nodes, (3,), ["y"], {}))
    model.bypass("relu", kind="fold_constant", detail="")
    np.testing.assert_array_equal(_run(model.native, np.array([-1, 0, 1], np.float32))[0], [-1, 0, 1])


def test_bypass_drops_constants_only_if_nobody_else_reads_them() -> None:
    proto = _conv_bn()
    proto.graph.node.add(op_type="Identity", input=["g"], output=["also"])
    proto.graph.output.add(name="also").type.tensor_type.elem_type = TensorProto.FLOAT
    proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, (4,)))
    model = OnnxModel(proto)
    model.bypass("bn", kind="fuse_batchnorm", detail="")
    assert [t.name for t in model.native.graph.initializer] == ["w", "g"]
    assert [entry.name for entry in model.native.graph.input] == ["x"]


def test_bypass_follows_subgraphs() -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("Neg", ["r"], [name])
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )

    nodes = [
        helper.make_node("Neg", ["x"], ["n"], name="neg"),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        helper.make_node("If", ["k"], ["y"], name="if", then_branch=branch("p"), else_branch=branch("q")),
    ]
    model = OnnxModel(_model(nodes, (3,), ["y"], {"k": np.array(True)}))
    model.bypass("relu", kind="fold_constant", detail="")
    np.testing.assert_array_equal(_run(model.native, np.array([-1, 0, 1], np.float32))[0], [-1, 0, 1])


def test_bypass_refuses_other_nodes() -> None:
    model = OnnxModel(_conv_bn())
    with pytest.raises(ValueError, match="no operator called 'nobody'"):
        model.bypass("nobody", kind="fold_constant", detail="")
    nodes = [helper.make_node("Split", ["x"], ["y", "z"], name="split")]
    model = OnnxModel(_model(nodes, (4,), ["y", "z"], {}))
    with pytest.raises(ValueError, match="cannot be bypassed"):
        model.bypass("split", kind="fold_constant", detail="")
    assert model.edits == []


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_add_bias_to_convolutions(op: str, ir_version: int) -> None:
    nodes = [helper.make_node(op, ["x", "w"], ["y"], name="conv", group=2)]
    shape = (6, 2, 3, 3) if op == "Conv" else (4, 3, 3, 3)
    proto = _model(nodes, (1, 4, 8, 8), ["y"], {"w": _random(*shape)}, ir_version=ir_version)
    if ir_version < 4:
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, shape))
    model = OnnxModel(proto)
    bias = np.arange(6.0)
    name = model.add_bias("conv", bias)
    _check(model.native)
    assert model.edits[0].kind == "add_bias"
    assert model.graph.node("conv").inputs == ("x", "w", name)
    assert model.graph.inputs == ("x",)
    x = _random(1, 4, 8, 8)
    expected = _run(proto, x)[0] + bias[:, None, None]
    np.testing.assert_allclose(_run(model.native, x)[0], expected, atol=1e-4)
    with pytest.raises(ValueError, match="already has a bias"):
        model.add_bias("conv", bias)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_add_bias_to_gemm(left: bool, transposed: bool) -> None:
    weight = _random(5, 7) if left == transposed else _random(7, 5)
    names = ["w", "x"] if left else ["x", "w"]
    trans: dict[str, Any] = {("transA" if left else "transB"): int(transposed)}
    node = helper.make_node("Gemm", names, ["y"], name="fc", alpha=0.5, beta=3.0, **trans)
    proto = _model([node], (5, 4) if left else (4, 5), ["y"], {"w": weight})
    model = OnnxModel(proto)
    bias = np.arange(7.0)
    model.add_bias("fc", bias)
    x = _random(5, 4) if left else _random(4, 5)
    expected = _run(proto, x)[0] + (bias[:, None] if left else bias)
    np.testing.assert_allclose(_run(model.native, x)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("operand", "activation", "left"),
    [
        ((5, 7), (2, 4, 5), False),
        ((7, 5), (2, 5, 4), True),
        ((7, 5), (5,), True),
        ((3, 5, 7), (2, 3, 4, 5), False),
        ((3, 7, 5), (2, 3, 5, 4), True),
        ((1, 5, 7), (2, 4, 5), False),
    ],
)
def test_add_bias_to_matmul(operand: tuple[int, ...], activation: tuple[int, ...], left: bool) -> None:
    nodes = [
        helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["m"], name="fc"),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
    ]
    proto = _model(nodes, activation, ["y", "m"], {"w": _random(*operand)})
    model = OnnxModel(proto)
    stack = operand[0] if len(operand) == 3 else 1
    bias = _random(stack * 7)
    name = model.add_bias("fc", bias)
    x = _random(*activation)
    before = _run(proto, x)[1]
    shaped = bias.reshape(stack, 7, 1) if left else bias.reshape(stack, 1, 7)
    if len(activation) == 1:
        shaped = bias
    elif stack == 1:
        shaped = shaped[0]
    y, m = _run(model.native, x)
    np.testing.assert_allclose(m, before + shaped, rtol=1e-5, atol=1e-5)
    assert m.shape == before.shape
    np.testing.assert_array_equal(y, np.maximum(m, 0))
    assert [node.source_type for node in model.graph if node.op in ("MatMul", "Add")] == ["MatMul", "Add"]
    assert model.graph.tensor("m").shape == model.graph.tensor("m__before_bias").shape
    assert model.graph.value(name).size == bias.size
    with pytest.raises(ValueError, match=f"needs {7 * stack} values, not 2"):
        OnnxModel(proto).add_bias("fc", np.ones(2))
    assert OnnxModel(proto).edits == []


def test_added_bias_has_the_weights_type() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"], name="conv"),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    proto = _model(nodes, (1, 4, 8, 8), ["y"], {"w": _random(6, 4, 3, 3).astype(np.float16)})
    model = OnnxModel(proto)
    name = model.add_bias("conv", np.ones(6))
    assert model.graph.value(name).dtype == np.float16
    with pytest.raises(ValueError, match="not finite in float16"):
        OnnxModel(proto).add_bias("conv", np.full(6, 1e6))


def test_names_of_new_constants_are_unique() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["fc.bias"], name="fc"),
        helper.make_node("Relu", ["fc.bias"], ["y"], name="fc/bias"),
    ]
    model = OnnxModel(_model(nodes, (2, 5), ["y"], {"w": _random(5, 7)}))
    assert model.add_bias("fc", np.ones(7)) == "fc.bias_1"
    assert [node.name for node in model.graph if node.op == "Add"] == ["fc/bias_1"]
    _check(model.native)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_replace_operand_drops_the_folded_chain(ir_version: int) -> None:
    nodes = [
        helper.make_node("Reshape", ["w", "shape"], ["r"], name="reshape"),
        helper.make_node("Transpose", ["r"], ["t"], name="transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="fc"),
        helper.make_node("Identity", ["shape"], ["s"], name="other"),
    ]
    weight = _random(35)
    proto = _model(nodes, (2, 5), ["y", "s"], {"w": weight, "shape": np.array([7, 5])}, ir_version=ir_version)
    proto.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    model = OnnxModel(proto)
    value = model.graph.value("w").reshape(7, 5).T.copy()
    name = model.replace_operand("fc", 1, value, detail="folded Reshape and Transpose")
    assert model.edits == [Edit("fold_constant", "fc", "folded Reshape and Transpose")]
    assert [node.op_type for node in model.native.graph.node] == ["MatMul", "Identity"]
    assert [t.name for t in model.native.graph.initializer] == ["shape", name]
    x = _random(2, 5)
    np.testing.assert_array_equal(_run(model.native, x)[0], _run(proto, x)[0])
    with pytest.raises(ValueError, match="has no input 2"):
        model.replace_operand("fc", 2, value, detail="")


def test_chains_that_others_read_stay() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], name="transpose"),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="a"),
        helper.make_node("MatMul", ["x", "t"], ["z"], name="b"),
    ]
    model = OnnxModel(_model(nodes, (2, 5), ["y", "z"], {"w": _random(7, 5)}))
    model.replace_operand("a", 1, model.graph.value("w").T.copy(), detail="")
    assert "transpose" in model.graph
    model.replace_operand("b", 1, model.graph.value("w").T.copy(), detail="")
    assert "transpose" not in model.graph
    assert not model.graph.is_constant("w")


def test_finite() -> None:
    proto = _conv_bn()
    check_finite(OnnxModel(proto))
    bad = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    bad[0, 0, 0, :2] = np.nan, np.inf
    proto.graph.initializer[0].raw_data = bad.tobytes()
    with pytest.raises(ModelError, match="weight 'w' holds 2 NaN or infinite values: repair it"):
        check_finite(OnnxModel(proto))


def test_infinite_masks_are_legal_and_hidden_weights_are_found() -> None:
    nodes = [
        helper.make_node("Cast", ["h"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "mask"], ["y"]),
    ]
    mask = np.full((2, 3), -np.inf, np.float32)
    weight = np.ones((4, 3), np.float16)
    check_finite(OnnxModel(_model(nodes, (2, 4), ["y"], {"h": weight, "mask": mask})))
    weight[0, 0] = np.inf
    with pytest.raises(ModelError, match="weight 'h' holds 1 NaN"):
        check_finite(OnnxModel(_model(nodes, (2, 4), ["y"], {"h": weight, "mask": mask})))
