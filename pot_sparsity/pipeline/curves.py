"""Rate-distortion curves: how far the network's output moves when one layer alone is pruned.

The dense model advances layer by layer over some samples. Behind each layer its output is replaced by the one that
the pruned weight gives, and only the rest of the network runs: all layers and levels together cost a few dozen passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.interpolate import PchipInterpolator
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve, aggregate_samples, build_curve
from pot_sparsity.algorithms.arrays import AnyArray, Float64, Moments
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.graph.graph import Graph
from pot_sparsity.graph.layers import Layer, Place
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import sample_distances
from pot_sparsity.pipeline.correction import OneShot, corrected
from pot_sparsity.pipeline.evaluate import feeds, float_outputs
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.sides import Side, fill_spools
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, layer_work, prune_layer, quick_recipe
from pot_sparsity.pipeline.spool import Spool
from pot_sparsity.pipeline.stages import StagePlan, plan_stages
from pot_sparsity.recipe import Recipe

#: Densities of the first and the last level that is measured; the others lie between them in equal ratios.
DENSITIES = (0.7, 0.02)
#: Levels of a finished curve.
GRID = 200
#: Products (multiplications) beyond which the levels of all layers are pruned by the quick solver below: the ratio
#: of its errors to the better solvers' is much the same in all layers, and only ratios count here.
WORK = 5e9
#: Multiplications that the passes behind the layers may cost; fewer samples are used where they would cost more, but
#: not fewer than ``FEWEST``.
PASSES = 3e12
FEWEST = 32


@dataclass(frozen=True)
class Levels:
    """A layer pruned to several sparsities: what to write, and the relative error of each, ``[levels]``."""

    solutions: tuple[Solution, ...]
    zeros: tuple[int, ...]


def level_sparsities(number: int) -> Float64:
    """Sparsities at which every layer is measured, ``[number]``, ascending."""
    return np.asarray(1.0 - np.geomspace(*DENSITIES, number), dtype=np.float64)


def sample_number(
    dense: Sequence[DenseLayer], moments: Mapping[str, Moments], fitted: int, recipe: Recipe
) -> int:
    """How many samples curves are measured on: what the recipe says, fewer for large networks.

    Parameters
    ----------
    dense, moments
        The layers, in the order of the network, and their moments over ``fitted`` samples.
    """
    work = [item.layer.size * moments[item.layer.name].count / fitted for item in dense]
    behind = sum(np.cumsum(work[::-1])) * recipe.allocation.levels
    return int(np.clip(PASSES / max(1.0, float(behind)), FEWEST, max(FEWEST, recipe.allocation.samples)))


def measure_curves(
    model: Model,
    dense: Sequence[DenseLayer],
    moments: Mapping[str, Moments],
    held_out: Mapping[str, Moments],
    samples: Dataset,
    engine: Engine,
    recipe: Recipe,
    *,
    threads: int,
    folder: RunFolder,
    progress: Progress,
) -> dict[str, Curve]:
    """A curve for every layer; measured points are kept in the run folder.

    Parameters
    ----------
    model
        The prepared dense model.
    dense, moments, held_out
        The layers that take part, the moments of their inputs, and held-out moments of layers with few samples.
    samples
        What the output is compared on.
    """
    settings = recipe.allocation
    sparsities = level_sparsities(settings.levels)
    curves: dict[str, Curve] = {}
    missing = []
    for item in dense:
        stored = folder.load(f"curves/{item.layer.name}")
        if stored is None:
            missing.append(item)
        else:
            curves[item.layer.name] = _curve(item, stored["zeros"], stored["errors"], stored["distortion"])
    if not missing:
        return curves
    chosen = quick_recipe(recipe) if sum(layer_work(item) for item in dense) > WORK else recipe
    progress.start("Measuring curves", len(missing))
    with ExitStack() as stack:
        stack.callback(progress.finish)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        solved = {
            item.layer.name: pool.submit(
                _levels,
                item,
                moments[item.layer.name],
                held_out.get(item.layer.name),
                sparsities,
                chosen,
            )
            for item in missing
        }
        stack.callback(pool.shutdown, cancel_futures=True)
        meter = _Meter(model, engine, samples, recipe, stack)
        by_name = {item.layer.name: item for item in missing}
        for layer, look in meter.visit([item.layer for item in missing]):
            found = solved[layer.name].result()
            distances = np.stack([look(solution) for solution in found.solutions], axis=1)
            errors = np.array([solution.relative_error for solution in found.solutions])
            distortion = aggregate_samples(distances, settings.aggregate)
            folder.store(
                f"curves/{layer.name}",
                {"zeros": np.array(found.zeros), "errors": errors, "distortion": distortion},
            )
            curves[layer.name] = _curve(by_name[layer.name], np.array(found.zeros), errors, distortion)
            progress.advance()
    return curves


def _levels(
    item: DenseLayer, moments: Moments, held_out: Moments | None, sparsities: Float64, recipe: Recipe
) -> Levels:
    """Prune one layer to every level, with the bias that each needs."""
    size = item.layer.size
    zeros = tuple(round(float(sparsity) * size) for sparsity in sparsities)
    solutions = []
    shrinkage: float | None = None
    with threadpool_limits(1):
        for count in zeros:
            solution = prune_layer(item, moments, held_out, count, recipe, shrinkage=shrinkage)
            if held_out is not None:  # the first level's choice serves all
                shrinkage = solution.shrinkage
            solutions.append(corrected(item, solution, moments, OneShot("none", bias=True)))
    return Levels(tuple(solutions), zeros)


def _curve(item: DenseLayer, zeros: AnyArray, errors: AnyArray, distortion: AnyArray) -> Curve:
    """A fine curve from the measured levels: the layer's error as a function of its zeros, the output's of that."""
    size = item.layer.size
    levels = np.unique(np.concatenate([np.linspace(0, size, GRID).round().astype(np.int64), zeros]))
    known, first = np.unique(zeros, return_index=True)
    logs = np.log(np.maximum.accumulate(np.maximum(np.asarray(errors, np.float64)[first], 1e-12)))
    fine = np.interp(levels, known, logs) if known.size < 3 else PchipInterpolator(known, logs)(levels)
    below, beyond = levels < known[0], levels > known[-1]
    fine[below] = logs[0] + 3.0 * np.log(np.maximum(levels[below], 1e-9) / known[0])
    fine[beyond] = logs[-1] * (size - levels[beyond]) / max(1, size - known[-1])
    grid = np.where(levels == 0, 0.0, np.exp(np.minimum(fine, max(0.0, float(logs[-1])))))
    position = np.searchsorted(levels, known)
    return build_curve(
        item.layer.name,
        size,
        np.maximum.accumulate(grid),
        position.astype(np.int64),
        np.asarray(distortion, np.float64)[first],
        {NONZEROS: (size - levels).astype(np.float64)},
    )


class _Meter:
    """Runs the dense model up to each layer and, with other weights in that layer, from there on."""

    def __init__(
        self, model: Model, engine: Engine, samples: Dataset, recipe: Recipe, stack: ExitStack
    ) -> None:
        self._model = model
        self._engine = engine
        self._kind = recipe.allocation.distance
        self._outputs = [model.outputs[index].name for index in float_outputs(model)]
        self._samples = samples
        self._batch = model.batch_size or recipe.calibration.batch_size
        self._side = Side(model, engine)
        stack.callback(self._side.close)
        self._batches = len(fill_spools((self._side,), samples, None, self._batch))
        self._reference = Spool()
        stack.callback(self._reference.close)
        whole = engine.compile(model.extract())
        for position in range(self._batches):
            inputs = self._side.spool.read(position)
            found = whole.run({name: inputs[name] for name in whole.inputs})
            self._reference.append({name: found[name] for name in self._outputs})

    def visit(self, layers: Sequence[Layer]) -> Iterator[tuple[Layer, _Look]]:
        """Every layer in topological order with what measures it; those used in several places come last."""
        single = [layer for layer in layers if not layer.shared]
        for plan in plan_stages(self._model.graph, single) if single else ():
            self._advance(plan)
            for layer, place in plan.layers:
                yield layer, _Look(self, layer, place)
        for layer in layers:
            if layer.shared:
                yield layer, _Look(self, layer, None)

    def _advance(self, plan: StagePlan) -> None:
        # The cut of the sparse models: it stops in front of the layers.
        run, upcoming = self._side.prepare(plan.sparse), Spool()
        for position in range(self._batches):
            self._side.step(plan.sparse, run, position, upcoming)
        self._side.close()
        self._side.spool = upcoming


class _Look:
    """Distances of the output, sample by sample, with a solution in one layer."""

    def __init__(self, meter: _Meter, layer: Layer, place: Place | None) -> None:
        self._meter = meter
        self._layer = layer
        self._place = place
        self._rest: Executable | None = None
        if place is not None:
            alive = {*meter._side.spool.read(0), place.output}
            wanted = [name for name in meter._outputs if name not in alive]
            if wanted:
                needed = _read_from(meter._model.graph, wanted, alive)
                self._rest = meter._engine.compile(meter._model.extract(outputs=wanted, inputs=needed))

    def __call__(self, solution: Solution) -> Float64:
        """``[samples]``."""
        meter = self._meter
        changed = meter._model.copy()
        apply(changed, self._layer, solution)
        distances = []
        for position, found in enumerate(self._outputs(changed)):
            reference = meter._reference.read(position)
            size = min(meter._batch, len(meter._samples) - position * meter._batch)
            distances.append(
                np.sum(
                    [_distances(reference[name], found[name], size, meter._kind) for name in meter._outputs],
                    axis=0,
                )
            )
        return np.concatenate(distances)

    def _outputs(self, changed: Model) -> Iterator[Mapping[str, AnyArray]]:
        meter, place = self._meter, self._place
        if place is None:
            whole = meter._engine.compile(changed.extract())
            for batch in meter._samples.batches(meter._batch):
                if meter._model.batch_size is None or batch.size == meter._batch:
                    yield whole.run(feeds(changed, whole, batch))
            return
        own = meter._engine.compile(changed.extract(outputs=[place.output], inputs=[place.input]))
        for position in range(meter._batches):
            alive = dict(meter._side.spool.read(position))
            alive[place.output] = own.run({place.input: alive[place.input]})[place.output]
            if self._rest is not None:
                alive |= self._rest.run({name: alive[name] for name in self._rest.inputs})
            yield alive


def _distances(reference: AnyArray, candidate: AnyArray, size: int, kind: Literal["error", "kl"]) -> Float64:
    """Distances of one batch's output, ``[size]``: that of the whole where it does not run over the samples."""
    if reference.ndim and len(reference) == size:
        return sample_distances(reference, candidate, kind)
    return np.full(size, sample_distances(reference[None], candidate[None], "error")[0])


def _read_from(graph: Graph, wanted: Sequence[str], alive: set[str]) -> list[str]:
    """Those of the tensors at hand that the wanted ones are computed from."""
    found: set[str] = set()
    seen: set[str] = set()
    pending = list(wanted)
    while pending:
        node = graph.producer(pending.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        for tensor in node.inputs:
            if tensor in alive:
                found.add(tensor)
            elif tensor:
                pending.append(tensor)
    return sorted(found)
