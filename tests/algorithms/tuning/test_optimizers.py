"""Update rules against the textbook's formulas, one scalar at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.tuning import OPTIMIZERS
from pot_sparsity.algorithms.tuning.optimizers import FadingMeanOfTensors, Lookahead, MeanOfTensors

RATE, MOMENTUM = 0.03, 0.8
gradients = st.lists(st.floats(-10, 10), min_size=1, max_size=12)


def adam(values: list[float]) -> list[float]:
    """Kingma and Ba, algorithm 1, with the constants of the paper."""
    changes = []
    for t in range(1, len(values) + 1):
        m = sum((1 - 0.9) * 0.9 ** (t - i) * values[i - 1] for i in range(1, t + 1))
        v = sum((1 - 0.999) * 0.999 ** (t - i) * values[i - 1] ** 2 for i in range(1, t + 1))
        changes.append(-RATE * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8))
    return changes


def sgd(values: list[float]) -> list[float]:
    return [-RATE * sum(MOMENTUM ** (t - i) * values[i] for i in range(t + 1)) for t in range(len(values))]


def adadelta(values: list[float]) -> list[float]:
    """Zeiler, algorithm 1, with rho 0.9 and eps 1e-6."""
    square = moved = 0.0
    changes = []
    for g in values:
        square = 0.9 * square + 0.1 * g * g
        change = -math.sqrt(moved + 1e-6) / math.sqrt(square + 1e-6) * g
        moved = 0.9 * moved + 0.1 * change * change
        changes.append(RATE * change)
    return changes


ORACLES: dict[str, Callable[[list[float]], list[float]]] = {"adam": adam, "sgd": sgd, "adadelta": adadelta}


def test_every_optimizer_has_an_oracle() -> None:
    assert set(ORACLES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@settings(deadline=None, max_examples=40)
@given(values=gradients)
def test_rule_is_the_formula(name: str, values: list[float]) -> None:
    rule = OPTIMIZERS[name](np.zeros(2), RATE, MOMENTUM)
    found = [rule(np.array([value, -0.5 * value])) for value in values]
    wanted = [ORACLES[name](values), ORACLES[name]([-0.5 * value for value in values])]
    np.testing.assert_allclose(np.array(found), np.array(wanted).T, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_float32_stays_float32_and_no_gradient_means_no_change(name: str) -> None:
    rule = OPTIMIZERS[name](np.zeros((2, 3), np.float32), RATE, MOMENTUM)
    gradient = np.array([[1.0, 0.0, 2.0], [0.0, -3.0, 0.0]], np.float32)
    for _ in range(5):
        change = rule(gradient)
        assert change.dtype == np.float32
        assert np.array_equal(change != 0, gradient != 0)
        assert np.array_equal(np.sign(change), -np.sign(gradient))


def test_lookahead_goes_part_of_the_way() -> None:
    fast: Float64 = np.array([1.0, 2.0])
    lookahead = Lookahead([fast], steps=3, alpha=0.25)
    for step in range(1, 7):
        fast += 1.0
        before = fast.copy()
        lookahead.after_update([fast])
        if step % 3:
            assert np.array_equal(fast, before)
    # after three steps of +1: slow = 1 + 0.25 * 3; after three more: the same again
    np.testing.assert_allclose(fast, np.array([1.0, 2.0]) + 2 * 0.75)


def test_means_are_means() -> None:
    states = np.random.default_rng(0).normal(size=(5, 3))
    plain, fading = MeanOfTensors([np.zeros(3)]), FadingMeanOfTensors([np.zeros(3)], 0.9)
    wanted: Float64 = np.zeros(3)
    for state in states:
        plain.include([state])
        fading.include([state])
        wanted = 0.9 * wanted + 0.1 * state
    np.testing.assert_allclose(plain.tensors[0], states.mean(axis=0))
    np.testing.assert_allclose(fading.tensors[0], wanted)
