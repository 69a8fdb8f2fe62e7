"""Gram matrices of depthwise convolutions: one tiny matrix per channel, for all channels at once.

Products of unfolded channels (9 x samples) are too thin for BLAS, and unfolding them costs more than
multiplying. But all of them are sums of products of two pixels at a fixed offset. For each row distance D the
products of whole rows, ``R_D = sum_{n, r} x[n, r, :]^T x[n, r + D, :]  [width, width]``, are one well-shaped
product per channel, and the entry of taps (a, b) and (a', b') is a sum along a diagonal of ``R_D``, ``D = (a'
- a) * dilation``, less the products of the border rows that tap a does not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import ConvGeometry, Float64
from pot_sparsity.algorithms.patches import AxisTaps, Workspace, even_step

_WINDOWS = (8, 16, 32)  # widths of row products that BLAS runs well (7 and 14 run at a quarter and a half)
_PIECE = 8 << 20  # bytes of rows laid out at a time, over several channels
_PIECE_MOST = 64 << 20  # bytes of one channel's rows at most


def _tiling(width: int, margin: int) -> tuple[int, int, int]:
    """Return ``(tiles, columns per tile, margin on either side of a tile)`` for rows of this width."""
    window = next((size for size in _WINDOWS if width <= size), 0)
    if not window:
        window = _WINDOWS[-1] * max(1, -(-4 * margin // _WINDOWS[-1]))  # at most half of it margin
    if width <= window:
        return 1, window, 0
    tile = window - 2 * margin
    return -(-width // tile), tile, margin


def band_gram(
    x: NDArray[Any], geometry: ConvGeometry, axes: tuple[AxisTaps, ...], workspace: Workspace
) -> Float64:
    """Return ``sum x x^T [C, kernel area, kernel area]`` of a depthwise layer of stride 1, ``x [N, C, rows,
    width]``.

    Rows are laid out with enough zero rows after each sample that a product of all rows with all rows D
    further on never pairs two samples. Wide rows are cut into overlapping tiles, seen through strides and not
    copied.
    """
    samples, channels, rows, width = x.shape
    (kernel_h, kernel_w), (dilation_h, dilation_w) = geometry.kernel, geometry.dilations
    gap = (kernel_h - 1) * dilation_h
    tiles, tile, margin = _tiling(width, (kernel_w - 1) * dilation_w)
    height, line = rows + gap, tiles * tile + 2 * margin
    plane = height * line * x.itemsize
    sample_step = even_step(samples, max(1, _PIECE_MOST // plane))
    channel_step = even_step(channels, max(1, _PIECE // (sample_step * plane)))
    bands = _Bands(axes, dilation_w, width, tile, margin)
    area = kernel_h * kernel_w
    total = np.zeros((channels, kernel_h, kernel_w, kernel_h, kernel_w))
    for start in range(0, channels, channel_step):
        for first in range(0, samples, sample_step):
            part = x[first : first + sample_step, start : start + channel_step].swapaxes(0, 1)
            shape = (*part.shape[:2], height, line)
            buffer = workspace.zeroed(shape, x.dtype, ("band", rows, width, margin))
            buffer[:, :, :rows, margin : margin + width] = part
            item = buffer.itemsize
            tiled = np.lib.stride_tricks.as_strided(
                buffer,
                (shape[0], tiles, shape[1], height, tile + 2 * margin),
                (buffer.strides[0], tile * item, height * line * item, line * item, item),
                writeable=False,
            )
            _add_bands(total[start : start + channel_step], tiled, axes[0], dilation_h, bands)
    return total.reshape(channels, area, area)


def _add_bands(total: Float64, tiled: NDArray[Any], axis: AxisTaps, dilation: int, bands: _Bands) -> None:
    """Add to ``total [C, kh, kw, kh, kw]`` the products of ``tiled [C, tiles, N, rows + gap, window]``."""
    kernel, rows, pad = len(axis.taps), axis.size_in, axis.pad(dilation)
    window = tiled.shape[-1]
    lines = (
        tiled.reshape(*tiled.shape[:2], -1, window)
        if tiled.shape[1] == 1
        else np.lib.stride_tricks.as_strided(
            tiled,
            (*tiled.shape[:2], tiled.shape[2] * tiled.shape[3], window),
            (*tiled.strides[:2], *tiled.strides[3:]),
            writeable=False,
        )
    )
    for d in range(min(kernel, -(-rows // dilation))):
        distance = d * dilation
        end = lines.shape[2] - distance
        everywhere = bands.sums(np.matmul(lines[:, :, :end].swapaxes(2, 3), lines[:, :, distance:]))
        rowwise: dict[int, Float64] = {}
        for a in range(kernel - d):
            low = max(0, a * dilation - pad)
            high = max(low, min(rows - distance, axis.size_out + a * dilation - pad))
            block = everywhere.copy()
            for row in (*range(min(low, rows - distance)), *range(high, rows - distance)):
                if row not in rowwise:
                    one, other = tiled[:, :, :, row], tiled[:, :, :, row + distance]
                    rowwise[row] = bands.sums(np.matmul(one.swapaxes(2, 3), other))
                block -= rowwise[row]
            total[:, a, :, a + d] += block
            if d:
                total[:, a + d, :, a] += block.swapaxes(1, 2)


@dataclass(frozen=True)
class _Bands:
    """Sums along the diagonals of row products: ``R [C, tiles, window, window]`` -> tap pairs ``[C, kw,
    kw]``.
    """

    axes: tuple[AxisTaps, ...]
    dilation: int
    width: int
    tile: int
    margin: int

    def sums(self, products: NDArray[Any]) -> Float64:
        axis = self.axes[1]
        kernel, pad = len(axis.taps), axis.pad(self.dilation)
        result = np.empty((products.shape[0], kernel, kernel))
        for step in range(1 - kernel, kernel):
            shift = step * self.dilation
            start, stop = max(0, -shift), max(0, min(self.width, self.width - shift))
            column = np.arange(start, max(start, stop))
            number, place = column // self.tile, column % self.tile + self.margin
            diagonal = products[:, number, place, place + shift]
            for b in range(max(0, -step), min(kernel, kernel - step)):
                low = max(start, b * self.dilation - pad)
                high = min(stop, axis.size_out + b * self.dilation - pad)
                part = diagonal[:, low - start : max(low, high) - start]
                result[:, b, b + step] = part.sum(axis=1, dtype=np.float64)
        return result
