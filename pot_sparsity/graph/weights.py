"""Reading and writing layers as matrices ``[groups, rows, cols]`` in float64, whatever the model stores.

Columns are ordered (input channel within the group, kernel position in C order). For a transposed convolution
the row is the output channel and the column ``(i, k)`` holds ``weight[i, o, k]``, kernel not flipped.
"""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.graph.chains import Chain, chain_of, evaluate, invert, to_stored_type
from pot_sparsity.graph.layers import Bias, Layer, Place
from pot_sparsity.graph.model import Model


def read_weight(model: Model, layer: Layer) -> Float64:
    """Weight the layer multiplies its input with, float64 ``[groups, rows, cols]``, Gemm's alpha included."""
    graph = model.graph
    return to_matrix(layer, evaluate(graph, chain_of(graph, layer.constant, layer.chain))) * layer.scale


def write_weight(model: Model, layer: Layer, matrix: Float64) -> Float64:
    """Write a weight matrix; returns it as the model will now use it, after the cast to the stored type.

    Integer storage behind a scale is rounded to its grid and clipped to the type's range. Exact zeros stay
    exact zeros, and a matrix just read is written back bit for bit (up to the last bit where a float weight
    passes a Multiply by a scalar that is no power of two).

    Raises
    ------
    ValueError
        If the shape is wrong or a value overflows the stored type.
    """
    if matrix.shape != (layer.groups, layer.rows, layer.cols):
        expected = (layer.groups, layer.rows, layer.cols)
        raise ValueError(f"the weight of layer {layer.name!r} is {expected}, got {matrix.shape}")
    graph = model.graph
    chain = chain_of(graph, layer.constant, layer.chain)
    return to_matrix(layer, _write(model, chain, from_matrix(layer, matrix / layer.scale))) * layer.scale


def count_zeros(model: Model, layer: Layer) -> int:
    """Number of weights that are exactly zero in the model, after the cast to its stored type."""
    return layer.size - int(np.count_nonzero(read_weight(model, layer)))


def read_bias(model: Model, layer: Layer, place: Place) -> Float64 | None:
    """What is added to the output channels at one place, float64 ``[groups, rows]``; None without a bias."""
    if place.bias is None:
        return None
    graph = model.graph
    operand = evaluate(graph, chain_of(graph, place.bias.constant, place.bias.chain))
    return operand.reshape(layer.groups, layer.rows) * place.bias.scale


def write_bias(model: Model, layer: Layer, place: Place, bias: Float64) -> Float64:
    """Write the bias of one place ``[groups, rows]``; returns it as stored.

    Raises
    ------
    ValueError
        If the place has no bias, the shape is wrong or a value overflows the stored type.
    """
    target: Bias | None = place.bias
    if target is None:
        raise ValueError(f"{place.node!r} has no bias that may be written: add one first")
    if bias.shape != (layer.groups, layer.rows):
        raise ValueError(f"{place.node!r} has a bias {(layer.groups, layer.rows)}, got {bias.shape}")
    graph = model.graph
    operand = (bias / target.scale).reshape(target.shape)
    stored = _write(model, chain_of(graph, target.constant, target.chain), operand)
    return stored.reshape(layer.groups, layer.rows) * target.scale


def to_matrix(layer: Layer, operand: Float64) -> Float64:
    """View an operand in the model's axis order as ``[groups, rows, cols]``."""
    if layer.layout in ("oi", "goi"):
        return operand.reshape(layer.groups, layer.rows, layer.cols)
    area = operand.size // (layer.groups * layer.rows * _inputs(layer))
    stacked = operand.reshape(layer.groups, _inputs(layer), layer.rows, area)
    return stacked.transpose(0, 2, 1, 3).reshape(layer.groups, layer.rows, layer.cols)


def from_matrix(layer: Layer, matrix: Float64) -> Float64:
    """Inverse of :func:`to_matrix`: the operand in the model's own axis order and shape."""
    if layer.layout in ("oi", "goi"):
        return matrix.reshape(layer.shape)
    stacked = matrix.reshape(layer.groups, layer.rows, _inputs(layer), layer.cols // _inputs(layer))
    return stacked.transpose(0, 2, 1, 3).reshape(layer.shape)


def _inputs(layer: Layer) -> int:
    """Input channels per group, read off the operand's shape (only called for input-first layouts)."""
    if layer.kind == "matmul":
        return layer.cols
    return layer.shape[0] // layer.groups if layer.layout == "io" else layer.shape[1]


def _write(model: Model, chain: Chain, operand: Float64) -> Float64:
    graph = model.graph
    stored = to_stored_type(invert(graph, chain, operand), graph.value(chain.constant).dtype)
    return evaluate(graph, chain, model.set_constant(chain.constant, stored))
