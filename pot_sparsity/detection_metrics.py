"""How far two detectors agree, without labels, where the output is a list of detections.

The format is that of OpenVINO's DetectionOutput: ``[1, 1, K, 7]`` with rows ``(image, class, score, x1, y1,
x2, y2)``; an image of -1 ends the list. Rows are ordered by score, so one score that moves shifts all rows
behind it: differences of values mean nothing here, and detections are matched instead.
"""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, Float64

SCORE_THRESHOLD = 0.3
"""Detections below this score do not count: at 0.02 a detector reports noise that nobody looks at."""

IOU_THRESHOLD = 0.5
"""Least intersection over union of two boxes that count as the same, as in COCO's AP50."""

_FIELDS = 7


def looks_like_detections(output: AnyArray) -> bool:
    """Whether an output ``[N, 1, K, 7]``, K > 1, is in this format by its shape, type and values.

    The lists hold whole numbers from 0 on as image and class, and scores within 0..1.
    """
    if output.ndim != 4 or output.shape[1] != 1 or output.shape[2] < 2 or output.shape[3] != _FIELDS:
        return False
    if not np.issubdtype(output.dtype, np.floating):
        return False
    rows = np.concatenate(detection_lists(output))
    numbers, scores = rows[:, :2], rows[:, 2]
    whole = (numbers == np.round(numbers)) & (numbers >= 0.0)
    return bool(whole.all() and ((scores >= 0.0) & (scores <= 1.0)).all())


def detection_lists(output: AnyArray) -> list[Float64]:
    """Each list ``[K, 7]`` of an output ``[..., K, 7]`` up to its end, float64 ``[detections, 7]``."""
    lists = output.reshape(-1, *output.shape[-2:]).astype(np.float64)
    return [rows[: _length(rows)] for rows in lists]


def _length(rows: Float64) -> int:
    ends = np.flatnonzero(rows[:, 0] < 0.0)
    return int(ends[0]) if ends.size else len(rows)


class DetectionAgreement:
    """Percent of the detections of two models that have a counterpart in the other: ``2 matches / (m + n)``.

    Only detections with a score of at least :data:`SCORE_THRESHOLD` count. Counterparts have the same image
    and class and an intersection over union of at least :data:`IOU_THRESHOLD`; those of the candidate take
    turns by falling score, each takes the free one of the reference that it overlaps most. 100 where neither
    model detects anything.

    :meth:`overlap` is the same without the threshold of the score, each pair weighted by its intersection over
    union and the lower of its two scores, each detection by its score: it moves with every box and score, so it
    tells models apart on samples too few for the agreement to do so.
    """

    def __init__(self) -> None:
        self._matches = 0
        self._detections = 0
        self._common = 0.0
        self._scores = 0.0

    def update(self, reference: list[Float64], candidate: list[Float64]) -> None:
        """Add the lists of a batch, as :func:`detection_lists` gives them, in the same order."""
        for rows in zip(reference, candidate, strict=True):
            ours, theirs = (part[part[:, 2] >= SCORE_THRESHOLD] for part in rows)
            self._detections += len(ours) + len(theirs)
            self._matches += len(_matches(ours, theirs))
            self._scores += sum(float(part[:, 2].sum()) for part in rows)
            self._common += sum(_matches(*rows))

    def result(self) -> float:
        """Percent over everything seen."""
        return 200.0 * self._matches / self._detections if self._detections else 100.0

    def overlap(self) -> float:
        """Percent of the scores that both models give to the same boxes; 100 for equal outputs."""
        return 200.0 * self._common / self._scores if self._scores > 0.0 else 100.0


def _matches(reference: Float64, candidate: Float64) -> list[float]:
    """Intersection over union times the lower score of every pair."""
    if not len(reference) or not len(candidate):
        return []
    same = (candidate[:, None, :2] == reference[None, :, :2]).all(axis=2)
    overlap = np.where(same, _overlaps(candidate[:, 3:], reference[:, 3:]), 0.0)
    matches = []
    for row in np.argsort(-candidate[:, 2], kind="stable"):
        best = int(overlap[row].argmax())
        if overlap[row, best] >= IOU_THRESHOLD:
            matches.append(float(overlap[row, best] * min(candidate[row, 2], reference[best, 2])))
            overlap[:, best] = 0.0
    return matches


def _overlaps(a: Float64, b: Float64) -> Float64:
    """Intersection over union of boxes ``[m, 4]`` and ``[n, 4]``, ``[m, n]``; 0 for two empty boxes."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0.0, None).prod(axis=2)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0.0, None).prod(axis=1) for box in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0.0))
