"""Differential statistics correction: give a layer's output the mean and spread it had when dense.

Both sets of statistics are measured on the same inputs, so the correction is the identity on a model that
nothing was removed from; unlike re-estimating BatchNorm it inherits no bias from the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, Float64, Moments

CHUNK = 1 << 16  # elements worked on at a time, so that the float64 copies stay in the cache
RELATIVE_ZERO = (
    1e-6  # a spread below this part of the output's size is what float32 inference leaves of a constant
)


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and variance of each output channel of a layer over samples and positions.

    Attributes
    ----------
    count
        Number of values seen of each channel.
    mean, var
        Float64 ``[channels]``; the variance is that of the values seen (divided by ``count``).
    """

    count: float
    mean: Float64
    var: Float64

    @classmethod
    def of(cls, tensor: AnyArray, channel_axis: int | tuple[int, ...]) -> ChannelStatistics:
        """Statistics of one batch.

        Parameters
        ----------
        tensor
            A layer's output, of any real type; at least one value.
        channel_axis
            The axis that holds the channels; several (outermost first) where channels are spread over axes,
            as in a stack of matrix products.
        """
        view = _as_outer_channel_inner(tensor, channel_axis)
        outer, channels, inner = view.shape
        if view.size == 0:
            raise ValueError(f"no values to take statistics of: the tensor is {list(tensor.shape)}")
        count, mean, squares = 0.0, np.zeros(channels), np.zeros(channels)
        step = max(1, CHUNK // (channels * inner))
        for start in range(0, outer, step):
            values = view[start : start + step].astype(np.float64)
            added = float(values.shape[0] * inner)
            local = values.sum(axis=0).sum(axis=1) / added
            values -= local[:, None]
            np.square(values, out=values)
            difference = local - mean
            total = count + added
            squares += values.sum(axis=0).sum(axis=1) + np.square(difference) * (count * added / total)
            mean += difference * (added / total)
            count = total
        return cls(count, mean, squares / count)

    @property
    def about_zero(self) -> ChannelStatistics:
        """The same values with their spread taken about zero: mean 0, second moment as variance.

        What a gain alone, without a bias, can restore.
        """
        return ChannelStatistics(self.count, np.zeros_like(self.mean), self.var + np.square(self.mean))

    @classmethod
    def merge(cls, parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
        """Statistics of the union of the values behind ``parts`` (any order, any grouping, up to rounding).

        Deviations are taken from the common mean, so nothing is lost where the mean is large against the
        spread.
        """
        if not parts:
            raise ValueError("nothing to merge: no statistics given")
        count = sum(part.count for part in parts)
        if count <= 0:
            raise ValueError("cannot merge statistics of zero values")
        origin = parts[0].mean
        zero = np.zeros_like(origin)
        mean = origin + sum(((part.mean - origin) * (part.count / count) for part in parts), zero)
        var = sum(((part.var + np.square(part.mean - mean)) * (part.count / count) for part in parts), zero)
        return cls(count, np.asarray(mean), np.asarray(var))


def output_statistics(weight: Float64, bias: Float64, moments: Moments) -> ChannelStatistics:
    """Statistics of a layer's output from the moments of its input, without running it.

    ``mean = W E[x] + b`` and ``var = diag(W Cov[x] W^T)``.

    Parameters
    ----------
    weight
        ``[groups, rows, cols]``.
    bias
        ``[groups, rows]``; zeros where the layer has none.
    moments
        Moments of the layer's unfolded input.

    Returns
    -------
    ChannelStatistics
        Of the ``groups * rows`` output channels, group by group.
    """
    mean = np.einsum("grc,gc->gr", weight, moments.mean) + bias
    var = np.einsum("grc,grc->gr", weight @ moments.centred, weight)
    return ChannelStatistics(moments.count, mean.ravel(), np.maximum(var, 0.0).ravel())


def differential_correction(
    weight: Float64,
    bias: Float64,
    dense_stats: ChannelStatistics,
    sparse_stats: ChannelStatistics,
    clip: tuple[float, float] = (0.5, 2.0),
    *,
    scale: bool = True,
) -> tuple[Float64, Float64, Float64]:
    """Scale each row and move its bias so that the sparse output gets the dense output's mean and spread.

    ``gamma = clip(std_dense / std_sparse)``, ``W' = gamma W``, ``b' = mean_dense - gamma (mean_sparse - b)``.
    The mean is always met; the spread is where gamma is not clipped. Zeros stay zero. Where both statistics
    are equal to the last bit so are weight and bias. After a least-squares refit this raises the layer's own
    squared error: judge it by the network's output.

    Parameters
    ----------
    weight
        Sparse weight, ``[groups, rows, cols]``.
    bias
        Bias the sparse statistics were measured with, ``[groups, rows]``.
    dense_stats, sparse_stats
        Statistics of the layer's output in the dense and in the sparse model, ``groups * rows`` channels.
    clip
        Smallest and largest gamma, with ``0 < smallest <= 1 <= largest``.
    scale
        False corrects the bias alone (gamma is 1).

    Returns
    -------
    weight, bias, gamma
        ``[groups, rows, cols]``, ``[groups, rows]``, ``[groups, rows]``. Gamma is 1 in channels whose sparse
        output is constant (its standard deviation is about 0 against its mean or the dense deviation).

    Raises
    ------
    ValueError
        Where shapes do not fit or ``clip`` is out of range.
    """
    if not 0.0 < clip[0] <= 1.0 <= clip[1]:
        raise ValueError(f"clip must be (smallest, largest) with 0 < smallest <= 1 <= largest, got {clip}")
    rows = weight.shape[:2]
    sizes = {dense_stats.mean.size, dense_stats.var.size, sparse_stats.mean.size, sparse_stats.var.size}
    if weight.ndim != 3 or bias.shape != rows or sizes != {bias.size}:
        raise ValueError(
            f"weight {list(weight.shape)}, bias {list(bias.shape)} and statistics of {dense_stats.mean.size} "
            f"dense and {sparse_stats.mean.size} sparse channels do not fit together"
        )
    gamma = _gain(dense_stats, sparse_stats, clip).reshape(rows) if scale else np.ones(rows)
    # Written so that equal means and gamma = 1 return the bias itself, not (mean - (mean - bias)).
    shift = dense_stats.mean.reshape(rows) - gamma * sparse_stats.mean.reshape(rows)
    return gamma[:, :, None] * weight, gamma * bias + shift, gamma


def _gain(dense: ChannelStatistics, sparse: ChannelStatistics, clip: tuple[float, float]) -> Float64:
    dense_std, sparse_std = np.sqrt(dense.var), np.sqrt(sparse.var)
    varies = sparse_std > RELATIVE_ZERO * np.maximum(np.abs(sparse.mean), dense_std)
    ratio = np.divide(dense_std, sparse_std, out=np.ones_like(dense_std), where=varies)
    return np.where(varies, np.clip(ratio, *clip), 1.0)


def _as_outer_channel_inner(tensor: AnyArray, channel_axis: int | tuple[int, ...]) -> AnyArray:
    """View (a copy where channels are spread over axes) as ``[outer, channels, inner]``."""
    axes = (channel_axis,) if isinstance(channel_axis, int) else channel_axis
    if any(not -tensor.ndim <= axis < tensor.ndim for axis in axes):
        raise ValueError(f"a tensor {list(tensor.shape)} has no channel axis {channel_axis}")
    if len(axes) == 1:
        axis = axes[0] % tensor.ndim
        outer = int(np.prod(tensor.shape[:axis], dtype=np.int64))
        inner = int(np.prod(tensor.shape[axis + 1 :], dtype=np.int64))
        return tensor.reshape(outer, tensor.shape[axis], inner)
    channels = int(np.prod([tensor.shape[axis] for axis in axes], dtype=np.int64))
    last = np.moveaxis(tensor, axes, range(-len(axes), 0))
    return last.reshape(tensor.size // max(channels, 1), channels, 1)
