"""The few structural edits of an ONNX graph, done in place; everything they do not name stays as it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.graph.graph import TensorInfo
from pot_sparsity.graph.onnx_files import subgraphs
from pot_sparsity.graph.onnx_frontend import Slot, captured, fresh

#: From this IR version on, initializers need not be listed among the graph's inputs.
_FREE_INITIALIZERS = 4
_DATA_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def cast_stored(
    value: np.ndarray[tuple[int, ...], np.dtype[np.generic]], like: TensorInfo
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """``value`` in the shape and type a constant is stored in.

    Raises
    ------
    ValueError
        The shape differs, a value is not finite, or the type cannot hold a value.
    """
    if like.shape is None or like.dtype is None:
        raise ValueError(f"constant {like.name!r} holds no numbers")
    if tuple(value.shape) != tuple(like.shape):
        raise ValueError(f"constant {like.name!r} has shape {like.shape}, the new value {tuple(value.shape)}")
    if value.dtype == like.dtype:
        result = np.array(value)
    elif _is_integer(like.dtype):
        rounded = np.rint(value.astype(np.float64))
        with np.errstate(invalid="ignore", over="ignore"):
            result = rounded.astype(like.dtype)
        if not np.array_equal(result.astype(np.float64), rounded):
            raise ValueError(f"constant {like.name!r}: a value does not fit into {like.dtype}")
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            result = value.astype(like.dtype)
    if not _is_integer(like.dtype) and not np.isfinite(result.astype(np.float64)).all():
        raise ValueError(f"constant {like.name!r}: a value is not finite in {like.dtype}")
    return result


def _is_integer(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind in "iub" or dtype.name.startswith(("int", "uint"))


def write_slot(slot: Slot, value: AnyArray) -> None:
    """Store a value that already has the constant's shape and type."""
    if isinstance(slot, TensorProto):
        raw = onnx.numpy_helper.from_array(value).raw_data
        for field in _DATA_FIELDS:
            slot.ClearField(field)
        slot.raw_data = raw
    elif slot.type == AttributeProto.FLOAT:
        slot.f = float(value.item())
    elif slot.type == AttributeProto.INT:
        slot.i = int(value.item())
    else:
        field = slot.floats if slot.type == AttributeProto.FLOATS else slot.ints
        del field[:]
        field.extend(value.tolist())


def rename_captured(node: NodeProto, old: str, new: str) -> None:
    """Let the subgraphs of ``node`` read ``new`` where they read the outer tensor ``old``."""
    if old not in captured(node):
        return
    for graph in subgraphs(node):
        local = {entry.name for entry in (*graph.input, *graph.initializer)}
        local.update(tensor for inner in graph.node for tensor in inner.output)
        if old in local:
            continue
        for inner in graph.node:
            _rename(inner, old, new)
        for entry in graph.output:
            if entry.name == old:
                entry.name = new


def _rename(node: NodeProto, old: str, new: str) -> None:
    for port, tensor in enumerate(node.input):
        if tensor == old:
            node.input[port] = new
    rename_captured(node, old, new)


@dataclass(frozen=True)
class Editor:
    """In-place edits of a model's main graph.

    Attributes
    ----------
    proto
        The model; edited.
    names
        Name of each node of the main graph, kept in step with it; edited.
    infos
        What is known of the tensors; edited.
    """

    proto: onnx.ModelProto
    names: list[str]
    infos: dict[str, TensorInfo]

    def node(self, name: str) -> NodeProto:
        """The operator of that name; ValueError if there is none."""
        found: NodeProto = self.proto.graph.node[self._index(name)]
        return found

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"the model has no operator called {name!r}")
        return self.names.index(name)

    def fresh_tensor(self, base: str) -> str:
        """A tensor name that neither the main graph nor a subgraph uses."""
        graph = self.proto.graph
        taken = {entry.name for entry in (*graph.input, *graph.initializer, *graph.output)}
        stack: list[NodeProto] = list(graph.node)
        while stack:
            node = stack.pop()
            taken.update(node.input, node.output)
            for inner in subgraphs(node):
                taken.update(entry.name for entry in (*inner.input, *inner.initializer, *inner.output))
                stack.extend(inner.node)
        return fresh(base, taken)

    def add_constant(self, base: str, value: AnyArray) -> str:
        """Add an initializer; returns its tensor name."""
        name = self.fresh_tensor(base)
        tensor = onnx.numpy_helper.from_array(value, name)
        self.proto.graph.initializer.append(tensor)
        if self.proto.ir_version < _FREE_INITIALIZERS:
            entry = onnx.helper.make_tensor_value_info(name, tensor.data_type, value.shape)
            self.proto.graph.input.append(entry)
        self.infos[name] = TensorInfo(name, tuple(value.shape), value.dtype)
        return name

    def set_input(self, name: str, port: int, tensor: str) -> None:
        """Connect ``tensor`` to an input port, existing or not; what nobody reads any more goes."""
        inputs = self.node(name).input
        before = inputs[port] if port < len(inputs) else ""
        while len(inputs) <= port:
            inputs.append("")
        inputs[port] = tensor
        self._drop_unused([before])

    def append_add(self, name: str, constant: str) -> None:
        """Add ``constant`` to the output of a node, which keeps its name for everybody who reads it."""
        node = self.node(name)
        output = node.output[0]
        inner = self.fresh_tensor(f"{output}__before_bias")
        node.output[0] = inner
        info = self.infos.get(output)
        if info is not None:
            self.infos[inner] = TensorInfo(inner, info.shape, info.dtype)
        added = fresh(f"{name}/bias", self.names)
        position = self._index(name) + 1
        self.proto.graph.node.insert(
            position, onnx.helper.make_node("Add", [inner, constant], [output], name=added)
        )
        self.names.insert(position, added)

    def bypass(self, name: str) -> None:
        """Remove a node; its first input takes the place of its output."""
        graph = self.proto.graph
        index = self._index(name)
        node = graph.node[index]
        if not node.input or not node.input[0] or len([t for t in node.output if t]) != 1:
            raise ValueError(f"operator {name!r} cannot be bypassed: it needs one data input and one output")
        source, target = node.input[0], node.output[0]
        operands = [*node.input[1:], *captured(node)]
        outputs = {entry.name for entry in graph.output}
        if target not in outputs:
            self._remove_node(index)
            self._rewire(target, source)
            self._forget(target)
        elif source in outputs or (producer := self._producer(source)) is None:
            added = fresh(f"{name}/identity", self.names)
            node.CopyFrom(onnx.helper.make_node("Identity", [source], [target], name=added))
            self.names[index] = added
        else:
            producer.output[list(producer.output).index(source)] = target
            self._remove_node(index)
            self._rewire(source, target)
            self._forget(source)
        self._drop_unused(operands)

    def _producer(self, tensor: str) -> NodeProto | None:
        return next((node for node in self.proto.graph.node if tensor in node.output), None)

    def _rewire(self, old: str, new: str) -> None:
        for node in self.proto.graph.node:
            _rename(node, old, new)

    def _remove_node(self, index: int) -> None:
        del self.proto.graph.node[index]
        del self.names[index]

    def _forget(self, tensor: str) -> None:
        """Drop what the model and we know of a tensor that no longer exists."""
        self.infos.pop(tensor, None)
        graph = self.proto.graph
        for entries in (graph.value_info, graph.input, graph.initializer):
            for index in reversed(range(len(entries))):
                if entries[index].name == tensor:
                    del entries[index]
        for index in reversed(range(len(graph.quantization_annotation))):
            if graph.quantization_annotation[index].tensor_name == tensor:
                del graph.quantization_annotation[index]

    def _drop_unused(self, tensors: Iterable[str]) -> None:
        """Remove the constants and operators behind ``tensors`` that nobody reads any more."""
        graph = self.proto.graph
        pending = [tensor for tensor in tensors if tensor]
        initializers = {tensor.name for tensor in graph.initializer}
        while pending:
            tensor = pending.pop()
            if self._is_read(tensor):
                continue
            if tensor in initializers:
                self._forget(tensor)
                continue
            producer = self._producer(tensor)
            if producer is None or any(self._is_read(output) for output in producer.output if output):
                continue
            pending.extend(t for t in (*producer.input, *captured(producer)) if t)
            dead = [output for output in producer.output if output]
            index = next(i for i, node in enumerate(graph.node) if tensor in node.output)
            self._remove_node(index)
            for output in dead:
                self._forget(output)

    def _is_read(self, tensor: str) -> bool:
        graph = self.proto.graph
        return any(entry.name == tensor for entry in graph.output) or any(
            tensor in node.input or tensor in captured(node) for node in graph.node
        )
