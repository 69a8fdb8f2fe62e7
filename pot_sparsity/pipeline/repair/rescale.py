"""Scales and biases of all output channels tuned together against the dense network's output.

The derivative of the output by each channel's scale and bias is measured: one channel of one layer's output is moved
a little, and only the part of the network behind it runs. That needs no gradients, so any operator will do; what it
costs is known beforehand, and decides which layers take part (:func:`tunables`).
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
OUTPUTS = 64
#: Largest number of scales and biases: their normal equations are dense.
PARAMETERS = 3000


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


def tunables(graph: Graph, dense: Sequence[DenseLayer], budget: float) -> list[Tunable]:
    """Layers whose scales and biases are worth their price, in the given order.

    The cheapest come first, which are those at the end of the network, until ``budget`` floating-point operations per
    sample or :data:`PARAMETERS` are spent. Left out are shared weights, layers of unknown shapes, and stacks of
    matrices, which have no channel axis of their own.
    """
    first = 0
    affordable: set[str] = set()
    for item in sorted(dense, key=lambda item: _price(graph, dense, item)):
        stacked = not isinstance(item.layer.places[0].geometry, ConvGeometry) and item.layer.groups > 1
        if item.layer.shared or stacked:
            continue
        size = item.layer.channels * (1 if item.biases[0] is None else 2)
        budget -= size * _price(graph, dense, item)
        if budget < 0 or first + size > PARAMETERS:
            break
        affordable.add(item.layer.name)
        first += size
    found: list[Tunable] = []
    for item in dense:
        if item.layer.name in affordable:
            first = found[-1].shifts.stop if found else 0
            found.append(Tunable(item.layer, item.layer.places[0], first, item.biases[0] is not None))
    return found


def _price(graph: Graph, dense: Sequence[DenseLayer], item: DenseLayer) -> float:
    """Floating-point operations of the layers behind a layer on one sample; infinite where shapes are not known."""
    moving = {place.output for place in item.layer.places}
    for node in graph:
        if any(name in moving for name in node.inputs):
            moving.update(node.outputs)
    total = 0.0
    for other in dense:
        uses = sum(place.input in moving for place in other.layer.places)
        if uses:
            operations = flops(other.layer, graph)
            total += np.inf if operations is None else operations * uses / len(other.layer.places)
    return total


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


class Measurement:
    """Derivatives of a sparse model's output by the scales and biases of its channels, on given samples.

    Parameters
    ----------
    dense
        The model whose output is wanted. Only floating-point outputs count whose first axis runs over the samples and
        whose other axes do not change from batch to batch.
    data
        Samples.
    samples, batch_size
        How many of them are used, and how many at once.
    seed
        Of the signs that fold large outputs.

    Attributes
    ----------
    outputs
        Positions of the outputs that count; without any there is nothing to measure.
    """

    def __init__(
        self, dense: Model, data: Dataset, samples: int, batch_size: int, engine: Engine, seed: int
    ) -> None:
        self._engine = engine
        self._batches: list[Batch] = []
        for batch in data.batches(dense.batch_size or min(batch_size, samples)):
            if sum(item.size for item in self._batches) >= samples:
                break
            self._batches.append(batch)
        everything = self._run(dense, range(len(dense.outputs)))
        self.outputs = [
            number
            for number in range(len(dense.outputs))
            if self._counts([found[number] for found in everything])
        ]
        self._wanted = [[found[number] for number in self.outputs] for found in everything]
        self._folds = []
        for number in range(len(self.outputs)):
            values = [found[number] for found in self._wanted]
            width = values[0][0].size
            self._folds.append(
                sketch(width, OUTPUTS, seed + number) * np.float32(_unit(values) / np.sqrt(width))
            )

    def _counts(self, values: Sequence[AnyArray]) -> bool:
        sizes = [batch.size for batch in self._batches]
        return all(
            value.dtype.kind == "f"
            and value.ndim > 1
            and len(value) == size
            and value.shape[1:] == values[0].shape[1:]
            for value, size in zip(values, sizes, strict=True)
        )

    def equations(
        self, model: Model, found: Sequence[Tunable], progress: Progress
    ) -> tuple[NormalEquations, Float64]:
        """Normal equations of the model, and the unit of each parameter (1 for scales, deviations for biases)."""
        graph = model.graph
        names = [graph.outputs[number] for number in self.outputs]
        before = self._run(model, self.outputs)
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
            for block, values, was in zip(blocks, tapped, before, strict=True):
                outputs = dict(zip(names, was, strict=True))
                block.append(self._moved(item, part, values, deviations, run, outputs))
            progress.advance()
        equations = NormalEquations(units.size)
        for block, was, wanted in zip(blocks, before, self._wanted, strict=True):
            residual = self._folded(wanted) - self._folded(was)
            equations.add(np.concatenate(block, axis=-1), residual)
        return equations, units

    def _run(self, model: Model, positions: Sequence[int]) -> list[list[AnyArray]]:
        """Some outputs, batch by batch."""
        run = self._engine.compile(model.extract())
        found = [run.run(feeds(model, run, batch)) for batch in self._batches]
        return [[values[run.outputs[number]] for number in positions] for values in found]

    def _folded(self, values: Sequence[AnyArray]) -> Float32:
        """``[samples, at most OUTPUTS each]``, each output in units of the dense one's root mean square."""
        flat = [value.reshape(len(value), -1).astype(np.float32) for value in values]
        return np.concatenate(
            [(fold @ part.T).T for part, fold in zip(flat, self._folds, strict=True)], axis=1
        )

    def _moved(
        self,
        item: Tunable,
        part: Suffix,
        values: dict[str, AnyArray],
        deviations: Float64,
        run: Executable | None,
        before: dict[str, AnyArray],
    ) -> Float32:
        """``[samples, outputs, parameters]`` of one layer on one batch."""
        base = self._folded(list(before.values()))
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
            columns.append((self._folded(after) - base) / MOVE)
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
