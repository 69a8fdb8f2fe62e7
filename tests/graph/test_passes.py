"""Passes on models of both formats: an edited model computes the same, the rest is kept and said so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops

from pot_sparsity.algorithms.arrays import AnyArray, Float32, Float64
from pot_sparsity.algorithms.correction import FusedBatchNorm
from pot_sparsity.engines import get_engine
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.openvino_model import OpenVINOModel
from pot_sparsity.graph.passes import add_missing_biases, fold_weight_chains, fuse_batchnorm
from pot_sparsity.graph.weights import read_bias, read_weight

FORMATS = ("onnx", "openvino")
RNG = np.random.default_rng(11)


def normal(*shape: int) -> Float32:
    return RNG.normal(size=shape).astype(np.float32)


def norm(channels: int, prefix: str = "") -> dict[str, AnyArray]:
    """Parameters of a batch normalization."""
    return {
        f"{prefix}gamma": normal(channels),
        f"{prefix}beta": normal(channels),
        f"{prefix}mean": normal(channels),
        f"{prefix}var": RNG.uniform(0.2, 3.0, channels).astype(np.float32),
    }


def bn(x: str, y: str, prefix: str = "", name: str = "bn") -> onnx.NodeProto:
    parameters = [f"{prefix}{word}" for word in ("gamma", "beta", "mean", "var")]
    return helper.make_node("BatchNormalization", [x, *parameters], [y], name=name, epsilon=1e-3)


def node(op: str, inputs: Sequence[str], output: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], name=output, **attrs)


def proto(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, AnyArray],
    x: Sequence[int],
    outputs: Sequence[str] = ("y",),
    extra: Mapping[str, Sequence[int]] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in {"x": x, **(extra or {})}.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def load(model: onnx.ModelProto, form: str) -> Model:
    if form == "onnx":
        return OnnxModel(model)
    return OpenVINOModel(ov.Core().read_model(model.SerializeToString()))


def run(model: Model, feeds: Mapping[str, AnyArray]) -> list[AnyArray]:
    engine = get_engine("onnxruntime" if model.format == "onnx" else "openvino")
    return list(engine.compile(model.extract()).run(feeds).values())


def feeds_for(model: Model) -> dict[str, AnyArray]:
    return {info.name: normal(*(size or 2 for size in info.shape or ())) for info in model.inputs}


def assert_same(before: Sequence[AnyArray], after: Sequence[AnyArray], tolerance: float) -> None:
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert a.shape == b.shape
        old, new = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        assert np.isfinite(old).all()
        assert np.linalg.norm(old - new) <= tolerance * np.linalg.norm(old)


def ops_of(model: Model) -> list[str]:
    return [n.op for n in model.graph]


CONV = {"w": normal(6, 4, 3, 3)}
FUSABLE: dict[str, tuple[list[onnx.NodeProto], dict[str, AnyArray], tuple[int, ...]]] = {
    "convolution": ([node("Conv", "xw", "c"), bn("c", "y")], {**CONV, **norm(6)}, (2, 4, 6, 6)),
    "convolution with bias": (
        [node("Conv", "xwb", "c"), bn("c", "y")],
        {**CONV, "b": normal(6), **norm(6)},
        (2, 4, 6, 6),
    ),
    "grouped": (
        [node("Conv", "xwb", "c", group=2), bn("c", "y")],
        {"w": normal(6, 2, 3, 3), "b": normal(6), **norm(6)},
        (2, 4, 6, 6),
    ),
    "depthwise": (
        [node("Conv", "xw", "c", group=4), bn("c", "y")],
        {"w": normal(8, 1, 3, 3), **norm(8)},
        (2, 4, 6, 6),
    ),
    "1-D": ([node("Conv", "xw", "c"), bn("c", "y")], {"w": normal(6, 4, 3), **norm(6)}, (2, 4, 6)),
    "3-D": (
        [node("Conv", "xw", "c"), bn("c", "y")],
        {"w": normal(6, 4, 3, 2, 1), **norm(6)},
        (2, 4, 6, 5, 4),
    ),
    "transposed": (
        [node("ConvTranspose", "xw", "c", strides=[2, 2]), bn("c", "y")],
        {"w": normal(4, 6, 3, 3), **norm(6)},
        (2, 4, 6, 6),
    ),
    "transposed, grouped, bias": (
        [node("ConvTranspose", "xwb", "c", group=2), bn("c", "y")],
        {"w": normal(4, 3, 3, 3), "b": normal(6), **norm(6)},
        (2, 4, 6, 6),
    ),
    "separate bias": (
        [node("Conv", "xw", "c"), node("Add", "cb", "d"), bn("d", "y")],
        {**CONV, "b": normal(1, 6, 1, 1), **norm(6)},
        (2, 4, 6, 6),
    ),
    "identity between": (
        [node("Conv", "xw", "c"), node("Identity", "c", "d"), bn("d", "e"), node("Relu", "e", "y")],
        {**CONV, **norm(6)},
        (2, 4, 6, 6),
    ),
    "two in a row": (
        [node("Conv", "xw", "c"), bn("c", "d"), bn("d", "y", "q", "bn2")],
        {**CONV, **norm(6), **norm(6, "q")},
        (2, 4, 6, 6),
    ),
    "matrix product": ([node("MatMul", "xw", "c"), bn("c", "y")], {"w": normal(5, 7), **norm(7)}, (3, 5)),
    "matrix product with bias": (
        [node("MatMul", "xw", "c"), node("Add", "bc", "d"), bn("d", "y")],
        {"w": normal(5, 7), "b": normal(7), **norm(7)},
        (3, 5),
    ),
    "left matrix product": (
        [node("MatMul", "wx", "c"), bn("c", "y")],
        {"w": normal(7, 5), **norm(7)},
        (2, 5, 4),
    ),
    "Gemm": (
        [node("Gemm", "xwb", "c", alpha=0.5, beta=-2.0, transB=1), bn("c", "y")],
        {"w": normal(7, 5), "b": normal(7), **norm(7)},
        (3, 5),
    ),
    "Gemm without bias": ([node("Gemm", "xw", "c"), bn("c", "y")], {"w": normal(5, 7), **norm(7)}, (3, 5)),
    "multiply and add": (
        [node("Conv", "xw", "c"), node("Mul", "cs", "d"), node("Add", "dt", "y")],
        {**CONV, "s": normal(1, 6, 1, 1), "t": normal(6, 1, 1)},
        (2, 4, 6, 6),
    ),
    "multiply and add after bias": (
        [node("Conv", "xwb", "c"), node("Mul", "cs", "d"), node("Add", "dt", "y")],
        {**CONV, "b": normal(6), "s": normal(1, 6, 1, 1), "t": normal(6, 1, 1)},
        (2, 4, 6, 6),
    ),
    "divide and subtract": (
        [node("MatMul", "xw", "a"), node("Add", "ab", "c"), node("Div", "cs", "d"), node("Sub", "dt", "y")],
        {"w": normal(5, 7), "b": normal(7), "s": normal(7), "t": normal(1, 7)},
        (3, 5),
    ),
    "multiply alone": (
        [node("Conv", "xwb", "c"), node("Mul", "cs", "d"), node("Relu", "d", "y")],
        {**CONV, "b": normal(6), "s": normal(1, 6, 1, 1)},
        (2, 4, 6, 6),
    ),
    "parameters behind chains": (
        [
            node("Identity", ["gamma_"], "gamma"),
            node("Conv", "xw", "c"),
            bn("c", "y"),
        ],
        {**CONV, **{("gamma_" if k == "gamma" else k): v for k, v in norm(6).items()}},
        (2, 4, 6, 6),
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FUSABLE)
def test_fused_model_computes_the_same(form: str, name: str) -> None:
    nodes, constants, x = FUSABLE[name]
    source = proto(nodes, constants, x)
    model = load(source, form)
    feeds = feeds_for(model)
    before = run(model, feeds)
    outputs = model.outputs
    assert fuse_batchnorm(model) == []
    assert not {"BatchNormalization", "Multiply", "Divide"} & _computed_ops(model)
    assert_same(before, run(model, feeds), 1e-5)
    assert [info.name for info in model.outputs] == [info.name for info in outputs]
    assert {edit.kind for edit in model.edits} <= {"fuse_batchnorm", "add_bias", "fold_constant"}
    assert any(edit.kind == "fuse_batchnorm" for edit in model.edits)
    layers = find_layers(model.graph).layers
    assert all(place.bias is not None for layer in layers for place in layer.places)


def _computed_ops(model: Model) -> set[str]:
    """Operators on the way from the inputs to the outputs (not those that only compute constants)."""
    graph = model.graph
    alive: set[str] = set(graph.inputs)
    found = set()
    for item in graph:
        if item.op == "Parameter" or alive.intersection(item.inputs):
            alive.update(item.outputs)
            found.add(item.op)
    return found


KEPT: dict[str, tuple[list[onnx.NodeProto], dict[str, AnyArray], tuple[int, ...], tuple[str, ...], str]] = {
    "after ReLU": (
        [node("Conv", "xw", "c"), node("Relu", "c", "d"), bn("d", "y")],
        {**CONV, **norm(6)},
        (1, 4, 6, 6),
        ("y",),
        "follows Relu",
    ),
    "after a residual Add": (
        [node("Conv", "xw", "c"), node("Add", "cc", "d"), bn("d", "y")],
        {**CONV, **norm(6)},
        (1, 4, 6, 6),
        ("y",),
        "follows Add",
    ),
    "after the input": ([bn("x", "y")], norm(4), (1, 4, 6, 6), ("y",), "input of the model"),
    "several consumers": (
        [node("Conv", "xw", "c"), bn("c", "d"), node("Add", "cd", "y")],
        {**CONV, **norm(6)},
        (1, 4, 6, 6),
        ("y",),
        "several consumers",
    ),
    "several consumers after the bias": (
        [node("Conv", "xw", "c"), node("Add", "cb", "e"), bn("e", "d"), node("Add", "ed", "y")],
        {**CONV, "b": normal(6, 1, 1), **norm(6)},
        (1, 4, 6, 6),
        ("y",),
        "several consumers",
    ),
    "tapped by the user": (
        [node("Conv", "xw", "c"), bn("c", "y")],
        {**CONV, **norm(6)},
        (1, 4, 6, 6),
        ("y", "c"),
        "output of the model",
    ),
    "shared weight": (
        [node("Conv", "xw", "a", pads=[1, 1, 1, 1]), node("Conv", "aw", "c"), bn("c", "y")],
        {"w": normal(4, 4, 3, 3), **norm(4)},
        (1, 4, 6, 6),
        ("y",),
        "shared",
    ),
    "another axis": (
        [node("MatMul", "xw", "c"), bn("c", "y")],
        {"w": normal(5, 7), **norm(3)},
        (2, 3, 5),
        ("y",),
        "another axis",
    ),
    "variance below zero": (
        [node("Conv", "xw", "c"), bn("c", "y")],
        {**CONV, **norm(6), "var": np.array([1, 1, -0.001, 1, 1, 1], np.float32)},
        (1, 4, 6, 6),
        ("y",),
        "not positive",
    ),
    "weight that cannot be rewritten": (
        [node("Sqrt", "w", "v"), node("Conv", "xv", "c"), bn("c", "y")],
        {"w": np.abs(CONV["w"]), **norm(6)},
        (1, 4, 6, 6),
        ("y",),
        "Sqrt",
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_fused_is_kept_with_a_reason(form: str, name: str) -> None:
    nodes, constants, x, outputs, words = KEPT[name]
    model = load(proto(nodes, constants, x, outputs), form)
    count = len(model.graph)
    kept = fuse_batchnorm(model)
    assert len(kept) == 1
    assert words in kept[0].reason
    assert model.graph.node(kept[0].node).op == "BatchNormalization"
    assert model.edits == []
    assert len(model.graph) == count


def test_parameters_that_are_computed_and_integer_weights_are_kept() -> None:
    nodes = [node("Conv", "xw", "c"), bn("c", "y")]
    constants = {**CONV, **norm(6)}
    del constants["gamma"]
    model = load(proto(nodes, constants, (1, 4, 6, 6), extra={"gamma": (6,)}), "onnx")
    assert "not constants" in fuse_batchnorm(model)[0].reason

    nodes = [node("DequantizeLinear", ["q", "s"], "w"), *nodes]
    constants = {"q": np.ones((6, 4, 3, 3), np.int8), "s": np.asarray(np.float32(0.1)), **norm(6)}
    model = load(proto(nodes, constants, (1, 4, 6, 6)), "onnx")
    assert "int8" in fuse_batchnorm(model)[0].reason
    assert model.edits == []


def test_values_that_overflow_float16_are_not_fused() -> None:
    nodes = [node("Cast", "w", "v", to=1), node("Conv", "xv", "c"), bn("c", "y")]
    constants = {"w": CONV["w"].astype(np.float16), **norm(6)}
    model = load(proto(nodes, {**constants, "gamma": np.full(6, 1e6, np.float32)}, (1, 4, 6, 6)), "onnx")
    assert "float16" in fuse_batchnorm(model)[0].reason
    source = proto(nodes, constants, (1, 4, 6, 6))
    model = load(source, "onnx")
    feeds = feeds_for(model)
    before = run(model, feeds)
    assert fuse_batchnorm(model) == []
    assert_same(before, run(model, feeds), 2e-3)
    assert model.graph.value(find_layers(model.graph).layers[0].constant).dtype == np.float16


@pytest.mark.parametrize("form", FORMATS)
def test_bias_shared_with_another_node_gets_a_constant_of_its_own(form: str) -> None:
    nodes = [
        node("Conv", "xwb", "c"),
        bn("c", "d"),
        node("Conv", "dvb", "y"),
    ]
    constants = {**CONV, "v": normal(6, 6, 3, 3), "b": normal(6), **norm(6)}
    source = proto(nodes, constants, (1, 4, 6, 6))
    model = load(source, form)
    feeds = feeds_for(model)
    before = run(model, feeds)
    kept = fuse_batchnorm(model)
    if form == "onnx":
        assert kept == []
    assert_same(before, run(model, feeds), 1e-5)
    add_missing_biases(model, find_layers(model.graph).layers)
    assert_same(before, run(model, feeds), 1e-5)
    layers = find_layers(model.graph).layers
    assert all(layer.places[0].bias is not None for layer in layers)


def test_a_scale_for_all_channels_stays() -> None:
    nodes = [node("MatMul", "xw", "c"), node("Mul", "cs", "d"), node("Softmax", "d", "y")]
    model = load(proto(nodes, {"w": normal(5, 7), "s": np.asarray(np.float32(0.125))}, (3, 5)), "onnx")
    assert fuse_batchnorm(model) == []
    assert model.edits == []


def test_layer_scale_with_the_constant_first_stays() -> None:
    nodes = [node("MatMul", "xw", "c"), node("Mul", "sc", "y")]
    model = load(proto(nodes, {"w": normal(5, 7), "s": normal(7)}, (3, 5)), "onnx")
    assert fuse_batchnorm(model) == []
    assert model.edits == []


def test_decomposed_normalization_of_a_shared_weight_is_reported() -> None:
    nodes = [node("Conv", "xw", "a", pads=[1, 1, 1, 1]), node("Conv", "aw", "c"), node("Mul", "cs", "y")]
    constants = {"w": normal(4, 4, 3, 3), "s": normal(4, 1, 1)}
    model = load(proto(nodes, constants, (1, 4, 6, 6)), "onnx")
    kept = fuse_batchnorm(model)
    assert [entry.node for entry in kept] == ["y"]
    assert "shared" in kept[0].reason


@pytest.mark.parametrize("form", FORMATS)
def test_missing_biases_are_added_as_zeros(form: str) -> None:
    nodes = [
        node("Conv", "xw", "a", group=2),
        node("Reshape", ["a", "flat"], "f"),
        node("MatMul", "fv", "g"),
        node("Gemm", "gu", "y"),
    ]
    constants = {
        "w": normal(6, 2, 3, 3),
        "v": normal(96, 5),
        "u": normal(5, 3),
        "flat": np.array([2, 96]),
    }
    source = proto(nodes, constants, (2, 4, 6, 6))
    model = load(source, form)
    feeds = feeds_for(model)
    before = run(model, feeds)
    fuse_batchnorm(model)
    added = add_missing_biases(model, find_layers(model.graph).layers)
    assert len(added) == 3
    assert sum(edit.kind == "add_bias" for edit in model.edits) == 3
    assert_same(before, run(model, feeds), 1e-6)
    for layer in find_layers(model.graph).layers:
        bias = read_bias(model, layer, layer.places[0])
        assert bias is not None
        assert bias.shape == (layer.groups, layer.rows)
        assert not bias.any()
    assert add_missing_biases(model, find_layers(model.graph).layers) == []


@pytest.mark.parametrize("form", FORMATS)
def test_stacked_products_and_computed_biases_get_no_bias(form: str) -> None:
    nodes = [node("MatMul", "xw", "y")]
    model = load(proto(nodes, {"w": normal(3, 5, 7)}, (3, 2, 5)), form)
    assert add_missing_biases(model, find_layers(model.graph).layers) == []
    model = load(proto([node("Conv", "xwb", "y")], CONV, (1, 4, 6, 6), extra={"b": (6,)}), "onnx")
    assert add_missing_biases(model, find_layers(model.graph).layers) == []


@pytest.mark.parametrize("form", FORMATS)
def test_chains_are_folded_into_direct_constants(form: str) -> None:
    nodes = [
        node("Reshape", ["w", "shape"], "v"),
        node("Conv", "xv", "c", group=4),
        node("Transpose", "u", "t", perm=[1, 0, 2, 3]),
        node("Conv", "ct", "y"),
    ]
    constants = {"w": normal(4, 9), "shape": np.array([4, 1, 3, 3]), "u": normal(4, 6, 1, 1)}
    source = proto(nodes, constants, (1, 4, 6, 6))
    model = load(source, form)
    feeds = feeds_for(model)
    before = run(model, feeds)
    assert len(fold_weight_chains(model)) == 2
    assert [layer.chain for layer in find_layers(model.graph).layers] == [(), ()]
    assert "Reshape" not in ops_of(model)
    assert "Transpose" not in ops_of(model)
    assert {edit.kind for edit in model.edits} == {"fold_constant"}
    assert_same(before, run(model, feeds), 1e-6)
    assert fold_weight_chains(model) == []


@pytest.mark.parametrize("form", FORMATS)
def test_storage_chains_and_shared_weights_are_not_folded(form: str) -> None:
    half = [node("Cast", "w", "v", to=1), node("Conv", "xv", "y")]
    constants: dict[str, AnyArray] = {"w": CONV["w"].astype(np.float16)}
    model = load(proto(half, constants, (1, 4, 6, 6)), form)
    assert fold_weight_chains(model) == []
    assert len(fold_weight_chains(model, keep_compressed=False)) == 1
    layer = find_layers(model.graph).layers[0]
    assert layer.chain == ()
    assert model.graph.value(layer.constant).dtype == np.float32

    quantized = [node("DequantizeLinear", ["q", "s"], "w"), node("Conv", "xw", "y")]
    constants = {"q": np.ones((6, 4, 3, 3), np.int8), "s": np.asarray(np.float32(0.1))}
    model = load(proto(quantized, constants, (1, 4, 6, 6)), form)
    assert fold_weight_chains(model, keep_compressed=False) == []

    shared = [
        node("Reshape", ["w", "shape"], "v"),
        node("Conv", "xv", "a", pads=[1, 1, 1, 1]),
        node("Conv", "av", "y"),
    ]
    constants = {"w": normal(4, 36), "shape": np.array([4, 4, 3, 3])}
    model = load(proto(shared, constants, (1, 4, 6, 6)), form)
    assert fold_weight_chains(model) == []


def test_decomposed_gemm_and_bias_chains_of_openvino() -> None:
    source = proto(
        [node("Gemm", "xwb", "y", alpha=0.5, beta=2.0)], {"w": normal(5, 7), "b": normal(7)}, (3, 5)
    )
    model = load(source, "openvino")
    feeds = feeds_for(model)
    before = run(model, feeds)
    assert fuse_batchnorm(model) == []
    assert fold_weight_chains(model)
    (layer,) = find_layers(model.graph).layers
    assert layer.places[0].bias is not None
    assert layer.places[0].bias.chain == ()
    assert "Multiply" not in ops_of(model)
    assert_same(before, run(model, feeds), 1e-5)


def test_compressed_ir_with_a_decomposed_normalization() -> None:
    x = ops.parameter([1, 4, 6, 6], np.float32, name="x")
    weight = ops.convert(ops.constant(CONV["w"].astype(np.float16)), "f32")
    conv = ops.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    scaled = ops.multiply(conv, ops.convert(ops.constant(normal(1, 6, 1, 1).astype(np.float16)), "f32"))
    shifted = ops.add(scaled, ops.convert(ops.constant(normal(1, 6, 1, 1).astype(np.float16)), "f32"))
    model = OpenVINOModel(ov.Model([ops.result(ops.relu(shifted))], [x], "test"))
    feeds = feeds_for(model)
    before = run(model, feeds)
    assert fuse_batchnorm(model) == []
    assert "Multiply" not in ops_of(model)
    assert_same(before, run(model, feeds), 1e-3)
    layer = find_layers(model.graph).layers[0]
    assert model.graph.value(layer.constant).dtype == np.float16


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_layer_absorbs_is_recorded(form: str) -> None:
    parameters = norm(6)
    model = load(proto([node("Conv", "xw", "c"), bn("c", "y")], {**CONV, **parameters}, (1, 4, 6, 6)), form)
    absorbed: dict[str, FusedBatchNorm] = {}
    assert fuse_batchnorm(model, absorbed) == []
    (layer,) = find_layers(model.graph).layers
    found = absorbed.pop(layer.name)
    assert not absorbed
    np.testing.assert_array_equal(found.gamma, parameters["gamma"])
    np.testing.assert_array_equal(found.beta, parameters["beta"])
    np.testing.assert_array_equal(found.variance, parameters["var"])
    assert found.epsilon == pytest.approx(1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_a_normalization_that_is_scaled_afterwards_is_not_recorded(form: str) -> None:
    nodes = [node("Conv", "xw", "c"), bn("c", "d"), node("Mul", "ds", "y")]
    model = load(proto(nodes, {**CONV, **norm(6), "s": normal(1, 6, 1, 1)}, (1, 4, 6, 6)), form)
    absorbed: dict[str, FusedBatchNorm] = {}
    assert fuse_batchnorm(model, absorbed) == []
    assert absorbed == {}


def test_the_last_of_two_normalizations_is_recorded() -> None:
    nodes = [node("Conv", "xw", "c"), bn("c", "d"), bn("d", "y", "second_", "bn2")]
    model = load(proto(nodes, {**CONV, **norm(6), **norm(6, "second_")}, (1, 4, 6, 6)), "onnx")
    second = model.graph.value("second_beta")
    absorbed: dict[str, FusedBatchNorm] = {}
    assert fuse_batchnorm(model, absorbed) == []
    (found,) = absorbed.values()
    np.testing.assert_array_equal(found.beta, second)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", FUSABLE)
def test_gains_are_what_the_weights_were_multiplied_by(case: str, form: str) -> None:
    nodes, constants, shape = FUSABLE[case]
    model = load(proto(nodes, constants, shape), form)
    before = {layer.name: read_weight(model, layer) for layer in find_layers(model.graph).layers}
    gains: dict[str, Float64] = {}
    fuse_batchnorm(model, None, gains)
    assert set(gains) <= set(before)
    for layer in find_layers(model.graph).layers:
        after, gain = read_weight(model, layer), gains.get(layer.name)
        expected = before[layer.name] * (1.0 if gain is None else gain[:, :, None])
        np.testing.assert_allclose(after, expected, rtol=1e-5)
    assert gains


def test_gains_of_several_fusions_multiply() -> None:
    nodes = [node("Conv", "xw", "c"), bn("c", "d"), bn("d", "y", "second_", "bn2")]
    parameters = {**norm(6), **norm(6, "second_")}
    model = load(proto(nodes, {**CONV, **parameters}, (1, 4, 6, 6)), "onnx")
    gains: dict[str, Float64] = {}
    fuse_batchnorm(model, None, gains)
    factors = [
        parameters[f"{prefix}gamma"] / np.sqrt(parameters[f"{prefix}var"].astype(np.float64) + 1e-3)
        for prefix in ("", "second_")
    ]
    (found,) = gains.values()
    np.testing.assert_allclose(found.ravel(), factors[0] * factors[1], rtol=1e-6)
