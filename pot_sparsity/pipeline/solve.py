"""Pruning every layer on its own, in parallel, from the dense target and the moments of its input."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import Bool, Float64, Moments, Pattern, PruningResult
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
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
#: The solver that stands in for slower ones where only comparisons count.
QUICK = "wanda_refit"
#: Its options: products with H that bring a refit within a tenth of the least error, of wide layers too.
QUICK_OPTIONS = {"refit_products": 24}


@dataclass(frozen=True)
class DenseLayer:
    """A layer as it was: its weight, and the bias of each place (None where it may not have one).

    ``gain`` ``[groups, rows]`` is what a fused normalization has multiplied the weight by; ``prior``
    ``[groups, cols, cols]`` with a mean diagonal of 1 is what H is shrunk towards, the unit matrix if None.
    """

    layer: Layer
    weight: Float64
    biases: tuple[Float64 | None, ...]
    gain: Float64 | None = None
    prior: Float64 | None = None

    @property
    def free_bias(self) -> bool:
        """Whether every place has a bias that may change: then layer errors are centred."""
        return all(bias is not None for bias in self.biases)


@dataclass(frozen=True)
class Solution:
    """New weight and biases of a layer, and how the solver fared.

    ``shrinkage`` is the multiple of mean(diag H) that held-out samples asked to add to the diagonal of H; ``scale``
    ``[groups, rows]`` the step of the grid that the weights stand on, None where they are real.
    """

    weight: Float64
    biases: tuple[Float64 | None, ...]
    relative_error: float
    damping: float
    seconds: float = 0.0
    shrinkage: float = 0.0
    scale: Float64 | None = None

    @property
    def mask(self) -> Bool:
        """True where a weight is kept."""
        return np.asarray(self.weight != 0.0)


class LayerPruner(Protocol):
    """What prunes one layer: :func:`prune_layer`, or something that remembers what it gave."""

    def __call__(
        self,
        item: DenseLayer,
        moments: Moments,
        held_out: Moments | None,
        zeros: int,
        recipe: Recipe,
        options: SolverOptions | None = None,
        *,
        shrinkage: float | None = None,
    ) -> Solution:
        """Prune one layer; its biases stay as they were."""
        ...


def read_dense(
    model: Model, layers: Sequence[Layer], gains: Mapping[str, Float64] | None = None
) -> list[DenseLayer]:
    """Weights and biases of the prepared model, and by layer name the ``gains`` they have taken up."""
    return [
        DenseLayer(
            layer,
            read_weight(model, layer),
            tuple(read_bias(model, layer, place) for place in layer.places),
            (gains or {}).get(layer.name),
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


def quick_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the quick solver in place of its own."""
    return recipe.model_copy(
        update={"pruning": recipe.pruning.model_copy(update={"method": QUICK, "options": QUICK_OPTIONS})}
    )


def run_solver(
    recipe: Recipe, options: SolverOptions, layer: Layer, target: Float64, second: Float64, zeros: int
) -> PruningResult:
    """The recipe's solver on one layer; what it refuses is reported with the layer's name."""
    solver = SOLVERS[recipe.pruning.method]
    try:
        return solver(target, second, zeros, layer_pattern(recipe, layer), options=options)
    except (ValueError, np.linalg.LinAlgError) as error:
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
    prune: LayerPruner | None = None,
) -> dict[str, Solution]:
    """Prune all layers, biases as they were; finished layers are kept in the run folder under ``key``.

    ``prune`` does so for one layer, :func:`prune_layer` by default.

    Layers that ``held_out`` has moments for choose their shrinkage on them (see :func:`scarce`).

    Layers run in parallel with one BLAS thread each; those that would keep one thread busy when all others
    are done (see :func:`dominant`) come first, one by one, with all threads on their rows. Results do not
    depend on ``threads``.
    """
    options = solver_options(recipe)
    prune = prune or prune_layer

    def one(item: DenseLayer, options: SolverOptions) -> tuple[str, Solution]:
        name = item.layer.name
        stored = folder.load(f"{key}/{name}")
        if stored is None:
            solution = prune(item, moments[name], held_out.get(name), zeros[name], recipe, options)
            folder.store(f"{key}/{name}", pack(solution))
        else:
            solution = unpack(stored, len(item.biases))
        return name, solution

    order = sorted(dense, key=lambda item: -layer_work(item))
    alone = dominant([layer_work(item) for item in order], threads)
    by_rows = replace(options, workers=max(threads, options.workers))

    def results(pool: ThreadPoolExecutor) -> Iterator[tuple[str, Solution]]:
        for item in order[:alone]:
            yield one(item, by_rows)
        for future in as_completed([pool.submit(one, item, options) for item in order[alone:]]):
            yield future.result()

    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        try:
            found = dict(track(results(pool), progress, "Pruning layers", len(order)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {item.layer.name: found[item.layer.name] for item in dense}


def layer_work(item: DenseLayer) -> int:
    """What solving a layer costs beside others: a product of its weight with H, times its columns."""
    return item.layer.size * item.layer.cols**2


def dominant(work: Sequence[int], threads: int) -> int:
    """How many of the layers, the largest first, take more than one thread's share of what is left.

    Parameters
    ----------
    work
        What each layer costs, falling.
    threads
        How many threads there are; with one, every layer is one thread's work.
    """
    left = sum(work)
    for count, largest in enumerate(work):
        if threads == 1 or largest * threads <= left:
            return count
        left -= largest
    return len(work)


def scarce(item: DenseLayer, moments: Moments) -> bool:
    """Whether a layer has so few samples for its columns that a fit to all their detail would not carry over."""
    return moments.count < SCARCE * item.layer.cols


def centred_on(item: DenseLayer, recipe: Recipe) -> bool:
    """Whether errors of a layer leave its bias free, so that its moments are centred."""
    return bool(recipe.correction.bias) and item.free_bias


def unfused_gain(item: DenseLayer, recipe: Recipe) -> Float64 | None:
    """What to divide the rows of a weight by, ``[groups, rows]``, to have it as it was before BatchNorm was fused.

    None where the recipe does not ask for it. A row whose gain is zero holds zeros and stays as it is.
    """
    settings = recipe.pruning
    if item.gain is None or not settings.unfused or settings.method != "magnitude":
        return None
    return np.where(item.gain == 0.0, 1.0, np.abs(item.gain))


def shrunk(second: Float64, shrinkage: float, prior: Float64 | None = None) -> Float64:
    """``H + shrinkage * mean(diag H) * P``, per group, with the prior P or the unit matrix."""
    if shrinkage == 0.0:
        return second
    level = shrinkage * np.einsum("gcc->g", second) / second.shape[-1]
    target = np.eye(second.shape[-1]) if prior is None else prior
    return np.asarray(second + level[:, None, None] * target)


def _find_shrinkage(
    item: DenseLayer,
    second: Float64,
    judge: Float64,
    zeros: int,
    recipe: Recipe,
) -> float:
    """The shrinkage that serves the held-out samples best; a quick solver stands in for the recipe's."""
    quick = quick_recipe(recipe)
    options = solver_options(quick)
    best, chosen = np.inf, 0.0
    for shrinkage in (0.0, *SHRINKAGES):
        result = run_solver(
            quick, options, item.layer, item.weight, shrunk(second, shrinkage, item.prior), zeros
        )
        error = layer_error(result.weight, item.weight, judge)
        if error >= best:
            break
        best, chosen = error, shrinkage
    return chosen


def prune_layer(
    item: DenseLayer,
    moments: Moments,
    held_out: Moments | None,
    zeros: int,
    recipe: Recipe,
    options: SolverOptions | None = None,
    *,
    shrinkage: float | None = None,
) -> Solution:
    """Prune one layer; its biases stay as they were.

    Parameters
    ----------
    item, moments
        The layer and the moments of its input.
    held_out
        Moments of other samples, where the layer is :func:`scarce`: they choose the shrinkage.
    zeros
        How many weights to remove.
    recipe, options
        The solver and its options; None reads the recipe's.
    shrinkage
        Already chosen; None chooses.
    """
    start = time.perf_counter()
    centred = centred_on(item, recipe)
    second, judge = (
        None if part is None else part.centred if centred else part.second for part in (moments, held_out)
    )
    assert second is not None
    options = options or solver_options(recipe)
    if shrinkage is None:
        choose = judge is not None and 0 < zeros < item.layer.size
        shrinkage = (
            _find_shrinkage(item, second, judge, zeros, recipe) if choose and judge is not None else 0.0
        )
    gain = unfused_gain(item, recipe)
    target = item.weight if gain is None else item.weight / gain[:, :, None]
    result = run_solver(recipe, options, item.layer, target, shrunk(second, shrinkage, item.prior), zeros)
    if gain is not None:
        result = replace(result, weight=np.where(result.mask, item.weight, 0.0))
    if shrinkage or gain is not None:
        error = layer_error(result.weight, item.weight, second)
        energy = layer_error(np.zeros_like(item.weight), item.weight, second)
        result = replace(result, relative_error=error / energy if energy > 0 else 0.0)
    weight = np.where(result.mask, result.weight, 0.0)
    seconds = time.perf_counter() - start
    return Solution(weight, item.biases, result.relative_error, result.damping, seconds, shrinkage)


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
    if solution.scale is not None:
        arrays["scale"] = solution.scale
    return arrays


def unpack(arrays: Mapping[str, Any], places: int) -> Solution:
    """Inverse of :func:`pack`."""
    relative_error, damping, seconds, shrinkage = (float(value) for value in arrays["scalars"])
    biases = tuple(arrays.get(f"bias{index}") for index in range(places))
    scale = arrays.get("scale")
    return Solution(arrays["weight"], biases, relative_error, damping, seconds, shrinkage, scale)
