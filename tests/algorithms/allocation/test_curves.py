"""Curves from few measurements, against functions that are known everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation.curves import (
    NONZEROS,
    Cleaning,
    Curve,
    Scale,
    aggregate_samples,
    build_curve,
    choose,
    clean,
    interpolate,
    probe_levels,
)
from pot_sparsity.algorithms.arrays import Float64

positive = st.floats(1e-9, 1e6).map(lambda value: float(f"{value:.6g}"))


def layer_errors(levels: int) -> Float64:
    """Error of a layer that grows over ten orders of magnitude up to 1."""
    return np.append(0.0, np.geomspace(1e-10, 1.0, levels - 1))


def test_samples_are_averaged_or_the_worst_counts() -> None:
    distances = np.array([[0.0, 1.0, 2.0], [0.0, 5.0, 4.0]])

    np.testing.assert_array_equal(aggregate_samples(distances, "mean"), [0.0, 3.0, 3.0])
    np.testing.assert_array_equal(aggregate_samples(distances, "worst"), [0.0, 5.0, 4.0])
    with pytest.raises(ValueError, match="at least one sample"):
        aggregate_samples(np.empty((0, 3)), "mean")


@settings(deadline=None, max_examples=200)
@given(values=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_outlier_filter_deletes_local_maxima_until_the_curve_is_monotone(values: list[int]) -> None:
    distortion = np.array(values, dtype=float)
    left = list(range(len(values)))
    while True:  # one offending local maximum at a time
        for at in range(len(left) - 1):
            rises = at == 0 or values[left[at]] >= values[left[at - 1]]
            if values[left[at]] > values[left[at + 1]] and rises:
                del left[at]
                break
        else:
            break

    kept, cleaned = clean(distortion, "outliers")

    assert kept.tolist() == left
    np.testing.assert_array_equal(cleaned, distortion[left])


@settings(deadline=None, max_examples=100)
@given(values=st.lists(st.one_of(st.just(0.0), positive), min_size=1, max_size=12))
@pytest.mark.parametrize("how", ["outliers", "isotonic", "running_max"])
def test_cleaning_makes_any_points_monotone_and_leaves_monotone_ones(
    how: Cleaning, values: list[float]
) -> None:
    kept, cleaned = clean(np.array(values), how)

    assert (np.diff(cleaned) >= -1e-12 * np.abs(cleaned[1:])).all()
    assert kept.shape == cleaned.shape
    kept, cleaned = clean(np.sort(values), how)
    np.testing.assert_array_equal(kept, np.arange(len(values)))
    np.testing.assert_allclose(cleaned, np.sort(values), rtol=1e-9)


def test_one_spike_and_one_dip() -> None:
    spike, dip = np.array([1.0, 2.0, 64.0, 4.0, 8.0]), np.array([1.0, 16.0, 4.0, 16.0, 32.0])

    assert clean(spike, "outliers")[0].tolist() == [0, 1, 3, 4]
    np.testing.assert_array_equal(clean(spike, "running_max")[1], [1.0, 2.0, 64.0, 64.0, 64.0])
    np.testing.assert_allclose(clean(dip, "isotonic")[1], [1.0, 8.0, 8.0, 16.0, 32.0])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_power_laws_of_the_error_are_exact_above_the_first_measured_point(exponent: float) -> None:
    errors = layer_errors(41)
    truth = 3.0 * errors**exponent
    measured = np.array([10, 20, 35])

    found = interpolate(errors, errors[measured], truth[measured], "log")

    np.testing.assert_allclose(found[10:], truth[10:], rtol=1e-9)
    np.testing.assert_allclose(found[:10], truth[10] * errors[:10] / errors[10], rtol=1e-9)


def test_few_points_follow_a_network_that_saturates() -> None:
    errors = layer_errors(60)
    truth = 1.0 - np.exp(-5.0 * errors**1.1)
    measured = probe_levels(errors, 5)
    wanted = errors > errors[measured].min()

    logs = interpolate(errors, errors[measured], truth[measured], "log")
    lines = interpolate(errors, errors[measured], truth[measured], "linear")

    worst = np.abs(np.log(logs[wanted] / truth[wanted])).max()
    assert worst < 0.15
    assert worst < 0.35 * np.abs(np.log(lines[wanted] / truth[wanted])).max()


@settings(deadline=None, max_examples=200)
@given(
    points=st.lists(
        st.tuples(st.one_of(st.just(0.0), positive), st.one_of(st.just(0.0), positive)), min_size=1
    ),
    scale=st.sampled_from(["linear", "log"]),
)
def test_interpolation_never_falls_and_meets_what_was_measured(
    points: list[tuple[float, float]], scale: Scale
) -> None:
    known = np.array(sorted(error for error, _ in points))
    distortion = np.array(sorted(value for _, value in points))
    wanted = np.sort(np.concatenate([[0.0], known, np.geomspace(1e-9, 1e6, 40)]))

    found = interpolate(wanted, known, distortion, scale)

    assert np.isfinite(found).all()
    assert (np.diff(found) >= -1e-9 * found[1:]).all()
    assert found[0] == 0.0
    for error in np.unique(known[known > 0.0]):
        largest = distortion[known == error].max()
        assert found[wanted == error][0] == pytest.approx(largest, rel=1e-6)


def test_a_layer_that_does_not_matter_has_no_distortion() -> None:
    errors = layer_errors(20)

    assert not interpolate(errors, errors[[5, 19]], np.zeros(2), "log").any()
    half = interpolate(errors, errors[[5, 10, 19]], np.array([0.0, 1.0, 2.0]), "log")
    assert not half[:6].any()
    assert (half[6:] > 0.0).all()


def test_probes_are_spread_over_the_logarithm_of_the_error() -> None:
    errors = np.append(0.0, np.geomspace(1e-8, 1.0, 33))

    probes = probe_levels(errors, 4)

    np.testing.assert_allclose(np.log10(errors[probes]), [-3.0, -2.0, -1.0, 0.0], atol=0.13)
    assert probe_levels(errors, 1).tolist() == [33]
    shuffled = np.random.default_rng(0).permutation(34)
    np.testing.assert_allclose(errors[shuffled][probe_levels(errors[shuffled], 4)], errors[probes])
    assert probe_levels(np.zeros(3), 5).size == 1
    with pytest.raises(ValueError, match="points must be at least 1"):
        probe_levels(errors, 0)


def test_curve_of_a_few_noisy_measurements() -> None:
    errors = layer_errors(31)
    measured = np.array([30, 12, 18, 24])  # in any order
    distortion = np.array([8.0, 0.1, 1.0, 0.5])
    costs = {NONZEROS: np.arange(30.0, -1.0, -1.0), "bytes": np.arange(31.0)}

    curve = build_curve("conv", 30, errors, measured, distortion, costs)

    assert curve.distortion[[12, 30]] == pytest.approx([0.1, 8.0])
    assert curve.distortion[[18, 24]] == pytest.approx([np.sqrt(0.5)] * 2)
    assert (np.diff(curve.distortion) >= -1e-12).all()
    filtered = build_curve("conv", 30, errors, measured, distortion, costs, cleaning="outliers")
    assert filtered.distortion[24] == pytest.approx(0.5)
    assert 0.1 < filtered.distortion[18] < 0.5


def test_the_papers_curve_is_every_level_without_its_outliers() -> None:
    sparsity = np.linspace(0.0, 1.0, 6)
    distortion = np.array([-1e-17, 1.0, 9.0, 3.0, 4.0, 6.0])
    costs = {NONZEROS: 10.0 * (1.0 - sparsity)}

    curve = build_curve(
        "c", 10, sparsity, np.arange(6), distortion, costs, cleaning="outliers", scale="linear"
    )

    np.testing.assert_allclose(curve.distortion, [0.0, 1.0, 2.0, 3.0, 4.0, 6.0])


def test_distortion_between_levels_and_between_bounds() -> None:
    costs = {NONZEROS: np.array([0.0, 10.0, 6.0, 6.0]), "bytes": np.zeros(4)}
    curve = Curve("c", 10, np.array([9.0, 0.0, 2.0, 1.0]), costs)

    assert curve.zeros.tolist() == [10, 0, 4, 4]
    np.testing.assert_allclose(curve.at(np.array([0, 2, 4, 7, 10])), [0.0, 0.5, 1.0, 5.0, 9.0])
    bounded = curve.bounded(2, 7)
    assert bounded.zeros.tolist() == [2, 4, 4, 7]
    assert sorted(bounded.distortion.tolist()) == [0.5, 1.0, 2.0, 5.0]
    assert curve.bounded(3, 3).zeros.tolist() == [3]
    assert curve.bounded(0, 10).distortion.tolist() == [0.0, 2.0, 1.0, 9.0]


def test_choice_sums_what_all_curves_share() -> None:
    one = Curve("a", 2, np.array([0.0, 1.0]), {"flops": np.array([4.0, 2.0]), "bytes": np.ones(2)})
    two = Curve("b", 2, np.array([0.0, 3.0]), {"flops": np.array([8.0, 1.0])})

    choice = choose([one, two], np.array([1, 1]))

    assert choice.distortion == 4.0
    assert dict(choice.costs) == {"flops": 3.0}


def test_bad_curves_are_refused() -> None:
    one = np.ones(1)
    with pytest.raises(ValueError, match="'c': distortion must be"):
        Curve("c", 1, np.empty(0), {})
    with pytest.raises(ValueError, match="'c': distortions that are NaN"):
        Curve("c", 1, np.array([np.nan]), {})
    with pytest.raises(ValueError, match=r"'c': \(2,\) costs 'flops' for \(1,\) levels"):
        Curve("c", 1, one, {"flops": np.ones(2)})
    with pytest.raises(ValueError, match="costs 'flops' must be finite and not negative"):
        Curve("c", 1, one, {"flops": -one})
    with pytest.raises(ValueError, match="'c': 1 distortions for 0 measured"):
        build_curve("c", 1, one, np.empty(0, np.int64), one, {})
    with pytest.raises(ValueError, match="errors must be finite and not negative"):
        build_curve("c", 1, -one, np.array([0]), one, {})
    with pytest.raises(ValueError, match="'c': distortions that are NaN"):
        build_curve("c", 1, one, np.array([0]), np.array([np.inf]), {})


def test_nothing_is_cleaned_where_nothing_is_asked_for() -> None:
    sparsity = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    raw = np.array([3.0, 1.0, 5.0])
    curve = build_curve("conv", 4, sparsity, np.array([1, 2, 4]), raw, {}, cleaning="none", scale="linear")
    np.testing.assert_allclose(curve.distortion, [0.0, 3.0, 1.0, 3.0, 5.0])
    points, values = clean(raw, "none")
    np.testing.assert_array_equal(points, [0, 1, 2])
    np.testing.assert_array_equal(values, raw)
    filtered = build_curve(
        "conv", 4, sparsity, np.array([1, 2, 4]), raw, {}, cleaning="outliers", scale="linear"
    )
    np.testing.assert_allclose(filtered.distortion, [0.0, 0.5, 1.0, 3.0, 5.0])


def test_uncleaned_points_may_share_a_place_and_end_early() -> None:
    errors = np.array([0.0, 0.1, 0.1, 0.2, 0.4])
    curve = build_curve(
        "conv", 4, errors, np.array([1, 2, 3]), np.array([2.0, 1.0, 0.5]), {}, cleaning="none"
    )
    np.testing.assert_allclose(curve.distortion, [0.0, 1.0, 1.0, 0.5, 0.0])  # never below nothing
