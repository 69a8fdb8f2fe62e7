from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity import metrics
from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.detection_metrics import looks_like_detections
from pot_sparsity.errors import DataError, ModelError, PotSparsityError, RecipeError
from pot_sparsity.metrics import (
    METRICS,
    SQNR_LIMIT,
    Comparison,
    Top1,
    Top5,
    get_metric,
    paired_interval,
    sample_distances,
)
from pot_sparsity.pipeline.evaluate import distance

SEEDS = st.integers(0, 2**32 - 1)


def compare(reference: AnyArray, candidate: AnyArray) -> dict[str, float]:
    comparison = Comparison("out")
    comparison.update(reference, candidate)
    return comparison.result()


def softmax(row: list[float]) -> list[float]:
    exponents = [math.exp(value - max(row)) for value in row]
    return [value / math.fsum(exponents) for value in exponents]


def divergence(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0)


# --- with labels


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 20), st.integers(2, 8), st.sampled_from(["f2", "f4"]))
def test_top_k_against_sorting(seed: int, number: int, classes: int, dtype: str) -> None:
    random = np.random.default_rng(seed)
    scores: AnyArray = random.integers(0, 4, size=(number, classes)).astype(dtype)  # many ties
    labels = random.integers(0, classes, size=number)
    for metric, k in ((Top1(), 1), (Top5(), 5)):
        half = number // 2
        metric.update(scores[:half], labels[:half])
        metric.update(scores[half:], labels[half:])
        right = [
            label in sorted(range(classes), key=lambda c: (-row[c], c))[:k]
            for row, label in zip(scores.tolist(), labels.tolist(), strict=True)
        ]
        assert metric.correct.tolist() == right
        assert metric.result() == {f"top{k}": pytest.approx(100.0 * sum(right) / number)}


def test_top1_is_argmax_where_scores_tie() -> None:
    metric = Top1()
    metric.update(np.zeros((3, 4), dtype=np.float32), np.array([0, 1, 3], dtype=np.uint8))
    assert metric.correct.tolist() == [True, False, False]


def test_scores_with_nan_are_wrong() -> None:
    metric = Top1()
    metric.update(np.array([[np.nan, 0.0], [1.0, np.nan], [1.0, 0.0]]), np.array([0, 0, 0]))
    assert metric.correct.tolist() == [False, False, True]


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 1, 1, 3), (2, 1, 3)])
def test_axes_of_size_one_do_not_count(shape: tuple[int, ...]) -> None:
    scores = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32).reshape(shape)
    metric = Top1()
    metric.update(scores, np.array([1, 1]))
    assert metric.result() == {"top1": 50.0}
    assert compare(scores, scores)["agreement"] == 100.0


@pytest.mark.parametrize(
    ("output", "labels", "text"),
    [
        (
            np.zeros((2, 3, 4)),
            np.zeros(2, int),
            r"needs an output of shape \[N, classes\], or .* this model gives \[2, 3, 4\] and the labels are",
        ),
        (np.zeros((2, 3), int), np.zeros(2, int), "needs an output of shape"),
        (np.zeros(2), np.zeros(2, int), "needs an output of shape"),
        (np.zeros((2, 1)), np.zeros(2, int), "needs an output of shape"),
        (np.zeros((2, 3)), np.zeros(3, int), r"needs 2 integer labels, got int64 of shape \[3\]"),
        (np.zeros((2, 3)), np.zeros(2), "needs 2 integer labels, got float64"),
        (np.zeros((2, 3)), np.array([0, 3]), "labels run from 0 to 3, but the model has the classes 0 to 2"),
        (np.zeros((2, 3)), np.array([-1, 0]), "labels run from -1 to 0"),
    ],
)
def test_outputs_and_labels_that_do_not_fit(output: AnyArray, labels: AnyArray, text: str) -> None:
    with pytest.raises(DataError, match=text):
        Top1().update(output, labels)


def test_no_samples() -> None:
    with pytest.raises(DataError, match="top5 has seen no samples"):
        Top5().result()
    with pytest.raises(DataError, match="output 'out': no samples were compared"):
        Comparison("out").result()


def test_registry() -> None:
    assert {name: get_metric(name).name for name in METRICS} == {"top1": "top1", "top5": "top5"}
    assert get_metric("top1") is not get_metric("top1")
    with pytest.raises(RecipeError, match="metric 'top3' is not known: use one of top1, top5"):
        get_metric("top3")


# --- against a reference


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from([(6, 3), (5, 10), (4, 3, 5), (1, 2)]), st.integers(1, 5), st.booleans())
def test_comparison_against_plain_python(
    seed: int, shape: tuple[int, ...], batch: int, probabilities: bool
) -> None:
    random = np.random.default_rng(seed)
    reference: Float64 = random.normal(size=shape) * 3
    candidate: Float64 = reference + random.normal(size=shape)
    if probabilities:
        reference, candidate = (
            np.array([softmax(row) for row in rows.reshape(-1, shape[-1]).tolist()])
            for rows in (reference, candidate)
        )
        reference, candidate = reference.reshape(shape), candidate.reshape(shape)
    comparison = Comparison("out")
    for start in range(0, shape[0], batch):
        comparison.update(reference[start : start + batch], candidate[start : start + batch])

    rows = reference.reshape(-1, shape[-1]).tolist(), candidate.reshape(-1, shape[-1]).tolist()
    pairs = list(zip(*rows, strict=True))
    distribution = (lambda row: row) if probabilities else softmax
    kl = [divergence(distribution(p), distribution(q)) for p, q in pairs]
    same = [p.index(max(p)) == q.index(max(q)) for p, q in pairs]
    noise = float(np.square(reference - candidate).sum())
    assert comparison.result() == {
        "agreement": pytest.approx(100.0 * sum(same) / len(same)),
        "logit_kl": pytest.approx(sum(kl) / len(kl), abs=1e-12),
        "sqnr": pytest.approx(10 * math.log10(float(np.square(reference).sum()) / noise)),
        "output_mse": pytest.approx(noise / reference.size),
    }


def test_results_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=(33, 7)).astype(np.float32)
    candidate = reference + random.normal(size=(33, 7)).astype(np.float32)
    whole = compare(reference, candidate)
    monkeypatch.setattr(metrics, "CHUNK", 20)
    assert compare(reference, candidate) == pytest.approx(whole)


def test_equal_outputs() -> None:
    output = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    expected = {"agreement": 100.0, "logit_kl": 0.0, "sqnr": SQNR_LIMIT, "output_mse": 0.0}
    assert compare(output, output) == expected
    assert compare(np.zeros((2, 3)), np.zeros((2, 3)))["sqnr"] == SQNR_LIMIT
    assert compare(np.zeros((2, 3)), np.ones((2, 3)))["sqnr"] == -SQNR_LIMIT


def test_very_large_logits_are_stable() -> None:
    values = compare(np.array([[1e4, -1e4]]), np.array([[-1e4, 1e4]]))
    assert values["logit_kl"] == pytest.approx(2e4)


def test_probabilities_of_zero_count_as_very_small() -> None:
    reference = np.array([[0.5, 0.5, 0.0]])
    candidate = np.array([[1.0, 0.0, 0.0]])
    expected = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-12)
    assert compare(reference, candidate)["logit_kl"] == pytest.approx(expected, rel=1e-9)


def test_the_first_batch_decides_whether_outputs_are_probabilities() -> None:
    probable, other = np.array([[0.25, 0.75]]), np.array([[0.5, 0.5]])
    comparison = Comparison("out")
    comparison.update(np.array([[2.0, -1.0]]), np.array([[2.0, -1.0]]))
    comparison.update(probable, other)
    softened = divergence(softmax([0.25, 0.75]), softmax([0.5, 0.5]))
    assert comparison.result()["logit_kl"] == pytest.approx(softened / 2)
    assert compare(probable, other)["logit_kl"] == pytest.approx(divergence([0.25, 0.75], [0.5, 0.5]))


@pytest.mark.parametrize(
    "output",
    [
        np.arange(6.0),
        np.arange(6).reshape(2, 3),
        np.arange(6.0).reshape(6, 1),
        np.arange(210.0).reshape(1, 5, 6, 7),
        np.array(3.0),
    ],
)
def test_outputs_without_classes_are_compared_by_value_only(output: AnyArray) -> None:
    changed = output.astype(np.float64) * 1.1
    values = compare(output, changed.astype(output.dtype) if output.dtype == np.int64 else changed)
    assert set(values) == {"sqnr", "output_mse"}
    if output.dtype != np.int64:
        assert values["sqnr"] == pytest.approx(20.0)


def test_a_large_integer_difference_does_not_overflow() -> None:
    values = compare(np.array([[127, -128]], dtype=np.int8), np.array([[-128, 127]], dtype=np.int8))
    assert values["output_mse"] == 255.0**2


def test_outputs_that_cannot_be_compared() -> None:
    good, bad = np.zeros((1, 2)), np.array([[np.nan, 0.0]])
    with pytest.raises(ModelError, match="output 'out' of the reference model holds NaN"):
        compare(bad, good)
    with pytest.raises(PotSparsityError, match="where the reference model's does not") as caught:
        compare(good, bad)
    assert caught.value.exit_code == 1
    with pytest.raises(ValueError, match=r"is \[1, 2\] in the reference and \[1, 3\] in the model"):
        compare(good, np.zeros((1, 3)))


# --- detections


def detections(*images: list[list[float]], length: int = 12) -> Float64:
    """Lists ``[images, 1, length, 7]`` that end with -1; what follows the end is garbage."""
    output = np.full((len(images), 1, length, 7), 0.9)
    for image, rows in enumerate(images):
        output[image, 0, : len(rows)] = np.array(rows).reshape(-1, 7)
        if len(rows) < length:
            output[image, 0, len(rows), 0] = -1.0
    return output


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


def plain_agreement(reference: list[list[list[float]]], candidate: list[list[list[float]]]) -> float:
    total = matches = 0
    for ours, theirs in zip(reference, candidate, strict=True):
        left = [row for row in ours if row[2] >= 0.3]
        found = sorted((row for row in theirs if row[2] >= 0.3), key=lambda row: -row[2])
        total += len(left) + len(found)
        for row in found:
            same = [other for other in left if other[:2] == row[:2]]
            best = max(same, key=lambda other: overlap(other[3:], row[3:]), default=None)
            if best is not None and overlap(best[3:], row[3:]) >= 0.5:
                matches += 1
                left.remove(best)
    return 200.0 * matches / total if total else 100.0


def plain_overlap(reference: list[list[list[float]]], candidate: list[list[list[float]]]) -> float:
    """Greedy pairs without a threshold of the score, weighted by their overlap and the lower score."""
    total = common = 0.0
    for ours, theirs in zip(reference, candidate, strict=True):
        left = list(ours)
        total += sum(row[2] for row in ours + theirs)
        for row in sorted(theirs, key=lambda row: -row[2]):
            same = [other for other in left if other[:2] == row[:2]]
            best = max(same, key=lambda other: overlap(other[3:], row[3:]), default=None)
            if best is not None and overlap(best[3:], row[3:]) >= 0.5:
                common += overlap(best[3:], row[3:]) * min(best[2], row[2])
                left.remove(best)
    return 200.0 * common / total if total else 100.0


def agreement_of(reference: AnyArray, candidate: AnyArray) -> dict[str, float]:
    """Only the agreement: the overlap has tests of its own."""
    found = compare(reference, candidate)
    assert set(found) == {"detection_agreement", "detection_overlap"}
    assert 0.0 <= found.pop("detection_overlap") <= 100.0 + 1e-9
    return found


def random_lists(random: np.random.Generator, images: int) -> list[list[list[float]]]:
    """Up to 11 detections an image, of 2 classes and among few boxes, so that many overlap."""
    lists = []
    for _ in range(images):
        rows = []
        for _ in range(int(random.integers(0, 12))):
            low, size = random.uniform(0, 0.3, 2), random.uniform(0.0, 0.6, 2)
            head = [0.0, float(random.integers(0, 2)), float(random.uniform(0.1, 1.0))]
            rows.append([*head, *low.tolist(), *(low + size).tolist()])
        lists.append(rows)
    return lists


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 5), st.integers(1, 3))
def test_detection_agreement_against_plain_python(seed: int, images: int, batch: int) -> None:
    random = np.random.default_rng(seed)
    reference, candidate = random_lists(random, images), random_lists(random, images)
    ours, theirs = detections(*reference), detections(*candidate)
    comparison = Comparison("out")
    for start in range(0, images, batch):
        comparison.update(ours[start : start + batch], theirs[start : start + batch])
    assert comparison.result() == {
        "detection_agreement": pytest.approx(plain_agreement(reference, candidate)),
        "detection_overlap": pytest.approx(plain_overlap(reference, candidate)),
    }
    same = compare(ours, ours)
    assert same == {"detection_agreement": 100.0, "detection_overlap": pytest.approx(100.0)}


BOX = [0.1, 0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ([[0, 1, 0.9, *BOX]], 100.0),
        ([[0, 1, 0.31, 0.1, 0.1, 0.5, 0.49]], 100.0),
        ([[0, 1, 0.29, *BOX]], 0.0),  # below the threshold: only the reference detects
        ([[0, 2, 0.9, *BOX]], 0.0),
        ([[1, 1, 0.9, *BOX]], 0.0),
        ([[0, 1, 0.9, 0.1, 0.1, 0.5, 0.29]], 0.0),  # intersection over union 0.475
        ([[0, 1, 0.9, *BOX], [0, 1, 0.8, *BOX]], 200.0 / 3),  # one counterpart serves once
        ([], 0.0),
    ],
)
def test_what_counts_as_a_counterpart(candidate: list[list[float]], expected: float) -> None:
    found = agreement_of(detections([[0, 1, 0.5, *BOX]]), detections(candidate))
    assert found == {"detection_agreement": pytest.approx(expected)}


def test_detections_of_two_images_in_one_list() -> None:
    reference = detections([[0, 1, 0.9, *BOX], [1, 1, 0.8, *BOX]])
    assert agreement_of(reference, detections([[1, 1, 0.9, *BOX], [0, 1, 0.8, *BOX]])) == {
        "detection_agreement": 100.0
    }
    assert agreement_of(reference, detections([[1, 1, 0.9, *BOX]])) == {
        "detection_agreement": pytest.approx(200.0 / 3)
    }


def test_models_that_detect_nothing_agree() -> None:
    assert agreement_of(detections([]), detections([])) == {"detection_agreement": 100.0}


def test_the_better_overlap_wins() -> None:
    first, second = [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.56]
    reference = detections([[0, 0, 0.9, *first], [0, 0, 0.8, *second]])
    assert agreement_of(reference, detections([[0, 0, 0.9, *second], [0, 0, 0.8, *first]])) == {
        "detection_agreement": 100.0
    }


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (detections([[0, 1, 0.5, *BOX]]), True),
        (detections([[0, 1, 0.5, *BOX]], [], length=2).astype(np.float16), True),
        (detections([[0, 1, 0.5, *BOX]], length=1), False),  # might be the scores of 7 classes
        (detections([[0, 1, 0.5, *BOX]])[0], False),
        (detections([[0, 1, 0.5, *BOX]]).astype(np.int64), False),
        (detections([[0, 1, 5.0, *BOX]]), False),
        (detections([[0, 0.5, 0.5, *BOX]]), False),
        (detections([[0.5, 1, 0.5, *BOX]]), False),
        (detections([[0, 1, math.nan, *BOX]]), False),
        (np.random.default_rng(0).normal(size=(1, 1, 5, 7)), False),
        (np.random.default_rng(0).normal(size=(2, 7)), False),
    ],
)
def test_what_looks_like_detections(output: AnyArray, expected: bool) -> None:
    assert looks_like_detections(output) is expected


def test_detections_that_are_not_finite() -> None:
    good = detections([[0, 1, 0.5, *BOX]])
    bad = detections([[0, 1, 0.5, 0.1, math.nan, 0.5, 0.5]])
    with pytest.raises(PotSparsityError, match="where the reference model's does not"):
        compare(good, bad)
    with pytest.raises(ModelError, match="output 'out' of the reference model holds NaN"):
        compare(bad, good)
    garbage = good.copy()
    garbage[0, 0, 2:] = math.nan  # behind the end of the list
    assert agreement_of(good, garbage) == {"detection_agreement": 100.0}


def test_decisions_on_detections_are_taken_on_what_differs() -> None:
    found = compare(detections([[0, 1, 0.9, *BOX], [0, 2, 0.8, *BOX]]), detections([[0, 1, 0.9, *BOX]]))
    measure, value = distance(found)
    assert measure == "1 - detection overlap"
    assert value == pytest.approx(1.0 - 2 * 0.9 / (0.9 + 0.8 + 0.9))
    assert distance({"detection_overlap": 100.0}) == ("1 - detection overlap", 0.0)


# --- sample by sample


def relative_errors(reference: AnyArray, candidate: AnyArray) -> Float64:
    """Squared error of each sample over the mean energy of the reference, sample after sample."""
    ours, theirs = ([list(map(float, sample.ravel())) for sample in side] for side in (reference, candidate))
    energy = math.fsum(value**2 for row in ours for value in row) / len(ours)
    errors = [
        math.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for p, q in zip(ours, theirs, strict=True)
    ]
    return np.array([error / energy for error in errors])


def pair(seed: int, shape: tuple[int, ...], dtype: str = "f4") -> tuple[AnyArray, AnyArray]:
    random = np.random.default_rng(seed)
    reference = random.normal(size=shape) * 3
    return reference.astype(dtype), (reference + random.normal(size=shape)).astype(dtype)


@settings(deadline=None, max_examples=40)
@given(
    SEEDS,
    st.sampled_from([(6, 3), (1, 2), (4, 3, 5), (3, 4, 2, 2), (5,), (4, 1), (2, 7, 1, 1)]),
    st.sampled_from(["f2", "f4", "f8"]),
)
def test_errors_of_samples_against_plain_sums(seed: int, shape: tuple[int, ...], dtype: str) -> None:
    reference, candidate = pair(seed, shape, dtype)
    found = sample_distances(reference, candidate, "error")
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, relative_errors(reference, candidate), rtol=1e-9, atol=1e-300)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from([(6, 3), (1, 2), (4, 3, 5), (2, 7, 1, 1)]), st.booleans())
def test_divergences_of_samples_against_plain_sums(
    seed: int, shape: tuple[int, ...], probabilities: bool
) -> None:
    reference, candidate = pair(seed, shape, "f8")
    rows = [
        side.reshape(shape[0], -1, 7 if shape[1] == 7 else shape[-1]).tolist()
        for side in (reference, candidate)
    ]
    ours, theirs = ([[softmax(row) for row in sample] for sample in side] for side in rows)
    if probabilities:
        reference, candidate = (np.array(side).reshape(shape) for side in (ours, theirs))
    expected = [
        math.fsum(divergence(p, q) for p, q in zip(*both, strict=True)) / len(both[0])
        for both in zip(ours, theirs, strict=True)
    ]
    found = sample_distances(reference, candidate, "kl")
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert found.mean() == pytest.approx(compare(reference, candidate)["logit_kl"], abs=1e-12)


def test_probabilities_are_told_by_the_reference() -> None:
    sure = np.array([[1.0, 0.0], [0.25, 0.75]], np.float32)
    other = np.array([[0.5, 0.5], [0.25, 0.75]], np.float32)
    np.testing.assert_allclose(sample_distances(sure, other, "kl"), [math.log(2.0), 0.0], atol=1e-9)
    # The softmax of what only one of them has for probabilities.
    logits = np.array([[1.0, 0.0], [0.25, 2.0]], np.float32)
    expected = [
        divergence(softmax(p), softmax(q)) for p, q in zip(logits.tolist(), other.tolist(), strict=True)
    ]
    np.testing.assert_allclose(sample_distances(logits, other, "kl"), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(5,), (4, 1), (3, 4, 2, 2), (3, 1, 1, 1), (2, 3, 1)])
def test_divergence_falls_back_to_the_error_where_there_are_no_classes(shape: tuple[int, ...]) -> None:
    reference, candidate = pair(1, shape)
    found = sample_distances(reference, candidate, "kl")
    if shape == (2, 3, 1):  # classes beside an axis of size one
        assert not np.allclose(found, relative_errors(reference, candidate))
    else:
        np.testing.assert_allclose(found, relative_errors(reference, candidate), rtol=1e-6)


def test_without_energy_the_error_stands_for_itself() -> None:
    reference = np.zeros((2, 3), np.float32)
    candidate = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]], np.float32)
    assert sample_distances(reference, candidate, "error").tolist() == [0.0, 5.0]


# --- paired interval


def test_paired_interval_by_hand() -> None:
    """6 samples gained and 2 lost of 100: mean 4 points, variance (8 - 16/100) / 99."""
    first, second = np.zeros(100, dtype=np.bool_), np.zeros(100, dtype=np.bool_)
    second[:6] = True
    first[6:8] = True
    first[50:90] = second[50:90] = True
    half = 1.959963984540054 * 100 * math.sqrt((8 - 16 / 100) / 99 / 100)
    assert paired_interval(first, second) == pytest.approx((4.0, 4.0 - half, 4.0 + half))
    assert paired_interval(second, first) == pytest.approx((-4.0, -4.0 - half, -4.0 + half))
    narrow = paired_interval(first, second, confidence=0.5)
    assert narrow[1] > 4.0 - half
    assert narrow[2] < 4.0 + half


def test_paired_interval_of_equal_models_has_no_width() -> None:
    correct = np.array([True, False, True])
    assert paired_interval(correct, correct) == (0.0, 0.0, 0.0)


def test_paired_interval_stays_within_the_scale() -> None:
    worse, better = np.array([False, False, True]), np.array([True, True, True])
    difference, low, high = paired_interval(worse, better)
    assert difference == pytest.approx(200 / 3)
    assert -100.0 <= low < difference < high == 100.0


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        draw = random.random(500)
        _, low, high = paired_interval(draw < 0.7, (draw < 0.65) | (draw > 0.98))
        hits += low <= -3.0 <= high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_confidence_out_of_range(confidence: float) -> None:
    correct = np.array([True, False])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        paired_interval(correct, correct, confidence)


def test_samples_that_are_not_paired() -> None:
    with pytest.raises(ValueError, match=r"got \[2\] and \[3\]"):
        paired_interval(np.zeros(2, np.bool_), np.zeros(3, np.bool_))
    with pytest.raises(ValueError, match="at least 2 samples"):
        paired_interval(np.zeros(1, np.bool_), np.zeros(1, np.bool_))


def test_top1_of_sequences_counts_positions_and_skips_negative_labels() -> None:
    scores = np.zeros((2, 3, 4), np.float32)
    scores[0, 0, 1] = scores[0, 1, 2] = scores[1, 2, 3] = 1.0
    metric = get_metric("top1")
    metric.update(scores, np.array([[1, 3, -100], [-100, -1, 3]]))
    assert metric.correct.tolist() == [True, False, True]
    assert metric.result()["top1"] == pytest.approx(200.0 / 3)
