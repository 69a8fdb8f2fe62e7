"""Small networks and data for the tests of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from openvino._offline_transformations import apply_moc_transformations

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.data.loading import load_dataset
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.reporting import input_specs

CLASSES = 5
Array: TypeAlias = NDArray[Any]
#: Settings that make a run of a small network a matter of tenths of a second.
QUICK: dict[str, Any] = {"quantization": {"enabled": False}, "allocation": {"refine": "never"}}


def normal(seed: int, *shape: int, scale: float = 1.0) -> Float32:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def node(op: str, inputs: Sequence[str], name: str, **attrs: Any) -> onnx.NodeProto:
    """A node called like its only output."""
    return helper.make_node(op, list(inputs), [name], name=name, **attrs)


def proto(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, AnyArray],
    shape: Sequence[int | str],
    outputs: Sequence[str] = ("y",),
) -> onnx.ModelProto:
    """A model with the input ``x`` of that shape."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def conv_net(batch: int | str = "n") -> onnx.ModelProto:
    """A branch of two convolutions on one tensor, BatchNorm, a residual add, a depthwise layer and a head.

    The head's bias is such that every class is the highest now and then.
    """
    constants = {
        "w1": normal(1, 8, 3, 3, 3, scale=0.3),
        "b1": normal(2, 8, scale=0.1),
        "w2": normal(3, 8, 8, 1, 1, scale=0.4),
        "w3": normal(4, 8, 8, 3, 3, scale=0.2),
        "gamma": 1 + normal(5, 8, scale=0.1),
        "beta": normal(6, 8, scale=0.1),
        "mean": normal(7, 8, scale=0.1),
        "var": np.abs(1 + normal(8, 8, scale=0.2)),
        "w4": normal(9, 8, 1, 3, 3, scale=0.4),
        "w5": normal(10, CLASSES, 8, scale=0.8),
        "b5": normal(11, CLASSES, scale=0.1),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], "conv1", pads=[1, 1, 1, 1]),
        node("Relu", ["conv1"], "relu1"),
        node("Conv", ["relu1", "w2"], "branch1"),
        node("Conv", ["relu1", "w3"], "branch2", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["branch2", "gamma", "beta", "mean", "var"], "norm"),
        node("Add", ["branch1", "norm"], "sum"),
        node("Add", ["sum", "relu1"], "residual"),
        node("Relu", ["residual"], "relu2"),
        node("Conv", ["relu2", "w4"], "depthwise", group=8, strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["depthwise"], "relu3"),
        node("GlobalAveragePool", ["relu3"], "pool"),
        node("Flatten", ["pool"], "flat"),
        node("Gemm", ["flat", "w5", "b5"], "y", transB=1),
    ]
    model = proto(nodes, constants, [batch, 3, 8, 8])
    free = proto(nodes, constants, ["n", 3, 8, 8])
    bias = next(value for value in model.graph.initializer if value.name == "b5")
    centred = constants["b5"] - run_onnx(free, images(64, 50)).mean(axis=0)
    bias.CopyFrom(numpy_helper.from_array(centred.astype(np.float32), "b5"))
    return model


def plain_net() -> onnx.ModelProto:
    """Convolution with bias, ReLU, linear head with bias: nothing to fuse and no bias to add."""
    constants = {
        "w1": normal(21, 6, 3, 3, 3, scale=0.3),
        "b1": normal(22, 6, scale=0.1),
        "w2": normal(23, 6 * 36, CLASSES, scale=0.2),
        "b2": normal(24, CLASSES, scale=0.1),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], "conv1"),
        node("Relu", ["conv1"], "relu1"),
        node("Flatten", ["relu1"], "flat"),
        node("Gemm", ["flat", "w2", "b2"], "y"),
    ]
    return proto(nodes, constants, ["n", 3, 8, 8])


def shared_net() -> onnx.ModelProto:
    """One matrix used twice, between two that are used once."""
    constants = {
        "first": normal(31, 7, 6, scale=0.5),
        "twice": normal(32, 6, 6, scale=0.5),
        "last": normal(33, 6, 4, scale=0.5),
        "bias": normal(34, 4, scale=0.1),
    }
    nodes = [
        node("MatMul", ["x", "first"], "m0"),
        node("Relu", ["m0"], "r0"),
        node("MatMul", ["r0", "twice"], "m1"),
        node("Relu", ["m1"], "r1"),
        node("MatMul", ["r1", "twice"], "m2"),
        node("Relu", ["m2"], "r2"),
        node("Gemm", ["r2", "last", "bias"], "y"),
    ]
    return proto(nodes, constants, ["n", 7])


def two_inputs() -> onnx.ModelProto:
    """Two inputs that meet in a sum."""
    constants = {"w": normal(41, 6, 5), "v": normal(42, 4, 5), "u": normal(43, 5, 3)}
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("MatMul", ["z", "v"], "b"),
        node("Add", ["a", "b"], "sum"),
        node("Tanh", ["sum"], "tanh"),
        node("MatMul", ["tanh", "u"], "y"),
    ]
    model = proto(nodes, constants, ["n", 6])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4]))
    return model


def transposed() -> onnx.ModelProto:
    """Down and up again; the output is a picture, not class scores."""
    constants = {
        "w": normal(44, 6, 3, 3, 3, scale=0.3),
        "t": normal(45, 6, 4, 3, 3, scale=0.3),
        "b": normal(46, 4),
        "v": normal(47, 8, 4, 3, 3, scale=0.3),
    }
    nodes = [
        node("Conv", ["x", "w"], "a", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], "r"),
        node("ConvTranspose", ["r", "t", "b"], "d", strides=[2, 2], pads=[1] * 4, output_padding=[1, 1]),
        node("Relu", ["d"], "e"),
        node("Conv", ["e", "v"], "y"),
    ]
    return proto(nodes, constants, ["n", 3, 8, 8])


def one_dimension() -> onnx.ModelProto:
    """1-D convolutions, padded automatically, grouped and dilated."""
    constants = {"w": normal(48, 6, 3, 3), "v": normal(49, 8, 3, 3)}
    nodes = [
        node("Conv", ["x", "w"], "a", auto_pad="SAME_UPPER"),
        node("Relu", ["a"], "r"),
        node("Conv", ["r", "v"], "d", group=2, dilations=[2]),
        node("GlobalAveragePool", ["d"], "p"),
        node("Flatten", ["p"], "y"),
    ]
    return proto(nodes, constants, ["n", 3, 12])


def images(count: int, seed: int = 0) -> Float32:
    """Ready samples of the networks that take images, smooth so that inputs correlate."""
    noise = normal(100 + seed, count, 3, 8, 8)
    return np.asarray(noise + np.roll(noise, 1, axis=2) + np.roll(noise, 1, axis=3), np.float32)


def dataset(model: Model, arrays: AnyArray) -> Dataset:
    return load_dataset({model.input_names[0]: arrays}, input_specs(model))


def labelled(path: Path, model: onnx.ModelProto, count: int, seed: int = 7) -> Path:
    """Samples whose labels are what the dense model says, so that it scores 100 %."""
    arrays = images(count, seed)
    np.savez(path, x=arrays, labels=run_onnx(model, arrays).argmax(axis=1))
    return path


def run_onnx(model: onnx.ModelProto, x: AnyArray) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def run_openvino(model: onnx.ModelProto | ov.Model | Path, x: AnyArray) -> Array:
    core = ov.Core()
    if isinstance(model, onnx.ModelProto):
        model = core.read_model(model.SerializeToString())
    elif isinstance(model, Path):
        model = core.read_model(model)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([x])[0])


def to_ir(model: onnx.ModelProto, path: Path, *, half: bool = False) -> Path:
    """The model as IR, with its weights in float16 if asked for."""
    converted = ov.Core().read_model(model.SerializeToString())
    apply_moc_transformations(converted, cf=False)
    ov.save_model(converted, path, compress_to_fp16=half)
    return path
