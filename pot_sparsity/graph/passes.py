"""Passes that prepare a model: fold chains on weights, fuse batch normalization, give every layer a bias.

A pass edits the model through :class:`~pot_sparsity.graph.model.Model` only and returns what it did or had
to leave; the edits themselves stand in ``model.edits``. Values are computed in float64 and written in the
stored type. Each pass reads all it needs before its first structural edit: every edit makes the graph anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, Float64, MatMulGeometry
from pot_sparsity.algorithms.correction import FusedBatchNorm
from pot_sparsity.graph.chains import (
    Blocked,
    chain_of,
    constant_value,
    evaluate,
    static_shape,
    trace,
    value_readers,
)
from pot_sparsity.graph.discovery import (
    LAYER_OPS,
    Discovery,
    channel_core,
    find_layers,
    own_bias_core,
    per_channel,
)
from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.layers import Layer, Place
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_bias, read_weight, write_bias, write_weight


@dataclass(frozen=True)
class NotFused:
    """A batch normalization (or its decomposed form) that was kept, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class _Fusion:
    """One planned fusion: new values for a layer and the nodes that then have nothing left to do.

    ``factor`` ``[groups, rows]`` is what the weight is multiplied by, ``norm`` what the layer absorbs, where that is
    a BatchNormalization.
    """

    layer: Layer
    place: Place
    weight: Float64 | None
    bias: Float64 | None
    removed: tuple[str, ...]
    norm: FusedBatchNorm | None = None
    factor: Float64 | None = None


class _CannotFuseError(Exception):
    """Raised inside this module with the reason why a node is kept."""


def fold_weight_chains(model: Model, *, keep_compressed: bool = True) -> list[str]:
    """Connect weights, biases and batch normalization parameters that hide behind a chain directly.

    Parameters
    ----------
    model
        Edited in place.
    keep_compressed
        Keep a chain that does nothing but convert a weight from a smaller float type.

    Returns
    -------
    list of str
        Nodes one of whose operands was folded. Integer weights behind a scale stay as they are, and so do
        shared weights, which a constant per operator would tear apart.
    """
    graph = model.graph
    operands: list[tuple[Node, int]] = []
    for layer in find_layers(graph).layers:
        if not layer.shared:
            node = graph.node(layer.name)
            operands.append((node, 1 - node.inputs.index(layer.places[0].input)))
        operands += [_bias_operand(graph, place) for place in layer.places if place.bias is not None]
    operands += [(node, port) for node in graph if node.op == "BatchNormalization" for port in range(1, 5)]
    found = [(node, port, _folded(graph, node.inputs[port], keep_compressed)) for node, port in operands]
    folded = [(node.name, port, value) for node, port, value in found if value is not None]
    for name, port, value in folded:
        model.replace_operand(name, port, value, detail=f"constant behind operand {port} of {name!r} folded")
    return list(dict.fromkeys(name for name, _, _ in folded))


def _bias_operand(graph: Graph, place: Place) -> tuple[Node, int]:
    """Node and port at which a place's bias is added."""
    node = graph.producer(place.output)
    if node is None or place.bias is None:
        raise ValueError(f"{place.node!r} has no bias in this graph")
    return node, node.inputs.index(chain_of(graph, place.bias.constant, place.bias.chain).tensors[-1])


def _folded(graph: Graph, tensor: str, keep_compressed: bool) -> AnyArray | None:
    chain = trace(graph, tensor)
    if isinstance(chain, Blocked) or not chain.links:
        return None
    if not np.issubdtype(graph.value(chain.constant).dtype, np.floating):
        return None
    if keep_compressed and chain.ops <= {"Convert", "Identity"} and "Convert" in chain.ops:
        return None
    dtype = graph.tensor(tensor).dtype or graph.value(chain.constant).dtype
    return evaluate(graph, chain).astype(dtype)


def fuse_batchnorm(
    model: Model,
    absorbed: dict[str, FusedBatchNorm] | None = None,
    gains: dict[str, Float64] | None = None,
) -> list[NotFused]:
    """Fuse batch normalization into the layer before it; returns what had to be kept.

    Handles BatchNormalization and its decomposed form, a Multiply (or Divide) by a constant per channel with
    or without an Add after it, behind a convolution, transposed convolution or matrix product with or without
    a bias: ``W' = f W`` and ``b' = f (b - mean) + beta`` with ``f = gamma / sqrt(variance + epsilon)`` per
    output channel.

    Parameters
    ----------
    model
        Edited in place.
    absorbed
        Filled with the BatchNormalization that ends each layer's output now, by the layer's name.
    gains
        Filled with the factors ``[groups, rows]`` that the weights were multiplied by, all fusions of a layer
        together, by the layer's name.
    """
    norms: dict[str, FusedBatchNorm] = {} if absorbed is None else absorbed
    factors: dict[str, Float64] = {} if gains is None else gains
    while True:
        plans, refused = _plan(model)
        if not plans:
            return refused
        for plan in plans:
            norms.pop(plan.layer.name, None)  # what scales a normalized output anew is not a normalization
            if plan.norm is not None:
                norms[plan.layer.name] = plan.norm
            if plan.factor is not None:
                factors[plan.layer.name] = factors.get(plan.layer.name, 1.0) * plan.factor
            if plan.weight is not None:
                write_weight(model, plan.layer, plan.weight)
            if plan.bias is not None and plan.place.bias is not None:
                write_bias(model, plan.layer, plan.place, plan.bias)
        graph = model.graph
        for plan in plans:
            if plan.bias is not None and plan.place.bias is None:
                _new_bias(model, graph, plan.layer, plan.place, plan.bias)
            for name in plan.removed:
                detail = (
                    f"{graph.node(name).source_type or graph.node(name).op} fused into {plan.layer.name!r}"
                )
                model.bypass(name, kind="fuse_batchnorm", detail=detail)


def add_missing_biases(model: Model, layers: Sequence[Layer]) -> list[str]:
    """Give a bias to every place of ``layers`` that has none it may write; returns the nodes that got one.

    A bias that is a constant shared with other nodes is replaced by a constant of its own. Stacked matrix
    products and nodes whose bias is computed at run time are left out. Find the layers again afterwards.
    """
    graph = model.graph
    added = []
    for layer in layers:
        for place in layer.places:
            stacked = isinstance(place.geometry, MatMulGeometry) and place.geometry.groups > 1
            if place.bias is not None or stacked:
                continue
            try:
                current = _current_bias(model, graph, layer, place)
            except _CannotFuseError:
                continue
            bias = np.zeros((layer.groups, layer.rows)) if current is None else current
            _new_bias(model, graph, layer, place, bias)
            added.append(place.node)
    return added


def _new_bias(model: Model, graph: Graph, layer: Layer, place: Place, bias: Float64) -> None:
    """Bias ``[groups, rows]`` for a place that has none, or one that other nodes read as well."""
    node = graph.node(place.node)
    values = bias.ravel()
    if len(node.inputs) > 2 and node.inputs[2]:
        dtype = graph.tensor(node.inputs[2]).dtype or np.dtype(np.float32)
        core = own_bias_core(node, _channel_core(layer, place))
        own = (values / cast("float", node.attrs.get("beta", 1.0))).astype(dtype).reshape(core)
        model.replace_operand(node.name, 2, own, detail=f"bias of {node.name!r} given a constant of its own")
    else:
        model.add_bias(node.name, values)


def _current_bias(model: Model, graph: Graph, layer: Layer, place: Place) -> Float64 | None:
    """Bias ``[groups, rows]`` in effect at a place, one that may not be rewritten included."""
    if place.bias is not None:
        return read_bias(model, layer, place)
    node = graph.node(place.node)
    if len(node.inputs) < 3 or not node.inputs[2]:
        return None
    value = constant_value(graph, node.inputs[2])
    beta = cast("float", node.attrs.get("beta", 1.0))
    core = own_bias_core(node, _channel_core(layer, place))
    if value is None or beta == 0 or not (value.size == 1 or per_channel(value.shape, core, value.ndim)):
        raise _CannotFuseError(f"the bias of {node.name!r} is not a constant per channel")
    return np.broadcast_to(value.ravel() * beta, layer.channels).reshape(layer.groups, layer.rows)


def _plan(model: Model) -> tuple[list[_Fusion], list[NotFused]]:
    """All fusions that do not touch each other, and what stays; reads values, edits nothing."""
    graph = model.graph
    discovery = find_layers(graph)
    places = {place.output: (layer, place) for layer in discovery.layers for place in layer.places}
    plans: dict[str, _Fusion] = {}
    refused = []
    for node in graph:
        try:
            if node.op == "BatchNormalization":
                layer, place = _layer_before(graph, node.inputs[0], places, discovery)
                plan = _fuse_normalization(model, graph, node, layer, place)
            elif _decomposed(graph, node, places):
                layer, place = _layer_before(graph, node.inputs[0], places, discovery)
                plan = _fuse_decomposed(model, graph, node, layer, place)
            else:
                continue
        except _CannotFuseError as reason:
            refused.append(NotFused(node.name, str(reason)))
        else:
            plans.setdefault(layer.name, plan)
    return list(plans.values()), refused


def _layer_before(
    graph: Graph, tensor: str, places: Mapping[str, tuple[Layer, Place]], discovery: Discovery
) -> tuple[Layer, Place]:
    """The layer whose output ``tensor`` is, if nothing else can see what lies between."""
    while True:
        node = graph.producer(tensor)
        _check_unseen(graph, tensor)
        if tensor in places:
            layer, place = places[tensor]
            break
        if node is None or node.op == "Parameter":
            raise _CannotFuseError("it follows an input of the model")
        if node.op != "Identity":
            raise _CannotFuseError(_what_precedes(node, discovery))
        tensor = node.inputs[0]
    if layer.shared:
        raise _CannotFuseError(f"the weight of {place.node!r} is shared by several operators")
    stored = graph.value(layer.constant).dtype
    if not np.issubdtype(stored, np.floating):
        raise _CannotFuseError(f"the weight of {place.node!r} is stored as {stored}")
    return layer, place


def _check_unseen(graph: Graph, tensor: str) -> None:
    if tensor in graph.outputs:
        raise _CannotFuseError("the tensor before it is an output of the model as well")
    if len(value_readers(graph, tensor)) > 1:
        raise _CannotFuseError("the tensor before it has several consumers")


def _what_precedes(node: Node, discovery: Discovery) -> str:
    if node.op in LAYER_OPS:
        reason = next((skipped.reason for skipped in discovery.skipped if skipped.node == node.name), "")
        return f"the weight of {node.name!r} cannot be rewritten: {reason}"
    return f"it follows {node.op} ({node.name}), not a convolution or matrix product with its bias"


def _fuse_normalization(model: Model, graph: Graph, node: Node, layer: Layer, place: Place) -> _Fusion:
    if place.channel_axis != 1:
        shape = graph.tensor(node.inputs[0]).shape
        stacked = layer.groups > 1 and layer.kind == "matmul"
        if shape is None or stacked or place.channel_axis % len(shape) != 1:
            raise _CannotFuseError("it normalizes another axis than the layer's output channels")
    parameters = [constant_value(graph, tensor) for tensor in node.inputs[1:5]]
    gamma, beta, mean, variance = (np.zeros(0) if p is None else p.ravel() for p in parameters)
    if any(p is None or p.size != layer.channels for p in parameters):
        raise _CannotFuseError("its parameters are not constants with one value per channel")
    spread = variance + cast("float", node.attrs["epsilon"])
    if not np.all(spread > 0):
        raise _CannotFuseError("its variance + epsilon is not positive")
    size = (layer.groups, layer.rows)
    factor = (gamma / np.sqrt(spread)).reshape(size)
    bias = _current_bias(model, graph, layer, place)
    old = np.zeros(size) if bias is None else bias
    new = (old - mean.reshape(size)) * factor + beta.reshape(size)
    plan = _Fusion(layer, place, _scaled(model, layer, factor), new, (node.name,))
    norm = FusedBatchNorm(gamma, beta, variance, cast("float", node.attrs["epsilon"]))
    return replace(_checked(model, plan), norm=norm, factor=factor)


def _decomposed(graph: Graph, node: Node, places: Mapping[str, tuple[Layer, Place]]) -> bool:
    """Whether a node may be (part of) a layer's decomposed normalization.

    Only with the data first: a node is bypassed towards its first input.
    """
    if node.op not in ("Multiply", "Divide", "Add"):
        return False
    data, shape = node.inputs[0], static_shape(graph, node.inputs[1])
    source, before = data, graph.producer(data)
    while source not in places and before is not None and before.op == "Identity":
        source = before.inputs[0]
        before = graph.producer(source)
    if source not in places or shape is None or isinstance(trace(graph, node.inputs[1]), Blocked):
        return False
    layer, place = places[source]
    if node.op != "Add" and _per_output(graph, layer, place, shape):
        return True
    # A constant for all channels alike is left to the model, except for what a Gemm decomposes into.
    if np.prod(shape) != 1 or len(shape) > len(graph.tensor(data).shape or ()):
        return False
    neutral = 0.0 if node.op == "Add" else 1.0
    if np.all(constant_value(graph, node.inputs[1]) == neutral):
        return True
    return node.op != "Add" and _offset_after(graph, node, layer, place) is not None


def _per_output(graph: Graph, layer: Layer, place: Place, shape: tuple[int, ...]) -> bool:
    output = graph.tensor(place.output).shape
    return per_channel(shape, _channel_core(layer, place), None if output is None else len(output))


def _channel_core(layer: Layer, place: Place) -> tuple[int, ...]:
    return channel_core(place.geometry, layer.groups, layer.rows, place.channel_axis)


def _offset_after(graph: Graph, node: Node, layer: Layer, place: Place) -> tuple[Node, Float64] | None:
    """An Add or Subtract of a constant per channel that is the only reader of ``node``."""
    consumers = value_readers(graph, node.output)
    if node.output in graph.outputs or len(consumers) != 1:
        return None
    after, port = consumers[0]
    if after.op not in ("Add", "Subtract") or port != 0:
        return None
    shape = static_shape(graph, after.inputs[1])
    if shape is None or not _per_output(graph, layer, place, shape):
        return None
    value = constant_value(graph, after.inputs[1])
    if value is None:
        return None
    return after, value.reshape(layer.groups, layer.rows) * (-1.0 if after.op == "Subtract" else 1.0)


def _fuse_decomposed(model: Model, graph: Graph, node: Node, layer: Layer, place: Place) -> _Fusion:
    if node.op == "Add":  # of zero
        return _Fusion(layer, place, None, None, (node.name,))
    value = constant_value(graph, node.inputs[1])
    if value is None or not np.all(np.isfinite(value)) or (node.op == "Divide" and np.any(value == 0)):
        raise _CannotFuseError("its constant is zero or not finite")
    size = (layer.groups, layer.rows)
    factor = np.broadcast_to(value.ravel(), layer.channels).reshape(size)
    factor = 1.0 / factor if node.op == "Divide" else factor
    bias = _current_bias(model, graph, layer, place)
    weight = None if np.all(factor == 1) else _scaled(model, layer, factor)
    plan = _Fusion(layer, place, weight, None, (node.name,), factor=None if weight is None else factor)
    if bias is None:  # an Add that follows becomes the layer's bias as it stands
        return _checked(model, plan)
    offset = _offset_after(graph, node, layer, place)
    if offset is None:
        return _checked(model, replace(plan, bias=bias * factor))
    after, shift = offset
    return _checked(model, replace(plan, bias=bias * factor + shift, removed=(node.name, after.name)))


def _scaled(model: Model, layer: Layer, factor: Float64) -> Float64:
    return np.asarray(read_weight(model, layer) * factor[:, :, None])


def _checked(model: Model, plan: _Fusion) -> _Fusion:
    """Refuse values that are not finite in the type the layer is stored in."""
    stored = model.graph.value(plan.layer.constant).dtype
    with np.errstate(over="ignore", invalid="ignore"):
        for values, scale in ((plan.weight, plan.layer.scale), (plan.bias, 1.0)):
            if values is not None and not np.all(np.isfinite((values / scale).astype(stored))):
                raise _CannotFuseError(f"fused values would not be finite in {stored}")
    return plan
