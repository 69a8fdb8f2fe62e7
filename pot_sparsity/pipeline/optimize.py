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

from pot_sparsity.data import DataSource, Preprocess, load_dataset, load_preprocess
from pot_sparsity.errors import UserError
from pot_sparsity.graph.load import load_model
from pot_sparsity.metrics import get_metric
from pot_sparsity.pipeline.delivery import Result
from pot_sparsity.pipeline.job import Job, Options
from pot_sparsity.pipeline.progress import Progress, Silent
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import solver_options
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
    threads: int | None = None,
    progress: Progress | None = None,
    baseline_int8: bool = True,
    measure_latency: bool = True,
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
    threads
        Threads for inference and solvers; all processors by default. Results do not depend on it.
    progress
        Told about every long step.
    baseline_int8
        Also quantize the dense model, so that the report shows which of the two steps cost accuracy.
    measure_latency
        Also measure the latency of every variant.

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
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
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
    )
    folder = RunFolder(None if output is None else Path(output), resume=resume, force=force)
    original = load_model(model)
    if engine == "onnxruntime" and (options.to_openvino or original.format == "openvino"):
        raise UserError(
            "--engine onnxruntime runs ONNX models only: use --engine openvino to read or write IR"
        )
    images = load_preprocess(preprocess)
    inputs = input_specs(original)
    samples = load_dataset(
        calibration, inputs, images, samples=settings.calibration.samples, seed=settings.seed
    )
    judged = (
        None
        if validation is None
        else load_dataset(
            validation,
            inputs,
            images,
            labels=None if validation_labels is None else Path(validation_labels),
            split=validation_split,
        )
    )
    job = Job(settings, options, folder, original, samples, judged, engine, progress or Silent())
    with folder.logging(), ExitStack() as stack:
        return Run(job, stack).execute()
