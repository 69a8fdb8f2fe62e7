"""Which weights of a model can be compressed, and why the others cannot.

A weight is a *layer* if writing it changes nothing but the operators that multiply with it: its constant is
reached through invertible chains only, nobody else reads it, and all its readers see the same matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np

from pot_sparsity.algorithms.arrays import ConvGeometry, Geometry, MatMulGeometry
from pot_sparsity.graph.chains import (
    Blocked,
    Chain,
    evaluate,
    invert,
    private,
    static_shape,
    to_stored_type,
    trace,
    value_readers,
)
from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.layers import Bias, Layer, LayerKind, Layout, Place
from pot_sparsity.graph.weights import to_matrix

LAYER_OPS: dict[str, LayerKind] = {
    "Convolution": "convolution",
    "ConvolutionTranspose": "convolution_transpose",
    "MatMul": "matmul",
}
_RECURRENT = "recurrent cells are not pruned"
_QUANTIZED = "its weight is quantized already: give the float model"
_OTHER_WEIGHTS = {
    **dict.fromkeys(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"), _RECURRENT),
    **dict.fromkeys(("LSTMSequence", "GRUSequence", "RNNSequence", "AUGRUCell", "AUGRUSequence"), _RECURRENT),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"), _QUANTIZED),
    **dict.fromkeys(("MatMulNBits", "QGemm", "BinaryConvolution"), _QUANTIZED),
    "DeformableConvolution": "deformable convolutions are not pruned",
    "DeformConv": "deformable convolutions are not pruned",
}
#: Types that the frontends give a canonical operator only where they can describe them fully.
_LAYER_TYPES = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Convolution", "GroupConvolution"}
    | {"ConvolutionBackpropData", "GroupConvolutionBackpropData"}
)
_QUANTIZERS = frozenset({"FakeQuantize", "QuantizeLinear", "FakeConvert"})


@dataclass(frozen=True)
class Skipped:
    """An operator with a weight that is left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Discovery:
    """Layers and operators left alone, each in topological order."""

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Candidate:
    """One operator with a readable weight: a layer with a single place."""

    layer: Layer
    chain: Chain
    port: int


class _NotALayerError(Exception):
    """Raised inside this module with the reason why an operator is left alone."""


def find_layers(graph: Graph) -> Discovery:
    """Find every Convolution, ConvolutionTranspose and MatMul whose constant operand can be rewritten."""
    fixed = _fixed_tensors(graph)
    candidates: dict[str, list[_Candidate]] = {}
    skipped: dict[str, str] = {}
    for node in graph:
        if node.op in LAYER_OPS:
            try:
                candidate = _candidate(graph, node, fixed)
            except _NotALayerError as reason:
                skipped[node.name] = str(reason)
            else:
                candidates.setdefault(candidate.chain.constant, []).append(candidate)
        elif node.op in _OTHER_WEIGHTS:
            skipped[node.name] = _OTHER_WEIGHTS[node.op]
        elif node.source_type in _LAYER_TYPES:
            skipped[node.name] = "the shape of its weight or the geometry is not known before run time"
    layers = []
    for group in candidates.values():
        try:
            layers.append(_merge(graph, group))
        except _NotALayerError as reason:
            skipped.update((candidate.layer.name, str(reason)) for candidate in group)
    return Discovery(
        tuple(layers), tuple(Skipped(node.name, skipped[node.name]) for node in graph if node.name in skipped)
    )


def per_channel(shape: Sequence[int], core: Sequence[int], rank: int | None) -> bool:
    """Whether a constant of ``shape`` broadcasts against a tensor as one value per channel.

    ``core`` is the shape such a constant has without leading ones, e.g. ``(C, 1, 1)``; ``rank`` the tensor's.
    """
    fits = len(shape) <= (len(core) if rank is None else rank)
    return fits and _without_leading_ones(shape) == _without_leading_ones(core)


def channel_core(geometry: Geometry, groups: int, rows: int, channel_axis: int) -> tuple[int, ...]:
    """Shape, without leading ones, of a constant that holds one value per output channel of a layer."""
    if isinstance(geometry, ConvGeometry):
        return (groups * rows, *(1 for _ in geometry.kernel))
    inner = (rows,) if channel_axis == -1 else (rows, 1)
    if groups == 1:
        return inner
    return (groups, 1, rows) if channel_axis == -1 else (groups, rows, 1)


def own_bias_core(node: Node, core: tuple[int, ...]) -> tuple[int, ...]:
    """Like ``core``, for the operator's own third input: a convolution takes ``[C]``, a Gemm broadcasts."""
    return core if node.op == "MatMul" else core[:1]


def _without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


def _fixed_tensors(graph: Graph) -> frozenset[str]:
    """Tensors that do not depend on the model's inputs."""
    fixed: set[str] = set()
    for node in graph:
        inputs = [tensor for tensor in node.inputs if tensor]
        if node.op == "Constant" or (inputs and all(tensor in fixed for tensor in inputs)):
            fixed.update(node.outputs)
    return frozenset(fixed)


def _candidate(graph: Graph, node: Node, fixed: frozenset[str]) -> _Candidate:
    if node.op == "MatMul":
        return _matmul(graph, node, fixed)
    return _convolution(graph, node, fixed)


def _convolution(graph: Graph, node: Node, fixed: frozenset[str]) -> _Candidate:
    if node.inputs[0] in fixed:
        raise _NotALayerError("both operands are constants")
    chain, shape = _weight(graph, node.inputs[1], fixed)
    geometry = cast("ConvGeometry", node.attrs["geometry"])
    layout = cast("Layout", node.attrs["weight_layout"])
    groups = geometry.groups
    match layout:
        case "oi":
            rows, inputs = shape[0] // groups, shape[1]
        case "io":
            rows, inputs = shape[1], shape[0] // groups
        case "goi":
            rows, inputs = shape[1], shape[2]
        case "gio":
            rows, inputs = shape[2], shape[1]
    return _make(
        graph, node, 1, chain, shape, geometry, (groups, rows, inputs * prod(geometry.kernel)), layout, 1
    )


def _matmul(graph: Graph, node: Node, fixed: frozenset[str]) -> _Candidate:
    constant_ports = [port for port in (0, 1) if node.inputs[port] in fixed]
    if len(constant_ports) != 1:
        raise _NotALayerError(
            "both operands are constants" if constant_ports else "both operands are computed"
        )
    port = constant_ports[0]
    chain, shape = _weight(graph, node.inputs[port], fixed)
    if len(shape) < 2:
        raise _NotALayerError("its constant is a vector")
    activation = graph.tensor(node.inputs[1 - port]).shape
    groups = prod(shape[:-2])
    if len(shape) > 3 and groups > 1:
        raise _NotALayerError(f"its constant has {len(shape)} axes, at most 3 are supported")
    flipped = bool(node.attrs.get("transpose_a" if port == 1 else "transpose_b", False))
    if (port == 0 or flipped) and (activation is None or len(activation) < 2):
        if activation is None:
            raise _NotALayerError("the rank of its input is not known")
        if port == 0:
            raise _NotALayerError("it multiplies a matrix with a vector from the right")
        flipped = False  # a transpose does nothing to a vector
    if groups > 1 and (activation is None or len(activation) < 3 or activation[-3] != groups):
        raise _NotALayerError(
            "its input is not a stack of as many matrices as its constant, with a known size"
        )
    contracted_last = flipped if port == 0 else not flipped
    geometry = MatMulGeometry(feature_axis=-1 if contracted_last else -2, groups=groups)
    # Right operand [in, out] unless transposed, left operand [out, in] unless transposed.
    transposed = bool(node.attrs.get("transpose_b" if port == 1 else "transpose_a", False))
    outputs_first = transposed if port == 1 else not transposed
    rows, cols = (shape[-2], shape[-1]) if outputs_first else (shape[-1], shape[-2])
    inner: Layout = "oi" if outputs_first else "io"
    stacked: Layout = "goi" if outputs_first else "gio"
    return _make(
        graph,
        node,
        port,
        chain,
        shape,
        geometry,
        (groups, rows, cols),
        stacked if groups > 1 else inner,
        -1 if port == 1 else -2,
    )


def _weight(graph: Graph, tensor: str, fixed: frozenset[str]) -> tuple[Chain, tuple[int, ...]]:
    """Chain behind a weight operand and the operand's shape."""
    chain = trace(graph, tensor)
    if isinstance(chain, Blocked):
        where = f"{chain.node.op} ({chain.node.name})" if chain.node else "an unknown source"
        if tensor not in fixed:
            raise _NotALayerError("its weight is no constant: it depends on the model's inputs")
        if chain.node and chain.node.op in _QUANTIZERS:
            raise _NotALayerError(f"its weight goes through {where}: give the float model")
        raise _NotALayerError(f"its weight comes out of {where}, not straight from a constant")
    shape = static_shape(graph, tensor)
    if shape is None or 0 in shape:
        raise _NotALayerError("its weight is empty or its shape is not known")
    stored = graph.tensor(chain.constant).dtype or graph.value(chain.constant).dtype
    if np.issubdtype(stored, np.integer) and stored.kind in "iu":
        if "DequantizeLinear" not in chain.ops and "Convert" not in chain.ops:
            raise _NotALayerError(f"its weight is {stored}, not float")
        _check_zero(graph, chain, shape)
    elif not np.issubdtype(stored, np.floating):
        raise _NotALayerError(f"its weight is stored as {stored}, which is not supported")
    operand = graph.tensor(tensor).dtype
    if operand is not None and not np.issubdtype(operand, np.floating):
        raise _NotALayerError(f"its weight is {operand}, not float")
    return chain, shape


def _check_zero(graph: Graph, chain: Chain, shape: tuple[int, ...]) -> None:
    """A weight of zero must be stored exactly: its zero point is an integer within the stored type."""
    dtype = graph.value(chain.constant).dtype
    stored = to_stored_type(invert(graph, chain, np.zeros(shape)), dtype)
    if np.any(evaluate(graph, chain, stored)):
        raise _NotALayerError(
            f"zero cannot be stored exactly in its {dtype} weight: the zero point is no such integer"
        )


def _make(
    graph: Graph,
    node: Node,
    port: int,
    chain: Chain,
    shape: tuple[int, ...],
    geometry: Geometry,
    size: tuple[int, int, int],
    layout: Layout,
    channel_axis: int,
) -> _Candidate:
    groups, rows, cols = size
    kind = LAYER_OPS[node.op]
    scale = cast("float", node.attrs.get("alpha", 1.0))
    if scale == 0:
        raise _NotALayerError("its alpha is zero")
    core = channel_core(geometry, groups, rows, channel_axis)
    bias, output = _bias(graph, node, core)
    place = Place(node.name, node.inputs[1 - port], output, geometry, bias, channel_axis)
    layer = Layer(
        name=node.name,
        kind=kind,
        constant=chain.constant,
        chain=chain.names,
        places=(place,),
        shape=shape,
        groups=groups,
        rows=rows,
        cols=cols,
        layout=layout,
        scale=scale,
    )
    return _Candidate(layer, chain, port)


def _bias(graph: Graph, node: Node, core: tuple[int, ...]) -> tuple[Bias | None, str]:
    """The bias that may be rewritten, and the tensor after it."""
    output = node.output
    rank = None if (shape := graph.tensor(output).shape) is None else len(shape)
    if len(node.inputs) > 2 and node.inputs[2]:
        beta = cast("float", node.attrs.get("beta", 1.0))
        return _usable_bias(graph, node.inputs[2], own_bias_core(node, core), rank, beta), output
    consumers = value_readers(graph, output)
    if output in graph.outputs or len(consumers) != 1:
        return None, output
    after, port = consumers[0]
    if after.op == "Add" or (after.op == "Subtract" and port == 0):
        bias = _usable_bias(
            graph, after.inputs[1 - port], core, rank, -1.0 if after.op == "Subtract" else 1.0
        )
        if bias is not None:
            return bias, after.output
    return None, output


def _usable_bias(
    graph: Graph, tensor: str, core: tuple[int, ...], rank: int | None, scale: float
) -> Bias | None:
    chain = trace(graph, tensor)
    shape = static_shape(graph, tensor)
    if isinstance(chain, Blocked) or shape is None or scale == 0:
        return None
    if not per_channel(shape, core, rank) or not private(graph, chain):
        return None
    return Bias(chain.constant, shape, scale, chain.names)


def _merge(graph: Graph, group: list[_Candidate]) -> Layer:
    """One layer out of all operators that use a constant as a weight."""
    first = group[0]
    _check_readers(graph, group)
    if len(group) > 1:
        positions = _positions(graph, first)
        for other in group[1:]:
            same = other.layer.kind == first.layer.kind and other.layer.scale == first.layer.scale
            if not same or not np.array_equal(_positions(graph, other), positions):
                raise _NotALayerError(
                    f"{first.layer.name!r} and {other.layer.name!r} use one weight in different ways"
                )
    layer = first.layer
    return Layer(**{**vars(layer), "places": tuple(candidate.layer.places[0] for candidate in group)})


def _positions(graph: Graph, candidate: _Candidate) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The weight matrix as seen when every stored element holds its own position: tells views apart."""
    stored = static_shape(graph, candidate.chain.constant) or ()
    marks = np.arange(1.0, prod(stored) + 1).reshape(stored)
    return to_matrix(candidate.layer, evaluate(graph, candidate.chain, marks, rounding=False))


def _check_readers(graph: Graph, group: list[_Candidate]) -> None:
    """Everything that sees the constant's values must be one of the group's operators."""
    allowed = {(candidate.layer.name, candidate.port) for candidate in group}
    links = {(link.node.name, link.port) for candidate in group for link in candidate.chain.links}
    for tensor in {tensor: None for candidate in group for tensor in candidate.chain.tensors}:
        if tensor in graph.outputs:
            raise _NotALayerError("its weight is an output of the model as well")
        for node, port in value_readers(graph, tensor):
            if (node.name, port) not in allowed | links:
                raise _NotALayerError(
                    f"its weight is also read by {node.op} ({node.name}), which pruning would change"
                )
