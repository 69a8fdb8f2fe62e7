"""Metrics: what a model's outputs are worth, with labels or against the dense model's outputs.

All are fed batch by batch and hold sums, not outputs. Percentages are 0..100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import norm

from pot_sparsity.algorithms.arrays import AnyArray, Bool, Float64
from pot_sparsity.detection_metrics import DetectionAgreement, detection_lists, looks_like_detections
from pot_sparsity.errors import DataError, ModelError, PotSparsityError, RecipeError

SQNR_LIMIT = 200.0
"""Largest SQNR reported, in dB: that of equal outputs; its negative is the smallest."""

SMALLEST_PROBABILITY = 1e-12
"""Probabilities below it count as this much in a KL divergence: a quantized softmax gives exact zeros."""

CHUNK = 1 << 22  # elements compared at a time, so that memory does not grow with the outputs


class LabelMetric(Protocol):
    """A metric of one model's outputs against labels; larger is better."""

    @property
    def name(self) -> str:
        """Key in :data:`METRICS` and in the result."""

    @property
    def correct(self) -> Bool:
        """Whether each sample seen so far was right, ``[samples]``, for :func:`paired_interval`."""

    def update(self, output: AnyArray, labels: AnyArray) -> None:
        """Add a batch: output ``[N, classes]`` (further axes of size 1 allowed), integer labels ``[N]``."""

    def result(self) -> dict[str, float]:
        """Value by name over all samples seen, in percent."""


class TopK:
    """Percent of samples whose label is among the k highest scores.

    Of a sequence output ``[N, T, classes]`` with labels ``[N, T]`` every position counts as a sample, except those
    with a negative label.

    Of equal scores the class with the lower index ranks higher, so with k = 1 it agrees with ``argmax``. A
    sample whose scores hold a NaN is wrong.
    """

    def __init__(self, k: int) -> None:
        self.name = f"top{k}"
        self._k = k
        self._correct: list[Bool] = []

    @property
    def correct(self) -> Bool:
        """Whether each sample seen so far was right, ``[samples]``."""
        return np.concatenate([np.zeros(0, dtype=np.bool_), *self._correct])

    def update(self, output: AnyArray, labels: AnyArray) -> None:
        """Add a batch; DataError where output or labels have the wrong shape, type or range."""
        scores = _class_scores(output)
        if scores is not None and scores.ndim == 3 and labels.shape == scores.shape[:2]:
            known = labels >= 0
            scores, labels = scores[known], labels[known]
        if scores is None or scores.ndim != 2:
            raise DataError(
                f"{self.name} needs an output of shape [N, classes], or [N, T, classes] with labels [N, T], this "
                f"model gives {list(output.shape)} and the labels are {list(labels.shape)}: leave the labels out"
            )
        number, classes = scores.shape
        if labels.shape != (number,) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"{self.name} needs {number} integer labels, got {labels.dtype} of shape {list(labels.shape)}"
            )
        if number and not (labels.min() >= 0 and labels.max() < classes):
            raise DataError(
                f"labels run from {labels.min()} to {labels.max()}, but the model has the classes 0 to "
                f"{classes - 1}"
            )
        column = labels.astype(np.int64)[:, None]
        own = np.take_along_axis(scores, column, axis=1)
        earlier = np.arange(classes) < column
        rank = np.count_nonzero((scores > own) | ((scores == own) & earlier), axis=1)
        self._correct.append(np.asarray((rank < self._k) & ~np.isnan(scores).any(axis=1)))

    def result(self) -> dict[str, float]:
        """Percent of samples that were right; DataError where none was seen."""
        correct = self.correct
        if not correct.size:
            raise DataError(f"{self.name} has seen no samples")
        return {self.name: 100.0 * float(correct.mean())}


Top1: Callable[[], TopK] = partial(TopK, 1)
Top5: Callable[[], TopK] = partial(TopK, 5)

METRICS: dict[str, Callable[[], LabelMetric]] = {
    "top1": Top1,
    "top5": Top5,
}


def get_metric(name: str) -> LabelMetric:
    """Return a fresh metric of this name; RecipeError with the names that exist otherwise."""
    if name not in METRICS:
        raise RecipeError(f"metric {name!r} is not known: use one of {', '.join(METRICS)}")
    return METRICS[name]()


class Comparison:
    """Compares one named output of a model with that of the reference, the dense model; needs no labels.

    The result holds:

    ``agreement``
        Percent of samples (positions, in ``[N, T, V]``) with the same ``argmax`` over the last axis.
    ``logit_kl``
        Mean of ``KL(softmax(reference) || softmax(candidate))`` over the last axis, in nats. Where the first
        reference batch already looks like probabilities (not negative, sums of 1 to within 0.01) no softmax
        is applied, from then on.
    ``sqnr``
        ``10 log10(sum reference^2 / sum (reference - candidate)^2)`` in dB, limited to -200..200; 200 for
        equal outputs.
    ``output_mse``
        Mean of ``(reference - candidate)^2``.
    ``detection_agreement``, ``detection_overlap``
        In place of all of these where the first reference batch is a list of detections:
        see :class:`~pot_sparsity.detection_metrics.DetectionAgreement`.

    The first two only where the output looks like class scores: floating point, ``[N, classes]`` or
    ``[N, T, classes]`` with more than one class; ``[N, classes, 1, 1]`` and the like count as the
    former.

    Parameters
    ----------
    name
        Name of the output, for error messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_classes = True
        self._probabilities: bool | None = None
        self._detections: DetectionAgreement | None = None
        self._positions = 0
        self._elements = 0
        self._same = 0
        self._kl = 0.0
        self._signal = 0.0
        self._noise = 0.0

    def update(self, reference: AnyArray, candidate: AnyArray) -> None:
        """Add a batch of both outputs, ``[N, ...]``.

        Raises
        ------
        ValueError
            The shapes differ.
        ModelError
            The reference is not finite: the model is broken for this input.
        PotSparsityError
            The candidate alone is not finite: what was done to the model broke it.
        """
        if reference.shape != candidate.shape:
            raise ValueError(
                f"output {self._name!r} is {list(reference.shape)} in the reference and "
                f"{list(candidate.shape)} in the model compared with it"
            )
        if not self._elements and looks_like_detections(reference):
            self._detections = DetectionAgreement()
        if self._detections is not None:
            self._compare_detections(self._detections, reference, candidate)
            return
        reference_scores, candidate_scores = _class_scores(reference), _class_scores(candidate)
        if reference_scores is None or candidate_scores is None:
            self._has_classes = False
            reference_scores = candidate_scores = None
        for ours, theirs in _chunks(
            reference if reference_scores is None else reference_scores,
            candidate if candidate_scores is None else candidate_scores,
        ):
            self._check_finite(ours, theirs)
            self._signal += float(np.square(ours).sum())
            self._noise += float(np.square(ours - theirs).sum())
            self._elements += ours.size
            if self._has_classes:
                self._compare_classes(ours, theirs)

    def result(self) -> dict[str, float]:
        """Values by name over all batches; DataError where none was seen."""
        if not self._elements:
            raise DataError(f"output {self._name!r}: no samples were compared")
        if self._detections is not None:
            return {
                "detection_agreement": self._detections.result(),
                "detection_overlap": self._detections.overlap(),
            }
        values = {"sqnr": _sqnr(self._signal, self._noise), "output_mse": self._noise / self._elements}
        if not self._has_classes:
            return values
        agreement = 100.0 * self._same / self._positions
        return {"agreement": agreement, "logit_kl": self._kl / self._positions, **values}

    def _check_finite(self, reference: Float64, candidate: Float64) -> None:
        if not np.isfinite(reference).all():
            raise ModelError(f"output {self._name!r} of the reference model holds NaN or infinite values")
        if not np.isfinite(candidate).all():
            raise PotSparsityError(
                f"output {self._name!r} holds NaN or infinite values where the reference model's does not"
            )

    def _compare_detections(
        self, agreement: DetectionAgreement, reference: AnyArray, candidate: AnyArray
    ) -> None:
        ours, theirs = detection_lists(reference), detection_lists(candidate)
        self._check_finite(np.concatenate(ours), np.concatenate(theirs))
        agreement.update(ours, theirs)
        self._elements += reference.size

    def _compare_classes(self, reference: Float64, candidate: Float64) -> None:
        if self._probabilities is None:
            self._probabilities = _are_probabilities(reference)
        self._kl += float(_divergence(reference, candidate, probabilities=self._probabilities).sum())
        self._same += int(np.count_nonzero(reference.argmax(axis=-1) == candidate.argmax(axis=-1)))
        self._positions += reference.size // reference.shape[-1]


def paired_interval(correct_a: Bool, correct_b: Bool, confidence: float = 0.95) -> tuple[float, float, float]:
    """Change of accuracy from model a to model b on the same samples, with its confidence interval.

    Normal approximation on the differences of each sample (-1, 0, 1), which is narrower than one on two
    independent accuracies. Where no sample differs the interval has no width: a normal approximation cannot
    see rare changes.

    Parameters
    ----------
    correct_a, correct_b
        Whether each model was right, ``[samples]``, in the same order.
    confidence
        Between 0 and 1.

    Returns
    -------
    difference, low, high
        Accuracy of b minus that of a, in points, and the ends of the interval, within -100..100.

    Raises
    ------
    ValueError
        Shapes that differ, fewer than two samples, or a confidence out of range.
    """
    if correct_a.ndim != 1 or correct_a.shape != correct_b.shape or correct_a.size < 2:
        raise ValueError(
            f"a paired interval needs two equally long rows of at least 2 samples, got "
            f"{list(correct_a.shape)} and {list(correct_b.shape)}"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    differences = 100.0 * (correct_b.astype(np.float64) - correct_a.astype(np.float64))
    mean = float(differences.mean())
    half = (
        float(norm.ppf(0.5 + confidence / 2.0))
        * float(differences.std(ddof=1))
        / float(differences.size**0.5)
    )
    return mean, max(mean - half, -100.0), min(mean + half, 100.0)


def sample_distances(
    reference: AnyArray, candidate: AnyArray, kind: Literal["error", "kl", "squared"]
) -> Float64:
    """Distance of one output to the dense model's, sample by sample.

    Parameters
    ----------
    reference, candidate
        The dense model's output and another's, ``[N, ...]``, of equal shape.
    kind
        ``error``: squared error, relative to the mean energy of the reference. ``kl``: divergence of the softmax
        of class scores, in nats (mean over positions), or of the outputs themselves where all of the reference
        already looks like probabilities (as in :class:`Comparison`); outputs that do not look like class scores
        fall back to ``error``. ``squared``: squared error as it is.

    Returns
    -------
    Float64
        ``[N]``.
    """
    samples = reference.shape[0]
    scores = _class_scores(reference), _class_scores(candidate)
    if kind == "kl" and scores[0] is not None and scores[1] is not None:
        ours, theirs = scores[0].astype(np.float64), scores[1].astype(np.float64)
        divergence = _divergence(ours, theirs, probabilities=_are_probabilities(ours)).sum(axis=-1)
        return np.asarray(divergence.reshape(samples, -1).mean(axis=1), dtype=np.float64)
    flat = reference.reshape(samples, -1).astype(np.float64)
    energy = 1.0 if kind == "squared" else float(np.square(flat).sum()) / samples
    error = np.square(candidate.reshape(samples, -1) - flat).sum(axis=1)
    return np.asarray(error / energy if energy > 0.0 else error, dtype=np.float64)


def _class_scores(output: AnyArray) -> NDArray[np.floating] | None:
    """Output as ``[N, classes]`` or ``[N, T, classes]``; None where it does not look like class scores."""
    if output.ndim < 2 or not np.issubdtype(output.dtype, np.floating):
        return None
    scores = cast(NDArray[np.floating], output)
    sizes = [size for size in output.shape[1:] if size != 1]
    if len(sizes) == 1:
        scores = scores.reshape(output.shape[0], sizes[0])
    return scores if scores.ndim in (2, 3) and scores.shape[-1] > 1 else None


def _chunks(reference: AnyArray, candidate: AnyArray) -> Iterator[tuple[Float64, Float64]]:
    """Both arrays in float64, a few samples at a time."""
    samples = reference.shape[0] if reference.ndim else 1
    both = [array.reshape(samples, *array.shape[1:]) for array in (reference, candidate)]
    step = max(1, CHUNK * samples // max(1, reference.size))
    for start in range(0, samples, step):
        ours, theirs = (array[start : start + step].astype(np.float64) for array in both)
        yield ours, theirs


def _are_probabilities(scores: Float64) -> bool:
    """Whether class scores already look like probabilities: not negative, sums of 1 to within 0.01."""
    return bool((scores >= 0.0).all() and np.allclose(scores.sum(axis=-1), 1.0, rtol=0.0, atol=1e-2))


def _divergence(reference: Float64, candidate: Float64, *, probabilities: bool) -> Float64:
    """Terms of ``KL(reference || candidate)``, in the shape of the scores; their softmax unless ``probabilities``."""
    log = _log_probabilities if probabilities else _log_softmax
    log_p, log_q = log(reference), log(candidate)
    return np.asarray(np.exp(log_p) * (log_p - log_q))


def _log_softmax(logits: Float64) -> Float64:
    return np.asarray(log_softmax(logits, axis=-1))


def _log_probabilities(probabilities: Float64) -> Float64:
    bounded = np.maximum(probabilities, SMALLEST_PROBABILITY)
    return np.asarray(np.log(bounded / bounded.sum(axis=-1, keepdims=True)))


def _sqnr(signal: float, noise: float) -> float:
    if noise == 0.0:
        return SQNR_LIMIT
    if signal == 0.0:
        return -SQNR_LIMIT
    return float(np.clip(10.0 * (np.log10(signal) - np.log10(noise)), -SQNR_LIMIT, SQNR_LIMIT))
