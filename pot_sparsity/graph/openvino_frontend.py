"""From an OpenVINO model to the canonical graph.

An operator that cannot be described exactly (a convolution whose weight has no static shape, a Transpose
whose order is computed) keeps its own type name with ``*`` behind it, so that nothing takes it for canonical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import openvino as ov

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry, PadMode
from pot_sparsity.graph.graph import Graph, Node, Shape, TensorInfo
from pot_sparsity.graph.openvino_nodes import NamedModel, dtype_of, read_constant

#: Input ports of the operator that stand for ports 0, 1... of the canonical one, where they differ.
_PORTS = {("BatchNormInference", "opset1"): (2, 0, 1, 3, 4)}
_ELEMENTWISE = frozenset({"Add", "Subtract", "Multiply", "Divide"})
_PLAIN = frozenset({"Parameter", "Result", "Constant", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_PAD_MODES: dict[str, PadMode] = {
    "explicit": "explicit",
    "notset": "explicit",
    "same_upper": "same_upper",
    "same_lower": "same_lower",
    "valid": "valid",
}
_CONVOLUTIONS = {
    "Convolution": "oi",
    "GroupConvolution": "goi",
    "ConvolutionBackpropData": "io",
    "GroupConvolutionBackpropData": "gio",
}


def build_graph(named: NamedModel) -> Graph:
    """The graph of a model; constants are read through it later, so it follows rewritten values."""
    nodes: list[Node] = []
    tensors: dict[str, TensorInfo] = {}
    values: dict[str, Callable[[], AnyArray]] = {}
    for name, op in named:
        node = describe(named, name, op)
        nodes.append(node)
        for tensor in node.outputs:
            output = named.output(tensor)
            dtype = dtype_of(output.get_element_type())
            tensors[tensor] = TensorInfo(tensor, shape_of(output.get_partial_shape()), dtype)
            if node.op == "Constant" and dtype is not None:
                values[tensor] = partial(_value, named, tensor)
    return Graph(
        nodes,
        tensors,
        values,
        inputs=[named.tensor(op.output(0)) for op in named.model.get_parameters()],
        outputs=[named.tensor(op.input_value(0)) for op in named.model.get_results()],
    )


def source_port(op: ov.Node, port: int) -> int:
    """The operator's own input port that stands for a port of the canonical node."""
    order = _PORTS.get((op.get_type_name(), op.get_type_info().version_id))
    return port if order is None else order[port]


def shape_of(shape: ov.PartialShape) -> Shape | None:
    """Dimensions, None where they are dynamic; None for an unknown rank."""
    if shape.rank.is_dynamic:
        return None
    return tuple(int(dim.get_length()) if dim.is_static else None for dim in shape)


def _value(named: NamedModel, tensor: str) -> AnyArray:
    return read_constant(named.output(tensor).get_node())


def describe(named: NamedModel, name: str, op: ov.Node) -> Node:
    """One operator as a node of the graph."""
    kind = str(op.get_type_name())
    canonical, attrs = _canonical(op, kind)
    inputs = [named.tensor(value) for value in op.input_values()]
    if canonical == "BatchNormalization":
        inputs = [inputs[source_port(op, port)] for port in range(len(inputs))]
    return Node(name, canonical, tuple(inputs), named.tensors(op), attrs, source_type=kind)


def _canonical(op: ov.Node, kind: str) -> tuple[str, dict[str, object]]:
    """Canonical operator and attributes, or the type's own name (with ``*`` where it would be mistaken)."""
    found: tuple[str, dict[str, object]] | None = None
    if kind in _PLAIN:
        found = kind, {}
    elif kind in _ELEMENTWISE:
        found = (
            (kind, {}) if op.get_attributes().get("auto_broadcast", "numpy") in ("numpy", "none") else None
        )
    elif kind in _CONVOLUTIONS:
        found = _convolution(op, kind)
    elif kind == "MatMul":
        given = op.get_attributes()
        flags = {key: bool(given[key]) for key in ("transpose_a", "transpose_b")}
        found = kind, {**flags, "alpha": 1.0, "beta": 1.0}
    elif kind == "BatchNormInference":
        found = "BatchNormalization", {"epsilon": float(op.get_attributes()["epsilon"])}
    elif kind == "Clamp":
        given = op.get_attributes()
        found = kind, {key: float(given[key]) for key in ("min", "max")}
    elif kind == "Convert":
        dtype = dtype_of(op.get_element_type())
        found = (kind, {"dtype": dtype}) if dtype is not None else None
    elif kind == "Transpose":
        found = _transpose(op)
    else:
        return (f"{kind}*" if kind in _CANONICAL else kind), {}
    return found if found is not None else (f"{kind}*", {})


#: Canonical names that OpenVINO could use for something else.
_CANONICAL = frozenset({"ConvolutionTranspose", "BatchNormalization", "DequantizeLinear"})


def _transpose(op: ov.Node) -> tuple[str, dict[str, object]] | None:
    order = op.input_value(1).get_node()
    if order.get_type_name() != "Constant":
        return None
    perm = tuple(int(axis) for axis in read_constant(order).astype(np.int64).ravel())
    rank = op.get_output_partial_shape(0).rank
    if not perm and rank.is_static:
        perm = tuple(reversed(range(rank.get_length())))
    return "Transpose", {"perm": perm}


def _convolution(op: ov.Node, kind: str) -> tuple[str, dict[str, object]] | None:
    layout = _CONVOLUTIONS[kind]
    weight = shape_of(op.get_input_partial_shape(1))
    grouped = len(layout) == 3
    if weight is None or None in weight or len(weight) < len(layout) + 1:
        return None
    dims = [int(dim) for dim in weight if dim is not None]
    groups = dims[0] if grouped else 1
    kernel = tuple(dims[len(layout) :])
    given = op.get_attributes()
    strides, dilations, begin, end = (
        tuple(int(v) for v in given[key]) for key in ("strides", "dilations", "pads_begin", "pads_end")
    )
    pad_mode = _PAD_MODES[str(given["auto_pad"]).lower()]
    geometry: ConvGeometry | None = ConvGeometry(kernel, strides, dilations, begin, end, groups, pad_mode)
    name = "Convolution"
    if "io" in layout:
        name = "ConvolutionTranspose"
        geometry = _transposed(op, kernel, strides, dilations, begin, end, groups)
    return None if geometry is None else (name, {"geometry": geometry, "weight_layout": layout})


def _transposed(
    op: ov.Node,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    begin: tuple[int, ...],
    end: tuple[int, ...],
    groups: int,
) -> ConvGeometry | None:
    """Geometry of a transposed convolution with explicit pads.

    OpenVINO's rules for a requested output shape are its own: with ``explicit`` and ``valid`` the pads at the
    beginning stay what they are, with ``same_*`` they are computed (odd elements on the other side than ONNX
    puts them) and stand in the attributes once shapes are inferred. So where sizes are known, the pads at the
    end are what is left; where they are not, there is no exact description.
    """
    given = op.get_attributes()
    extra = tuple(int(v) for v in given.get("output_padding", ())) or (0,) * len(kernel)
    if op.get_input_size() > 2:
        sizes = _fixed(shape_of(op.get_input_partial_shape(0)))
        wanted = _fixed(shape_of(op.get_output_partial_shape(0)))
        if sizes is None or wanted is None:
            return None
        left = [
            stride * (size - 1) + dilation * (k - 1) + 1 - pad - out
            for k, stride, dilation, pad, size, out in zip(
                kernel, strides, dilations, begin, sizes, wanted, strict=True
            )
        ]
        end = tuple(max(rest, 0) for rest in left)
        extra = tuple(max(-rest, 0) for rest in left)
    return ConvGeometry(
        kernel, strides, dilations, begin, end, groups, "explicit", transposed=True, output_padding=extra
    )


def _fixed(shape: Shape | None) -> Sequence[int] | None:
    """Spatial sizes, if all are known."""
    if shape is None:
        return None
    sizes = [dim for dim in shape[2:] if dim is not None]
    return sizes if len(sizes) == len(shape) - 2 else None
