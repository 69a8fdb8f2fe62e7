"""One iteration of the schedule: allocate, prune, then walk through the network; the best of both is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pot_sparsity.algorithms.allocation import get_allocation
from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.evaluate import Evaluator, distance
from pot_sparsity.pipeline.prepare import Prepared, layer_weights
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.sequential import Walker, walk
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, prune_layers
from pot_sparsity.recipe import Recipe
from pot_sparsity.report.schema import Decision


@dataclass(frozen=True)
class Surroundings:
    """Everything an iteration needs and never changes."""

    prepared: Prepared
    dense: Sequence[DenseLayer]
    moments: Mapping[str, Moments]
    held_moments: Mapping[str, Moments]
    fit: Dataset
    held_out: Dataset | None
    engine: Engine
    recipe: Recipe
    threads: int
    folder: RunFolder
    recorder: Recorder
    progress: Progress
    judge: Evaluator


@dataclass(frozen=True)
class Compressed:
    """A sparse model, the solutions written into it and the zeros each layer was asked for."""

    model: Model
    solutions: dict[str, Solution]
    zeros: dict[str, int]


def allocate(dense: Sequence[DenseLayer], recipe: Recipe, sparsity: float) -> dict[str, int]:
    """Zeros of each layer; RecipeError if the allocation refuses its options or the sparsity."""
    settings = recipe.allocation
    try:
        method = get_allocation(settings.method, **settings.options)
        return method(layer_weights(dense), sparsity, max_layer_sparsity=settings.max_layer_sparsity)
    except ValueError as error:
        raise RecipeError(f"allocation: {error}") from None


def compress(around: Surroundings, sparsity: float, key: str) -> Compressed:
    """Prune to ``sparsity`` from the dense weights, then reconstruct and correct in sequence where that helps."""
    recipe, recorder = around.recipe, around.recorder
    with recorder.stage("allocation"):
        zeros = allocate(around.dense, recipe, sparsity)
    with recorder.stage("pruning"):
        solutions = prune_layers(
            around.dense,
            around.moments,
            around.held_moments,
            zeros,
            recipe,
            threads=around.threads,
            folder=around.folder,
            key=f"{key}/prune",
            progress=around.progress,
        )
        model = rebuild(around, solutions)
    current = around.judge(model)
    recorder.measured("pruning", around.judge.dense.metrics, current.metrics)
    reconstruct = recipe.reconstruction.input == "sparse"
    when = recipe.correction.differential
    if not reconstruct and when == "never":
        return Compressed(model, solutions, zeros)
    best = Compressed(model, solutions, zeros)
    measure, reached = distance(current.metrics)
    walkers = [
        Walker(f"{key}/{what}", model.copy(), reconstruct, differential, dict(solutions), [])
        for what, differential in _attempts(reconstruct, when)
    ]
    with recorder.stage("reconstruction and correction") as note:
        walk(
            around.prepared.model,
            walkers,
            around.dense,
            around.moments,
            around.fit,
            around.held_out,
            around.engine,
            recipe,
            threads=around.threads,
            folder=around.folder,
            progress=around.progress,
        )
        note.before = note.after = current.metrics
        for walker in walkers:
            what = walker.key.removeprefix(f"{key}/")
            found = around.judge(walker.model).metrics
            value = distance(found)[1]
            kept = value < reached or when == "always"
            recorder.decide(
                Decision(
                    what=what,
                    kept=kept,
                    before=reached,
                    after=value,
                    measure=f"{measure} on held-out samples",
                    reason="" if kept else "the output moved away from the dense model's",
                )
            )
            if kept:
                best, reached, note.after = Compressed(walker.model, walker.solutions, zeros), value, found
    return best


def _attempts(reconstruct: bool, when: str) -> list[tuple[str, bool]]:
    """What is tried, and whether it corrects differentially."""
    attempts = []
    if reconstruct and when != "always":
        attempts.append(("sparse-input reconstruction", False))
    if when != "never":
        name = "sparse-input reconstruction with " if reconstruct else ""
        attempts.append((f"{name}differential correction", True))
    return attempts


def rebuild(around: Surroundings, solutions: Mapping[str, Solution]) -> Model:
    """A copy of the prepared model with these solutions written into it."""
    model = around.prepared.model.copy()
    for item in around.dense:
        apply(model, item.layer, solutions[item.layer.name])
    return model
