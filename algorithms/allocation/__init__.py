"""Allocation: which sparsity each layer gets. A method is one file and one line in :data:`ALLOCATIONS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from pot_sparsity.algorithms.allocation.base import Allocation, LayerWeights, total_zeros
from pot_sparsity.algorithms.allocation.erk import erk
from pot_sparsity.algorithms.allocation.l2_normalized_magnitude import l2_normalized_magnitude
from pot_sparsity.algorithms.allocation.lamp import lamp
from pot_sparsity.algorithms.allocation.magnitude import magnitude
from pot_sparsity.algorithms.allocation.uniform import uniform

__all__ = ["ALLOCATIONS", "Allocation", "LayerWeights", "get_allocation", "total_zeros"]

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "magnitude": magnitude,
    "l2_normalized_magnitude": l2_normalized_magnitude,
    "lamp": lamp,
    "erk": erk,
}


def get_allocation(name: str = "l2_normalized_magnitude", **options: float) -> Allocation:
    """Look up a method and bind its options.

    Parameters
    ----------
    name
        Key of :data:`ALLOCATIONS`.
    **options
        Keyword options of the method: ``max_layer_sparsity`` (all), ``protect_first_last`` (uniform),
        ``unfused`` (magnitude), ``power`` (erk).

    Raises
    ------
    ValueError
        Unknown method or option; the text lists those that exist.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"allocation {name!r} is not known: use one of {', '.join(ALLOCATIONS)}")
    method: Callable[..., dict[str, int]] = ALLOCATIONS[name]
    parameters = inspect.signature(method).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"allocation {name!r} has no option {option!r}: it has {', '.join(known)}")
    return partial(method, **options) if options else method
