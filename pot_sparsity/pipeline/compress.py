"""One iteration of the schedule: allocate, prune, then walk through the network; the best of both is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.data import Dataset, filled, spread
from pot_sparsity.engines.base import Engine
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.normalization import find_normalizations
from pot_sparsity.pipeline.allocation.allocate import allocate
from pot_sparsity.pipeline.allocation.costs import Costs
from pot_sparsity.pipeline.allocation.exchanges import exchanged
from pot_sparsity.pipeline.allocation.refine import Trials, refined_curves
from pot_sparsity.pipeline.evaluate import Evaluator
from pot_sparsity.pipeline.prepare import Prepared
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.repair.correction import (
    DENSE_CHECK,
    Attempt,
    Guard,
    Steps,
    attempts,
    check_dense,
    correct_pruned,
)
from pot_sparsity.pipeline.repair.finish import Finish, due
from pot_sparsity.pipeline.repair.sequential import Walker, walk
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, prune_layers
from pot_sparsity.pipeline.store.database import Database
from pot_sparsity.recipe import Recipe
from pot_sparsity.report.schema import Decision


@dataclass(frozen=True)
class Surroundings:
    """Everything an iteration needs and never changes.

    ``prepared`` and ``dense`` are what is pruned and what layers are fitted to; the last steps bring the output of the
    whole near to that of ``reference``, the dense model.
    """

    prepared: Prepared
    reference: Model
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
    curves: Mapping[str, Curve] = field(default_factory=dict)
    database: Database = field(default_factory=Database)
    costs: Costs | None = None
    given: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Compressed:
    """A sparse model, the solutions written into it and the zeros each layer was asked for."""

    model: Model
    solutions: dict[str, Solution]
    zeros: dict[str, int]


def compress(
    around: Surroundings,
    sparsity: float,
    key: str,
    previous: Mapping[str, Solution] | None = None,
    *,
    budget: Mapping[str, float] | None = None,
) -> Compressed:
    """Prune to ``sparsity``, or within a budget, then reconstruct and correct in sequence where that helps.

    What is pruned are the dense weights, or those of ``previous``; the targets are the dense model's in any case.
    """
    best, guard = _once(around, sparsity, key, previous, budget)
    if previous is None and _refines(around, guard):
        with around.recorder.stage("curves"):
            curves = _refined(around, best, f"{key}/refined curves")
        again = _once(replace(around, curves=curves), sparsity, f"{key}/refined", None, budget)[0]
        if guard.keeps("zeros allocated again by what layers do in the sparse model", again.model):
            best = again
    return _finished(around, best, guard, f"{key}/finish")


def _refines(around: Surroundings, guard: Guard) -> bool:
    """Whether the allocation is to be corrected: curves of the network's output are at hand, and it has moved."""
    settings = around.recipe.allocation
    if not around.curves or around.given or settings.objective == "layer" or settings.inputs == "noise":
        return False
    return settings.refine == "helps" and guard.reached >= settings.refine_from


def _refined(around: Surroundings, best: Compressed, key: str) -> dict[str, Curve]:
    """Curves corrected in the sparse model, or what the run folder holds of them."""
    stored = around.folder.load(key)
    if stored is None:
        batch = best.model.batch_size or 1
        refined = refined_curves(
            _trials(around),
            best.model,
            best.solutions,
            around.curves,
            spread(around.fit, max(around.recipe.allocation.samples, batch)),
            None if around.held_out is None else filled(around.held_out, batch),
        )
        around.folder.store(key, {name: curve.distortion for name, curve in refined.items()})
        return refined
    return {name: replace(curve, distortion=stored[name]) for name, curve in around.curves.items()}


def _trials(around: Surroundings) -> Trials:
    return Trials(
        around.prepared.model,
        around.dense,
        around.moments,
        around.held_moments,
        around.engine,
        around.recipe,
    )


def _polished(around: Surroundings, zeros: dict[str, int], sparsity: float) -> dict[str, int]:
    """The allocation after exchanges between layers, where the recipe wants any and has curves to choose them by."""
    settings = around.recipe.allocation
    if not settings.exchanges or not around.curves or around.given:
        return zeros
    samples = spread(around.fit, max(settings.samples, around.prepared.model.batch_size or 1))
    polished, found = exchanged(
        _trials(around), zeros, sparsity, around.curves, samples, around.database.solve
    )
    kept = sum(trial.kept for trial in found.trials)
    around.recorder.decide(
        Decision(
            what=f"{kept} of {len(found.trials)} exchanges of zeros between layers",
            kept=kept > 0,
            before=found.before,
            after=found.after,
            measure="distance of the pruned network's output",
            reason="" if kept else "the output moved away from the dense model's",
        )
    )
    return polished


def _once(
    around: Surroundings,
    sparsity: float,
    key: str,
    previous: Mapping[str, Solution] | None,
    budget: Mapping[str, float] | None,
) -> tuple[Compressed, Guard]:
    """Allocate, prune and repair, but for the finish."""
    recipe, recorder = around.recipe, around.recorder
    start = around.dense
    if previous is not None:
        start = [replace(item, weight=previous[item.layer.name].weight) for item in start]
    with recorder.stage("allocation"):
        zeros = around.given or allocate(
            start, recipe, sparsity, around.curves, costs=around.costs, budget=budget
        )
        if previous is None and not budget and not recipe.budget:
            zeros = _polished(around, dict(zeros), sparsity)
    with recorder.stage("pruning"):
        solutions = prune_layers(
            start,
            around.moments,
            around.held_moments,
            zeros,
            recipe,
            threads=around.threads,
            folder=around.folder,
            key=f"{key}/prune",
            progress=around.progress,
            prune=around.database.solve,
        )
    return _repaired(around, solutions, zeros, key)


def repair(
    around: Surroundings, solutions: Mapping[str, Solution], zeros: Mapping[str, int], key: str
) -> Compressed:
    """What follows on the stage ``pruning``: corrections of each layer, a walk through the network where the recipe
    wants one, and the last steps; whatever helps is kept.

    Parameters
    ----------
    solutions
        Pruned layers, with the biases of the dense model.
    zeros
        What each layer was asked for.
    key
        Distinguishes the run's walks in its folder.
    """
    best, guard = _repaired(around, solutions, zeros, key)
    return _finished(around, best, guard, f"{key}/finish")


def _repaired(
    around: Surroundings, solutions: Mapping[str, Solution], zeros: Mapping[str, int], key: str
) -> tuple[Compressed, Guard]:
    """The best model before the last steps, and the guard that judged it."""
    recipe, recorder = around.recipe, around.recorder
    model, solutions, guard = correct_pruned(
        around.dense,
        solutions,
        around.moments,
        recipe.correction,
        partial(rebuild, around),
        around.judge,
        recorder,
    )
    recorder.measured("pruning", around.judge.dense.metrics, guard.metrics)
    best = Compressed(model, solutions, dict(zeros))
    tried = attempts(recipe, around.prepared.batch_norms, find_normalizations(model.graph))
    if not tried:
        return best, guard
    walkers = [
        Walker(f"{key}/{attempt.what}", model.copy(), attempt.steps, dict(solutions), []) for attempt in tried
    ]
    control = _control(around, tried)
    with recorder.stage("reconstruction and correction") as note:
        walk(
            around.prepared.model,
            [*walkers, *control],
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
        note.before = guard.metrics
        for attempt, walker in zip(tried, walkers, strict=True):
            if guard.keeps(attempt.what, walker.model, always=attempt.always):
                best = replace(best, model=walker.model, solutions=walker.solutions)
        for walker in control:
            check_dense(walker.model, around.judge, recorder)
        note.after = guard.metrics
    return best, guard


def _finished(around: Surroundings, best: Compressed, guard: Guard, key: str) -> Compressed:
    """The last steps, on the model as a whole."""
    steps = due(around.recipe.finish, guard.reached)
    if not steps:
        return best
    finish = Finish(
        around.prepared.model,
        around.reference,
        around.dense,
        {name: moments.count for name, moments in around.moments.items()},
        around.fit,
        around.judge,
        around.engine,
        around.recipe,
        around.recorder,
        around.progress,
        around.threads,
        around.folder,
        key,
    )
    with around.recorder.stage("finish") as note:
        note.before = guard.metrics
        model, solutions = finish(best.model, best.solutions, guard, steps)
        note.after = guard.metrics
    return replace(best, model=model, solutions=solutions)


def _control(around: Surroundings, tried: Sequence[Attempt]) -> list[Walker]:
    """A walk of the dense model that re-estimates normalizations, where a sparse one does and it was not yet done."""
    norms = next((attempt.steps.batch_norm for attempt in tried if attempt.steps.batch_norm), {})
    if not norms or any(decision.what == DENSE_CHECK for decision in around.recorder.decisions):
        return []
    solutions = {item.layer.name: Solution(item.weight, item.biases, 0.0, 0.0) for item in around.dense}
    return [Walker("dense", around.prepared.model.copy(), Steps(batch_norm=norms), solutions, [])]


def rebuild(around: Surroundings, solutions: Mapping[str, Solution]) -> Model:
    """A copy of the prepared model with these solutions written into it."""
    model = around.prepared.model.copy()
    for item in around.dense:
        apply(model, item.layer, solutions[item.layer.name])
    return model
