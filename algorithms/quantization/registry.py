"""The quantizers by name. A new method is one function and one line here."""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.pruning.problem import row_errors
from pot_sparsity.algorithms.quantization.descent import descend
from pot_sparsity.algorithms.quantization.gptq import gptq
from pot_sparsity.algorithms.quantization.grid import Grid, merge_grids
from pot_sparsity.algorithms.quantization.obq import obq
from pot_sparsity.algorithms.quantization.problem import (
    DEFAULT_OPTIONS,
    GridProblem,
    QuantizedResult,
    Quantizer,
    QuantizerOptions,
)


def nearest(
    target: Float64,
    second: Float64,
    grid: Grid,
    mask: Bool | None = None,
    *,
    options: QuantizerOptions = DEFAULT_OPTIONS,
) -> QuantizedResult:
    """Round every kept weight on its own (a :class:`Quantizer`): the baseline."""
    problem = GridProblem.of(target, second, mask)
    return problem.result(problem.nearest(grid), grid, 0.0)


class _ThenDescent:
    """Quantizers followed by coordinate descent from where each ends; every row keeps the better end."""

    def __init__(self, *first: Quantizer) -> None:
        self._first = first

    def __call__(
        self,
        target: Float64,
        second: Float64,
        grid: Grid,
        mask: Bool | None = None,
        *,
        options: QuantizerOptions = DEFAULT_OPTIONS,
    ) -> QuantizedResult:
        """Quantize, then sweep until no integer can change for the better."""
        problem = GridProblem.of(target, second, mask)
        best: QuantizedResult | None = None
        for quantizer in self._first:
            start = quantizer(target, second, grid, mask, options=options)
            integers, found = descend(problem, start.integers, grid, options)
            end = problem.result(integers, found, start.damping)
            best = end if best is None else _better_rows(problem, best, end)
        assert best is not None
        return best


def _better_rows(problem: GridProblem, first: QuantizedResult, second: QuantizedResult) -> QuantizedResult:
    """Every row from the result that serves it best."""
    layer = problem.layer
    errors = [row_errors(result.weight, layer.target, layer.given) for result in (first, second)]
    take = errors[1] < errors[0]
    integers = np.where(take[..., None], second.integers, first.integers)
    grid = first.grid if second.grid is first.grid else merge_grids(first.grid, second.grid, take)
    return problem.result(integers, grid, max(first.damping, second.damping))


QUANTIZERS: dict[str, Quantizer] = {
    "best_descent": _ThenDescent(gptq, obq),
    "gptq_descent": _ThenDescent(gptq),
    "obq_descent": _ThenDescent(obq),
    "nearest_descent": _ThenDescent(nearest),
    "gptq": gptq,
    "obq": obq,
    "nearest": nearest,
}


def get_quantizer(name: str) -> Quantizer:
    """Quantizer of that name; raises ValueError with the names there are."""
    try:
        return QUANTIZERS[name]
    except KeyError:
        raise ValueError(f"quantizer {name!r} is not known: use one of {', '.join(QUANTIZERS)}") from None
