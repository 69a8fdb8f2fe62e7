"""Layer by layer through the network: fit each layer to the sparse model's own inputs, then correct its statistics.

The dense model and one or several sparse ones advance side by side, stage by stage, over the calibration samples; the
tensors that cross a cut are kept (in memory, then on disk), so that all stages together cost one pass of each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray, Moments
from pot_sparsity.algorithms.moments import CrossMoments, CrossMomentsAccumulator
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.fitting import Gathered, LayerDecision, fit_layer
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, pack, unpack
from pot_sparsity.pipeline.spool import Spool
from pot_sparsity.pipeline.stages import Cut, StagePlan, plan_stages
from pot_sparsity.recipe import Recipe

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
    reconstruct, differential
        What is done at each layer.
    solutions
        Updated layer by layer.
    decisions
        One per layer, in order.
    """

    key: str
    model: Model
    reconstruct: bool
    differential: bool
    solutions: dict[str, Solution]
    decisions: list[LayerDecision]


class _Side:
    """One of the two models on its way: runs cuts, keeps what crosses them."""

    def __init__(self, model: Model, engine: Engine) -> None:
        self.model = model
        self._engine = engine
        self.spool = Spool()

    def close(self) -> None:
        """Free what is kept."""
        self.spool.close()

    def prepare(self, cut: Cut) -> Executable | None:
        """Compile a partial run; None if it computes nothing."""
        if not cut.outputs:
            return None
        return self._engine.compile(self.model.extract(outputs=cut.outputs, inputs=cut.inputs))

    def step(
        self, cut: Cut, executable: Executable | None, position: int, upcoming: Spool
    ) -> dict[str, AnyArray]:
        """Advance one batch over a cut; returns all tensors alive behind it."""
        before = self.spool.read(position)
        alive: dict[str, AnyArray] = {name: before[name] for name in cut.carried}
        if executable is not None:
            alive |= executable.run({name: before[name] for name in executable.inputs})
        self.spool.drop(position)
        upcoming.append(alive)
        return alive


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
    """Visit all layers in topological order; every walker's model and solutions are rewritten.

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
    if not single:
        return
    plans = plan_stages(dense_model.graph, single)
    size = dense_model.batch_size or recipe.calibration.batch_size
    progress.start("Fitting layers in sequence", len(single))
    with ExitStack() as stack:
        stack.callback(progress.finish)
        reference = _Side(dense_model, engine)
        sides = [_Side(walker.model, engine) for walker in walkers]
        for side in (reference, *sides):
            stack.callback(side.close)
        roles = _fill((reference, *sides), fit, held_out, size)
        for plan in plans:
            gathered = _advance(plan, reference, sides, roles, threads)
            for layer, _ in plan.layers:
                for index, walker in enumerate(walkers):
                    stored = folder.load(f"{walker.key}/{layer.name}")
                    if stored is None:
                        solution, decision = fit_layer(
                            by_name[layer.name],
                            walker.solutions[layer.name],
                            moments[layer.name],
                            gathered[index, layer.name],
                            recipe,
                            reconstruct=walker.reconstruct,
                            differential=walker.differential,
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


def _fill(sides: Sequence[_Side], fit: Dataset, held_out: Dataset | None, size: int) -> list[bool]:
    """Put the model's inputs into all spools; returns, batch by batch, whether it belongs to the fit."""
    model = sides[0].model
    roles: list[bool] = []
    for dataset, role in ((fit, True), (held_out, False)):
        if dataset is None:
            continue
        for batch in dataset.batches(size):
            if model.batch_size is not None and batch.size < size:
                break
            inputs = _graph_inputs(model, batch)
            for side in sides:
                side.spool.append(inputs)
            roles.append(role)
    return roles


def _graph_inputs(model: Model, batch: Batch) -> dict[str, AnyArray]:
    return {
        tensor: batch.inputs[name] for tensor, name in zip(model.graph.inputs, model.input_names, strict=True)
    }


def _advance(
    plan: StagePlan, reference: _Side, sides: Sequence[_Side], roles: Sequence[bool], threads: int
) -> dict[tuple[int, str], Gathered]:
    """Run all models over the stage's cut and gather the group's cross moments, by side and layer.

    Batches take turns on a fixed number of lanes, whatever the number of threads, so that a group of one layer
    keeps several threads busy and the sums do not depend on how many there are.
    """
    dense_run = reference.prepare(plan.dense)
    runs = [side.prepare(plan.sparse) for side in sides]
    upcoming = [Spool() for _ in (reference, *sides)]
    sums: dict[tuple[int, str, bool, int], CrossMomentsAccumulator] = {}
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
                        tasks.append(delayed(total.update)(xs[place.input], ys[place.output]))
            pool(tasks)
    for side, spool in zip((*sides, reference), upcoming, strict=True):
        side.close()
        side.spool = spool
    gathered: dict[tuple[int, str], Gathered] = {}
    for index in range(len(sides)):
        for layer, _ in plan.layers:
            fit, held_out = (
                [
                    sums[index, layer.name, role, lane].result()
                    for lane in range(LANES)
                    if (index, layer.name, role, lane) in sums
                ]
                for role in (True, False)
            )
            gathered[index, layer.name] = Gathered(
                CrossMoments.merge(fit), CrossMoments.merge(held_out) if held_out else None
            )
    return gathered
