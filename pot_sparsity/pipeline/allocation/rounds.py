"""Iterative pruning: how many zeros each round adds before curves are measured again."""

from __future__ import annotations

from collections.abc import Sequence

from pot_sparsity.algorithms.allocation.rate_distortion import round_totals
from pot_sparsity.pipeline.allocation.allocate import needs_curves
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.recipe import Recipe


def is_iterative(recipe: Recipe) -> bool:
    """Whether curves are measured again in every round, on the model that is pruned so far."""
    return recipe.allocation.rounds == "iterative" and needs_curves(recipe) and not recipe.budget


def round_sparsities(dense: Sequence[DenseLayer], recipe: Recipe) -> list[float]:
    """Sparsity after each round up to the recipe's, over all layers together.

    Each round removes the part ``allocation.removed`` of the weights that are left, the last one what it takes to
    reach the target to the weight. A model with at least that many zeros has one round.
    """
    weights = sum(item.layer.size for item in dense)
    zeros = sum(int((item.weight == 0.0).sum()) for item in dense)
    total = round(recipe.sparsity * weights)
    if zeros >= total:
        return [recipe.sparsity]
    totals = list(round_totals(weights, zeros, total, recipe.allocation.removed))
    return [*(count / weights for count in totals[:-1]), recipe.sparsity]
