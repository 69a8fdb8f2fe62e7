"""Fitting a layer to what is left of its output behind the activation.

Where the dense network's activation is flat (a ReLU's negative side, both ends of a ReLU6) any output beyond the edge
is as good as the dense one. Least squares on the layer's own output does not know that and spends the few kept
weights on values that nobody reads. With the dense value ``z_d`` in front of the activation, what a residual branch
adds to the output in the sparse model, ``s``, and the activation ``a(z) = min(max(z, low), high)``, the layer should
minimise ``|a(W x + b + s) - a(z_d)|^2``.

For a position that is flat in the dense network this is replaced by its convex part (``z_d <= low``:
``max(W x + b + s - low, 0)^2``), to which ``slack * |W x + b + s - z_d|^2`` is added: with ``slack`` 1 it is least
squares again. The quadratic ``|W x + b - u|^2``, whose target ``u`` follows the current output into the flat region,
lies above that objective and touches it, so steps preconditioned by the plain ``H`` descend without a line search
(majorisation); Nesterov's extrapolation, restarted where it overshoots, speeds them up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float32, Float64

#: Relative residual at which conjugate gradients stop; each outer step starts anew from what is left.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Positions:
    """A layer's inputs at sampled positions, and what its output is compared with there.

    Attributes
    ----------
    inputs
        float32 ``[groups, cols + 1, positions]``; the last row is one.
    target
        Dense value in front of the activation, float32 ``[groups, rows, positions]``.
    skip
        What the sparse model adds to the layer's output before the activation, like ``target``; None for nothing.
    low, high
        The activation is flat below and above; infinite where it is not.
    """

    inputs: Float32
    target: Float32
    skip: Float32 | None = None
    low: float = -np.inf
    high: float = np.inf

    @property
    def rectified(self) -> bool:
        """Whether the activation is flat anywhere."""
        return bool(np.isfinite(self.low) or np.isfinite(self.high))

    def value(self, weight: Float64) -> Float32:
        """What arrives at the activation with ``weight [groups, rows, cols + 1]``."""
        output = weight.astype(np.float32) @ self.inputs
        return output if self.skip is None else output + self.skip

    def wanted(self, value: Float32, slack: float) -> Float32:
        """What ``value`` should be: the target, or where that is flat the nearest flat value."""
        if not self.rectified:
            return self.target
        nearest = np.where(
            self.target <= self.low,
            np.minimum(value, np.float32(self.low)),
            np.where(self.target >= self.high, np.maximum(value, np.float32(self.high)), self.target),
        )
        if slack:
            nearest += np.float32(slack) * (self.target - nearest)
        return np.asarray(nearest, dtype=np.float32)


def rectified_error(weight: Float64, bias: Float64, positions: Positions) -> float:
    """Energy of the error behind the activation, relative to the variance of the dense value there."""
    value = positions.value(_joined(weight, bias))
    wanted = np.clip(positions.target, positions.low, positions.high)
    error = np.clip(value, positions.low, positions.high) - wanted
    spread = wanted - wanted.mean(axis=-1, keepdims=True)
    power = float(np.einsum("grn,grn->", spread, spread, dtype=np.float64))
    return float(np.einsum("grn,grn->", error, error, dtype=np.float64)) / power if power > 0 else 0.0


def fit_rectified(
    weight: Float64,
    bias: Float64,
    positions: Positions,
    *,
    slack: float = 0.3,
    ridge: float = 1e-3,
    iterations: int = 8,
    products: int = 24,
) -> tuple[Float64, Float64]:
    """Weight and bias that serve the activation's output; zeros stay zero.

    Parameters
    ----------
    weight
        float64 ``[groups, rows, cols]``; its zeros are its mask.
    bias
        float64 ``[groups, rows]``.
    positions
        What to fit to.
    slack
        Weight of the plain error where the dense activation is flat, 0 to 1.
    ridge
        Pull towards ``weight``, relative to the mean second moment of the inputs.
    iterations
        Steps of the majorisation; without a flat side one is enough.
    products
        Products with H per step, at most.

    Returns
    -------
    weight, bias
        Of the shapes given.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or a number is not finite.
    """
    groups, rows, cols = weight.shape
    count = positions.inputs.shape[-1]
    if positions.inputs.shape != (groups, cols + 1, count) or positions.target.shape != (groups, rows, count):
        raise ValueError(
            f"weight {weight.shape} does not fit inputs {positions.inputs.shape} and target {positions.target.shape}"
        )
    start = _joined(weight, bias)
    if not count:
        return weight, bias
    transposed = positions.inputs.swapaxes(1, 2)
    second = (positions.inputs @ transposed).astype(np.float64) / count
    if not np.isfinite(second).all():
        raise ValueError("the inputs are not finite")
    pull = np.zeros((groups, 1, cols + 1))
    pull[:, :, :-1] = ridge * np.einsum("gcc->g", second[:, :-1, :-1])[:, None, None] / max(cols, 1)
    free = np.concatenate([weight != 0.0, np.ones((groups, rows, 1), bool)], axis=-1)
    current, ahead, pace = start, start, 1.0
    for _ in range(iterations if positions.rectified and slack < 1.0 else 2):
        value = positions.value(ahead)
        residual = positions.wanted(value, slack) - value
        slope = (residual @ transposed).astype(np.float64) / count - pull * (ahead - start)
        following = ahead + _masked_solve(second, pull, slope, free, products)
        if float(((ahead - following) * (following - current)).sum()) > 0:
            pace = 1.0
        faster = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * pace * pace))
        ahead = following + (pace - 1.0) / faster * (following - current)
        current, pace = following, faster
    return current[..., :-1], current[..., -1]


def _joined(weight: Float64, bias: Float64) -> Float64:
    return np.concatenate([weight, bias[..., None]], axis=-1)


def _masked_solve(second: Float64, pull: Float64, slope: Float64, free: Bool, products: int) -> Float64:
    """``D`` on the support with ``D (H + pull) = slope`` there, all rows at once by conjugate gradients."""
    diagonal = np.einsum("gcc->gc", second)[:, None, :] + pull
    inverse = np.where(free & (diagonal > 0), 1.0 / np.where(diagonal > 0, diagonal, 1.0), 0.0)
    residual = np.where(free, slope, 0.0)
    step = np.zeros_like(slope)
    direction = inverse * residual
    energy = np.einsum("grc,grc->gr", residual, direction)
    enough = _TOLERANCE**2 * energy
    for _ in range(products):
        active = energy > enough
        if not active.any():
            break
        product = np.where(free, direction @ second + pull * direction, 0.0)
        curvature = np.einsum("grc,grc->gr", direction, product)
        length = np.where(active & (curvature > 0), energy / np.where(curvature > 0, curvature, 1.0), 0.0)[
            ..., None
        ]
        step += length * direction
        residual -= length * product
        scaled = inverse * residual
        fresh = np.einsum("grc,grc->gr", residual, scaled)
        direction = (
            scaled
            + np.where(energy > 0, fresh / np.where(energy > 0, energy, 1.0), 0.0)[..., None] * direction
        )
        energy = np.where(active, fresh, energy)
    return step
