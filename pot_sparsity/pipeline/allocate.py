"""How many zeros each layer gets: from its weights alone, or from what pruning it does to the network's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pot_sparsity.algorithms.allocation import get_allocation
from pot_sparsity.algorithms.allocation.base import find_limits
from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.allocation.rate_distortion import rate_distortion
from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.errors import RecipeError
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
    dense: Sequence[DenseLayer], recipe: Recipe, sparsity: float, curves: Mapping[str, Curve] | None = None
) -> dict[str, int]:
    """Zeros of each layer; without ``curves`` an allocation that needs them falls back to one of weights.

    Raises
    ------
    RecipeError
        The allocation refuses its options or the sparsity.
    """
    settings = recipe.allocation
    layers = layer_weights(dense)
    try:
        if settings.method == OUTPUT_DISTORTION:
            if settings.options:
                raise ValueError(
                    f"allocation {settings.method!r} has no option {next(iter(settings.options))!r}"
                )
            find_limits(layers, sparsity, settings.max_layer_sparsity)
            if curves:
                return rate_distortion(
                    layers, sparsity, max_layer_sparsity=settings.max_layer_sparsity, curves=curves
                )
            method = get_allocation(FALLBACK)
        else:
            method = get_allocation(settings.method, **settings.options)
        return method(layers, sparsity, max_layer_sparsity=settings.max_layer_sparsity)
    except ValueError as error:
        raise RecipeError(f"allocation: {error}") from None
