"""What the pipeline reads samples through: named inputs in batches, with labels where there are any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import AnyArray


@dataclass(frozen=True)
class Batch:
    """Samples ``[n, ...]`` by model input name, preprocessed and in the input's dtype, and their labels.

    ``labels`` is int64 ``[n, ...]`` or None.
    """

    inputs: Mapping[str, AnyArray]
    labels: NDArray[np.int64] | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(next(iter(self.inputs.values())).shape[0])


class Dataset(Protocol):
    """A finite, re-iterable, ordered collection of samples."""

    def __len__(self) -> int:
        """Number of samples."""

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when the samples or their preprocessing change."""

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` samples (the last may be smaller), always in the same order."""

    def subset(self, indices: NDArray[np.int64]) -> Dataset:
        """The samples at these positions, in this order (augmented samples count one by one)."""
