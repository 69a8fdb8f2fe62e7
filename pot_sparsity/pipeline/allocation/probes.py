"""What curves are measured with: the sparsities of a layer, what prunes it, the samples, and the curve in the end."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator

from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve, build_curve
from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.allocation_settings import AllocationSettings
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.data.sources import ArraySource, SourceDataset
from pot_sparsity.errors import RecipeError
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.recipe import Recipe

#: Densities of the first and the last level that is measured; the others lie between them in equal ratios.
DENSITIES = (0.7, 0.02)
#: Levels of a finished curve.
GRID = 200


def level_sparsities(number: int, spacing: str = "density") -> Float64:
    """Sparsities at which every layer is measured, ``[number]``, ascending.

    ``density`` has densities in equal ratios; ``linear`` the ``number``-th parts of everything, as rate-distortion
    pruning (its code, for the paper does not say).
    """
    if spacing == "linear":
        return np.arange(1, number + 1, dtype=np.float64) / number
    return np.asarray(1.0 - np.geomspace(*DENSITIES, number), dtype=np.float64)


def present_zeros(item: DenseLayer, settings: AllocationSettings) -> int:
    """Zeros that a layer has before it is measured, where rounds build on each other; else none are counted."""
    return int((item.weight == 0.0).sum()) if settings.rounds == "iterative" else 0


def level_zeros(item: DenseLayer, settings: AllocationSettings) -> tuple[int, ...]:
    """Zeros at which a layer is measured: the levels are parts of what is left of it."""
    present, size = present_zeros(item, settings), item.layer.size
    sparsities = level_sparsities(settings.levels, settings.spacing)
    return tuple(present + round(float(sparsity) * (size - present)) for sparsity in sparsities)


def by_magnitude(recipe: Recipe) -> Recipe:
    """The recipe with magnitude in place of its solver."""
    pruning = recipe.pruning.model_copy(update={"method": "magnitude", "options": {}})
    correction = recipe.correction.model_copy(update={"bias": False})
    return recipe.model_copy(update={"pruning": pruning, "correction": correction})


def noise_like(samples: Dataset, number: int, seed: int) -> Dataset:
    """Standard normal noise of the shape and type of ``samples``, whose values are not looked at.

    Parameters
    ----------
    samples
        At least one.
    number
        How many samples come back.

    Raises
    ------
    RecipeError
        An input that takes whole numbers.

    Notes
    -----
    This is the zero-data variant of rate-distortion pruning (section 4.3): networks whose inputs are normalized
    expect about this distribution.
    """
    first = next(iter(samples.subset(np.zeros(1, np.int64)).batches(1)))
    random = np.random.default_rng(seed)
    noise: dict[str, AnyArray] = {}
    for name, value in first.inputs.items():
        if not np.issubdtype(value.dtype, np.floating):
            raise RecipeError(
                f"allocation.inputs 'noise' needs floating-point inputs, {name!r} takes {value.dtype}: "
                "use 'calibration'"
            )
        noise[name] = random.standard_normal((number, *value.shape[1:])).astype(value.dtype)
    return SourceDataset.whole(ArraySource(noise, None))


def finished_curve(
    item: DenseLayer,
    zeros: AnyArray,
    errors: AnyArray,
    distortion: AnyArray,
    settings: AllocationSettings,
) -> Curve:
    """A fine curve from the measured levels, cleaned and filled as the settings say.

    Parameters
    ----------
    item
        The layer as it was when it was measured.
    zeros, errors, distortion
        Of the measured levels ``[levels]``: zeros, the layer's own relative error, the output's distance.
    """
    size, start = item.layer.size, present_zeros(item, settings)
    even = np.linspace(0, size, GRID).round().astype(np.int64)
    levels = np.unique(np.concatenate([even, zeros, [start]]).astype(np.int64))
    known, first = np.unique(zeros, return_index=True)
    left = np.maximum(levels - start, 0)
    if settings.spacing == "linear":
        horizontal = left / max(1, size - start)
    else:
        horizontal = _layer_errors(left, known - start, np.asarray(errors, np.float64)[first], size - start)
    return build_curve(
        item.layer.name,
        size,
        horizontal,
        np.searchsorted(levels, known).astype(np.int64),
        np.asarray(distortion, np.float64)[first],
        {NONZEROS: (size - levels).astype(np.float64)},
        cleaning=settings.cleaning,
        scale="linear" if settings.spacing == "linear" else "log",
    )


def _layer_errors(levels: AnyArray, known: AnyArray, errors: Float64, size: int) -> Float64:
    """The layer's own error at all levels: a monotone function of the weights removed from ``size``, in logarithms."""
    logs = np.log(np.maximum.accumulate(np.maximum(errors, 1e-12)))
    fine = np.interp(levels, known, logs) if known.size < 3 else PchipInterpolator(known, logs)(levels)
    below, beyond = levels < known[0], levels > known[-1]
    fine[below] = logs[0] + 3.0 * np.log(np.maximum(levels[below], 1e-9) / known[0])
    fine[beyond] = logs[-1] * (size - levels[beyond]) / max(1, size - known[-1])
    grid = np.where(levels == 0, 0.0, np.exp(np.minimum(fine, max(0.0, float(logs[-1])))))
    return np.asarray(np.maximum.accumulate(grid))
