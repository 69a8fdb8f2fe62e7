"""Layer by layer through the network: fit each layer to the sparse model's own inputs, then correct its statistics.

The dense and the sparse model advance side by side, stage by stage, over the calibration samples; the tensors that
cross a cut are kept (in memory, then on disk), so that all stages together cost one pass of each model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray, Bool, Float64, Moments
from pot_sparsity.algorithms.correction import differential_correction, output_statistics
from pot_sparsity.algorithms.moments import CrossMoments, CrossMomentsAccumulator
from pot_sparsity.algorithms.pruning.problem import LayerProblem
from pot_sparsity.algorithms.pruning.refit import refit
from pot_sparsity.algorithms.reconstruction import RIDGE, sparse_target
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import (
    DenseLayer,
    Solution,
    apply,
    pack,
    run_solver,
    shrunk,
    solver_options,
    unpack,
)
from pot_sparsity.pipeline.spool import Spool
from pot_sparsity.pipeline.stages import Cut, StagePlan, plan_stages
from pot_sparsity.recipe import Recipe

#: Batches whose moments are summed side by side.
LANES = 2


@dataclass(frozen=True)
class LayerDecision:
    """What the walk decided for one layer."""

    layer: str
    blend: float
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Walk:
    """Outcome of one walk through the network."""

    solutions: dict[str, Solution]
    decisions: list[LayerDecision]


@dataclass(frozen=True)
class WalkSettings:
    """What the walk does at each layer."""

    reconstruct: bool
    differential: bool
    batch_size: int


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
    sparse_model: Model,
    dense: Sequence[DenseLayer],
    start: Mapping[str, Solution],
    moments: Mapping[str, Moments],
    fit: Dataset,
    held_out: Dataset | None,
    engine: Engine,
    recipe: Recipe,
    settings: WalkSettings,
    *,
    threads: int,
    folder: RunFolder,
    key: str,
    progress: Progress,
) -> Walk:
    """Visit all layers in topological order and rewrite ``sparse_model`` in place.

    Parameters
    ----------
    dense_model, sparse_model
        Prepared models of the same structure; ``sparse_model`` already holds ``start``.
    dense
        The dense layers that take part.
    start
        Pruned weights; their masks are kept.
    moments
        Dense-input moments of the fit samples.
    fit, held_out
        Samples that enter the fits, and samples that choose blends.
    """
    by_name = {item.layer.name: item for item in dense}
    single = [item.layer for item in dense if not item.layer.shared]
    solutions = dict(start)
    decisions: list[LayerDecision] = []
    if not single:
        return Walk(solutions, decisions)
    plans = plan_stages(dense_model.graph, single)
    size = dense_model.batch_size or settings.batch_size
    progress.start("Fitting layers in sequence", len(single))
    with ExitStack() as stack:
        stack.callback(progress.finish)
        sides = (_Side(sparse_model, engine), _Side(dense_model, engine))
        for side in sides:
            stack.callback(side.close)
        roles = _fill(sides, fit, held_out, size)
        for plan in plans:
            gathered = _advance(plan, sides, roles, threads)
            for layer, _ in plan.layers:
                name = layer.name
                stored = folder.load(f"{key}/{name}")
                if stored is None:
                    fit_moments, held_moments = gathered[name]
                    solution, decision = _solve(
                        by_name[name],
                        solutions[name],
                        moments[name],
                        fit_moments,
                        held_moments,
                        recipe,
                        settings,
                    )
                    folder.store(f"{key}/{name}", pack(solution) | {"decision": _pack_decision(decision)})
                else:
                    solution = unpack(stored, len(layer.places))
                    decision = LayerDecision(name, *(float(v) for v in np.asarray(stored["decision"])))
                solutions[name] = solution
                decisions.append(decision)
                apply(sparse_model, layer, solution)
                progress.advance()
    return Walk(solutions, decisions)


def _pack_decision(decision: LayerDecision) -> np.ndarray:
    return np.array([decision.blend, decision.error_before, decision.error_after])


def _fill(sides: tuple[_Side, _Side], fit: Dataset, held_out: Dataset | None, size: int) -> list[bool]:
    """Put the model's inputs into both spools; returns, batch by batch, whether it belongs to the fit."""
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
    plan: StagePlan, sides: tuple[_Side, _Side], roles: Sequence[bool], threads: int
) -> dict[str, tuple[CrossMoments, CrossMoments | None]]:
    """Run both models over the stage's cut and gather the group's cross moments.

    Batches take turns on a fixed number of lanes, whatever the number of threads, so that a group of one layer
    keeps several threads busy and the sums do not depend on how many there are.
    """
    sparse, dense = sides
    runs = (sparse.prepare(plan.sparse), dense.prepare(plan.dense))
    upcoming = (Spool(), Spool())
    sums = {
        (layer.name, role, lane): CrossMomentsAccumulator(place.geometry)
        for layer, place in plan.layers
        for role in (True, False)
        for lane in range(LANES)
    }
    with threadpool_limits(1), Parallel(n_jobs=threads, backend="threading") as pool:
        for first in range(0, len(roles), LANES):
            tasks = []
            for lane, position in enumerate(range(first, min(first + LANES, len(roles)))):
                xs = sparse.step(plan.sparse, runs[0], position, upcoming[0])
                ys = dense.step(plan.dense, runs[1], position, upcoming[1])
                tasks += [
                    delayed(sums[layer.name, roles[position], lane].update)(xs[place.input], ys[place.output])
                    for layer, place in plan.layers
                ]
            pool(tasks)
    for side, spool in zip(sides, upcoming, strict=True):
        side.spool.close()
        side.spool = spool
    seen = {(role, position % LANES) for position, role in enumerate(roles)}
    return {
        layer.name: (_merged(sums, layer.name, True, seen), _held(sums, layer.name, seen))
        for layer, _ in plan.layers
    }


def _merged(
    sums: Mapping[tuple[str, bool, int], CrossMomentsAccumulator],
    name: str,
    role: bool,
    seen: set[tuple[bool, int]],
) -> CrossMoments:
    return CrossMoments.merge(
        [sums[name, role, lane].result() for lane in range(LANES) if (role, lane) in seen]
    )


def _held(
    sums: Mapping[tuple[str, bool, int], CrossMomentsAccumulator], name: str, seen: set[tuple[bool, int]]
) -> CrossMoments | None:
    return _merged(sums, name, False, seen) if any(not role for role, _ in seen) else None


def _solve(
    item: DenseLayer,
    start: Solution,
    dense_moments: Moments,
    fit: CrossMoments,
    held_out: CrossMoments | None,
    recipe: Recipe,
    settings: WalkSettings,
) -> tuple[Solution, LayerDecision]:
    """New weight and bias of one layer from its moments in the sparse and the dense model."""
    begin = time.perf_counter()
    name = item.layer.name
    old_bias = item.biases[0]
    weight, bias = start.weight, start.biases[0]
    decision = LayerDecision(name, 0.0, 0.0, 0.0)
    damping = start.damping
    if settings.reconstruct and old_bias is not None:
        target = sparse_target(item.weight, fit, held_out, ridge=max(RIDGE, start.shrinkage))
        second = shrunk(fit.inputs.centred, start.shrinkage)
        decision = LayerDecision(name, target.blend, target.error_before, target.error_after)
        if recipe.reconstruction.masks == "solved":
            zeros = int(np.count_nonzero(start.weight == 0.0))
            result = run_solver(recipe, solver_options(recipe), item.layer, target.weight, second, zeros)
        else:
            problem = LayerProblem.of(target.weight, second)
            result = problem.result(*_refitted(problem, start.mask))
        weight, damping = result.weight, max(damping, result.damping)
        bias = fit.output_mean - np.einsum("grc,gc->gr", weight, fit.inputs.mean)
    if settings.differential and bias is not None and old_bias is not None:
        weight, bias = _differential(item.weight, old_bias, weight, bias, dense_moments, fit.inputs, recipe)
    solution = replace(
        start,
        weight=weight,
        biases=(bias,),
        damping=damping,
        seconds=start.seconds + time.perf_counter() - begin,
    )
    return solution, decision


def _refitted(problem: LayerProblem, mask: Bool) -> tuple[Float64, Bool, float]:
    weight, damping = refit(problem, mask)
    return weight, mask, damping


def _differential(
    dense_weight: Float64,
    dense_bias: Float64,
    weight: Float64,
    bias: Float64,
    dense_moments: Moments,
    sparse_moments: Moments,
    recipe: Recipe,
) -> tuple[Float64, Float64]:
    corrected, moved, _ = differential_correction(
        weight,
        bias,
        output_statistics(dense_weight, dense_bias, dense_moments),
        output_statistics(weight, bias, sparse_moments),
        recipe.correction.clip,
        scale=recipe.correction.scale,
    )
    return corrected, moved
