"""Quantization with the settings that keep the output closest to the dense model's.

How NNCF estimates activation ranges, and whether it corrects biases fast or in full, moves the result of a small
network by more than pruning half of it does; which choice is best depends on the network. So the choices are tried
and the one whose output stays closest to the dense model's on calibration samples is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import nncf
import numpy as np

from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.evaluate import Evaluator, distance
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.weight_grid import Placement, place_weights
from pot_sparsity.quantization import quantize
from pot_sparsity.recipe import QuantizationSettings
from pot_sparsity.report.schema import Decision

#: Range estimators in the order they are tried.
_RANGES = ("default", "minmax", "histogram")


@dataclass(frozen=True)
class Attempt:
    """One concrete way to quantize and how far it is from the dense model on the judging samples."""

    settings: QuantizationSettings
    model: Model
    distance: float
    measure: str


@dataclass(frozen=True)
class Placing:
    """What placing weights on the grid needs.

    Attributes
    ----------
    moments
        Moments of the layers' inputs, by name.
    judge
        Measures the distance to the dense model on samples that are not in the moments: integers have many
        degrees of freedom.
    threads
        Layers solved side by side.
    """

    moments: Mapping[str, Moments]
    judge: Evaluator
    threads: int


def quantize_best(
    model: Model,
    dataset: Dataset,
    settings: QuantizationSettings,
    judge: Evaluator,
    *,
    placing: Placing,
    ignored_scope: nncf.IgnoredScope | None,
    what: str,
    recorder: Recorder,
    progress: Progress,
) -> Model:
    """Quantize with every setting that ``auto`` leaves open and keep the closest to the dense model.

    Last of all the weights are placed on NNCF's grid by layer error, where ``weights`` asks for it.

    Parameters
    ----------
    model
        Prepared model, not changed.
    dataset
        Calibration samples.
    settings
        ``ranges`` and ``bias_correction`` may be ``auto``.
    judge
        Measures the distance to the dense model on samples kept for that.
    placing
        What placing weights needs.
    what
        Name of the model, for the decisions in the report.
    """

    def attempt(chosen: QuantizationSettings) -> Attempt:
        result = quantize(model, dataset, chosen, ignored_scope=ignored_scope)
        if not open_choices:
            return Attempt(chosen, result, 0.0, "")
        measure, value = distance(judge(result, exact=False).metrics)
        return Attempt(chosen, result, value, measure)

    open_choices = "auto" in (settings.ranges, settings.bias_correction)
    progress.start(f"Quantizing ({what})", None)
    try:
        first = settings.model_copy(
            update={
                "ranges": _RANGES[0] if settings.ranges == "auto" else settings.ranges,
                "bias_correction": "full" if settings.bias_correction == "full" else "fast",
            }
        )
        best = attempt(first)
        progress.advance()
        for label, choose in _alternatives(settings):
            chosen = best.settings.model_copy(update=choose)
            try:
                other = attempt(chosen)
            except ModelError as error:
                recorder.decide(Decision(what=f"{what}: {label}", kept=False, reason=str(error)))
                continue
            kept = other.distance < best.distance
            recorder.decide(
                Decision(
                    what=f"{what}: {label}",
                    kept=kept,
                    before=best.distance,
                    after=other.distance,
                    measure=f"{other.measure} on calibration samples",
                )
            )
            best = other if kept else best
            progress.advance()
    finally:
        progress.finish()
    if settings.weights == "nncf":
        return best.model
    return _placed(model, best.model, settings, placing, what, recorder)


def _placed(
    model: Model,
    quantized: Model,
    settings: QuantizationSettings,
    placing: Placing,
    what: str,
    recorder: Recorder,
) -> Model:
    """The quantized model with its weights placed again; with ``auto`` only where held-out samples prefer it."""
    placed, placements = place_weights(
        model, quantized, placing.moments, bits=settings.weight_bits, threads=placing.threads
    )
    measure, before = distance(placing.judge(quantized, exact=False).metrics)
    after = distance(placing.judge(placed, exact=False).metrics)[1]
    kept = settings.weights == "obq" or after < before
    recorder.decide(
        Decision(
            what=f"{what}: weights placed by layer error",
            kept=kept,
            before=before,
            after=after,
            measure=f"{measure} on held-out samples",
            reason=_summary(placements),
        )
    )
    return placed if kept else quantized


def _summary(placements: list[Placement]) -> str:
    """One line on what placing did to the layers."""
    ratios = [item.after / item.before for item in placements if not item.left and item.before > 0]
    text = f"{len(ratios)} layers"
    if ratios:
        text += f", median layer error {float(np.median(ratios)):.2g} times that of NNCF's rounding"
    left = [item for item in placements if item.left]
    return text + (f"; {len(left)} left ({left[0].layer!r}: {left[0].left})" if left else "")


def _alternatives(settings: QuantizationSettings) -> Iterator[tuple[str, dict[str, str]]]:
    if settings.ranges == "auto":
        for name in _RANGES[1:]:
            yield f"{name} activation ranges", {"ranges": name}
    if settings.bias_correction == "auto":
        yield "full bias correction", {"bias_correction": "full"}
