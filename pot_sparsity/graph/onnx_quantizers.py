"""Fake quantizers and integer weights in ONNX models, in operators that every runtime of opset 13 knows.

An activation of 256 levels is a QuantizeLinear and a DequantizeLinear on uint8. One of fewer levels is clipped to its
range first, so that only so many of the 256 integers occur.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.graph import TensorInfo
from pot_sparsity.graph.onnx_edits import Editor
from pot_sparsity.graph.onnx_frontend import fresh, is_standard

#: The first opset whose DequantizeLinear knows one scale per channel.
_OPSET = 13
_ALL_LEVELS = 256


def check_opset(proto: onnx.ModelProto) -> None:
    """ModelError where the model's opset is too old for what this module writes."""
    opset = max((entry.version for entry in proto.opset_import if is_standard(entry.domain)), default=1)
    if opset < _OPSET:
        raise ModelError(
            f"few-bit layers need ONNX opset {_OPSET} or later and the model has {opset}: export it again"
        )


def insert_quantizer(
    editor: Editor, tensor: str, readers: Sequence[tuple[str, int]], grid: ActivationGrid
) -> str:
    """Put Clip (below 256 levels), QuantizeLinear and DequantizeLinear between a tensor and its readers."""
    name = f"{tensor}/to_{grid.levels}_levels"
    scale = editor.add_constant(f"{name}/scale", np.array(grid.scale, np.float32))
    zero = editor.add_constant(f"{name}/zero_point", np.array(grid.zero_point, np.uint8))
    source = tensor
    if grid.levels < _ALL_LEVELS:
        bounds = [
            editor.add_constant(f"{name}/{word}", np.array(value, np.float32))
            for word, value in (("low", grid.low), ("high", grid.high))
        ]
        source = _insert(editor, "Clip", [tensor, *bounds], tensor, f"{name}/clip", np.dtype(np.float32))
    quantized = _insert(
        editor, "QuantizeLinear", [source, scale, zero], tensor, f"{name}/quantize", np.dtype(np.uint8)
    )
    result = _insert(
        editor,
        "DequantizeLinear",
        [quantized, scale, zero],
        tensor,
        f"{name}/dequantize",
        np.dtype(np.float32),
    )
    for node, port in readers:
        editor.set_input(node, port, result)
    return result


def store_integers(editor: Editor, node: str, port: int, integers: AnyArray, scale: AnyArray) -> str:
    """Connect int8 weights through a DequantizeLinear with one scale per channel."""
    shape = tuple(np.broadcast_shapes(scale.shape, integers.shape))
    long = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if shape != integers.shape or scale.ndim != integers.ndim or len(long) > 1:
        raise ValueError(f"operand {port} of {node!r}: no single axis of {shape} has scales {scale.shape}")
    base = f"{editor.node(node).input[port]}/int8"
    constant = editor.add_constant(base, np.ascontiguousarray(integers, np.int8))
    scales = np.ascontiguousarray(scale, np.float32).reshape(-1 if long else ())
    factor = editor.add_constant(f"{base}/scale", scales)
    output = _insert(
        editor,
        "DequantizeLinear",
        [constant, factor],
        constant,
        f"{base}/dequantize",
        np.dtype(np.float32),
        axis=long[0] if long else None,
    )
    editor.set_input(node, port, output)
    return constant


def _insert(
    editor: Editor,
    op: str,
    inputs: Sequence[str],
    like: str,
    base: str,
    dtype: np.dtype[np.generic],
    axis: int | None = None,
) -> str:
    """Add an operator right behind what it reads; returns its output, which has the shape of ``like``."""
    output = editor.fresh_tensor(base)
    name = fresh(base, editor.names)
    made = onnx.helper.make_node(op, list(inputs), [output], name=name, axis=axis)
    graph = editor.proto.graph
    position = next((i + 1 for i, node in enumerate(graph.node) if inputs[0] in node.output), 0)
    graph.node.insert(position, made)
    editor.names.insert(position, name)
    info = editor.infos.get(like)
    editor.infos[output] = TensorInfo(output, None if info is None else info.shape, dtype)
    return output
