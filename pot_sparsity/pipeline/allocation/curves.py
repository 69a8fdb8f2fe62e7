"""Rate-distortion curves: how far the network's output moves when one layer alone is pruned.

The dense model advances layer by layer over some samples. Behind each layer its output is replaced by the one that
the pruned weight gives, and only the rest of the network runs: all layers and levels together cost a few dozen passes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.allocation.curves import Curve, aggregate_samples
from pot_sparsity.algorithms.arrays import AnyArray, Float64, Moments
from pot_sparsity.algorithms.correction import ChannelStatistics
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.graph.graph import Graph
from pot_sparsity.graph.layers import Layer, Place
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import sample_distances
from pot_sparsity.pipeline.allocation.probes import by_magnitude, finished_curve, level_zeros
from pot_sparsity.pipeline.evaluate import feeds, float_outputs
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.repair.correction import OneShot, corrected
from pot_sparsity.pipeline.repair.sides import Side, fill_spools
from pot_sparsity.pipeline.repair.stages import StagePlan, plan_stages
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import (
    DenseLayer,
    LayerPruner,
    Solution,
    apply,
    layer_work,
    prune_layer,
    quick_recipe,
)
from pot_sparsity.pipeline.spool import Spool
from pot_sparsity.recipe import Recipe

#: Products (multiplications) beyond which the levels of all layers are pruned by the quick solver below: the ratio
#: of its errors to the better solvers' is much the same in all layers, and only ratios count here.
WORK = 5e9
#: Multiplications that the passes behind the layers may cost; fewer samples are used where they would cost more, but
#: not fewer than ``FEWEST``.
PASSES = 3e12
FEWEST = 32


@dataclass(frozen=True)
class Probed:
    """A layer's levels, measured.

    Attributes
    ----------
    zeros, errors
        Of the levels ``[levels]``: zeros, and the layer's own relative error.
    distances
        Of the output, ``[samples, levels]``.
    """

    zeros: AnyArray
    errors: Float64
    distances: Float64


def sample_number(
    dense: Sequence[DenseLayer], moments: Mapping[str, Moments], fitted: int, recipe: Recipe
) -> int:
    """How many samples curves are measured on: what the recipe says, fewer for large networks if it allows that.

    Parameters
    ----------
    dense, moments
        The layers, in the order of the network, and their moments over ``fitted`` samples.
    """
    settings = recipe.allocation
    if not settings.fewer_samples:
        return settings.samples
    work = [item.layer.size * moments[item.layer.name].count / fitted for item in dense]
    behind = sum(np.cumsum(work[::-1])) * settings.levels
    return int(np.clip(PASSES / max(1.0, float(behind)), FEWEST, max(FEWEST, settings.samples)))


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
    key: str = "curves",
    prune: LayerPruner = prune_layer,
) -> dict[str, Curve]:
    """A curve for every layer; measured points are kept in the run folder under ``key``.

    Parameters
    ----------
    model
        The prepared dense model, or whatever the output is to stay close to.
    dense, moments, held_out
        Its layers that take part, the moments of their inputs, and held-out moments of layers with few samples.
    samples
        What the output is compared on.
    prune
        The run's own solver on one layer.
    """
    settings = recipe.allocation
    curves: dict[str, Curve] = {}
    missing = []
    for item in dense:
        stored = folder.load(f"{key}/{item.layer.name}")
        if stored is None:
            missing.append(item)
        else:
            curves[item.layer.name] = finished_curve(
                item, stored["zeros"], stored["errors"], stored["distortion"], settings
            )
    if not missing:
        return curves
    progress.start("Measuring curves", len(missing))
    with ExitStack() as stack:
        stack.callback(progress.finish)
        probes = probe_layers(
            model, missing, moments, held_out, samples, engine, recipe, threads=threads, prune=prune
        )
        for item, found in stack.enter_context(closing(probes)):
            distortion = aggregate_samples(found.distances, settings.aggregate)
            folder.store(
                f"{key}/{item.layer.name}",
                {"zeros": found.zeros, "errors": found.errors, "distortion": distortion},
            )
            curves[item.layer.name] = finished_curve(item, found.zeros, found.errors, distortion, settings)
            progress.advance()
    return curves


def probe_layers(
    model: Model,
    dense: Sequence[DenseLayer],
    moments: Mapping[str, Moments],
    held_out: Mapping[str, Moments],
    samples: Dataset,
    engine: Engine,
    recipe: Recipe,
    *,
    threads: int,
    prune: LayerPruner = prune_layer,
) -> Generator[tuple[DenseLayer, Probed], None, None]:
    """Distances of single samples at all levels of each layer, in the order of the network.

    Parameters are those of :func:`measure_curves`.
    """
    by_solver = recipe.allocation.pruning == "run"
    if not by_solver:
        chosen = by_magnitude(recipe)
    else:
        chosen = quick_recipe(recipe) if sum(layer_work(item) for item in dense) > WORK else recipe
    by_name = {item.layer.name: item for item in dense}

    def solutions(item: DenseLayer) -> Iterator[Solution]:
        own = prune if by_solver else prune_layer
        return _pruned(item, moments[item.layer.name], held_out.get(item.layer.name), chosen, own)

    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(pool.shutdown, cancel_futures=True)
        # Many levels by magnitude are quick to make, but not to keep: they are made when their turn comes.
        solved = {
            item.layer.name: pool.submit(lambda item: list(solutions(item)), item)
            for item in (dense if by_solver else ())
        }
        meter = Meter(model, engine, samples, recipe, stack)
        for layer, look in meter.visit([item.layer for item in dense]):
            item = by_name[layer.name]
            ready = solved.pop(layer.name).result() if by_solver else solutions(item)
            errors, distances = [], []
            for solution in ready:
                distances.append(look(solution))
                errors.append(solution.relative_error)
            zeros = np.array(level_zeros(item, recipe.allocation))
            yield item, Probed(zeros, np.array(errors), np.stack(distances, axis=1))


def _pruned(
    item: DenseLayer, moments: Moments, held_out: Moments | None, recipe: Recipe, prune: LayerPruner
) -> Iterator[Solution]:
    """One layer pruned to every level, with the bias that each needs."""
    shrinkage: float | None = None
    by_solver = recipe.allocation.pruning == "run"
    for count in level_zeros(item, recipe.allocation):
        solution = prune(item, moments, held_out, count, recipe, shrinkage=shrinkage)
        if held_out is not None:  # the first level's choice serves all
            shrinkage = solution.shrinkage
        yield corrected(item, solution, moments, OneShot("none", bias=by_solver))


class Meter:
    """Runs a model up to each layer and, with other weights in that layer, from there on.

    Its outputs are compared with those of ``reference``, which has the same outputs, or with its own.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        samples: Dataset,
        recipe: Recipe,
        stack: ExitStack,
        reference: Model | None = None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._kind = recipe.allocation.distance
        self._own = recipe.allocation.objective == "layer"
        self._outputs = [model.outputs[index].name for index in float_outputs(model)]
        self._samples = samples
        self._batch = model.batch_size or recipe.calibration.batch_size
        self._side = Side(model, engine)
        stack.callback(self._side.close)
        self._batches = len(fill_spools((self._side,), samples, None, self._batch))
        self._reference = Spool()
        stack.callback(self._reference.close)
        whole = engine.compile((reference or model).extract())
        for position in range(self._batches):
            inputs = self._side.spool.read(position)
            found = whole.run({name: inputs[name] for name in whole.inputs})
            self._reference.append({name: found[name] for name in self._outputs})

    def visit(self, layers: Sequence[Layer]) -> Iterator[tuple[Layer, Look]]:
        """Every layer in topological order with what measures it; those used in several places come last."""
        single = [layer for layer in layers if not layer.shared]
        for plan in plan_stages(self._model.graph, single) if single else ():
            self._advance(plan)
            for layer, place in plan.layers:
                with closing(Look(self, layer, place)) as look:
                    yield layer, look
        for layer in layers:
            if layer.shared:
                with closing(Look(self, layer, None)) as look:
                    yield layer, look

    def _advance(self, plan: StagePlan) -> None:
        # The cut of the sparse models: it stops in front of the layers.
        run, upcoming = self._side.prepare(plan.sparse), Spool()
        for position in range(self._batches):
            self._side.step(plan.sparse, run, position, upcoming)
        self._side.close()
        self._side.spool = upcoming


class Look:
    """Distances of the output, sample by sample, with a solution in one layer."""

    def __init__(self, meter: Meter, layer: Layer, place: Place | None) -> None:
        self._meter = meter
        self._layer = layer
        self._place = place
        self._names = [at.output for at in layer.places] if meter._own else meter._outputs
        self._rest: Executable | None = None
        if place is not None:
            alive = {*meter._side.spool.read(0), place.output}
            wanted = [name for name in self._names if name not in alive]
            if wanted:
                needed = _read_from(meter._model.graph, wanted, alive)
                self._rest = meter._engine.compile(meter._model.extract(outputs=wanted, inputs=needed))
        self._reference = meter._reference
        if meter._own:
            self._reference = Spool()
            for found in self._outputs(meter._model):
                self._reference.append({name: found[name] for name in self._names})

    def __call__(self, solution: Solution) -> Float64:
        """``[samples]``."""
        return self.of(lambda changed: apply(changed, self._layer, solution))

    def of(self, change: Callable[[Model], None]) -> Float64:
        """Distances with the layer edited in any way, ``[samples]``; what it reads and gives keeps its names."""
        meter, names = self._meter, self._names
        changed = meter._model.copy()
        change(changed)
        distances = []
        for position, found in enumerate(self._outputs(changed)):
            reference = self._reference.read(position)
            size = min(meter._batch, len(meter._samples) - position * meter._batch)
            distances.append(
                np.sum(
                    [_distances(reference[name], found[name], size, meter._kind) for name in names], axis=0
                )
            )
        return np.concatenate(distances)

    def output_means(self, change: Callable[[Model], None]) -> Float64:
        """Mean of each output channel with the layer edited, ``[channels]``; for layers used in one place."""
        meter, place = self._meter, self._place
        if place is None:
            raise ValueError(f"layer {self._layer.name!r} is used in {len(self._layer.places)} places")
        changed = meter._model.copy()
        change(changed)
        own = meter._engine.compile(changed.extract(outputs=[place.output], inputs=[place.input]))
        parts = []
        for position in range(meter._batches):
            output = own.run({place.input: meter._side.spool.read(position)[place.input]})[place.output]
            parts.append(ChannelStatistics.of(output, place.channel_axis))
        return ChannelStatistics.merge(parts).mean

    def close(self) -> None:
        """Free what only this layer is compared with."""
        if self._meter._own:
            self._reference.close()

    def _outputs(self, changed: Model) -> Iterator[Mapping[str, AnyArray]]:
        meter, place = self._meter, self._place
        if place is None:
            whole = meter._engine.compile(changed.extract(outputs=self._names))
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


def _distances(
    reference: AnyArray, candidate: AnyArray, size: int, kind: Literal["error", "kl", "squared"]
) -> Float64:
    """Distances of one batch's output, ``[size]``: that of the whole where it does not run over the samples."""
    if reference.ndim and len(reference) == size:
        return sample_distances(reference, candidate, kind)
    whole = sample_distances(reference[None], candidate[None], "error" if kind == "kl" else kind)
    return np.full(size, whole[0])


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
