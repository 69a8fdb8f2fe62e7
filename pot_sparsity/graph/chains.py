"""Chains of operators between a stored constant and the operand that reads it.

A weight may pass through Identity, Convert (float16 storage), Reshape (OpenVINO's reading of a grouped
ONNX convolution), Transpose, DequantizeLinear, or OpenVINO's decompression of integers (Convert, Subtract,
Multiply). Every link here is elementwise or moves elements around, so a chain can be evaluated and
inverted; anything else blocks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.graph.graph import Graph, Node

#: Operators that move elements without changing a value.
MOVES = frozenset({"Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
#: Operators that read only a tensor's shape, so that its values may change under them.
SHAPE_READERS = frozenset({"Shape", "ShapeOf"})
_LINKS = MOVES | {"Convert", "DequantizeLinear"}


@dataclass(frozen=True)
class Link:
    """A node of a chain and the port through which it reads the tensor before it."""

    node: Node
    port: int


@dataclass(frozen=True)
class Chain:
    """From the constant tensor ``constant`` through ``links``, nearest to the constant first."""

    constant: str
    links: tuple[Link, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(link.node.name for link in self.links)

    @property
    def ops(self) -> frozenset[str]:
        """Operators on the way."""
        return frozenset(link.node.op for link in self.links)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The constant and the output of every link."""
        return (self.constant, *(link.node.output for link in self.links))


@dataclass(frozen=True)
class Blocked:
    """No chain leads to a constant: the walk back ended at this node (None: a tensor nothing produces)."""

    node: Node | None


def trace(graph: Graph, tensor: str) -> Chain | Blocked:
    """Walk back from an operand to the constant behind it."""
    links: list[Link] = []
    while not graph.is_constant(tensor):
        node = graph.producer(tensor)
        port = None if node is None else _data_port(graph, node)
        if node is None or port is None:
            return Blocked(node)
        links.append(Link(node, port))
        tensor = node.inputs[port]
    return Chain(tensor, tuple(reversed(links)))


def chain_of(graph: Graph, constant: str, names: Sequence[str]) -> Chain:
    """The chain through the named nodes; raises ValueError if they are not connected in this order."""
    links: list[Link] = []
    tensor = constant
    for name in names:
        node = graph.node(name)
        if tensor not in node.inputs:
            raise ValueError(
                f"{name!r} does not read {tensor!r}: the graph has changed, find its layers again"
            )
        links.append(Link(node, node.inputs.index(tensor)))
        tensor = node.output
    return Chain(constant, tuple(links))


def static_shape(graph: Graph, tensor: str) -> tuple[int, ...] | None:
    """Shape of a tensor if every dimension is known."""
    shape = graph.tensor(tensor).shape
    if shape is None and graph.is_constant(tensor):
        return graph.value(tensor).shape
    if shape is None or any(size is None for size in shape):
        return None
    return tuple(size for size in shape if size is not None)


def constant_value(graph: Graph, tensor: str) -> Float64 | None:
    """Value of a tensor that a chain connects to a constant, as the model computes it; None if none does."""
    chain = trace(graph, tensor)
    return None if isinstance(chain, Blocked) else evaluate(graph, chain)


def private(graph: Graph, chain: Chain) -> bool:
    """Whether nothing but the operand behind the chain sees the constant's values."""
    return all(
        tensor not in graph.outputs and len(value_readers(graph, tensor)) == 1 for tensor in chain.tensors
    )


def value_readers(graph: Graph, tensor: str) -> tuple[tuple[Node, int], ...]:
    """Consumers of a tensor except those that only read its shape."""
    return tuple((node, port) for node, port in graph.consumers(tensor) if node.op not in SHAPE_READERS)


def evaluate(graph: Graph, chain: Chain, stored: AnyArray | None = None, *, rounding: bool = True) -> Float64:
    """Value at the end of a chain, float64.

    Parameters
    ----------
    graph, chain
        Where to read operands from.
    stored
        Value to start from; default: the constant's own.
    rounding
        Round after every link to the type the model computes in, as the model does.
    """
    value = np.asarray(graph.value(chain.constant) if stored is None else stored, dtype=np.float64)
    for link in chain.links:
        value = _apply(graph, link, value)
        if rounding and link.node.op not in MOVES:
            value = _round(value, _result_dtype(graph, link.node))
    return value


def invert(graph: Graph, chain: Chain, operand: Float64) -> Float64:
    """Stored value, not yet rounded to the stored type, that makes a chain end in ``operand``.

    Where a scale is zero no stored value matters; the one that stands for zero is chosen.
    """
    value = operand
    for link in reversed(chain.links):
        value = _invert(graph, link, value)
    return value


def to_stored_type(value: Float64, dtype: np.dtype[np.generic]) -> AnyArray:
    """Round and clip to an integer type; floats are returned unchanged (the model casts and checks them)."""
    if not np.issubdtype(dtype, np.integer):
        return value
    limits = np.iinfo(cast("np.dtype[np.integer]", dtype))
    return np.clip(np.rint(value), limits.min, limits.max).astype(dtype)


def _data_port(graph: Graph, node: Node) -> int | None:
    """Port through which a chain runs on towards the constant, or None if the node blocks it."""
    if node.op in _LINKS:
        shapes = (static_shape(graph, node.inputs[0]), static_shape(graph, node.output))
        constant_rest = node.op != "DequantizeLinear" or all(
            constant_value(graph, tensor) is not None for tensor in node.inputs[1:] if tensor
        )
        return 0 if None not in shapes and constant_rest else None
    if node.op not in ("Multiply", "Subtract"):
        return None
    for port in (0, 1) if node.op == "Multiply" else (0,):
        data, other = trace(graph, node.inputs[port]), constant_value(graph, node.inputs[1 - port])
        if isinstance(data, Blocked) or other is None:
            continue
        same_shape = static_shape(graph, node.inputs[port]) == static_shape(graph, node.output)
        integers = np.issubdtype(graph.value(data.constant).dtype, np.integer)
        # A float weight times a float tensor is arithmetic of the model, except for the factor of a Gemm.
        if same_shape and (integers or (node.op == "Multiply" and other.size == 1)):
            return port
    return None


def _apply(graph: Graph, link: Link, value: Float64) -> Float64:
    node = link.node
    match node.op:
        case "Reshape" | "Squeeze" | "Unsqueeze":
            return value.reshape(_known_shape(graph, node.output))
        case "Transpose":
            return value.transpose(cast("Sequence[int]", node.attrs["perm"]))
        case "DequantizeLinear":
            scale, zero = _dequantization(graph, node, value.shape)
            return np.asarray((value - zero) * scale)
        case "Subtract":
            return np.asarray(value - _other(graph, link))
        case "Multiply":
            return np.asarray(value * _other(graph, link))
        case _:
            return value


def _invert(graph: Graph, link: Link, value: Float64) -> Float64:
    node = link.node
    match node.op:
        case "Reshape" | "Squeeze" | "Unsqueeze":
            return value.reshape(_known_shape(graph, node.inputs[link.port]))
        case "Transpose":
            return value.transpose(np.argsort(cast("Sequence[int]", node.attrs["perm"])))
        case "DequantizeLinear":
            scale, zero = _dequantization(graph, node, value.shape)
            return np.asarray(_divide(value, scale) + zero)
        case "Subtract":
            return np.asarray(value + _other(graph, link))
        case "Multiply":
            return _divide(value, _other(graph, link))
        case _:
            return value


def _divide(value: Float64, by: Float64) -> Float64:
    return np.divide(value, by, out=np.zeros_like(value), where=np.broadcast_to(by != 0, value.shape))


def _round(value: Float64, dtype: np.dtype[np.generic] | None) -> Float64:
    if dtype is None or not np.issubdtype(dtype, np.floating):
        return value
    with np.errstate(over="ignore"):
        return value.astype(dtype).astype(np.float64)


def _result_dtype(graph: Graph, node: Node) -> np.dtype[np.generic] | None:
    if node.op == "Convert":
        return np.dtype(cast("np.dtype[np.generic]", node.attrs["dtype"]))
    return graph.tensor(node.output).dtype


def _known_shape(graph: Graph, tensor: str) -> tuple[int, ...]:
    shape = static_shape(graph, tensor)
    if shape is None:
        raise ValueError(f"the shape of {tensor!r} is not known")
    return shape


def _other(graph: Graph, link: Link) -> Float64:
    return _constant_operand(graph, link.node.inputs[1 - link.port])


def _constant_operand(graph: Graph, tensor: str) -> Float64:
    value = constant_value(graph, tensor)
    if value is None:
        raise ValueError(f"{tensor!r} is not a constant")
    return value


def _dequantization(graph: Graph, node: Node, shape: tuple[int, ...]) -> tuple[Float64, Float64]:
    """Scale and zero point of a DequantizeLinear, ready to broadcast to ``shape``."""
    scale = _constant_operand(graph, node.inputs[1])
    has_zero_point = len(node.inputs) > 2 and node.inputs[2]
    zero = _constant_operand(graph, node.inputs[2]) if has_zero_point else np.zeros_like(scale)
    return _spread(scale, node, shape), _spread(zero, node, shape)


def _spread(parameter: Float64, node: Node, shape: tuple[int, ...]) -> Float64:
    axis = cast("int", node.attrs.get("axis", 1))
    block = cast("int", node.attrs.get("block_size", 0))
    if parameter.size == 1:
        return parameter.reshape(())
    axis %= len(shape)
    if block:
        repeated = np.repeat(parameter, block, axis=axis)
        return repeated[tuple(slice(size) for size in shape)]
    aligned = [1] * len(shape)
    aligned[axis] = shape[axis]
    return parameter.reshape(aligned)
