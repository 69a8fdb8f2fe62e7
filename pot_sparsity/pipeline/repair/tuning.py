"""Layer-wise fine-tuning during the walk: which samples are kept for it, and one layer's training on them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.algorithms.tuning import TunedLayer, TuningSettings, tune_layer
from pot_sparsity.algorithms.tuning.losses import separable
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.layers import Layer
from pot_sparsity.pipeline.repair.stages import StagePlan
from pot_sparsity.pipeline.solve import Solution
from pot_sparsity.pipeline.spool import Spool
from pot_sparsity.recipe import Recipe, TuningSection


class TuningPool:
    """Input and target output of one layer on the samples drawn for tuning, in memory and then on disk."""

    def __init__(self) -> None:
        self._spool = Spool()

    def __len__(self) -> int:
        return len(self._spool)

    def append(self, x: AnyArray, y: AnyArray) -> None:
        """Add a sample; the arrays are copied."""
        self._spool.append({"x": x.copy(), "y": y.copy()})

    def batches(self, iterations: int, size: int, seed: int) -> Iterator[tuple[AnyArray, AnyArray]]:
        """Random batches of ``size`` samples (all, if there are fewer), each drawn without replacement."""
        random = np.random.default_rng(seed)
        for _ in range(iterations):
            chosen = random.choice(len(self), min(size, len(self)), replace=False)
            pairs = [self._spool.read(int(position)) for position in chosen]
            yield (
                np.concatenate([pair["x"] for pair in pairs]),
                np.concatenate([pair["y"] for pair in pairs]),
            )

    def close(self) -> None:
        """Free memory and files."""
        self._spool.close()


class TuningSamples:
    """Which of the samples that fit are kept for tuning, and the pools of the layers whose turn it is.

    Parameters
    ----------
    recipe
        Says how many samples, the seed of their draw, and whose inputs are kept.
    count
        Samples that fit; their batches come first.
    size
        Samples of a batch; the last one may have fewer.
    sides
        Numbers of the sparse models whose layers are tuned.
    """

    def __init__(self, recipe: Recipe, count: int, size: int, sides: Collection[int]) -> None:
        self._sides = sides
        self._dense_inputs = recipe.reconstruction.input == "dense"
        wanted = min(recipe.reconstruction.tuning.samples, count)
        chosen = np.zeros(count, bool)
        chosen[np.random.default_rng(recipe.seed).choice(count, wanted, replace=False)] = True
        self._chosen = [chosen[first : first + size] for first in range(0, count, size)]
        self._pools: dict[tuple[int, str], TuningPool] = {}

    def see(
        self,
        plan: StagePlan,
        position: int,
        side: int,
        xs: Mapping[str, AnyArray],
        ys: Mapping[str, AnyArray],
    ) -> None:
        """Keep what the drawn samples of the fit's batch at ``position`` give to the stage's layers.

        Parameters
        ----------
        side
            Number of the sparse model; with dense inputs, the first that is tuned stands for all.
        xs, ys
            Tensors of that model and of the dense one.
        """
        if side not in self._sides or (self._dense_inputs and side != min(self._sides)):
            return
        inputs = ys if self._dense_inputs else xs
        for layer, place in plan.layers:
            pool = self._pools.setdefault((side, layer.name), TuningPool())
            self._keep(pool, position, inputs[place.input], ys[place.output])

    def _keep(self, pool: TuningPool, position: int, x: AnyArray, y: AnyArray) -> None:
        """Samples are slices along the first axis.

        Where that axis is a multiple of the batch, several of its entries make a sample; where input and output
        do not share it, the batch counts as one sample.
        """
        chosen = self._chosen[position]
        if not separable(x, y):
            if chosen.any():
                pool.append(x, y)
            return
        edges = np.arange(chosen.size + 1) * x.shape[0] // chosen.size
        for row in np.flatnonzero(chosen):
            part = slice(int(edges[row]), int(edges[row + 1]))
            if part.start < part.stop:
                pool.append(x[part], y[part])

    def pool(self, side: int, name: str) -> TuningPool | None:
        """What the layer of that model is tuned on; None if the model is not tuned."""
        if side not in self._sides:
            return None
        return self._pools[min(self._sides) if self._dense_inputs else side, name]

    def clear(self) -> None:
        """Drop all pools."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def tuning_settings(section: TuningSection) -> TuningSettings:
    """The recipe's settings of the training itself."""
    return TuningSettings(**section.model_dump(exclude={"samples", "batch_size"}))


def tune(layer: Layer, start: Solution, pool: TuningPool, recipe: Recipe) -> TunedLayer:
    """Train the kept weights and the bias of a layer from its pruned state.

    Raises
    ------
    RecipeError
        If the training diverged.
    """
    section = recipe.reconstruction.tuning
    batches = pool.batches(section.iterations, section.batch_size, recipe.seed)
    try:
        with threadpool_limits(1):
            return tune_layer(
                start.weight,
                start.biases[0],
                start.mask,
                batches,
                layer.places[0].geometry,
                tuning_settings(section),
            )
    except ValueError as error:
        raise RecipeError(f"reconstruction.tuning: layer {layer.name!r}: {error}") from error
