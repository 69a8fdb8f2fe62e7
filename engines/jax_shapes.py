"""Rules of the differentiable engine: operators that move elements and compute none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.engines.jax_operation import Operand, Operation, Rule, static, static_axes

_PAD_MODES: dict[str, Literal["edge", "reflect", "symmetric"]] = {
    "edge": "edge",
    "reflect": "reflect",
    "symmetric": "symmetric",
}


def _integers(operand: Operand, what: str) -> list[int]:
    return [int(value) for value in static(operand, what).reshape(-1)]


def _reshape(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    """Reshape, Squeeze and Unsqueeze: OpenVINO has inferred the shape."""
    return jnp.reshape(operands[0], operation.shape)


def _transpose(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    order = _integers(operands[1], "order") if len(operands) > 1 else []
    return jnp.transpose(operands[0], order or None)


def _concat(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    dtype = operation.dtypes[0]
    return jnp.concatenate([jnp.asarray(part, dtype) for part in operands], operation.attributes["axis"])


def _split(operation: Operation, operands: Sequence[Operand]) -> list[jax.Array]:
    x = jnp.asarray(operands[0])
    (axis,) = static_axes(operands[1], x.ndim)
    edges = np.cumsum([0, *(shape[axis] for shape in operation.shapes)])
    return [lax.slice_in_dim(x, int(low), int(high), axis=axis) for low, high in pairwise(edges)]


def _slice(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    starts, stops, steps = (_integers(operand, "bounds") for operand in operands[1:4])
    axes = static_axes(operands[4], x.ndim) if len(operands) > 4 else tuple(range(len(starts)))
    window = [slice(None)] * x.ndim
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        window[axis] = _bounded(slice(start, stop, step), x.shape[axis])
    return x[tuple(window)]


def _bounded(window: slice, size: int) -> slice:
    """The same slice with bounds inside the axis."""
    start, stop, step = window.indices(size)
    return slice(start, None if stop < 0 else stop, step)


def _strided_slice(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    """NumPy's indexing; the masks say where a bound is ignored and where an entry is no slice at all."""
    x = jnp.asarray(operands[0])
    begins, ends = (_integers(operand, "bounds") for operand in operands[1:3])
    count = len(begins)
    strides = _integers(operands[3], "strides") if len(operands) > 3 else [1] * count
    begin_mask, end_mask, new, shrink, ellipsis = (
        [*operation.attributes[f"{name}_mask"], *[0] * count][:count]
        for name in ("begin", "end", "new_axis", "shrink_axis", "ellipsis")
    )
    taken = sum(not (new[i] or ellipsis[i]) for i in range(count))
    window: list[slice | int] = []
    for i in range(count):
        if ellipsis[i]:
            window += [slice(None)] * (x.ndim - taken)
        elif shrink[i] and not new[i]:
            window.append(0 if begin_mask[i] else begins[i])
        elif not new[i]:
            bounds = slice(None if begin_mask[i] else begins[i], None if end_mask[i] else ends[i], strides[i])
            window.append(_bounded(bounds, x.shape[len(window)]))
    return x[tuple(window)].reshape(operation.shape)


def _pad(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    widths = list(zip(_integers(operands[1], "padding"), _integers(operands[2], "padding"), strict=True))
    mode = operation.attributes["pad_mode"]
    if mode == "constant":
        value = operands[3] if len(operands) > 3 else 0
        return lax.pad(x, jnp.asarray(value, x.dtype).reshape(()), [(low, high, 0) for low, high in widths])
    if mode not in _PAD_MODES or min(min(pair) for pair in widths) < 0:
        raise NotImplementedError(f"mode {mode}")
    return jnp.pad(x, widths, mode=_PAD_MODES[mode])


def _gather(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    """Indices may be computed; negative ones count from the end and those out of range give zeros."""
    x, indices = jnp.asarray(operands[0]), jnp.asarray(operands[1])
    batch = operation.attributes.get("batch_dims", 0)
    if batch < 0:
        batch += indices.ndim
    (axis,) = static_axes(operands[2], x.ndim)
    size = x.shape[axis]
    indices = jnp.where(indices < 0, indices + size, indices)
    outside = (indices < 0) | (indices >= size)
    indices = jnp.where(outside, size, indices)

    def take(values: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take(values, places, axis=axis - batch, mode="fill", fill_value=0)

    for _ in range(batch):
        take = jax.vmap(take)
    return take(x, indices)


def _broadcast(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    mode = str(operation.attributes.get("mode", "numpy")).lower()
    if mode == "explicit":
        axes = static_axes(operands[2], len(operation.shape))
        return lax.broadcast_in_dim(x, operation.shape, axes)
    if mode not in ("numpy", "bidirectional"):
        raise NotImplementedError(f"mode {mode}")
    return jnp.broadcast_to(x, operation.shape)


def _tile(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return jnp.tile(operands[0], _integers(operands[1], "repeats"))


def _depth_to_space(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    block = operation.attributes["block_size"]
    batch, channels, *sizes = x.shape
    rank = len(sizes)
    depth = channels // block**rank
    places = (block,) * rank
    if operation.attributes["mode"] == "blocks_first":
        x = x.reshape(batch, *places, depth, *sizes)
        first, kept = 1, rank + 1
    else:
        x = x.reshape(batch, depth, *places, *sizes)
        first, kept = 2, 1
    order = [0, kept]
    for axis in range(rank):
        order += [rank + 2 + axis, first + axis]
    return x.transpose(order).reshape(operation.shape)


def _space_to_depth(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    block = operation.attributes["block_size"]
    batch, depth, *sizes = x.shape
    rank = len(sizes)
    split = [part for size in sizes for part in (size // block, block)]
    x = x.reshape(batch, depth, *split)
    blocks = [3 + 2 * axis for axis in range(rank)]
    outer = [2 + 2 * axis for axis in range(rank)]
    first = operation.attributes["mode"] == "blocks_first"
    order = [0, *blocks, 1, *outer] if first else [0, 1, *blocks, *outer]
    return x.transpose(order).reshape(operation.shape)


def _interpolate(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    """Resizing by the nearest element, or linearly without antialiasing, one axis after the other."""
    if operation.version not in ("opset4", "opset11"):
        raise NotImplementedError(operation.version)
    attributes = operation.attributes
    mode = str(attributes["mode"]).lower()
    linear = mode in ("linear", "linear_onnx")
    if not (linear or mode == "nearest") or attributes.get("antialias"):
        raise NotImplementedError(f"mode {mode}")
    if any(attributes.get("pads_begin", ())) or any(attributes.get("pads_end", ())):
        raise NotImplementedError("padding")
    x = jnp.asarray(operands[0])
    by_scale = str(attributes["shape_calculation_mode"]).lower() == "scales"
    axis_operand = 3 if operation.version == "opset4" else 2
    axes = (
        static_axes(operands[axis_operand], x.ndim) if len(operands) > axis_operand else tuple(range(x.ndim))
    )
    given = static(operands[2 if axis_operand == 3 else 1], "scales").reshape(-1)
    for axis, factor in zip(axes, given, strict=True):
        size, out = x.shape[axis], operation.shape[axis]
        if size == out:
            continue
        scale = np.float32(factor) if by_scale else np.float32(out) / np.float32(size)
        place = _source(str(attributes["coordinate_transformation_mode"]).lower(), size, out, scale)
        if not linear:
            x = jnp.take(x, _nearest(str(attributes["nearest_mode"]).lower(), place, size, scale), axis)
            continue
        if mode == "linear" and out < size:
            raise NotImplementedError("mode linear to a smaller size")
        place = np.clip(place, 0, size - 1)
        low = np.floor(place).astype(np.int32)
        high = np.minimum(low + 1, size - 1)
        share = (place - low).astype(np.float32)
        share = share.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        x = jnp.take(x, low, axis) * (1 - share) + jnp.take(x, high, axis) * share
    return x


def _source(mode: str, size: int, out: int, scale: np.float32) -> Float32:
    """Where in the input each element of the output lies along one axis."""
    index = np.arange(out, dtype=np.float32)
    half = np.float32(0.5)
    if mode == "asymmetric":
        return index / scale
    if mode == "align_corners":
        return index * np.float32(size - 1) / np.float32(max(out - 1, 1))
    if mode == "tf_half_pixel_for_nn":
        return (index + half) / scale
    if mode == "pytorch_half_pixel" and out == 1:
        return index * 0
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (index + half) / scale - half
    raise NotImplementedError(f"coordinates {mode}")


def _nearest(mode: str, place: Float32, size: int, scale: np.float32) -> AnyArray:
    """The element chosen for each place."""
    half = np.float32(0.5)
    if mode == "round_prefer_floor":
        chosen = np.ceil(place - half)
    elif mode == "round_prefer_ceil":
        chosen = np.floor(place + half)
    elif mode == "floor":
        chosen = np.floor(place)
    elif mode == "ceil":
        chosen = np.ceil(place)
    elif mode == "simple":
        chosen = np.ceil(place) if scale < 1 else np.floor(place)
    else:
        raise NotImplementedError(f"rounding {mode}")
    limited: AnyArray = np.clip(chosen, 0, size - 1).astype(np.int32)
    return limited


def _one_hot(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    indices, depth, on, off = operands
    axis = operation.attributes["axis"]
    places = jax.nn.one_hot(indices, _integers(depth, "depth")[0], dtype=np.bool_, axis=axis)
    dtype = operation.dtypes[0]
    return jnp.where(places, jnp.asarray(on, dtype), jnp.asarray(off, dtype))


def _shuffle_channels(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    axis, groups = operation.attributes["axis"] % x.ndim, operation.attributes["group"]
    before, size, after = prod(x.shape[:axis]), x.shape[axis], prod(x.shape[axis + 1 :])
    return x.reshape(before, groups, size // groups, after).swapaxes(1, 2).reshape(x.shape)


SHAPES: dict[str, Rule] = {
    "Broadcast": _broadcast,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Gather": _gather,
    "Interpolate": _interpolate,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Identity": _reshape,
    "Reshape": _reshape,
    "ShuffleChannels": _shuffle_channels,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _reshape,
    "StridedSlice": _strided_slice,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "VariadicSplit": _split,
}
