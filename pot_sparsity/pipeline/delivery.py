"""From sparse iterations to what the user gets: INT8, comparison of all variants, files and the report."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import openvino as ov

from pot_sparsity.data import spread
from pot_sparsity.errors import AccuracyGateError, PotSparsityError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import count_zeros
from pot_sparsity.pipeline.bits.mixed import with_integers
from pot_sparsity.pipeline.candidates import Candidates, InOrder
from pot_sparsity.pipeline.compress import Compressed
from pot_sparsity.pipeline.evaluate import Evaluation, Evaluator, measure_latency
from pot_sparsity.pipeline.int8 import Placing, quantize_best
from pot_sparsity.pipeline.job import Job
from pot_sparsity.pipeline.prepare import Prepared, output_difference
from pot_sparsity.pipeline.reporting import Outcome, build_report, variant
from pot_sparsity.pipeline.runfolder import write_text, writing
from pot_sparsity.quantization import convert_to_openvino, lost_zeros
from pot_sparsity.report.io import write_report
from pot_sparsity.report.schema import Decision, Iteration, Report

#: Calibration samples that choose between quantizer settings.
_INT8_JUDGES = 512
#: Largest relative L2 difference between a model in memory and the file read back.
_RELOADED = 1e-3


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


class Delivery:
    """Finishes a job once its sparse iterations are done.

    Parameters
    ----------
    job
        The job.
    prepared
        The model the iterations started from.
    evaluator
        Measures on the validation samples.
    placing
        What placing weights on the quantizer's grid needs.
    stack
        Frees what is kept.
    """

    def __init__(
        self, job: Job, prepared: Prepared, evaluator: Evaluator, placing: Placing, stack: ExitStack
    ) -> None:
        self.job = job
        self.prepared = prepared
        self.evaluator = evaluator
        self._placing = placing
        self._stack = stack
        self._judge_of_int8: Evaluator | None = None

    def finish(
        self,
        iterations: list[Iteration],
        accepted: list[tuple[Compressed, Evaluation]],
    ) -> Result:
        """Deliver the last accepted iteration that respects the limit in INT8 too."""
        return self.finish_best(InOrder(iterations, accepted))

    def finish_best(self, candidates: Candidates) -> Result:
        """Quantize the sparsest candidate that respects the limit in INT8 too, write and report."""
        drops = []
        while (candidate := candidates.best()) is not None:
            compressed, found = candidate.compressed, candidate.found
            final, final_found = self._quantized(compressed, found)
            drop = self.job.drop(self.evaluator.dense, final_found)
            if drop is None or self.job.accepts(drop):
                return self._deliver(
                    candidates.iterations, candidate.index, compressed, found, final, final_found
                )
            drops.append(drop)
            candidates.refuse(candidate, drop)
            self.job.recorder.decide(
                Decision(
                    what=f"iteration {candidate.index}",
                    kept=False,
                    before=self.job.recipe.schedule.max_drop,
                    after=drop,
                    measure=f"drop of {self.job.watched} after INT8",
                    reason="INT8 on top drops too far: a less sparse iteration is tried",
                )
            )
        iterations = candidates.iterations
        drops += [item.drop for item in iterations if item.drop is not None and not item.accepted]
        edits = tuple(self.prepared.model.edits)
        outcome = Outcome(
            self.prepared, self.evaluator, iterations, None, None, [], (), self.job.watched, edits
        )
        report = self._report("gate_not_met", outcome)
        self._write_reports(report)
        self.job.folder.finish_state()
        raise AccuracyGateError(
            f"no iteration keeps {self.job.watched} within {self.job.recipe.schedule.max_drop} points of the "
            f"dense model (closest: {min(drops):.2f}); allow a larger --max-drop or start from a lower sparsity; "
            "no model was written"
        )

    def _quantized(self, compressed: Compressed, found: Evaluation) -> tuple[Model, Evaluation]:
        sparse = compressed.model
        source = convert_to_openvino(sparse) if self.job.options.to_openvino else sparse
        if self.job.recipe.mixed.enabled:
            with self.job.recorder.stage("integer weights"):
                final = with_integers(source, compressed.solutions)
                return final, self.evaluator(final, exact=False)
        if not self.job.recipe.quantization.enabled:
            return source, found
        with self.job.recorder.stage("quantization") as note:
            final = self._int8(source, "sparse INT8")
            lost = lost_zeros(source, final)
            if lost:
                raise AssertionError(f"quantization changed zeros: {lost}")
            result = self.evaluator(final, exact=False)
            note.before, note.after = found.metrics, result.metrics
        return final, result

    def _int8_judge(self) -> Evaluator:
        """Calibration samples judge quantizers: ranges have too few degrees of freedom to overfit them."""
        if self._judge_of_int8 is None:
            some = spread(self.job.samples, _INT8_JUDGES)
            self._judge_of_int8 = self.job.evaluator(some, "Judging quantizers")
            self._stack.callback(self._judge_of_int8.close)
        return self._judge_of_int8

    def _int8(self, model: Model, what: str) -> Model:
        return quantize_best(
            model,
            self.job.samples,
            self.job.recipe.quantization,
            self._int8_judge(),
            placing=self._placing,
            ignored_scope=self.job.options.ignored_scope,
            what=what,
            recorder=self.job.recorder,
            progress=self.job.progress,
        )

    def _deliver(
        self,
        iterations: list[Iteration],
        chosen: int,
        compressed: Compressed,
        found: Evaluation,
        final: Model,
        final_found: Evaluation,
    ) -> Result:
        mixed = self.job.recipe.mixed.enabled
        int8 = self.job.recipe.quantization.enabled and not mixed
        sparse = convert_to_openvino(compressed.model) if self.job.options.to_openvino else compressed.model
        models: list[tuple[str, Model, Evaluation]] = [("dense", self.job.original, self.evaluator.dense)]
        if self.job.recipe.quantization.enabled and self.job.options.baseline_int8:
            with self.job.recorder.stage("dense INT8 baseline"):
                baseline = self._int8(self.prepared.model, "dense INT8")
                models.append(("dense_int8", baseline, self.evaluator(baseline, exact=False)))
        models.append(("mixed", final, final_found) if mixed else ("sparse", sparse, found))
        if int8:
            models.append(("sparse_int8", final, final_found))
        latencies: list[float | None] = [None] * len(models)
        if self.job.options.measure_latency:
            with self.job.recorder.stage("latency"):
                latencies = list(
                    measure_latency(self.job.engine, [model for _, model, _ in models], self.job.validation)
                )
        files: tuple[Path, ...] = ()
        with tempfile.TemporaryDirectory(prefix="pot-sparsity-") as scratch:
            variants = [
                variant(
                    name,
                    model,
                    self.prepared,
                    evaluation,
                    self.evaluator.dense,
                    latency,
                    Path(scratch) / name,
                )
                for (name, model, evaluation), latency in zip(models, latencies, strict=True)
            ]
        with self.job.recorder.stage("writing"):
            if self.job.folder.path is not None:
                if int8:
                    self._write(sparse, "float")
                files = self._write(final, None)
        outcome = Outcome(
            self.prepared,
            self.evaluator,
            iterations,
            chosen,
            compressed,
            variants,
            files,
            self.job.watched,
            tuple(final.edits),
        )
        report = self._report("done", outcome)
        self._write_reports(report)
        self.job.folder.finish_state()
        return Result(final.native, sparse.native, report, self.job.folder.path, files)

    def _write(self, model: Model, part: str | None) -> tuple[Path, ...]:
        """Write a model, read it back, and take it away again if what was read is not what was meant."""
        files = self.job.folder.save(model, part)
        reloaded = load_model(next(path for path in files if path.suffix in (".onnx", ".xml")))
        difference = output_difference(model, reloaded, self.job.engine, self.job.samples)
        zeros = [
            sum(count_zeros(each, layer) for layer in find_layers(each.graph).layers)
            for each in (model, reloaded)
        ]
        if not difference <= _RELOADED or zeros[0] != zeros[1]:
            for path in files:
                path.unlink(missing_ok=True)
            raise PotSparsityError(
                f"the model read back from {files[0].name!r} differs from the one written: outputs by "
                f"{difference:.1e} (relative L2), {zeros[1]} zeros instead of {zeros[0]}"
            )
        for note in model.notes:
            self.job.recorder.warn(note)
        return files

    def _report(self, status: Literal["done", "gate_not_met"], outcome: Outcome) -> Report:
        return build_report(
            status,
            outcome,
            recipe=self.job.recipe,
            original=self.job.original,
            engine=self.job.engine.name,
            counts=(
                len(self.job.samples),
                len(self.job.fit),
                len(self.job.held_out or ()),
                len(self.job.validation),
            ),
            labels=self.job.validation.has_labels,
            recorder=self.job.recorder,
            folder=self.job.folder.path,
            costs=self.job.costs,
        )

    def _write_reports(self, report: Report) -> None:
        path = self.job.folder.path
        if path is None:
            return
        write_text(path / "recipe.yaml", self.job.recipe.dump())
        with writing(path):
            write_report(report, path)
