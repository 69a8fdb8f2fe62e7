"""Augmentation of calibration images (OBC, section 6): flips and crops of the samples that moments see.

Never meant for the held-out slice nor for validation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.data.images import infer_layout, shape_text
from pot_sparsity.data.preprocess import Layout
from pot_sparsity.data.sources import check_indices, check_size
from pot_sparsity.errors import DataError

KINDS = ("flip", "crop")


@dataclass(frozen=True)
class Augmentation:
    """What :class:`Augmented` does.

    Attributes
    ----------
    kinds
        ``flip``: mirrored left to right with probability 1/2. ``crop``: shifted by up to an eighth of each
        side (32 x 32 pixels by up to 4), the border repeated.
    factor
        Samples made of each: the sample itself and ``factor - 1`` random copies.
    seed
        Of all draws; a copy depends on it, on the sample's position and on the copy's number, and on nothing
        else.
    layout
        Of all inputs; None infers it from each input's shape.
    """

    kinds: tuple[str, ...]
    factor: int
    seed: int = 0
    layout: Layout | None = None


class Augmented:
    """``factor`` times as many samples: sample i at position ``i * factor``, then its random copies.

    Parameters
    ----------
    dataset
        Images of one size.
    kinds
        ``flip``, ``crop`` or both.
    factor, seed, layout
        See :class:`Augmentation`.

    Raises
    ------
    DataError
        Unknown kind, none at all for a factor above 1, factor below 1, inputs that are no images.
    """

    def __init__(
        self, dataset: Dataset, kinds: Sequence[str], factor: int, seed: int = 0, layout: Layout | None = None
    ) -> None:
        self._dataset = dataset
        self._augmentation = Augmentation(tuple(kinds), factor, seed, layout)
        self._positions: NDArray[np.int64] = np.arange(len(dataset) * factor, dtype=np.int64)
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise DataError(f"augmentation {unknown[0]!r} is not known: use {' or '.join(KINDS)}")
        if factor < 1 or (factor > 1 and not kinds):
            raise DataError(
                f"augmentation factor {factor} with kinds {list(kinds)}: give a factor >= 1 and --augment "
                "flip,crop"
            )
        first = next(iter(dataset.subset(np.zeros(1, np.int64)).batches(1)))
        for name, array in first.inputs.items():
            if array.ndim != 4 or (layout is None and infer_layout(array.shape) is None):
                raise DataError(
                    f"input {name!r} of shape {shape_text((None, *array.shape[1:]))} is no image [N,C,H,W] "
                    "or [N,H,W,C]: leave out --augment"
                )

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self._dataset.has_labels

    @cached_property
    def _fingerprint(self) -> str:
        a = self._augmentation
        settings = ["augmented", self._dataset.fingerprint, sorted(a.kinds), a.factor, a.seed, a.layout]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self._positions.tobytes())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the dataset's fingerprint, the settings and the positions."""
        return self._fingerprint

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` augmented samples; the samples behind them are read about once each."""
        for start in range(0, len(self), check_size(size)):
            positions = self._positions[start : start + size]
            samples, back = np.unique(positions // self._augmentation.factor, return_inverse=True)
            batch = next(iter(self._dataset.subset(samples).batches(len(samples))))
            inputs = {name: self._images(array, positions, back) for name, array in batch.inputs.items()}
            yield Batch(inputs, None if batch.labels is None else batch.labels[back])

    def subset(self, indices: NDArray[np.int64]) -> Augmented:
        """The augmented samples at these positions, in this order; each stays what it is in the whole."""
        part = object.__new__(Augmented)
        part._dataset = self._dataset
        part._augmentation = self._augmentation
        part._positions = self._positions[check_indices(indices, len(self))]
        return part

    def _images(self, images: AnyArray, positions: NDArray[np.int64], back: NDArray[np.int64]) -> AnyArray:
        layout = self._augmentation.layout or infer_layout(images.shape)
        axis = 1 if layout == "NHWC" else 2
        out = np.empty((len(positions), *images.shape[1:]), images.dtype)
        for row, (position, source) in enumerate(zip(positions, back, strict=True)):
            rows, columns = self._pick(int(position), images.shape[axis], images.shape[axis + 1])
            # axes of one sample stand one before those of a batch
            out[row] = images[source].take(rows, axis - 1).take(columns, axis)
        return out

    def _pick(self, position: int, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of the sample that a copy is made of."""
        sample, copy = divmod(position, self._augmentation.factor)
        if copy == 0:
            return np.arange(height), np.arange(width)
        rng = np.random.default_rng((self._augmentation.seed, sample, copy))
        return pick(rng, height, width, self._augmentation.kinds)


def pick(
    rng: np.random.Generator, height: int, width: int, kinds: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of a picture that a random copy is made of: mirrored, shifted by up to an eighth, or both."""
    rows, columns = np.arange(height), np.arange(width)
    flip = rng.random() < 0.5
    shift = [int(rng.integers(-(side // 8), side // 8 + 1)) for side in (height, width)]
    if "crop" in kinds:
        rows = np.clip(rows + shift[0], 0, height - 1)
        columns = np.clip(columns + shift[1], 0, width - 1)
    if "flip" in kinds and flip:
        columns = columns[::-1]
    return rows, columns
