"""ONNX protobuf to :class:`~pot_sparsity.graph.graph.Graph`: names, shapes and canonical operators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry, PadMode
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.graph import Graph, Node, Shape, TensorInfo
from pot_sparsity.graph.onnx_files import stored_bytes, subgraphs

logger = logging.getLogger(__name__)

#: Where a constant's value is stored: an initializer, a Constant's ``value``, or another attribute of it.
Slot: TypeAlias = TensorProto | AttributeProto

#: Operators of the canonical vocabulary; an opaque operator of the same name carries its domain as a prefix.
CANONICAL = frozenset(
    (
        *("Parameter", "Result", "Constant", "Convolution", "ConvolutionTranspose", "MatMul"),
        *("BatchNormalization", "Add", "Subtract", "Multiply", "Divide", "Identity", "Convert"),
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "DequantizeLinear"),
    )
)
_CONSTANT_ATTRIBUTES = ("value", "value_float", "value_floats", "value_int", "value_ints")
_PAD_MODES: Mapping[str, PadMode] = {
    "NOTSET": "explicit",
    "SAME_UPPER": "same_upper",
    "SAME_LOWER": "same_lower",
    "VALID": "valid",
}
#: Tensors above this many bytes do not take part in shape inference with their values.
_INFERENCE_VALUE_LIMIT = 4096


def is_standard(domain: str) -> bool:
    """Whether an operator domain is ONNX's own."""
    return domain in ("", "ai.onnx")


def numpy_dtype(data_type: int) -> np.dtype[np.generic] | None:
    """The numpy (or ml_dtypes) type of an ONNX element type; None where there is none."""
    if data_type in (TensorProto.UNDEFINED, TensorProto.STRING):
        return None
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError:
        return None


def fresh(base: str, taken: Iterable[str]) -> str:
    """``base``, or ``base`` with the smallest suffix that makes it a new name."""
    names = taken if isinstance(taken, (set, frozenset, dict)) else set(taken)
    name, count = base, 0
    while name in names:
        count += 1
        name = f"{base}_{count}"
    return name


def node_names(graph: GraphProto) -> list[str]:
    """A unique name for every node, in order: its own where it has one, else type and first output tensor."""
    taken = {node.name for node in graph.node if node.name}
    seen: set[str] = set()
    names = []
    for node in graph.node:
        name = node.name
        if not name:
            name = fresh(f"{node.op_type}_{next(filter(None, node.output), '')}", taken)
        elif name in seen:
            name = fresh(name, taken)
        seen.add(name)
        taken.add(name)
        names.append(name)
    return names


def captured(node: NodeProto) -> tuple[str, ...]:
    """Tensors of the enclosing graph that the node's subgraphs read, without repetition."""
    used: dict[str, None] = {}
    for graph in subgraphs(node):
        local = {entry.name for entry in (*graph.input, *graph.initializer)}
        for inner in graph.node:
            local.update(inner.output)
        for inner in graph.node:
            used.update(dict.fromkeys(t for t in (*inner.input, *captured(inner)) if t and t not in local))
        used.update(dict.fromkeys(entry.name for entry in graph.output if entry.name not in local))
    return tuple(used)


def constant_slots(graph: GraphProto) -> dict[str, Slot]:
    """Every constant of the main graph by tensor name (strings and sparse Constants excepted)."""
    slots: dict[str, Slot] = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and is_standard(node.domain) and node.output:
            for attribute in node.attribute:
                if attribute.name in _CONSTANT_ATTRIBUTES:
                    slots[node.output[0]] = attribute.t if attribute.name == "value" else attribute
    return slots


def read_slot(slot: Slot) -> AnyArray:
    """The value of a constant."""
    if isinstance(slot, TensorProto):
        return np.asarray(onnx.numpy_helper.to_array(slot))
    dtype = np.float32 if slot.type in (AttributeProto.FLOAT, AttributeProto.FLOATS) else np.int64
    return np.asarray(onnx.helper.get_attribute_value(slot), dtype=dtype)


def value_info(entry: onnx.ValueInfoProto) -> TensorInfo:
    """What a ValueInfoProto says about a tensor."""
    if not entry.type.HasField("tensor_type"):
        return TensorInfo(entry.name, None, None)
    kind = entry.type.tensor_type
    shape: Shape | None = None
    if kind.HasField("shape"):
        shape = tuple(
            int(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value >= 0 else None
            for dim in kind.shape.dim
        )
    return TensorInfo(entry.name, shape, numpy_dtype(kind.elem_type))


def infer_tensors(proto: onnx.ModelProto) -> dict[str, TensorInfo]:
    """Shapes and types of all tensors of the main graph, as far as ONNX shape inference finds them."""
    graph = proto.graph
    try:
        inferred = onnx.shape_inference.infer_shapes(
            _without_large_values(proto), check_type=False, strict_mode=False, data_prop=True
        ).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        logger.debug("shape inference failed, using the shapes that the model declares: %s", error)
        inferred = graph
    infos = {e.name: value_info(e) for e in (*inferred.value_info, *inferred.output, *inferred.input)}
    for name, slot in constant_slots(graph).items():
        if isinstance(slot, TensorProto):
            infos[name] = TensorInfo(name, tuple(int(dim) for dim in slot.dims), numpy_dtype(slot.data_type))
        else:
            value = read_slot(slot)
            infos[name] = TensorInfo(name, value.shape, value.dtype)
    return infos


def _without_large_values(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that keeps only the small tensors' values, which is all that shape inference looks at."""
    result = onnx.ModelProto(ir_version=proto.ir_version)
    result.opset_import.extend(proto.opset_import)
    source, target = proto.graph, result.graph
    target.name = source.name
    for field in ("input", "output", "value_info"):
        getattr(target, field).extend(getattr(source, field))
    for tensor in source.initializer:
        _append_small(target.initializer.add(), tensor)
    for node in source.node:
        copy = target.node.add()
        value = next((a for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        if node.op_type != "Constant" or value is None:
            copy.CopyFrom(node)
            continue
        copy.op_type = node.op_type
        copy.output.extend(node.output)
        attribute = copy.attribute.add(name="value", type=AttributeProto.TENSOR)
        _append_small(attribute.t, value.t)
    return result


def _append_small(target: TensorProto, source: TensorProto) -> None:
    size = stored_bytes(source)
    if size is None or size <= _INFERENCE_VALUE_LIMIT:
        target.CopyFrom(source)
    else:
        target.name, target.data_type = source.name, source.data_type
        target.dims.extend(source.dims)


def build_graph(
    proto: onnx.ModelProto,
    names: Sequence[str],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], AnyArray],
    where: str = "the model",
) -> Graph:
    """The networkx view of a model's main graph.

    Parameters
    ----------
    proto
        A model without local functions.
    names
        One unique name per ``proto.graph.node``.
    infos
        What is known of the tensors.
    read
        Reads a constant by tensor name; called lazily.
    where
        The model's name for messages.

    Raises
    ------
    ModelError
        A tensor is produced twice or by nobody, an attribute has no value, or the graph has a cycle.
    """
    source = proto.graph
    slots = constant_slots(source)
    translate = _Translator(proto, infos, where)
    taken = set(names)
    nodes: list[Node] = []

    def add_boundary(op: str, tensor: str, *, reads: bool = False) -> None:
        base = f"{tensor}/{op.lower()}" if reads or tensor in taken else tensor
        name = fresh(base, taken)
        taken.add(name)
        inputs, outputs = ((tensor,), ()) if reads else ((), (tensor,))
        nodes.append(Node(name, op, inputs, outputs, source_type=op))

    initializers = [tensor.name for tensor in source.initializer]
    inputs = [entry.name for entry in source.input if entry.name not in slots]
    for tensor in inputs:
        add_boundary("Parameter", tensor)
    for tensor in initializers:
        add_boundary("Constant", tensor)
    for name, node in zip(names, source.node, strict=True):
        nodes.append(translate(name, node))
    outputs = [entry.name for entry in source.output]
    for tensor in outputs:
        add_boundary("Result", tensor, reads=True)
    _check_tensors(nodes, where)
    try:
        return Graph(nodes, infos, {t: partial(read, t) for t in slots}, inputs, outputs)
    except ValueError as error:
        raise ModelError(f"{where} is damaged: {error}; export it again") from error


def _check_tensors(nodes: Sequence[Node], where: str) -> None:
    producers: dict[str, str] = {}
    for node in nodes:
        for tensor in filter(None, node.outputs):
            if tensor in producers:
                raise ModelError(
                    f"{where} is damaged: tensor {tensor!r} is produced by both {producers[tensor]!r} and "
                    f"{node.name!r}; export it again"
                )
            producers[tensor] = node.name
    for node in nodes:
        for tensor in filter(None, node.inputs):
            if tensor not in producers:
                raise ModelError(
                    f"{where} is damaged: nothing produces tensor {tensor!r}, read by {node.name!r}; "
                    "export it again"
                )


class _Translator:
    """Turns NodeProtos into canonical nodes; what it cannot vouch for stays opaque."""

    def __init__(self, proto: onnx.ModelProto, infos: Mapping[str, TensorInfo], where: str) -> None:
        self._where = where
        self._opset = max((e.version for e in proto.opset_import if is_standard(e.domain)), default=1)
        self._infos = infos

    def __call__(self, name: str, node: NodeProto) -> Node:
        inputs = tuple(node.input) + captured(node)
        translated = None
        if is_standard(node.domain):
            translated = self._canonical(node, self._attributes(name, node))
        if translated is None:
            domain = "ai.onnx" if is_standard(node.domain) else node.domain
            op = f"{domain}.{node.op_type}" if node.op_type in CANONICAL else node.op_type
            translated = (op, {})
        return Node(name, translated[0], inputs, tuple(node.output), translated[1], node.op_type)

    def _attributes(self, name: str, node: NodeProto) -> dict[str, object]:
        entries = [e for e in node.attribute if e.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS)]
        if any(entry.ref_attr_name or entry.type == AttributeProto.UNDEFINED for entry in entries):
            raise ModelError(
                f"{self._where} is damaged: an attribute of operator {name!r} has no value; export it again"
            )
        return {entry.name: onnx.helper.get_attribute_value(entry) for entry in entries}

    def _canonical(
        self, node: NodeProto, attributes: Mapping[str, object]
    ) -> tuple[str, dict[str, object]] | None:
        match node.op_type:
            case "Conv" | "ConvTranspose":
                return self._convolution(node, attributes)
            case "MatMul" | "Gemm":
                return "MatMul", {
                    "transpose_a": bool(attributes.get("transA", 0)),
                    "transpose_b": bool(attributes.get("transB", 0)),
                    "alpha": _float(attributes.get("alpha", 1.0)),
                    "beta": _float(attributes.get("beta", 1.0)),
                }
            case "BatchNormalization" if self._in_inference_mode(node, attributes):
                return "BatchNormalization", {"epsilon": _float(attributes.get("epsilon", 1e-5))}
            case "Add" | "Sub" | "Mul" | "Div" if "axis" not in attributes:
                words = {"Add": "Add", "Sub": "Subtract", "Mul": "Multiply", "Div": "Divide"}
                return words[node.op_type], {}
            case "Constant" if any(name in attributes for name in _CONSTANT_ATTRIBUTES):
                return "Constant", {}
            case "Identity" | "Reshape" | "Squeeze" | "Unsqueeze":
                return node.op_type, {}
            case "Cast":
                dtype = numpy_dtype(_integer(attributes.get("to")))
                return None if dtype is None else ("Convert", {"dtype": dtype})
            case "Transpose":
                return self._transpose(node, attributes)
            case "DequantizeLinear":
                return "DequantizeLinear", {
                    "axis": _integer(attributes.get("axis", 1)),
                    "block_size": _integer(attributes.get("block_size", 0)),
                }
        return None

    def _shape(self, tensor: str) -> Shape | None:
        info = self._infos.get(tensor)
        return None if info is None else info.shape

    def _convolution(
        self, node: NodeProto, attributes: Mapping[str, object]
    ) -> tuple[str, dict[str, object]] | None:
        transposed = node.op_type == "ConvTranspose"
        kernel = _integers(attributes.get("kernel_shape"))
        weight = self._shape(node.input[1]) if len(node.input) > 1 else None
        if weight is not None and len(weight) > 2 and None not in weight[2:]:
            kernel = tuple(size for size in weight[2:] if size is not None)
        mode = _PAD_MODES.get(_text(attributes.get("auto_pad", "NOTSET")))
        if not kernel or mode is None:
            return None
        rank = len(kernel)
        pads = _integers(attributes.get("pads")) or (0,) * (2 * rank)
        if mode != "explicit":
            pads = (0,) * (2 * rank)
        strides = _integers(attributes.get("strides")) or (1,) * rank
        dilations = _integers(attributes.get("dilations")) or (1,) * rank
        padding = _integers(attributes.get("output_padding")) or (0,) * rank
        size = _integers(attributes.get("output_shape"))
        if not len(pads) // 2 == len(strides) == len(dilations) == len(padding) == rank:
            return None
        geometry = ConvGeometry(
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            pads_begin=pads[:rank],
            pads_end=pads[rank:],
            groups=_integer(attributes.get("group", 1)),
            pad_mode=mode,
            transposed=transposed,
            output_padding=padding if transposed else (),
            output_size=size[-rank:] if transposed and size else None,
        )
        if transposed:
            return "ConvolutionTranspose", {"geometry": geometry, "weight_layout": "io"}
        return "Convolution", {"geometry": geometry, "weight_layout": "oi"}

    def _in_inference_mode(self, node: NodeProto, attributes: Mapping[str, object]) -> bool:
        """Whether a BatchNormalization uses its stored statistics (attributes differ by opset)."""
        if len(node.input) != 5 or attributes.get("training_mode", 0) or attributes.get("spatial", 1) != 1:
            return False
        if self._opset < 7 and not attributes.get("is_test", 0):
            return False
        return not any(node.output[1:])

    def _transpose(
        self, node: NodeProto, attributes: Mapping[str, object]
    ) -> tuple[str, dict[str, object]] | None:
        perm = _integers(attributes.get("perm"))
        shape = self._shape(node.input[0])
        if not perm and shape is None:
            return None
        return "Transpose", {"perm": perm or tuple(reversed(range(len(shape or ()))))}


def _integers(value: object) -> tuple[int, ...]:
    return tuple(int(entry) for entry in value) if isinstance(value, Sequence) else ()


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0


def _float(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
