"""What iterations aim at: a sparsity, or budgets and the costs that these count in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pot_sparsity.algorithms.schedule import cubic_schedule
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.allocation.allocate import needs_curves
from pot_sparsity.pipeline.allocation.costs import Costs, build_costs
from pot_sparsity.pipeline.allocation.timings import Timings, latency_costs, measure_timings, parse_timings
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.runfolder import RunFolder, write_text
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.recipe import Recipe

#: File of the run folder with the timings that were measured.
TIMINGS_NAME = "timings.json"
_STATE = "timings"


@dataclass(frozen=True)
class Target:
    """What one iteration is to reach: ``sparsity``, or where there is a ``budget`` all bounds of that."""

    sparsity: float
    budget: Mapping[str, float] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether it asks for anything that the dense model is not."""
        if not self.budget:
            return self.sparsity > 0.0
        return any(bound > 0.0 if kind == "sparsity" else bound < 1.0 for kind, bound in self.budget.items())

    @property
    def key(self) -> str:
        """A name for its state in the run folder."""
        if not self.budget:
            return f"iteration-{self.sparsity!r}"
        return "iteration-" + ",".join(f"{kind}={bound!r}" for kind, bound in self.budget.items())


def budget_targets(recipe: Recipe) -> list[Target]:
    """The budgets of every iteration: at once, or what each takes away rising along the cubic schedule.

    Raises
    ------
    RecipeError
        A schedule that does not go with budgets.
    """
    schedule = recipe.schedule
    if recipe.allocation.rounds == "iterative" and needs_curves(recipe):
        raise RecipeError(
            "allocation.rounds iterative goes with a sparsity, not with a budget: set rounds to one, or the sparsity"
        )
    if schedule.kind == "one_shot" or (schedule.kind == "auto" and schedule.max_drop is None):
        return [Target(recipe.sparsity, recipe.budget)]
    try:
        paths = {
            kind: _path(bound if kind == "sparsity" else 1.0 - bound, schedule.initial, schedule.iterations)
            for kind, bound in recipe.budget.items()
        }
    except ValueError as error:
        raise RecipeError(f"schedule: {error}") from None
    steps = [
        {kind: step if kind == "sparsity" else 1.0 - step for kind, step in zip(paths, values, strict=True)}
        for values in zip(*paths.values(), strict=True)
    ]
    return [*(Target(recipe.sparsity, step) for step in steps[:-1]), Target(recipe.sparsity, recipe.budget)]


def _path(target: float, initial: float, iterations: int) -> list[float]:
    return cubic_schedule(min(initial, target), target, iterations)


def find_costs(
    model: Model,
    dense: Sequence[DenseLayer],
    samples: Dataset,
    engine: Engine,
    recipe: Recipe,
    timings: Timings | None,
    *,
    threads: int,
    folder: RunFolder,
    recorder: Recorder,
) -> tuple[Costs, Timings | None]:
    """Costs of everything the recipe has a budget for, and the timings where they were measured.

    A latency budget counts in ``timings``, else in what the run that is resumed has measured, else in what is
    measured now.
    """
    if "latency" not in recipe.budget:
        return build_costs(model, dense, recipe, recipe.budget), None
    if timings is not None:
        return build_costs(model, dense, recipe, recipe.budget, latency=latency_costs(timings, dense)), None
    stored = folder.load(_STATE)
    if stored is None:
        with recorder.stage("timings"):
            found = measure_timings(model, dense, samples, engine, recipe, threads=threads)
    else:
        found = parse_timings(np.asarray(stored["json"], np.uint8).tobytes().decode())
    return build_costs(model, dense, recipe, recipe.budget, latency=latency_costs(found, dense)), found


def keep_timings(folder: RunFolder, timings: Timings | None) -> None:
    """Keep measured timings for a resumed run, and as a file that ``--timings`` reads."""
    if timings is None or folder.path is None or folder.has(_STATE):
        return
    text = timings.dump()
    folder.store(_STATE, {"json": np.frombuffer(text.encode(), np.uint8)})
    write_text(folder.path / TIMINGS_NAME, text)
