"""Pruning every layer on its own, in parallel, from the dense target and the moments of its input."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import Bool, Float64, Moments, Pattern, PruningResult
from pot_sparsity.algorithms.correction import (
    activation_bias_correction,
    exact_weight_correction,
    pot_weight_correction,
)
from pot_sparsity.algorithms.pruning.problem import SolverOptions, layer_error
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.errors import PotSparsityError, RecipeError
from pot_sparsity.graph.layers import Layer, pattern_stride
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_bias, read_weight, write_bias, write_weight
from pot_sparsity.pipeline.progress import Progress, track
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.recipe import Recipe

#: A layer with fewer samples per column than this asks held-out samples how far to trust its moments.
SCARCE = 32
#: Multiples of mean(diag H) that it may add to the diagonal, tried in this order while they help.
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class DenseLayer:
    """A layer as it was: its weight, and the bias of each place (None where it may not have one)."""

    layer: Layer
    weight: Float64
    biases: tuple[Float64 | None, ...]

    @property
    def free_bias(self) -> bool:
        """Whether every place has a bias that may change: then layer errors are centred."""
        return all(bias is not None for bias in self.biases)


@dataclass(frozen=True)
class Solution:
    """New weight and biases of a layer, and how the solver fared.

    ``shrinkage`` is the multiple of mean(diag H) that held-out samples asked to add to the diagonal of H.
    """

    weight: Float64
    biases: tuple[Float64 | None, ...]
    relative_error: float
    damping: float
    seconds: float = 0.0
    shrinkage: float = 0.0

    @property
    def mask(self) -> Bool:
        """True where a weight is kept."""
        return np.asarray(self.weight != 0.0)


def read_dense(model: Model, layers: Sequence[Layer]) -> list[DenseLayer]:
    """Weights and biases of the prepared model."""
    return [
        DenseLayer(
            layer,
            read_weight(model, layer),
            tuple(read_bias(model, layer, place) for place in layer.places),
        )
        for layer in layers
    ]


def layer_pattern(recipe: Recipe, layer: Layer) -> Pattern:
    """The recipe's pattern, running over input channels at one kernel position."""
    pattern = Pattern.parse(recipe.pruning.pattern)
    return replace(pattern, stride=pattern_stride(layer)) if pattern.kind != "unstructured" else pattern


def solver_options(recipe: Recipe) -> SolverOptions:
    """The recipe's solver options; RecipeError for one that does not exist or has an illegal value."""
    options: dict[str, Any] = dict(recipe.pruning.options)
    known = set(SolverOptions.__dataclass_fields__)
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(f"pruning.options has no key {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if isinstance(options.get("rho"), (int, float)):
        options["rho"] = (float(options["rho"]),)
    try:
        return SolverOptions(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"pruning.options: {error}") from None


def run_solver(
    recipe: Recipe, options: SolverOptions, layer: Layer, target: Float64, second: Float64, zeros: int
) -> PruningResult:
    """The recipe's solver on one layer; what it refuses is reported with the layer's name."""
    solver = SOLVERS[recipe.pruning.method]
    try:
        return solver(target, second, zeros, layer_pattern(recipe, layer), options=options)
    except (ValueError, np.linalg.LinAlgError) as error:
        if isinstance(error, ValueError) and recipe.pruning.pattern != "unstructured":
            raise RecipeError(
                f"layer {layer.name!r}: {error}; choose another pattern or leave the layer dense with --ignored-name"
            ) from error
        raise PotSparsityError(f"layer {layer.name!r}: {error}") from error


def prune_layers(
    dense: Sequence[DenseLayer],
    moments: Mapping[str, Moments],
    held_out: Mapping[str, Moments],
    zeros: Mapping[str, int],
    recipe: Recipe,
    *,
    threads: int,
    folder: RunFolder,
    key: str,
    progress: Progress,
) -> dict[str, Solution]:
    """Prune all layers; finished ones are kept in the run folder under ``key``.

    Layers that ``held_out`` has moments for choose their shrinkage on them (see :func:`scarce`).

    Layers run in parallel with one BLAS thread each: results do not depend on ``threads``.
    """
    options = solver_options(recipe)

    def one(item: DenseLayer) -> tuple[str, Solution]:
        name = item.layer.name
        stored = folder.load(f"{key}/{name}")
        if stored is None:
            solution = _prune(item, moments[name], held_out.get(name), zeros[name], recipe, options)
            folder.store(f"{key}/{name}", pack(solution))
        else:
            solution = unpack(stored, len(item.biases))
        return name, solution

    order = sorted(dense, key=lambda item: -item.layer.size * item.layer.cols**2)
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one, item) for item in order]
        try:
            results = (future.result() for future in as_completed(futures))
            found = dict(track(results, progress, "Pruning layers", len(order)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {item.layer.name: found[item.layer.name] for item in dense}


def scarce(item: DenseLayer, moments: Moments) -> bool:
    """Whether a layer has so few samples for its columns that a fit to all their detail would not carry over."""
    return moments.count < SCARCE * item.layer.cols


def shrunk(second: Float64, shrinkage: float) -> Float64:
    """``H + shrinkage * mean(diag H) * I``, per group."""
    if shrinkage == 0.0:
        return second
    level = shrinkage * np.einsum("gcc->g", second) / second.shape[-1]
    return np.asarray(second + level[:, None, None] * np.eye(second.shape[-1]))


def _solve_layer(
    item: DenseLayer,
    second: Float64,
    judge: Float64 | None,
    zeros: int,
    recipe: Recipe,
    options: SolverOptions,
) -> tuple[PruningResult, float]:
    """Run the solver, with the shrinkage that serves the held-out samples best where there are any to ask."""
    result = run_solver(recipe, options, item.layer, item.weight, second, zeros)
    if judge is None or not 0 < zeros < item.layer.size:
        return result, 0.0
    best, chosen = layer_error(result.weight, item.weight, judge), 0.0
    for shrinkage in SHRINKAGES:
        other = run_solver(recipe, options, item.layer, item.weight, shrunk(second, shrinkage), zeros)
        error = layer_error(other.weight, item.weight, judge)
        if error >= best:
            break
        best, chosen, result = error, shrinkage, other
    if chosen:
        error = layer_error(result.weight, item.weight, second)
        energy = layer_error(np.zeros_like(item.weight), item.weight, second)
        result = replace(result, error=error, relative_error=error / energy if energy > 0 else 0.0)
    return result, chosen


def _prune(
    item: DenseLayer,
    moments: Moments,
    held_out: Moments | None,
    zeros: int,
    recipe: Recipe,
    options: SolverOptions,
) -> Solution:
    start = time.perf_counter()
    centred = recipe.correction.bias and item.free_bias
    second, judge = (
        None if part is None else part.centred if centred else part.second for part in (moments, held_out)
    )
    assert second is not None
    result, shrinkage = _solve_layer(item, second, judge, zeros, recipe, options)
    weight = result.weight
    if recipe.correction.weights == "published":
        weight = pot_weight_correction(weight, item.weight)
    elif recipe.correction.weights == "exact":
        weight = exact_weight_correction(weight, item.weight)
    weight = np.where(result.mask, weight, 0.0)
    biases = tuple(
        activation_bias_correction(item.weight, weight, moments.mean, bias)
        if recipe.correction.bias and bias is not None
        else bias
        for bias in item.biases
    )
    seconds = time.perf_counter() - start
    return Solution(weight, biases, result.relative_error, result.damping, seconds, shrinkage)


def apply(model: Model, layer: Layer, solution: Solution) -> None:
    """Write a solution into the model, in the model's own types."""
    write_weight(model, layer, solution.weight)
    for place, bias in zip(layer.places, solution.biases, strict=True):
        if bias is not None:
            write_bias(model, layer, place, bias)


def pack(solution: Solution) -> dict[str, np.ndarray]:
    """A solution as arrays, for the run folder."""
    arrays: dict[str, np.ndarray] = {
        "weight": solution.weight,
        "scalars": np.array(
            [solution.relative_error, solution.damping, solution.seconds, solution.shrinkage]
        ),
    }
    for index, bias in enumerate(solution.biases):
        if bias is not None:
            arrays[f"bias{index}"] = bias
    return arrays


def unpack(arrays: Mapping[str, Any], places: int) -> Solution:
    """Inverse of :func:`pack`."""
    relative_error, damping, seconds, shrinkage = (float(value) for value in arrays["scalars"])
    biases = tuple(arrays.get(f"bias{index}") for index in range(places))
    return Solution(arrays["weight"], biases, relative_error, damping, seconds, shrinkage)
