"""Judging a model: label metrics, distance to the dense model, latency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, Bool
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.errors import DataError
from pot_sparsity.graph.model import Model, Runnable
from pot_sparsity.metrics import Comparison, get_metric
from pot_sparsity.pipeline.progress import Progress, Silent, track
from pot_sparsity.pipeline.spool import Spool


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and which samples were right for each label metric."""

    metrics: dict[str, float]
    correct: dict[str, Bool] = field(default_factory=dict)


class Evaluator:
    """Runs models over one dataset and compares them with the dense model, whose outputs are kept.

    Parameters
    ----------
    engine
        Where models run.
    dataset
        Samples, with labels or without.
    dense
        The reference.
    label_metrics
        Names of the metrics to compute where there are labels.
    batch_size
        Samples per inference (ignored by models with a fixed batch).
    """

    def __init__(
        self,
        engine: Engine,
        dataset: Dataset,
        dense: Model,
        label_metrics: Sequence[str],
        batch_size: int,
        progress: Progress,
        what: str,
    ) -> None:
        self.dataset = dataset
        self.size = len(dataset)
        self._engine = engine
        self._labels = tuple(label_metrics) if dataset.has_labels else ()
        self._batch = dense.batch_size or batch_size
        self._progress = progress
        self._what = what
        self._reference = Spool()
        self._positions = float_outputs(dense)
        if not self._positions:
            raise DataError("the model has no floating-point output to compare")
        self._names = [dense.outputs[i].name for i in self._positions]
        self.dense = self._run(dense, exact=True, keep=True)

    def __call__(self, model: Model, *, exact: bool = True, quiet: bool = False) -> Evaluation:
        """Metrics of ``model``; ``exact`` runs in float32 whatever the machine offers, ``quiet`` shows no progress."""
        return self._run(model, exact=exact, keep=False, quiet=quiet)

    def close(self) -> None:
        """Free the reference outputs."""
        self._reference.close()

    def _run(self, model: Model, *, exact: bool, keep: bool, quiet: bool = False) -> Evaluation:
        executable = self._engine.compile(model.extract(), exact=exact)
        outputs = [executable.outputs[i] for i in self._positions]
        metrics = [get_metric(name) for name in self._labels]
        comparisons = [Comparison(name) for name in self._names]
        batches = self.dataset.batches(self._batch)
        total = -(-self.size // self._batch)
        progress = Silent() if quiet else self._progress
        for position, batch in enumerate(track(batches, progress, self._what, total)):
            arrays = executable.run(feeds(model, executable, batch))
            found = [arrays[name] for name in outputs]
            if keep:
                self._reference.append({str(i): value for i, value in enumerate(found)})
            reference = self._reference.read(position)
            for i, comparison in enumerate(comparisons):
                comparison.update(reference[str(i)], found[i])
            for metric in metrics:
                assert batch.labels is not None
                metric.update(found[0], batch.labels)
        result: dict[str, float] = {}
        for metric in metrics:
            result |= metric.result()
        result |= comparisons[0].result()
        for name, comparison in zip(self._names[1:], comparisons[1:], strict=True):
            values = comparison.result()
            kind = "sqnr" if "sqnr" in values else "detection_agreement"
            result[f"{name}.{kind}"] = values[kind]
        return Evaluation(result, {metric.name: metric.correct for metric in metrics})


def distance(metrics: dict[str, float]) -> tuple[str, float]:
    """The label-free distance to the dense model that decisions are taken on, and what it is called.

    The energy of the output's error relative to the output's: on samples a network is sure of (those it was trained
    on, above all) logit KL is the noise of a few of them, while this ranks candidates as they rank on new samples.
    Of detections, whose order shifts, the part that does not overlap.
    """
    if "detection_overlap" in metrics:
        return "1 - detection overlap", 1.0 - metrics["detection_overlap"] / 100.0
    return "relative output error", relative_error(metrics)


def relative_error(metrics: dict[str, float]) -> float:
    """Energy of the output's error relative to the output's, from its signal-to-noise ratio."""
    return float(10.0 ** (-metrics["sqnr"] / 10.0))


def measure_latency(
    engine: Engine, models: Sequence[Model], dataset: Dataset, *, rounds: int = 30
) -> list[float]:
    """Median milliseconds of one inference (one sample, or the model's fixed batch), as a deployment runs it.

    Models take turns, so that whatever else the machine does hits all of them alike.
    """
    batch = next(iter(dataset.batches(max(model.batch_size or 1 for model in models))))
    executables = [engine.compile(model.extract(), exact=False) for model in models]
    seconds: list[list[float]] = [[] for _ in executables]
    for turn in range(rounds + 3):
        for index, (model, executable) in enumerate(zip(models, executables, strict=True)):
            inputs = feeds(model, executable, batch)
            start = time.perf_counter()
            executable.run(inputs)
            if turn >= 3:
                seconds[index].append(time.perf_counter() - start)
    return [float(np.median(times)) * 1e3 for times in seconds]


def feeds(model: Model, executable: Executable | Runnable, batch: Batch) -> dict[str, AnyArray]:
    """The batch's inputs under the graph's tensor names, those that the executable reads."""
    by_tensor = {
        tensor: batch.inputs[name] for tensor, name in zip(model.graph.inputs, model.input_names, strict=True)
    }
    return {tensor: by_tensor[tensor] for tensor in executable.inputs}


def float_outputs(model: Model) -> list[int]:
    """Positions of the outputs that can be compared: those known to be floating point."""
    return [index for index, info in enumerate(model.outputs) if _is_float(info.dtype)]


def _is_float(dtype: np.dtype[np.generic] | None) -> bool:
    return dtype is not None and (np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16")
