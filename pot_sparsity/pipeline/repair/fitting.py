"""Fitting one layer during the walk: to the sparse model's inputs, then to the dense output's statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pot_sparsity.algorithms.arrays import Float64, Moments
from pot_sparsity.algorithms.correction import (
    UNBOUNDED,
    differential_correction,
    output_statistics,
    reestimated_statistics,
)
from pot_sparsity.algorithms.moments import CrossMoments
from pot_sparsity.algorithms.pruning.problem import LayerProblem, layer_error
from pot_sparsity.algorithms.pruning.refit import refitted
from pot_sparsity.algorithms.reconstruction import RIDGE, output_error, sparse_target
from pot_sparsity.pipeline.repair.correction import Steps
from pot_sparsity.pipeline.repair.tuning import TuningPool, tune
from pot_sparsity.pipeline.solve import DenseLayer, Solution, run_solver, shrunk, solver_options
from pot_sparsity.recipe import Recipe


@dataclass(frozen=True)
class LayerDecision:
    """What the walk decided for one layer.

    Attributes
    ----------
    layer
        Its name.
    blend
        How far its target went from the dense weight (0) to the reconstructed one (1).
    error_before, error_after
        Relative error of both on held-out samples.
    """

    layer: str
    blend: float
    error_before: float
    error_after: float

    def pack(self) -> np.ndarray:
        """The numbers as an array, for the run folder."""
        return np.array([self.blend, self.error_before, self.error_after])


@dataclass(frozen=True)
class Gathered:
    """Cross moments of one layer on the fit samples and, where there are any, the held-out ones.

    ``pool`` holds the samples it is tuned on, if it is to be tuned; ``moved`` says that its target makes up for
    what is wrong beside it (see :class:`~pot_sparsity.pipeline.repair.stages.Residual`).
    """

    fit: CrossMoments
    held_out: CrossMoments | None
    pool: TuningPool | None = None
    moved: bool = False


class LayerFit(Protocol):
    """What finds the new weight and bias of one layer on a walk: :func:`fit_layer`, or something in its place."""

    def __call__(
        self,
        item: DenseLayer,
        start: Solution,
        dense_moments: Moments,
        gathered: Gathered,
        recipe: Recipe,
        steps: Steps,
    ) -> tuple[Solution, LayerDecision]:
        """Parameters are those of :func:`fit_layer`."""
        ...


def fit_layer(
    item: DenseLayer,
    start: Solution,
    dense_moments: Moments,
    gathered: Gathered,
    recipe: Recipe,
    steps: Steps,
) -> tuple[Solution, LayerDecision]:
    """New weight and bias of one layer.

    Parameters
    ----------
    item
        The dense layer.
    start
        Its pruned weight; the mask is kept unless the recipe solves for it again.
    dense_moments
        Moments of its input in the dense model, on the fit samples.
    gathered
        Moments of its input in the sparse model against its output in the dense model.
    steps
        What is done; layers whose bias may not change are left alone, but for tuning.
    """
    begin = time.perf_counter()
    weight, bias, old_bias = start.weight, start.biases[0], item.biases[0]
    decision = LayerDecision(item.layer.name, 0.0, 0.0, 0.0)
    damping = start.damping
    closed_form = steps.reconstruct and gathered.pool is None
    if steps.reconstruct and gathered.pool is not None:
        tuned = tune(item.layer, start, gathered.pool, recipe)
        weight, bias = tuned.weight, tuned.bias
        decision = _tuning_decision(item, start.weight, weight, dense_moments, gathered, recipe)
    if bias is not None and old_bias is not None:
        if closed_form:
            weight, damping, decision = _reconstruct(item, start, gathered, recipe)
        if closed_form or steps.bias:
            bias = gathered.fit.output_mean - np.einsum("grc,gc->gr", weight, gathered.fit.inputs.mean)
        output = output_statistics(weight, bias, gathered.fit.inputs)
        if item.layer.name in steps.batch_norm:
            target = reestimated_statistics(steps.batch_norm[item.layer.name], output)
            weight, bias, _ = differential_correction(weight, bias, target, output, UNBOUNDED)
        elif steps.differential:
            target = output_statistics(item.weight, old_bias, dense_moments)
            if gathered.moved:
                target = replace(target, mean=gathered.fit.output_mean.ravel())
            weight, bias, _ = differential_correction(
                weight,
                bias,
                target,
                output,
                recipe.correction.clip,
                scale=recipe.correction.scale,
            )
    seconds = start.seconds + time.perf_counter() - begin
    return replace(start, weight=weight, biases=(bias,), damping=damping, seconds=seconds), decision


def _reconstruct(
    item: DenseLayer, start: Solution, gathered: Gathered, recipe: Recipe
) -> tuple[Float64, float, LayerDecision]:
    fit = gathered.fit
    target = sparse_target(
        item.weight, fit, gathered.held_out, ridge=max(RIDGE, start.shrinkage), prior=item.prior
    )
    second = shrunk(fit.inputs.centred, start.shrinkage, item.prior)
    if recipe.reconstruction.masks == "solved":
        zeros = int(np.count_nonzero(start.weight == 0.0))
        result = run_solver(recipe, solver_options(recipe), item.layer, target.weight, second, zeros)
    else:
        result = refitted(LayerProblem.of(target.weight, second), start.mask)
    decision = LayerDecision(item.layer.name, target.blend, target.error_before, target.error_after)
    return result.weight, max(result.damping, start.damping), decision


def _tuning_decision(
    item: DenseLayer,
    before: Float64,
    after: Float64,
    dense_moments: Moments,
    gathered: Gathered,
    recipe: Recipe,
) -> LayerDecision:
    """What tuning did to the error of the layer on the inputs it was tuned on, with the best bias."""
    if recipe.reconstruction.input == "sparse":
        judge = gathered.held_out or gathered.fit
        scale = float((judge.output_power - judge.output_mean**2).sum())
        errors = [output_error(weight, judge) for weight in (before, after)]
    else:
        centred = dense_moments.centred
        scale = layer_error(np.zeros_like(item.weight), item.weight, centred)
        errors = [layer_error(weight, item.weight, centred) for weight in (before, after)]
    relative = [error / scale if scale > 0 else 0.0 for error in errors]
    return LayerDecision(item.layer.name, 1.0, relative[0], relative[1])
