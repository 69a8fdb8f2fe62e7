"""Layer-wise fine-tuning: gradient descent on the kept weights and the bias of one layer.

The layer is trained on its own, against the dense model's output (POT, "Local layer-wise fine-tuning with auxiliary
losses"): the mask is frozen, each batch serves for several updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from pot_sparsity.algorithms.arrays import AnyArray, Bool, Float64, Geometry
from pot_sparsity.algorithms.moments import CrossMomentsAccumulator
from pot_sparsity.algorithms.patches import Workspace
from pot_sparsity.algorithms.tuning.losses import ColumnsObjective, MomentsObjective, Objective
from pot_sparsity.algorithms.tuning.optimizers import (
    Adadelta,
    Adam,
    Averaging,
    FadingMeanOfTensors,
    Lookahead,
    MeanOfTensors,
    RuleFactory,
    Sgd,
)

OPTIMIZERS: dict[str, RuleFactory] = {"adam": Adam, "sgd": Sgd, "adadelta": Adadelta}
#: Learning rates of weights and biases where none are given.
RATES = {"adam": (1e-5, 1e-4), "sgd": (0.01, 0.1), "adadelta": (0.1, 0.1)}


@dataclass(frozen=True)
class TuningSettings:
    """How a layer is tuned.

    Attributes
    ----------
    optimizer, loss
        Keys of :data:`OPTIMIZERS` and of :data:`~pot_sparsity.algorithms.tuning.losses.LOSSES`.
    iterations
        How many batches there will be (the second half of them enters ``swa``).
    updates_per_batch
        Updates on each batch before the next one.
    learning_rate, bias_learning_rate
        None takes the optimizer's own (:data:`RATES`).
    momentum
        Of SGD.
    huber_delta
        Where the Huber loss turns linear, in units of the layer's output.
    weight_decay
        ``weight_decay * parameter`` is added to the gradients of weights and bias (L2 regularization).
    lookahead_steps, lookahead_alpha
        Lookahead's k (0: none) and alpha.
    averaging
        ``swa``: the mean of the states after each batch of the second half; ``ema``: an exponential moving
        average over all updates with ``averaging_decay``.
    """

    optimizer: str = "adam"
    loss: str = "mse"
    iterations: int = 30
    updates_per_batch: int = 40
    learning_rate: float | None = None
    bias_learning_rate: float | None = None
    momentum: float = 0.9
    huber_delta: float = 1.0
    weight_decay: float = 0.0
    lookahead_steps: int = 0
    lookahead_alpha: float = 0.5
    averaging: Averaging = "none"
    averaging_decay: float = 0.99

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of weights and bias."""
        own = RATES[self.optimizer]
        return (
            own[0] if self.learning_rate is None else self.learning_rate,
            own[1] if self.bias_learning_rate is None else self.bias_learning_rate,
        )


@dataclass(frozen=True)
class TunedLayer:
    """Weight ``[groups, rows, cols]`` and bias ``[groups, rows]`` (None where there is none), float64.

    ``losses [batches, 2]`` is the loss of each batch before and after its updates.
    """

    weight: Float64
    bias: Float64 | None
    losses: Float64


def tune_layer(
    weight: Float64,
    bias: Float64 | None,
    mask: Bool,
    batches: Iterable[tuple[AnyArray, AnyArray]],
    geometry: Geometry,
    settings: TuningSettings,
    *,
    dtype: DTypeLike = np.float32,
) -> TunedLayer:
    """Train the kept weights and the bias of one layer.

    Parameters
    ----------
    weight, bias
        Where to start, ``[groups, rows, cols]`` and ``[groups, rows]``; a bias of None stays out of it.
    mask
        True where a weight is kept; all others are exactly zero in the result.
    batches
        Pairs of the layer's input and its target output, as the model has them; read once, in order.
    geometry
        How the layer reads its input.
    settings
        Optimizer, loss and their settings.
    dtype
        Type of the parameters while they are trained.

    Returns
    -------
    TunedLayer

    Raises
    ------
    ValueError
        Unknown optimizer or loss, or the training diverged.
    """
    if settings.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {settings.optimizer!r} is not known: use one of {', '.join(OPTIMIZERS)}")
    start: AnyArray = np.where(mask, weight, 0.0).astype(dtype)
    start_bias: AnyArray = (np.zeros(weight.shape[:2]) if bias is None else bias).astype(dtype)
    training = _Training(start, start_bias, mask, bias is not None, settings)
    workspace = Workspace()
    with np.errstate(over="ignore", invalid="ignore"):
        losses = [training.batch(_objective(x, y, geometry, settings, dtype, workspace)) for x, y in batches]
        tuned, tuned_bias = (part.astype(np.float64) for part in training.result())
    if not (np.isfinite(tuned).all() and np.isfinite(tuned_bias).all()):
        rates = " and ".join(f"{rate:g}" for rate in settings.rates)
        raise ValueError(f"{settings.optimizer} diverged at learning rates {rates}: lower them")
    return TunedLayer(
        np.where(mask, tuned, 0.0), None if bias is None else tuned_bias, np.array(losses).reshape(-1, 2)
    )


def _objective(
    x: AnyArray,
    y: AnyArray,
    geometry: Geometry,
    settings: TuningSettings,
    dtype: DTypeLike,
    workspace: Workspace,
) -> Objective:
    if settings.loss != "mse":
        return ColumnsObjective(x, y, geometry, settings.loss, delta=settings.huber_delta, dtype=dtype)
    total = CrossMomentsAccumulator(geometry, workspace=workspace)
    total.update(x, y)
    return MomentsObjective(total.result(), dtype)


class _Training:
    """The tensors on their way, with the state of everything that acts on them."""

    def __init__(
        self, weight: AnyArray, bias: AnyArray, mask: Bool, with_bias: bool, settings: TuningSettings
    ) -> None:
        self._tensors = [weight, bias]
        self._mask: AnyArray = mask.astype(weight.dtype)
        self._with_bias = with_bias
        self._settings = settings
        factory = OPTIMIZERS[settings.optimizer]
        self._rules = [
            factory(tensor, rate, settings.momentum)
            for tensor, rate in zip(self._tensors, settings.rates, strict=True)
        ]
        self._lookahead = (
            Lookahead(self._tensors, settings.lookahead_steps, settings.lookahead_alpha)
            if settings.lookahead_steps
            else None
        )
        self._fading = (
            FadingMeanOfTensors(self._tensors, settings.averaging_decay)
            if settings.averaging == "ema"
            else None
        )
        self._mean = MeanOfTensors(self._tensors) if settings.averaging == "swa" else None
        self._batches = 0

    def batch(self, objective: Objective) -> tuple[float, float]:
        """All updates on one batch; its loss before and after."""
        before = objective.value(*self._tensors)
        for _ in range(self._settings.updates_per_batch):
            self._update(objective)
        self._batches += 1
        if self._mean is not None and self._batches > self._settings.iterations // 2:
            self._mean.include(self._tensors)
        return before, objective.value(*self._tensors)

    def result(self) -> Sequence[AnyArray]:
        """Weight and bias: averaged if that was asked for."""
        average = self._fading or self._mean
        return self._tensors if average is None else average.tensors

    def _update(self, objective: Objective) -> None:
        gradients = objective.gradient(*self._tensors)
        for tensor, gradient, rule, trained in zip(
            self._tensors, gradients, self._rules, (self._mask, self._with_bias), strict=True
        ):
            if self._settings.weight_decay:
                gradient += self._settings.weight_decay * tensor
            gradient *= trained
            tensor += rule(gradient)
        if self._lookahead is not None:
            self._lookahead.after_update(self._tensors)
        if self._fading is not None:
            self._fading.include(self._tensors)
