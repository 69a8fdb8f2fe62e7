"""Tuning one layer: the optimum it walks to, the zeros it keeps, and the path it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pot_sparsity.algorithms.arrays import AnyArray, Bool, ConvGeometry, Float64, MatMulGeometry
from pot_sparsity.algorithms.tuning import LOSSES, OPTIMIZERS, TunedLayer, TuningSettings, tune_layer

ROWS, COLS, SAMPLES = 4, 6, 60
LINEAR = MatMulGeometry()


class Layer:
    """A linear layer with noisy targets, a mask and a start."""

    def __init__(self, seed: int = 0, noise: float = 0.3) -> None:
        random = np.random.default_rng(seed)
        self.dense: Float64 = random.normal(size=(1, ROWS, COLS))
        self.x: Float64 = random.normal(size=(SAMPLES, COLS)) + 0.4
        self.y: Float64 = self.x @ self.dense[0].T + 0.7 + noise * random.normal(size=(SAMPLES, ROWS))
        self.mask: Bool = random.random((1, ROWS, COLS)) < 0.6
        self.bias: Float64 = np.zeros((1, ROWS))

    def batches(self, count: int) -> Iterator[tuple[AnyArray, AnyArray]]:
        """All samples, over and over."""
        for _ in range(count):
            yield self.x, self.y

    def tuned(self, options: TuningSettings, **named: type) -> TunedLayer:
        return tune_layer(
            self.dense, self.bias, self.mask, self.batches(options.iterations), LINEAR, options, **named
        )

    def optimum(self) -> tuple[Float64, Float64]:
        """Least squares of each row on its kept columns and a constant."""
        weight, bias = np.zeros((1, ROWS, COLS)), np.zeros((1, ROWS))
        for row in range(ROWS):
            kept = np.flatnonzero(self.mask[0, row])
            design = np.hstack([self.x[:, kept], np.ones((SAMPLES, 1))])
            solution = np.linalg.lstsq(design, self.y[:, row], rcond=None)[0]
            weight[0, row, kept], bias[0, row] = solution[:-1], solution[-1]
        return weight, bias


CONVERGED = (
    TuningSettings("adam", iterations=40, updates_per_batch=50, learning_rate=5e-3, bias_learning_rate=5e-3),
    TuningSettings("sgd", iterations=20, updates_per_batch=50, learning_rate=0.3, bias_learning_rate=0.3),
)


@pytest.mark.parametrize("options", CONVERGED, ids=lambda options: options.optimizer)
def test_walks_to_least_squares(options: TuningSettings) -> None:
    layer = Layer()
    weight, bias = layer.optimum()
    found = layer.tuned(options, dtype=np.float64)
    assert found.bias is not None
    np.testing.assert_allclose(found.weight, weight, atol=1e-5)
    np.testing.assert_allclose(found.bias, bias, atol=1e-5)
    best = ((layer.x @ weight[0].T + bias[0] - layer.y) ** 2).mean()
    assert found.losses[-1, 1] == pytest.approx(best, rel=1e-6)
    start = layer.x @ np.where(layer.mask, layer.dense, 0.0)[0].T
    assert found.losses[0, 0] == pytest.approx(((start - layer.y) ** 2).mean(), rel=1e-6)


def test_float32_walks_there_too() -> None:
    layer = Layer()
    weight, _ = layer.optimum()
    np.testing.assert_allclose(layer.tuned(CONVERGED[0]).weight, weight, atol=1e-3)


@pytest.mark.parametrize(("optimizer", "loss"), sorted(product(OPTIMIZERS, LOSSES)))
def test_zeros_stay_zero_and_the_loss_falls(optimizer: str, loss: str) -> None:
    layer = Layer(1)
    options = TuningSettings(optimizer, loss, iterations=4, updates_per_batch=20, weight_decay=1e-6)
    rate = 1e-2 if optimizer == "sgd" else 1e-3
    found = layer.tuned(replace(options, learning_rate=rate, bias_learning_rate=rate))
    assert not found.weight[~layer.mask].any()
    assert found.weight[layer.mask].all()
    assert found.losses.shape == (4, 2)
    assert found.losses[-1, 1] < found.losses[0, 0]


def test_a_missing_bias_stays_missing() -> None:
    layer = Layer()
    options = TuningSettings(iterations=3, updates_per_batch=5)
    found = tune_layer(layer.dense, None, layer.mask, layer.batches(3), LINEAR, options)
    assert found.bias is None
    with_bias = layer.tuned(options)
    assert with_bias.bias is not None
    assert with_bias.bias.all()


def adam_by_hand(layer: Layer, decay: float, updates: int) -> list[tuple[Float64, Float64]]:
    """Every state of Adam at 1e-3, from the residuals of the samples."""
    parameters = [np.where(layer.mask, layer.dense, 0.0)[0], layer.bias[0].copy()]
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    states = []
    for t in range(1, updates + 1):
        residual = layer.x @ parameters[0].T + parameters[1] - layer.y
        gradients = [2 * residual.T @ layer.x / residual.size, 2 * residual.sum(axis=0) / residual.size]
        gradients[0] = (gradients[0] + decay * parameters[0]) * layer.mask[0]
        gradients[1] = gradients[1] + decay * parameters[1]
        for index, gradient in enumerate(gradients):
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            step = first[index] / (1 - 0.9**t) / (np.sqrt(second[index] / (1 - 0.999**t)) + 1e-8)
            parameters[index] = parameters[index] - 1e-3 * step
        states.append((parameters[0].copy(), parameters[1].copy()))
    return states


HAND = TuningSettings(iterations=4, updates_per_batch=3, learning_rate=1e-3, bias_learning_rate=1e-3)


def assert_state(found: TunedLayer, weight: Float64, bias: Float64) -> None:
    assert found.bias is not None
    np.testing.assert_allclose(found.weight[0], weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.bias[0], bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_takes_the_path_of_adam(decay: float, loss: str) -> None:
    layer = Layer(2)
    options = replace(HAND, weight_decay=decay)
    if loss == "huber":  # half the squared error while no residual reaches delta; Adam undoes the half
        options = replace(options, loss=loss, huber_delta=1e3, weight_decay=decay / 2)
    states = adam_by_hand(layer, decay, 12)
    found = layer.tuned(options, dtype=np.float64)
    assert found.bias is not None
    tolerance = 1e-9 if loss == "mse" else 1e-6  # eps of Adam does not scale with the loss
    np.testing.assert_allclose(found.weight[0], states[-1][0], atol=tolerance)
    np.testing.assert_allclose(found.bias[0], states[-1][1], atol=tolerance)


def test_swa_is_the_mean_after_the_batches_of_the_second_half() -> None:
    layer = Layer(2)
    states = adam_by_hand(layer, 0.0, 12)
    weight, bias = (np.mean([states[8][i], states[11][i]], axis=0) for i in (0, 1))
    assert_state(layer.tuned(replace(HAND, averaging="swa"), dtype=np.float64), weight, bias)


def test_ema_fades() -> None:
    layer = Layer(2)
    weight, bias = np.where(layer.mask, layer.dense, 0.0)[0], layer.bias[0]
    for state in adam_by_hand(layer, 0.0, 12):
        weight, bias = 0.8 * weight + 0.2 * state[0], 0.8 * bias + 0.2 * state[1]
    options = replace(HAND, averaging="ema", averaging_decay=0.8)
    assert_state(layer.tuned(options, dtype=np.float64), weight, bias)


def test_lookahead_of_one_step_and_full_alpha_is_adam() -> None:
    layer = Layer(2)
    options = replace(HAND, lookahead_steps=1, lookahead_alpha=1.0)
    assert_state(layer.tuned(options, dtype=np.float64), *adam_by_hand(layer, 0.0, 12)[-1])
    slower = layer.tuned(replace(options, lookahead_steps=3, lookahead_alpha=0.0), dtype=np.float64)
    assert_state(slower, np.where(layer.mask, layer.dense, 0.0)[0], layer.bias[0])


def test_grouped_convolution() -> None:
    random = np.random.default_rng(5)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), groups=2)
    weight, bias = random.normal(size=(2, 3, 18)), random.normal(size=(2, 3))
    mask = random.random(weight.shape) < 0.5
    x = random.normal(size=(8, 4, 6, 6)).astype(np.float32)
    y = random.normal(size=(8, 6, 6, 6)).astype(np.float32)
    options = TuningSettings(iterations=3, updates_per_batch=10, learning_rate=1e-3)
    fast, explicit = (
        tune_layer(weight, bias, mask, [(x, y)] * 3, geometry, replace(options, loss=loss, huber_delta=1e9))
        for loss in ("mse", "huber")
    )
    assert not fast.weight[~mask].any()
    assert fast.losses[-1, 1] < fast.losses[0, 0]
    np.testing.assert_allclose(fast.losses, 2 * explicit.losses, rtol=1e-4)


def test_what_it_refuses() -> None:
    layer = Layer()
    with pytest.raises(ValueError, match="optimizer 'adamw' is not known: use one of adam, sgd, adadelta"):
        layer.tuned(TuningSettings("adamw"))
    with pytest.raises(ValueError, match="sgd diverged at learning rates 1000 and 1000: lower them"):
        layer.tuned(TuningSettings("sgd", learning_rate=1e3, bias_learning_rate=1e3))
