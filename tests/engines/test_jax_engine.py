"""A model read as a JAX function: values, gradients, what stays open, what is refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.engines import get_engine
from pot_sparsity.engines.jax_engine import DifferentiableModel, NotDifferentiable
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model, Runnable

ENGINE = get_engine("openvino", threads=1)


def _random(*shape: int) -> Float32:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * 0.5).astype(np.float32)


def _onnx_network(batch: str | int = "n", path: Path | None = None) -> Runnable:
    """Two convolutions with a residual, a pool and a linear layer."""
    constants = {"w1": _random(4, 3, 3, 3), "b1": _random(4), "w2": _random(4, 4, 1, 1), "w3": _random(4, 5)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("Add", ["c2", "r1"], ["s"]),
        helper.make_node("MaxPool", ["s"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ReduceMean", ["p"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "w3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, 3, 6, 6))],
        [onnx.ValueInfoProto(name="y"), onnx.ValueInfoProto(name="p")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    if path is None:
        return Runnable(proto.SerializeToString(), ("x",), ("y", "p"))
    onnx.save(proto, path)
    return Runnable(path, ("x",), ("y", "p"))


def _named(value: AnyArray, name: str) -> ov.Node:
    constant = ops.constant(value)
    constant.set_friendly_name(name)
    return constant


def _attention() -> Runnable:
    """One head of attention and a feed-forward part, each behind a normalization."""
    parameter = ops.parameter([-1, 5, 8], np.float32)
    normal = ops.mvn(parameter, ops.constant([2]), True, 1e-5, "inside_sqrt")
    query, key, value = (
        ops.matmul(normal, _named(_random(8, 8) + n, f"w{n}"), False, True) for n in range(3)
    )
    scores = ops.softmax(ops.multiply(ops.matmul(query, key, False, True), np.float32(0.3)), -1)
    mixed = ops.add(parameter, ops.matmul(scores, value, False, False))
    inner = ops.gelu(
        ops.add(ops.matmul(mixed, _named(_random(8, 12), "up"), False, False), _random(12)), "erf"
    )
    result = ops.add(mixed, ops.matmul(inner, _named(_random(12, 8), "down"), False, False))
    return Runnable(ov.Model([result], [parameter]), ("x",), ("y",))


def _slopes_match(runnable: Runnable, names: Collection[str], x: AnyArray) -> None:
    """Gradients against central differences along random directions, both in float64."""
    model = DifferentiableModel(runnable, len(x), names)
    weights = [_random(*shape.shape) for shape in jax.eval_shape(model, model.values, [x])]

    def loss(constants: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        results = model(constants, [inputs])
        return sum((jnp.sum(y * w) for y, w in zip(results, weights, strict=True)), jnp.zeros(()))

    with jax.enable_x64(True):
        values = {name: jnp.asarray(value, np.float64) for name, value in model.values.items()}
        start = jnp.asarray(x, np.float64)
        evaluate = jax.jit(loss)
        slopes, slope = jax.jit(jax.grad(loss, (0, 1)))(values, start)
        rng = np.random.default_rng(2)
        for name in (*names, None):
            gradient = slope if name is None else slopes[name]
            assert gradient.dtype == np.float64
            step = 1e-5 * rng.standard_normal(gradient.shape)
            ends = [
                evaluate(values, start + sign * step)
                if name is None
                else evaluate({**values, name: values[name] + sign * step}, start)
                for sign in (1, -1)
            ]
            expected = float(jnp.sum(gradient * step))
            assert abs(float(ends[0] - ends[1]) / 2 - expected) <= 1e-6 * abs(expected), name


def test_gradients_of_a_convolutional_network() -> None:
    _slopes_match(_onnx_network(), ("w1", "b1", "w2", "w3"), _random(2, 3, 6, 6))


def test_gradients_of_a_transformer_block() -> None:
    _slopes_match(_attention(), ("w0", "w1", "w2", "up", "down"), _random(2, 5, 8))


def _agree(
    runnable: Runnable, model: DifferentiableModel, arrays: Sequence[AnyArray], tolerance: float
) -> None:
    expected = ENGINE.compile(runnable)
    wanted = expected.run(dict(zip(runnable.inputs, arrays, strict=True)))
    found = jax.jit(model)(model.values, list(arrays))
    assert len(found) == len(model.outputs)
    for name, result in zip(model.outputs, found, strict=True):
        assert result.shape == wanted[name].shape
        scale = float(np.abs(wanted[name]).max())
        np.testing.assert_allclose(np.asarray(result), wanted[name], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("source", ["bytes", "path", "fixed"])
def test_onnx(source: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx" if source == "path" else None
    runnable = _onnx_network(4 if source == "fixed" else "n", path)
    model = DifferentiableModel(runnable, 3, ["w1", "b1"])
    batch = 4 if source == "fixed" else 3
    assert model.outputs == ("y", "p")
    assert model.input_shapes == ((batch, 3, 6, 6),)
    assert set(model.values) == {"w1", "b1"}
    np.testing.assert_array_equal(model.values["w1"], _random(4, 3, 3, 3))
    assert model.values["b1"].shape == (4,)
    _agree(runnable, model, [_random(batch, 3, 6, 6)], 1e-5)


def test_openvino_model_is_not_changed() -> None:
    runnable = _attention()
    assert isinstance(runnable.model, ov.Model)
    before = [op.get_type_name() for op in runnable.model.get_ordered_ops()]
    model = DifferentiableModel(runnable, 2, ["up"])
    _agree(runnable, model, [_random(2, 5, 8)], 1e-5)
    assert [op.get_type_name() for op in runnable.model.get_ordered_ops()] == before
    assert runnable.model.inputs[0].get_partial_shape().is_dynamic


def test_constants_behind_a_chain_stay_open() -> None:
    stored = _random(6, 4).astype(np.float16)
    weight = ops.convert(_named(stored, "w"), "f32")
    weight = ops.transpose(ops.reshape(weight, ops.constant([3, 2, 4]), False), ops.constant([2, 0, 1]))
    weight = ops.reshape(weight, ops.constant([4, 6]), False)
    unused = ops.multiply(_named(_random(6), "left"), _random(6))
    parameter = ops.parameter([-1, 4], np.float32)
    result = ops.add(ops.matmul(parameter, weight, False, False), unused)
    runnable = Runnable(ov.Model([result], [parameter]), ("x",), ("y",))
    model = DifferentiableModel(runnable, 2, ["w:0"])
    assert model.values["w:0"].dtype == np.float32
    np.testing.assert_array_equal(model.values["w:0"], stored.astype(np.float32))
    x = _random(2, 4)
    _agree(runnable, model, [x], 1e-5)
    other = _random(6, 4) + 1
    as_operand = other.reshape(3, 2, 4).transpose(2, 0, 1).reshape(4, 6)
    (found,) = model({"w:0": jnp.asarray(other)}, [jnp.asarray(x)])
    np.testing.assert_allclose(found, x @ as_operand + _random(6) * _random(6), rtol=1e-5, atol=1e-5)
    slope = jax.grad(lambda w: jnp.sum(model({"w:0": w}, [jnp.asarray(x)])[0]))(jnp.asarray(other))
    back = np.repeat(x.sum(axis=0)[:, None], 6, axis=1).reshape(4, 3, 2).transpose(1, 2, 0).reshape(6, 4)
    np.testing.assert_allclose(slope, back, rtol=1e-5)


def test_shape_arithmetic_is_folded() -> None:
    parameter = ops.parameter([-1, 2, 3], np.float32)
    batch = ops.gather(ops.shape_of(parameter), ops.constant([0]), ops.constant(0))
    flat = ops.reshape(parameter, ops.concat([batch, ops.constant([6])], 0), False)
    scaled = ops.multiply(flat, ops.broadcast(_named(_random(1, 1), "s"), ops.shape_of(flat)))
    runnable = Runnable(ov.Model([scaled], [parameter]), ("x",), ("y",))
    _agree(runnable, DifferentiableModel(runnable, 3, ["s"]), [_random(3, 2, 3)], 1e-6)
    frozen = DifferentiableModel(runnable, 3, [])
    assert frozen.values == {}
    _agree(runnable, frozen, [_random(3, 2, 3)], 1e-6)


def test_values_that_folding_leaves_are_computed_once() -> None:
    parameter = ops.parameter([1, 2, 4, 4], np.float32)
    boxes = ops.prior_box_clustered(
        ops.constant([4, 4]),
        ops.constant([32, 32]),
        {"width": [8.0], "height": [9.0], "variance": [0.1], "offset": 0.5, "step": 8.0},
    )
    scaled = ops.multiply(ops.reduce_sum(parameter, ops.constant([0, 1, 2, 3]), False), boxes)
    runnable = Runnable(ov.Model([scaled], [parameter]), ("x",), ("y",))
    _agree(runnable, DifferentiableModel(runnable, 1, []), [_random(1, 2, 4, 4)], 1e-5)


def test_integer_inputs_and_outputs_that_are_inputs() -> None:
    tokens = ops.parameter([-1, 3], np.int64)
    table = ops.gather(_named(_random(7, 4), "table"), tokens, ops.constant(0))
    runnable = Runnable(ov.Model([table, tokens], [tokens]), ("t",), ("y", "same"))
    model = DifferentiableModel(runnable, 2, ["table"])
    indices = np.array([[0, 6, 2], [2, -1, 3]])
    found, same = model({"table": jnp.asarray(_random(7, 4))}, [jnp.asarray(indices)])
    np.testing.assert_array_equal(found, _random(7, 4)[indices])
    np.testing.assert_array_equal(same, indices)
    slope = jax.grad(lambda w: jnp.sum(model({"table": w}, [jnp.asarray(indices)])[0]))(
        jnp.asarray(_random(7, 4))
    )
    np.testing.assert_array_equal(slope[:, 0], [1, 0, 2, 1, 0, 0, 2])


def test_unknown_operators_are_listed_together() -> None:
    parameter = ops.parameter([-1, 4], np.float32)
    values = ops.topk(parameter, ops.constant(2), 1, "max", "value").output(0)
    result = ops.reverse_sequence(ops.asinh(values), ops.constant([1, 1]), 1, 0)
    runnable = Runnable(ov.Model([ops.cosh(result)], [parameter]), ("x",), ("y",))
    with pytest.raises(NotDifferentiable) as caught:
        DifferentiableModel(runnable, 2, [])
    assert str(caught.value) == "no derivative is known for Asinh, Cosh, ReverseSequence, TopK"
    assert isinstance(caught.value, ModelError)


def test_what_is_refused() -> None:
    with pytest.raises(KeyError, match="0 constants called 'nothing'"):
        DifferentiableModel(_onnx_network(), 2, ["w1", "nothing"])
    with pytest.raises(ModelError, match="cannot read the model: "):
        DifferentiableModel(Runnable(b"no model", ("x",), ("y",)), 2, [])
    with pytest.raises(ModelError, match="sees 1 inputs and 2 outputs where the model has 2 and 2"):
        DifferentiableModel(Runnable(_onnx_network().model, ("x", "z"), ("y", "p")), 2, [])
    parameter = ops.parameter([-1, -1, 4], np.float32)
    runnable = Runnable(ov.Model([ops.relu(parameter)], [parameter]), ("tokens",), ("y",))
    with pytest.raises(NotDifferentiable, match=r"input 'tokens' has the shape \[\?,\?,4\]: only the first"):
        DifferentiableModel(runnable, 2, [])
    parameter = ops.parameter([-1, 4], np.float32)
    rigid = ops.reshape(parameter, ops.constant([3, 4]), False)
    runnable = Runnable(ov.Model([rigid], [parameter]), ("x",), ("y",))
    with pytest.raises(NotDifferentiable, match="the model does not take batches of 2: "):
        DifferentiableModel(runnable, 2, [])
    chosen = ops.non_zero(ops.relu(parameter))
    runnable = Runnable(ov.Model([ops.relu(ops.convert(chosen, "f32"))], [parameter]), ("x",), ("y",))
    with pytest.raises(NotDifferentiable, match="no derivative is known for NonZero"):
        DifferentiableModel(runnable, 2, [])


def _trainable(model: Model) -> set[str]:
    layers = find_layers(model.graph).layers
    biases = {place.bias.constant for layer in layers for place in layer.places if place.bias is not None}
    return {layer.constant for layer in layers} | biases


def _entries(zoo: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((zoo / "zoo.json").read_text())
    return entries


ZOO = [
    "resnet8_mlperftiny_cifar10",
    "resnet20_akamaster_cifar10",
    "resnet20b_distiller_cifar10",
    "resnet32_akamaster_cifar10",
    "resnet56_akamaster_cifar10",
    "mobilenet_v1_025",
    "squeezenet1_1",
    "mobilenet_v2_100_dequant",
    pytest.param("yolox_nano", marks=pytest.mark.slow),
    "ncf_mlp_ml1m",
    "ncf_neumf_ml1m",
    "iclrec_beauty",
]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_real_networks(zoo: Path, name: str) -> None:
    loaded = load_model(zoo / _entries(zoo)[name]["model"])
    runnable = loaded.extract()
    trainable = _trainable(loaded)
    model = DifferentiableModel(runnable, 2, trainable)
    assert set(model.values) == trainable
    rng = np.random.default_rng(0)
    arrays: list[AnyArray] = []
    for info, shape in zip(loaded.inputs, model.input_shapes, strict=True):
        integral = info.dtype is not None and np.issubdtype(info.dtype, np.integer)
        arrays.append(
            rng.integers(0, 50, shape) if integral else rng.standard_normal(shape).astype(np.float32)
        )
    _agree(runnable, model, arrays, 1e-3)


@pytest.mark.zoo
def test_detector_says_what_is_missing(zoo: Path) -> None:
    runnable = load_model(zoo / _entries(zoo)["person-detection-0200-fp32"]["model"]).extract()
    with pytest.raises(NotDifferentiable, match=r"no derivative is known for DetectionOutput$"):
        DifferentiableModel(runnable, 1, [])


def test_identities_between_layers() -> None:
    constants = {"w": _random(6, 5), "v": _random(5, 4)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Identity", ["a"], ["i"]),
        helper.make_node("Tanh", ["i"], ["t"]),
        helper.make_node("Identity", ["t"], ["j"]),
        helper.make_node("MatMul", ["j", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 6))],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    runnable = Runnable(proto.SerializeToString(), ("x",), ("y",))
    _agree(runnable, DifferentiableModel(runnable, 3, ["w", "v"]), [_random(3, 6)], 1e-5)
    _slopes_match(runnable, ("w", "v"), _random(3, 6))


def test_what_a_rule_cannot_do_is_reported() -> None:
    """The largest of no elements is minus infinity in OpenVINO, and an error in JAX."""
    parameter = ops.parameter([-1, 0, 4], np.float32)
    largest = ops.reduce_max(ops.relu(parameter), ops.constant([1]), False)
    runnable = Runnable(ov.Model([largest], [parameter]), ("x",), ("y",))
    with pytest.raises(NotDifferentiable, match=r"^no derivative is known for ReduceMax \(zero-size array"):
        DifferentiableModel(runnable, 2, [])
