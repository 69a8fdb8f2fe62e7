"""The main job: prune, correct, quantize and validate one exported model, and report on it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nncf
import numpy as np
import onnx
import openvino as ov

from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.algorithms.schedule import cubic_schedule
from pot_sparsity.data import (
    Augmented,
    Dataset,
    DataSource,
    Preprocess,
    load_dataset,
    load_preprocess,
    split_holdout,
)
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import AccuracyGateError, RecipeError, UserError
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import METRICS, get_metric
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.compress import Compressed, Surroundings, allocate, compress
from pot_sparsity.pipeline.evaluate import Evaluation, Evaluator, measure_latency
from pot_sparsity.pipeline.int8 import Placing, quantize_best
from pot_sparsity.pipeline.moments_state import load_moments, store_moments
from pot_sparsity.pipeline.prepare import Prepared, prepare
from pot_sparsity.pipeline.progress import Progress, Silent
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.reporting import Outcome, build_report, fingerprint, input_specs, variant
from pot_sparsity.pipeline.runfolder import RunFolder, write_text, writing
from pot_sparsity.pipeline.solve import read_dense, scarce, solver_options
from pot_sparsity.quantization import convert_to_openvino, lost_zeros
from pot_sparsity.recipe import Recipe, load_recipe
from pot_sparsity.report.io import write_report
from pot_sparsity.report.schema import Decision, Iteration, Report

#: Calibration samples that choose between quantizer settings.
_INT8_JUDGES = 512

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What :func:`optimize` returns.

    Attributes
    ----------
    model
        The final model: sparse, and INT8 unless that was switched off.
    sparse_model
        The sparse model in floating point.
    report
        Everything the run did, decided and measured.
    folder
        The run directory, or None.
    files
        Files of the final model.
    """

    model: onnx.ModelProto | ov.Model
    sparse_model: onnx.ModelProto | ov.Model
    report: Report
    folder: Path | None
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Options:
    metric: str
    ignored_scope: nncf.IgnoredScope | None
    keep_structure: bool
    to_openvino: bool
    threads: int
    baseline_int8: bool
    measure_latency: bool


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
    options = _Options(
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
    run = _Run(settings, options, folder, original, samples, judged, engine, progress or Silent())
    with folder.logging(), ExitStack() as stack:
        return run.execute(stack)


class _Run:
    """One execution: holds what all steps share, so that each step fits a screen."""

    def __init__(
        self,
        recipe: Recipe,
        options: _Options,
        folder: RunFolder,
        original: Model,
        samples: Dataset,
        validation: Dataset | None,
        engine: Literal["openvino", "onnxruntime"],
        progress: Progress,
    ) -> None:
        self.recipe = recipe
        self.options = options
        self.folder = folder
        self.original = original
        self.samples = samples
        self.engine = get_engine(engine, threads=options.threads)
        self.progress = progress
        self.recorder = Recorder()
        fit, held_out = split_holdout(samples, recipe.calibration.holdout, recipe.seed)
        self.held_out = held_out if recipe.calibration.holdout > 0 and len(samples) > 1 else None
        self.fit: Dataset = fit if self.held_out is not None else samples
        if recipe.calibration.augment and recipe.calibration.augment_factor > 1:
            self.fit = Augmented(
                self.fit, recipe.calibration.augment, recipe.calibration.augment_factor, recipe.seed
            )
        self.judging = self.held_out or samples
        self.validation = validation or self.judging
        self._judge_of_int8: Evaluator | None = None
        self._placing: Placing | None = None
        self._stack = ExitStack()
        self.watched = options.metric if self.validation.has_labels else "agreement"

    def execute(self, stack: ExitStack) -> Result:
        """All stages, in order; ``stack`` frees what they keep."""
        self._stack = stack
        recorder = self.recorder
        with recorder.stage("dense evaluation") as note:
            evaluator = self._evaluator(self.validation, "Validating")
            stack.callback(evaluator.close)
            note.after = evaluator.dense.metrics
        if self.watched not in evaluator.dense.metrics and "detection_agreement" in evaluator.dense.metrics:
            self.watched = "detection_agreement"
        if self.recipe.schedule.max_drop is not None and self.watched not in evaluator.dense.metrics:
            raise RecipeError(
                "max_drop needs labels, or an output of class scores or detections to agree on; this model has neither"
            )
        with recorder.stage("preparation"):
            prepared = prepare(
                self.original,
                self.recipe,
                self.engine,
                self.samples,
                ignored_scope=self.options.ignored_scope,
                keep_structure=self.options.keep_structure,
            )
            for text in prepared.warnings:
                recorder.warn(text)
            dense = read_dense(prepared.model, prepared.layers)
            zeros = sum(int((item.weight == 0).sum()) for item in dense)
            if zeros > self.recipe.sparsity * sum(item.layer.size for item in dense):
                recorder.warn(
                    f"the model already has {zeros} zero weights, more than asked for: they stay zero"
                )
            # What it refuses is said before anything is written.
            allocate(dense, self.recipe, self._sparsities()[-1])
        mark = {} if self.folder.path is None else self._fingerprint()
        self.folder.check_resumable(mark)
        with recorder.stage("moments"):
            moments = load_moments(self.folder, "moments", prepared.layers)
            if moments is None:
                moments = self._collect(prepared, prepared.layers, self.fit)
            few = [item.layer for item in dense if scarce(item, moments[item.layer.name])]
            held = load_moments(self.folder, "held-out moments", few)
            if held is None:
                held = self._collect(prepared, few, self.held_out) if self.held_out and few else {}
        if self.judging is self.validation:
            judge = evaluator
        else:
            judge = self._evaluator(self.judging, "Judging")
            stack.callback(judge.close)
        self._placing = Placing(moments, judge, self.options.threads)
        self.folder.open(mark)
        store_moments(self.folder, "moments", moments)
        store_moments(self.folder, "held-out moments", held)
        around = Surroundings(
            prepared,
            dense,
            moments,
            held,
            self.fit,
            self.held_out,
            self.engine,
            self.recipe,
            self.options.threads,
            self.folder,
            recorder,
            self.progress,
            judge,
        )
        return self._finish(prepared, evaluator, *self._iterate(around, evaluator))

    def _fingerprint(self) -> dict[str, object]:
        options = self.options
        return fingerprint(
            self.original,
            self.recipe,
            self.samples,
            self.validation,
            self.engine.name,
            options.metric,
            options.ignored_scope,
            options.keep_structure,
            options.to_openvino,
        )

    def _collect(self, prepared: Prepared, layers: Sequence[Layer], dataset: Dataset) -> dict[str, Moments]:
        return collect_moments(
            prepared.model,
            layers,
            self.engine,
            dataset,
            batch_size=self.recipe.calibration.batch_size,
            threads=self.options.threads,
            max_positions=self.recipe.calibration.max_positions,
            progress=self.progress,
        )

    def _evaluator(self, dataset: Dataset, what: str) -> Evaluator:
        """Judging takes moments and happens often: only validation shows a bar."""
        names = dict.fromkeys((self.options.metric, *METRICS))
        return Evaluator(
            self.engine,
            dataset,
            self.original,
            tuple(names),
            self.recipe.calibration.batch_size,
            self.progress if dataset is self.validation else Silent(),
            what,
        )

    def _sparsities(self) -> list[float]:
        schedule, target = self.recipe.schedule, self.recipe.sparsity
        if schedule.kind == "one_shot" or (schedule.kind == "auto" and schedule.max_drop is None):
            return [target]
        try:
            return cubic_schedule(min(schedule.initial, target), target, schedule.iterations)
        except ValueError as error:
            raise RecipeError(f"schedule: {error}") from None

    def _drop(self, dense: Evaluation, found: Evaluation) -> float | None:
        if self.watched not in dense.metrics:
            return None
        return dense.metrics[self.watched] - found.metrics[self.watched]

    def _accepts(self, drop: float | None) -> bool:
        limit = self.recipe.schedule.max_drop
        return limit is None or drop is None or drop <= limit + 1e-9

    def _iterate(
        self, around: Surroundings, evaluator: Evaluator
    ) -> tuple[list[Iteration], list[tuple[Compressed, Evaluation]]]:
        """All iterations up to the target or the first that drops too far, and those accepted, in order."""
        iterations: list[Iteration] = []
        accepted: list[tuple[Compressed, Evaluation]] = []
        for index, sparsity in enumerate(self._sparsities()):
            compressed = compress(around, sparsity, f"iteration-{sparsity!r}")
            with self.recorder.stage("validation of the sparse model") as note:
                found = evaluator(compressed.model)
                note.before, note.after = evaluator.dense.metrics, found.metrics
            drop = self._drop(evaluator.dense, found)
            good = self._accepts(drop)
            iterations.append(
                Iteration(
                    index=index,
                    sparsity=sparsity,
                    zeros=sum(int((s.weight == 0).sum()) for s in compressed.solutions.values()),
                    metrics=found.metrics,
                    drop=drop,
                    accepted=good,
                )
            )
            if not good:
                break
            if self.recipe.schedule.max_drop is None:
                accepted.clear()
            accepted.append((compressed, found))
        return iterations, accepted

    def _finish(
        self,
        prepared: Prepared,
        evaluator: Evaluator,
        iterations: list[Iteration],
        accepted: list[tuple[Compressed, Evaluation]],
    ) -> Result:
        """Quantize the sparsest accepted iteration that respects the limit in INT8 too, write and report."""
        offset = sum(1 for item in iterations if item.accepted) - len(accepted)
        drops = [item.drop for item in iterations if item.drop is not None and not item.accepted]
        for position in range(len(accepted) - 1, -1, -1):
            compressed, found = accepted[position]
            final, final_found = self._quantized(compressed.model, evaluator, found)
            drop = self._drop(evaluator.dense, final_found)
            if self._accepts(drop):
                return self._deliver(
                    prepared, evaluator, iterations, position + offset, compressed, found, final, final_found
                )
            drops += [] if drop is None else [drop]
            self.recorder.decide(
                Decision(
                    what=f"iteration {position + offset}",
                    kept=False,
                    before=self.recipe.schedule.max_drop,
                    after=drop,
                    measure=f"drop of {self.watched} after INT8",
                    reason="INT8 on top drops too far: an earlier iteration is tried",
                )
            )
        outcome = Outcome(prepared, evaluator, iterations, None, None, [], (), self.watched)
        report = self._report("gate_not_met", outcome)
        self._write_reports(report)
        self.folder.finish_state()
        raise AccuracyGateError(
            f"no iteration keeps {self.watched} within {self.recipe.schedule.max_drop} points of the dense model "
            f"(closest: {min(drops):.2f}); allow a larger --max-drop or start from a lower sparsity; "
            "no model was written"
        )

    def _quantized(self, sparse: Model, evaluator: Evaluator, found: Evaluation) -> tuple[Model, Evaluation]:
        source = convert_to_openvino(sparse) if self.options.to_openvino else sparse
        if not self.recipe.quantization.enabled:
            return source, found
        with self.recorder.stage("quantization") as note:
            final = self._int8(source, "sparse INT8")
            lost = lost_zeros(source, final)
            if lost:
                raise AssertionError(f"quantization changed zeros: {lost}")
            result = evaluator(final, exact=False)
            note.before, note.after = found.metrics, result.metrics
        return final, result

    def _int8_judge(self) -> Evaluator:
        """Calibration samples judge quantizers: ranges have too few degrees of freedom to overfit them."""
        if self._judge_of_int8 is None:
            some = np.linspace(0, len(self.samples) - 1, min(len(self.samples), _INT8_JUDGES)).astype(
                np.int64
            )
            self._judge_of_int8 = self._evaluator(self.samples.subset(some), "Judging quantizers")
            self._stack.callback(self._judge_of_int8.close)
        return self._judge_of_int8

    def _int8(self, model: Model, what: str) -> Model:
        assert self._placing is not None
        return quantize_best(
            model,
            self.samples,
            self.recipe.quantization,
            self._int8_judge(),
            placing=self._placing,
            ignored_scope=self.options.ignored_scope,
            what=what,
            recorder=self.recorder,
            progress=self.progress,
        )

    def _deliver(
        self,
        prepared: Prepared,
        evaluator: Evaluator,
        iterations: list[Iteration],
        chosen: int,
        compressed: Compressed,
        found: Evaluation,
        final: Model,
        final_found: Evaluation,
    ) -> Result:
        int8 = self.recipe.quantization.enabled
        sparse = convert_to_openvino(compressed.model) if self.options.to_openvino else compressed.model
        models: list[tuple[str, Model, Evaluation]] = [("dense", self.original, evaluator.dense)]
        if int8 and self.options.baseline_int8:
            with self.recorder.stage("dense INT8 baseline"):
                baseline = self._int8(prepared.model, "dense INT8")
                models.append(("dense_int8", baseline, evaluator(baseline, exact=False)))
        models.append(("sparse", sparse, found))
        if int8:
            models.append(("sparse_int8", final, final_found))
        latencies: list[float | None] = [None] * len(models)
        if self.options.measure_latency:
            with self.recorder.stage("latency"):
                latencies = list(
                    measure_latency(self.engine, [model for _, model, _ in models], self.validation)
                )
        files: tuple[Path, ...] = ()
        with tempfile.TemporaryDirectory(prefix="pot-sparsity-") as scratch:
            variants = [
                variant(name, model, prepared, evaluation, evaluator.dense, latency, Path(scratch) / name)
                for (name, model, evaluation), latency in zip(models, latencies, strict=True)
            ]
        with self.recorder.stage("writing"):
            if self.folder.path is not None:
                if int8:
                    self.folder.save(sparse, "float")
                files = self.folder.save(final, None)
        outcome = Outcome(prepared, evaluator, iterations, chosen, compressed, variants, files, self.watched)
        report = self._report("done", outcome)
        self._write_reports(report)
        self.folder.finish_state()
        return Result(final.native, sparse.native, report, self.folder.path, files)

    def _report(self, status: Literal["done", "gate_not_met"], outcome: Outcome) -> Report:
        return build_report(
            status,
            outcome,
            recipe=self.recipe,
            original=self.original,
            engine=self.engine.name,
            counts=(len(self.samples), len(self.fit), len(self.held_out or ()), len(self.validation)),
            labels=self.validation.has_labels,
            recorder=self.recorder,
            folder=self.folder.path,
        )

    def _write_reports(self, report: Report) -> None:
        path = self.folder.path
        if path is None:
            return
        write_text(path / "recipe.yaml", self.recipe.dump())
        with writing(path):
            write_report(report, path)
