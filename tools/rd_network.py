"""What the pages on rate-distortion pruning measure of one network: distances, curves, pruned models, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rd_ternary import allocate_by_ternary_search  # type: ignore[import-not-found]

from pot_sparsity.algorithms.allocation.curves import Curve, aggregate_samples
from pot_sparsity.data import Dataset, load_dataset, load_preprocess
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import paired_interval, sample_distances
from pot_sparsity.pipeline.allocation.allocate import allocate
from pot_sparsity.pipeline.allocation.curves import measure_curves, probe_layers
from pot_sparsity.pipeline.allocation.probes import finished_curve, noise_like
from pot_sparsity.pipeline.compress import Surroundings, repair
from pot_sparsity.pipeline.evaluate import Evaluator, feeds
from pot_sparsity.pipeline.job import Job, Options
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, apply, prune_layer, prune_layers
from pot_sparsity.recipe import Recipe, load_recipe

Float64 = NDArray[np.float64]
#: Levels of the published curves.
LEVELS = 100
#: What curves are measured of and on.
Kind = Literal["network", "layer", "noise"]


@dataclass
class Seconds:
    """Wall clock and processor time of one block of work."""

    wall: float = 0.0
    processor: float = 0.0

    @contextmanager
    def add(self) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor


@dataclass(frozen=True)
class Ready:
    """A recipe on the network, with all that comes before the first allocation done."""

    around: Surroundings
    judge: Evaluator


class Network:
    """One network of the zoo; what is slow is measured once and kept in ``cache``.

    Parameters
    ----------
    name, folder, entry
        Its name, the zoo's folder and what the zoo's index says of it.
    samples
        How many calibration samples curves are measured on.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        entry: Mapping[str, Any],
        cache: Path,
        stack: ExitStack,
        *,
        samples: int,
        threads: int,
    ) -> None:
        self.name = name
        self.samples = samples
        self.levels = LEVELS
        self._cache = cache
        self._stack = stack
        self._threads = threads
        self._model = load_model(folder / entry["model"])
        specs, pictures = input_specs(self._model), load_preprocess(entry.get("preprocess"))
        self._calibration = load_dataset(folder / entry["calibration"], specs, pictures)
        self._validation = load_dataset(folder / entry["validation"], specs, pictures)

    def recipe(self, *changes: str) -> Recipe:
        """The paper's recipe, its curves on this network's samples."""
        given = (f"allocation.samples={self.samples}", f"allocation.levels={self.levels}")
        return load_recipe("rd", [*given, *changes])

    def ready(self, recipe: Recipe) -> Ready:
        """Everything up to the moments."""
        options = Options("top1", None, False, False, self._threads, False, False)
        job = Job(
            recipe,
            options,
            RunFolder(None),
            self._model,
            self._calibration,
            self._validation,
            "openvino",
            Silent(),
        )
        return Ready(*Run(job, self._stack).surroundings(curves=False))

    @cached_property
    def published(self) -> Ready:
        """Under the paper's recipe."""
        return self.ready(self.recipe())

    @cached_property
    def ours(self) -> Ready:
        """Under the default recipe, without the finish: it would make up for what is to be compared."""
        finish = ("finish.activations=never", "finish.distillation=never")
        return self.ready(load_recipe("default", ["quantization.enabled=false", *finish]))

    @property
    def layers(self) -> list[DenseLayer]:
        """In the order of the network."""
        return list(self.published.around.dense)

    def measured_on(self, kind: Kind = "network") -> Dataset:
        """The samples that curves are measured on."""
        fit = self.published.around.fit
        if kind == "noise":
            return noise_like(fit, self.samples, 0)
        number = min(self.samples, len(fit))
        return fit.subset(np.linspace(0, len(fit) - 1, number).astype(np.int64))

    def distances(self, kind: Kind = "network") -> dict[str, Float64]:
        """Squared distances ``[samples, levels]`` of the paper's levels, by layer name."""
        file = self._cache / f"{self.name}-{kind}-{self.samples}.npz"
        if not file.is_file():
            around = self.published.around
            changes = ["allocation.objective=layer"] if kind == "layer" else []
            probes = probe_layers(
                around.prepared.model,
                around.dense,
                around.moments,
                around.held_moments,
                self.measured_on(kind),
                around.engine,
                self.recipe(*changes),
                threads=self._threads,
            )
            found = [probed.distances for _, probed in probes]
            np.savez(file, *found)
        with np.load(file, allow_pickle=False) as stored:
            parts = [np.asarray(stored[key], np.float64) for key in stored.files]
        return {item.layer.name: part for item, part in zip(self.layers, parts, strict=True)}

    def curves(
        self,
        kind: Kind = "network",
        *,
        aggregate: Literal["mean", "worst"] = "worst",
        cleaning: Literal["outliers", "none"] = "outliers",
    ) -> dict[str, Curve]:
        """The paper's curves."""
        settings = self.recipe(f"allocation.cleaning={cleaning}").allocation
        levels = np.arange(1, settings.levels + 1) / settings.levels
        curves = {}
        for item in self.layers:
            distances = self.distances(kind)[item.layer.name]
            zeros = np.rint(levels * item.layer.size).astype(np.int64)
            distortion = aggregate_samples(distances, aggregate)
            curves[item.layer.name] = finished_curve(item, zeros, levels, distortion, settings)
        return curves

    def allocated(self, curves: Mapping[str, Curve], sparsity: float) -> dict[str, int]:
        """The paper's dynamic program."""
        return allocate(self.layers, self.recipe(), sparsity, curves)

    def by_ternary_search(self, curves: Mapping[str, Curve], sparsity: float) -> dict[str, int]:
        """The dynamic program as the paper describes its search."""
        names = [item.layer.name for item in self.layers]
        total = round(sparsity * sum(item.layer.size for item in self.layers))
        zeros = allocate_by_ternary_search([curves[name] for name in names], total)
        return dict(zip(names, zeros.tolist(), strict=True))

    def of_weights(self, method: str, sparsity: float) -> dict[str, int]:
        """An allocation that looks at weights alone."""
        recipe = self.recipe(f"allocation={{method: {method}}}")
        return allocate(self.layers, recipe, sparsity)

    def pruned(self, zeros: Mapping[str, int]) -> Model:
        """The network with these layers pruned by magnitude, nothing else changed."""
        around = self.published.around
        model = around.prepared.model.copy()
        for item in self.layers:
            name = item.layer.name
            if zeros.get(name, 0):
                solution = prune_layer(item, around.moments[name], None, zeros[name], around.recipe)
                apply(model, item.layer, solution)
        return model

    def outcome(self, zeros: Mapping[str, int]) -> dict[str, Any]:
        """Accuracy of :meth:`pruned` on the validation samples."""
        return _judged(self.published.judge, self.pruned(zeros))

    def repaired(self, zeros: Mapping[str, int]) -> dict[str, Any]:
        """Accuracy with the same zeros per layer, chosen and repaired by the default recipe but for its finish."""
        around = self.ours.around
        with around.recorder.stage("pruning"):
            solutions = prune_layers(
                around.dense,
                around.moments,
                around.held_moments,
                zeros,
                around.recipe,
                threads=around.threads,
                folder=around.folder,
                key="prune",
                progress=Silent(),
            )
        return _judged(self.ours.judge, repair(around, solutions, zeros, "repair").model)

    @cached_property
    def our_curves(self) -> tuple[dict[str, Curve], Seconds]:
        """The default recipe's curves, and what they cost beyond the moments that its solver needs anyway."""
        around, seconds = self.ours.around, Seconds()
        with seconds.add():
            curves = measure_curves(
                around.prepared.model,
                around.dense,
                around.moments,
                around.held_moments,
                self._our_samples(),
                around.engine,
                around.recipe,
                threads=self._threads,
                folder=RunFolder(None),
                progress=Silent(),
            )
        return curves, seconds

    def our_zeros(self, sparsity: float) -> dict[str, int]:
        """The default recipe's allocation."""
        return allocate(self.ours.around.dense, self.ours.around.recipe, sparsity, self.our_curves[0])

    def our_moments(self) -> float:
        """Wall-clock seconds of the moments that the default recipe's solver reads."""
        stages = self.ours.around.recorder.stages
        return next(stage.seconds for stage in stages if stage.name == "moments")

    def _our_samples(self) -> Dataset:
        fit = self.ours.around.fit
        number = min(self.ours.around.recipe.allocation.samples, len(fit))
        return fit.subset(np.linspace(0, len(fit) - 1, number).astype(np.int64))

    @cached_property
    def meter(self) -> WholeNetwork:
        """Runs the whole network on the samples of the curves."""
        return WholeNetwork(self.published.around, self.measured_on())


class WholeNetwork:
    """Squared distances of the output from runs of the whole network, the paper's way."""

    def __init__(self, around: Surroundings, samples: Dataset) -> None:
        self._around = around
        self._batches = list(samples.batches(around.recipe.calibration.batch_size))
        self.running = Seconds()
        self._reference = self._run(around.prepared.model)
        self.running = Seconds()

    def __call__(self, model: Model) -> Float64:
        """``[samples]``."""
        return sample_distances(self._reference, self._run(model), "squared")

    def _run(self, model: Model) -> Float64:
        executable = self._around.engine.compile(model.extract())
        found = []
        with self.running.add():
            for batch in self._batches:
                found.append(executable.run(feeds(model, executable, batch))[executable.outputs[0]])
        return np.concatenate(found).astype(np.float64)


def published_curves(network: Network, every: int = 1) -> tuple[dict[str, Float64], Seconds]:
    """The paper's procedure as it stands: every layer at every level, and each time the whole network.

    Returns the squared distances ``[samples, levels]`` by layer, and what running the network cost. Pruning and
    compiling are left out: a framework that interprets the network prunes in place and compiles nothing.

    Only ``every``-th level is measured and the seconds are multiplied by that: each run costs the same.
    """
    meter = WholeNetwork(network.published.around, network.measured_on())
    found: dict[str, Float64] = {}
    for item in network.layers:
        name = item.layer.name
        parts = []
        for level in range(every, network.levels + 1, every):
            parts.append(meter(network.pruned({name: round(level / network.levels * item.layer.size)})))
        found[name] = np.stack(parts, axis=1)
    return found, Seconds(every * meter.running.wall, every * meter.running.processor)


def _judged(judge: Evaluator, model: Model) -> dict[str, Any]:
    found = judge(model)
    interval = paired_interval(judge.dense.correct["top1"], found.correct["top1"])
    return {"top1": found.metrics["top1"], "dense": judge.dense.metrics["top1"], "interval": list(interval)}
