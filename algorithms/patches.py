"""Unfolding: a convolution's input as the columns ``X [groups, cols, samples]`` that its weight matrix
multiplies.

Whatever the convolution (1-D to 3-D, strided, dilated, padded, grouped, transposed), along one spatial axis
each kernel position ("tap") reads an arithmetic progression of inputs into an arithmetic progression of
outputs; all other outputs see zero padding. :class:`AxisTaps` holds these progressions, and unfolding is one
strided copy per tap: no padded or zero-stuffed copy of the input is ever made, and a transposed convolution
is just another set of progressions.

The weight matrix
----------------- ``W [groups, rows, cols]`` with ``rows = out_channels / groups``, ``cols = in_channels /
groups * kernel area``, columns ordered (input channel within the group, kernel position in C order); then ``Y
= W @ X`` is the layer's output without its bias, output channel ``g * rows + r`` being row r of group g.

- Convolution stores ``[out, in / groups, *kernel]``: ``W[g, r, (i, k)] = weight[g * rows + r, i, k]``.
- Transposed convolution stores ``[in, out / groups, *kernel]``: ``W[g, r, (i, k)] = weight[g * in_g + i, r,
  k]`` with ``in_g = in / groups``. The kernel is not flipped: column (i, k) of X holds, for each output
  position o, the input at ``(o + pad_begin - k * dilation) / stride`` where that is a whole number inside the
  input, and zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pot_sparsity.algorithms.arrays import ConvGeometry, Float64


@dataclass(frozen=True)
class AxisTaps:
    """What each kernel position reads along one spatial axis.

    Attributes
    ----------
    size_in, size_out
        Length of the axis in the input and in the output.
    out_step, in_step
        Steps of the progressions below, the same for every tap.
    taps
        ``(out_start, in_start, count)`` per kernel position: outputs ``out_start + t * out_step`` read inputs
        ``in_start + t * in_step`` for t < count; all other outputs read zeros.
    """

    size_in: int
    size_out: int
    out_step: int
    in_step: int
    taps: tuple[tuple[int, int, int], ...]

    def slices(self, tap: int) -> tuple[slice, slice]:
        """Return the output positions of ``tap`` and the input positions they read."""
        out, start, count = self.taps[tap]
        return (
            slice(out, out + (count - 1) * self.out_step + 1 if count else out, self.out_step),
            slice(start, start + (count - 1) * self.in_step + 1 if count else start, self.in_step),
        )

    def window(self, first: int, last: int) -> AxisTaps:
        """Return the same taps for the outputs ``first <= o < last`` only."""
        taps = []
        for out, start, count in self.taps:
            skip = max(0, -((out - first) // self.out_step))
            end = min(count, -((out - last) // self.out_step))
            taps.append(
                (out + skip * self.out_step - first, start + skip * self.in_step, end - skip)
                if end > skip
                else (0, 0, 0)
            )
        return AxisTaps(self.size_in, last - first, self.out_step, self.in_step, tuple(taps))

    def indices(self) -> NDArray[np.intp]:
        """Return ``[taps, size_out]``: the input index that each output reads, -1 for padding."""
        table = np.full((len(self.taps), self.size_out), -1, dtype=np.intp)
        for tap in range(len(self.taps)):
            out, source = self.slices(tap)
            table[tap, out] = np.arange(source.start, source.stop, self.in_step)
        return table

    def pad(self, dilation: int) -> int:
        """Return the padding before the first element of a convolution's axis of stride 1 (0 if no tap reads
        any).
        """
        for tap, (out, start, count) in enumerate(self.taps):
            if count:
                return out - start + tap * dilation
        return 0

    @classmethod
    def identity(cls, size: int) -> AxisTaps:
        """One tap that reads the axis as it is."""
        return cls(size, size, 1, 1, ((0, 0, size),))


def _pads(geometry: ConvGeometry, axis: int, size: int) -> tuple[int, int]:
    """Return ``(pad_begin, output size)`` of one axis, following the ONNX Conv and ConvTranspose
    specifications.
    """
    stride, extent = geometry.strides[axis], (geometry.kernel[axis] - 1) * geometry.dilations[axis] + 1
    explicit = geometry.pad_mode == "explicit"
    begin, end = (geometry.pads_begin[axis], geometry.pads_end[axis]) if explicit else (0, 0)
    same = geometry.pad_mode.startswith("same")
    if not geometry.transposed:
        if not same:
            return begin, (size + begin + end - extent) // stride + 1
        out = -(-size // stride)
        total = max((out - 1) * stride + extent - size, 0)
        return (total // 2 if geometry.pad_mode == "same_upper" else total - total // 2), out
    natural = stride * (size - 1) + extent + (geometry.output_padding[axis] if geometry.output_padding else 0)
    if geometry.output_size is None and not same:
        return begin, natural - begin - end
    out = size * stride if geometry.output_size is None else geometry.output_size[axis]
    total = max(natural - out, 0)
    return (total // 2 if geometry.pad_mode == "same_upper" else total - total // 2), out


def axis_taps(geometry: ConvGeometry, spatial: tuple[int, ...]) -> tuple[AxisTaps, ...]:
    """Resolve a convolution's geometry for inputs of spatial size ``spatial``: one :class:`AxisTaps` per
    axis.

    Raises
    ------
    ValueError
        When the input has another number of axes than the kernel, or is smaller than the kernel.
    """
    if len(spatial) != len(geometry.kernel):
        raise ValueError(
            f"the kernel has {len(geometry.kernel)} spatial axes, the input {len(spatial)}: {spatial}"
        )
    axes = []
    for axis, (size, kernel) in enumerate(zip(spatial, geometry.kernel, strict=True)):
        stride, dilation = geometry.strides[axis], geometry.dilations[axis]
        begin, out = _pads(geometry, axis, size)
        if out < 1:
            raise ValueError(
                f"spatial axis {axis} of size {size} is too small for the kernel {geometry.kernel}"
            )
        # `size_to` walks the axis that moves by one, `size_by` the one that moves by the stride:
        # o * stride + shift = i for a convolution, i * stride - shift = o for a transposed one.
        size_by, size_to = (out, size) if not geometry.transposed else (size, out)
        taps = []
        for k in range(kernel):
            shift = k * dilation - begin
            first = max(0, -(shift // stride))
            count = max(0, min(size_by, (size_to - 1 - shift) // stride + 1) - first)
            pair = (first, first * stride + shift)
            taps.append((*(pair[::-1] if geometry.transposed else pair), count) if count else (0, 0, 0))
        steps = (stride, 1) if geometry.transposed else (1, stride)
        axes.append(AxisTaps(size, out, *steps, tuple(taps)))
    return tuple(axes)


def output_size(geometry: ConvGeometry, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Return the spatial size of the layer's output for an input of spatial size ``spatial``."""
    return tuple(axis.size_out for axis in axis_taps(geometry, spatial))


class Workspace:
    """One buffer, reused by every unfolding that is given it: peak memory is that of the largest.

    The buffer belongs to the last caller: an array obtained from it is overwritten by the next request.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)
        self._key: object = None

    def zeroed(self, shape: tuple[int, ...], dtype: DTypeLike, layout: object) -> NDArray[Any]:
        """Return a buffer that is zero wherever the copies described by ``layout`` do not write.

        It is cleared only when shape, dtype or ``layout`` differ from the last request, so that consecutive
        batches pay for their padding once.
        """
        dtype = np.dtype(dtype)
        size = prod(shape) * dtype.itemsize
        key = (shape, dtype, layout)
        if size > self._bytes.size:
            self._bytes = np.empty(size, dtype=np.uint8)
            self._key = None
        view = self._bytes[:size].view(dtype).reshape(shape)
        if key != self._key:
            view.fill(0)
            self._key = key
        return view


def copy_taps(target: NDArray[Any], x: NDArray[Any], axes: tuple[AxisTaps, ...]) -> None:
    """Copy every tap of ``x [*lead, *spatial]`` into ``target [*lead, *kernel, *out]``; padding is left
    untouched.
    """
    lead: tuple[int | slice, ...] = (slice(None),) * (x.ndim - len(axes))
    for position in product(*(range(len(axis.taps)) for axis in axes)):
        pairs = [axis.slices(tap) for axis, tap in zip(axes, position, strict=True)]
        target[(*lead, *position, *(out for out, _ in pairs))] = x[(*lead, *(source for _, source in pairs))]


def even_step(total: int, most: int) -> int:
    """Step that cuts ``total`` into as few pieces as ``most`` does, of nearly the same size."""
    return -(-total // -(-total // most))


def real(x: NDArray[Any]) -> NDArray[Any]:
    """Return ``x`` as float64 if it is float64, as float32 otherwise (no copy where none is needed)."""
    return np.asarray(x, dtype=np.float64 if x.dtype == np.float64 else np.float32)


def unfold(x: NDArray[Any], geometry: ConvGeometry, workspace: Workspace | None = None) -> NDArray[Any]:
    """Unfold activations so that ``W @ X`` is the layer's output without its bias.

    Parameters
    ----------
    x
        ``[N, C, *spatial]``; float64 stays float64, anything else is handled in float32.
    geometry
        The convolution.
    workspace
        Buffer to build the result in; the result is then valid until the workspace is used again.

    Returns
    -------
    NDArray
        ``X [groups, cols, N * positions]``, C-contiguous, samples ordered (n, output position in C order).

    Raises
    ------
    ValueError
        When the channels do not divide into the groups or the input does not fit the kernel.
    """
    x = real(x)
    axes = axis_taps(geometry, x.shape[2:])
    samples, channels = x.shape[:2]
    if channels % geometry.groups:
        raise ValueError(f"{channels} channels do not divide into {geometry.groups} groups")
    out = tuple(axis.size_out for axis in axes)
    shape = (channels, *geometry.kernel, samples, *out)
    target = (workspace or Workspace()).zeroed(shape, x.dtype, ("unfold", axes))
    lead_target = np.moveaxis(target, 1 + len(axes), 1)
    copy_taps(lead_target, x.swapaxes(0, 1), axes)
    return target.reshape(geometry.groups, -1, samples * prod(out))


def window_sums(total: Float64, axes: Iterable[AxisTaps]) -> Float64:
    """Sum each tap's reads: ``total [C, *spatial]`` -> ``[C, *kernel]``, without unfolding."""
    result = total
    for number, axis in enumerate(axes, start=1):
        lead = (slice(None),) * number
        parts = [result[(*lead, axis.slices(tap)[1])].sum(axis=number) for tap in range(len(axis.taps))]
        result = np.stack(parts, axis=number)
    return result


def weight_to_matrix(weight: NDArray[Any], geometry: ConvGeometry) -> NDArray[Any]:
    """Return ``W [groups, rows, cols]`` of a weight stored as the ONNX specification lays it out.

    ``[out, in / groups, *kernel]`` for a convolution, ``[in, out / groups, *kernel]`` for a transposed one
    (see the module's text).
    """
    groups = geometry.groups
    if not geometry.transposed:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.swapaxes(1, 2).reshape(groups, weight.shape[1], -1)


def matrix_to_weight(matrix: NDArray[Any], geometry: ConvGeometry) -> NDArray[Any]:
    """Undo :func:`weight_to_matrix`."""
    groups, rows, cols = matrix.shape
    inputs = cols // prod(geometry.kernel)
    if not geometry.transposed:
        return matrix.reshape(groups * rows, inputs, *geometry.kernel)
    split = matrix.reshape(groups, rows, inputs, *geometry.kernel).swapaxes(1, 2)
    return split.reshape(groups * inputs, rows, *geometry.kernel)
