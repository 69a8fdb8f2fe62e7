"""The main job: prune, correct, quantize and validate one exported model, and report on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import nncf
import onnx
import openvino as ov

from pot_sparsity.data import DataSource, Preprocess
from pot_sparsity.errors import AccuracyGateError
from pot_sparsity.metrics import get_metric
from pot_sparsity.pipeline.allocation.timings import given_timings
from pot_sparsity.pipeline.delivery import Result
from pot_sparsity.pipeline.intake import Sources, check_folders, load_job
from pot_sparsity.pipeline.job import Options
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import solver_options
from pot_sparsity.pipeline.store.database import Database
from pot_sparsity.pipeline.sweeping.sweep_points import choose
from pot_sparsity.recipe import Recipe, load_recipe

__all__ = ["Result", "optimize"]


def optimize(
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
    output: str | Path | None = None,
    output_format: Literal["same", "openvino"] = "same",
    resume: bool = False,
    force: bool = False,
    database: str | Path | None = None,
    timings: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    baseline_int8: bool = True,
    measure_latency: bool = True,
    from_sweep: str | Path | None = None,
    point: str | int | Mapping[str, float] | None = None,
) -> Result:
    """Make a model sparse and INT8 without training, and report what it cost.

    Parameters
    ----------
    model
        A model file (ONNX, OpenVINO IR, TensorFlow, TFLite, Paddle) or object. Never changed.
    calibration
        A few hundred unlabelled samples: image folder, ``.npz``, ``module:callable``, callable, iterable or
        ``nncf.Dataset``.
    validation
        Samples to judge on; without it the held-out slice of the calibration data judges.
    validation_labels, validation_split
        Labels (CSV with columns ``file,label[,split]`` or ``.npz``) and the split to select.
    metric
        Label metric that ``schedule.max_drop`` watches (agreement with the dense model without labels).
    recipe
        A recipe, its file or name, or a mapping of settings; None for ``default``.
    preprocess
        Preprocessing of images, in OpenVINO's words.
    engine
        Where calibration and validation run.
    ignored_scope
        Operators left dense and in floating point.
    keep_structure
        Change constants only: no BatchNorm fusing, no added bias.
    output
        Run directory; None writes nothing.
    output_format
        ``openvino`` writes IR whatever came in.
    resume, force
        Go on with the run in ``output``, or replace it.
    database
        Folder where solutions of layers are kept across runs and read where nothing that they depend on differs
        (made if absent); the result is the same with and without it.
    timings
        JSON or YAML file with the seconds of each layer at several densities, which a budget of latency counts in;
        without it they are measured here.
    threads
        Threads for inference and solvers; all processors by default. Results do not depend on it.
    progress
        Told about every long step.
    baseline_int8
        Also quantize the dense model, so that the report shows which of the two steps cost accuracy.
    measure_latency
        Also measure the latency of every variant.
    from_sweep, point
        Write a point of this sweep at once (see :func:`~pot_sparsity.pipeline.sweeping.sweep.sweep`): allocation,
        zeros and solutions of its layers as the sweep found them, then the recipe's corrections, INT8, validation and
        report.
        ``point`` is its name, its number in the sweep's table, or what it must fulfil, such as ``{"max_drop": 1.0}``.
        ``recipe`` then stands for changes of the sweep's: ``{"reconstruction": {"input": "sparse"}, "finish":
        {"activations": "helps"}}`` gives these zeros the full run.

    Returns
    -------
    Result

    Raises
    ------
    UserError
        Wrong usage or input; nothing has been written.
    AccuracyGateError
        No iteration respects ``schedule.max_drop``; the report is written, no model is.
    """
    chosen = None if from_sweep is None else choose(from_sweep, point)
    if chosen is None:
        settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    else:
        settings = chosen.settings(recipe, point)
        keep_structure = keep_structure or chosen.sweep.keep_structure
        database = database or chosen.database
    solver_options(settings)
    get_metric(metric)
    options = Options(
        metric,
        ignored_scope,
        keep_structure,
        output_format == "openvino",
        threads or os.cpu_count() or 1,
        baseline_int8,
        measure_latency,
        Database(None if database is None else Path(database)),
        None if chosen is None else chosen.zeros,
        timings=given_timings(timings, settings.budget),
    )
    check_folders(output, database)
    folder = RunFolder(None if output is None else Path(output), resume=resume, force=force)
    sources = Sources(model, calibration, validation, validation_labels, validation_split, preprocess, engine)
    job = load_job(sources, settings, options, folder, progress)
    if chosen is not None:
        chosen.check(job)
    with folder.logging(), ExitStack() as stack:
        if chosen is None:
            return Run(job, stack).execute()
        job.recorder.decide(chosen.decision)
        try:
            return Run(job, stack).execute()
        except AccuracyGateError as error:
            raise AccuracyGateError(
                f"point {chosen.point.id} of the sweep: {error}; or name a less sparse point with --point"
            ) from error
