"""Update rules of first-order optimizers, one object for each tensor that is trained.

A rule keeps its own state and turns gradients into changes, element by element: where the gradient has always been
zero the change is exactly zero, so that frozen weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray

Averaging = Literal["none", "swa", "ema"]

#: Decay rates of Adam's first and second moment, and the constant that keeps its denominator from zero.
ADAM = (0.9, 0.999, 1e-8)
#: Decay rate of Adadelta's two averages, and the constant added to them.
ADADELTA = (0.9, 1e-6)


class Rule(Protocol):
    """State of an optimizer for one tensor."""

    def __call__(self, gradient: AnyArray) -> AnyArray:
        """Change to add to the tensor, of the gradient's shape and type."""


class RuleFactory(Protocol):
    """Makes the rule for one tensor."""

    def __call__(self, like: AnyArray, rate: float, momentum: float) -> Rule:
        """Rule for a tensor of the shape and type of ``like``.

        ``rate`` is the learning rate; ``momentum`` is used by SGD alone.
        """


class Adam:
    """Adam with bias correction (Kingma and Ba, 2015, algorithm 1).

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, change
    ``-rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`` with ``b1, b2, eps`` from :data:`ADAM`.
    """

    def __init__(self, like: AnyArray, rate: float, momentum: float) -> None:
        self._rate = rate
        self._steps = 0
        self._first, self._second = np.zeros_like(like), np.zeros_like(like)

    def __call__(self, gradient: AnyArray) -> AnyArray:
        """Change for this gradient."""
        decay, square_decay, epsilon = ADAM
        self._steps += 1
        self._first *= decay
        self._first += (1.0 - decay) * gradient
        self._second *= square_decay
        self._second += (1.0 - square_decay) * (gradient * gradient)
        scale = np.sqrt(self._second)
        scale /= np.sqrt(1.0 - square_decay**self._steps)
        scale += epsilon
        change = self._first / scale
        change *= -self._rate / (1.0 - decay**self._steps)
        return change


class Sgd:
    """Stochastic gradient descent with momentum: ``v = momentum v + g``, change ``-rate v``."""

    def __init__(self, like: AnyArray, rate: float, momentum: float) -> None:
        self._rate, self._momentum = rate, momentum
        self._velocity = np.zeros_like(like)

    def __call__(self, gradient: AnyArray) -> AnyArray:
        """Change for this gradient."""
        self._velocity *= self._momentum
        self._velocity += gradient
        return -self._rate * self._velocity


class Adadelta:
    """Adadelta (Zeiler, 2012, algorithm 1), its change multiplied by the learning rate.

    ``v = rho v + (1 - rho) g^2``, ``d = -sqrt((u + eps) / (v + eps)) g``, ``u = rho u + (1 - rho) d^2``.
    """

    def __init__(self, like: AnyArray, rate: float, momentum: float) -> None:
        self._rate = rate
        self._gradients, self._changes = np.zeros_like(like), np.zeros_like(like)

    def __call__(self, gradient: AnyArray) -> AnyArray:
        """Change for this gradient."""
        decay, epsilon = ADADELTA
        self._gradients *= decay
        self._gradients += (1.0 - decay) * (gradient * gradient)
        change = -np.sqrt((self._changes + epsilon) / (self._gradients + epsilon)) * gradient
        self._changes *= decay
        self._changes += (1.0 - decay) * (change * change)
        return np.asarray(self._rate * change)


class Lookahead:
    """Lookahead (Zhang et al., 2019): every ``steps`` updates, slow weights move towards the fast ones.

    ``slow += alpha (fast - slow)``, then ``fast = slow``; the inner optimizer keeps its state.
    """

    def __init__(self, tensors: Sequence[AnyArray], steps: int, alpha: float) -> None:
        self._every, self._alpha = steps, alpha
        self._count = 0
        self._slow = [tensor.copy() for tensor in tensors]

    def after_update(self, tensors: Sequence[AnyArray]) -> None:
        """Look at the tensors after an update; they are set back in place when it is time."""
        self._count += 1
        if self._count % self._every:
            return
        for slow, fast in zip(self._slow, tensors, strict=True):
            slow += self._alpha * (fast - slow)
            fast[...] = slow


class MeanOfTensors:
    """Stochastic weight averaging (Izmailov et al., 2018): the plain mean of all states it was shown."""

    def __init__(self, tensors: Sequence[AnyArray]) -> None:
        self._count = 0
        self.tensors = [tensor.copy() for tensor in tensors]

    def include(self, tensors: Sequence[AnyArray]) -> None:
        """Add a state to the mean."""
        self._count += 1
        for mean, tensor in zip(self.tensors, tensors, strict=True):
            mean += (tensor - mean) / self._count


class FadingMeanOfTensors:
    """Exponential moving average: ``mean = decay mean + (1 - decay) state``, from the tensors it starts with."""

    def __init__(self, tensors: Sequence[AnyArray], decay: float) -> None:
        self._decay = decay
        self.tensors = [tensor.copy() for tensor in tensors]

    def include(self, tensors: Sequence[AnyArray]) -> None:
        """Add a state to the average."""
        for mean, tensor in zip(self.tensors, tensors, strict=True):
            mean += (1.0 - self._decay) * (tensor - mean)
