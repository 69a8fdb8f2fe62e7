"""Rules of the differentiable engine: convolutions and pools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from itertools import product
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.engines.jax_operation import Operand, Operation, Rule, static

_Sizes: TypeAlias = tuple[int, ...]
#: Pools with at most this many elements per window are computed from shifted slices, which XLA fuses.
_SLICED_WINDOW = 16
#: The same for convolutions with one input channel per group, where XLA's own are slow on a CPU.
_SLICED_DEPTHWISE = 64


def _span(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Extent of a dilated kernel along each axis."""
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


def _begin(operation: Operation, sizes: Sequence[int], span: Sequence[int]) -> list[int]:
    """Padding in front of each spatial axis."""
    mode = operation.attributes.get("auto_pad", "explicit")
    if mode == "valid":
        return [0] * len(sizes)
    if mode not in ("same_upper", "same_lower"):
        return [int(pad) for pad in operation.attributes["pads_begin"]]
    begin = []
    for size, out, extent, stride in zip(
        sizes, operation.shape[2:], span, operation.attributes["strides"], strict=True
    ):
        total = max(0, (out - 1) * stride + extent - size)
        begin.append(total // 2 if mode == "same_upper" else total - total // 2)
    return begin


def _padding(
    operation: Operation, sizes: Sequence[int], kernel: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and behind each spatial axis that leads to exactly the output's size."""
    span = _span(kernel, dilations)
    begin = _begin(operation, sizes, span)
    strides = operation.attributes["strides"]
    return [
        (lead, max(0, (out - 1) * stride + extent - size - lead))
        for lead, out, stride, extent, size in zip(
            begin, operation.shape[2:], strides, span, sizes, strict=True
        )
    ]


def _convolve(operation: Operation, x: Operand, weight: Operand, groups: int) -> jax.Array:
    dilations = operation.attributes["dilations"]
    kernel = weight.shape[2:]
    padding = _padding(operation, x.shape[2:], kernel, dilations)
    if groups == 1 and prod(kernel) == 1:
        padded = jnp.pad(jnp.asarray(x), [(0, 0), (0, 0), *padding])
        steps = tuple(slice(None, None, stride) for stride in operation.attributes["strides"])
        seen = padded[(slice(None), slice(None), *steps)]
        return _pointwise(seen, jnp.asarray(weight).reshape(weight.shape[:2]))
    return lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(weight),
        window_strides=operation.attributes["strides"],
        padding=padding,
        rhs_dilation=dilations,
        feature_group_count=groups,
    )


def _pointwise(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A 1 x 1 convolution as a product of matrices, whose derivatives XLA computes faster than a convolution's."""
    return jnp.einsum("bc...,oc->bo...", x, weight)


def _convolution(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return _convolve(operation, operands[0], operands[1], 1)


def _group_convolution(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x, weight = operands
    groups, rows, columns, *kernel = weight.shape
    if columns == 1 and prod(kernel) <= _SLICED_DEPTHWISE:
        return _depthwise(operation, jnp.asarray(x), jnp.asarray(weight).reshape(groups * rows, *kernel))
    return _convolve(operation, x, weight.reshape(groups * rows, columns, *kernel), groups)


def _depthwise(operation: Operation, x: jax.Array, weight: jax.Array) -> jax.Array:
    """``weight [channels, *kernel]``: a sum over the kernel, an order of magnitude faster than XLA's own."""
    attributes = operation.attributes
    strides, dilations = tuple(attributes["strides"]), tuple(attributes["dilations"])
    padding = _padding(operation, x.shape[2:], weight.shape[1:], dilations)
    x = jnp.repeat(x, weight.shape[0] // x.shape[1], axis=1)
    padded = jnp.pad(x, ((0, 0), (0, 0), *padding))
    return _channelwise(padded, weight, operation.shape[2:], strides, dilations)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _channelwise(
    padded: jax.Array, weight: jax.Array, sizes: _Sizes, strides: _Sizes, dilations: _Sizes
) -> jax.Array:
    """Each channel of the padded input correlated with its own kernel.

    The gradient is written out: that of a slice is a padded array, which XLA would make for every position.
    """
    kernel = weight.shape[1:]
    result = jnp.zeros((*padded.shape[:2], *sizes), padded.dtype)
    for position, window in _taps(sizes, kernel, strides, dilations):
        factor = weight[(slice(None), *position)].reshape(-1, *(1,) * len(kernel))
        result = result + padded[window] * factor
    return result


def _channelwise_forward(
    padded: jax.Array, weight: jax.Array, sizes: _Sizes, strides: _Sizes, dilations: _Sizes
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _channelwise(padded, weight, sizes, strides, dilations), (padded, weight)


def _channelwise_backward(
    sizes: _Sizes,
    strides: _Sizes,
    dilations: _Sizes,
    saved: tuple[jax.Array, jax.Array],
    slope: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    padded, weight = saved
    kernel = weight.shape[1:]
    summed = (0, *range(2, padded.ndim))
    parts = [
        jnp.sum(padded[window] * slope, summed) for _, window in _taps(sizes, kernel, strides, dilations)
    ]
    span = _span(kernel, dilations)
    margins = [
        (extent - 1, size - (out - 1) * stride - 1, stride - 1)
        for extent, size, out, stride in zip(span, padded.shape[2:], sizes, strides, strict=True)
    ]
    spread = lax.pad(slope, jnp.zeros((), slope.dtype), [(0, 0, 0), (0, 0, 0), *margins])
    flipped = jnp.flip(weight, tuple(range(1, weight.ndim)))
    back = _channelwise(spread, flipped, padded.shape[2:], (1,) * len(kernel), dilations)
    return back, jnp.stack(parts, axis=1).reshape(weight.shape)


_channelwise.defvjp(_channelwise_forward, _channelwise_backward)


def _taps(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Each position in the kernel, with the part of the padded input that it meets."""
    axes = list(zip(dilations, sizes, strides, strict=True))
    for position in product(*(range(size) for size in kernel)):
        window = [
            slice(step * dilation, step * dilation + (out - 1) * stride + 1, stride)
            for step, (dilation, out, stride) in zip(position, axes, strict=True)
        ]
        yield position, (slice(None), slice(None), *window)


def _transposed(operation: Operation, x: Operand, weight: Operand) -> jax.Array:
    """``weight [groups, in, out, *kernel]``: the gradient of a convolution, as a dilated convolution."""
    groups, _, rows, *kernel = weight.shape
    strides = operation.attributes["strides"]
    dilations = operation.attributes["dilations"]
    mode = operation.attributes.get("auto_pad", "explicit")
    span = _span(kernel, dilations)
    extra = operation.attributes.get("output_padding") or [0] * len(kernel)
    padding = []
    for axis, (size, out, extent, stride) in enumerate(
        zip(x.shape[2:], operation.shape[2:], span, strides, strict=True)
    ):
        full = (size - 1) * stride + extent
        if mode in ("same_upper", "same_lower"):
            total = max(0, full + extra[axis] - out)
            cut = total // 2 if mode == "same_lower" else total - total // 2
        else:
            cut = 0 if mode == "valid" else operation.attributes["pads_begin"][axis]
        lead = extent - 1 - cut
        padding.append((lead, out - 1 + extent - lead - ((size - 1) * stride + 1)))
    flipped = jnp.flip(jnp.asarray(weight), tuple(range(3, weight.ndim))).swapaxes(1, 2)
    return lax.conv_general_dilated(
        jnp.asarray(x),
        flipped.reshape(groups * rows, -1, *kernel),
        window_strides=[1] * len(kernel),
        padding=padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=groups,
    )


def _convolution_transpose(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return _transposed(operation, operands[0], operands[1][None])


def _group_convolution_transpose(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return _transposed(operation, operands[0], operands[1])


def _slide(
    operation: Operation,
    x: jax.Array,
    empty: float,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Every window of ``x`` combined, with ``empty`` in the padding."""
    kernel = operation.attributes["kernel"]
    strides = operation.attributes["strides"]
    dilations = operation.attributes.get("dilations") or [1] * len(kernel)
    padding = _padding(operation, x.shape[2:], kernel, dilations)
    lead = (1, 1)
    if prod(kernel) > _SLICED_WINDOW:
        result: jax.Array = lax.reduce_window(
            x,
            np.float32(empty),
            combine,
            (*lead, *kernel),
            (*lead, *strides),
            ((0, 0), (0, 0), *padding),
            window_dilation=(*lead, *dilations),
        )
        return result
    padded = jnp.pad(x, ((0, 0), (0, 0), *padding), constant_values=empty)
    return reduce(
        combine, (padded[window] for _, window in _taps(operation.shape[2:], kernel, strides, dilations))
    )


def _max_pool(operation: Operation, operands: Sequence[Operand]) -> list[jax.Array]:
    """Only the maxima: nobody may read their indices."""
    x, attributes = jnp.asarray(operands[0]), operation.attributes
    kernel, strides = tuple(attributes["kernel"]), tuple(attributes["strides"])
    dilations = tuple(attributes.get("dilations") or [1] * len(kernel))
    if prod(kernel) > _SLICED_WINDOW and max(dilations) == 1:
        return [_slide(operation, x, -np.inf, lax.max)]  # whose derivative XLA knows without dilation only
    padding = _padding(operation, x.shape[2:], kernel, dilations)
    padded = jnp.pad(x, ((0, 0), (0, 0), *padding), constant_values=-np.inf)
    return [_peaks(padded, tuple(operation.shape[2:]), kernel, strides, dilations)]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _peaks(padded: jax.Array, sizes: _Sizes, kernel: _Sizes, strides: _Sizes, dilations: _Sizes) -> jax.Array:
    """The largest value of each window; its gradient goes to all that have it, in equal shares."""
    return reduce(lax.max, (padded[window] for _, window in _taps(sizes, kernel, strides, dilations)))


def _peaks_forward(
    padded: jax.Array, sizes: _Sizes, kernel: _Sizes, strides: _Sizes, dilations: _Sizes
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    found = _peaks(padded, sizes, kernel, strides, dilations)
    return found, (padded, found)


def _peaks_backward(
    sizes: _Sizes,
    kernel: _Sizes,
    strides: _Sizes,
    dilations: _Sizes,
    saved: tuple[jax.Array, jax.Array],
    slope: jax.Array,
) -> tuple[jax.Array]:
    padded, found = saved
    taps = list(_taps(sizes, kernel, strides, dilations))
    share = slope / sum((padded[window] == found).astype(slope.dtype) for _, window in taps)
    zero = jnp.zeros((), slope.dtype)
    result = jnp.zeros_like(padded)
    for position, window in taps:
        margins = [
            (at * step, size - at * step - (out - 1) * stride - 1, stride - 1)
            for at, step, size, out, stride in zip(
                position, dilations, padded.shape[2:], sizes, strides, strict=True
            )
        ]
        part = jnp.where(padded[window] == found, share, zero)
        result = result + lax.pad(part, zero, [(0, 0, 0), (0, 0, 0), *margins])
    return (result,)


_peaks.defvjp(_peaks_forward, _peaks_backward)


def _average_pool(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    return _slide(operation, x, 0.0, lax.add) / _window_sizes(operation, x.shape[2:])


def _window_sizes(operation: Operation, sizes: Sequence[int]) -> Float32:
    """How many elements each average is over; broadcasts to the output.

    With padding that counts, that is the kernel's size everywhere. Without any, elements that rounding up
    reaches beyond the input never count.
    """
    attributes = operation.attributes
    kernel, strides = attributes["kernel"], attributes["strides"]
    implicit = attributes.get("auto_pad", "explicit") != "explicit"
    padded = implicit or any(attributes["pads_begin"]) or any(attributes["pads_end"])
    if padded and not attributes["exclude-pad"]:
        return np.full((1,) * (len(sizes) + 2), prod(kernel), np.float32)
    counted = np.ones((1,) * len(sizes))
    padding = _padding(operation, sizes, kernel, [1] * len(kernel))
    for axis, (size, out, stride, extent, (lead, _)) in enumerate(
        zip(sizes, operation.shape[2:], strides, kernel, padding, strict=True)
    ):
        starts = np.arange(out) * stride - lead
        counts = np.minimum(starts + extent, size) - np.maximum(starts, 0)
        counted = counted * counts.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
    return counted[None, None].astype(np.float32)


def _adaptive_average_pool(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    for axis, out in enumerate(operation.shape[2:], start=2):
        matrix = _adaptive_matrix(x.shape[axis], out)
        x = jnp.moveaxis(jnp.tensordot(x, matrix, axes=(axis, 1)), -1, axis)
    return x


def _adaptive_matrix(size: int, out: int) -> AnyArray:
    """``[out, size]``: row i averages elements ``floor(i size / out)`` to ``ceil((i + 1) size / out)``."""
    matrix = np.zeros((out, size), np.float32)
    for row in range(out):
        low, high = row * size // out, -(-(row + 1) * size // out)
        matrix[row, low:high] = 1 / (high - low)
    return matrix


def _local_response(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    attributes = operation.attributes
    axes = {int(axis) % x.ndim for axis in static(operands[1], "axes").reshape(-1)}
    size = attributes["size"]
    reach = (size - 1) // 2
    window = tuple(2 * reach + 1 if axis in axes else 1 for axis in range(x.ndim))
    padding = [(reach, reach) if axis in axes else (0, 0) for axis in range(x.ndim)]
    total: jax.Array = lax.reduce_window(x * x, np.float32(0), lax.add, window, (1,) * x.ndim, padding)
    base = attributes["bias"] + attributes["alpha"] / size ** len(axes) * total
    return x * jnp.power(base, -attributes["beta"])


WINDOWS: dict[str, Rule] = {
    "AdaptiveAvgPool": _adaptive_average_pool,
    "AvgPool": _average_pool,
    "Convolution": _convolution,
    "ConvolutionBackpropData": _convolution_transpose,
    "GroupConvolution": _group_convolution,
    "GroupConvolutionBackpropData": _group_convolution_transpose,
    "LRN": _local_response,
    "MaxPool": _max_pool,
}
