"""Asymmetric per-tensor grids of activations, and the range that rounds a sample of values best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, Float32, Float64

_MOST_BITS = 8
# Ends shrink to this share of the values' own, in so many steps of equal ratio: one end alone, or two independently,
# those on so many values; then each end moves alone.
_SMALLEST = 0.05
_STEPS, _STEPS_OF_TWO = 64, 18
_COARSE = 2**12
# Factors that one end is tried at around the best range, and how often both ends take turns.
_ENDS = np.geomspace(0.6, 1.6, 21)
_TURNS = 3


@dataclass(frozen=True)
class ActivationGrid:
    """Places of a tensor's values: ``scale * (q - zero_point)`` with an integer ``0 <= q < levels``.

    Zero has an exact place, so padding with zeros commutes with rounding.

    Attributes
    ----------
    scale
        Distance between neighbours, positive, a float32 value.
    zero_point
        The integer that stands for 0.
    levels
        Number of places, ``2^bits``.

    Raises
    ------
    ValueError
        The scale is not positive and finite, or an integer is out of range.
    """

    scale: float
    zero_point: int
    levels: int

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of a grid must be positive and finite, got {self.scale}")
        if not 2 <= self.levels <= 2**_MOST_BITS:
            raise ValueError(f"a grid has 2 to {2**_MOST_BITS} levels, got {self.levels}")
        if not 0 <= self.zero_point < self.levels:
            raise ValueError(f"the zero point must lie in 0..{self.levels - 1}, got {self.zero_point}")

    @property
    def low(self) -> float:
        """The smallest place."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest place."""
        return (self.levels - 1 - self.zero_point) * self.scale

    def __call__(self, tensor: AnyArray) -> Float32:
        """The nearest places, float32 of the tensor's shape: what a fake quantizer computes."""
        steps = np.rint(tensor / np.float32(self.scale))
        np.clip(steps, -self.zero_point, self.levels - 1 - self.zero_point, out=steps)
        return np.asarray(steps * np.float32(self.scale), np.float32)


def fit_activation_grid(values: AnyArray, bits: int) -> ActivationGrid:
    """The grid of least mean squared rounding error among clipped ranges of the values.

    Both ends shrink in steps first, then each is moved alone around the best range. The range always holds 0; an end
    at 0 stays there.

    Parameters
    ----------
    values
        A sample of the tensor's values, of any shape, not empty.
    bits
        1 to 8.

    Raises
    ------
    ValueError
        ``bits`` out of range, no values, or values that are not finite.
    """
    if not 1 <= bits <= _MOST_BITS:
        raise ValueError(f"bits must be between 1 and {_MOST_BITS}, got {bits}")
    flat = np.asarray(values, np.float64).ravel()
    if flat.size == 0 or not np.isfinite(flat).all():
        raise ValueError("a range needs at least one value, and all of them finite")
    inexact = flat[flat != 0.0]
    if inexact.size == 0:
        return ActivationGrid(1.0, 0, 2**bits)
    low, high = min(0.0, float(inexact.min())), max(0.0, float(inexact.max()))
    two = low < 0.0 < high
    shares = np.geomspace(1.0, _SMALLEST, _STEPS_OF_TWO if two else _STEPS)
    some = inexact[:: -(-inexact.size // _COARSE)] if two else inexact
    ranges = [(low * a, high * b) for a in shares for b in (shares if two else [a])]
    _, *coarse = min((_tried(some, *ends, bits) for ends in ranges), key=lambda found: found[0])
    best = min(
        (_tried(inexact, *ends, bits) for ends in ((low, high), (coarse[0], coarse[1]))),
        key=lambda found: found[0],
    )
    for _ in range(_TURNS):
        before = best[0]
        for end in (1, 2):
            ends = [(best[1], best[2] * f) if end == 2 else (best[1] * f, best[2]) for f in _ENDS]
            tried = [_tried(inexact, first, last, bits) for first, last in ends]
            best = min([best, *tried], key=lambda found: found[0])
        if best[0] >= before:
            break
    return _grid(best[1], best[2], bits)


def _tried(values: Float64, low: float, high: float, bits: int) -> tuple[float, float, float]:
    """Squared error of a range, and the range."""
    grid = _grid(low, high, bits)
    steps = np.clip(np.rint(values / grid.scale), -grid.zero_point, grid.levels - 1 - grid.zero_point)
    return float(np.square(steps * grid.scale - values).sum()), low, high


def _grid(low: float, high: float, bits: int) -> ActivationGrid:
    """The grid that spans a range which holds 0, its zero point rounded to an integer."""
    steps = 2**bits - 1
    scale = max(float(np.float32((high - low) / steps)), float(np.finfo(np.float32).tiny))
    return ActivationGrid(scale, int(np.clip(np.rint(-low / scale), 0, steps)), 2**bits)
