"""Every way to compress a layer to few bits, solved and measured: what it costs and how far it moves the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.allocation.budgets import CostTable
from pot_sparsity.algorithms.allocation.curves import Curve, aggregate_samples
from pot_sparsity.algorithms.allocation.joint_budgets import solve_joint
from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.quantization.activations import ActivationGrid
from pot_sparsity.algorithms.quantization.choices import DENSE_BITS, BitChoice
from pot_sparsity.data import Dataset, spread
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.fake_quantize import quantize_inputs
from pot_sparsity.graph.layers import Layer, flops
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.allocation.allocate import fixed_zeros
from pot_sparsity.pipeline.allocation.costs import Costs
from pot_sparsity.pipeline.allocation.curves import WORK, Look, Meter, sample_number
from pot_sparsity.pipeline.bits.ranges import Ranges, fit_ranges
from pot_sparsity.pipeline.compress import Surroundings
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, layer_work, quick_recipe
from pot_sparsity.pipeline.store.levels import Level
from pot_sparsity.recipe import Recipe

#: The kind of cost and budget.
BOPS = "bops"


@dataclass(frozen=True)
class BitLevels:
    """All choices of one layer.

    Attributes
    ----------
    item
        The dense layer.
    choices
        ``[choices]``.
    solutions
        The layer at each, on dense inputs, its bias making up for the mean error where it may.
    curve
        Bit operations per sample and distance of the network's output at each.
    """

    item: DenseLayer
    choices: tuple[BitChoice, ...]
    solutions: tuple[Solution, ...]
    curve: Curve


@dataclass(frozen=True)
class Measured:
    """All layers in the order of the network, the ranges of what they read, and the dense model's bit operations."""

    layers: tuple[BitLevels, ...]
    ranges: Ranges
    dense_bops: float

    @property
    def curves(self) -> list[Curve]:
        """One for each layer."""
        return [levels.curve for levels in self.layers]

    def chosen(self, budget: float) -> dict[str, int]:
        """Index of the choice of each layer that keeps a fraction of the dense model's bit operations.

        Raises
        ------
        RecipeError
            No choice does.
        """
        try:
            found = solve_joint(self.curves, {BOPS: budget * self.dense_bops})
        except ValueError:
            least = sum(float(curve.cost(BOPS).min()) for curve in self.curves)
            raise RecipeError(unreachable(budget, least / self.dense_bops)) from None
        return {levels.item.layer.name: int(at) for levels, at in zip(self.layers, found.levels, strict=True)}

    def bops(self, chosen: Mapping[str, int]) -> float:
        """Bit operations of a choice, as a fraction of the dense model's."""
        costs = (levels.curve.cost(BOPS)[chosen[levels.item.layer.name]] for levels in self.layers)
        return float(sum(costs)) / self.dense_bops

    def costs(self, chosen: Mapping[str, int]) -> Costs:
        """Bit operations of a choice, whatever the number of zeros, for the report."""
        tables = {}
        for levels in self.layers:
            name = levels.item.layer.name
            tables[name] = CostTable(np.zeros(1), levels.curve.cost(BOPS)[[chosen[name]]])
        return Costs({BOPS: tables}, {BOPS: self.dense_bops})


def bit_costs(model: Model, dense: Sequence[DenseLayer], recipe: Recipe) -> dict[str, dict[BitChoice, float]]:
    """Bit operations per sample of every choice of every layer.

    Multiply-accumulates times bits of weights times bits of activations times the density of the pattern, which is
    above n / m where the input channels are no multiple of m. A pattern that leaves no zeros in a layer is no choice.
    """
    costs: dict[str, dict[BitChoice, float]] = {}
    for index, item in enumerate(dense):
        fixed = recipe.mixed.first_and_last if index in (0, len(dense) - 1) else None
        names = recipe.mixed.choices if fixed is None else (fixed,)
        macs = _macs(model, item.layer)
        found: dict[BitChoice, float] = {}
        for choice in map(BitChoice.parse, names):
            zeros = zeros_of(item.layer, choice)
            if choice.pattern is not None and zeros == 0:
                choice = replace(choice, pattern=None)
            found.setdefault(choice, choice.bops(macs, 1.0 - zeros / item.layer.size))
        costs[item.layer.name] = found
    return costs


def measure_bits(around: Surroundings, samples: Dataset | None = None) -> Measured:
    """Solve and measure every choice of every layer; what was measured is kept in the run folder.

    Parameters
    ----------
    around
        The run.
    samples
        What the output is compared on; by default some of those that fit, as for rate-distortion curves.
    """
    recipe, model = around.recipe, around.prepared.model
    costs = bit_costs(model, around.dense, recipe)
    samples = samples or _samples(around)
    with around.recorder.stage("ranges of activations"):
        bits = {choice.activation_bits for found in costs.values() for choice in found}
        layers = [item.layer for item in around.dense]
        size, seed = recipe.calibration.batch_size, recipe.seed
        ranges = fit_ranges(model, layers, around.engine, samples, bits, batch_size=size, seed=seed)
    with around.recorder.stage("compression of single layers"):
        solver = quick_recipe(recipe) if sum(map(layer_work, around.dense)) > WORK else recipe
        built = around.database.build(
            around.dense,
            around.moments,
            around.held_moments,
            {
                item.layer.name: [_level(item.layer, c) for c in costs[item.layer.name]]
                for item in around.dense
            },
            solver,
            threads=around.threads,
            progress=around.progress,
        )
    with around.recorder.stage("measuring few-bit layers"):
        levels = _measure_all(around, costs, built, samples, ranges)
    total = dense_bops(model, around.dense)
    return Measured(tuple(levels[item.layer.name] for item in around.dense), ranges, total)


def _measure_all(
    around: Surroundings,
    costs: Mapping[str, Mapping[BitChoice, float]],
    built: Mapping[str, Mapping[Level, Solution]],
    samples: Dataset,
    ranges: Ranges,
) -> dict[str, BitLevels]:
    """Levels of all layers by name, as they were measured before an interruption or now."""
    levels: dict[str, BitLevels] = {}
    missing: dict[str, DenseLayer] = {}

    def solved(item: DenseLayer) -> list[Solution]:
        return [built[item.layer.name][_level(item.layer, choice)] for choice in costs[item.layer.name]]

    for item in around.dense:
        name = item.layer.name
        known = _load(around, item, costs[name], solved(item))
        if known is None:
            missing[name] = item
        else:
            levels[name] = known
    if not missing:
        return levels
    around.progress.start("Measuring few-bit layers", len(missing))
    with ExitStack() as stack:
        stack.callback(around.progress.finish)
        stack.enter_context(threadpool_limits(1))
        meter = Meter(around.prepared.model, around.engine, samples, around.recipe, stack)
        for layer, look in meter.visit([item.layer for item in missing.values()]):
            item = missing[layer.name]
            levels[layer.name] = _measured(around, item, costs[layer.name], solved(item), look, ranges)
            around.progress.advance()
    return levels


def _measured(
    around: Surroundings,
    item: DenseLayer,
    costs: Mapping[BitChoice, float],
    solved: Sequence[Solution],
    look: Look,
    ranges: Ranges,
) -> BitLevels:
    """Distances of the output at every choice of a layer, with the bias that makes up for the mean error."""
    layer = item.layer
    free = item.free_bias and not layer.shared and bool(around.recipe.correction.bias)
    wanted = look.output_means(lambda model: None) if free else None
    solutions, distances = [], []
    for choice, solution in zip(costs, solved, strict=True):
        grids = input_grids([layer], {layer.name: choice}, ranges)
        if wanted is not None:
            found = look.output_means(partial(_compressed, layer=layer, solution=solution, grids=grids))
            missed = (wanted - found).reshape(layer.groups, layer.rows)
            solution = replace(
                solution, biases=tuple(None if b is None else b + missed for b in solution.biases)
            )
        distances.append(look.of(partial(_compressed, layer=layer, solution=solution, grids=grids)))
        solutions.append(solution)
    distortion = aggregate_samples(np.stack(distances, axis=1), around.recipe.allocation.aggregate)
    arrays: dict[str, Float64] = {"distortion": distortion}
    for index, solution in enumerate(solutions):
        for place, bias in enumerate(solution.biases):
            if bias is not None:
                arrays[f"bias{index}_{place}"] = bias
    around.folder.store(f"bits/{layer.name}", arrays)
    return _levels(item, costs, solutions, distortion)


def _compressed(
    model: Model,
    *,
    layer: Layer,
    solution: Solution,
    grids: Mapping[str, Mapping[str, ActivationGrid]],
) -> None:
    """Put one compressed layer into a dense model."""
    apply(model, layer, solution)
    quantize_inputs(model, [layer], grids)


def _load(
    around: Surroundings, item: DenseLayer, costs: Mapping[BitChoice, float], solved: Sequence[Solution]
) -> BitLevels | None:
    """What an interrupted run has measured."""
    stored = around.folder.load(f"bits/{item.layer.name}")
    if stored is None:
        return None
    solutions = [
        replace(
            solution,
            biases=tuple(stored.get(f"bias{index}_{place}") for place in range(len(solution.biases))),
        )
        for index, solution in enumerate(solved)
    ]
    return _levels(item, costs, solutions, np.asarray(stored["distortion"], np.float64))


def _levels(
    item: DenseLayer,
    costs: Mapping[BitChoice, float],
    solutions: Sequence[Solution],
    distortion: Float64,
) -> BitLevels:
    layer = item.layer
    curve = Curve(layer.name, layer.size, distortion, {BOPS: np.array(list(costs.values()))})
    return BitLevels(item, tuple(costs), tuple(solutions), curve)


def input_grids(
    layers: Sequence[Layer], choices: Mapping[str, BitChoice], ranges: Ranges
) -> dict[str, dict[str, ActivationGrid]]:
    """The grid of every tensor that a layer reads, by layer and tensor."""
    return {
        layer.name: {
            place.input: ranges[place.input][choices[layer.name].activation_bits] for place in layer.places
        }
        for layer in layers
    }


def _level(layer: Layer, choice: BitChoice) -> Level:
    pattern = "unstructured" if choice.pattern is None else str(choice.pattern)
    return Level(zeros_of(layer, choice), pattern, choice.weight_bits)


def zeros_of(layer: Layer, choice: BitChoice) -> int:
    """Zeros that the pattern of a choice leaves in a layer."""
    return 0 if choice.pattern is None else fixed_zeros(layer, choice.pattern)


def _macs(model: Model, layer: Layer) -> float:
    operations = flops(layer, model.graph)
    if operations is None:
        raise RecipeError(
            f"a budget of {BOPS} needs the FLOPs of layer {layer.name!r}, which depend on a dimension that the model "
            "leaves open: fix the model's input shape"
        )
    return operations / 2.0


def dense_bops(model: Model, dense: Sequence[DenseLayer]) -> float:
    """Bit operations per sample of the layers as they came: 32 x 32 bits per multiply-accumulate."""
    return sum(_macs(model, item.layer) for item in dense) * DENSE_BITS**2


def _samples(around: Surroundings) -> Dataset:
    most = sample_number(around.dense, around.moments, len(around.fit), around.recipe)
    return spread(around.fit, max(most, around.prepared.model.batch_size or 1))


def unreachable(budget: float, least: float) -> str:
    """What to say where the cheapest choices leave more than a budget."""
    return (
        f"a budget of {BOPS}={budget:g} is out of reach: the cheapest choices of all layers leave {least:.4g}; raise "
        "it, or add cheaper ones to mixed.choices"
    )
