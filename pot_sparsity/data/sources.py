"""Where samples come from, and the one :class:`Dataset` over all of these sources.

A source reads samples by position; :class:`SourceDataset` adds order, batches and subsets. Folders and
sequences are read batch by batch, so that memory holds one batch however many samples there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.dataset import Batch
from pot_sparsity.data.images import ImageInput, Pixels
from pot_sparsity.data.labels import Labels
from pot_sparsity.data.samples import SampleReader
from pot_sparsity.errors import DataError

Indices = NDArray[np.int64]
_HASH_CHUNK = 256
_DECODERS = 2


class Digest(Protocol):
    """A hash in progress."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


class Source(Protocol):
    """Samples by position."""

    def __len__(self) -> int:
        """Number of samples."""

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""

    def read(self, indices: Indices) -> Batch:
        """The samples at these positions, in this order."""

    def digest(self, indices: Indices, into: Digest) -> None:
        """Add the content of these samples (and how they are preprocessed) to a hash."""


@dataclass(frozen=True, eq=False)
class SourceDataset:
    """A :class:`Dataset`: some samples of a source, in some order."""

    source: Source
    indices: Indices

    @classmethod
    def whole(cls, source: Source) -> SourceDataset:
        """All samples of a source in its own order."""
        return cls(source, np.arange(len(source), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self.source.has_labels

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        digest.update(str(len(self)).encode())
        for start in range(0, len(self), _HASH_CHUNK):
            self.source.digest(self.indices[start : start + _HASH_CHUNK], digest)
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of the samples, their order, labels and preprocessing."""
        return self._fingerprint

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` samples, the last may be smaller; DataError where a sample cannot be read."""
        for start in range(0, len(self), check_size(size)):
            yield self.source.read(self.indices[start : start + size])

    def subset(self, indices: Indices) -> SourceDataset:
        """The samples at these positions, in this order."""
        return SourceDataset(self.source, self.indices[check_indices(indices, len(self))])


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Ready arrays ``[N, ...]`` by model input name, in memory."""

    arrays: Mapping[str, AnyArray]
    labels: Labels | None = None

    def __len__(self) -> int:
        return int(next(iter(self.arrays.values())).shape[0])

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self.labels is not None

    def read(self, indices: Indices) -> Batch:
        """The samples at these positions, in this order."""
        return Batch(
            {name: array[indices] for name, array in self.arrays.items()}, _take(self.labels, indices)
        )

    def digest(self, indices: Indices, into: Digest) -> None:
        """Add names, dtypes, shapes and values to a hash."""
        _digest_batch(self.read(indices), into)


@dataclass(frozen=True, eq=False)
class PictureSource:
    """Pictures ``[N, H, W, C]`` uint8 in memory, preprocessed batch by batch."""

    pictures: Pixels
    image_input: ImageInput
    labels: Labels | None = None

    def __len__(self) -> int:
        return int(self.pictures.shape[0])

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self.labels is not None

    def read(self, indices: Indices) -> Batch:
        """The samples at these positions, in this order."""
        inputs = self.image_input.to_model(self.image_input.fit(self.pictures[indices]))
        return Batch({self.image_input.name: inputs}, _take(self.labels, indices))

    def digest(self, indices: Indices, into: Digest) -> None:
        """Add pixels and preprocessing to a hash."""
        _digest_preprocessing(self.image_input, into)
        _digest_batch(Batch({"images": self.pictures[indices]}, _take(self.labels, indices)), into)


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files below a folder, decoded batch by batch.

    Attributes
    ----------
    files
        Paths relative to ``folder``, with ``/``.
    """

    folder: Path
    files: tuple[str, ...]
    image_input: ImageInput
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self.labels is not None

    def check(self, indices: Indices) -> None:
        """Open every header; DataError at the first file that is no image or comes out in another size."""
        first: tuple[str, tuple[int, int]] | None = None
        for i in indices:
            file = self.files[i]
            size = self.image_input.header_size(self.folder / file)
            if first is None:
                first = file, size
            elif size != first[1]:
                height, width = first[1]
                raise DataError(
                    f"image '{self.folder / file}' is {size[0]}x{size[1]} (HxW) but '{first[0]}' is "
                    f"{height}x{width} and model input {self.image_input.name!r} takes any size: give "
                    f"--resize {height}x{width} or --center-crop N"
                )

    def read(self, indices: Indices) -> Batch:
        """Decode the files at these positions, in this order."""
        paths = [self.folder / self.files[i] for i in indices]
        with ThreadPoolExecutor(_DECODERS) as pool:
            pictures = list(pool.map(self.image_input.decode, paths))
        inputs = self.image_input.to_model(np.stack(pictures))
        return Batch({self.image_input.name: inputs}, _take(self.labels, indices))

    def digest(self, indices: Indices, into: Digest) -> None:
        """Add names and bytes of the files, and the preprocessing, to a hash."""
        _digest_preprocessing(self.image_input, into)
        for i in indices:
            path = self.folder / self.files[i]
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(
                    f"cannot read image '{path}' ({error.strerror}): replace or remove it"
                ) from None
            into.update(json.dumps([self.files[i], len(content)]).encode())
            into.update(content)
        _digest_labels(_take(self.labels, indices), into)


@dataclass(frozen=True, eq=False)
class SequenceSource:
    """Samples that a user's sequence makes when they are asked for.

    Attributes
    ----------
    fetch
        Items at ascending positions.
    labels
        Given from outside; None takes those of the items.
    """

    fetch: Callable[[Sequence[int]], list[object]]
    count: int
    reader: SampleReader
    labelled: bool
    labels: Labels | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self.labels is not None or self.labelled

    def read(self, indices: Indices) -> Batch:
        """Ask for the items at these positions, in this order."""
        ascending, back = np.unique(indices, return_inverse=True)
        items = self.fetch([int(i) for i in ascending])
        if len(items) != len(ascending):
            raise DataError(
                f"{self.reader.where} gave {len(items)} of {len(ascending)} samples asked for: check it"
            )
        samples = [self.reader.sample(item, int(i)) for i, item in zip(ascending, items, strict=True)]
        for i, sample in zip(ascending, samples, strict=True):
            if sample.size != 1 or (sample.labels is not None) != self.labelled:
                raise DataError(
                    f"sample {i} of {self.reader.where} differs from the first in batch size or in having a "
                    "label: give items of one kind"
                )
        batch = self.reader.join(samples, [int(i) for i in ascending])
        inputs = {name: array[back] for name, array in batch.inputs.items()}
        return Batch(
            inputs, _take(self.labels, indices) if self.labels is not None else _take(batch.labels, back)
        )

    def digest(self, indices: Indices, into: Digest) -> None:
        """Add the samples as the model sees them to a hash."""
        for i in range(len(indices)):
            _digest_batch(self.read(indices[i : i + 1]), into)


def check_size(size: int) -> int:
    """``size`` if it is a batch size; ValueError otherwise."""
    if size < 1:
        raise ValueError(f"batch size {size} must be at least 1")
    return size


def check_indices(indices: Indices, count: int) -> Indices:
    """``indices`` as int64 ``[n]``; IndexError beyond 0..count - 1, ValueError if there are none."""
    array = np.asarray(indices, np.int64).reshape(-1)
    if not array.size:
        raise ValueError("a subset needs at least one sample")
    if array.min() < 0 or array.max() >= count:
        raise IndexError(f"positions {array.min()}..{array.max()} reach beyond the {count} samples")
    return array


def _take(labels: Labels | None, indices: Indices) -> Labels | None:
    return None if labels is None else labels[indices]


def _digest_batch(batch: Batch, into: Digest) -> None:
    for name, array in batch.inputs.items():
        into.update(json.dumps([name, array.dtype.str, array.shape[1:]]).encode())
        into.update(np.ascontiguousarray(array).tobytes())
    _digest_labels(batch.labels, into)


def _digest_labels(labels: Labels | None, into: Digest) -> None:
    if labels is not None:
        into.update(json.dumps(["labels", labels.shape[1:]]).encode())
        into.update(np.ascontiguousarray(labels).tobytes())


def _digest_preprocessing(image_input: ImageInput, into: Digest) -> None:
    settings = [
        image_input.name,
        image_input.layout,
        image_input.source_layout,
        image_input.dtype.str,
        str(image_input.resize),
        image_input.crop,
        image_input.reverse,
    ]
    into.update(json.dumps(settings).encode())
    into.update(image_input.table.tobytes())
