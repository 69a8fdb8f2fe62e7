"""Scales and biases of all output channels tuned together against the dense network's output.

The derivative of the output by each channel's scale and bias is measured: one channel of one layer's output is moved
a little, and only the part of the network behind it runs. That needs no gradients, so any operator will do; what it
costs is known beforehand (:func:`samples_within`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry, Float32, Float64
from pot_sparsity.algorithms.finish import NormalEquations, sketch
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.graph.graph import Graph
from pot_sparsity.graph.layers import Layer, Place, flops
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.evaluate import feeds
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.solve import DenseLayer, Solution

#: How far a channel is moved: this part of itself, or of its deviation. Large enough to smooth over the kinks.
MOVE = 0.05
#: Outputs beyond this number are folded into so many by random signs.
OUTPUTS = 128
#: Largest number of scales and biases: their normal equations are dense.
PARAMETERS = 6000
#: With fewer samples than this nothing is learnt.
LEAST_SAMPLES = 32


@dataclass(frozen=True)
class Tunable:
    """A layer whose channels are tuned, and where its parameters stand."""

    layer: Layer
    place: Place
    first: int
    biased: bool

    @property
    def scales(self) -> slice:
        """Columns of the scales."""
        return slice(self.first, self.first + self.layer.channels)

    @property
    def shifts(self) -> slice:
        """Columns of the biases; empty without."""
        stop = self.scales.stop
        return slice(stop, stop + (self.layer.channels if self.biased else 0))


@dataclass(frozen=True)
class Suffix:
    """The part of a network behind one tensor: what else it reads, and which outputs it changes."""

    tensor: str
    beside: tuple[str, ...]
    outputs: tuple[str, ...]


def tunables(dense: Sequence[DenseLayer]) -> list[Tunable]:
    """Layers with one place; stacks of matrices have no channel axis of their own and are left out."""
    found: list[Tunable] = []
    first = 0
    for item in dense:
        stacked = not isinstance(item.layer.places[0].geometry, ConvGeometry) and item.layer.groups > 1
        if item.layer.shared or stacked:
            continue
        found.append(Tunable(item.layer, item.layer.places[0], first, item.biases[0] is not None))
        first = found[-1].shifts.stop
    return found


def suffix(graph: Graph, tensor: str, outputs: Sequence[str]) -> Suffix:
    """What has to run again when ``tensor`` changes."""
    moving, fixed = {tensor}, set(graph.inputs)
    beside: list[str] = []
    for node in graph:
        if any(name in moving for name in node.inputs):
            moving.update(node.outputs)
            if node.op != "Result":
                beside += [name for name in node.inputs if name in fixed and name not in beside]
        elif node.op != "Constant" and any(name in fixed for name in node.inputs):
            fixed.update(node.outputs)
    beside = [name for name in beside if name not in moving]
    return Suffix(tensor, tuple(beside), tuple(name for name in outputs if name in moving))


def cost_per_sample(graph: Graph, layers: Sequence[Layer], found: Sequence[Tunable]) -> float | None:
    """Floating-point operations of all measurements on one sample; None where shapes are not known."""
    each: dict[str, int] = {}
    for layer in layers:
        operations = flops(layer, graph)
        if operations is None:
            return None
        each[layer.name] = operations // len(layer.places)
    total = 0.0
    for item in found:
        moving = {item.place.output}
        for node in graph:
            if any(name in moving for name in node.inputs):
                moving.update(node.outputs)
        behind = sum(each[layer.name] for layer in layers for place in layer.places if place.input in moving)
        total += (item.shifts.stop - item.first) * float(behind)
    return total


def samples_within(cost: float | None, budget: float, wanted: int) -> int:
    """How many samples a budget of floating-point operations allows, up to those wanted; 0 if too few."""
    if cost is None:
        return 0
    allowed = wanted if cost <= 0 else min(wanted, int(budget / cost))
    return allowed if allowed >= min(LEAST_SAMPLES, wanted) else 0


class Measurement:
    """Derivatives of a sparse model's output by the scales and biases of its channels, on given samples.

    Parameters
    ----------
    dense
        The model whose output is wanted.
    positions
        Which of the outputs count.
    data
        Samples, and how many of them and in batches of what size they are used.
    """

    def __init__(
        self,
        dense: Model,
        positions: Sequence[int],
        data: Dataset,
        samples: int,
        batch_size: int,
        engine: Engine,
        seed: int,
    ) -> None:
        self._engine, self._seed, self._positions = engine, seed, tuple(positions)
        size = dense.batch_size or batch_size
        self._batches: list[Batch] = []
        for batch in data.batches(min(size, samples) if dense.batch_size is None else size):
            if sum(item.size for item in self._batches) >= samples:
                break
            self._batches.append(batch)
        self._wanted = self._outputs(dense)
        self._scales = [
            _unit([outputs[number] for outputs in self._wanted]) for number in range(len(self._positions))
        ]

    def equations(
        self, model: Model, found: Sequence[Tunable], progress: Progress
    ) -> tuple[NormalEquations, Float64]:
        """Normal equations of the model, and the unit of each parameter (1 for scales, deviations for biases)."""
        graph = model.graph
        names = [graph.outputs[i] for i in self._positions]
        before = self._outputs(model)
        units = np.ones(found[-1].shifts.stop)
        blocks: list[list[Float32]] = [[] for _ in self._batches]
        for item in found:
            part = suffix(graph, item.place.output, names)
            prefix = self._engine.compile(model.extract(outputs=(part.tensor, *part.beside)))
            rest = tuple(name for name in part.outputs if name != part.tensor)
            run = (
                self._engine.compile(model.extract(outputs=rest, inputs=(part.tensor, *part.beside)))
                if rest
                else None
            )
            tapped = [prefix.run(feeds(model, prefix, batch)) for batch in self._batches]
            deviations = _deviations([values[part.tensor] for values in tapped], item.place.channel_axis)
            units[item.shifts] = deviations[: units[item.shifts].size]
            for block, batch, values, was in zip(blocks, self._batches, tapped, before, strict=True):
                block.append(
                    self._moved(
                        item, part, values, deviations, run, dict(zip(names, was, strict=True)), batch
                    )
                )
            progress.advance()
        equations = NormalEquations(units.size)
        for block, was, wanted, batch in zip(blocks, before, self._wanted, self._batches, strict=True):
            residual = self._folded(wanted, batch.size) - self._folded(was, batch.size)
            equations.add(np.concatenate(block, axis=-1), residual)
        return equations, units

    def _outputs(self, model: Model) -> list[list[AnyArray]]:
        run = self._engine.compile(model.extract())
        names = [run.outputs[i] for i in self._positions]
        found = [run.run(feeds(model, run, batch)) for batch in self._batches]
        return [[values[name] for name in names] for values in found]

    def _folded(self, values: Sequence[AnyArray], size: int) -> Float32:
        """Outputs of a batch ``[samples, at most OUTPUTS each]``, in units of the dense output's root mean square.

        Where an output's leading dimension does not count samples, the batch is one.
        """
        samples = size if all(value.ndim and len(value) == size for value in values) else 1
        parts = []
        for number, (value, scale) in enumerate(zip(values, self._scales, strict=True)):
            flat = value.reshape(samples, -1).astype(np.float32)
            fold = sketch(flat.shape[1], OUTPUTS, self._seed + number)
            parts.append((fold @ (flat * np.float32(scale / np.sqrt(flat.shape[1]))).T).T)
        return np.concatenate(parts, axis=1)

    def _moved(
        self,
        item: Tunable,
        part: Suffix,
        values: dict[str, AnyArray],
        deviations: Float64,
        run: Executable | None,
        before: dict[str, AnyArray],
        batch: Batch,
    ) -> Float32:
        """``[samples, outputs, parameters]`` of one layer on one batch."""
        base = self._folded(list(before.values()), batch.size)
        columns = []
        for parameter in range(item.shifts.stop - item.first):
            channel = parameter % item.layer.channels
            moved = values[part.tensor].copy()
            view = np.moveaxis(moved, item.place.channel_axis, 0)[channel]
            if parameter < item.layer.channels:
                view *= 1.0 + MOVE
            else:
                view += MOVE * deviations[channel]
            changed = {part.tensor: moved}
            if run is not None:
                changed |= run.run(values | changed)
            after = [changed.get(name, was) for name, was in before.items()]
            columns.append((self._folded(after, batch.size) - base) / MOVE)
        return np.stack(columns, axis=-1)


def _unit(outputs: Sequence[AnyArray]) -> float:
    """One over the root mean square of an output over all batches; 0 for one that is always 0."""
    power = sum(float(np.sum(np.square(output, dtype=np.float64))) for output in outputs)
    return float(np.sqrt(sum(output.size for output in outputs) / power)) if power > 0 else 0.0


def _deviations(arrays: Sequence[AnyArray], axis: int) -> Float64:
    """Standard deviation of each channel; channels that never move count as one."""
    flat = np.concatenate(
        [np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in arrays], axis=1
    )
    found = flat.std(axis=1, dtype=np.float64)
    return np.where(found > 0, found, 1.0)


def rescaled(
    solutions: dict[str, Solution], found: Sequence[Tunable], step: Float64, units: Float64
) -> dict[str, Solution]:
    """Solutions with every channel's weights and bias scaled, and its bias moved; zeros stay zero."""
    result = dict(solutions)
    change = step * units
    for item in found:
        shape = (item.layer.groups, item.layer.rows)
        scale = 1.0 + change[item.scales].reshape(shape)
        start = result[item.layer.name]
        bias = start.biases[0]
        if item.biased and bias is not None:
            bias = bias * scale + change[item.shifts].reshape(shape)
        result[item.layer.name] = replace(start, weight=start.weight * scale[..., None], biases=(bias,))
    return result
