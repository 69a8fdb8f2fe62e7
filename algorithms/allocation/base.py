"""What every allocation method shares: what it may look at, how many zeros it must place, and its limits.

A method decides *how many* weights of each layer become zero, never which ones. Two shapes of method exist: a
score per weight with one global threshold (:func:`by_scores`) and a demand per layer (:func:`share_out`);
both reach the total to the weight, count the zeros a layer already has first, and respect
``max_layer_sparsity``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Float32, Float64

Int64: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class LayerWeights:
    """What an allocation may look at.

    Attributes
    ----------
    name
        Unique name of the layer.
    weight
        ``[groups, rows, cols]``.
    kernel
        Spatial kernel, ``()`` for a linear layer.
    in_channels_per_group
        Input channels (or features) one output channel reads.
    out_channels
        Output channels (or features) of all groups together.
    groups
        Number of groups.
    gain
        Factor ``[groups, rows]`` per output channel that the weight has taken up from a fused normalization; None
        where there was none.
    """

    name: str
    weight: Float64
    kernel: tuple[int, ...]
    in_channels_per_group: int
    out_channels: int
    groups: int
    gain: Float64 | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(self.weight.size)


class Allocation(Protocol):
    """Chooses the number of zeros of each layer; options of a method are bound by ``get_allocation``."""

    def __call__(
        self, layers: Sequence[LayerWeights], sparsity: float, *, max_layer_sparsity: float = 1.0
    ) -> dict[str, int]:
        """Number of zeros by layer name, ``total_zeros(layers, sparsity)`` together.

        Parameters
        ----------
        layers
            In the order of the network.
        sparsity
            Fraction of zeros over all layers together, 0..1.
        max_layer_sparsity
            No layer gets a larger fraction of zeros (rounded up to a whole weight) unless it already holds
            more; what is cut off goes to the other layers.

        Raises
        ------
        ValueError
            Sparsity out of range, or out of reach under ``max_layer_sparsity``; no layers, empty layers,
            equal names, weights that are not finite.
        """


@dataclass(frozen=True)
class Limits:
    """How many zeros to place, and between which bounds for each layer.

    Attributes
    ----------
    zeros
        Total to reach.
    sizes, existing
        Weights, and weights that are already zero, of each layer, ``[layers]``.
    lower, upper
        Fewest and most zeros of each layer, ``[layers]``. Zeros that exist count first: as long as the total
        allows, no layer is asked for fewer than it has; where the total is smaller than that, none for more.
    """

    zeros: int
    sizes: Int64
    existing: Int64
    lower: Int64
    upper: Int64


def total_zeros(layers: Sequence[LayerWeights], sparsity: float) -> int:
    """Number of zeros over all ``layers`` that makes ``sparsity``, ``round(sparsity * weights)``."""
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
    return round(sparsity * sum(layer.size for layer in layers))


def find_limits(layers: Sequence[LayerWeights], sparsity: float, max_layer_sparsity: float) -> Limits:
    """Check the arguments common to all methods and work out the bounds of each layer."""
    _check_layers(layers)
    zeros = total_zeros(layers, sparsity)
    sizes = np.array([layer.size for layer in layers], dtype=np.int64)
    existing, upper = zero_bounds(layers, max_layer_sparsity)
    if zeros <= existing.sum():
        return Limits(zeros, sizes, existing, np.zeros_like(sizes), existing)
    if upper.sum() < zeros:
        raise ValueError(
            f"sparsity {sparsity} needs {zeros} zeros, but max_layer_sparsity {max_layer_sparsity} allows "
            f"only {int(upper.sum())} of {int(sizes.sum())} weights: raise max_layer_sparsity or lower "
            "the sparsity"
        )
    return Limits(zeros, sizes, existing, existing, upper)


def zero_bounds(layers: Sequence[LayerWeights], max_layer_sparsity: float) -> tuple[Int64, Int64]:
    """Weights of each layer that are already zero, and the most that may be, each ``[layers]``."""
    if not 0.0 <= max_layer_sparsity <= 1.0:
        raise ValueError(f"max_layer_sparsity must be between 0 and 1, got {max_layer_sparsity}")
    sizes = np.array([layer.size for layer in layers], dtype=np.int64)
    existing = sizes - np.array([np.count_nonzero(layer.weight) for layer in layers], dtype=np.int64)
    # Rounded up, so that sparsity == max_layer_sparsity stays possible; 1e-9 absorbs 0.1 * 30 > 3.
    cap = np.array([math.ceil(max_layer_sparsity * int(size) - 1e-9) for size in sizes], dtype=np.int64)
    return existing, np.maximum(cap, existing)


def share_out(total: int, demand: Float64, lower: Int64, upper: Int64) -> Int64:
    """Whole numbers in proportion to ``demand``, within bounds, that add up to ``total`` exactly.

    Solves ``sum_l clip(t demand_l, lower_l, upper_l) = total`` for the factor t, which is what freezing every
    layer that leaves its bounds and rescaling the rest, repeatedly, converges to; then rounds by largest
    remainder (equal remainders: the earlier layer first).

    Parameters
    ----------
    total
        Between ``lower.sum()`` and ``upper.sum()``.
    demand
        Positive, ``[layers]``.
    lower, upper
        Bounds, ``[layers]``.
    """
    corners = np.unique(np.concatenate([lower / demand, upper / demand]))
    sums = np.array([np.clip(corner * demand, lower, upper).sum() for corner in corners])
    exact = np.clip(float(np.interp(total, sums, corners)) * demand, lower, upper)
    counts = np.floor(exact).astype(np.int64)
    remainder = np.where(counts < upper, exact - counts, -1.0)
    counts[np.argsort(-remainder, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def by_scores(
    layers: Sequence[LayerWeights],
    sparsity: float,
    max_layer_sparsity: float,
    score: Callable[[Float64], Float64],
    *,
    unfused: bool = False,
) -> dict[str, int]:
    """One global threshold on scores: each layer loses its weights with scores below it.

    Parameters
    ----------
    layers, sparsity, max_layer_sparsity
        As for :class:`Allocation`.
    score
        Maps the magnitudes of a layer's non-zero weights ``[n]`` to their scores ``[n]`` (in any order: only
        the count below the threshold matters). It must grow with the magnitude and may overwrite its
        argument.
    unfused
        Give ``score`` the magnitudes that the weights had before a normalization was fused into them.

    Notes
    -----
    Scores are compared in float32. Of the scores equal to the threshold the earlier layers' go first.
    """
    limits = find_limits(layers, sparsity, max_layer_sparsity)
    existing = limits.existing
    if limits.zeros <= existing.sum():
        counts = share_out(limits.zeros, limits.sizes.astype(np.float64), limits.lower, limits.upper)
    else:
        # A layer's scores beyond its limit can never be chosen, so they do not enter the pool.
        ends = np.cumsum(limits.upper - existing)
        pool = np.empty(int(ends[-1]), dtype=np.float32)
        parts = np.split(pool, ends[:-1])
        for layer, part in zip(layers, parts, strict=True):
            magnitudes = nonzero_magnitudes(layer, unfused=unfused)
            if part.size:
                part[:] = _lowest(score(magnitudes), part.size)
        counts = existing + _count_lowest(pool, parts, limits.zeros - int(existing.sum()))
    return named(layers, counts)


def nonzero_magnitudes(layer: LayerWeights, *, unfused: bool = False) -> Float64:
    """Magnitudes of a layer's non-zero weights ``[n]``, a new array; ValueError where one is not finite.

    ``unfused`` divides them by the gain of their output channel. A channel with a gain of zero holds zeros, whatever
    it held before; non-zero weights that were put there since count as they are.
    """
    magnitudes = np.abs(layer.weight)
    if not np.isfinite(magnitudes.max()):
        raise ValueError(f"layer {layer.name!r} holds weights that are NaN or infinite")
    kept = magnitudes > 0.0
    if unfused and layer.gain is not None:
        gain = np.abs(layer.gain)[:, :, None]
        with np.errstate(over="ignore"):  # beyond float64's range it ties at its end
            magnitudes /= np.where(gain > 0.0, gain, 1.0)
    return magnitudes.ravel() if kept.all() else magnitudes[kept]


def named(layers: Sequence[LayerWeights], counts: Int64) -> dict[str, int]:
    """Counts by layer name."""
    return {layer.name: int(count) for layer, count in zip(layers, counts, strict=True)}


def _lowest(scores: Float64, number: int) -> Float32:
    """The ``number`` lowest scores, in any order."""
    with np.errstate(over="ignore", under="ignore"):  # float64 weights beyond float32's range tie at its ends
        narrow = scores.astype(np.float32)
    if number < narrow.size:
        narrow.partition(number - 1)
    return narrow[:number]


def _count_lowest(pool: Float32, parts: Sequence[Float32], number: int) -> Int64:
    """How many of the ``number`` lowest entries of ``pool`` stand in each of its ``parts``; number >= 1."""
    threshold = np.partition(pool, number - 1)[number - 1]
    below = np.array([np.count_nonzero(part < threshold) for part in parts], dtype=np.int64)
    equal = np.array([np.count_nonzero(part == threshold) for part in parts], dtype=np.int64)
    before = np.cumsum(equal) - equal
    return np.asarray(below + np.clip(number - below.sum() - before, 0, equal))


def _check_layers(layers: Sequence[LayerWeights]) -> None:
    if not layers:
        raise ValueError("no layers to allocate zeros to")
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"layer names must be unique, these are not: {', '.join(twice)}")
    for layer in layers:
        if layer.size == 0:
            raise ValueError(f"layer {layer.name!r} has no weights")
