"""Fitting a layer with few-bit inputs and weights during the walk: to what it gives in the dense model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float64, Moments
from pot_sparsity.algorithms.correction import differential_correction, output_statistics
from pot_sparsity.algorithms.quantization.choices import BitChoice
from pot_sparsity.algorithms.quantization.descent import descend
from pot_sparsity.algorithms.quantization.gptq import round_columns
from pot_sparsity.algorithms.quantization.grid import fit_grid, shrunk_grids
from pot_sparsity.algorithms.quantization.problem import GridProblem, QuantizedResult, QuantizerOptions
from pot_sparsity.algorithms.reconstruction import RIDGE, sparse_target
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.pipeline.repair.correction import Steps
from pot_sparsity.pipeline.repair.fitting import Gathered, LayerDecision
from pot_sparsity.pipeline.solve import DenseLayer, Solution, run_solver, shrunk, solver_options
from pot_sparsity.pipeline.store.levels import with_pattern
from pot_sparsity.recipe import Recipe

#: Bits from which on the range hardly matters: one grid is fitted instead of many being tried.
_MANY_BITS = 8
#: Ranges that fewer bits are tried with, down to this share of the row's own.
_RANGES, _NARROWEST = 12, 0.35
#: Sweeps of the descent.
_OPTIONS = QuantizerOptions(sweeps=20, refit_scale=True)


@dataclass(frozen=True)
class BitFit:
    """A :class:`~pot_sparsity.pipeline.repair.fitting.LayerFit` of layers that have a choice each, by name."""

    choices: Mapping[str, BitChoice]

    def __call__(
        self,
        item: DenseLayer,
        start: Solution,
        dense_moments: Moments,
        gathered: Gathered,
        recipe: Recipe,
        steps: Steps,
    ) -> tuple[Solution, LayerDecision]:
        """New integers, scales and bias; layers whose bias may not change stay as they are.

        The pattern is solved for again, sparse first, then the weights that are left are placed on a grid.
        """
        begin = time.perf_counter()
        old_bias = item.biases[0]
        decision = LayerDecision(item.layer.name, 0.0, 0.0, 0.0)
        if start.biases[0] is None or old_bias is None or start.scale is None:
            return start, decision
        weight, scale, fit = start.weight, start.scale, gathered.fit
        if steps.reconstruct:
            choice = self.choices[item.layer.name]
            target = sparse_target(item.weight, fit, gathered.held_out, ridge=max(RIDGE, start.shrinkage))
            second = shrunk(fit.inputs.centred, start.shrinkage)
            mask = kept_weights(item, target.weight, second, choice, recipe)
            placed = place_weights(item.layer.name, target.weight, second, mask, choice.weight_bits)
            weight, scale = placed.weight, placed.grid.scale
            decision = LayerDecision(item.layer.name, target.blend, target.error_before, target.error_after)
        bias = fit.output_mean - np.einsum("grc,gc->gr", weight, fit.inputs.mean)
        if steps.differential:
            output = output_statistics(weight, bias, fit.inputs)
            wanted = output_statistics(item.weight, old_bias, dense_moments)
            if gathered.moved:
                wanted = replace(wanted, mean=fit.output_mean.ravel())
            weight, bias, gain = differential_correction(
                weight, bias, wanted, output, recipe.correction.clip, scale=recipe.correction.scale
            )
            scale = scale * gain
        seconds = start.seconds + time.perf_counter() - begin
        return replace(start, weight=weight, biases=(bias,), seconds=seconds, scale=scale), decision


def kept_weights(
    item: DenseLayer, target: Float64, second: Float64, choice: BitChoice, recipe: Recipe
) -> Bool:
    """Which weights stay under a choice: all that are not zero already, or what the solver keeps of the pattern."""
    if choice.pattern is None:
        return np.asarray(item.weight != 0.0)
    chosen = with_pattern(recipe, str(choice.pattern))
    half = item.layer.size - item.layer.size * choice.pattern.n // choice.pattern.m
    return run_solver(chosen, solver_options(recipe), item.layer, target, second, half).mask


def place_weights(name: str, target: Float64, second: Float64, mask: Bool, bits: int) -> QuantizedResult:
    """Weights on a symmetric grid per row by the layer's error: range, integers and scale.

    For few bits GPTQ tries several ranges and every row keeps its best; then coordinate descent and the scale that
    fits the integers take turns.
    """
    try:
        problem = GridProblem.of(target, second, mask)
        if bits >= _MANY_BITS:
            grids = [fit_grid(problem.start, bits, importance=np.einsum("gcc->gc", second))]
        else:
            grids = list(shrunk_grids(problem.start, bits, steps=_RANGES, smallest=_NARROWEST))
        integers, grid, damping = round_columns(problem, grids, _OPTIONS)
        integers, grid = descend(problem, integers, grid, _OPTIONS)
        return problem.result(integers, grid, damping)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise PotSparsityError(f"layer {name!r}: {error}") from error
