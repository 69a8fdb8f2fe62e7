"""One execution, from the dense evaluation to the sparse iterations; delivery takes over from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.algorithms.schedule import cubic_schedule
from pot_sparsity.data import Dataset, filled, spread
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.allocation.allocate import allocate, check_budget, needs_curves
from pot_sparsity.pipeline.allocation.curves import measure_curves, sample_number
from pot_sparsity.pipeline.allocation.probes import noise_like
from pot_sparsity.pipeline.allocation.rounds import is_iterative, round_sparsities
from pot_sparsity.pipeline.allocation.targets import Target, budget_targets, find_costs, keep_timings
from pot_sparsity.pipeline.allocation.timings import Timings
from pot_sparsity.pipeline.bisection import Bisected, bisects
from pot_sparsity.pipeline.bits.bit_levels import BOPS, measure_bits
from pot_sparsity.pipeline.bits.mixed import check_bits, compress_bits, report_choices
from pot_sparsity.pipeline.candidates import try_target
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.compress import Compressed, Surroundings
from pot_sparsity.pipeline.delivery import Delivery, Result
from pot_sparsity.pipeline.evaluate import Evaluation, Evaluator
from pot_sparsity.pipeline.int8 import Placing
from pot_sparsity.pipeline.intake import check_zeros
from pot_sparsity.pipeline.job import Job
from pot_sparsity.pipeline.moments_state import load_moments, store_moments
from pot_sparsity.pipeline.prepare import Prepared, prepare
from pot_sparsity.pipeline.priors import layers_before_pooling, with_priors
from pot_sparsity.pipeline.reporting import fingerprint
from pot_sparsity.pipeline.solve import DenseLayer, Solution, read_dense, scarce
from pot_sparsity.report.schema import Iteration

#: Moments in the run folder: of what layers are fitted to, of held-out samples, and of single positions.
_MOMENTS, _HELD_OUT, _POSITIONS = "moments", "held-out moments", "moments before pooling"


@dataclass(frozen=True)
class _Seen:
    """Layers and what their inputs were like: for the fits, for judging those of few samples, and for priors."""

    dense: Sequence[DenseLayer]
    moments: Mapping[str, Moments]
    held: Mapping[str, Moments]
    positions: Mapping[str, Moments]


class Run:
    """Runs a job; ``stack`` frees what its stages keep."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self.job = job
        self._stack = stack

    def execute(self) -> Result:
        """All stages, in order."""
        mixed = self.job.recipe.mixed.enabled
        around, evaluator = self.surroundings(curves=self.job.options.given is None and not mixed)
        delivery = self.delivery(around, evaluator)
        try:
            if mixed:
                return delivery.finish(*self._mixed(around, evaluator))
            if bisects(self.job.recipe):
                return delivery.finish_best(Bisected(self.job, around, evaluator))
            return delivery.finish(*self._iterate(around, evaluator))
        finally:
            around.database.report()

    def delivery(self, around: Surroundings, evaluator: Evaluator) -> Delivery:
        """What finishes the job; ``evaluator`` measures on the validation samples."""
        placing = Placing(around.moments, around.judge, self.job.options.threads)
        return Delivery(self.job, around.prepared, evaluator, placing, self._stack)

    def surroundings(self, *, curves: bool = True) -> tuple[Surroundings, Evaluator]:
        """All that comes before the first allocation, and the evaluator on the validation samples.

        Without ``curves`` no rate-distortion curves are measured. The run folder is made once nothing is left that
        can be refused.
        """
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
            dense = read_dense(prepared.model, prepared.layers, prepared.gains)
            zeros = sum(int((item.weight == 0).sum()) for item in dense)
            asked = 1.0 if self.job.recipe.budget else self.job.recipe.sparsity
            if zeros > asked * sum(item.layer.size for item in dense):
                recorder.warn(
                    f"the model already has {zeros} zero weights, more than asked for: they stay zero"
                )
        timings = self._find_costs(prepared.model, dense)
        # What it refuses is said before anything is written.
        if self.job.recipe.mixed.enabled:
            check_bits(prepared.model, dense, self.job.recipe, evaluator.dense.metrics)
        elif self.job.options.given is None:
            self._check_targets(dense)
        else:
            check_zeros(dense, self.job.options.given)
        mark = {} if self.job.folder.path is None else self._fingerprint()
        self.job.folder.check_resumable(mark)
        with recorder.stage("moments"):
            seen = self._seen(prepared, dense)
        if self.job.judging is self.job.validation:
            judge = evaluator
        else:
            judge = self.job.evaluator(self.job.judging, "Judging")
            stack.callback(judge.close)
        self.job.folder.open(mark)
        keep_timings(self.job.folder, timings)
        self._keep(seen)
        around = Surroundings(
            prepared,
            prepared.model,
            seen.dense,
            seen.moments,
            seen.held,
            self.job.fit,
            self.job.held_out,
            self.job.engine,
            self.job.recipe,
            self.job.options.threads,
            self.job.folder,
            recorder,
            self.job.progress,
            judge,
            self._curves(prepared.model, seen.dense, seen.moments, seen.held, judge) if curves else {},
            self.job.options.database,
            self.job.costs,
            self.job.options.given,
        )
        return around, evaluator

    def _seen(self, prepared: Prepared, dense: Sequence[DenseLayer], suffix: str = "") -> _Seen:
        """Moments of a model's layers, from the run folder if it has them; ``suffix`` tells iterations apart."""
        moments = load_moments(self.job.folder, _MOMENTS + suffix, prepared.layers)
        if moments is None:
            moments = self._collect(prepared, prepared.layers, self.job.fit)
        few = [item.layer for item in dense if scarce(item, moments[item.layer.name])]
        held = load_moments(self.job.folder, _HELD_OUT + suffix, few)
        if held is None:
            judging = self._held_out(prepared.model)
            held = self._collect(prepared, few, judging) if judging and few else {}
        pooled = layers_before_pooling(prepared.model.graph, few)
        positions = load_moments(self.job.folder, _POSITIONS + suffix, pooled)
        if positions is None:
            positions = self._collect(prepared, pooled, self.job.fit) if pooled else {}
        return _Seen(with_priors(dense, moments, positions), moments, held, positions)

    def _keep(self, seen: _Seen, suffix: str = "") -> None:
        store_moments(self.job.folder, _MOMENTS + suffix, seen.moments)
        store_moments(self.job.folder, _HELD_OUT + suffix, seen.held)
        store_moments(self.job.folder, _POSITIONS + suffix, seen.positions)

    def _mixed(
        self, around: Surroundings, evaluator: Evaluator
    ) -> tuple[list[Iteration], list[tuple[Compressed, Evaluation]]]:
        """The one iteration of a run that chooses bits layer by layer."""
        measured = measure_bits(around)
        chosen = measured.chosen(around.recipe.budget[BOPS])
        self.job.costs = measured.costs(chosen)
        report_choices(around, measured, chosen)
        compressed = compress_bits(around, measured, chosen, "bits").compressed
        with around.recorder.stage("validation of the few-bit model") as note:
            found = evaluator(compressed.model)
            note.before, note.after = evaluator.dense.metrics, found.metrics
        zeros = sum(int((s.weight == 0).sum()) for s in compressed.solutions.values())
        iteration = Iteration(
            index=0,
            sparsity=zeros / sum(item.layer.size for item in around.dense),
            zeros=zeros,
            metrics=found.metrics,
            drop=self.job.drop(evaluator.dense, found),
            accepted=True,
        )
        return [iteration], [(compressed, found)]

    def _find_costs(self, model: Model, dense: Sequence[DenseLayer]) -> Timings | None:
        """What the recipe's budgets count in (bits chosen layer by layer count otherwise); returns timings that were
        measured for that.
        """
        if not self.job.recipe.budget or self.job.recipe.mixed.enabled:
            return None
        self.job.costs, timings = find_costs(
            model,
            dense,
            self.job.samples,
            self.job.engine,
            self.job.recipe,
            self.job.options.timings,
            threads=self.job.options.threads,
            folder=self.job.folder,
            recorder=self.job.recorder,
        )
        return timings

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
            options.timings,
            *(() if options.given is None else (sorted(options.given.items()),)),
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
        model: Model,
        dense: Sequence[DenseLayer],
        moments: Mapping[str, Moments],
        held: Mapping[str, Moments],
        judge: Evaluator,
        key: str = "curves",
    ) -> dict[str, Curve]:
        """Rate-distortion curves of a model, where the allocation wants them and the output has a distance."""
        if not needs_curves(self.job.recipe):
            return {}
        if "detection_overlap" in judge.dense.metrics:
            self.job.recorder.warn(
                "lists of detections have no smooth distance: zeros are allocated by L2-normalised magnitude"
            )
            return {}
        number = sample_number(dense, moments, len(self.job.fit), self.job.recipe)
        curves: dict[str, Curve] = {}
        with self.job.recorder.stage("curves"):
            for few in (False, True):
                part = [item for item in dense if (item.layer.name in held) == few]
                if part:
                    curves |= measure_curves(
                        model,
                        part,
                        moments,
                        held,
                        self._measured_on(
                            max(model.batch_size or 1, number), self._held_out(model) if few else None
                        ),
                        self.job.engine,
                        self.job.recipe,
                        threads=self.job.options.threads,
                        folder=self.job.folder,
                        progress=self.job.progress,
                        prune=self.job.options.database.solve,
                        key=key,
                    )
        return curves

    def _held_out(self, model: Model) -> Dataset | None:
        """The held-out samples, enough of them for a model whose batch is fixed."""
        return None if self.job.held_out is None else filled(self.job.held_out, model.batch_size or 1)

    def _measured_on(self, most: int, held_out: Dataset | None) -> Dataset:
        """Samples for curves: any, or held-out ones where fits to few samples would look better than they are."""
        samples = held_out or self.job.fit
        if self.job.recipe.allocation.inputs == "noise":
            return noise_like(samples, most, self.job.recipe.seed)
        return spread(samples, most)

    def _based_on(self, around: Surroundings, model: Model, index: int) -> Surroundings:
        """As if a sparse model were the dense one: its own layers are pruned further, and fitted to its outputs."""
        suffix = f"-{index}"
        prepared = replace(around.prepared, model=model)
        with self.job.recorder.stage("moments"):
            seen = self._seen(prepared, read_dense(model, prepared.layers, prepared.gains), suffix)
        self._keep(seen, suffix)
        curves = (
            self._curves(model, seen.dense, seen.moments, seen.held, around.judge, f"curves{suffix}")
            if around.given is None
            else {}
        )
        return replace(
            around,
            prepared=prepared,
            dense=seen.dense,
            moments=seen.moments,
            held_moments=seen.held,
            curves=curves,
        )

    def _sparsities(self) -> list[float]:
        schedule, target = self.job.recipe.schedule, self.job.recipe.sparsity
        once = schedule.kind == "one_shot" or (schedule.kind == "auto" and schedule.max_drop is None)
        if once or bisects(self.job.recipe):
            return [target]
        try:
            return cubic_schedule(min(schedule.initial, target), target, schedule.iterations)
        except ValueError as error:
            raise RecipeError(f"schedule: {error}") from None

    def _rounds(self, dense: Sequence[DenseLayer]) -> list[float]:
        """Sparsity of every iteration."""
        if is_iterative(self.job.recipe) and self.job.recipe.schedule.kind != "cubic":
            return round_sparsities(dense, self.job.recipe)
        return self._sparsities()

    def _targets(self, dense: Sequence[DenseLayer]) -> list[Target]:
        """What every iteration is to reach."""
        if self.job.recipe.budget:
            targets = budget_targets(self.job.recipe)
        else:
            targets = [Target(sparsity) for sparsity in self._rounds(dense)]
        if self.job.recipe.schedule.start != "model":
            return targets
        return [*(target for target in targets[:-1] if target.asks), targets[-1]]

    def _check_targets(self, dense: Sequence[DenseLayer]) -> None:
        """Raise RecipeError for what no allocation can reach."""
        last = self._targets(dense)[-1]
        if self.job.costs is None:
            allocate(dense, self.job.recipe, last.sparsity)
        else:
            check_budget(dense, self.job.recipe, self.job.costs)

    def _measured_again(self, around: Surroundings, model: Model, key: str) -> Surroundings:
        """With the curves of a model that is pruned already: its output is what the next round stays close to."""
        dense = read_dense(model, around.prepared.layers, around.prepared.gains)
        curves = self._curves(model, dense, around.moments, around.held_moments, around.judge, key)
        return replace(around, curves=curves)

    def _iterate(
        self, around: Surroundings, evaluator: Evaluator
    ) -> tuple[list[Iteration], list[tuple[Compressed, Evaluation]]]:
        """All iterations up to the target or the first that drops too far, and those accepted, in order."""
        iterations: list[Iteration] = []
        accepted: list[tuple[Compressed, Evaluation]] = []
        previous: dict[str, Solution] | None = None
        iterative = is_iterative(self.job.recipe)
        start = self.job.recipe.schedule.start
        for index, target in enumerate(self._targets(around.dense)):
            if start == "model" and accepted:
                around = self._based_on(around, accepted[-1][0].model, index)
            elif iterative and accepted:
                around = self._measured_again(around, accepted[-1][0].model, f"curves-{index}")
            iteration, compressed, found = try_target(self.job, around, evaluator, target, index, previous)
            iterations.append(iteration)
            if not iteration.accepted:
                break
            if self.job.recipe.schedule.max_drop is None:
                accepted.clear()
            accepted.append((compressed, found))
            if start == "previous" or (iterative and start != "model"):
                previous = compressed.solutions
        return iterations, accepted
