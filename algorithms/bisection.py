"""Bisection for the largest sparsity whose drop stays within a limit, where every trial is expensive."""

from __future__ import annotations

import math

# Until something respects the limit: a drop ten times as large is expected so much further up.
_DECADE = 0.12
# Trials go so much further down than the estimate, so that the answer is enclosed early.
_MARGIN = 1.25
# Drops below this share of the limit say no more about where the limit is met.
_LEAST = 0.05
# One trial of so many halves the interval, whatever the drops say.
_HALVING = 3


class Bisection:
    """Values ``highest - k * resolution`` (k = 0, 1, ... while positive), tried one after the other.

    The highest value comes first. Then the interval between the largest value that is known to respect the limit and
    the smallest above it that is known not to becomes smaller: by interpolation of the logarithm of the drop, as
    drops grow by about the same factor from step to step, and by halves now and then. Value 0 is taken to respect
    the limit.

    Parameters
    ----------
    highest
        The largest value, 0 to 1.
    resolution
        Distance of neighbouring values, above 0.
    limit
        Largest drop that is accepted, at least 0.
    tries
        Most trials, at least 1.

    Examples
    --------
    >>> search = Bisection(0.9, 0.1, 1.0, 10)
    >>> while (value := search.propose()) is not None:
    ...     search.add(value, 10 * value**4)
    >>> search.best()
    0.5
    """

    def __init__(self, highest: float, resolution: float, limit: float, tries: int) -> None:
        if not 0.0 <= highest <= 1.0:
            raise ValueError(f"the highest sparsity must be between 0 and 1, got {highest}")
        if not resolution > 0.0:
            raise ValueError(f"the resolution must be above 0, got {resolution}")
        self._highest = highest
        self._resolution = resolution
        self._limit = limit
        self._tries = tries
        self._floor = max(1, math.ceil(highest / resolution - 1e-9))
        self._drops: dict[int, float] = {}
        self._refused: set[int] = set()
        self._extra = 0.0

    def propose(self) -> float | None:
        """The next value to try; None when the answer is known to the resolution, or no trial is left."""
        if len(self._drops) >= self._tries:
            return None
        if not self._drops:
            return self._highest
        best = self._best()
        accepted = self._floor if best is None else best
        refused = max((step for step in self._drops if step < accepted), default=accepted)
        if accepted - refused <= 1:
            return None
        inside = self._between(refused, best) if len(self._drops) % _HALVING else (refused + accepted) // 2
        return self._value(min(max(inside, refused + 1), accepted - 1))

    def add(self, value: float, drop: float) -> None:
        """What the trial of a proposed value gave; a drop that is not a number counts as infinite."""
        self._drops[self._step(value)] = math.inf if math.isnan(drop) else drop

    def best(self) -> float | None:
        """The largest value tried that respects the limit."""
        best = self._best()
        return None if best is None else self._value(best)

    def refuse(self, value: float, drop: float) -> None:
        """An accepted value drops by more than its trial said: the others are expected to, by the same amount.

        Where that leaves none and no trial is left, those not refused count as they were tried.
        """
        step = self._step(value)
        self._refused.add(step)
        self._extra = max(self._extra, drop - self._drops[step]) if math.isfinite(drop) else self._extra

    def _best(self) -> int | None:
        steps = sorted(step for step in self._drops if step not in self._refused)
        good = [step for step in steps if self._drops[step] + self._extra <= self._limit + 1e-9]
        if not good and len(self._drops) >= self._tries:
            good = [step for step in steps if self._drops[step] <= self._limit + 1e-9]
        return good[0] if good else None

    def _between(self, refused: int, best: int | None) -> int:
        """Where the drop is expected to meet the limit, below ``refused``."""
        if not self._limit > 0.0:
            return (refused + (self._floor if best is None else best)) // 2
        above = self._height(refused)
        if best is not None:
            below = self._height(best)
            return refused + math.ceil((best - refused) * above / max(above - below, 1e-9))
        slope = math.log(10.0) * self._resolution / _DECADE
        earlier = max((step for step in self._drops if step < refused), default=None)
        if earlier is not None and self._height(earlier) > above:
            slope = (self._height(earlier) - above) / (refused - earlier)
        half = (self._floor - refused + 1) // 2
        return refused + min(math.ceil(_MARGIN * min(above / slope, float(half))), half)

    def _height(self, step: int) -> float:
        """Logarithm of the drop over the limit; refused values lie above 0."""
        drop = self._drops[step] + self._extra
        height = math.log(max(min(drop, 1e6 * self._limit) / self._limit, _LEAST))
        return max(height, 1e-3) if step in self._refused else height

    def _value(self, step: int) -> float:
        return round(self._highest - step * self._resolution, 12) if step else self._highest

    def _step(self, value: float) -> int:
        return round((self._highest - value) / self._resolution)
