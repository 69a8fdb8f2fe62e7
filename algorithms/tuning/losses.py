"""Losses between a layer's output and the dense model's, and their gradients in the layer's weight and bias.

All are means: over all elements of the output, the cosine loss over samples. Mean squared error needs only the second
moments of a batch (:class:`MomentsObjective`), so that many updates on one batch cost little more than one; the others
need its unfolded input (:class:`ColumnsObjective`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry, Geometry, MatMulGeometry
from pot_sparsity.algorithms.moments import CrossMoments
from pot_sparsity.algorithms.patches import axis_taps, unfold

#: Unfolded input that is kept at a time, bytes; a larger batch is unfolded in pieces, anew for every update.
COLUMNS_BUDGET = 128 << 20

#: ``(prediction, target, samples, delta)`` to the sum of the loss and its gradient in the prediction; all arrays are
#: ``[groups, rows, columns]`` with the columns of each sample together.
LossFunction = Callable[[AnyArray, AnyArray, int, float], tuple[float, AnyArray]]


class Objective(Protocol):
    """The loss of one batch as a function of weight ``[groups, rows, cols]`` and bias ``[groups, rows]``."""

    def value(self, weight: AnyArray, bias: AnyArray) -> float:
        """The loss."""

    def gradient(self, weight: AnyArray, bias: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Its gradients in the weight and in the bias."""


def squared(prediction: AnyArray, target: AnyArray, samples: int, delta: float) -> tuple[float, AnyArray]:
    """``r^2`` of the residual ``r = prediction - target``."""
    residual = prediction - target
    return float(np.vdot(residual, residual)), 2.0 * residual


def absolute(prediction: AnyArray, target: AnyArray, samples: int, delta: float) -> tuple[float, AnyArray]:
    """``|r|``."""
    residual = prediction - target
    return float(np.abs(residual).sum(dtype=np.float64)), np.sign(residual)


def huber(prediction: AnyArray, target: AnyArray, samples: int, delta: float) -> tuple[float, AnyArray]:
    """``r^2 / 2`` up to ``|r| = delta``, ``delta (|r| - delta / 2)`` beyond (Huber, 1964)."""
    residual = prediction - target
    clipped = np.clip(residual, -delta, delta)
    return float((clipped * (residual - 0.5 * clipped)).sum(dtype=np.float64)), clipped


def cosine(prediction: AnyArray, target: AnyArray, samples: int, delta: float) -> tuple[float, AnyArray]:
    """``1 - cos`` of the angle between the two outputs of each sample, all channels and positions as one vector.

    A sample whose target or prediction is all zero costs 1 and has no gradient.
    """
    shape = (*prediction.shape[:2], samples, -1)
    ours, wanted = prediction.reshape(shape), target.reshape(shape)
    lengths = [np.sqrt(np.einsum("grsp,grsp->s", part, part)) for part in (ours, wanted)]
    both = lengths[0] * lengths[1]
    inverse = np.divide(1.0, both, out=np.zeros_like(both), where=both > 0)
    similarity = np.einsum("grsp,grsp->s", ours, wanted) * inverse
    shrink = np.divide(similarity, lengths[0] ** 2, out=np.zeros_like(both), where=both > 0)
    gradient = shrink[:, None] * ours - inverse[:, None] * wanted
    return float((1.0 - similarity).sum()), gradient.reshape(prediction.shape)


#: By name; the mean is over elements, except for those in :data:`PER_SAMPLE`.
LOSSES: dict[str, LossFunction] = {"mse": squared, "l1": absolute, "huber": huber, "cosine": cosine}
PER_SAMPLE = frozenset({"cosine"})


class MomentsObjective:
    """Mean squared error of a batch, from its moments alone.

    With ``H = E[x x^T]``, ``G = E[y x^T]``, ``m = E[x]`` and R outputs, the gradients of
    ``E|W x + b - y|^2 / R`` are ``2 (W H - G + b m^T) / R`` and ``2 (W m + b - E[y]) / R``.

    Parameters
    ----------
    moments
        Of the batch: input x against target output y.
    dtype
        Type the gradients are computed in.
    """

    def __init__(self, moments: CrossMoments, dtype: DTypeLike = np.float32) -> None:
        self._moments = moments
        self._outputs = moments.output_mean.size
        self._second: AnyArray = moments.inputs.second.astype(dtype)
        self._cross: AnyArray = moments.cross.astype(dtype)
        self._mean: AnyArray = moments.inputs.mean.astype(dtype)
        self._output_mean: AnyArray = moments.output_mean.astype(dtype)

    def value(self, weight: AnyArray, bias: AnyArray) -> float:
        """The loss, in float64."""
        w, b, of = weight.astype(np.float64), bias.astype(np.float64), self._moments
        through = np.einsum("grc,gc->gr", w, of.inputs.mean)
        energy = ((w @ of.inputs.second) * w).sum() - 2.0 * (w * of.cross).sum()
        shift = (b * (b + 2.0 * through - 2.0 * of.output_mean)).sum()
        return max(0.0, float(energy + shift + of.output_power.sum())) / self._outputs

    def gradient(self, weight: AnyArray, bias: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Gradients in weight and bias."""
        in_weight = weight @ self._second
        in_weight -= self._cross
        in_weight += bias[:, :, None] * self._mean[:, None, :]
        in_weight *= 2.0 / self._outputs
        in_bias = (weight @ self._mean[:, :, None])[:, :, 0] + bias - self._output_mean
        return in_weight, 2.0 / self._outputs * in_bias


class ColumnsObjective:
    """Any loss of a batch, from its unfolded input.

    Parameters
    ----------
    x, y
        Input of the layer and target output, as the model has them.
    geometry
        How the layer reads its input.
    loss
        A key of :data:`LOSSES`.
    delta
        Where the Huber loss turns linear.
    dtype
        Type everything is computed in.
    budget
        Bytes of unfolded input held at a time.

    Raises
    ------
    ValueError
        Unknown loss.
    """

    def __init__(
        self,
        x: AnyArray,
        y: AnyArray,
        geometry: Geometry,
        loss: str,
        *,
        delta: float = 1.0,
        dtype: DTypeLike = np.float32,
        budget: int = COLUMNS_BUDGET,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is not known: use one of {', '.join(LOSSES)}")
        self._loss, self._delta = LOSSES[loss], delta
        self._x, self._y, self._geometry = x.astype(dtype), y.astype(dtype), geometry
        samples = x.shape[0] if separable(x, y) else 1
        self._count = samples if loss in PER_SAMPLE else y.size
        size = unfolded_size(x.shape, geometry) * self._x.itemsize
        pieces = min(samples, -(-size // budget))
        edges = [samples * piece // pieces for piece in range(pieces + 1)]
        self._pieces = list(pairwise(edges))
        self._kept = self._read(*self._pieces[0]) if pieces == 1 else None

    def value(self, weight: AnyArray, bias: AnyArray) -> float:
        """The loss."""
        return sum(total for total, _, _ in self._through(weight, bias)) / self._count

    def gradient(self, weight: AnyArray, bias: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Gradients in weight and bias."""
        in_weight, in_bias = np.zeros_like(weight), np.zeros_like(bias)
        for _, slope, columns in self._through(weight, bias):
            slope /= self._count
            in_weight += slope @ columns.swapaxes(1, 2)
            in_bias += slope.sum(axis=2)
        return in_weight, in_bias

    def _through(self, weight: AnyArray, bias: AnyArray) -> Iterator[tuple[float, AnyArray, AnyArray]]:
        for first, last in self._pieces:
            columns, target = self._kept or self._read(first, last)
            prediction = weight @ columns
            prediction += bias[:, :, None]
            total, slope = self._loss(prediction, target, last - first, self._delta)
            yield total, slope, columns

    def _read(self, first: int, last: int) -> tuple[AnyArray, AnyArray]:
        whole = len(self._pieces) == 1
        x, y = (part if whole else part[first:last] for part in (self._x, self._y))
        return input_columns(x, self._geometry), output_columns(y, self._geometry)


def separable(x: AnyArray, y: AnyArray) -> bool:
    """Whether slices along the first axis of input and output belong together."""
    return x.ndim == y.ndim and x.shape[0] == y.shape[0]


def unfolded_size(shape: tuple[int, ...], geometry: Geometry) -> int:
    """Elements of the unfolded input."""
    if isinstance(geometry, MatMulGeometry):
        return prod(shape)
    area = prod(len(axis.taps) * axis.size_out for axis in axis_taps(geometry, shape[2:]))
    return shape[0] * shape[1] * area


def input_columns(x: AnyArray, geometry: Geometry) -> AnyArray:
    """``X [groups, cols, samples]`` of a layer's input, so that ``W @ X`` is its output without the bias."""
    return unfold(x, geometry) if isinstance(geometry, ConvGeometry) else _features(x, geometry)


def output_columns(y: AnyArray, geometry: Geometry) -> AnyArray:
    """``Y [groups, rows, samples]`` of a layer's output, its columns in the order of :func:`input_columns`."""
    if isinstance(geometry, MatMulGeometry):
        return _features(y, geometry)
    channels = np.moveaxis(y, 1, 0).reshape(geometry.groups, y.shape[1] // geometry.groups, -1)
    return np.ascontiguousarray(channels)


def _features(x: AnyArray, geometry: MatMulGeometry) -> AnyArray:
    axis = geometry.feature_axis
    if geometry.groups == 1:
        features: AnyArray = np.moveaxis(x, axis, 0)
        return np.ascontiguousarray(features.reshape(1, features.shape[0], -1))
    if x.ndim == 2 or x.shape[-3] == 1:  # one input for all groups
        x = np.broadcast_to(x, (*x.shape[:-3], geometry.groups, *x.shape[-2:]))
    stack: np.ndarray[Any, np.dtype[Any]] = np.moveaxis(x, (-3, axis), (0, 1))
    return np.ascontiguousarray(stack.reshape(*stack.shape[:2], -1))
