"""Fake quantizers and integer weights in OpenVINO models, done in place like :mod:`openvino_edits`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.graph.openvino_nodes import NamedModel, make_constant


def insert_quantizer(
    named: NamedModel, tensor: str, readers: Sequence[tuple[str, int]], grid: ActivationGrid
) -> str:
    """Put a FakeQuantize between a tensor and its readers (node, own port of the operator)."""
    base = f"{tensor.rpartition(':')[0]}.to_{grid.levels}_levels"
    ends = [
        _constant(named, np.array(value, np.float32), f"{base}.{word}")
        for word, value in (("low", grid.low), ("high", grid.high))
    ]
    node = opset13.fake_quantize(named.output(tensor), *ends, *ends, grid.levels)
    _register(named, node, base)
    for reader, port in readers:
        named.node(reader).input(port).replace_source_output(node.output(0))
    return named.tensor(node.output(0))


def store_integers(named: NamedModel, node: str, port: int, integers: AnyArray, scale: AnyArray) -> str:
    """Connect int8 weights through Convert and Multiply, as OpenVINO's own compressed weights are stored."""
    operand = named.node(node).input_value(port)
    base = f"{operand.get_node().get_friendly_name()}.int8"
    constant = _constant(named, np.ascontiguousarray(integers, np.int8), base)
    factor = _constant(named, np.ascontiguousarray(scale, np.float32), f"{base}.scale")
    floating = opset13.convert(constant, "f32")
    _register(named, floating, f"{base}.convert")
    weight = opset13.multiply(floating, factor)
    _register(named, weight, f"{base}.multiply")
    named.node(node).input(port).replace_source_output(weight.output(0))
    return named.tensor(constant.output(0))


def _constant(named: NamedModel, value: AnyArray, wish: str) -> ov.Node:
    name = named.free_name(wish)
    made = make_constant(value, name)
    named.register(made, name)
    return made


def _register(named: NamedModel, node: ov.Node, wish: str) -> None:
    name = named.free_name(wish)
    node.set_friendly_name(name)
    named.register(node, name)
