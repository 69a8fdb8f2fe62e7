"""Rate-distortion curves: what each level of a layer costs, and how far it moves the network's output.

Measuring the output at every sparsity of every layer is what makes the procedure of rate-distortion pruning slow.
The layer's own error, which a solver knows at every sparsity, orders the levels just as well; so the output is
measured at a few levels only (:func:`probe_levels`) and read off as a monotone function of the layer's error in
between (:func:`interpolate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.arrays import Float64

#: The kind of cost that counts kept weights; the others are named by whoever measures them.
NONZEROS = "nonzeros"
Aggregate: TypeAlias = Literal["mean", "worst"]
Cleaning: TypeAlias = Literal["outliers", "isotonic", "running_max", "none"]
Scale: TypeAlias = Literal["linear", "log"]


@dataclass(frozen=True)
class Curve:
    """The levels of one layer, in any order: a sparsity each, or any other way to compress it.

    Attributes
    ----------
    name
        Unique name of the layer.
    size
        Number of weights.
    distortion
        Distance of the network's output when only this layer is at that level, ``[levels]``.
    costs
        By kind (kept weights, FLOPs, bytes, seconds, ...), each ``[levels]``, not negative.

    Raises
    ------
    ValueError
        No levels, shapes that differ, values that are not finite, or negative costs.
    """

    name: str
    size: int
    distortion: Float64
    costs: Mapping[str, Float64]

    def __post_init__(self) -> None:
        if self.distortion.ndim != 1 or self.distortion.size == 0:
            raise ValueError(
                f"curve of layer {self.name!r}: distortion must be [levels] with at least one level"
            )
        if not np.isfinite(self.distortion).all():
            raise ValueError(f"curve of layer {self.name!r}: distortions that are NaN or infinite")
        for kind, cost in self.costs.items():
            if cost.shape != self.distortion.shape:
                raise ValueError(
                    f"curve of layer {self.name!r}: {cost.shape} costs {kind!r} for {self.distortion.shape} levels"
                )
            if not (np.isfinite(cost).all() and (cost >= 0.0).all()):
                raise ValueError(
                    f"curve of layer {self.name!r}: costs {kind!r} must be finite and not negative"
                )

    @cached_property
    def zeros(self) -> Int64:
        """Zero weights of each level ``[levels]``; needs the cost :data:`NONZEROS`."""
        return np.asarray(self.size - np.rint(self.cost(NONZEROS)), dtype=np.int64)

    def cost(self, kind: str) -> Float64:
        """Cost of each level ``[levels]``; ValueError for a kind this curve does not have."""
        if kind not in self.costs:
            raise ValueError(
                f"curve of layer {self.name!r} has no cost {kind!r}: it has {', '.join(self.costs)}"
            )
        return self.costs[kind]

    @cached_property
    def knots(self) -> tuple[Int64, Float64]:
        """Numbers of zeros ``[knots]``, ascending and all different, and the lowest distortion at each."""
        order = np.lexsort((self.distortion, self.zeros))
        zeros, first = np.unique(self.zeros[order], return_index=True)
        return zeros, self.distortion[order][first]

    def at(self, zeros: Int64) -> Float64:
        """Distortion at any numbers of zeros ``[n]``: linear between levels, constant beyond the outermost."""
        known, distortion = self.knots
        return np.asarray(np.interp(zeros, known, distortion), dtype=np.float64)

    def bounded(self, lower: int, upper: int) -> Curve:
        """The levels with ``lower`` to ``upper`` zeros, and the two bounds themselves, as a curve over the
        cost :data:`NONZEROS` alone.
        """
        inside = (self.zeros >= lower) & (self.zeros <= upper)
        bounds = np.array([lower, upper] if upper > lower else [lower], dtype=np.int64)
        bounds = bounds[~np.isin(bounds, self.zeros[inside])]
        zeros = np.concatenate([self.zeros[inside], bounds])
        distortion = np.concatenate([self.distortion[inside], self.at(bounds)])
        order = np.argsort(zeros, kind="stable")
        return Curve(
            self.name, self.size, distortion[order], {NONZEROS: (self.size - zeros[order]).astype(float)}
        )


@dataclass(frozen=True)
class Choice:
    """One level for each layer.

    Attributes
    ----------
    levels
        Index into each curve's levels, ``[layers]``.
    distortion
        Sum over the layers: the network's distance as far as distortions add up.
    costs
        Sums over the layers, of every kind of cost that all curves have.
    """

    levels: Int64
    distortion: float
    costs: Mapping[str, float]


def choose(curves: Sequence[Curve], levels: Int64) -> Choice:
    """The choice of these levels, with its sums."""
    kinds = [kind for kind in curves[0].costs if all(kind in curve.costs for curve in curves)]
    pairs = list(zip(curves, levels.tolist(), strict=True))
    return Choice(
        levels,
        float(sum(float(curve.distortion[level]) for curve, level in pairs)),
        {kind: float(sum(float(curve.costs[kind][level]) for curve, level in pairs)) for kind in kinds},
    )


def aggregate_samples(distances: Float64, how: Aggregate) -> Float64:
    """Distortion of each level from the distances of single samples.

    Parameters
    ----------
    distances
        ``[samples, levels]``: distance between the dense and the changed network's output.
    how
        ``mean`` over the samples, or the ``worst`` sample (worst case sampling of rate-distortion pruning,
        section 4).

    Returns
    -------
    Float64
        ``[levels]``.
    """
    if distances.ndim != 2 or distances.shape[0] == 0:
        raise ValueError(
            f"distances must be [samples, levels] with at least one sample, got {distances.shape}"
        )
    return np.asarray(distances.mean(axis=0) if how == "mean" else distances.max(axis=0), dtype=np.float64)


def clean(distortion: Float64, how: Cleaning) -> tuple[Int64, Float64]:
    """Make measured distortions grow with sparsity.

    Parameters
    ----------
    distortion
        ``[points]``, in the order of ascending sparsity.
    how
        ``outliers`` deletes the local maxima that break monotonicity until there are none left
        (rate-distortion pruning, section 4): what stays are the points that no later one is below. A spike
        goes without a trace; one low point takes all higher ones before it along. ``isotonic`` moves points
        to the closest non-decreasing sequence in least squares of the logarithms, since the noise of a
        distance is proportional to it (of the values, where some are not positive). ``running_max`` lifts
        points to the highest before them: never optimistic, but one spike lifts all after it. ``none`` leaves
        them as they are.

    Returns
    -------
    points, distortion
        Indices of the points that stay ``[kept]``, and their distortions, non-decreasing unless ``none``.
    """
    everything = np.arange(distortion.size, dtype=np.int64)
    if how == "none":
        return everything, distortion
    if how == "running_max":
        return everything, np.maximum.accumulate(distortion)
    if how == "isotonic":
        if (distortion > 0.0).all():
            return everything, np.exp(isotonic_regression(np.log(distortion)).x)
        return everything, np.asarray(isotonic_regression(distortion).x, dtype=np.float64)
    lowest_after = np.minimum.accumulate(distortion[::-1])[::-1]
    kept = np.flatnonzero(distortion <= lowest_after).astype(np.int64)
    return kept, distortion[kept]


def interpolate(wanted: Float64, known: Float64, distortion: Float64, scale: Scale) -> Float64:
    """Distortion as a non-decreasing function of the layer's error (or of sparsity), through measured points.

    Parameters
    ----------
    wanted
        Errors of all levels ``[levels]``, not negative.
    known, distortion
        Errors and non-decreasing distortions of the measured levels, ``[points]``, in any order of errors
        (sorted here; of equal errors the largest distortion counts).
    scale
        ``linear``: straight lines. ``log``: monotone cubics (PCHIP) between logarithms.

    Returns
    -------
    Float64
        ``[levels]``.

    Notes
    -----
    No error is no distortion: the origin is always known. Squared distances and KL divergences are quadratic in a
    small change of the output, as the layer's error is, so distortion is proportional to error up to the first
    measured point. Further up it is close to a power law, whose exponent drifts where the network saturates, over
    several orders of magnitude: hence the logarithms. From six probes of each layer of a ResNet-20 the mean squared
    distance at thirteen other sparsities came out within 6 % on average; straight lines over the error were
    25 % off, straight lines over sparsity (probes evenly over sparsity) a factor of 3.7. Beyond the last point
    its last chord goes on. Where a measured distortion is zero, the line to the next point is straight in both
    scales.
    """
    order = np.lexsort((distortion, known))
    errors, last = np.unique(known[order][::-1], return_index=True)
    values = np.maximum.accumulate(distortion[order][::-1][last])
    positive = errors > 0.0
    errors, values = np.append(0.0, errors[positive]), np.append(0.0, np.maximum(values[positive], 0.0))
    result = _lines(wanted, errors, values)
    first = int(np.searchsorted(values, 0.0, side="right"))
    if scale == "linear" or errors.size - first < 2:
        return result
    logs, log_values = np.log(errors[first:]), np.log(values[first:])
    different = np.append(np.diff(logs) > 0.0, True)  # errors one rounding apart may share their logarithm
    logs, log_values = logs[different], log_values[different]
    above = wanted > errors[first]
    targets = np.log(wanted[above])
    exponents = _lines(targets, logs, log_values)
    if logs.size > 2:
        within = targets <= logs[-1]
        exponents[within] = PchipInterpolator(logs, log_values)(targets[within])
    result[above] = np.exp(exponents)
    return result


def probe_levels(errors: Float64, points: int) -> Int64:
    """Which levels to measure: spread evenly over the logarithm of the layer's error, the largest included.

    Parameters
    ----------
    errors
        The layer's error at each level, ``[levels]``, relative to that of the layer with all weights zero.
        Levels whose error is below 1e-4 are left to interpolation: they move the output by less than what
        tells allocations apart.
    points
        How many levels, at least 1; fewer are returned where levels coincide.

    Returns
    -------
    Int64
        Indices of levels, ascending by error.
    """
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    order = np.argsort(errors, kind="stable")
    logs = np.log(np.maximum(errors[order], 1e-4))
    targets = np.linspace(logs[0], logs[-1], points + 1)[1:] if points > 1 else logs[-1:]
    nearest = np.abs(logs[:, None] - targets[None, :])[::-1].argmin(axis=0)
    return np.asarray(order[np.unique(errors.size - 1 - nearest)], dtype=np.int64)


def build_curve(
    name: str,
    size: int,
    errors: Float64,
    measured: Int64,
    distortion: Float64,
    costs: Mapping[str, Float64],
    *,
    cleaning: Cleaning = "isotonic",
    scale: Scale = "log",
) -> Curve:
    """A layer's curve from a few measured levels and the layer's error at all of them.

    Parameters
    ----------
    name, size
        The layer's name and number of weights.
    errors
        ``[levels]``: the layer's own error at each level, not negative. For the procedure of the paper, which
        measures every level and fills what the outlier filter deletes by straight lines, the sparsity of each
        level instead, with ``scale="linear"``.
    measured
        Indices of the measured levels ``[points]``.
    distortion
        Of the measured levels, ``[points]``; negative values (rounding of a divergence) count as zero.
    costs
        By kind, each ``[levels]``.
    cleaning, scale
        See :func:`clean` and :func:`interpolate`. With the cleaning ``none`` lines are straight whatever the scale.

    Returns
    -------
    Curve
        With distortions that do not fall where the error rises, unless nothing was cleaned.

    Raises
    ------
    ValueError
        Nothing measured, shapes that differ, errors that are negative or not finite.
    """
    if measured.size == 0 or measured.shape != distortion.shape:
        raise ValueError(f"layer {name!r}: {distortion.size} distortions for {measured.size} measured levels")
    if not (np.isfinite(errors).all() and (errors >= 0.0).all()):
        raise ValueError(f"layer {name!r}: errors must be finite and not negative")
    if not np.isfinite(distortion).all():
        raise ValueError(f"layer {name!r}: distortions that are NaN or infinite")
    order = np.lexsort((distortion, errors[measured]))
    kept, values = clean(np.maximum(distortion[order], 0.0), cleaning)
    known = errors[measured[order][kept]]
    if cleaning == "none":
        return Curve(name, size, _as_measured(errors, known, values), costs)
    return Curve(name, size, interpolate(errors, known, values, scale), costs)


def _as_measured(wanted: Float64, known: Float64, values: Float64) -> Float64:
    """Straight lines from the origin through points in ascending order, of equal ones the lowest."""
    points, first = np.unique(np.append(0.0, known), return_index=True)
    return np.maximum(_lines(wanted, points, np.append(0.0, values)[first]), 0.0)


def _lines(wanted: Float64, known: Float64, values: Float64) -> Float64:
    """Piecewise linear, the last line going on beyond the last point."""
    result = np.asarray(np.interp(wanted, known, values), dtype=np.float64)
    beyond = wanted > known[-1]
    if known.size > 1 and beyond.any():
        slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
        result[beyond] = values[-1] + slope * (wanted[beyond] - known[-1])
    return result
