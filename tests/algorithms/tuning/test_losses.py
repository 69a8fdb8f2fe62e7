"""Losses against their definition on the layer's output, gradients against finite differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import ConvGeometry, Float64, Geometry, MatMulGeometry
from pot_sparsity.algorithms.moments import CrossMomentsAccumulator
from pot_sparsity.algorithms.tuning import LOSSES
from pot_sparsity.algorithms.tuning.losses import ColumnsObjective, MomentsObjective, Objective

DELTA = 0.7


def conv(groups: int = 1, stride: int = 1, pad: int = 1) -> ConvGeometry:
    return ConvGeometry((3, 3), (stride, stride), (1, 1), (pad, pad), (pad, pad), groups)


@dataclass(frozen=True)
class Batch:
    """A layer with a batch: geometry, W, b, x and y as the model has them."""

    geometry: Geometry
    weight: Float64
    bias: Float64
    x: Float64
    y: Float64


#: name: geometry, shape of W, shape of x, shape of y
CASES: dict[str, tuple[Geometry, tuple[int, int, int], tuple[int, ...], tuple[int, ...]]] = {
    "conv": (conv(), (1, 3, 18), (4, 2, 5, 6), (4, 3, 5, 6)),
    "strided": (conv(stride=2, pad=0), (1, 3, 18), (4, 2, 7, 5), (4, 3, 3, 2)),
    "grouped": (conv(groups=2), (2, 2, 9), (3, 2, 4, 4), (3, 4, 4, 4)),
    "linear": (MatMulGeometry(), (1, 3, 5), (7, 5), (7, 3)),
    "tokens": (MatMulGeometry(), (1, 3, 5), (4, 6, 5), (4, 6, 3)),
    "columns": (MatMulGeometry(-2), (1, 3, 5), (4, 5, 6), (4, 3, 6)),
    "stacked": (MatMulGeometry(groups=2), (2, 3, 5), (4, 2, 6, 5), (4, 2, 6, 3)),
    "stacked, one input": (MatMulGeometry(groups=2), (2, 3, 5), (4, 1, 6, 5), (4, 2, 6, 3)),
}


def batch(case: str, seed: int = 0) -> Batch:
    geometry, shape, x, y = CASES[case]
    random = np.random.default_rng(seed)
    return Batch(
        geometry,
        random.normal(size=shape),
        random.normal(size=shape[:2]),
        random.normal(size=x) + 0.5,
        2.0 * random.normal(size=y),
    )


def predict(of: Batch, weight: Float64, bias: Float64) -> Float64:
    """The layer's output, by definition, in the layout of ``y``."""
    geometry = of.geometry
    x: NDArray[Any]
    if isinstance(geometry, MatMulGeometry):
        x = of.x if geometry.feature_axis == -1 else of.x.swapaxes(-1, -2)
        out: NDArray[Any] = (
            x @ weight[0].T + bias[0] if geometry.groups == 1 else x @ weight.swapaxes(1, 2) + bias[:, None]
        )
        return np.asarray(out if geometry.feature_axis == -1 else out.swapaxes(-1, -2))
    pad, stride = geometry.pads_begin[0], geometry.strides[0]
    padded: NDArray[Any] = np.pad(of.x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    result: NDArray[Any] = np.zeros(of.y.shape)
    rows, inputs = weight.shape[1], of.x.shape[1] // geometry.groups
    for channel in range(result.shape[1]):
        g, r = divmod(channel, rows)
        kernel = weight[g, r].reshape(inputs, 3, 3)
        for i in range(result.shape[2]):
            for j in range(result.shape[3]):
                window = padded[:, g * inputs : (g + 1) * inputs, i * stride :, j * stride :][:, :, :3, :3]
                result[:, channel, i, j] = (window * kernel).sum(axis=(1, 2, 3)) + bias[g, r]
    return result


def defined(loss: str, prediction: Float64, target: Float64) -> float:
    """The loss as its definition says."""
    residual = prediction - target
    if loss == "mse":
        return float((residual**2).mean())
    if loss == "l1":
        return float(np.abs(residual).mean())
    if loss == "huber":
        large = np.abs(residual) > DELTA
        return float(np.where(large, DELTA * (np.abs(residual) - DELTA / 2), residual**2 / 2).mean())
    cosines = [
        (p * t).sum() / np.sqrt((p * p).sum() * (t * t).sum())
        for p, t in zip(prediction, target, strict=True)
    ]
    return float(np.mean([1 - c for c in cosines]))


def columns(of: Batch, loss: str, *, dtype: type = np.float64, budget: int = 1 << 30) -> ColumnsObjective:
    return ColumnsObjective(of.x, of.y, of.geometry, loss, delta=DELTA, dtype=dtype, budget=budget)


def moments(of: Batch, dtype: type = np.float64) -> MomentsObjective:
    total = CrossMomentsAccumulator(of.geometry)
    total.update(of.x, of.y)
    return MomentsObjective(total.result(), dtype)


def slope(objective: Objective, of: Batch, direction: tuple[Float64, Float64], step: float = 1e-6) -> float:
    """Central difference of the loss."""
    ahead, behind = (
        objective.value(of.weight + sign * step * direction[0], of.bias + sign * step * direction[1])
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_value_is_the_definition(case: str, loss: str) -> None:
    of = batch(case)
    wanted = defined(loss, predict(of, of.weight, of.bias), of.y)
    assert columns(of, loss).value(of.weight, of.bias) == pytest.approx(wanted, rel=1e-10)
    pieces = columns(of, loss, budget=150)
    assert pieces.value(of.weight, of.bias) == pytest.approx(wanted, rel=1e-10)
    if loss == "mse":
        assert moments(of).value(of.weight, of.bias) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("loss", sorted(LOSSES))
# derandomized: the absolute loss has kinks, and a step across one is not a slope
@settings(deadline=None, max_examples=25, derandomize=True)
@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 2**16), whole=st.booleans())
def test_gradient_is_the_slope_of_the_value(loss: str, case: str, seed: int, whole: bool) -> None:
    of = batch(case, seed)
    objective = columns(of, loss, budget=1 << 30 if whole else 150)
    random = np.random.default_rng(seed + 1)
    direction = (random.normal(size=of.weight.shape), random.normal(size=of.bias.shape))
    in_weight, in_bias = objective.gradient(of.weight, of.bias)
    along = float((in_weight * direction[0]).sum() + (in_bias * direction[1]).sum())
    assert along == pytest.approx(slope(objective, of, direction), rel=1e-4, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 2**16), single=st.booleans())
def test_moments_give_the_gradient_of_the_samples(case: str, seed: int, single: bool) -> None:
    of = batch(case, seed)
    dtype = np.float32 if single else np.float64
    weight, bias = of.weight.astype(dtype), of.bias.astype(dtype)
    fast, explicit = (
        moments(of, dtype).gradient(weight, bias),
        columns(of, "mse").gradient(of.weight, of.bias),
    )
    for ours, wanted in zip(fast, explicit, strict=True):
        assert ours.dtype == dtype
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=scale * (1e-4 if single else 1e-11) + 1e-12)


def test_cosine_of_nothing_has_no_gradient() -> None:
    of = batch("linear")
    target = of.y.copy()
    target[0] = 0.0
    objective = ColumnsObjective(of.x, target, of.geometry, "cosine", dtype=np.float64)
    assert all(np.isfinite(part).all() for part in objective.gradient(of.weight, of.bias))
    nothing = ColumnsObjective(of.x, np.zeros_like(of.y), of.geometry, "cosine", dtype=np.float64)
    assert nothing.value(of.weight, of.bias) == 1.0
    assert not nothing.gradient(of.weight, of.bias)[0].any()


def test_an_input_that_cannot_be_split_is_one_sample() -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=(6, 5)), random.normal(size=(2, 6, 3))
    weight, bias = random.normal(size=(2, 3, 5)), random.normal(size=(2, 3))
    objective = ColumnsObjective(x, y, MatMulGeometry(groups=2), "cosine", dtype=np.float64, budget=8)
    prediction = x @ weight.swapaxes(1, 2) + bias[:, None]
    assert objective.value(weight, bias) == pytest.approx(defined("cosine", prediction[None], y[None]))


def test_unknown_loss() -> None:
    of = batch("linear")
    with pytest.raises(ValueError, match="loss 'mae' is not known: use one of mse, l1, huber, cosine"):
        columns(of, "mae")
