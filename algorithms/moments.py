"""Moments of a layer's unfolded input, streamed over batches.

Products run in float32 (float64 for float64 activations) over bounded pieces of a batch and are added up in
float64; memory is one piece, at most about 64 MB, and the sums, whatever the number of samples. Accumulators
of the same layer merge by addition. :mod:`pot_sparsity.algorithms.gram` holds the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import ConvGeometry, Float64, Geometry, MatMulGeometry, Moments
from pot_sparsity.algorithms.gram import (
    Sums,
    add,
    assemble,
    assemble_cross,
    conv_gram,
    features_gram,
    pointwise_gram,
    sampled_gram,
)
from pot_sparsity.algorithms.patches import Workspace, axis_taps, real, window_sums

_SUM_STEP = 64  # samples added up in float32 before float64 takes over
_SUM_BYTES = 16 << 20  # bytes of activations added up at a time


@dataclass(frozen=True)
class CrossMoments:
    """Statistics that fit a layer with input x (of the sparse model) to outputs y (of the dense one).

    Attributes
    ----------
    inputs
        Moments of x.
    cross
        ``E[y x^T]``, float64 ``[groups, rows, cols]``, not centred.
    output_mean
        ``E[y]``, float64 ``[groups, rows]``.
    output_power
        ``E[y^2]``, float64 ``[groups, rows]``; its sum is ``E |y|^2``.
    """

    inputs: Moments
    cross: Float64
    output_mean: Float64
    output_power: Float64

    @property
    def centred_cross(self) -> Float64:
        """Covariance ``E[y x^T] - E[y] E[x]^T``: the G of a layer whose bias is free."""
        return np.asarray(self.cross - self.output_mean[:, :, None] * self.inputs.mean[:, None, :])

    @classmethod
    def merge(cls, parts: Sequence[CrossMoments]) -> CrossMoments:
        """Moments of the union of the samples behind ``parts``."""
        inputs = Moments.merge([part.inputs for part in parts])
        shares = [part.inputs.count / inputs.count for part in parts]

        def mixed(values: list[Float64]) -> Float64:
            return np.asarray(sum(share * value for share, value in zip(shares, values, strict=True)))

        return cls(
            inputs,
            mixed([part.cross for part in parts]),
            mixed([part.output_mean for part in parts]),
            mixed([part.output_power for part in parts]),
        )


def _sum_samples(x: NDArray[Any], what: str, *, squared: bool = False) -> Float64:
    """Sum ``x [N, ...]`` (or its squares) over the first axis in float64, refusing what is not finite."""
    total = np.zeros(prod(x.shape[1:]))
    step = max(1, min(_SUM_STEP, _SUM_BYTES // (total.size * x.itemsize)))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, x.shape[0], step):
            part = x[start : start + step].reshape(-1, total.size)
            total += np.ones(part.shape[0], dtype=part.dtype) @ (part * part if squared else part)
    if not np.isfinite(total).all():
        raise ValueError(
            f"the layer's {what} hold NaN, infinity or values beyond float32's range: "
            "check the calibration data, its preprocessing and the model's weights"
        )
    return total.reshape(x.shape[1:])


def _as_stack(x: NDArray[Any], geometry: MatMulGeometry) -> NDArray[Any]:
    """See MatMul activations as ``[N, groups, m, features]`` (``[N, groups, features, m]`` for feature axis
    -2).
    """
    if x.ndim < -geometry.feature_axis:
        raise ValueError(f"activations of shape {x.shape} have no axis {geometry.feature_axis}")
    groups = geometry.groups
    if groups == 1:
        if geometry.feature_axis == -2:
            return x.reshape(-1, 1, *x.shape[-2:])
        return x.reshape(-1, 1, x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])
    if x.ndim == 2 or (x.ndim > 2 and x.shape[-3] == 1):
        x = np.broadcast_to(x, (*x.shape[:-3], groups, *x.shape[-2:]))  # one input for all groups
    if x.ndim < 3 or x.shape[-3] != groups:
        raise ValueError(f"activations of shape {x.shape} do not hold {groups} groups on axis -3")
    return x.reshape(-1, groups, *x.shape[-2:])


class _Stream:
    """The sums behind both accumulators: of x, of its products and, where outputs are given, of y, y^2 and y
    x^T.
    """

    def __init__(
        self, geometry: Geometry, max_positions: int | None, seed: int, workspace: Workspace | None
    ) -> None:
        if max_positions is not None and max_positions < 1:
            raise ValueError(f"max_positions must be at least 1, got {max_positions}")
        if isinstance(geometry, MatMulGeometry) and geometry.feature_axis not in (-1, -2):
            raise ValueError(f"the feature axis of a MatMul is -1 or -2, got {geometry.feature_axis}")
        self.geometry = geometry
        self.count = 0
        self.first: Float64 | None = None
        self.outputs: Float64 | None = None  # [2, groups, rows]: sums of y and of y^2
        self.sums: Sums = {}
        self._max_positions = max_positions
        self._random = np.random.default_rng(seed)
        self._workspace = workspace or Workspace()

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.geometry.kernel if isinstance(self.geometry, ConvGeometry) else (1,)

    def absorb(self, x: NDArray[Any], y: NDArray[Any] | None) -> None:
        x = real(x)
        y = None if y is None else real(y)
        for what, array in (("activations", x), ("outputs", y)):
            if array is not None and array.size == 0:
                raise ValueError(f"a batch of {what} is empty: shape {array.shape}")
        if isinstance(self.geometry, ConvGeometry):
            self._absorb_conv(x, self.geometry, y)
        else:
            self._absorb_matmul(x, self.geometry, y)

    def merge(self, other: _Stream) -> None:
        if other.geometry != self.geometry:
            raise ValueError(
                f"cannot merge moments of different layers: {self.geometry} and {other.geometry}"
            )
        if other.first is None:
            return
        self._check(other.first, other.outputs)
        self._book(other.first, other.outputs, other.count)
        for key, value in other.sums.items():
            add(self.sums, key, value)

    def moments(self) -> Moments:
        if self.first is None:
            raise ValueError("no activations were seen: the calibration data is empty")
        groups, cols = self.first.shape
        with np.errstate(invalid="ignore"):  # inf - inf, refused below
            second = assemble(self.sums, groups, cols, self.kernel)
        second /= self.count
        if not np.isfinite(np.einsum("gcc->gc", second)).all():
            raise ValueError(
                "the layer's activations are too large to be squared in float32: scale them down"
            )
        return Moments(float(self.count), self.first / self.count, second)

    def _check(self, first: Float64, outputs: Float64 | None) -> None:
        for what, old, new in (("inputs", self.first, first), ("outputs", self.outputs, outputs)):
            if old is not None and new is not None and old.shape != new.shape:
                raise ValueError(
                    f"{what} of (groups, features) {new.shape[-2:]} cannot be added "
                    f"to earlier ones of {old.shape[-2:]}"
                )

    def _book(self, first: Float64, outputs: Float64 | None, count: int) -> None:
        self.first = first.copy() if self.first is None else self.first + first
        if outputs is not None:
            self.outputs = outputs.copy() if self.outputs is None else self.outputs + outputs
        self.count += count

    def _draw(self, positions: int) -> NDArray[np.intp] | None:
        if self._max_positions is None or self._max_positions >= positions:
            return None
        return np.sort(self._random.choice(positions, self._max_positions, replace=False)).astype(np.intp)

    def _absorb_conv(self, x: NDArray[Any], geometry: ConvGeometry, y: NDArray[Any] | None) -> None:
        axes, groups = axis_taps(geometry, x.shape[2:]), geometry.groups
        if x.shape[1] % groups:
            raise ValueError(f"{x.shape[1]} channels do not divide into {groups} groups")
        out = tuple(axis.size_out for axis in axes)
        chosen = self._draw(prod(out))
        first = window_sums(_sum_samples(x, "activations"), axes).reshape(groups, -1)
        outputs = None
        if y is not None:
            if (y.shape[0], *y.shape[2:]) != (x.shape[0], *out) or y.shape[1] % groups:
                raise ValueError(
                    f"outputs {y.shape} do not fit inputs {x.shape}: expected [{x.shape[0]}, "
                    f"a multiple of {groups} groups, {', '.join(map(str, out))}]"
                )
            maps = [
                _sum_samples(y, "outputs", squared=squared).reshape(y.shape[1], -1)
                for squared in (False, True)
            ]
            kept = [m if chosen is None else m[:, chosen] for m in maps]
            outputs = np.stack([m.sum(axis=1).reshape(groups, -1) for m in kept])
        self._check(first, outputs)
        with np.errstate(over="ignore", invalid="ignore"):
            if chosen is None:
                conv_gram(self.sums, x, geometry, self._workspace, y)
            else:
                first = sampled_gram(self.sums, x, groups, axes, chosen, self._workspace, y)
        self._book(first, outputs, x.shape[0] * (prod(out) if chosen is None else chosen.size))

    def _absorb_matmul(self, x: NDArray[Any], geometry: MatMulGeometry, y: NDArray[Any] | None) -> None:
        by_rows = geometry.feature_axis == -1
        axis = 2 if by_rows else 3
        x = _as_stack(x, geometry)
        y = None if y is None else _as_stack(y, geometry)
        if y is not None and (y.shape[0], y.shape[axis]) != (x.shape[0], x.shape[axis]):
            raise ValueError(
                f"outputs do not fit inputs: seen as [N, groups, ...] they are {y.shape} and {x.shape}"
            )
        chosen = self._draw(x.shape[axis])
        if chosen is not None:
            x = np.take(x, chosen, axis=axis)
            y = None if y is None else np.take(y, chosen, axis=axis)

        def total(array: NDArray[Any], what: str, *, squared: bool = False) -> Float64:
            if geometry.groups == 1 and by_rows:
                return _sum_samples(array.reshape(-1, 1, array.shape[3]), what, squared=squared)
            return np.asarray(_sum_samples(array, what, squared=squared).sum(axis=axis - 1))

        first = total(x, "activations")
        outputs = None if y is None else np.stack([total(y, "outputs"), total(y, "outputs", squared=True)])
        self._check(first, outputs)
        with np.errstate(over="ignore", invalid="ignore"):
            if by_rows:
                features_gram(self.sums, x, y)
            else:
                flat = x.reshape(x.shape[0], -1, x.shape[3])
                pointwise_gram(self.sums, flat, geometry.groups, self._workspace, y)
        self._book(first, outputs, x.shape[0] * x.shape[axis])


class MomentsAccumulator:
    """Streams a layer's input activations into its :class:`~pot_sparsity.algorithms.arrays.Moments`.

    Parameters
    ----------
    geometry
        How the layer reads its input.
    max_positions
        Upper bound on the output positions used per sample (for a MatMul: on the rows of each matrix); they
        are drawn without replacement, anew for every batch. None uses all: the moments are then exact.
    seed
        Seed of that draw: the same batches in the same order give the same moments.
    workspace
        Buffer shared with other accumulators of the same thread; one of its own by default.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        max_positions: int | None = None,
        seed: int = 0,
        workspace: Workspace | None = None,
    ) -> None:
        self._stream = _Stream(geometry, max_positions, seed, workspace)

    @property
    def count(self) -> int:
        """Columns of X seen so far."""
        return self._stream.count

    def update(self, x: NDArray[Any]) -> None:
        """Add a batch.

        Parameters
        ----------
        x
            ``[N, C, *spatial]`` for a convolution, any leading dimensions for a MatMul. float64 is multiplied
            in float64, anything else in float32.

        Raises
        ------
        ValueError
            On an empty batch, a shape that does not fit the geometry or earlier batches, or NaN or infinity;
            the moments are then unchanged.
        """
        self._stream.absorb(x, None)

    def merge(self, other: MomentsAccumulator) -> None:
        """Add what another accumulator of the same layer has seen (ValueError if the layers differ)."""
        self._stream.merge(other._stream)

    def result(self) -> Moments:
        """Return the moments of everything seen.

        Raises
        ------
        ValueError
            When nothing was seen, or products overflowed float32.
        """
        return self._stream.moments()


class CrossMomentsAccumulator:
    """Streams pairs (input x of the sparse model, output y of the dense model) into :class:`CrossMoments`.

    Parameters are those of :class:`MomentsAccumulator`; with ``max_positions`` all statistics are those of
    the positions drawn.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        max_positions: int | None = None,
        seed: int = 0,
        workspace: Workspace | None = None,
    ) -> None:
        self._stream = _Stream(geometry, max_positions, seed, workspace)

    @property
    def count(self) -> int:
        """Columns of X seen so far."""
        return self._stream.count

    def update(self, x_s: NDArray[Any], y_d: NDArray[Any]) -> None:
        """Add a batch: ``x_s`` as for :meth:`MomentsAccumulator.update`, ``y_d`` the layer's output for it.

        ``y_d`` is ``[N, out, *out_spatial]`` for a convolution and ``[..., out]`` for a MatMul (``[..., out,
        m]`` where the feature axis is -2).

        Raises
        ------
        ValueError
            As :meth:`MomentsAccumulator.update`, for either array, and when their shapes do not fit each
            other.
        """
        self._stream.absorb(x_s, y_d)

    def merge(self, other: CrossMomentsAccumulator) -> None:
        """Add what another accumulator of the same layer has seen (ValueError if the layers differ)."""
        self._stream.merge(other._stream)

    def result(self) -> CrossMoments:
        """Return the moments of everything seen; raises as :meth:`MomentsAccumulator.result`."""
        inputs, outputs = self._stream.moments(), self._stream.outputs
        assert outputs is not None, "update() always books outputs"
        groups, rows = outputs.shape[1:]
        with np.errstate(invalid="ignore"):  # inf - inf, refused below
            cross = assemble_cross(self._stream.sums, groups, rows, inputs.mean.shape[1], self._stream.kernel)
        cross /= inputs.count
        if not np.isfinite(cross).all():
            raise ValueError(
                "the layer's activations are too large to be multiplied in float32: scale them down"
            )
        return CrossMoments(inputs, cross, outputs[0] / inputs.count, outputs[1] / inputs.count)
