"""One execution, from the dense evaluation to the sparse iterations; delivery takes over from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.algorithms.schedule import cubic_schedule
from pot_sparsity.data import Dataset
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.layers import Layer
from pot_sparsity.pipeline.allocate import allocate, needs_curves
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.compress import Compressed, Surroundings, compress
from pot_sparsity.pipeline.curves import measure_curves, sample_number
from pot_sparsity.pipeline.delivery import Delivery, Result
from pot_sparsity.pipeline.evaluate import Evaluation, Evaluator
from pot_sparsity.pipeline.int8 import Placing
from pot_sparsity.pipeline.job import Job
from pot_sparsity.pipeline.moments_state import load_moments, store_moments
from pot_sparsity.pipeline.prepare import Prepared, prepare
from pot_sparsity.pipeline.reporting import fingerprint
from pot_sparsity.pipeline.solve import DenseLayer, Solution, read_dense, scarce
from pot_sparsity.report.schema import Iteration


class Run:
    """Runs a job; ``stack`` frees what its stages keep."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self.job = job
        self._stack = stack

    def execute(self) -> Result:
        """All stages, in order."""
        stack = self._stack
        recorder = self.job.recorder
        with recorder.stage("dense evaluation") as note:
            evaluator = self.job.evaluator(self.job.validation, "Validating")
            stack.callback(evaluator.close)
            note.after = evaluator.dense.metrics
        if (
            self.job.watched not in evaluator.dense.metrics
            and "detection_agreement" in evaluator.dense.metrics
        ):
            self.job.watched = "detection_agreement"
        if self.job.recipe.schedule.max_drop is not None and self.job.watched not in evaluator.dense.metrics:
            raise RecipeError(
                "max_drop needs labels, or an output of class scores or detections to agree on; this model has neither"
            )
        with recorder.stage("preparation"):
            prepared = prepare(
                self.job.original,
                self.job.recipe,
                self.job.engine,
                self.job.samples,
                ignored_scope=self.job.options.ignored_scope,
                keep_structure=self.job.options.keep_structure,
            )
            for text in prepared.warnings:
                recorder.warn(text)
            dense = read_dense(prepared.model, prepared.layers)
            zeros = sum(int((item.weight == 0).sum()) for item in dense)
            if zeros > self.job.recipe.sparsity * sum(item.layer.size for item in dense):
                recorder.warn(
                    f"the model already has {zeros} zero weights, more than asked for: they stay zero"
                )
            # What it refuses is said before anything is written.
            allocate(dense, self.job.recipe, self._sparsities()[-1])
        mark = {} if self.job.folder.path is None else self._fingerprint()
        self.job.folder.check_resumable(mark)
        with recorder.stage("moments"):
            moments = load_moments(self.job.folder, "moments", prepared.layers)
            if moments is None:
                moments = self._collect(prepared, prepared.layers, self.job.fit)
            few = [item.layer for item in dense if scarce(item, moments[item.layer.name])]
            held = load_moments(self.job.folder, "held-out moments", few)
            if held is None:
                held = self._collect(prepared, few, self.job.held_out) if self.job.held_out and few else {}
        if self.job.judging is self.job.validation:
            judge = evaluator
        else:
            judge = self.job.evaluator(self.job.judging, "Judging")
            stack.callback(judge.close)
        self.job.folder.open(mark)
        store_moments(self.job.folder, "moments", moments)
        store_moments(self.job.folder, "held-out moments", held)
        around = Surroundings(
            prepared,
            dense,
            moments,
            held,
            self.job.fit,
            self.job.held_out,
            self.job.engine,
            self.job.recipe,
            self.job.options.threads,
            self.job.folder,
            recorder,
            self.job.progress,
            judge,
            self._curves(prepared, dense, moments, held, judge),
        )
        delivery = Delivery(
            self.job, prepared, evaluator, Placing(moments, judge, self.job.options.threads), stack
        )
        return delivery.finish(*self._iterate(around, evaluator))

    def _fingerprint(self) -> dict[str, object]:
        options = self.job.options
        return fingerprint(
            self.job.original,
            self.job.recipe,
            self.job.samples,
            self.job.validation,
            self.job.engine.name,
            options.metric,
            options.ignored_scope,
            options.keep_structure,
            options.to_openvino,
        )

    def _collect(self, prepared: Prepared, layers: Sequence[Layer], dataset: Dataset) -> dict[str, Moments]:
        return collect_moments(
            prepared.model,
            layers,
            self.job.engine,
            dataset,
            batch_size=self.job.recipe.calibration.batch_size,
            threads=self.job.options.threads,
            max_positions=self.job.recipe.calibration.max_positions,
            progress=self.job.progress,
        )

    def _curves(
        self,
        prepared: Prepared,
        dense: Sequence[DenseLayer],
        moments: Mapping[str, Moments],
        held: Mapping[str, Moments],
        judge: Evaluator,
    ) -> dict[str, Curve]:
        """Rate-distortion curves, where the allocation wants them and the output has a distance."""
        if not needs_curves(self.job.recipe):
            return {}
        if "detection_overlap" in judge.dense.metrics:
            self.job.recorder.warn(
                "lists of detections have no smooth distance: zeros are allocated by L2-normalised magnitude"
            )
            return {}
        with self.job.recorder.stage("curves"):
            return measure_curves(
                prepared.model,
                dense,
                moments,
                held,
                self._measured_on(
                    max(
                        prepared.model.batch_size or 1,
                        sample_number(dense, moments, len(self.job.fit), self.job.recipe),
                    ),
                    few=bool(held),
                ),
                self.job.engine,
                self.job.recipe,
                threads=self.job.options.threads,
                folder=self.job.folder,
                progress=self.job.progress,
            )

    def _measured_on(self, most: int, *, few: bool) -> Dataset:
        """Samples for curves: any, unless fits to few samples would look better on those than they are."""
        samples = self.job.held_out if few and self.job.held_out is not None else self.job.fit
        number = min(len(samples), most)
        return samples.subset(np.linspace(0, len(samples) - 1, number).astype(np.int64))

    def _sparsities(self) -> list[float]:
        schedule, target = self.job.recipe.schedule, self.job.recipe.sparsity
        if schedule.kind == "one_shot" or (schedule.kind == "auto" and schedule.max_drop is None):
            return [target]
        try:
            return cubic_schedule(min(schedule.initial, target), target, schedule.iterations)
        except ValueError as error:
            raise RecipeError(f"schedule: {error}") from None

    def _iterate(
        self, around: Surroundings, evaluator: Evaluator
    ) -> tuple[list[Iteration], list[tuple[Compressed, Evaluation]]]:
        """All iterations up to the target or the first that drops too far, and those accepted, in order."""
        iterations: list[Iteration] = []
        accepted: list[tuple[Compressed, Evaluation]] = []
        previous: dict[str, Solution] | None = None
        for index, sparsity in enumerate(self._sparsities()):
            compressed = compress(around, sparsity, f"iteration-{sparsity!r}", previous)
            with self.job.recorder.stage("validation of the sparse model") as note:
                found = evaluator(compressed.model)
                note.before, note.after = evaluator.dense.metrics, found.metrics
            drop = self.job.drop(evaluator.dense, found)
            good = self.job.accepts(drop)
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
            if self.job.recipe.schedule.max_drop is None:
                accepted.clear()
            accepted.append((compressed, found))
            if self.job.recipe.schedule.start == "previous":
                previous = compressed.solutions
        return iterations, accepted
