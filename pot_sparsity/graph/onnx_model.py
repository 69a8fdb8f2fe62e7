"""ONNX models under edit."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.errors import ModelError
from pot_sparsity.graph import onnx_files, onnx_quantizers
from pot_sparsity.graph.graph import Graph, Node, TensorInfo
from pot_sparsity.graph.model import Edit, EditKind, Format, Model, Runnable
from pot_sparsity.graph.onnx_cut import cut
from pot_sparsity.graph.onnx_edits import Editor, cast_stored, write_slot
from pot_sparsity.graph.onnx_frontend import (
    Slot,
    build_graph,
    constant_slots,
    infer_tensors,
    node_names,
    read_slot,
)


def load_onnx(path: Path) -> OnnxModel:
    """Read an ONNX file.

    Raises
    ------
    ModelError
        The file is missing, damaged, unsafe or needs a newer onnx; one line says which.
    """
    proto, external = onnx_files.read_proto(path)
    return OnnxModel(proto, path, external=external)


class OnnxModel(Model):
    """An ``onnx.ModelProto`` under edit; the object passed in is copied before the first change.

    Local functions are inlined, because a weight inside a function has no place of its own in the graph.

    Parameters
    ----------
    proto
        The model. External data that is not loaded is read from the folder of ``source``.
    source
        Where the model came from.
    external
        Whether the model's data lay in a file of its own, as it then will when saved.

    Raises
    ------
    ModelError
        The model is damaged, unsafe or needs a newer onnx.
    """

    def __init__(self, proto: onnx.ModelProto, source: Path | None = None, *, external: bool = False) -> None:
        self.edits: list[Edit] = []
        self.notes: list[str] = []
        self.source = source
        where = self._where
        onnx_files.check_proto(proto, where)
        self._external = external
        self._owned = False
        if onnx_files.has_external_data(proto):
            if source is None:
                raise ModelError(
                    f"{where} has external data that is not loaded: read it with onnx.load(path)"
                )
            proto = copy.deepcopy(proto)
            onnx_files.load_external_data(proto, source)
            self._owned = self._external = True
        onnx_files.check_tensors(proto, where)
        if proto.functions:
            proto = _inlined(proto, where)
            self._owned = True
        self._proto = proto
        self._names = node_names(proto.graph)
        self._infos = infer_tensors(proto)
        self._slots: dict[str, Slot] | None = None
        self._graph: Graph | None = None
        _ = self.graph

    @property
    def _where(self) -> str:
        """What messages call the model."""
        return "the model" if self.source is None else str(self.source)

    @property
    def format(self) -> Format:
        """``onnx``."""
        return "onnx"

    @property
    def native(self) -> onnx.ModelProto:
        """The protobuf in its present state; do not mutate."""
        return self._proto

    @property
    def graph(self) -> Graph:
        """Current networkx view; a new object after every structural edit."""
        if self._graph is None:
            self._graph = build_graph(self._proto, self._names, self._infos, self._read, self._where)
        return self._graph

    @property
    def batch_size(self) -> int | None:
        """The leading dimension if it is fixed and the same for all inputs, else None."""
        sizes = {info.shape[0] if info.shape else None for info in self.inputs}
        return sizes.pop() if len(sizes) == 1 else None

    def _slot(self, tensor: str) -> Slot:
        if self._slots is None:
            self._slots = constant_slots(self._proto.graph)
        return self._slots[tensor]

    def _read(self, tensor: str) -> AnyArray:
        return read_slot(self._slot(tensor))

    def _own(self) -> None:
        """Make sure that nobody else sees the changes to come."""
        if not self._owned:
            self._proto = copy.deepcopy(self._proto)
            self._owned = True
            self._slots = None

    def _editor(self) -> Editor:
        """The tool for a structural edit; views are renewed after it."""
        self._own()
        self._graph = self._slots = None
        return Editor(self._proto, self._names, self._infos)

    def copy(self) -> OnnxModel:
        """Independent copy; the protobuf is shared until one of the two writes."""
        self._owned = False
        other = copy.copy(self)
        other.edits = list(self.edits)
        other._names = list(self._names)
        other._infos = dict(self._infos)
        other._graph = other._slots = None
        return other

    def set_constant(self, tensor: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> AnyArray:
        """Write a constant's value, cast to its stored dtype; returns the value as stored.

        Raises ValueError if the tensor is no constant, the shape differs, or a value is not finite in the
        stored type.
        """
        if not self.graph.is_constant(tensor):
            raise ValueError(f"tensor {tensor!r} is not a constant of the model")
        stored = cast_stored(value, self._infos[tensor])
        self._own()
        write_slot(self._slot(tensor), stored)
        return stored

    def add_bias(self, node: str, value: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> str:
        """Give an operator without a bias one; see :meth:`Model.add_bias`.

        Convolutions and Gemm get their own bias input; a MatMul is followed by a new Add that takes over its
        output's name. The constant has the operand's dtype.
        """
        found = self.graph.node(node)
        if found.op not in ("Convolution", "ConvolutionTranspose", "MatMul"):
            raise ValueError(f"operator {node!r} ({found.source_type}) cannot have a bias")
        if len(found.inputs) > 2 and found.inputs[2]:
            raise ValueError(f"operator {node!r} already has a bias")
        left = found.op == "MatMul" and not self._is_fixed(found.inputs[1])
        operand = self.graph.tensor(found.inputs[0 if left else 1])
        shape = self._bias_shape(found, operand, left=left)
        if int(np.prod(shape)) != value.size:
            raise ValueError(f"the bias of {node!r} needs {int(np.prod(shape))} values, not {value.size}")
        info = TensorInfo(f"bias of {node}", shape, operand.dtype or np.dtype(np.float32))
        stored = cast_stored(value.reshape(shape), info)
        editor = self._editor()
        name = editor.add_constant(f"{node}.bias", stored)
        if found.source_type == "MatMul":
            editor.append_add(node, name)
        else:
            proto = editor.node(node)
            for index in reversed(range(len(proto.attribute))):
                if proto.attribute[index].name == "beta":  # has no effect as long as there is no bias
                    del proto.attribute[index]
            editor.set_input(node, 2, name)
        self.edits.append(Edit("add_bias", node, f"added a bias of {value.size} values to {node}"))
        return name

    def _bias_shape(self, node: Node, operand: TensorInfo, *, left: bool) -> tuple[int, ...]:
        """Shape in which a bias broadcasts over the output of a node with the given constant operand."""
        sizes = tuple(size for size in operand.shape or () if size is not None)
        if operand.shape is None or len(sizes) < max(2, len(operand.shape)):
            raise ValueError(
                f"a bias for {node.name!r} needs a weight matrix, not one of shape {operand.shape}"
            )
        geometry = node.attrs.get("geometry")
        if isinstance(geometry, ConvGeometry):
            return (sizes[1] * geometry.groups if geometry.transposed else sizes[0],)
        *stack, rows, columns = sizes
        transposed = bool(node.attrs["transpose_a" if left else "transpose_b"])
        channels = columns if left == transposed else rows
        batched = any(size > 1 for size in stack)
        activation = self.graph.tensor(node.inputs[1]).shape
        vector = left and activation is not None and len(activation) == 1
        tail = (channels, 1) if left and not vector else (1, channels) if batched else (channels,)
        return (*stack, *tail) if batched else tail

    def _is_fixed(self, tensor: str) -> bool:
        """Whether a tensor depends on constants only."""
        pending, graph = [tensor], self.graph
        while pending:
            name = pending.pop()
            producer = graph.producer(name)
            if (
                producer is None
                or producer.op == "Parameter"
                or (not producer.inputs and not graph.is_constant(name))
            ):
                return False
            pending.extend(filter(None, producer.inputs))
        return True

    def bypass(self, node: str, *, kind: EditKind, detail: str) -> None:
        """Remove a node with one data input and one output; its consumers read its first input instead."""
        self._editor().bypass(node)
        self.edits.append(Edit(kind, node, detail))

    def replace_operand(self, node: str, port: int, value: AnyArray, *, detail: str) -> str:
        """Connect a new constant of ``value``'s dtype to an input port; returns its tensor name."""
        inputs = self.graph.node(node).inputs
        if not 0 <= port < len(inputs) or not inputs[port]:
            raise ValueError(f"operator {node!r} has no input {port}")
        editor = self._editor()
        name = editor.add_constant(f"{inputs[port]}__folded", value)
        editor.set_input(node, port, name)
        self.edits.append(Edit("fold_constant", node, detail))
        return name

    def insert_quantizer(self, tensor: str, readers: Sequence[tuple[str, int]], grid: ActivationGrid) -> str:
        """Clip, QuantizeLinear and DequantizeLinear in front of ``readers``; see :meth:`Model.insert_quantizer`."""
        onnx_quantizers.check_opset(self._proto)
        if self._infos.get(tensor, TensorInfo(tensor, None, None)).dtype != np.float32:
            raise ModelError(
                f"tensor {tensor!r} is not known to be float32: few-bit layers need a float32 model"
            )
        result = onnx_quantizers.insert_quantizer(self._editor(), tensor, readers, grid)
        self.edits.append(Edit("fake_quantize", readers[0][0], f"{tensor} rounded to {grid.levels} levels"))
        return result

    def store_integers(self, node: str, port: int, integers: AnyArray, scale: AnyArray) -> str:
        """Int8 weights behind a DequantizeLinear; see :meth:`Model.store_integers`."""
        onnx_quantizers.check_opset(self._proto)
        name = onnx_quantizers.store_integers(self._editor(), node, port, integers, scale)
        self.edits.append(Edit("integer_weight", node, f"weight of {node} stored as int8 with scales"))
        return name

    def extract(self, outputs: Sequence[str] | None = None, inputs: Sequence[str] | None = None) -> Runnable:
        """The part of the model from ``inputs`` to ``outputs`` in float32; see :meth:`Model.extract`.

        A part too large for one protobuf lies in a temporary folder that goes when the runnable does.
        """
        proto, names_in, names_out = cut(self._proto, self._names, self.graph, outputs, inputs)
        if onnx_files.total_bytes(proto) <= onnx_files.PROTOBUF_LIMIT:
            return Runnable(proto.SerializeToString(), names_in, names_out)
        folder = Path(tempfile.mkdtemp(prefix="pot-sparsity-"))
        try:
            path = onnx_files.write_proto(proto, folder, "part", external=True)[0]
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        runnable = Runnable(path, names_in, names_out)
        weakref.finalize(runnable, shutil.rmtree, folder, ignore_errors=True)
        return runnable

    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write ``<stem>.onnx`` (and ``<stem>.onnx.data`` if the data came that way or is too large)."""
        return onnx_files.write_proto(self._proto, folder, stem, external=self._external)


def _inlined(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    try:
        return onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{where}: its local functions cannot be inlined: {text}") from error
