"""Layer by layer through the network: fit each layer to the sparse model's own inputs, then correct its statistics.

The dense model and one or several sparse ones advance side by side, stage by stage, over the calibration samples; the
tensors that cross a cut are kept (in memory, then on disk), so that all stages together cost one pass of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray, Moments
from pot_sparsity.algorithms.correction import ChannelStatistics
from pot_sparsity.algorithms.moments import CrossMoments, CrossMomentsAccumulator
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.errors import DataError
from pot_sparsity.graph.layers import Layer, Place
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.normalization import Normalization, find_normalizations, write_normalization
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.repair.correction import Steps, correct_normalization
from pot_sparsity.pipeline.repair.fitting import Gathered, LayerDecision, LayerFit, fit_layer
from pot_sparsity.pipeline.repair.sides import Side, fill_spools
from pot_sparsity.pipeline.repair.stages import StagePlan, plan_stages
from pot_sparsity.pipeline.repair.tuning import TuningSamples
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, pack, unpack
from pot_sparsity.pipeline.spool import Spool
from pot_sparsity.recipe import Recipe

T = TypeVar("T")

#: Batches whose moments are summed side by side.
LANES = 2


@dataclass
class Walker:
    """One sparse model on its walk.

    Attributes
    ----------
    key
        Its name in the run folder.
    model
        Holds the starting solutions; rewritten in place.
    steps
        What is done on the way.
    solutions
        Updated layer by layer.
    decisions
        One per layer, in order.
    fit
        Finds the new weight and bias of a layer.
    inputs
        What layers make of their inputs before they multiply, by name; the others take them as they come.
    """

    key: str
    model: Model
    steps: Steps
    solutions: dict[str, Solution]
    decisions: list[LayerDecision]
    fit: LayerFit = fit_layer
    inputs: Mapping[str, Callable[[AnyArray], AnyArray]] = field(default_factory=dict)


def walk(
    dense_model: Model,
    walkers: Sequence[Walker],
    dense: Sequence[DenseLayer],
    moments: Mapping[str, Moments],
    fit: Dataset,
    held_out: Dataset | None,
    engine: Engine,
    recipe: Recipe,
    *,
    threads: int,
    folder: RunFolder,
    progress: Progress,
) -> None:
    """Visit all layers, and normalizations if asked to, in topological order; rewrites models and solutions.

    Layers whose weight is shared are left as they are: their places lie at different depths.

    Parameters
    ----------
    dense_model
        The prepared model; the walkers' models have the same structure.
    dense
        The dense layers that take part.
    moments
        Dense-input moments of the fit samples.
    fit, held_out
        Samples that enter the fits, and samples that choose blends.
    """
    by_name = {item.layer.name: item for item in dense}
    single = [item.layer for item in dense if not item.layer.shared]
    wanted = any(walker.steps.normalization for walker in walkers)
    normalizations = find_normalizations(dense_model.graph) if wanted else ()
    if not single and not normalizations:
        return
    tuning = recipe.reconstruction.method == "tuning"
    plans = plan_stages(
        dense_model.graph,
        single,
        normalizations,
        dense_inputs=tuning and recipe.reconstruction.input == "dense",
    )
    size = dense_model.batch_size or recipe.calibration.batch_size
    progress.start("Fitting layers in sequence", len(single))
    with ExitStack() as stack:
        stack.callback(progress.finish)
        reference = Side(dense_model, engine)
        sides = [Side(walker.model, engine) for walker in walkers]
        for side in (reference, *sides):
            stack.callback(side.close)
        roles = fill_spools((reference, *sides), fit, held_out, size)
        tuned = [index for index, walker in enumerate(walkers) if tuning and walker.steps.reconstruct]
        samples = TuningSamples(recipe, min(len(fit), sum(roles) * size), size, tuned)
        stack.callback(samples.clear)
        to_block = recipe.reconstruction.target == "block" and not tuning
        blocks = {i for i, walker in enumerate(walkers) if to_block and walker.steps.reconstruct}
        for plan in plans:
            views = [walker.inputs for walker in walkers]
            gathered, outputs = _advance(plan, reference, sides, roles, samples, threads, blocks, views)
            for layer, _ in plan.layers:
                for index, walker in enumerate(walkers):
                    stored = folder.load(f"{walker.key}/{layer.name}")
                    if stored is None:
                        solution, decision = walker.fit(
                            by_name[layer.name],
                            walker.solutions[layer.name],
                            moments[layer.name],
                            gathered[index, layer.name],
                            recipe,
                            walker.steps,
                        )
                        folder.store(
                            f"{walker.key}/{layer.name}", pack(solution) | {"decision": decision.pack()}
                        )
                    else:
                        solution = unpack(stored, len(layer.places))
                        decision = LayerDecision(layer.name, *(float(v) for v in stored["decision"]))
                    walker.solutions[layer.name] = solution
                    walker.decisions.append(decision)
                    apply(walker.model, layer, solution)
                progress.advance()
            samples.clear()
            for item in plan.normalizations:
                for index, walker in enumerate(walkers):
                    if walker.steps.normalization:
                        statistics = outputs[item.name]
                        _correct(walker, item, statistics[-1], statistics[index], recipe, folder)


def _correct(
    walker: Walker,
    item: Normalization,
    dense: ChannelStatistics,
    sparse: ChannelStatistics,
    recipe: Recipe,
    folder: RunFolder,
) -> None:
    """Correct a normalization of one model, or write what the run folder holds of it."""
    key = f"{walker.key}/{item.name}"
    stored = folder.load(key)
    if stored is None:
        scale, shift = correct_normalization(walker.model, item, dense, sparse, recipe)
        folder.store(key, {"scale": scale} | ({} if shift is None else {"shift": shift}))
    else:
        scale, shift = stored["scale"], stored.get("shift")
    write_normalization(walker.model, item, scale, shift)


def _advance(
    plan: StagePlan,
    reference: Side,
    sides: Sequence[Side],
    roles: Sequence[bool],
    samples: TuningSamples,
    threads: int,
    blocks: Collection[int],
    views: Sequence[Mapping[str, Callable[[AnyArray], AnyArray]]],
) -> tuple[dict[tuple[int, str], Gathered], dict[str, list[ChannelStatistics]]]:
    """Run all models over the stage's cut and gather the group's cross moments, by side and layer.

    The sides at ``blocks`` are fitted to the output of their residual blocks; ``views`` tell what layers of each
    side make of their inputs.

    Of normalizations, the statistics of the output on the fit samples, side by side, the dense model's last.

    Batches take turns on a fixed number of lanes, whatever the number of threads, so that a group of one layer
    keeps several threads busy and the sums do not depend on how many there are.
    """
    dense_run = reference.prepare(plan.dense)
    runs = [side.prepare(plan.sparse) for side in sides]
    upcoming = [Spool() for _ in (reference, *sides)]
    sums: dict[tuple[int, str, bool, int], CrossMomentsAccumulator] = {}
    seen: dict[tuple[str, int], list[ChannelStatistics]] = {}
    with threadpool_limits(1), Parallel(n_jobs=threads, backend="threading") as pool:
        for first in range(0, len(roles), LANES):
            tasks = []
            for lane, position in enumerate(range(first, min(first + LANES, len(roles)))):
                ys = reference.step(plan.dense, dense_run, position, upcoming[-1])
                for index, side in enumerate(sides):
                    xs = side.step(plan.sparse, runs[index], position, upcoming[index])
                    for layer, place in plan.layers:
                        key = (index, layer.name, roles[position], lane)
                        total = sums.setdefault(key, CrossMomentsAccumulator(place.geometry))
                        target = (
                            wanted_output(plan, layer, place, xs, ys) if index in blocks else ys[place.output]
                        )
                        view = views[index].get(layer.name)
                        read = xs[place.input] if view is None else view(xs[place.input])
                        tasks.append(delayed(_named)(layer.name, total.update, read, target))
                    if roles[position]:
                        samples.see(plan, position, index, xs, ys)
                    _look(plan, xs, index, seen, fits=roles[position])
                _look(plan, ys, len(sides), seen, fits=roles[position])
            pool(tasks)
    for side, spool in zip((*sides, reference), upcoming, strict=True):
        side.close()
        side.spool = spool
    gathered: dict[tuple[int, str], Gathered] = {}
    for index in range(len(sides)):
        for layer, _ in plan.layers:
            fit, held_out = (
                [
                    _named(layer.name, sums[index, layer.name, role, lane].result)
                    for lane in range(LANES)
                    if (index, layer.name, role, lane) in sums
                ]
                for role in (True, False)
            )
            gathered[index, layer.name] = Gathered(
                CrossMoments.merge(fit),
                CrossMoments.merge(held_out) if held_out else None,
                samples.pool(index, layer.name),
                moved=index in blocks and layer.name in plan.residuals,
            )
    outputs = {
        item.name: [ChannelStatistics.merge(seen[item.name, index]) for index in range(len(sides) + 1)]
        for item in plan.normalizations
    }
    return gathered, outputs


def wanted_output(
    plan: StagePlan, layer: Layer, place: Place, xs: Mapping[str, AnyArray], ys: Mapping[str, AnyArray]
) -> AnyArray:
    """What the layer should give: its dense output or, at the end of a block, the dense sum minus the sparse skip."""
    own, end = ys[place.output], plan.residuals.get(layer.name)
    if end is None or not own.shape == ys[end.total].shape == xs[end.skip].shape:
        return own
    return np.asarray(ys[end.total] - xs[end.skip])


def _named(layer: str, call: Callable[..., T], *arrays: AnyArray) -> T:
    """What an accumulator returns; DataError with the layer's name where it refuses the values."""
    try:
        return call(*arrays)
    except ValueError as error:
        raise DataError(f"calibration of layer {layer!r} failed: {error}") from error


def _look(
    plan: StagePlan,
    tensors: Mapping[str, AnyArray],
    side: int,
    seen: dict[tuple[str, int], list[ChannelStatistics]],
    *,
    fits: bool,
) -> None:
    """Add one batch's statistics of the stage's normalizations, if the batch belongs to the fit."""
    for item in plan.normalizations if fits else ():
        statistics = ChannelStatistics.of(tensors[item.output], item.channel_axis)
        seen.setdefault((item.name, side), []).append(statistics)
