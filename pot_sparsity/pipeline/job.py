"""What one execution of a recipe consists of: the model, the samples and their roles, and how it is to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import nncf

from pot_sparsity.data import Augmented, Dataset, split_holdout
from pot_sparsity.engines import get_engine
from pot_sparsity.engines.base import Engine
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import METRICS
from pot_sparsity.pipeline.allocation.costs import Costs
from pot_sparsity.pipeline.allocation.timings import Timings
from pot_sparsity.pipeline.evaluate import Evaluation, Evaluator
from pot_sparsity.pipeline.progress import Progress, Silent
from pot_sparsity.pipeline.recorder import Recorder
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.store.database import Database
from pot_sparsity.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What the caller decides beside the recipe; ``given`` are zeros by layer, in place of an allocation."""

    metric: str
    ignored_scope: nncf.IgnoredScope | None
    keep_structure: bool
    to_openvino: bool
    threads: int
    baseline_int8: bool
    measure_latency: bool
    database: Database = field(default_factory=Database)
    given: Mapping[str, int] | None = None
    timings: Timings | None = None


class Job:
    """Everything that all stages share.

    Attributes
    ----------
    samples
        All calibration samples.
    fit, held_out
        Those that enter fits (augmented if the recipe says so), and those that only judge (None if there are none).
    judging
        What decisions are taken on: the held-out samples, or all where there are none.
    validation
        What the report's metrics are measured on.
    watched
        The metric whose drop is limited.
    costs
        What budgets count in, once the layers are known.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
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
        self.engine: Engine = get_engine(engine, threads=options.threads)
        self.progress = progress
        self.recorder = Recorder()
        self.costs: Costs | None = None
        fit, held_out = split_holdout(samples, recipe.calibration.holdout, recipe.seed)
        self.held_out = held_out if recipe.calibration.holdout > 0 and len(samples) > 1 else None
        self.fit: Dataset = fit if self.held_out is not None else samples
        if recipe.calibration.augment and recipe.calibration.augment_factor > 1:
            self.fit = Augmented(
                self.fit, recipe.calibration.augment, recipe.calibration.augment_factor, recipe.seed
            )
        self.judging = self.held_out or samples
        self.validation = validation or self.judging
        self.watched = options.metric if self.validation.has_labels else "agreement"

    def evaluator(self, dataset: Dataset, what: str) -> Evaluator:
        """An evaluator against the original model. Judging is quick and frequent: only validation shows a bar."""
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

    def drop(self, dense: Evaluation, found: Evaluation) -> float | None:
        """Drop of the watched metric, in its points; None where the model has no such metric."""
        if self.watched not in dense.metrics:
            return None
        return dense.metrics[self.watched] - found.metrics[self.watched]

    def accepts(self, drop: float | None) -> bool:
        """Whether a drop respects the recipe's limit."""
        limit = self.recipe.schedule.max_drop
        return limit is None or drop is None or drop <= limit + 1e-9
