"""Polish of an allocation on the network itself: zeros move between two layers wherever the output comes nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64, find_limits
from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.allocation.exchange import Exchanged, exchange
from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data import Dataset
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import sample_distances
from pot_sparsity.pipeline.allocation.curves import WORK
from pot_sparsity.pipeline.allocation.refine import Trials
from pot_sparsity.pipeline.evaluate import feeds, float_outputs
from pot_sparsity.pipeline.prepare import layer_weights
from pot_sparsity.pipeline.repair.correction import OneShot, corrected
from pot_sparsity.pipeline.solve import LayerPruner, Solution, apply, layer_work, quick_recipe


def exchanged(
    trials: Trials,
    zeros: Mapping[str, int],
    sparsity: float,
    curves: Mapping[str, Curve],
    samples: Dataset,
    prune: LayerPruner,
) -> tuple[dict[str, int], Exchanged]:
    """Zeros per layer after at most ``allocation.exchanges`` trials, and how they went.

    Parameters
    ----------
    zeros, sparsity
        The allocation to start from, and the sparsity it was made for; the total stays.
    curves
        What they predict decides which exchanges are tried.
    samples
        What the output is compared on, with all layers pruned by ``prune`` and their biases corrected.
    """
    settings = trials.recipe.allocation
    limits = find_limits(layer_weights(trials.dense), sparsity, settings.max_layer_sparsity)
    names = [item.layer.name for item in trials.dense]
    pruned = _Pruned(trials, samples, prune)
    found = exchange(
        np.array([zeros[name] for name in names], np.int64),
        [curves[name] for name in names],
        pruned.distance,
        lower=limits.lower,
        upper=limits.upper,
        tries=settings.exchanges,
    )
    return dict(zip(names, found.zeros.tolist(), strict=True)), found


class _Pruned:
    """Distances of the pruned network's output; layers are solved once for each number of zeros."""

    def __init__(self, trials: Trials, samples: Dataset, prune: LayerPruner) -> None:
        self._trials = trials
        self._samples = samples
        self._prune = prune
        self._known: dict[tuple[str, int], Solution] = {}
        heavy = sum(layer_work(item) for item in trials.dense) > WORK
        self._recipe = quick_recipe(trials.recipe) if heavy else trials.recipe
        self._names = [trials.model.outputs[index].name for index in float_outputs(trials.model)]
        self._reference = self._outputs(trials.model)

    def distance(self, zeros: Int64) -> float:
        """Mean over the samples, with so many zeros in the layers ``[layers]``."""
        model = self._trials.model.copy()
        for item, count in zip(self._trials.dense, zeros.tolist(), strict=True):
            apply(model, item.layer, self._solution(item.layer.name, count))
        kind = self._trials.recipe.allocation.distance
        total = 0.0
        for ours, dense in zip(self._outputs(model), self._reference, strict=True):
            total += float(sample_distances(dense, ours, kind).mean())
        return total

    def _solution(self, name: str, zeros: int) -> Solution:
        if (name, zeros) not in self._known:
            trials = self._trials
            item = next(item for item in trials.dense if item.layer.name == name)
            moments = trials.moments[name]
            solution = self._prune(item, moments, trials.held_moments.get(name), zeros, self._recipe)
            self._known[name, zeros] = corrected(item, solution, moments, OneShot("none", bias=True))
        return self._known[name, zeros]

    def _outputs(self, model: Model) -> Sequence[AnyArray]:
        """Every output over all samples."""
        whole = self._trials.engine.compile(model.extract(outputs=self._names))
        size = model.batch_size or self._trials.recipe.calibration.batch_size
        batches = [
            whole.run(feeds(model, whole, batch))
            for batch in self._samples.batches(size)
            if model.batch_size is None or batch.size == size
        ]
        return [np.concatenate([found[name] for found in batches]) for name in self._names]
