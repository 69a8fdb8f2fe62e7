"""Layers with few-bit inputs and integer weights: where the quantizers go, and how a weight is stored for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import from_matrix, read_weight

#: Relative difference between a weight and what its integers stand for, at most: a few roundings of float32.
_ROUNDING = 1e-5


def quantize_inputs(
    model: Model, layers: Sequence[Layer], grids: Mapping[str, Mapping[str, ActivationGrid]]
) -> None:
    """Round what layers read, in place; layers that read one tensor on one grid share a quantizer.

    Parameters
    ----------
    model
        Edited.
    layers
        The layers, as they are found in this model.
    grids
        By layer name, then by the tensor that a place of the layer reads.
    """
    graph = model.graph
    readers: dict[tuple[str, ActivationGrid], list[tuple[str, int]]] = {}
    for layer in layers:
        for place in layer.places:
            grid = grids[layer.name][place.input]
            port = graph.node(place.node).inputs.index(place.input)
            readers.setdefault((place.input, grid), []).append((place.node, port))
    for (tensor, grid), where in readers.items():
        model.insert_quantizer(tensor, where, grid)


def store_integer_weights(
    model: Model, weights: Mapping[str, Float64], scales: Mapping[str, Float64]
) -> list[str]:
    """Store weights that lie on a grid as int8, in place; returns the layers that keep their floats.

    These are shared weights, stacks of matrices and grouped transposed convolutions in ONNX, which have no single
    axis of scales.

    Parameters
    ----------
    model
        Edited.
    weights, scales
        By layer name, ``[groups, rows, cols]`` and the distance of neighbouring values of each row
        ``[groups, rows]``.

    Raises
    ------
    PotSparsityError
        A weight is not on its grid, or the model did not store it exactly.
    """
    left = []
    graph = model.graph
    todo = []
    for layer in find_layers(graph).layers:
        if layer.name not in scales:
            continue
        place = layer.places[0]
        port = 1 - graph.node(place.node).inputs.index(place.input)
        scale, weight = scales[layer.name], weights[layer.name]
        integers = np.rint(weight / scale[..., None])
        _check(layer, weight, integers * scale[..., None])
        if np.abs(integers).max(initial=0.0) > np.iinfo(np.int8).max + 1:
            raise PotSparsityError(f"layer {layer.name!r}: its integers do not fit into 8 bits")
        full = from_matrix(layer, np.broadcast_to(scale[..., None] / layer.scale, weight.shape).copy())
        axes = [axis for axis in range(full.ndim) if not _constant_along(full, axis)]
        if layer.shared or (model.format == "onnx" and len(axes) > 1):
            left.append(layer.name)
            continue
        kept = tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(full.ndim))
        operand = from_matrix(layer, integers).astype(np.int8)
        todo.append((layer, port, operand, full[kept].astype(np.float32)))
    for layer, port, operand, factor in todo:
        model.store_integers(layer.name, port, operand, factor)
    stored = {layer.name: layer for layer in find_layers(model.graph).layers}
    for layer, _, _, _ in todo:
        if layer.name not in stored:
            raise PotSparsityError(f"layer {layer.name!r}: its integer weight cannot be read back")
        _check(layer, weights[layer.name], read_weight(model, stored[layer.name]))
    return left


def _constant_along(full: Float64, axis: int) -> bool:
    return bool((full == full.take([0], axis=axis)).all())


def _check(layer: Layer, wanted: Float64, found: Float64) -> None:
    """PotSparsityError unless two weights are the same up to rounding, zeros exactly."""
    close = np.allclose(found, wanted, rtol=_ROUNDING, atol=0.0)
    if not (close and ((found == 0.0) == (wanted == 0.0)).all()):
        raise PotSparsityError(f"layer {layer.name!r}: its weight does not lie on its grid")
