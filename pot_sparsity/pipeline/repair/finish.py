"""The last steps on a sparse model: fits that look behind single layers, each kept only where the output gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.errors import DataError, ModelError
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.evaluate import Evaluator, distance
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.repair.correction import Guard
from pot_sparsity.pipeline.repair.rectify import Candidate, fit_behind
from pot_sparsity.pipeline.repair.rescale import (
    Measurement,
    Tunable,
    rescaled,
    tunables,
)
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, pack, unpack
from pot_sparsity.recipe import Recipe
from pot_sparsity.settings import FinishSettings

#: Dampings and lengths of a Gauss-Newton step that the held-out samples choose from.
RIDGES = (0.03, 0.1, 0.3, 1.0)
LENGTHS = (1.0, 0.5)
#: How warnings begin where the second step is not possible.
NOT_RESCALED = "scales and biases are not tuned against the network's output"
#: Fewer epochs than this (or than were asked for) do more harm than good.
EPOCHS = 3


class NotDistilled(Exception):
    """The network cannot be trained, or not for long enough; says why."""


def due(settings: FinishSettings, reached: float) -> list[str]:
    """Steps to take at this distance to the dense model: those forced, and those that have something to gain there."""
    bounds = {
        "activations": (settings.activations, settings.from_error),
        "rescaling": (settings.rescaling, settings.from_error),
        "distillation": (settings.distillation, settings.distill_from),
    }
    return [
        step
        for step, (when, bound) in bounds.items()
        if when == "always" or (when == "helps" and reached >= bound)
    ]


class Finish:
    """Improves a sparse model against the dense one.

    Parameters
    ----------
    base
        The prepared model that was pruned: what layers are fitted to. The sparse ones have the same structure.
    dense_model
        Whose output is wanted: the same, or what it was before earlier iterations.
    dense
        The dense layers that take part.
    seen
        How many inputs each layer's moments were taken from.
    fit
        Samples to fit to.
    judge
        Measures models on the held-out samples.
    folder, key
        Where the candidates of each step are kept for a run that is resumed, and under which name.
    """

    def __init__(
        self,
        base: Model,
        dense_model: Model,
        dense: Sequence[DenseLayer],
        seen: Mapping[str, float],
        fit: Dataset,
        judge: Evaluator,
        engine: Engine,
        recipe: Recipe,
        recorder: Recorder,
        progress: Progress,
        threads: int,
        folder: RunFolder,
        key: str,
    ) -> None:
        self._base = base
        self._dense_model = dense_model
        self._dense = dense
        self._seen = seen
        self._fit = fit
        self._judge = judge
        self._engine = engine
        self._recipe = recipe
        self._recorder = recorder
        self._progress = progress
        self._threads = threads
        self._folder = folder
        self._key = key

    def __call__(
        self, model: Model, solutions: dict[str, Solution], guard: Guard, steps: Sequence[str]
    ) -> tuple[Model, dict[str, Solution]]:
        """The named ``steps``, in order (see :func:`due`); returns the best model and what is written into it."""
        known = {
            "activations": self._behind_activations,
            "rescaling": self._rescaling,
            "distillation": self._distillation,
        }
        for step in steps:
            model, solutions = known[step](model, solutions, guard)
        return model, solutions

    def _behind_activations(
        self, model: Model, solutions: dict[str, Solution], guard: Guard
    ) -> tuple[Model, dict[str, Solution]]:
        settings = self._recipe.finish
        forced = settings.activations == "always"
        for index, candidate in enumerate(self._fitted(model, solutions)):
            what = f"refit behind the activations, slack {candidate.slack:g}"
            if guard.keeps(what, candidate.model, always=forced and index == 0):
                model, solutions = candidate.model, candidate.solutions
        return model, solutions

    def _fitted(self, model: Model, solutions: dict[str, Solution]) -> list[Candidate]:
        """Candidates that were fitted behind their activations, from the run folder if it has them all."""
        settings = self._recipe.finish
        names = [f"slack-{index}" for index in range(len(settings.slack))]
        stored = [self._load(name) for name in names]
        kept = [found for found in stored if found is not None]
        if len(kept) == len(names):
            return [
                Candidate(slack, self._written(model, found), found)
                for slack, found in zip(settings.slack, kept, strict=True)
            ]
        candidates = [Candidate(slack, model.copy(), dict(solutions)) for slack in settings.slack]
        fit_behind(
            self._base,
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
        for name, candidate in zip(names, candidates, strict=True):
            self._store(name, candidate.solutions)
        return candidates

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
            name = f"sweep-{sweep}"
            best = self._load(name)
            if best is None:
                best = self._best_step(model, solutions, found, measurement)
                self._store(name, best)
            written = self._written(model, best)
            what = f"scales and biases against the network's output, sweep {sweep + 1}"
            if not guard.keeps(what, written, always=settings.rescaling == "always"):
                break
            model, solutions = written, best
        return model, solutions

    def _best_step(
        self,
        model: Model,
        solutions: dict[str, Solution],
        found: Sequence[Tunable],
        measurement: Measurement,
    ) -> dict[str, Solution]:
        """What one Gauss-Newton step makes of the model, damped and cut short as the held-out samples like it best."""
        self._progress.start("Measuring scales and biases", len(found))
        equations, units = measurement.equations(model, found, self._progress)
        self._progress.finish()
        best: tuple[float, dict[str, Solution]] | None = None
        for ridge in RIDGES:
            step = equations.step(ridge)
            for length in LENGTHS:
                trial = rescaled(solutions, found, length * step, units)
                value = distance(self._judge(self._written(model, trial)).metrics)[1]
                if best is None or value < best[0]:
                    best = value, trial
        assert best is not None
        return best[1]

    def _distillation(
        self, model: Model, solutions: dict[str, Solution], guard: Guard
    ) -> tuple[Model, dict[str, Solution]]:
        best = self._load("distilled")
        if best is None:
            try:
                best = self._distilled(model, solutions, guard.reached)
            except (NotDistilled, ModelError, DataError) as error:
                self._recorder.warn(f"the dense network is not distilled: {error}")
                return model, solutions
            self._store("distilled", best)
        written = self._written(model, best)
        forced = self._recipe.finish.distillation == "always"
        if guard.keeps("distilled from the dense network's output", written, always=forced):
            return written, best
        return model, solutions

    def _distilled(self, model: Model, solutions: dict[str, Solution], reached: float) -> dict[str, Solution]:
        """Solutions after training; raises NotDistilled or NotDifferentiable where that is not possible."""
        if "detection_overlap" in self._judge.dense.metrics:
            raise NotDistilled("the order of detections has no derivative")
        try:
            from pot_sparsity.pipeline.repair import distillation  # JAX takes a second to load
        except ModuleNotFoundError as error:
            raise NotDistilled(f"{error.name} is not installed: pip install jax") from error
        except ImportError as error:
            raise NotDistilled(f"JAX cannot be loaded: {error}") from error
        settings = self._recipe.finish
        layers = distillation.trainable(self._dense, model, solutions, self._seen)
        if not layers:
            raise NotDistilled("no layer has float32 or float16 weights and has seen enough samples")
        plan = distillation.plan(
            model,
            self._dense,
            len(self._fit),
            settings.epochs,
            settings.distillation_budget * 1e12,
            self._recipe.calibration.batch_size,
        )
        if plan.epochs < min(EPOCHS, settings.epochs):
            raise NotDistilled(
                f"{settings.distillation_budget:g} TFLOP are less than {EPOCHS} epochs (finish.distillation_budget)"
            )
        return distillation.distilled(
            self._dense_model,
            model,
            solutions,
            layers,
            self._fit,
            self._engine,
            plan,
            rate=settings.rate * float(np.sqrt(reached)),
            vary=settings.vary,
            seed=self._recipe.seed,
            threads=self._threads,
            progress=self._progress,
        )

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

    def _store(self, name: str, solutions: Mapping[str, Solution]) -> None:
        """Keep a step's result, layer by layer."""
        for layer, solution in solutions.items():
            self._folder.store(f"{self._key}/{name}/{layer}", pack(solution))

    def _load(self, name: str) -> dict[str, Solution] | None:
        """A step's result from the run folder; None where it is not complete."""
        found: dict[str, Solution] = {}
        for item in self._dense:
            layer = item.layer.name
            stored = self._folder.load(f"{self._key}/{name}/{layer}")
            if stored is None:
                return None
            found[layer] = unpack(stored, len(item.biases))
        return found
