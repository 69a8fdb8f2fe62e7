"""The last steps on a sparse model: fits that look behind single layers, each kept only where the output gains."""

from __future__ import annotations

from collections.abc import Sequence

from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.correction import Guard
from pot_sparsity.pipeline.evaluate import Evaluator, distance
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.rectify import Candidate, fit_behind
from pot_sparsity.pipeline.rescale import (
    Measurement,
    Tunable,
    rescaled,
    tunables,
)
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply
from pot_sparsity.recipe import Recipe

#: Dampings and lengths of a Gauss-Newton step that the held-out samples choose from.
RIDGES = (0.03, 0.1, 0.3, 1.0)
LENGTHS = (1.0, 0.5)
#: How warnings begin where the second step is not possible.
NOT_RESCALED = "scales and biases are not tuned against the network's output"


class Finish:
    """Improves a sparse model against the dense one.

    Parameters
    ----------
    dense_model
        The prepared model; the sparse ones have the same structure.
    dense
        The dense layers that take part.
    fit
        Samples to fit to.
    judge
        Measures models on the held-out samples.
    """

    def __init__(
        self,
        dense_model: Model,
        dense: Sequence[DenseLayer],
        fit: Dataset,
        judge: Evaluator,
        engine: Engine,
        recipe: Recipe,
        recorder: Recorder,
        progress: Progress,
        threads: int,
    ) -> None:
        self._dense_model = dense_model
        self._dense = dense
        self._fit = fit
        self._judge = judge
        self._engine = engine
        self._recipe = recipe
        self._recorder = recorder
        self._progress = progress
        self._threads = threads

    def __call__(
        self, model: Model, solutions: dict[str, Solution], guard: Guard
    ) -> tuple[Model, dict[str, Solution]]:
        """All steps the recipe asks for; returns the best model and what is written into it."""
        settings = self._recipe.finish
        if settings.activations != "never":
            model, solutions = self._behind_activations(model, solutions, guard)
        if settings.rescaling != "never":
            model, solutions = self._rescaling(model, solutions, guard)
        return model, solutions

    def _behind_activations(
        self, model: Model, solutions: dict[str, Solution], guard: Guard
    ) -> tuple[Model, dict[str, Solution]]:
        settings = self._recipe.finish
        candidates = [Candidate(slack, model.copy(), dict(solutions)) for slack in settings.slack]
        fit_behind(
            self._dense_model,
            candidates,
            self._dense,
            self._fit,
            self._engine,
            batch_size=self._recipe.calibration.batch_size,
            positions=settings.positions,
            threads=self._threads,
            seed=self._recipe.seed,
            progress=self._progress,
        )
        forced = settings.activations == "always"
        for index, candidate in enumerate(candidates):
            what = f"refit behind the activations, slack {candidate.slack:g}"
            if guard.keeps(what, candidate.model, always=forced and index == 0):
                model, solutions = candidate.model, candidate.solutions
        return model, solutions

    def _rescaling(
        self, model: Model, solutions: dict[str, Solution], guard: Guard
    ) -> tuple[Model, dict[str, Solution]]:
        settings = self._recipe.finish
        found = self._tunables()
        if not found:
            return model, solutions
        measurement = Measurement(
            self._dense_model,
            self._fit,
            min(settings.samples, len(self._fit)),
            self._recipe.calibration.batch_size,
            self._engine,
            self._recipe.seed,
        )
        if not measurement.outputs:
            self._recorder.warn(f"{NOT_RESCALED}: no output runs over the samples along its first axis")
            return model, solutions
        for sweep in range(settings.sweeps):
            self._progress.start("Measuring scales and biases", len(found))
            equations, units = measurement.equations(model, found, self._progress)
            self._progress.finish()
            best: tuple[float, Model, dict[str, Solution]] | None = None
            for ridge in RIDGES:
                step = equations.step(ridge)
                for length in LENGTHS:
                    trial = rescaled(solutions, found, length * step, units)
                    written = self._written(model, trial)
                    value = distance(self._judge(written).metrics)[1]
                    if best is None or value < best[0]:
                        best = value, written, trial
            assert best is not None
            what = f"scales and biases against the network's output, sweep {sweep + 1}"
            if not guard.keeps(what, best[1], always=settings.rescaling == "always"):
                break
            _, model, solutions = best
        return model, solutions

    def _tunables(self) -> list[Tunable]:
        """Layers whose scales and biases are tuned; with a warning if there are none."""
        settings = self._recipe.finish
        if "detection_overlap" in self._judge.dense.metrics:
            reason, found = "the order of detections has no derivative", []
        else:
            reason = f"no layer fits a budget of {settings.budget:g} TFLOP (finish.budget)"
            samples = min(settings.samples, len(self._fit))
            found = tunables(self._dense_model.graph, self._dense, settings.budget * 1e12 / samples)
        if not found:
            self._recorder.warn(f"{NOT_RESCALED}: {reason}")
        return found

    def _written(self, model: Model, solutions: dict[str, Solution]) -> Model:
        result = model.copy()
        for item in self._dense:
            apply(result, item.layer, solutions[item.layer.name])
        return result
