"""What a sweep is going to do: zeros of every layer at every point, rounded to levels that points share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.allocation.base import Int64, zero_bounds
from pot_sparsity.algorithms.allocation.level_grid import level_grid, round_to_levels
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.allocation.allocate import allocate
from pot_sparsity.pipeline.allocation.costs import Costs, build_costs
from pot_sparsity.pipeline.compress import Surroundings
from pot_sparsity.pipeline.prepare import layer_weights
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.pipeline.store.levels import Level
from pot_sparsity.pipeline.sweeping.sweep_points import Asked, with_allocation
from pot_sparsity.recipe import OUTPUT_DISTORTION, Recipe


@dataclass(frozen=True)
class Plan:
    """One point: what was asked for, and the zeros of each layer that an allocation answers with."""

    allocation: str
    asked: Asked
    zeros: Mapping[str, int]

    @property
    def id(self) -> str:
        """Its name for users."""
        return f"{self.allocation}@{self.asked}"


def sweep_costs(model: Model, dense: Sequence[DenseLayer], recipe: Recipe, latency: Costs | None) -> Costs:
    """Costs that points are described by: bytes, operations where the model leaves no shape open, and ``latency``."""
    more = () if latency is None else ("latency",)
    try:
        return build_costs(model, dense, recipe, ("flops", "bops", "size", *more), latency=latency)
    except RecipeError:
        return build_costs(model, dense, recipe, ("size", *more), latency=latency)


def plan_points(
    around: Surroundings, costs: Costs, allocations: Sequence[str], asked: Sequence[Asked], ratio: float
) -> list[Plan]:
    """Every allocation at every point, in this order.

    Parameters
    ----------
    around
        The run; its curves serve the allocation by output distortion.
    costs
        Of every kind that is asked for.
    ratio
        Of densities of neighbouring levels.

    Raises
    ------
    RecipeError
        An allocation refuses its options, or a budget is out of reach.
    """
    return [
        Plan(method, each, _zeros(around, costs, method, each, ratio))
        for method in allocations
        for each in asked
    ]


def planned_levels(
    plans: Sequence[Plan], dense: Sequence[DenseLayer], recipe: Recipe
) -> dict[str, list[Level]]:
    """The levels of each layer that some point needs, by layer name."""
    return {
        item.layer.name: [
            Level(zeros, recipe.pruning.pattern)
            for zeros in sorted({plan.zeros[item.layer.name] for plan in plans})
        ]
        for item in dense
    }


def _zeros(around: Surroundings, costs: Costs, method: str, asked: Asked, ratio: float) -> dict[str, int]:
    recipe = with_allocation(around.recipe, method)
    budget: dict[str, float] = {} if asked.kind == "sparsity" else {asked.kind: asked.bound}
    wanted = allocate(
        around.dense,
        recipe,
        asked.bound,
        around.curves if method == OUTPUT_DISTORTION else None,
        costs=costs,
        budget=budget,
    )
    names = [item.layer.name for item in around.dense]
    sizes = np.array([item.layer.size for item in around.dense], dtype=np.int64)
    demand = np.array([wanted[name] for name in names], dtype=np.int64)
    existing, upper = zero_bounds(layer_weights(around.dense), recipe.allocation.max_layer_sparsity)
    lower, upper = np.minimum(existing, demand), np.maximum(upper, demand)
    grids = [
        level_grid(low, high, size, ratio)
        for low, high, size in zip(lower.tolist(), upper.tolist(), sizes.tolist(), strict=True)
    ]

    def keeps(zeros: Int64) -> bool:
        if asked.kind == "sparsity":
            return bool(zeros.sum() >= demand.sum())
        return cost(zeros) <= max(limit, cost(demand))

    def cost(zeros: Int64) -> float:
        return costs.total(asked.kind, dict(zip(names, zeros.tolist(), strict=True)))

    limit = 0.0 if asked.kind == "sparsity" else asked.bound * costs.dense[asked.kind]
    return dict(zip(names, round_to_levels(demand, sizes, grids, keeps).tolist(), strict=True))
