"""Curves corrected by what layers do to the output of the sparse model itself.

Curves know each layer alone, in the dense model. Where much is pruned, distortions no longer add up, and the walk
through the network repairs some layers better than others. So once a sparse model stands, a part of what each layer has
left is removed on trial. What that adds to the distance of the output, over what the curve says it would, is a factor
for the curve, and zeros are allocated once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.allocation.curves import Meter
from pot_sparsity.pipeline.repair.correction import OneShot, corrected
from pot_sparsity.pipeline.solve import DenseLayer, Solution, prune_layer, quick_recipe
from pot_sparsity.recipe import Recipe

#: Part of a layer's kept weights that is removed on trial.
STEP = 0.2
#: Factors, relative to their median, are kept within these bounds.
BOUNDS = (0.2, 5.0)
#: Layers with fewer kept weights than this have no factor of their own.
FEWEST = 16


@dataclass(frozen=True)
class Trials:
    """What trials run on: the dense model, its layers and moments, and how all is done."""

    model: Model
    dense: Sequence[DenseLayer]
    moments: Mapping[str, Moments]
    held_moments: Mapping[str, Moments]
    engine: Engine
    recipe: Recipe


def refined_curves(
    trials: Trials,
    model: Model,
    solutions: Mapping[str, Solution],
    curves: Mapping[str, Curve],
    samples: Dataset,
    held_out: Dataset | None,
) -> dict[str, Curve]:
    """The curves, each times how far its layer moves the sparse model's output over how far the curve says.

    Parameters
    ----------
    model, solutions
        The sparse model and what is written into it.
    samples, held_out
        What the output is compared on; layers with few samples are measured on held-out ones.
    """
    factors: dict[str, float] = {}
    for few in (False, True):
        part = [item for item in trials.dense if (item.layer.name in trials.held_moments) == few]
        chosen = held_out if few and held_out is not None else samples
        if part:
            factors |= _factors(trials, part, model, solutions, curves, chosen)
    known = [factor for factor in factors.values() if factor > 0.0]
    if not known:
        return dict(curves)
    middle = float(np.median(known))
    return {
        name: replace(
            curve,
            distortion=curve.distortion * float(np.clip(factors.get(name, middle) / middle, *BOUNDS)),
        )
        for name, curve in curves.items()
    }


def _factors(
    trials: Trials,
    part: Sequence[DenseLayer],
    model: Model,
    solutions: Mapping[str, Solution],
    curves: Mapping[str, Curve],
    samples: Dataset,
) -> dict[str, float]:
    """Measured over predicted increase of the distance, by layer; those too small to tell are left out."""
    by_name = {item.layer.name: item for item in part}
    found: dict[str, float] = {}
    start: float | None = None
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1))
        meter = Meter(model, trials.engine, samples, trials.recipe, stack, reference=trials.model)
        for layer, look in meter.visit([item.layer for item in part]):
            solution = solutions[layer.name]
            zeros = int((solution.weight == 0.0).sum())
            more = zeros + round(STEP * (layer.size - zeros))
            predicted = np.diff(curves[layer.name].at(np.array([zeros, more])))[0]
            if layer.size - zeros < FEWEST or predicted <= 0.0:
                continue
            if start is None:
                start = float(look(solution).mean())
            sparser = _sparser(trials, by_name[layer.name], solution, more)
            found[layer.name] = max(0.0, float(look(sparser).mean()) - start) / float(predicted)
    return found


def _sparser(trials: Trials, item: DenseLayer, solution: Solution, zeros: int) -> Solution:
    """The layer of the sparse model with more zeros, by the quick solver, and the bias that goes with it."""
    name = item.layer.name
    current = replace(item, weight=solution.weight, biases=solution.biases)
    pruned = prune_layer(
        current,
        trials.moments[name],
        None,
        zeros,
        quick_recipe(trials.recipe),
        shrinkage=solution.shrinkage,
    )
    return corrected(current, pruned, trials.moments[name], OneShot("none", bias=True))
