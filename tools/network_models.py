"""Networks of random weights for the benchmarks, and synthetic samples for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float32]

#: Where the onnx package keeps the architecture of ResNet-50; its weights are ConstantOfShape nodes.
RESNET50 = Path("backend", "test", "data", "light", "light_resnet50.onnx")
_IMAGE = 224
_IR_VERSION = 8
#: What ends a residual branch is this much smaller, or 16 blocks would multiply the variance by 65,536.
_RESIDUAL = 0.25


def he_scaled(random: np.random.Generator, shape: Sequence[int], inputs: int) -> Array:
    """Normal weights of variance ``2 / inputs``."""
    values = random.standard_normal(tuple(shape), dtype=np.float32)
    return np.asarray(values * np.float32(np.sqrt(2.0 / inputs)))


def resnet50(random: np.random.Generator, *, narrow: int = 1) -> onnx.ModelProto:
    """ResNet-50 of the onnx package with random weights and identity BatchNorms, for any batch of 224x224.

    Parameters
    ----------
    random
        Where weights come from.
    narrow
        Divide all widths, but for the 3 input channels and the 1,000 classes, by this.
    """
    model = onnx.load(str(Path(onnx.__file__).parent / RESNET50))
    graph = model.graph
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes = {name: value.shape for name, value in given.items()}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shapes[node.output[0]] = tuple(int(size) for size in given[node.input[0]])
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    values: dict[str, NDArray[Any]] = {}
    for node in nodes:
        values |= _parameters(node, shapes, random, narrow)
    data = next(value for value in graph.input if value.name == nodes[0].input[0])
    output = graph.output[0].name
    built = helper.make_graph(
        nodes,
        "resnet50",
        [helper.make_tensor_value_info(data.name, TensorProto.FLOAT, ["N", 3, _IMAGE, _IMAGE])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", shapes[nodes[-2].input[1]][0]])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(built, opset_imports=list(model.opset_import), ir_version=_IR_VERSION)


def _parameters(
    node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], random: np.random.Generator, narrow: int
) -> dict[str, NDArray[Any]]:
    """New constants of one node."""
    if node.op_type == "Conv":
        outputs, inputs, *kernel = shapes[node.input[1]]
        inputs = inputs if inputs == 3 else inputs // narrow
        weight = he_scaled(random, (outputs // narrow, inputs, *kernel), inputs * int(np.prod(kernel)))
        return {node.input[1]: weight * np.float32(_RESIDUAL if "branch2c" in node.input[1] else 1.0)}
    if node.op_type == "BatchNormalization":
        channels = shapes[node.input[1]][0] // narrow
        return {
            name: np.full(channels, value, np.float32)
            for name, value in zip(node.input[1:], (1, 0, 0, 1), strict=True)
        }
    if node.op_type == "Gemm":
        classes, inputs = shapes[node.input[1]]
        weight = he_scaled(random, (classes, inputs // narrow), inputs // narrow)
        return {node.input[1]: weight, node.input[2]: np.zeros(classes, np.float32)}
    if node.op_type == "Reshape":
        return {node.input[1]: np.array([0, -1], np.int64)}
    return {}


@dataclass
class _Builder:
    """Nodes and constants of the encoder."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def linear(self, name: str, source: str, inputs: int, outputs: int, scale: float = 1.0) -> str:
        weight = he_scaled(self.random, (inputs, outputs), inputs) * np.float32(scale)
        product = self.node("MatMul", name, source, self.constant(f"{name}_weight", weight))
        bias = self.constant(f"{name}_bias", np.zeros(outputs, np.float32))
        return self.node("Add", f"{name}_add", product, bias)

    def norm(self, name: str, source: str, width: int) -> str:
        gain = self.constant(f"{name}_gain", np.ones(width, np.float32))
        shift = self.constant(f"{name}_shift", np.zeros(width, np.float32))
        return self.node("LayerNormalization", name, source, gain, shift, axis=-1)

    def gelu(self, name: str, source: str) -> str:
        root = self.constant(f"{name}_root", np.array(np.sqrt(2.0), np.float32))
        one = self.constant(f"{name}_one", np.array(1.0, np.float32))
        half = self.constant(f"{name}_half", np.array(0.5, np.float32))
        erf = self.node("Erf", f"{name}_erf", self.node("Div", f"{name}_div", source, root))
        gate = self.node("Mul", f"{name}_mul", self.node("Add", f"{name}_plus", erf, one), half)
        return self.node("Mul", name, source, gate)

    def attention(self, name: str, source: str, width: int, heads: int) -> str:
        split = self.constant(f"{name}_split", np.array([0, 0, heads, width // heads], np.int64))
        joined = self.constant(f"{name}_joined", np.array([0, 0, width], np.int64))
        parts = {}
        for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            flat = self.linear(f"{name}_{part}", source, width, width)
            apart = self.node("Reshape", f"{name}_{part}_split", flat, split)
            parts[part] = self.node("Transpose", f"{name}_{part}_heads", apart, perm=order)
        scale = self.constant(f"{name}_scale", np.array((width // heads) ** -0.5, np.float32))
        score = self.node("MatMul", f"{name}_score", parts["query"], parts["key"])
        score = self.node("Mul", f"{name}_scaled", score, scale)
        share = self.node("Softmax", f"{name}_softmax", score, axis=-1)
        mixed = self.node("MatMul", f"{name}_mixed", share, parts["value"])
        mixed = self.node("Transpose", f"{name}_back", mixed, perm=[0, 2, 1, 3])
        mixed = self.node("Reshape", f"{name}_join", mixed, joined)
        return self.linear(f"{name}_output", mixed, width, width, _RESIDUAL)


def encoder(
    random: np.random.Generator, *, blocks: int, width: int, hidden: int, sequence: int, heads: int
) -> onnx.ModelProto:
    """Transformer encoder with the norm first; reads embeddings ``[N, sequence, width]``.

    Raises
    ------
    ValueError
        ``heads`` does not divide ``width``.
    """
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    to = _Builder(random)
    value = "tokens"
    for index in range(blocks):
        name = f"block{index}"
        normed = to.norm(f"{name}_norm1", value, width)
        value = to.node("Add", f"{name}_sum1", value, to.attention(f"{name}_attention", normed, width, heads))
        normed = to.norm(f"{name}_norm2", value, width)
        inner = to.gelu(f"{name}_gelu", to.linear(f"{name}_mlp1", normed, width, hidden))
        outer = to.linear(f"{name}_mlp2", inner, hidden, width, _RESIDUAL)
        value = to.node("Add", f"{name}_sum2", value, outer)
    value = to.norm("norm", value, width)
    shape: list[str | int | None] = ["N", sequence, width]
    graph = helper.make_graph(
        to.nodes,
        "encoder",
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        to.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=_IR_VERSION)


def synthetic_images(random: np.random.Generator, count: int, size: int = _IMAGE) -> Array:
    """Images ``[count, 3, size, size]`` of unit variance: noise at several scales, as pictures have."""
    image = np.zeros((count, 3, size, size), np.float32)
    for scale in (1, 4, 16, 56):
        cells = -(-size // scale)
        coarse = random.standard_normal((count, 3, cells, cells), dtype=np.float32)
        fine = coarse.repeat(scale, axis=2).repeat(scale, axis=3)[:, :, :size, :size]
        image += fine * np.float32(scale**0.25)
    return np.asarray(image / image.std())


def synthetic_tokens(random: np.random.Generator, count: int, sequence: int, width: int) -> Array:
    """Embeddings ``[count, sequence, width]`` of unit variance with a decaying spectrum."""
    spectrum = (1.0 + np.arange(width)) ** -0.6
    mixing = (random.standard_normal((width, width)) * spectrum[:, None]).astype(np.float32)
    tokens = random.standard_normal((count, sequence, width), dtype=np.float32) @ mixing
    return np.asarray(tokens / tokens.std())
