"""Gram matrices of unfolded inputs, summed over a batch without ever unfolding more than a bounded piece of
it.

Three exact kernels, chosen by :func:`conv_gram`; each adds to a dictionary of float64 sums, from which
:func:`assemble` builds ``sum x x^T [groups, cols, cols]``. Sums of different batches add, so accumulators
merge.

Shift kernel (:class:`RowPlan`)
    The input is laid out as ``U [channels, taps of the other axes, input row, N, rest]`` with input row the
    first spatial axis. A tap a of that axis reads rows ``o + a * dilation - pad`` for all outputs o, so that
    when its stride is 1 every tap is a contiguous slice of U: none is copied. Moreover ``G(a, a + d) = sum_o
    U[row_a(o)] U[row_a+d(o)]^T`` depends on d alone, apart from a few border rows: for a 3x3 kernel three
    products ``U[r] U[r + d]^T`` and their border corrections replace the nine (six by symmetry) blocks, at a
    third of the copying. Where the corrections would cost more than they save, or the axis has strides or is
    transposed, its taps are copied like those of the others.
Band kernel (:mod:`pot_sparsity.algorithms.band_gram`)
    Depthwise layers of stride 1: one tiny Gram matrix per channel.
Pointwise kernel
    A 1x1 layer needs no copy: ``X_n X_n^T`` per sample, unless the map is small against the channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import ConvGeometry, Float64
from pot_sparsity.algorithms.band_gram import band_gram
from pot_sparsity.algorithms.patches import AxisTaps, Workspace, axis_taps, copy_taps, even_step

Kind: TypeAlias = Literal["full", "shift", "cross", "cross-shift"]
Sums: TypeAlias = dict[tuple[Kind, int, int], Float64]

_PIECE_LEAST = 4 << 20  # bytes of U below which a chunk's overheads show
_PIECE_MOST = 64 << 20  # bytes of U at most, the memory bound


def add(sums: Sums, key: tuple[Kind, int, int], value: NDArray[Any], sign: float = 1.0) -> None:
    """Add ``sign * value`` to one float64 sum."""
    if key not in sums:
        sums[key] = np.zeros(value.shape)
    total = sums[key]
    if sign < 0:
        np.subtract(total, value, out=total)
    else:
        np.add(total, value, out=total)


def gram(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Return ``a b^T`` per group; BLAS takes syrk where a and b are the same memory."""
    return np.asarray(np.matmul(a, b.swapaxes(-1, -2)))


def piece_samples(cols: int, itemsize: int) -> int:
    """Columns of one piece: enough that the product outweighs adding its result, few enough for the cache."""
    wanted = min(max(4 * cols * cols * itemsize, _PIECE_LEAST), _PIECE_MOST)
    return max(1, wanted // (cols * itemsize))


@dataclass(frozen=True)
class Term:
    """``sign * sum_{first <= r < last} U[r] U[r + distance]^T``, to be added to the sum ``(d, j)``."""

    d: int
    j: int
    sign: float
    first: int
    last: int
    distance: int


@dataclass(frozen=True)
class RowPlan:
    """How the first spatial axis is treated: its taps as shifts of rows (``shifts > 1``) or copied."""

    axes: tuple[AxisTaps, ...]
    shifts: int
    dilation: int
    pad: int
    out_rows: int
    terms: tuple[Term, ...]

    @property
    def rows(self) -> int:
        """Rows of U: input rows where taps are shifts, output rows otherwise."""
        return self.axes[0].size_out

    @property
    def reach(self) -> int:
        """Rows that a product needs beyond its own."""
        return (self.shifts - 1) * self.dilation

    @classmethod
    def of(cls, geometry: ConvGeometry, axes: tuple[AxisTaps, ...]) -> RowPlan:
        """Choose the cheaper treatment."""
        rows, out, kernel = axes[0].size_in, axes[0].size_out, geometry.kernel[0]
        if kernel > 1 and not geometry.transposed and geometry.strides[0] == 1:
            dilation = geometry.dilations[0]
            pad = axes[0].pad(dilation)
            terms = _shift_terms(kernel, dilation, pad, rows, out)
            cost = sum((t.last - t.first) * (1.0 if t.distance else 0.5) for t in terms)
            if cost < 0.8 * kernel * kernel * out / 2:
                return cls((AxisTaps.identity(rows), *axes[1:]), kernel, dilation, pad, out, terms)
        return cls(axes, 1, 1, 0, out, (Term(0, 0, 1.0, 0, out, 0),))


def _shift_terms(kernel: int, dilation: int, pad: int, rows: int, out: int) -> tuple[Term, ...]:
    """Write ``G(a, a + d) = sum_{j <= a} S(d, j)``: S(d, 0) over all rows of tap 0, S(d, j) the rows by which
    tap j differs.

    Rows outside ``0 <= r`` and ``r + d * dilation < rows`` are padding and fall away.
    """
    terms = []
    for d in range(kernel):
        distance = d * dilation
        spans = [(0, 1.0, -pad, out - pad)]
        for j in range(1, kernel - d):
            before = (j - 1) * dilation - pad
            spans += [(j, -1.0, before, before + dilation), (j, 1.0, before + out, before + out + dilation)]
        for j, sign, first, last in spans:
            first, last = max(first, 0), min(last, rows - distance)
            if first < last:
                terms.append(Term(d, j, sign, first, last, distance))
    return tuple(terms)


def _pieces(x: NDArray[Any], plan: RowPlan) -> Iterator[tuple[slice, int, int]]:
    """Split a batch ``[N, C, rows, *rest]`` into (samples, first row, last row) pieces of bounded size."""
    cols = x.shape[1] * prod(len(axis.taps) for axis in plan.axes)
    per_row = prod(axis.size_out for axis in plan.axes[1:])
    wanted = piece_samples(cols, x.itemsize)
    per_sample = (plan.rows + plan.reach) * per_row
    step = even_step(x.shape[0], max(1, wanted // per_sample))
    most = _PIECE_MOST // (cols * x.itemsize)
    height = plan.rows if per_sample <= most else even_step(plan.rows, max(1, most // per_row - plan.reach))
    for start in range(0, x.shape[0], step):
        for first in range(0, plan.rows, height):
            yield slice(start, start + step), first, min(first + height, plan.rows)


def row_gram(
    sums: Sums,
    x: NDArray[Any],
    groups: int,
    plan: RowPlan,
    workspace: Workspace,
    y: NDArray[Any] | None = None,
) -> None:
    """Add the Gram matrix of a batch ``[N, C, *spatial]``, and with ``y [N, out, *out_spatial]`` the cross
    products.
    """
    kind: Kind = "shift" if plan.shifts > 1 else "full"
    taps = tuple(len(axis.taps) for axis in plan.axes)
    rest = tuple(axis.size_out for axis in plan.axes[1:])
    for samples, first, last in _pieces(x, plan):
        top = min(last + plan.reach, plan.rows)
        axes = (plan.axes[0].window(first, top), *plan.axes[1:])
        part = x[samples].swapaxes(0, 1)
        count, run = part.shape[1], part.shape[1] * prod(rest)
        buffer = workspace.zeroed((x.shape[1], *taps, top - first, count, *rest), x.dtype, axes)
        # [C, N, *kernel, rows, *rest] is the order copy_taps writes; U keeps rows before N so that shifts are
        # slices.
        copy_taps(np.moveaxis(buffer, 2 + len(taps), 1), part, axes)
        u = buffer.reshape(groups, -1, (top - first) * run)
        for term in plan.terms:
            low, high = max(term.first, first) - first, min(term.last, last) - first
            if low < high:
                a = u[:, :, low * run : high * run]
                b = (
                    u[:, :, (low + term.distance) * run : (high + term.distance) * run]
                    if term.distance
                    else a
                )
                add(sums, (kind, term.d, term.j), gram(a, b), term.sign)
        if y is not None:
            _row_cross(sums, y[samples], u, groups, plan, first, last)


def _row_cross(
    sums: Sums, y: NDArray[Any], u: NDArray[Any], groups: int, plan: RowPlan, first: int, last: int
) -> None:
    """Add ``sum y x^T`` of the rows ``first <= r < last`` of U, tap by tap of the first axis."""
    base = max(0, first + plan.pad - plan.reach)
    end = min(plan.out_rows, last + plan.pad)
    if base >= end:
        return
    run = y.shape[0] * prod(y.shape[3:])
    v = np.ascontiguousarray(np.moveaxis(y[:, :, base:end], 0, 2)).reshape(groups, -1, (end - base) * run)
    for tap in range(plan.shifts):
        offset = plan.pad - tap * plan.dilation  # output row = input row + offset
        low, high = max(first, -offset), min(last, plan.out_rows - offset)
        if low < high:
            a = v[:, :, (low + offset - base) * run : (high + offset - base) * run]
            b = u[:, :, (low - first) * run : (high - first) * run]
            add(sums, ("cross-shift" if plan.shifts > 1 else "cross", tap, 0), gram(a, b))


def assemble(sums: Sums, groups: int, cols: int, kernel: tuple[int, ...] = (1,)) -> Float64:
    """Build ``sum x x^T [groups, cols, cols]`` of a layer with this kernel."""
    second = np.zeros((groups, cols, cols))
    if ("full", 0, 0) in sums:
        second += sums["full", 0, 0]
    shifted = {(d, j): value for (kind, d, j), value in sums.items() if kind == "shift"}
    if shifted:
        first, rest = kernel[0], prod(kernel[1:])
        channels = cols // (first * rest)
        blocks = second.reshape(groups, channels, first, rest, channels, first, rest)
        for d in range(first):
            block = np.zeros((groups, channels, rest, channels, rest))
            for a in range(first - d):
                if (d, a) in shifted:
                    block += shifted[d, a].reshape(block.shape)
                blocks[:, :, a, :, :, a + d] += block
                if d:
                    blocks[:, :, a + d, :, :, a] += block.transpose(0, 3, 4, 1, 2)
    return second


def assemble_cross(sums: Sums, groups: int, rows: int, cols: int, kernel: tuple[int, ...] = (1,)) -> Float64:
    """Build ``sum y x^T [groups, rows, cols]`` of a layer with this kernel."""
    cross = np.zeros((groups, rows, cols))
    blocks = cross.reshape(groups, rows, -1, kernel[0], prod(kernel[1:]))
    for (kind, tap, _), value in sums.items():
        if kind == "cross":
            cross += value
        elif kind == "cross-shift":
            blocks[:, :, :, tap] += value.reshape(groups, rows, -1, blocks.shape[-1])
    return cross


def conv_gram(
    sums: Sums, x: NDArray[Any], geometry: ConvGeometry, workspace: Workspace, y: NDArray[Any] | None = None
) -> None:
    """Add the Gram matrix of a batch ``x [N, C, *spatial]`` by the fastest kernel.

    With ``y [N, out, *out_spatial]`` the cross products ``sum y x^T`` are added as well.
    """
    axes = axis_taps(geometry, x.shape[2:])
    channels, groups = x.shape[1], geometry.groups
    if all(axis == AxisTaps.identity(axis.size_in) for axis in axes):
        pointwise_gram(sums, x.reshape(*x.shape[:2], -1), groups, workspace, y)
        return
    if len(axes) == 1:
        # A line is a map of one row; a line too long for one piece is a map of rows of one element.
        cols = channels * geometry.kernel[0]
        tall = cols * axes[0].size_out * x.itemsize > _PIECE_LEAST
        x, axes, geometry, y = _as_map(x, axes[0], geometry, y, tall=tall)
        if tall:
            for sample in range(x.shape[0]):
                one = slice(sample, sample + 1)
                row_gram(
                    sums, x[one], groups, RowPlan.of(geometry, axes), workspace, None if y is None else y[one]
                )
            return
    plain = not geometry.transposed and set(geometry.strides) == {1}
    if plain and len(axes) == 2 and channels == groups and y is None:
        add(sums, ("full", 0, 0), band_gram(x, geometry, axes, workspace))
    else:
        row_gram(sums, x, groups, RowPlan.of(geometry, axes), workspace, y)


def _as_map(
    x: NDArray[Any], axis: AxisTaps, geometry: ConvGeometry, y: NDArray[Any] | None, *, tall: bool
) -> tuple[NDArray[Any], tuple[AxisTaps, ...], ConvGeometry, NDArray[Any] | None]:
    """See a 1-D convolution as a 2-D one with an axis of length 1 after (``tall``) or before its own."""

    def pair(value: int, other: int) -> tuple[int, int]:
        return (value, other) if tall else (other, value)

    unit = AxisTaps.identity(1)
    flat = ConvGeometry(
        pair(geometry.kernel[0], 1),
        pair(geometry.strides[0], 1),
        pair(geometry.dilations[0], 1),
        (0, 0),
        (0, 0),
        geometry.groups,
        transposed=geometry.transposed,
    )
    position = 3 if tall else 2
    return (
        np.expand_dims(x, position),
        (axis, unit) if tall else (unit, axis),
        flat,
        None if y is None else np.expand_dims(y, position),
    )


def pointwise_gram(
    sums: Sums, x: NDArray[Any], groups: int, workspace: Workspace, y: NDArray[Any] | None = None
) -> None:
    """Add the Gram matrix of ``x [N, groups * cols, positions]``, every position being a sample of all
    columns.
    """
    samples, channels, positions = x.shape
    cols = channels // groups
    if y is None and positions >= 4 * cols:
        for sample in range(samples):
            part = x[sample].reshape(groups, cols, positions)
            add(sums, ("full", 0, 0), gram(part, part))
        return
    axes = (AxisTaps.identity(1), AxisTaps.identity(positions))
    plan = RowPlan(axes, 1, 1, 0, 1, (Term(0, 0, 1.0, 0, 1, 0),))
    row_gram(
        sums,
        x[:, :, None],
        groups,
        plan,
        workspace,
        None if y is None else y.reshape(samples, -1, 1, positions),
    )


def features_gram(sums: Sums, x: NDArray[Any], y: NDArray[Any] | None = None) -> None:
    """Add the Gram matrices of ``x [N, groups, m, cols]``, and with ``y [N, groups, m, rows]`` the cross
    products.
    """
    cols = x.shape[-1]
    step = max(1, piece_samples(cols * x.shape[1], x.itemsize) // x.shape[2])
    for start in range(0, x.shape[0], step):
        part = x[start : start + step].swapaxes(0, 1).reshape(x.shape[1], -1, cols).swapaxes(1, 2)
        add(sums, ("full", 0, 0), gram(part, part))
        if y is not None:
            out = y[start : start + step].swapaxes(0, 1).reshape(x.shape[1], -1, y.shape[-1]).swapaxes(1, 2)
            add(sums, ("cross", 0, 0), gram(out, part))


def sampled_gram(
    sums: Sums,
    x: NDArray[Any],
    groups: int,
    axes: tuple[AxisTaps, ...],
    positions: NDArray[np.intp],
    workspace: Workspace,
    y: NDArray[Any] | None = None,
) -> Float64:
    """Add the Gram matrix over some output positions (flat indices) only; return their column sums ``[groups,
    cols]``.

    Every tap is gathered through an index table; ``y [N, out, *out_spatial]`` adds the cross products.
    """
    place = np.unravel_index(positions, tuple(axis.size_out for axis in axes))
    index: NDArray[np.intp] = np.zeros((1,), dtype=np.intp)
    inside: NDArray[np.bool_] = np.ones((1,), dtype=np.bool_)
    for axis, where in zip(axes, place, strict=True):
        table = axis.indices()[:, where]
        index = index[..., None, :] * axis.size_in + table
        inside = inside[..., None, :] & (table >= 0)
    index, inside = index.reshape(-1, positions.size), inside.reshape(-1, positions.size)
    flat = x.reshape(*x.shape[:2], -1)
    total = np.zeros((groups, x.shape[1] // groups * index.shape[0]))
    step = max(1, piece_samples(x.shape[1] * index.shape[0], x.itemsize) // positions.size)
    for start in range(0, x.shape[0], step):
        part = flat[start : start + step].swapaxes(0, 1)
        shape = (x.shape[1], index.shape[0], part.shape[1], positions.size)
        buffer = workspace.zeroed(shape, x.dtype, "sampled")
        for tap in range(index.shape[0]):
            buffer[:, tap] = np.where(inside[tap], part[:, :, index[tap]], 0)
        u = buffer.reshape(groups, -1, shape[2] * shape[3])
        add(sums, ("full", 0, 0), gram(u, u))
        total += u.sum(axis=-1, dtype=np.float64)
        if y is not None:
            v = y[start : start + step].reshape(shape[2], y.shape[1], -1)[:, :, positions].swapaxes(0, 1)
            add(sums, ("cross", 0, 0), gram(v.reshape(groups, -1, shape[2] * shape[3]), u))
    return total
