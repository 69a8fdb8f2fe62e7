"""``max_drop`` by bisection: the sparsest model whose metric stays within the limit, in as few trials as may be."""

from __future__ import annotations

from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.algorithms.bisection import Bisection
from pot_sparsity.pipeline.allocation.rounds import is_iterative
from pot_sparsity.pipeline.allocation.targets import Target
from pot_sparsity.pipeline.candidates import Candidate, try_target
from pot_sparsity.pipeline.compress import Surroundings
from pot_sparsity.pipeline.evaluate import Evaluator
from pot_sparsity.pipeline.job import Job
from pot_sparsity.recipe import Recipe
from pot_sparsity.report.schema import Iteration


def bisects(recipe: Recipe) -> bool:
    """Whether the sparsity is found by bisection: on request, or where ``max_drop`` leaves the schedule open."""
    schedule = recipe.schedule
    in_order = schedule.start != "dense" or is_iterative(recipe)
    wanted = schedule.kind == "auto" and schedule.max_drop is not None and not in_order
    return wanted or schedule.kind == "bisection"


class Bisected:
    """Trials between no sparsity and the recipe's; the true metric of each decides about the next.

    A pattern that fixes the zeros is tried once. Budgets are loosened together: at value v each may cost
    ``1 - v (1 - budget)``, the sparsity at least ``v`` times what was asked for.

    Where INT8 takes the result beyond the limit, it is expected to cost as much at other sparsities, and the
    search goes on with what is left of the limit.

    Parameters
    ----------
    job, around, evaluator
        The run, what its iterations need, and what measures them.
    """

    def __init__(self, job: Job, around: Surroundings, evaluator: Evaluator) -> None:
        self.iterations: list[Iteration] = []
        self._job = job
        self._around = around
        self._evaluator = evaluator
        self._tried: dict[float, Candidate] = {}
        recipe = job.recipe
        limit = recipe.schedule.max_drop
        assert limit is not None
        fixed = Pattern.parse(recipe.pruning.pattern).kind == "n:m"
        self._search = Bisection(
            1.0 if recipe.budget else recipe.sparsity,
            recipe.schedule.resolution,
            limit,
            1 if fixed else recipe.schedule.iterations,
        )

    def best(self) -> Candidate | None:
        """The sparsest that is left once nothing between it and what was refused is worth a trial."""
        while (value := self._search.propose()) is not None:
            self._try(value)
        best = self._search.best()
        return None if best is None else self._tried[best]

    def refuse(self, candidate: Candidate, drop: float) -> None:
        """Search on without it."""
        value = next(value for value, tried in self._tried.items() if tried is candidate)
        self._search.refuse(value, drop)

    def _try(self, value: float) -> None:
        index = len(self.iterations)
        iteration, compressed, found = try_target(
            self._job, self._around, self._evaluator, self._target(value), index
        )
        self.iterations.append(iteration)
        if iteration.accepted:
            self._tried[value] = Candidate(index, compressed, found)
        assert iteration.drop is not None  # refused before the first trial
        self._search.add(value, iteration.drop)

    def _target(self, value: float) -> Target:
        recipe = self._job.recipe
        if not recipe.budget or value == 1.0:
            return Target(recipe.sparsity if recipe.budget else value, recipe.budget)
        loose = {
            kind: value * bound if kind == "sparsity" else 1.0 - value * (1.0 - bound)
            for kind, bound in recipe.budget.items()
        }
        return Target(recipe.sparsity, loose)
