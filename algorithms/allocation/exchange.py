"""Polish of an allocation on the true distance of the whole network, by moving zeros between two layers.

Curves know each layer alone, and distortions add up only roughly. Which exchange pays is therefore uncertain, and an
evaluation of the network is dear. So the true effect of a layer is taken to be its predicted one times an unknown
factor; each evaluation says something about the two layers' factors, and the exchange with the largest
expected improvement is tried next (the acquisition function of Bayesian optimisation, on a linear model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.arrays import Bool, Float64

#: Parts of the smaller layer's kept weights that one exchange moves.
STEPS = (0.2, 0.05)
# Standard deviation of a layer's factor, and of an observation as a part of what was predicted for the two layers.
_SPREAD = 0.5
_NOISE = 0.2


@dataclass(frozen=True)
class Trial:
    """One exchange that was tried.

    Attributes
    ----------
    giver, receiver
        Index of the layer that got weights back, and of the one that lost more.
    given, received
        Zeros taken from the first and added to the second.
    value
        The network's distance with it.
    kept
        Whether it was lower than the best before.
    """

    giver: int
    receiver: int
    given: int
    received: int
    value: float
    kept: bool


@dataclass(frozen=True)
class Exchanged:
    """The result of :func:`exchange`: zeros per layer ``[layers]``, distance before and after, all trials."""

    zeros: Int64
    before: float
    after: float
    trials: tuple[Trial, ...]


def exchange(
    zeros: Int64,
    curves: Sequence[Curve],
    evaluate: Callable[[Int64], float],
    *,
    lower: Int64,
    upper: Int64,
    tries: int,
    steps: Sequence[float] = STEPS,
    prices: Float64 | None = None,
) -> Exchanged:
    """Move zeros from one layer to another wherever that brings the whole network closer to the dense one.

    Parameters
    ----------
    zeros
        Number of zeros per layer to start from, ``[layers]``.
    curves
        One for each layer, with the cost ``nonzeros``: what they predict decides which exchanges are tried.
    evaluate
        Distance of the network with so many zeros ``[layers]``, the true measure. Called once at the start and
        at most ``tries`` times more.
    lower, upper
        Bounds of each layer's zeros, ``[layers]``.
    tries
        Most exchanges to evaluate.
    steps
        How much one exchange moves, as parts of the kept weights (in units of cost) of whichever of the two
        layers has fewer.
    prices
        What one kept weight of each layer costs, positive, ``[layers]`` (FLOPs per weight, for example); None is
        1 each. The summed cost never rises; without prices the number of zeros stays the same to the weight.

    Returns
    -------
    Exchanged
        Exchanges are kept one on top of the other, each only if the distance falls. Same inputs, same trials.

    Raises
    ------
    ValueError
        ``zeros`` outside the bounds, prices that are not positive, or a start whose distance is not finite.

    Notes
    -----
    One trial takes ``O(layers^2)`` besides the evaluation. A trial whose distance is not finite is dropped.
    """
    price = np.ones(zeros.size) if prices is None else prices
    if not (price > 0.0).all():
        raise ValueError("prices must be positive")
    if not ((zeros >= lower) & (zeros <= upper)).all():
        raise ValueError("the number of zeros of a layer is outside its bounds")
    best, before = zeros.copy(), evaluate(zeros.copy())
    if not np.isfinite(before):
        raise ValueError(f"the distance at the start is {before}")
    value, trials, used = before, [], set[tuple[int, int, int]]()
    belief = _Belief.start(
        sum(float(curve.at(count)) for curve, count in zip(curves, best, strict=True)), before, best.size
    )
    candidates = _Candidates.around(best, curves, price, lower, upper, steps)
    for _ in range(tries):
        pick = candidates.most_promising(belief, used)
        if pick is None:
            break
        step, giver, receiver = pick
        trial = best.copy()
        given, received = candidates.given[pick], candidates.received[pick]
        trial[giver] -= given
        trial[receiver] += received
        result = evaluate(trial.copy())
        kept = bool(result < value)
        trials.append(Trial(int(giver), int(receiver), int(given), int(received), float(result), kept))
        if np.isfinite(result):
            belief.learn(giver, receiver, candidates.saved[pick], candidates.lost[pick], value - result)
        used.add((step, giver, receiver))
        if kept:
            best, value, used = trial, result, set()
            candidates = _Candidates.around(best, curves, price, lower, upper, steps)
    return Exchanged(best, float(before), float(value), tuple(trials))


@dataclass(frozen=True)
class _Candidates:
    """All exchanges around an allocation, each array ``[steps, givers, receivers]``.

    ``given`` and ``received`` zeros, the distortion ``saved`` in the giver and ``lost`` in the receiver as the curves
    predict, and which exchanges are ``possible``.
    """

    given: Int64
    received: Int64
    saved: Float64
    lost: Float64
    possible: Bool

    @staticmethod
    def around(
        zeros: Int64,
        curves: Sequence[Curve],
        price: Float64,
        lower: Int64,
        upper: Int64,
        steps: Sequence[float],
    ) -> _Candidates:
        kept = np.array([curve.size for curve in curves]) - zeros
        moved = np.minimum.outer(kept * price, kept * price)
        room = np.minimum.outer((zeros - lower) * price, (upper - zeros) * price)
        amount = np.minimum(np.array(steps)[:, None, None] * moved, room)
        given = np.maximum(np.rint(amount / price[:, None]), 1.0).astype(np.int64)
        # Rounded up against the rounding of the products, so that the cost never rises.
        received = np.ceil(given * price[:, None] / price * (1.0 - 1e-12)).astype(np.int64)
        possible = (given <= (zeros - lower)[:, None]) & (received <= upper - zeros)
        possible &= ~np.eye(zeros.size, dtype=np.bool_)
        saved, lost = np.empty(given.shape), np.empty(given.shape)
        for index, curve in enumerate(curves):
            here = curve.at(zeros[index])
            saved[:, index] = here - curve.at(zeros[index] - given[:, index])
            lost[:, :, index] = curve.at(zeros[index] + received[:, :, index]) - here
        return _Candidates(given, received, saved, lost, possible)

    def most_promising(self, belief: _Belief, used: set[tuple[int, int, int]]) -> tuple[int, int, int] | None:
        """The exchange of the largest expected improvement (of equals the first); None where none can improve."""
        mean = self.saved * belief.mean[:, None] - self.lost * belief.mean
        spread = belief.covariance
        variance = np.diagonal(spread)[:, None] * self.saved**2 + np.diagonal(spread) * self.lost**2
        deviation = np.sqrt(np.maximum(variance - 2.0 * spread * self.saved * self.lost, 0.0))
        ratio = np.divide(mean, deviation, out=np.zeros_like(mean), where=deviation > 0.0)
        density = np.exp(-0.5 * ratio**2) / np.sqrt(2.0 * np.pi)
        expected = np.where(deviation > 0.0, mean * ndtr(ratio) + deviation * density, np.maximum(mean, 0.0))
        expected[~self.possible] = 0.0
        for trial in used:
            expected[trial] = 0.0
        step, giver, receiver = np.unravel_index(int(expected.argmax()), expected.shape)
        pick = (int(step), int(giver), int(receiver))
        return pick if expected[pick] > 0.0 else None


@dataclass
class _Belief:
    """Normal belief about the layers' factors: ``mean [layers]``, ``covariance [layers, layers]``."""

    mean: Float64
    covariance: Float64
    scale: float

    @staticmethod
    def start(predicted: float, measured: float, layers: int) -> _Belief:
        """Distortions as predicted, all times what the whole network says about their sum."""
        scale = measured / predicted if predicted > 0.0 and measured > 0.0 else 1.0
        return _Belief(np.full(layers, scale), np.eye(layers) * (_SPREAD * scale) ** 2, scale)

    def learn(self, giver: int, receiver: int, saved: float, lost: float, gain: float) -> None:
        """Condition on one observation ``gain = saved * factor[giver] - lost * factor[receiver] + noise``."""
        weights = self.covariance[giver] * saved - self.covariance[receiver] * lost
        noise = (_NOISE * self.scale * (abs(saved) + abs(lost))) ** 2
        variance = float(weights[giver] * saved - weights[receiver] * lost) + noise
        if variance <= 0.0:
            return
        surprise = gain - (self.mean[giver] * saved - self.mean[receiver] * lost)
        self.mean = self.mean + weights * (surprise / variance)
        self.covariance = self.covariance - np.outer(weights, weights) / variance
