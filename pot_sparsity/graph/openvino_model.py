"""OpenVINO models under edit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.errors import ModelError
from pot_sparsity.graph import ir_files, openvino_edits, openvino_quantizers
from pot_sparsity.graph.graph import Graph, Node, TensorInfo
from pot_sparsity.graph.model import Edit, EditKind, Format, Model, Runnable
from pot_sparsity.graph.onnx_edits import cast_stored
from pot_sparsity.graph.openvino_frontend import build_graph, describe, shape_of, source_port
from pot_sparsity.graph.openvino_nodes import (
    NamedModel,
    computes_in_half,
    dtype_of,
    float32_twin,
    is_static,
    read_constant,
    settle_names,
)

_log = logging.getLogger(__name__)


def load_ir(path: Path) -> OpenVINOModel:
    """Read an OpenVINO IR (``.xml`` with its ``.bin``).

    Raises
    ------
    ModelError
        The files are missing, damaged or unsafe, or hold NaN weights; one line says which.
    """
    ir = ir_files.read_ir(path)
    core = ov.Core()
    # A mapped file could change under us, or be the one that is overwritten with the result.
    core.set_property({"ENABLE_MMAP": False})
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: OpenVINO cannot read it ({reason(error)}): export the model again"
        ) from error
    settle_names(model)
    return OpenVINOModel(model, path, ir=ir)


def reason(error: RuntimeError) -> str:
    """The telling line of an OpenVINO error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".!") if lines else type(error).__name__


class OpenVINOModel(Model):
    """An ``openvino.Model`` under edit; the object passed in is cloned.

    A model that computes in float16 or bfloat16 is kept twice, as it is and in float32, and every edit is
    done to both: the float32 twin holds exactly the values that are stored.

    Parameters
    ----------
    model
        The model.
    source
        Where it came from.
    ir
        The files it was read from, if they are an IR whose constants may be patched.

    Raises
    ------
    ModelError
        The model computes in float16 in a place that cannot be rewritten.
    """

    def __init__(
        self, model: ov.Model, source: Path | None = None, *, ir: ir_files.IrFile | None = None
    ) -> None:
        self.edits: list[Edit] = []
        self.source = source
        #: What the user should know about how the model was written.
        self.notes: list[str] = []
        self._ir = ir
        self._originals: dict[str, ov.Node] = {}
        self._unsettled = False
        where = str(source) if source is not None else "the model"
        native = NamedModel(model.clone())
        self._graph: Graph | None = build_graph(native)
        self._views: tuple[NamedModel, ...] = (native,)
        if computes_in_half(native.model):
            try:
                self._views = (native, float32_twin(native))
            except ValueError as error:
                raise ModelError(f"{where}: {error}: convert the model to float32") from error

    @property
    def format(self) -> Format:
        """``openvino``."""
        return "openvino"

    @property
    def native(self) -> ov.Model:
        """The model in its present state and its own precision; do not mutate."""
        return self._settled()[0].model

    @property
    def graph(self) -> Graph:
        """Current networkx view; a new object after every structural edit."""
        if self._graph is None:
            self._graph = build_graph(self._settled()[0])
        return self._graph

    def _settled(self) -> tuple[NamedModel, ...]:
        """The model and its float32 twin, if it has one, with all edits in effect."""
        if self._unsettled:
            for view in self._views:
                view.settle()
            self._unsettled = False
        return self._views

    def _node(self, name: str) -> Node:
        """One node, without making the whole view anew: edits come by the hundred."""
        return describe(self._views[0], name, self._views[0].node(name))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Tensor names of the inputs (the first in order where there are several), else the operators' names."""
        ports = self._settled()[0].model.inputs
        return tuple(
            min(port.get_names(), default=name.rpartition(":")[0])
            for port, name in zip(ports, self.graph.inputs, strict=True)
        )

    @property
    def batch_size(self) -> int | None:
        """The leading dimension if it is fixed and the same for all inputs, else None."""
        sizes = {info.shape[0] if info.shape else None for info in self.inputs}
        return sizes.pop() if len(sizes) == 1 else None

    def copy(self) -> OpenVINOModel:
        """Independent copy; the bytes of constants are shared."""
        other = object.__new__(OpenVINOModel)
        other.edits = list(self.edits)
        other.source = self.source
        other.notes = list(self.notes)
        other._ir = self._ir
        other._originals = dict(self._originals)
        other._views = tuple(view.clone() for view in self._settled())
        other._unsettled = False
        other._graph = None
        return other

    def set_constant(self, tensor: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> AnyArray:
        """Write a constant's value, cast to its stored dtype; returns the value as stored.

        Raises ValueError if the tensor is no constant of numbers, the shape differs, or a value is not finite
        in the stored type.
        """
        info = self._constant(tensor)
        if info is None:
            raise ValueError(f"tensor {tensor!r} is not a constant of the model")
        stored = cast_stored(value, info)
        self._originals.setdefault(tensor, self._views[0].output(tensor).get_node())
        for view in self._views:
            view.replace_constant(tensor, _as_in(view.output(tensor), stored))
        return stored

    def _constant(self, tensor: str) -> TensorInfo | None:
        try:
            output = self._views[0].output(tensor)
        except KeyError:
            return None
        dtype = dtype_of(output.get_element_type())
        if output.get_node().get_type_name() != "Constant" or dtype is None:
            return None
        return TensorInfo(tensor, shape_of(output.get_partial_shape()), dtype)

    def add_bias(self, node: str, value: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> str:
        """Give an operator a bias by an Add behind it; see :meth:`Model.add_bias`.

        The operator keeps its name; the Add takes over the names of its output's tensor.
        """
        found = self._node(node)
        if found.op not in ("Convolution", "ConvolutionTranspose", "MatMul"):
            raise ValueError(f"operator {node!r} ({found.source_type}) cannot have a bias")
        shape = self._bias_shape(found)
        if int(np.prod(shape)) != value.size:
            raise ValueError(f"the bias of {node!r} needs {int(np.prod(shape))} values, not {value.size}")
        dtype = dtype_of(self._views[0].node(node).output(0).get_element_type())
        stored = cast_stored(value.reshape(shape), TensorInfo(f"bias of {node}", shape, dtype))
        constant, add = (self._views[0].free_name(f"{node}.{word}") for word in ("bias", "add_bias"))
        for view in self._views:
            output = view.node(node).output(0)
            openvino_edits.append_add(view, node, _as_in(output, stored), constant, add)
        self._edited("add_bias", node, f"added a bias of {value.size} values to {node}")
        return f"{constant}:0"

    def _bias_shape(self, node: Node) -> tuple[int, ...]:
        """Shape in which a bias broadcasts over the output of a node along its channels."""
        left = node.op == "MatMul" and is_static(self._views[0].output(node.inputs[0]).get_node(), {})
        operand = shape_of(self._views[0].output(node.inputs[0 if left else 1]).get_partial_shape())
        if operand is None or len(operand) < 2 or None in operand:
            raise ValueError(f"a bias needs a weight of known shape, but that of {node.name!r} is {operand}")
        dims = tuple(int(dim) for dim in operand if dim is not None)
        if node.op != "MatMul":
            axis = {"oi": 0, "io": 1, "goi": 1, "gio": 2}[str(node.attrs["weight_layout"])]
            groups = dims[0] if "g" in str(node.attrs["weight_layout"]) else 1
            spatial = len(dims) - len(str(node.attrs["weight_layout"]))
            return (1, groups * dims[axis], *(1,) * spatial)
        swapped = bool(node.attrs["transpose_a" if left else "transpose_b"])
        channels = dims[-1 if left == swapped else -2]
        stack = dims[:-2] if any(dim > 1 for dim in dims[:-2]) else ()
        if left:
            return (*stack, channels, 1)
        return (*stack, 1, channels) if stack else (channels,)

    def bypass(self, node: str, *, kind: EditKind, detail: str) -> None:
        """Remove a node with one data input and one output; its consumers read its first input instead."""
        found = self._node(node)
        if not found.inputs or len(found.outputs) != 1:
            raise ValueError(f"operator {node!r} ({found.source_type}) cannot be bypassed")
        for view in self._views:
            openvino_edits.bypass(view, node, source_port(view.node(node), 0))
        self._edited(kind, node, detail)

    def replace_operand(self, node: str, port: int, value: AnyArray, *, detail: str) -> str:
        """Connect a new constant, of the type read there, to an input port; returns its tensor name."""
        inputs = self._node(node).inputs
        if not 0 <= port < len(inputs) or not inputs[port]:
            raise ValueError(f"operator {node!r} has no input {port}")
        dtype = dtype_of(self._views[0].output(inputs[port]).get_element_type())
        stored = cast_stored(value, TensorInfo(f"operand {port} of {node}", value.shape, dtype))
        constant = self._views[0].free_name(f"{inputs[port].rpartition(':')[0]}.folded")
        own_port = source_port(self._views[0].node(node), port)
        for view in self._views:
            output = view.node(node).input_value(own_port)
            openvino_edits.set_operand(view, node, own_port, _as_in(output, stored), constant)
        self._edited("fold_constant", node, detail)
        return f"{constant}:0"

    def insert_quantizer(self, tensor: str, readers: Sequence[tuple[str, int]], grid: ActivationGrid) -> str:
        """A FakeQuantize in front of ``readers``; see :meth:`Model.insert_quantizer`."""
        if self._views[0].output(tensor).get_element_type() != ov.Type.f32:
            raise ModelError(f"tensor {tensor!r} is not float32: few-bit layers need a float32 model")
        for view in self._views:
            own = [(node, source_port(view.node(node), port)) for node, port in readers]
            result = openvino_quantizers.insert_quantizer(view, tensor, own, grid)
        self._edited("fake_quantize", readers[0][0], f"{tensor} rounded to {grid.levels} levels")
        return result

    def store_integers(self, node: str, port: int, integers: AnyArray, scale: AnyArray) -> str:
        """Int8 weights behind Convert and Multiply; see :meth:`Model.store_integers`."""
        for view in self._views:
            own_port = source_port(view.node(node), port)
            result = openvino_quantizers.store_integers(view, node, own_port, integers, scale)
        self._edited("integer_weight", node, f"weight of {node} stored as int8 with scales")
        return result

    def _edited(self, kind: EditKind, node: str, detail: str) -> None:
        self.edits.append(Edit(kind, node, detail))
        self._graph = None
        self._unsettled = True

    def extract(self, outputs: Sequence[str] | None = None, inputs: Sequence[str] | None = None) -> Runnable:
        """The part of the model from ``inputs`` to ``outputs``, in float32; see :meth:`Model.extract`."""
        part, names_in, names_out = openvino_edits.cut(self._settled()[-1], outputs, inputs)
        return Runnable(part, names_in, names_out)

    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write ``<stem>.xml`` and ``<stem>.bin``.

        The files of an IR whose structure is unchanged are patched: only the bytes of rewritten constants
        differ. Everything else goes through ``openvino.save_model`` (never compressing to float16).

        Raises
        ------
        OutputError
            A file cannot be written; nothing is left behind under a final name.
        """
        patched = self._patched()
        if patched is None:
            return ir_files.write_pair(
                folder, stem, lambda xml: ov.save_model(self.native, xml, compress_to_fp16=False)
            )

        def write(xml: Path) -> None:
            xml.write_bytes(patched[0])
            xml.with_suffix(".bin").write_bytes(patched[1])

        return ir_files.write_pair(folder, stem, write)

    def _patched(self) -> tuple[bytes, bytes] | None:
        """The bytes of the source's two files with the rewritten constants, where that is possible."""
        if self._ir is None or self.edits:
            return None
        weights = self._ir.weights()
        if weights is None:
            self._note_rewriting(f"{self._ir.bin_path} changed since it was read")
            return None
        changes = []
        for tensor, original in self._originals.items():
            name = str(original.get_friendly_name())
            place = ir_files.match_constant(self._ir, weights, name, read_constant(original).tobytes())
            if place is None:
                self._note_rewriting(f"constant {name!r} has no bytes of its own in {self._ir.bin_path}")
                return None
            changes.append((place, self.graph.value(tensor).tobytes()))
        return ir_files.patch(self._ir, weights, changes)

    def _note_rewriting(self, why: str) -> None:
        note = f"the IR was written anew instead of patched: {why}"
        _log.warning(note)
        self.notes.append(note)


def _as_in(output: ov.Output, stored: AnyArray) -> AnyArray:
    """``stored`` in the type of a view's output: the same, or float32 where that view is the twin."""
    return stored.astype(np.float32) if output.get_element_type() == ov.Type.f32 else stored
