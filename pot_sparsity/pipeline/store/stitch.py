"""A model put together from the database: one level for each layer, then the statistics corrected.

Where the levels are known this takes seconds, and no calibration data unless the correction walks through the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.pipeline.compress import Compressed, Surroundings, rebuild
from pot_sparsity.pipeline.repair.correction import OneShot, Steps, corrected
from pot_sparsity.pipeline.repair.sequential import Walker, walk
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import Solution
from pot_sparsity.pipeline.store.levels import Level
from pot_sparsity.recipe import Recipe


def stitch(around: Surroundings, choice: Mapping[str, Level], *, steps: Steps | None = None) -> Compressed:
    """The model that has each layer at the level chosen for it.

    Levels that the database does not know are solved, in parallel, and kept there. Biases make up for the layers'
    mean errors on dense inputs unless the recipe forbids it; corrections that the recipe leaves to ``helps`` count as
    wanted for biases and as not wanted for weights, so that nothing has to be judged.

    Parameters
    ----------
    around
        The run; its ``database`` is read and written.
    choice
        A level for every layer that takes part, by name.
    steps
        Also walk through the network on the calibration samples, say with ``Steps(differential=True)``. Quantized
        weights keep their integers.

    Returns
    -------
    Compressed
        The same whatever was known, bit by bit.
    """
    built = around.database.build(
        around.dense,
        around.moments,
        around.held_moments,
        {item.layer.name: (choice[item.layer.name],) for item in around.dense},
        around.recipe,
        threads=around.threads,
        progress=around.progress,
    )
    once = _one_shot(around.recipe)
    solutions = {}
    for item in around.dense:
        name = item.layer.name
        found = built[name][choice[name]]
        correct = replace(once, weights="none") if found.scale is not None else once
        solutions[name] = corrected(item, found, around.moments[name], correct)
    if steps is not None:
        solutions = _walked(around, solutions, steps)
    zeros = {name: int(np.count_nonzero(solution.weight == 0.0)) for name, solution in solutions.items()}
    return Compressed(rebuild(around, solutions), solutions, zeros)


def _one_shot(recipe: Recipe) -> OneShot:
    settings = recipe.correction
    return OneShot(settings.weights if settings.weights_when == "always" else "none", bool(settings.bias))


def _walked(around: Surroundings, solutions: Mapping[str, Solution], steps: Steps) -> dict[str, Solution]:
    walker = Walker("stitched", rebuild(around, solutions), steps, dict(solutions), [])
    walk(
        around.prepared.model,
        [walker],
        around.dense,
        around.moments,
        around.fit,
        around.held_out,
        around.engine,
        around.recipe,
        threads=around.threads,
        folder=RunFolder(None),
        progress=around.progress,
    )
    return {name: _on_grid(before, walker.solutions[name]) for name, before in solutions.items()}


def _on_grid(before: Solution, after: Solution) -> Solution:
    """Where weights stand on a grid, what the walk did to each row as a new step of that grid."""
    if before.scale is None:
        return after
    integers = np.rint(before.weight / before.scale[..., None])
    size = np.abs(before.weight).sum(axis=-1)
    ratio: Float64 = np.divide(
        np.abs(after.weight).sum(axis=-1), size, out=np.ones_like(size), where=size > 0.0
    )
    scale = before.scale * ratio
    return replace(after, weight=integers * scale[..., None], scale=scale)
