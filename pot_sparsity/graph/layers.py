"""Layers: compressible weights with their places in the graph, seen as matrices ``[groups, rows, cols]``."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from pot_sparsity.algorithms.arrays import ConvGeometry, Geometry, MatMulGeometry
from pot_sparsity.graph.graph import Graph, Shape

LayerKind = Literal["convolution", "convolution_transpose", "matmul"]
#: Order of the operand's axes: g = group, o = output channel, i = input channel, then the kernel's axes.
Layout = Literal["oi", "io", "goi", "gio"]


@dataclass(frozen=True)
class Bias:
    """A constant that is added to a layer's output per channel.

    Attributes
    ----------
    constant
        Tensor name of the constant (no other node reads it).
    shape
        Shape of the operand that is added (after the chain).
    scale
        Factor the model applies to the operand (Gemm's beta; -1 for a Subtract).
    chain
        Names of the nodes between the constant and the operand, nearest to the constant first.
    """

    constant: str
    shape: tuple[int, ...]
    scale: float = 1.0
    chain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """One operator that multiplies a layer's weight with an activation.

    Attributes
    ----------
    node
        Name of the Convolution / ConvolutionTranspose / MatMul node.
    input
        Tensor name of the activation it reads.
    output
        Tensor name after the bias (the node's own output where there is no separate bias operator).
    geometry
        How the activation is unfolded.
    bias
        The bias, if it has one that may be rewritten.
    channel_axis
        Axis of ``output`` that holds the output channels: 1 for convolutions, -1 or -2 for MatMul.
    """

    node: str
    input: str
    output: str
    geometry: Geometry
    bias: Bias | None
    channel_axis: int


@dataclass(frozen=True)
class Layer:
    """A weight constant and everything needed to read, view and write it.

    Attributes
    ----------
    name
        Name of the first place's node; unique.
    kind
        What the operator is.
    constant
        Tensor name of the stored constant.
    chain
        Names of the nodes between the constant and the operand (Identity, Convert, Reshape, Transpose,
        DequantizeLinear...), nearest to the constant first.
    places
        One entry per operator that uses the weight; more than one means the weight is shared.
    shape
        Shape of the operand (after the chain).
    groups, rows, cols
        Size of the matrix view: rows = output channels per group, cols = input channels per group x kernel.
    layout
        Order of the operand's axes; for a MatMul ``i`` is the contracted axis.
    scale
        Factor between the operand and what multiplies the activation (Gemm's alpha).
    """

    name: str
    kind: LayerKind
    constant: str
    chain: tuple[str, ...]
    places: tuple[Place, ...]
    shape: tuple[int, ...]
    groups: int
    rows: int
    cols: int
    layout: Layout
    scale: float = 1.0

    @property
    def shared(self) -> bool:
        """Whether more than one operator uses the weight."""
        return len(self.places) > 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.groups * self.rows * self.cols

    @property
    def channels(self) -> int:
        """Number of output channels, ``groups * rows``."""
        return self.groups * self.rows


def pattern_stride(layer: Layer) -> int:
    """Columns between neighbours in a pattern's group, which runs over input channels: the kernel's area."""
    geometry = layer.places[0].geometry
    return prod(geometry.kernel) if isinstance(geometry, ConvGeometry) else 1


def flops(layer: Layer, graph: Graph) -> int | None:
    """Floating point operations (2 per multiply-accumulate) of a layer for one sample, over all its places.

    Axis 0 of an activation counts as samples: a dynamic one as a single sample, a static one is divided by
    the first dimension of the model's first input. None if another dimension that matters is not known.
    """
    batch = _batch(graph)
    total = 0
    for place in layer.places:
        positions = _positions(graph, place, batch)
        if positions is None:
            return None
        total += 2 * layer.size * positions
    return total


def _batch(graph: Graph) -> int:
    for name in graph.inputs:
        shape = graph.tensor(name).shape
        if shape:
            return shape[0] or 1
    return 1


def _positions(graph: Graph, place: Place, batch: int) -> int | None:
    """How often the whole weight is applied to compute one sample."""
    if isinstance(place.geometry, ConvGeometry):
        # A transposed convolution applies its weight once per input position.
        shape = graph.tensor(
            place.input if place.geometry.transposed else graph.node(place.node).output
        ).shape
        return None if shape is None else _static_product(shape[2:])
    shape = graph.tensor(place.input).shape
    return None if not shape else _matmul_positions(shape, place.geometry, batch)


def _matmul_positions(shape: Shape, geometry: MatMulGeometry, batch: int) -> int | None:
    used = {geometry.feature_axis % len(shape)} | ({len(shape) - 3} if geometry.groups > 1 else set())
    sizes = [size for axis, size in enumerate(shape) if axis not in used]
    if 0 in used or not sizes:
        return _static_product(tuple(sizes))
    first = 1 if sizes[0] is None else sizes[0]
    product = _static_product((first, *sizes[1:]))
    if product is None or sizes[0] is None or product % batch:
        return product
    return product // batch


def _static_product(sizes: Shape) -> int | None:
    known = [size for size in sizes if size is not None]
    return prod(known) if len(known) == len(sizes) else None
