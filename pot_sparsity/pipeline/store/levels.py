"""Levels of compression: how many weights of a layer are pruned, in which pattern, and the bits of those left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pot_sparsity.algorithms.arrays import Moments, Pattern
from pot_sparsity.algorithms.pruning.problem import layer_error
from pot_sparsity.algorithms.quantization.grid import fit_grid
from pot_sparsity.algorithms.quantization.registry import QUANTIZERS
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.pipeline.solve import DenseLayer, Solution, centred_on, shrunk
from pot_sparsity.recipe import Recipe

#: OBC's levels: each keeps this share of the one before, so many of them.
RATIO = 0.9
LEVELS = 40
#: Multiplications that factors of single rows may take in quantization; beyond that it does without OBQ's order.
_FACTOR_BUDGET = 1e11


@dataclass(frozen=True)
class Level:
    """One way to compress a layer.

    Attributes
    ----------
    zeros
        Weights that are pruned; ``n:m`` patterns fix the count whatever stands here.
    pattern
        Where they may stand, in the recipe's words.
    bits
        Weights that are left stand on a symmetric grid of ``2^bits`` levels per row; None leaves them real.
    """

    zeros: int
    pattern: str = "unstructured"
    bits: int | None = None


def default_levels(
    size: int,
    patterns: Sequence[str] = ("unstructured",),
    bits: Sequence[int | None] = (None,),
    *,
    count: int = LEVELS,
    ratio: float = RATIO,
) -> tuple[Level, ...]:
    """Levels of a layer of ``size`` weights: dense, then densities ``ratio^i`` of each pattern, each with all bits.

    Levels of tiny layers that would prune the same number of weights appear once; an ``n:m`` pattern has one level.
    """
    found: list[tuple[int, str]] = [(0, "unstructured")]
    for text in patterns:
        pattern = Pattern.parse(text)
        if pattern.kind == "n:m":
            found.append((size - size * pattern.n // pattern.m, text))
        else:
            found += [(round((1.0 - ratio**step) * size), text) for step in range(1, count)]
    unique = dict.fromkeys((zeros, text) for zeros, text in found if zeros or text == "unstructured")
    return tuple(Level(zeros, text, width) for zeros, text in unique for width in bits)


def with_pattern(recipe: Recipe, pattern: str) -> Recipe:
    """The recipe with another pattern."""
    if recipe.pruning.pattern == pattern:
        return recipe
    return recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update={"pattern": pattern})})


def quantize_layer(
    item: DenseLayer, moments: Moments, sparse: Solution, recipe: Recipe, bits: int
) -> Solution:
    """Place the weights that a solution keeps on a symmetric grid per row, as a whole; zeros stay zeros.

    OBQ and GPTQ, each followed by descent, the better for every row; GPTQ alone where rows are many and wide.

    Parameters
    ----------
    item, moments
        The layer and the moments of its input.
    sparse
        Its pruned weights.
    bits
        2 to 16.

    Raises
    ------
    PotSparsityError
        ``bits`` is out of range, or no damping makes the moments definite.
    """
    second = moments.centred if centred_on(item, recipe) else moments.second
    trusted = shrunk(second, sparse.shrinkage, item.prior)
    kept = sparse.mask.sum(axis=-1).astype(np.float64)
    method = "best_descent" if (kept**3 / 6).sum() <= _FACTOR_BUDGET else "gptq_descent"
    try:
        grid = fit_grid(sparse.weight, bits, importance=np.einsum("gcc->gc", trusted))
        placed = QUANTIZERS[method](item.weight, trusted, grid, sparse.mask)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise PotSparsityError(f"layer {item.layer.name!r}: {error}") from error
    energy = layer_error(np.zeros_like(item.weight), item.weight, second)
    left = layer_error(placed.weight, item.weight, second)
    return replace(
        sparse,
        weight=placed.weight,
        relative_error=left / energy if energy > 0 else 0.0,
        damping=max(sparse.damping, placed.damping),
        scale=placed.grid.scale,
    )
