"""Corrections of a pruned model, each kept where it brings the network's output nearer to the dense model's.

The corrections of :func:`correct_pruned` need nothing but weights and the moments of the dense inputs; the others are
steps of the walk through the network (:mod:`pot_sparsity.pipeline.repair.sequential`), told by :class:`Steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pot_sparsity.algorithms.arrays import Float64, Moments
from pot_sparsity.algorithms.correction import (
    ChannelStatistics,
    FusedBatchNorm,
    activation_bias_correction,
    differential_correction,
    exact_weight_correction,
    pot_weight_correction,
)
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.normalization import Normalization, read_normalization
from pot_sparsity.pipeline.evaluate import Evaluator, distance
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.solve import DenseLayer, Solution
from pot_sparsity.recipe import CorrectionSettings, Recipe
from pot_sparsity.report.schema import Decision

#: Largest relative output error that re-estimated statistics may cause in the dense model without a warning.
MOVED = 0.01
#: What the check of re-estimated statistics on the dense model is called in the report.
DENSE_CHECK = "batch normalization re-estimated in the dense model"


@dataclass(frozen=True)
class OneShot:
    """Corrections that need no walk: of the weights' own statistics, and of the biases from dense inputs."""

    weights: Literal["none", "published", "exact"]
    bias: bool


@dataclass(frozen=True)
class Steps:
    """What a walk does, in this order at each layer.

    Attributes
    ----------
    reconstruct
        Fit weight and bias to the dense model's output, from the inputs and by the method that the recipe names.
    bias
        Solve the bias alone from the same.
    differential
        Restore mean and deviation of the output.
    batch_norm
        Give these layers the statistics that the normalization they absorbed would take from the sparse model,
        instead.
    normalization
        Correct scale and shift of the normalizations that the model has kept.
    """

    reconstruct: bool = False
    bias: bool = False
    differential: bool = False
    batch_norm: Mapping[str, FusedBatchNorm] = field(default_factory=dict)
    normalization: bool = False


@dataclass(frozen=True)
class Attempt:
    """One walk: what it is called, what it does, and whether its result is kept whatever the output says."""

    what: str
    steps: Steps
    always: bool = False


class Guard:
    """Judges candidates by the network's output on held-out samples and remembers how near the best one came.

    Attributes
    ----------
    metrics, reached
        Of the best model so far, and its distance to the dense one.
    """

    def __init__(self, judge: Evaluator, recorder: Recorder, model: Model) -> None:
        self._judge = judge
        self._recorder = recorder
        self.metrics = judge(model).metrics
        self._measure, self.reached = distance(self.metrics)

    def keeps(self, what: str, model: Model, *, always: bool = False) -> bool:
        """Whether a candidate takes the place of the best one; the decision goes into the report."""
        found = self._judge(model).metrics
        value = distance(found)[1]
        kept = value < self.reached or always
        self._recorder.decide(
            Decision(
                what=what,
                kept=kept,
                before=self.reached,
                after=value,
                measure=f"{self._measure} on held-out samples",
                reason="" if kept else "the output moved away from the dense model's",
            )
        )
        if kept:
            self.metrics, self.reached = found, value
        return kept


def correct_pruned(
    dense: Sequence[DenseLayer],
    pruned: Mapping[str, Solution],
    moments: Mapping[str, Moments],
    settings: CorrectionSettings,
    build: Callable[[Mapping[str, Solution]], Model],
    judge: Evaluator,
    recorder: Recorder,
) -> tuple[Model, dict[str, Solution], Guard]:
    """Correct weights, then biases, of pruned layers; what is ``helps`` costs one evaluation each.

    Parameters
    ----------
    dense, pruned
        Layers before and after pruning.
    moments
        Moments of their inputs in the dense model, by layer name.
    build
        Makes a model of solutions.

    Returns
    -------
    model, solutions, guard
        The best model, what is written into it, and the guard that judged it.
    """
    weights = "none" if settings.weights_when == "never" else settings.weights
    chosen = OneShot(weights if settings.weights_when == "always" else "none", settings.bias is True)
    trials: list[tuple[str, dict[str, Any]]] = []
    if weights != chosen.weights:
        trials.append((f"weight correction ({weights})", {"weights": weights}))
    if settings.bias == "helps":
        trials.append(("one-shot activation-bias correction", {"bias": True}))

    def solutions_of(choice: OneShot) -> dict[str, Solution]:
        names = ((item, item.layer.name) for item in dense)
        return {name: corrected(item, pruned[name], moments[name], choice) for item, name in names}

    solutions = solutions_of(chosen)
    model = build(solutions)
    guard = Guard(judge, recorder, model)
    for what, change in trials:
        candidate = solutions_of(replace(chosen, **change))
        rebuilt = build(candidate)
        if guard.keeps(what, rebuilt):
            chosen, solutions, model = replace(chosen, **change), candidate, rebuilt
    return model, solutions, guard


def corrected(item: DenseLayer, pruned: Solution, moments: Moments, choice: OneShot) -> Solution:
    """One layer with its weights, then its biases corrected; zeros stay zero."""
    weight = pruned.weight
    if choice.weights != "none":
        correct = pot_weight_correction if choice.weights == "published" else exact_weight_correction
        weight = np.where(pruned.mask, correct(weight, item.weight), 0.0)
    biases = tuple(
        activation_bias_correction(item.weight, weight, moments.mean, old)
        if choice.bias and old is not None
        else old
        for old in pruned.biases
    )
    return replace(pruned, weight=weight, biases=biases)


def attempts(
    recipe: Recipe, batch_norms: Mapping[str, FusedBatchNorm], normalizations: Sequence[Normalization]
) -> list[Attempt]:
    """The walks to try: one with all that is always done, one more for each correction that may help.

    Parameters
    ----------
    recipe
        Its reconstruction and correction settings.
    batch_norms
        Normalizations that layers have absorbed, by layer name.
    normalizations
        Normalizations that the model has kept.
    """
    settings = recipe.correction
    tuned = recipe.reconstruction.method == "tuning"
    reconstruct = tuned or recipe.reconstruction.input == "sparse"
    bias = settings.bias_mode == "sequential" and bool(settings.bias) and not reconstruct
    basis = Steps(reconstruct=reconstruct, bias=bias)
    forced = (bias and settings.bias is True) or (reconstruct and recipe.reconstruction.when == "always")
    optional: list[Callable[[Steps], Steps]] = []
    for when, there, add in (
        (settings.differential, True, _with_differential),
        (
            settings.batch_norm_when,
            settings.batch_norm == "reestimate" and bool(batch_norms),
            lambda steps: replace(steps, batch_norm=batch_norms),
        ),
        (settings.normalization, bool(normalizations), _with_normalization),
    ):
        if there and when == "always":
            basis, forced = add(basis), True
        elif there and when == "helps":
            optional.append(add)
    fit = (
        f"layer-wise tuning from {recipe.reconstruction.input} inputs"
        if tuned
        else "sparse-input reconstruction"
    )
    found = [Attempt(_words(basis, fit), basis, forced)] if basis != Steps() else []
    return found + [Attempt(_words(add(basis), fit), add(basis)) for add in optional]


def _with_differential(steps: Steps) -> Steps:
    return replace(steps, differential=True)


def _with_normalization(steps: Steps) -> Steps:
    return replace(steps, normalization=True)


def _words(steps: Steps, fit: str) -> str:
    first = [
        *([fit] if steps.reconstruct else []),
        *(["sequential activation-bias correction"] if steps.bias else []),
    ]
    then = [
        *(["differential correction"] if steps.differential else []),
        *(["re-estimated batch normalization"] if steps.batch_norm else []),
        *(["normalization correction"] if steps.normalization else []),
    ]
    return " with ".join(part for part in (" and ".join(first), " and ".join(then)) if part)


def check_dense(model: Model, judge: Evaluator, recorder: Recorder) -> None:
    """Report how far re-estimated normalizations move the dense model itself; warn where that is too far."""
    measure, value = distance(judge(model).metrics)
    moved = value > MOVED
    recorder.decide(
        Decision(
            what=DENSE_CHECK,
            kept=False,
            before=0.0,
            after=value,
            measure=f"{measure} on held-out samples",
            reason="a check only: what it moves here comes from the calibration samples, not from pruning",
        )
    )
    if moved:
        recorder.warn(
            f"re-estimating BatchNorm moves the output of the dense model itself ({measure} {value:.2g}, limit "
            f"{MOVED:g}): the network was trained on other statistics than the calibration samples have; "
            "correction.differential corrects without that"
        )


def correct_normalization(
    model: Model, item: Normalization, dense: ChannelStatistics, sparse: ChannelStatistics, recipe: Recipe
) -> tuple[Float64, Float64 | None]:
    """New scale and shift ``[channels]`` that give a normalization's output the dense output's mean and deviation.

    Without a shift to write, the scale alone restores the second moment.

    Parameters
    ----------
    model
        The sparse model, whose constants ``sparse`` was measured with; it is not changed.
    item
        The normalization.
    dense, sparse
        Statistics of its output in both models, on the same samples.
    """
    scale, shift = read_normalization(model, item)
    settings = recipe.correction
    if shift is None:
        dense, sparse = dense.about_zero, sparse.about_zero
    weight, bias, _ = differential_correction(
        scale.reshape(-1, 1, 1),
        np.zeros((item.channels, 1)) if shift is None else shift.reshape(-1, 1),
        dense,
        sparse,
        settings.clip,
        scale=settings.scale,
    )
    return weight.ravel(), None if shift is None else bias.ravel()
