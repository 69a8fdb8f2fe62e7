"""Bits and patterns chosen layer by layer within a budget of bit operations, after OBC's mixed GPU scenario.

Optimal Brain Compression, section 6: every layer is compressed in every way on its own (sparse first, then what is
left is quantized), how far each moves the network's output is measured, and a model for any budget is put together.
Here the model is then walked through once more: every layer is fitted, on its grid, to the dense model's output from
the inputs it will really read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.algorithms.quantization.choices import BitChoice
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.fake_quantize import quantize_inputs, store_integer_weights
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.bits.bit_fitting import BitFit
from pot_sparsity.pipeline.bits.bit_levels import (
    BOPS,
    Measured,
    bit_costs,
    dense_bops,
    input_grids,
    unreachable,
    zeros_of,
)
from pot_sparsity.pipeline.compress import Compressed, Surroundings
from pot_sparsity.pipeline.repair.correction import Guard, attempts
from pot_sparsity.pipeline.repair.sequential import Walker, walk
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply
from pot_sparsity.recipe import Recipe
from pot_sparsity.report.schema import Decision


def check_bits(
    model: Model, dense: Sequence[DenseLayer], recipe: Recipe, metrics: Mapping[str, float]
) -> None:
    """Refuse what choosing bits cannot do.

    Parameters
    ----------
    model, dense
        The prepared model and its layers that take part.
    metrics
        What the dense model was measured by.

    Raises
    ------
    RecipeError
        Not a budget of bops alone, or one that no choice keeps; a model that gives lists of detections.
    ModelError
        A model that cannot hold quantizers.
    """
    if set(recipe.budget) != {BOPS}:
        raise RecipeError("mixed.enabled needs a budget of bops and no other, like --budget bops=0.03")
    if recipe.schedule.max_drop is not None:
        raise RecipeError("mixed.enabled does not watch max_drop: give a budget of bops alone")
    if "detection_overlap" in metrics:
        raise RecipeError("mixed.enabled needs an output with a smooth distance: this model gives detections")
    tables = bit_costs(model, dense, recipe)
    total = dense_bops(model, dense)
    cheapest = [min(costs.values()) for costs in tables.values()]
    if sum(cheapest) > recipe.budget[BOPS] * total * (1.0 + 1e-12):
        raise RecipeError(unreachable(recipe.budget[BOPS], sum(cheapest) / total))
    first = dense[0].layer
    grids = {first.name: {place.input: ActivationGrid(1.0, 0, 16) for place in first.places}}
    quantize_inputs(model.copy(), [first], grids)


@dataclass(frozen=True)
class BitModel:
    """A model within a budget.

    Attributes
    ----------
    compressed
        The model with quantizers in front of its layers and weights on their grids, stored as floats.
    choices
        By layer name.
    bops
        Bit operations as a fraction of the dense model's.
    """

    compressed: Compressed
    choices: Mapping[str, BitChoice]
    bops: float


def compress_bits(around: Surroundings, measured: Measured, chosen: Mapping[str, int], key: str) -> BitModel:
    """Put the chosen levels together, then walk through the network and fit every layer where that helps.

    Parameters
    ----------
    measured, chosen
        All levels, and the index of each layer's.
    key
        Distinguishes the walks in the run folder.
    """
    levels = {item.item.layer.name: item for item in measured.layers}
    choices = {name: levels[name].choices[at] for name, at in chosen.items()}
    solutions = {name: levels[name].solutions[at] for name, at in chosen.items()}
    model = around.prepared.model.copy()
    for item in around.dense:
        apply(model, item.layer, solutions[item.layer.name])
    grids = input_grids([item.layer for item in around.dense], choices, measured.ranges)
    quantize_inputs(model, [item.layer for item in around.dense], grids)
    best = _walked(around, model, solutions, BitFit(choices), grids, key)
    zeros = {item.layer.name: zeros_of(item.layer, choices[item.layer.name]) for item in around.dense}
    return BitModel(Compressed(*best, zeros), choices, measured.bops(chosen))


def _walked(
    around: Surroundings,
    model: Model,
    solutions: dict[str, Solution],
    fit: BitFit,
    grids: Mapping[str, Mapping[str, ActivationGrid]],
    key: str,
) -> tuple[Model, dict[str, Solution]]:
    """The model after the best of the walks that the recipe wants, or as it was where none helps."""
    tried = attempts(around.recipe, {}, [])
    if not tried:
        return model, solutions
    guard = Guard(around.judge, around.recorder, model)
    best = model, solutions
    inputs = {
        item.layer.name: grids[item.layer.name][item.layer.places[0].input]
        for item in around.dense
        if not item.layer.shared
    }
    walkers = [
        Walker(f"{key}/{attempt.what}", model.copy(), attempt.steps, dict(solutions), [], fit, inputs)
        for attempt in tried
    ]
    with around.recorder.stage("reconstruction and correction") as note:
        note.before = guard.metrics
        walk(
            around.prepared.model,
            walkers,
            around.dense,
            around.moments,
            around.fit,
            around.held_out,
            around.engine,
            around.recipe,
            threads=around.threads,
            folder=around.folder,
            progress=around.progress,
        )
        for attempt, walker in zip(tried, walkers, strict=True):
            if guard.keeps(f"few-bit layers: {attempt.what}", walker.model, always=attempt.always):
                best = walker.model, walker.solutions
        note.after = guard.metrics
    return best


def with_integers(model: Model, solutions: Mapping[str, Solution]) -> Model:
    """A copy of a few-bit model that stores its weights as int8 with a scale per channel."""
    result = model.copy()
    scales = {name: found.scale for name, found in solutions.items() if found.scale is not None}
    store_integer_weights(result, {name: solutions[name].weight for name in scales}, scales)
    return result


def report_choices(around: Surroundings, measured: Measured, chosen: Mapping[str, int]) -> None:
    """One decision for each layer, and one on the whole."""
    counts = Counter(str(levels.choices[chosen[levels.item.layer.name]]) for levels in measured.layers)
    around.recorder.decide(
        Decision(
            what="bits layer by layer",
            kept=True,
            before=1.0,
            after=measured.bops(chosen),
            measure="bit operations relative to the dense model in float32",
            reason=", ".join(f"{number} layers {name}" for name, number in sorted(counts.items())),
        )
    )
    for levels in measured.layers:
        name = levels.item.layer.name
        around.recorder.decide(
            Decision(
                what=f"layer {name}: {levels.choices[chosen[name]]}",
                kept=True,
                after=float(levels.curve.distortion[chosen[name]]),
                measure="distance of the output with this layer alone compressed",
            )
        )
