"""The whole trade-off in one run: models of several allocations at several budgets, from shared layer solutions.

The dense model is evaluated, moments are collected and curves are measured once. Every point then is an allocation
whose demands are rounded to a grid of levels, a model put together from the database of layer solutions, corrected and
validated. What :func:`~pot_sparsity.pipeline.optimize.optimize` needs to write one of them is in the result.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import nncf
import numpy as np
import onnx
import openvino as ov

from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.data import DataSource, Preprocess
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import count_zeros
from pot_sparsity.metrics import get_metric
from pot_sparsity.pipeline.allocation.costs import Costs
from pot_sparsity.pipeline.allocation.targets import TIMINGS_NAME
from pot_sparsity.pipeline.allocation.timings import given_timings
from pot_sparsity.pipeline.compress import Surroundings, rebuild, repair
from pot_sparsity.pipeline.evaluate import Evaluator, distance
from pot_sparsity.pipeline.intake import Sources, check_folders, load_job
from pot_sparsity.pipeline.job import Job, Options
from pot_sparsity.pipeline.progress import Progress, Silent, track
from pot_sparsity.pipeline.recorder import Recorder, peak_memory_mib
from pot_sparsity.pipeline.repair.correction import OneShot, corrected
from pot_sparsity.pipeline.reporting import machine, model_spec, versions
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import STATE, Contents, RunFolder, writing
from pot_sparsity.pipeline.solve import Solution, solver_options
from pot_sparsity.pipeline.store.database import Database, LayerLevels
from pot_sparsity.pipeline.store.levels import Level
from pot_sparsity.pipeline.sweeping.sweep_plan import Plan, plan_points, planned_levels, sweep_costs
from pot_sparsity.pipeline.sweeping.sweep_points import (
    Asked,
    at_once,
    at_point,
    merged,
    read_allocations,
    read_asked,
    with_allocation,
)
from pot_sparsity.recipe import OUTPUT_DISTORTION, Recipe, load_recipe, validate_recipe
from pot_sparsity.report.schema import DataSpec
from pot_sparsity.report.sweep_io import SWEEP_FILES, SWEEP_JSON, write_sweep
from pot_sparsity.report.sweep_schema import Correction, DenseFigures, Sweep, SweepLayer, SweepPoint

__all__ = ["GRID", "Sweep", "sweep"]

#: Ratio of densities of neighbouring levels: of coarser ones more points share solutions, finer ones meet what an
#: allocation asks for more closely.
GRID = 0.95
#: Folder of the layer solutions inside the sweep's; ``force`` leaves it there.
DATABASE = "database"
_CONTENTS = Contents("sweep", (*SWEEP_FILES, "run.log", TIMINGS_NAME, STATE), frozenset({SWEEP_JSON, STATE}))


def sweep(
    model: str | Path | onnx.ModelProto | ov.Model,
    calibration: DataSource,
    *,
    validation: DataSource | None = None,
    validation_labels: str | Path | None = None,
    validation_split: str | None = None,
    metric: str = "top1",
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    preprocess: Preprocess | Mapping[str, Any] | str | Path | None = None,
    engine: Literal["openvino", "onnxruntime"] = "openvino",
    ignored_scope: nncf.IgnoredScope | None = None,
    keep_structure: bool = False,
    allocations: Sequence[str] | None = None,
    points: Sequence[float] | None = None,
    budget: Mapping[str, Sequence[float]] | None = None,
    timings: str | Path | None = None,
    correct: Correction = "bias",
    grid: float = GRID,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    database: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Show what sparsity costs: models of several allocations at several sparsities or budgets, validated.

    No model is written: ``optimize(..., from_sweep=output, point=...)`` does that for the point that you like.

    Parameters
    ----------
    model, calibration, validation, validation_labels, validation_split, metric, preprocess, engine, ignored_scope
        As for :func:`~pot_sparsity.pipeline.optimize.optimize`.
    recipe
        As there; its solver prunes every layer. Sparsity, budget, schedule and ``max_drop`` do not count.
    keep_structure, resume, force, threads, progress
        As there. ``force`` leaves the database in the folder.
    allocations
        Names of allocations to compare; by default all of them.
    points
        Sparsities; 0.3, 0.5, 0.6, 0.7, 0.8 and 0.9 unless there are budgets.
    budget
        ``flops``, ``bops``, ``size`` or ``latency``, each with the fractions of the dense model's that may remain.
    timings
        As for :func:`~pot_sparsity.pipeline.optimize.optimize`; measured here by default.
    correct
        What follows on pruning: nothing, the one-shot correction of biases, or all corrections of the recipe, which
        walk through the network for each point (minutes, where the others take seconds).
    grid
        Layers are pruned to densities that are powers of this, so that points share solutions. What an allocation asks
        for is rounded such that the whole is at least as sparse as asked.
    output
        Folder of ``sweep.json``, ``.csv``, ``.svg``, ``.png`` and ``.html``; None writes nothing.
    database
        Folder of the layer solutions; ``database`` in the output folder by default.

    Returns
    -------
    Sweep
        What ``sweep.json`` holds.

    Raises
    ------
    UserError
        Wrong usage or input; nothing has been written.
    """
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    names, asked = read_allocations(allocations), read_asked(points, budget)
    _check(settings, grid)
    get_metric(metric)
    if output is not None and database is None:
        database = Path(output) / DATABASE
    check_folders(output, database)
    folder = RunFolder(
        None if output is None else Path(output), resume=resume, force=force, contents=_CONTENTS
    )
    store = None if database is None else Path(database)
    options = Options(
        metric,
        ignored_scope,
        keep_structure,
        to_openvino=False,
        threads=threads or os.cpu_count() or 1,
        baseline_int8=False,
        measure_latency=False,
        database=Database(store),
        timings=given_timings(timings, [each.kind for each in asked]),
    )
    sources = Sources(model, calibration, validation, validation_labels, validation_split, preprocess, engine)
    job = load_job(sources, _for_all(settings, names, asked), options, folder, progress)
    with folder.logging(), ExitStack() as stack:
        result = _run(job, stack, settings, names, asked, correct, grid)
        if folder.path is not None:
            assert store is not None
            result.database = _relative(store, folder.path)
            with writing(folder.path):
                write_sweep(result, folder.path)
        folder.finish_state()
    return result


def _check(recipe: Recipe, grid: float) -> None:
    """Refuse recipes that leave nothing to sweep over."""
    solver_options(recipe)
    if Pattern.parse(recipe.pruning.pattern).kind == "n:m":
        raise RecipeError(
            f"pattern {recipe.pruning.pattern} fixes the zeros of every layer, there is nothing to sweep over: use "
            "'unstructured' or 'block:c'"
        )
    if recipe.allocation.rounds == "iterative":
        raise RecipeError("a sweep measures curves once: set allocation.rounds to one")
    if recipe.schedule.start == "model":
        raise RecipeError("every point of a sweep prunes the dense model: set schedule.start to dense")
    if recipe.mixed.enabled:
        raise RecipeError("a sweep is about zeros, not about bits: set mixed.enabled to false")
    if not 0.0 < grid < 1.0:
        raise RecipeError(f"the grid of densities must be above 0 and below 1, got {grid:g}")


def _for_all(recipe: Recipe, allocations: Sequence[str], asked: Sequence[Asked]) -> Recipe:
    """The recipe of what all points share: curves if any wants them; the tightest bounds, so that they are checked."""
    bounds: dict[str, float] = {}
    for each in asked:
        tighter = max if each.kind == "sparsity" else min
        bounds[each.kind] = tighter(each.bound, bounds.get(each.kind, each.bound))
    method = OUTPUT_DISTORTION if OUTPUT_DISTORTION in allocations else allocations[0]
    plain = with_allocation(recipe, method).model_dump(mode="json")
    schedule = {"kind": "one_shot", "max_drop": None}
    return validate_recipe(merged({**plain, "budget": bounds}, {"schedule": schedule}))


def _run(
    job: Job,
    stack: ExitStack,
    recipe: Recipe,
    allocations: Sequence[str],
    asked: Sequence[Asked],
    correct: Correction,
    grid: float,
) -> Sweep:
    recorder = job.recorder
    around, evaluator = Run(job, stack).surroundings()
    around = replace(around, recipe=recipe)
    timed = job.costs is not None and "latency" in job.costs.tables
    costs = sweep_costs(around.prepared.model, around.dense, recipe, job.costs if timed else None)
    with recorder.stage("allocation"):
        plans = plan_points(around, costs, allocations, asked, grid)
    with recorder.stage("layer solutions"):
        built = around.database.build(
            around.dense,
            around.moments,
            around.held_moments,
            planned_levels(plans, around.dense, recipe),
            recipe,
            threads=around.threads,
            progress=around.progress,
        )
        around.database.report()
    points = _Points(job, around, evaluator, costs, built, correct)
    with recorder.stage("points"):
        found = [points(plan) for plan in track(plans, job.progress, "Sweeping", len(plans))]
    return Sweep(
        versions=versions(),
        machine=machine(),
        seed=recipe.seed,
        engine=job.engine.name,
        recipe=recipe.model_dump(mode="json"),
        model=model_spec(job.original),
        data=DataSpec(
            calibration=len(job.samples),
            fit=len(job.fit),
            held_out=len(job.held_out or ()),
            validation=len(job.validation),
            labels=job.validation.has_labels,
            metric=job.watched,
        ),
        calibration=job.samples.fingerprint,
        keep_structure=job.options.keep_structure,
        correction=correct,
        grid=grid,
        database=None,
        weights=sum(item.layer.size for item in around.dense),
        layers=[SweepLayer(name=item.layer.name, weights=item.layer.size) for item in around.dense],
        dense=DenseFigures(
            metrics=evaluator.dense.metrics,
            flops=costs.dense.get("flops"),
            size_bytes=round(costs.dense["size"]),
            latency=costs.dense.get("latency"),
        ),
        points=found,
        stages=recorder.stages,
        warnings=recorder.warnings,
        seconds=recorder.seconds,
        peak_memory_mib=peak_memory_mib(),
    )


class _Points:
    """Makes the models of points and measures them; points that an interrupted sweep has measured are read."""

    def __init__(
        self,
        job: Job,
        around: Surroundings,
        evaluator: Evaluator,
        costs: Costs,
        built: Mapping[str, LayerLevels],
        correct: Correction,
    ) -> None:
        self._job = job
        self._around = around
        self._evaluator = evaluator
        self._costs = costs
        self._built = built
        self._correct = correct

    def __call__(self, plan: Plan) -> SweepPoint:
        mark = hashlib.sha256(repr((sorted(plan.zeros.items()), self._correct)).encode()).hexdigest()
        key = f"point/{plan.id}/{mark}"
        stored = self._job.folder.load(key)
        if stored is not None:
            return SweepPoint.model_validate_json(np.asarray(stored["json"], np.uint8).tobytes())
        point = self._measure(plan)
        text = point.model_dump_json().encode()
        self._job.folder.store(key, {"json": np.frombuffer(text, np.uint8)})
        return point

    def _measure(self, plan: Plan) -> SweepPoint:
        start = time.perf_counter()
        model = self._model(plan)
        found = self._evaluator(model, quiet=True)
        dense = self._around.dense
        zeros = {item.layer.name: count_zeros(model, item.layer) for item in dense}
        total = sum(zeros.values())
        left = {kind: self._costs.fraction(kind, zeros) for kind in self._costs.tables}
        return SweepPoint(
            id=plan.id,
            allocation=plan.allocation,
            budget=plan.asked.kind,
            bound=plan.asked.bound,
            sparsity=total / sum(item.layer.size for item in dense),
            zeros=total,
            flops=left.get("flops"),
            bops=left.get("bops"),
            size=left["size"],
            size_bytes=round(self._costs.total("size", zeros)),
            latency=left.get("latency"),
            metrics=found.metrics,
            drop=self._job.drop(self._evaluator.dense, found),
            relative_error=distance(found.metrics)[1],
            layers=[plan.zeros[item.layer.name] for item in dense],
            seconds=time.perf_counter() - start,
        )

    def _model(self, plan: Plan) -> Model:
        around = self._around
        pattern = around.recipe.pruning.pattern
        solutions: dict[str, Solution] = {
            name: self._built[name][Level(zeros, pattern)] for name, zeros in plan.zeros.items()
        }
        if self._correct != "full":
            once = OneShot("none", bias=self._correct == "bias" and bool(around.recipe.correction.bias))
            return rebuild(
                around,
                {
                    item.layer.name: corrected(
                        item, solutions[item.layer.name], around.moments[item.layer.name], once
                    )
                    for item in around.dense
                },
            )
        plain = at_once(around.recipe.model_dump(mode="json"))
        recipe = validate_recipe(at_point(plain, plan.allocation, around.recipe.sparsity))
        quiet = replace(around, recipe=recipe, recorder=Recorder(), folder=RunFolder(None), progress=Silent())
        with quiet.recorder.stage("pruning"):
            pass  # the solutions stand as they were found
        return repair(quiet, solutions, plan.zeros, plan.id).model


def _relative(database: Path, folder: Path) -> str:
    """Where the database is, seen from the sweep's folder if it lies inside."""
    inside, home = database.resolve(), folder.resolve()
    return inside.relative_to(home).as_posix() if inside.is_relative_to(home) else str(inside)
