"""How many zeros each layer gets: from its weights alone, or from what pruning it does to the network's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.allocation import Allocation, LayerWeights, get_allocation
from pot_sparsity.algorithms.allocation.base import Int64, find_limits, named, zero_bounds
from pot_sparsity.algorithms.allocation.budgets import (
    LayerTables,
    allocate_within,
    budget_excess,
    fewest_zeros,
    keeps_all,
)
from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.allocation.rate_distortion import LevelSolver, rate_distortion
from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.layers import Layer, pattern_stride
from pot_sparsity.pipeline.allocation.costs import UNITS, Costs
from pot_sparsity.pipeline.prepare import layer_weights
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.recipe import OUTPUT_DISTORTION, Recipe

#: What stands in where output distortion cannot be measured or has no choice to make.
FALLBACK = "l2_normalized_magnitude"


def needs_curves(recipe: Recipe) -> bool:
    """Whether the recipe's allocation measures the network's output; ``n:m`` patterns leave nothing to allocate."""
    fixed = Pattern.parse(recipe.pruning.pattern).kind == "n:m"
    return recipe.allocation.method == OUTPUT_DISTORTION and not fixed


def allocate(
    dense: Sequence[DenseLayer],
    recipe: Recipe,
    sparsity: float,
    curves: Mapping[str, Curve] | None = None,
    *,
    costs: Costs | None = None,
    budget: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Zeros of each layer; without ``curves`` an allocation that needs them falls back to one of weights.

    Parameters
    ----------
    sparsity
        What counts without a budget.
    curves
        By layer name.
    costs
        Costs of every kind that has a budget.
    budget
        Bounds by kind, as :attr:`~pot_sparsity.recipe.Recipe.budget` (None: those of the recipe). As few zeros as keep
        all of them.

    Raises
    ------
    RecipeError
        The allocation refuses its options or the sparsity, or a budget is out of reach.
    """
    settings = recipe.allocation
    layers = layer_weights(dense)
    bounds = recipe.budget if budget is None else budget
    if list(bounds) == ["sparsity"]:
        sparsity, bounds = bounds["sparsity"], {}
    method = _method(recipe, curves)
    solver: LevelSolver = "hull" if settings.solver == "hull" else "dynamic_program"
    try:
        if bounds:
            if costs is None:
                raise TypeError("an allocation within budgets needs costs")
            frame = _Frame.of(dense, layers, recipe, bounds, costs)
            return _within(frame, dense, layers, recipe, method, curves or {}, solver)
        find_limits(layers, sparsity, settings.max_layer_sparsity)
        if method is None:
            return rate_distortion(
                layers,
                sparsity,
                max_layer_sparsity=settings.max_layer_sparsity,
                curves=curves or {},
                solver=solver,
            )
        return method(layers, sparsity, max_layer_sparsity=settings.max_layer_sparsity)
    except ValueError as error:
        raise RecipeError(f"allocation: {error}") from None


def _method(recipe: Recipe, curves: Mapping[str, Curve] | None) -> Allocation | None:
    """The allocation by weights; None where curves decide."""
    settings = recipe.allocation
    try:
        if settings.method != OUTPUT_DISTORTION:
            return get_allocation(settings.method, **settings.options)
        if settings.options:
            raise ValueError(f"allocation {settings.method!r} has no option {next(iter(settings.options))!r}")
        return None if curves else get_allocation(FALLBACK)
    except ValueError as error:
        raise RecipeError(f"allocation: {error}") from None


def check_budget(dense: Sequence[DenseLayer], recipe: Recipe, costs: Costs) -> None:
    """Raise RecipeError where the recipe's allocation has no such option, or a budget of it is out of reach."""
    _method(recipe, None)
    _Frame.of(dense, layer_weights(dense), recipe, recipe.budget, costs)


@dataclass(frozen=True)
class _Frame:
    """What budgets allow: ``limits`` by kind for all layers together, ``tables`` of each, and between how many zeros
    ``[layers]`` the choice is.
    """

    tables: Sequence[LayerTables]
    limits: Mapping[str, float]
    lower: Int64
    upper: Int64

    @staticmethod
    def of(
        dense: Sequence[DenseLayer],
        layers: Sequence[LayerWeights],
        recipe: Recipe,
        budget: Mapping[str, float],
        costs: Costs,
    ) -> _Frame:
        """RecipeError where a budget is out of reach."""
        most, pattern = recipe.allocation.max_layer_sparsity, Pattern.parse(recipe.pruning.pattern)
        lower, upper = zero_bounds(layers, most)
        if pattern.kind == "n:m":
            lower = upper = np.array([fixed_zeros(item.layer, pattern) for item in dense], dtype=np.int64)
        limits = {kind: costs.limit(kind, bound) for kind, bound in budget.items()}
        tables = [costs.of_layer(layer.name) for layer in layers]
        for kind, bound in budget.items():
            if not keeps_all(tables, {kind: limits[kind]}, upper):
                least = costs.fraction(kind, named(layers, upper))
                raise RecipeError(_out_of_reach(kind, bound, least, pattern, most))
        return _Frame(tables, limits, lower, upper)

    def excess(self, zeros: Int64) -> float:
        return budget_excess(self.tables, self.limits, zeros)


def _within(
    frame: _Frame,
    dense: Sequence[DenseLayer],
    layers: Sequence[LayerWeights],
    recipe: Recipe,
    method: Allocation | None,
    curves: Mapping[str, Curve],
    solver: LevelSolver,
) -> dict[str, int]:
    """The zeros of least distortion, or the fewest that ``method`` places, which keep all budgets."""
    if frame.excess(frame.lower) <= 0.0:
        return named(layers, frame.lower)
    if method is None:
        ordered = [curves[layer.name] for layer in layers]
        zeros = allocate_within(ordered, frame.tables, frame.limits, frame.lower, frame.upper, solver=solver)
    else:
        zeros = _fewest(method, layers, recipe.allocation.max_layer_sparsity, frame)
    pattern = Pattern.parse(recipe.pruning.pattern)
    if pattern.kind == "block":
        pairs = zip(dense, zeros.tolist(), strict=True)
        zeros = np.array([_whole_blocks(item.layer, pattern, count) for item, count in pairs], dtype=np.int64)
    return named(layers, zeros)


def _fewest(method: Allocation, layers: Sequence[LayerWeights], most: float, frame: _Frame) -> Int64:
    """The fewest zeros that an allocation by weights can place within the budgets."""
    weights = sum(layer.size for layer in layers)

    def place(total: int) -> Int64:
        found = method(layers, total / weights, max_layer_sparsity=most)
        return np.array([found[layer.name] for layer in layers], dtype=np.int64)

    low, high = ((int(zeros.sum()), frame.excess(zeros)) for zeros in (frame.lower, frame.upper))
    return fewest_zeros(place, frame.excess, low, high)


def fixed_zeros(layer: Layer, pattern: Pattern) -> int:
    """Zeros that an ``n:m`` pattern leaves in a layer."""
    stride = pattern_stride(layer)
    full, rest = divmod(layer.cols // stride, pattern.m)
    kept = full * pattern.n + min(rest, pattern.n)
    return layer.size - layer.channels * stride * kept


def _whole_blocks(layer: Layer, pattern: Pattern, zeros: int) -> int:
    """The number of zeros to ask for so that pruning whole blocks gives no fewer than ``zeros``.

    Blocks at the end of a position may be shorter; they are taken to go first.
    """
    stride = pattern_stride(layer)
    full, rest = divmod(layer.cols // stride, pattern.m)
    short = layer.channels * stride * (rest > 0)
    blocks = layer.channels * stride * full + short
    if zeros <= short * rest:
        count = math.ceil(zeros / max(rest, 1))
    else:
        count = short + math.ceil((zeros - short * rest) / pattern.m)
    return min(layer.size, round(count * layer.size / blocks))


def _out_of_reach(kind: str, bound: float, least: float, pattern: Pattern, most: float) -> str:
    """What to say where a budget cannot be kept."""
    reason = f"allocation.max_layer_sparsity is {most:g}" if most < 1.0 else "with all weights zero"
    if pattern.kind == "n:m":
        reason = f"pattern {pattern} fixes the zeros"
    if kind == "sparsity":
        return f"budget sparsity={bound:g} is out of reach: at most {_down(1.0 - least):g} can be zero ({reason})"
    remains = -_down(-least)
    if kind == "latency":
        return (
            f"budget latency={bound:g} is out of reach: at least {remains:g} of the dense model's time remains, a "
            f"speed-up of {1.0 / least:.2f} ({reason}); where zeros bring no speed INT8 does, and --timings FILE takes "
            "the timings of a runtime that skips zeros"
        )
    return (
        f"budget {kind}={bound:g} is out of reach: at least {remains:g} of the dense model's {UNITS[kind]} remain "
        f"({reason})"
    )


def _down(value: float) -> float:
    """Rounded down to four decimals, so that what is named is in reach."""
    return math.floor(value * 1e4) / 1e4
