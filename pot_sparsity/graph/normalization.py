"""Scale and shift per channel behind a normalization that runs on the data itself: LayerNorm, RMSNorm.

Unlike BatchNorm it cannot be fused into a layer, but its own constants can take up a correction of the output's
statistics. Found are ONNX's LayerNormalization, and a Multiply by a constant per channel, with or without an Add behind
it, of what OpenVINO's MVN or a division by a root of a mean yields.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.graph.chains import (
    Blocked,
    chain_of,
    evaluate,
    invert,
    private,
    static_shape,
    to_stored_type,
    trace,
    value_readers,
)
from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.model import Model

#: Operators that normalize by themselves.
_NORMALIZERS = frozenset({"MVN", "MeanVarianceNormalization"})
#: What may stand between a mean and the deviation that something is divided by.
_ROOTS = frozenset({"Sqrt", "Pow", "Power"})
_ON_THE_WAY = _ROOTS | {"Add", "Reciprocal", "Divide", "Convert", "Identity", "Max", "Maximum", "Clip"}


@dataclass(frozen=True)
class Operand:
    """A constant with one value per channel that nothing else reads, and the chain it is read through."""

    constant: str
    chain: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Normalization:
    """``output = scale * normalized + shift``, with scale and shift per channel.

    Attributes
    ----------
    name
        The node that applies the scale; unique.
    input
        Tensor name of the data that node reads.
    output
        Tensor name behind the shift.
    channel_axis
        Axis of ``output`` that holds the channels, counted from the end.
    channels
        How many there are.
    scale, shift
        The constants; ``shift`` is None where there is none that may be written.
    """

    name: str
    input: str
    output: str
    channel_axis: int
    channels: int
    scale: Operand
    shift: Operand | None


def find_normalizations(graph: Graph) -> tuple[Normalization, ...]:
    """All normalizations whose scale may be written, in topological order."""
    found = (
        _of_operator(graph, node) if node.op == "LayerNormalization" else _of_product(graph, node)
        for node in graph
        if node.op in ("LayerNormalization", "Multiply")
    )
    return tuple(item for item in found if item is not None)


def read_normalization(model: Model, item: Normalization) -> tuple[Float64, Float64 | None]:
    """Scale and shift ``[channels]``, float64; None where there is no shift."""
    scale = _read(model, item.scale)
    return scale, None if item.shift is None else _read(model, item.shift)


def write_normalization(model: Model, item: Normalization, scale: Float64, shift: Float64 | None) -> None:
    """Write scale and shift ``[channels]``; a shift is only written where there is one.

    Raises
    ------
    ValueError
        If a size is wrong or a value overflows the stored type.
    """
    _write(model, item.scale, scale)
    if item.shift is not None and shift is not None:
        _write(model, item.shift, shift)


def _of_operator(graph: Graph, node: Node) -> Normalization | None:
    scale = _operand(graph, node.inputs[1])
    if scale is None:
        return None
    axis, channels = _channels(scale)
    shift = _operand(graph, node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if shift is not None and _channels(shift) != (axis, channels):
        shift = None
    return Normalization(node.name, node.inputs[0], node.output, axis, channels, scale, shift)


def _of_product(graph: Graph, node: Node) -> Normalization | None:
    for port in (0, 1):
        data = node.inputs[1 - port]
        scale = _operand(graph, node.inputs[port])
        if scale is None or not _normalized(graph, data):
            continue
        axis, channels = _channels(scale)
        shape = graph.tensor(data).shape
        if shape is not None and (len(shape) < -axis or shape[axis] not in (channels, None)):
            continue
        output, shift = _shift_behind(graph, node, (axis, channels))
        return Normalization(node.name, data, output, axis, channels, scale, shift)
    return None


def _shift_behind(graph: Graph, node: Node, channels: tuple[int, int]) -> tuple[str, Operand | None]:
    """Output and constant of the Add that alone reads ``node``; its own output and None where there is none."""
    readers = value_readers(graph, node.output)
    if len(readers) == 1 and readers[0][0].op == "Add" and node.output not in graph.outputs:
        after, port = readers[0]
        shift = _operand(graph, after.inputs[1 - port])
        if shift is not None and _channels(shift) == channels:
            return after.output, shift
    return node.output, None


def _operand(graph: Graph, tensor: str) -> Operand | None:
    """A floating-point constant along one axis that nothing else reads."""
    chain, shape = trace(graph, tensor), static_shape(graph, tensor)
    if isinstance(chain, Blocked) or shape is None or sum(size > 1 for size in shape) != 1:
        return None
    if not np.issubdtype(graph.value(chain.constant).dtype, np.floating) or not private(graph, chain):
        return None
    return Operand(chain.constant, chain.names, shape)


def _channels(operand: Operand) -> tuple[int, int]:
    """Axis, counted from the end, and number of the channels."""
    size = max(operand.shape)
    return operand.shape.index(size) - len(operand.shape), size


def _normalized(graph: Graph, tensor: str) -> bool:
    node = graph.producer(tensor)
    while node is not None and node.op in ("Identity", "Convert"):
        node = graph.producer(node.inputs[0])
    if node is None or node.op in _NORMALIZERS:
        return node is not None
    if node.op == "Divide":
        return _deviation(graph, node.inputs[1])
    return node.op == "Multiply" and any(_deviation(graph, operand) for operand in node.inputs)


def _deviation(graph: Graph, tensor: str, rooted: bool = False) -> bool:
    """Whether a tensor is a root of a mean, or one over it, up to an epsilon."""
    node = graph.producer(tensor)
    if node is None or node.op not in _ON_THE_WAY:
        return node is not None and node.op == "ReduceMean" and rooted
    return any(_deviation(graph, operand, rooted or node.op in _ROOTS) for operand in node.inputs if operand)


def _read(model: Model, operand: Operand) -> Float64:
    graph = model.graph
    return evaluate(graph, chain_of(graph, operand.constant, operand.chain)).ravel()


def _write(model: Model, operand: Operand, values: Float64) -> None:
    graph = model.graph
    chain = chain_of(graph, operand.constant, operand.chain)
    stored = invert(graph, chain, values.reshape(operand.shape))
    model.set_constant(operand.constant, to_stored_type(stored, graph.value(operand.constant).dtype))
