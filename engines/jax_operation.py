"""What a rule of the differentiable engine is given: one OpenVINO operator with everything static known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray

#: A traced array, or a numpy array where the value depends on neither inputs nor trainable constants.
Operand: TypeAlias = jax.Array | AnyArray


@dataclass(frozen=True)
class Operation:
    """One operator of the model.

    Attributes
    ----------
    kind
        OpenVINO's name of the operator type, e.g. ``GroupConvolution``.
    version
        The operator set that defines it, e.g. ``opset8``.
    attributes
        Its attributes, as OpenVINO reports them.
    shapes
        Shapes of its outputs.
    dtypes
        Types of its outputs, of at most 32 bits; all floating types are float32.
    """

    kind: str
    version: str
    attributes: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[np.generic], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.shapes[0]


#: Computes an operator's first output, or a list of all of them; NotImplementedError where a mode is not covered.
Rule: TypeAlias = Callable[[Operation, Sequence[Operand]], jax.Array | list[jax.Array]]


def static(operand: Operand, what: str) -> AnyArray:
    """The value of an operand that must be known before tracing; NotImplementedError if it is not."""
    if not isinstance(operand, np.ndarray):
        raise NotImplementedError(f"computed {what}")
    return operand


def static_axes(operand: Operand, rank: int) -> tuple[int, ...]:
    """Non-negative axes out of a static operand of integers (a scalar counts as one axis)."""
    return tuple(int(axis) % rank for axis in static(operand, "axes").reshape(-1))
