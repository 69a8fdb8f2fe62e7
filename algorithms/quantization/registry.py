"""The quantizers by name. A new method is one function and one line here."""

from __future__ import annotations

from pot_sparsity.algorithms.arrays import Bool, Float64
from pot_sparsity.algorithms.quantization.descent import descend
from pot_sparsity.algorithms.quantization.gptq import gptq
from pot_sparsity.algorithms.quantization.grid import Grid
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
    """A quantizer followed by coordinate descent from where it ends."""

    def __init__(self, first: Quantizer) -> None:
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
        start = self._first(target, second, grid, mask, options=options)
        problem = GridProblem.of(target, second, mask)
        integers, found = descend(problem, start.integers, grid, options)
        return problem.result(integers, found, start.damping)


QUANTIZERS: dict[str, Quantizer] = {
    "gptq_descent": _ThenDescent(gptq),
    "obq_descent": _ThenDescent(obq),
    "nearest_descent": _ThenDescent(nearest),
    "gptq": gptq,
    "obq": obq,
    "nearest": nearest,
}
DEFAULT_QUANTIZER = "gptq_descent"


def get_quantizer(name: str) -> Quantizer:
    """Quantizer of that name; raises ValueError with the names there are."""
    try:
        return QUANTIZERS[name]
    except KeyError:
        raise ValueError(f"quantizer {name!r} is not known: use one of {', '.join(QUANTIZERS)}") from None
