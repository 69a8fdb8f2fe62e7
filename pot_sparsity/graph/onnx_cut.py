"""Cutting a part out of an ONNX model, in float32, so that an engine can run it and return any tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, TensorProto

from pot_sparsity.graph.graph import Graph, TensorInfo
from pot_sparsity.graph.onnx_files import subgraphs
from pot_sparsity.graph.onnx_frontend import fresh

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
#: Integer attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")
#: IR version from which initializers need not be graph inputs.
_FREE_INITIALIZERS = 4


def cut(
    proto: onnx.ModelProto,
    names: Sequence[str],
    graph: Graph,
    outputs: Sequence[str] | None,
    inputs: Sequence[str] | None,
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """The part of a model between tensors; half-precision tensors become float32.

    Parameters
    ----------
    proto, names, graph
        The model, the names of its nodes, and its view.
    outputs, inputs
        Tensor names, as in :meth:`pot_sparsity.graph.model.Model.extract`; repeated names count once.

    Returns
    -------
    tuple
        The new model and the tensor names of its inputs and outputs, in its own order.

    Raises
    ------
    ValueError
        A tensor does not exist, an input is a constant or has no known type, or an output needs a model input
        that is not among ``inputs``.
    """
    wanted = tuple(dict.fromkeys(graph.outputs if outputs is None else outputs))
    given = tuple(dict.fromkeys(graph.inputs if inputs is None else inputs))
    for tensor in (*wanted, *given):
        if graph.producer(tensor) is None:
            raise ValueError(f"the model has no tensor called {tensor!r}")
    for tensor in given:
        if graph.is_constant(tensor):
            raise ValueError(f"tensor {tensor!r} is a constant and cannot be an input")
    needed, used = _needed(graph, wanted, set(given))
    source = proto.graph
    result = onnx.ModelProto(ir_version=max(proto.ir_version, _FREE_INITIALIZERS))
    result.opset_import.extend(proto.opset_import)
    target = result.graph
    target.name = source.name
    target.initializer.extend(tensor for tensor in source.initializer if tensor.name in used)
    target.node.extend(node for name, node in zip(names, source.node, strict=True) if name in needed)
    kept_inputs = tuple(tensor for tensor in given if tensor in used)
    taken = _tensor_names(source)
    for node in target.node:
        for port, tensor in enumerate(node.output):
            if tensor in kept_inputs:
                node.output[port] = fresh(f"{tensor}__computed", taken)
                taken.add(node.output[port])
    declared = {entry.name: entry for entry in (*source.input, *source.output)}
    for tensor in kept_inputs:
        entry = declared.get(tensor) if tensor in graph.inputs else None
        target.input.append(_input_entry(graph.tensor(tensor)) if entry is None else entry)
    produced = {tensor for node in target.node for tensor in node.output}
    for tensor in wanted:
        if tensor in produced:
            target.output.append(declared.get(tensor, onnx.ValueInfoProto(name=tensor)))
            continue
        name = fresh(f"{tensor}__output", taken)
        taken.add(name)
        target.node.append(onnx.helper.make_node("Identity", [tensor], [name]))
        target.output.append(onnx.ValueInfoProto(name=name))
    to_float32(target)
    return result, kept_inputs, wanted


def _needed(graph: Graph, wanted: Iterable[str], given: set[str]) -> tuple[set[str], set[str]]:
    """Names of the nodes to keep, and the given tensors and constants they read."""
    nodes: set[str] = set()
    seen: set[str] = set()
    pending = list(wanted)
    while pending:
        tensor = pending.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        node = graph.producer(tensor)
        if tensor in given or node is None:
            continue
        if node.op == "Parameter":
            raise ValueError(
                f"an output depends on the model's input {tensor!r}, which is not among the inputs"
            )
        if node.name not in nodes:
            nodes.add(node.name)
            pending.extend(filter(None, node.inputs))
    return nodes, seen


def _tensor_names(graph: GraphProto) -> set[str]:
    names = {entry.name for entry in (*graph.input, *graph.initializer)}
    for node in graph.node:
        names.update(node.output)
        for inner in subgraphs(node):
            names |= _tensor_names(inner)
    return names


def _input_entry(info: TensorInfo) -> onnx.ValueInfoProto:
    if info.dtype is None:
        raise ValueError(f"tensor {info.name!r} cannot be an input: its element type is not known")
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(info.dtype))
    return onnx.helper.make_tensor_value_info(info.name, kind, info.shape)


def to_float32(graph: GraphProto) -> None:
    """Turn float16 and bfloat16 into float32 everywhere in a graph, in place."""
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for entry in (*graph.input, *graph.output, *graph.value_info):
        _widen_type(entry.type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.type == AttributeProto.INT:
                if attribute.i in _HALF:
                    attribute.i = TensorProto.FLOAT
            elif attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.type == AttributeProto.TYPE_PROTO:
                _widen_type(attribute.tp)
        for inner in subgraphs(node):
            to_float32(inner)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _HALF:
        value = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


def _widen_type(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type"):
        if kind.tensor_type.elem_type in _HALF:
            kind.tensor_type.elem_type = TensorProto.FLOAT
    elif kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _widen_type(kind.optional_type.elem_type)
