"""Streamed moments against float64 moments of the columns laid out by :func:`unfold`, itself tested on its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pot_sparsity.algorithms import band_gram, gram
from pot_sparsity.algorithms.arrays import ConvGeometry, Float64, Geometry, MatMulGeometry, Moments
from pot_sparsity.algorithms.moments import CrossMoments, CrossMomentsAccumulator, MomentsAccumulator
from pot_sparsity.algorithms.patches import Workspace, axis_taps, output_size, unfold


@dataclass(frozen=True)
class Case:
    geometry: ConvGeometry
    shape: tuple[int, ...]
    rows: int


@st.composite
def conv_cases(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel = draw(st.sampled_from([(1,) * rank, (3,) * rank, sizes(1, 4)]))
    strides, dilations = draw(st.sampled_from([(1,) * rank, sizes(1, 2)])), sizes(1, 2)
    begin, end = sizes(0, 3), sizes(0, 3)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    transposed = draw(st.booleans()) and draw(st.booleans())
    low = max(max(extent), 4)
    spatial = sizes(low, low + (2 if rank == 3 else 6))
    groups = draw(st.integers(1, 3))
    inputs = draw(st.integers(1, 2))
    geometry = ConvGeometry(kernel, strides, dilations, begin, end, groups, "explicit", transposed)
    if transposed and min(s - b - e for s, b, e in zip(spatial, begin, end, strict=True)) < 1:
        geometry = replace(geometry, pads_begin=(0,) * rank, pads_end=(0,) * rank)
    return Case(geometry, (draw(st.integers(1, 5)), groups * inputs, *spatial), draw(st.integers(1, 3)))


def activations(shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """Correlated, not centred, as after a ReLU."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    rectified: NDArray[np.float64] = np.maximum(noise + 0.5 * noise.mean(axis=1, keepdims=True) + 0.3, 0)
    return rectified.astype(np.float32)


def oracle(columns: NDArray[Any]) -> Moments:
    x = columns.astype(np.float64)
    count = x.shape[-1]
    return Moments(float(count), x.mean(axis=-1), x @ x.swapaxes(1, 2) / count)


def assert_close(actual: NDArray[Any], expected: NDArray[Any], tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def assert_moments(actual: Moments, expected: Moments, tolerance: float = 1e-5) -> None:
    assert actual.count == expected.count
    assert_close(actual.mean, expected.mean, tolerance)
    assert_close(actual.second, expected.second, tolerance)
    np.testing.assert_array_equal(actual.second, actual.second.swapaxes(1, 2))


def moments_of(geometry: Geometry, *batches: NDArray[Any]) -> Moments:
    accumulator = MomentsAccumulator(geometry)
    for batch in batches:
        accumulator.update(batch)
    return accumulator.result()


def columns_of_outputs(y: NDArray[Any], groups: int) -> Float64:
    return np.moveaxis(y.astype(np.float64), 0, 1).reshape(groups, y.shape[1] // groups, -1)


def assert_cross(actual: CrossMoments, x: NDArray[Any], y: NDArray[Any], tolerance: float = 1e-5) -> None:
    assert_moments(actual.inputs, oracle(x), tolerance)
    assert_close(actual.cross, y @ x.astype(np.float64).swapaxes(1, 2) / x.shape[-1], tolerance)
    assert_close(actual.output_mean, y.mean(axis=-1), tolerance)
    assert_close(actual.output_power, (y * y).mean(axis=-1), tolerance)


@settings(deadline=None, max_examples=200)
@given(case=conv_cases(), seed=st.integers(0, 999))
def test_conv_moments_equal_the_oracle(case: Case, seed: int) -> None:
    x = activations(case.shape, seed)
    assert_moments(moments_of(case.geometry, x), oracle(unfold(x, case.geometry)))
    wide = x.astype(np.float64)
    assert_moments(moments_of(case.geometry, wide), oracle(unfold(wide, case.geometry)), 1e-12)


@settings(deadline=None, max_examples=120)
@given(case=conv_cases(), seed=st.integers(0, 999))
def test_cross_moments_equal_the_oracle(case: Case, seed: int) -> None:
    x = activations(case.shape, seed)
    groups, out = case.geometry.groups, output_size(case.geometry, case.shape[2:])
    y = activations((case.shape[0], groups * case.rows, *out), seed + 1)
    accumulator = CrossMomentsAccumulator(case.geometry)
    accumulator.update(x, y)
    assert_cross(accumulator.result(), unfold(x, case.geometry), columns_of_outputs(y, groups))


@settings(deadline=None, max_examples=60)
@given(case=conv_cases(), seed=st.integers(0, 999), least=st.sampled_from([1, 300, 3000]))
def test_small_pieces_give_the_same_moments(case: Case, seed: int, least: int) -> None:
    """Splitting samples, rows and channels, as large maps need it, changes nothing."""
    x = activations(case.shape, seed).astype(np.float64)
    groups, out = case.geometry.groups, output_size(case.geometry, case.shape[2:])
    y = activations((case.shape[0], groups * case.rows, *out), seed + 1).astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "_PIECE_LEAST", least)
        patch.setattr(gram, "_PIECE_MOST", least * 2)
        patch.setattr(band_gram, "_PIECE", least)
        patch.setattr(band_gram, "_PIECE_MOST", least * 2)
        patch.setattr(band_gram, "_WINDOWS", (4,))
        moments = moments_of(case.geometry, x)
        accumulator = CrossMomentsAccumulator(case.geometry)
        accumulator.update(x, y)
    assert_moments(moments, oracle(unfold(x, case.geometry)), 1e-12)
    assert_cross(accumulator.result(), unfold(x, case.geometry), columns_of_outputs(y, groups), 1e-12)


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dilations=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 5)] * 4),
    spatial=st.tuples(st.integers(13, 20), st.integers(13, 70)),
)
def test_depthwise_moments_equal_the_oracle(
    kernel: tuple[int, ...], dilations: tuple[int, ...], pads: tuple[int, ...], spatial: tuple[int, ...]
) -> None:
    geometry = ConvGeometry(kernel, (1, 1), dilations, pads[:2], pads[2:], groups=3)
    x = activations((2, 3, *spatial), 0)
    assert_moments(moments_of(geometry, x), oracle(unfold(x, geometry)))


@pytest.mark.parametrize("mode", ["same_upper", "same_lower", "valid"])
@pytest.mark.parametrize("transposed", [False, True])
def test_automatic_padding_and_changing_sizes(mode: Any, transposed: bool) -> None:
    geometry = ConvGeometry((4, 3), (1, 1), (1, 1), (0, 0), (0, 0), 1, mode, transposed)
    batches = [activations((n, 2, h, w), n) for n, h, w in ((2, 9, 7), (3, 5, 12), (1, 4, 4))]
    columns = np.concatenate([unfold(batch, geometry) for batch in batches], axis=-1)
    assert_moments(moments_of(geometry, *batches), oracle(columns))


MATMULS: list[tuple[MatMulGeometry, tuple[int, ...], Callable[[NDArray[Any]], NDArray[Any]]]] = [
    (MatMulGeometry(), (9, 6), lambda x: x.T[None]),
    (MatMulGeometry(), (6,), lambda x: x[None, :, None]),
    (MatMulGeometry(), (4, 3, 5, 6), lambda x: x.reshape(-1, 6).T[None]),
    (MatMulGeometry(-2), (6, 7), lambda x: x[None]),
    (MatMulGeometry(-2), (4, 3, 6, 50), lambda x: np.moveaxis(x, 2, 0).reshape(1, 6, -1)),
    (MatMulGeometry(-1, 3), (4, 3, 5, 6), lambda x: np.moveaxis(x, (1, 3), (0, 1)).reshape(3, 6, -1)),
    (MatMulGeometry(-1, 3), (2, 4, 3, 5, 6), lambda x: np.moveaxis(x, (2, 4), (0, 1)).reshape(3, 6, -1)),
    (MatMulGeometry(-2, 3), (4, 3, 6, 5), lambda x: np.moveaxis(x, (1, 2), (0, 1)).reshape(3, 6, -1)),
    (MatMulGeometry(-1, 3), (5, 6), lambda x: np.broadcast_to(x.T, (3, 6, 5))),
    (MatMulGeometry(-1, 3), (4, 1, 5, 6), lambda x: np.broadcast_to(x.reshape(-1, 6).T, (3, 6, 20))),
]


@pytest.mark.parametrize(("geometry", "shape", "columns"), MATMULS)
@pytest.mark.parametrize("piece", [1, 1 << 22])
def test_matmul_moments_equal_the_oracle(
    geometry: MatMulGeometry,
    shape: tuple[int, ...],
    columns: Callable[[NDArray[Any]], NDArray[Any]],
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gram, "_PIECE_LEAST", piece)
    monkeypatch.setattr(gram, "_PIECE_MOST", max(piece, 200))
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) + 0.5).astype(np.float32)
    expected = columns(x)
    assert_moments(moments_of(geometry, x), oracle(expected))
    weight = rng.standard_normal((geometry.groups, 6, 4)).astype(np.float32)
    if geometry.groups == 1:
        y = x @ weight[0] if geometry.feature_axis == -1 else weight[0].T @ x
    else:
        y = x @ weight if geometry.feature_axis == -1 else weight.swapaxes(1, 2) @ x
    accumulator = CrossMomentsAccumulator(geometry)
    accumulator.update(x, y)
    assert_cross(accumulator.result(), expected, weight.swapaxes(1, 2).astype(np.float64) @ expected)


@settings(deadline=None, max_examples=40)
@given(case=conv_cases(), splits=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_split_merges_to_the_same(case: Case, splits: list[int]) -> None:
    geometry, workspace = case.geometry, Workspace()
    out = output_size(geometry, case.shape[2:])
    batches = [activations((n, *case.shape[1:]), i) for i, n in enumerate(splits)]
    outputs = [activations((n, geometry.groups * case.rows, *out), 50 + i) for i, n in enumerate(splits)]
    whole = MomentsAccumulator(geometry, workspace=workspace)
    merged = MomentsAccumulator(geometry)
    cross = CrossMomentsAccumulator(geometry)
    parts, cross_parts = [], []
    for x, y in zip(batches, outputs, strict=True):
        whole.update(x)
        part = MomentsAccumulator(geometry, workspace=workspace)
        part.update(x)
        merged.merge(part)
        parts.append(part.result())
        cross_part = CrossMomentsAccumulator(geometry, workspace=workspace)
        cross_part.update(x, y)
        cross.merge(cross_part)
        cross_parts.append(cross_part.result())
    expected = oracle(np.concatenate([unfold(x, geometry) for x in batches], axis=-1))
    for moments in (whole.result(), merged.result(), Moments.merge(parts)):
        assert_moments(moments, expected)
    both = CrossMoments.merge(cross_parts)
    for name in ("cross", "centred_cross", "output_mean", "output_power"):
        assert_close(getattr(both, name), getattr(cross.result(), name))
    assert merged.count == cross.count == sum(splits) * prod(out)


def test_merging_nothing_and_into_nothing() -> None:
    filled, empty = MomentsAccumulator(MatMulGeometry()), MomentsAccumulator(MatMulGeometry())
    filled.update(np.eye(3))
    before = filled.result()
    filled.merge(empty)
    empty.merge(filled)
    filled.update(np.eye(3))  # the copy must not follow
    assert_moments(empty.result(), before)


def test_constant_one_row_and_centred_moments() -> None:
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), groups=2)
    x = activations((3, 4, 6, 5), 1)
    columns = unfold(x, geometry).astype(np.float64)
    with_one = np.concatenate([columns, np.ones((2, 1, columns.shape[-1]))], axis=1)
    moments = moments_of(geometry, x)
    assert_close(moments.with_one, with_one @ with_one.swapaxes(1, 2) / columns.shape[-1])
    centred = columns - columns.mean(axis=-1, keepdims=True)
    assert_close(moments.centred, centred @ centred.swapaxes(1, 2) / columns.shape[-1])


def test_cross_moments_recover_the_layer() -> None:
    """The least squares fit of a layer's own output is its weight and bias."""
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, 3, 7, 7))
    weight, bias = rng.standard_normal((1, 4, 27)), rng.standard_normal(4)
    y = (weight @ unfold(x, geometry)).reshape(4, 8, 7, 7).swapaxes(0, 1) + bias.reshape(-1, 1, 1)
    accumulator = CrossMomentsAccumulator(geometry)
    accumulator.update(x, y)
    moments = accumulator.result()
    fitted = moments.centred_cross[0] @ np.linalg.inv(moments.inputs.centred[0])
    np.testing.assert_allclose(fitted, weight[0], atol=1e-8)
    np.testing.assert_allclose(moments.output_mean[0] - fitted @ moments.inputs.mean[0], bias, atol=1e-8)
    np.testing.assert_allclose(moments.output_power.sum(), (y**2).sum() / (8 * 49))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_sampled_positions_are_positions(rank: int, transposed: bool) -> None:
    geometry = ConvGeometry(
        (3,) * rank, (2,) * rank, (1,) * rank, (1,) * rank, (0,) * rank, 2, "explicit", transposed
    )
    x = activations((3, 4, *(6,) * rank), 0)
    out = output_size(geometry, x.shape[2:])
    y = activations((3, 2, *out), 1)
    accumulator = CrossMomentsAccumulator(geometry, max_positions=2, seed=5)
    accumulator.update(x, y)
    again = CrossMomentsAccumulator(geometry, max_positions=2, seed=5)
    again.update(x, y)
    result = accumulator.result()
    np.testing.assert_array_equal(result.cross, again.result().cross)
    chosen = np.sort(np.random.default_rng(5).choice(prod(out), 2, replace=False))
    columns = unfold(x, geometry).reshape(2, -1, 3, prod(out))[..., chosen].reshape(2, -1, 6)
    targets = columns_of_outputs(y, 2).reshape(2, 1, 3, prod(out))[..., chosen].reshape(2, 1, 6)
    assert_cross(result, columns, targets)
    exact = MomentsAccumulator(geometry, max_positions=prod(out))
    exact.update(x)
    assert_moments(exact.result(), oracle(unfold(x, geometry)))


@pytest.mark.parametrize("feature_axis", [-1, -2])
def test_sampled_rows_of_a_matmul(feature_axis: int) -> None:
    x = np.random.default_rng(0).standard_normal((4, 7, 6)).astype(np.float32)
    chosen = np.sort(np.random.default_rng(0).choice(7, 3, replace=False))
    expected = x[:, chosen].reshape(-1, 6).T[None]
    accumulator = CrossMomentsAccumulator(MatMulGeometry(feature_axis), max_positions=3)
    stored = x if feature_axis == -1 else x.swapaxes(1, 2)
    accumulator.update(stored, stored)
    assert_cross(accumulator.result(), expected, expected.astype(np.float64))


def test_sampling_is_unbiased_over_many_batches() -> None:
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    x = activations((16, 2, 8, 8), 0)
    accumulator = MomentsAccumulator(geometry, max_positions=16)
    for _ in range(200):
        accumulator.update(x)
    assert_close(accumulator.result().second, oracle(unfold(x, geometry)).second, 0.02)


def test_cheaper_kernels_are_taken() -> None:
    """A 3x3 layer of stride 1 shifts rows; strided and transposed ones copy their taps."""
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    for changed, shifts in (
        (geometry, 3),
        (replace(geometry, strides=(2, 1)), 1),
        (replace(geometry, transposed=True), 1),
    ):
        assert gram.RowPlan.of(changed, axis_taps(changed, (16, 16))).shifts == shifts


def test_long_lines_are_cut() -> None:
    geometry = ConvGeometry((25,), (1,), (2,), (24,), (24,))
    x = activations((2, 4, 20_000), 0)
    accumulator = CrossMomentsAccumulator(geometry)
    accumulator.update(x, x[:, :2])
    assert_cross(accumulator.result(), unfold(x, geometry), columns_of_outputs(x[:, :2], 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("geometry", "shape"),
    [(ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1)), (2, 3, 4, 4)), (MatMulGeometry(), (2, 4, 3))],
)
def test_not_finite_activations_are_refused(bad: float, geometry: Geometry, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, dtype=np.float32)
    accumulator, cross = MomentsAccumulator(geometry), CrossMomentsAccumulator(geometry)
    accumulator.update(x)
    cross.update(x, x)
    before = accumulator.result(), cross.result()
    poisoned = x.copy()
    poisoned.flat[7] = bad
    with pytest.raises(ValueError, match="layer's activations hold NaN, infinity or values beyond"):
        accumulator.update(poisoned)
    with pytest.raises(ValueError, match="layer's outputs hold NaN, infinity or values beyond"):
        cross.update(x, poisoned)
    assert_moments(accumulator.result(), before[0])
    assert_moments(cross.result().inputs, before[1].inputs)
    np.testing.assert_array_equal(cross.result().cross, before[1].cross)


def test_overflow_is_refused() -> None:
    accumulator = MomentsAccumulator(MatMulGeometry())
    accumulator.update(np.full((4, 3), 1e25, dtype=np.float32))
    with pytest.raises(ValueError, match="too large to be squared in float32"):
        accumulator.result()
    wide = MomentsAccumulator(MatMulGeometry())
    wide.update(np.full((4, 3), 1e25))
    np.testing.assert_allclose(wide.result().second, 1e50)


def test_bad_shapes_are_refused() -> None:
    conv = ConvGeometry((3, 3), (1, 1), (1, 1), (0, 0), (0, 0), groups=2)
    with pytest.raises(ValueError, match="no activations were seen"):
        MomentsAccumulator(conv).result()
    with pytest.raises(ValueError, match=r"batch of activations is empty: shape \(0, 2, 5, 5\)"):
        MomentsAccumulator(conv).update(np.zeros((0, 2, 5, 5)))
    with pytest.raises(ValueError, match="3 channels do not divide into 2 groups"):
        MomentsAccumulator(conv).update(np.zeros((1, 3, 5, 5)))
    with pytest.raises(ValueError, match="do not fit inputs"):
        CrossMomentsAccumulator(conv).update(np.zeros((1, 2, 5, 5)), np.zeros((1, 2, 5, 5)))
    with pytest.raises(ValueError, match="do not fit inputs"):
        CrossMomentsAccumulator(MatMulGeometry()).update(np.zeros((4, 5)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="max_positions must be at least 1, got 0"):
        MomentsAccumulator(conv, max_positions=0)
    with pytest.raises(ValueError, match="feature axis of a MatMul is -1 or -2, got 1"):
        MomentsAccumulator(MatMulGeometry(1))
    with pytest.raises(ValueError, match="have no axis -2"):
        MomentsAccumulator(MatMulGeometry(-2)).update(np.zeros(3))
    with pytest.raises(ValueError, match="do not hold 3 groups on axis -3"):
        MomentsAccumulator(MatMulGeometry(-1, 3)).update(np.zeros((2, 5, 6)))
    accumulator = MomentsAccumulator(MatMulGeometry())
    accumulator.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(1, 4\) cannot be added to earlier ones of \(1, 3\)"):
        accumulator.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="cannot merge moments of different layers"):
        accumulator.merge(MomentsAccumulator(conv))
