"""Iterations that may become the result: those that respect ``max_drop``, the sparsest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pot_sparsity.pipeline.allocation.targets import Target
from pot_sparsity.pipeline.compress import Compressed, Surroundings, compress
from pot_sparsity.pipeline.evaluate import Evaluation, Evaluator
from pot_sparsity.pipeline.job import Job
from pot_sparsity.pipeline.solve import Solution
from pot_sparsity.report.schema import Iteration


@dataclass(frozen=True)
class Candidate:
    """An accepted iteration: its index, its model and how that was judged."""

    index: int
    compressed: Compressed
    found: Evaluation


class Candidates(Protocol):
    """Gives the sparsest iteration that is left; those that turn out too bad are taken away."""

    @property
    def iterations(self) -> list[Iteration]:
        """All that was tried so far."""
        ...

    def best(self) -> Candidate | None:
        """The sparsest that is left; None if there is none (more). More may be tried to find it."""
        ...

    def refuse(self, candidate: Candidate, drop: float) -> None:
        """INT8 on top makes it drop by so much, which is too far."""
        ...


class InOrder:
    """Iterations of rising sparsity, from the last accepted one back to the first."""

    def __init__(
        self, iterations: list[Iteration], accepted: Sequence[tuple[Compressed, Evaluation]]
    ) -> None:
        self.iterations = iterations
        indices = [item.index for item in iterations if item.accepted]
        kept = indices[len(indices) - len(accepted) :]
        self._left = [Candidate(index, *item) for index, item in zip(kept, accepted, strict=True)]

    def best(self) -> Candidate | None:
        """The last that is left."""
        return self._left[-1] if self._left else None

    def refuse(self, candidate: Candidate, drop: float) -> None:
        """Go back to the one before."""
        self._left.remove(candidate)


def try_target(
    job: Job,
    around: Surroundings,
    evaluator: Evaluator,
    target: Target,
    index: int,
    previous: Mapping[str, Solution] | None = None,
) -> tuple[Iteration, Compressed, Evaluation]:
    """One iteration: prune, repair, and validate."""
    compressed = compress(around, target.sparsity, target.key, previous, budget=target.budget)
    with job.recorder.stage("validation of the sparse model") as note:
        found = evaluator(compressed.model)
        note.before, note.after = evaluator.dense.metrics, found.metrics
    drop = job.drop(evaluator.dense, found)
    iteration = Iteration(
        index=index,
        sparsity=_asked(target, compressed),
        zeros=sum(int((s.weight == 0).sum()) for s in compressed.solutions.values()),
        metrics=found.metrics,
        drop=drop,
        accepted=job.accepts(drop),
    )
    return iteration, compressed, found


def _asked(target: Target, compressed: Compressed) -> float:
    """The sparsity asked for: where budgets decide, that of their allocation."""
    if not target.budget:
        return target.sparsity
    weights = sum(solution.weight.size for solution in compressed.solutions.values())
    return sum(compressed.zeros.values()) / weights
