"""Samples drawn at random, over and over, and varied: for fits that go through the calibration data many times."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.augment import pick
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.data.images import infer_layout
from pot_sparsity.errors import DataError

#: Samples read at once when they are stored.
READ = 32
#: Both parameters of the Beta distribution that weighs a sample against the one mixed into it: 1 is uniform.
MIXING = 1.0


class Drawn:
    """The samples of a dataset, kept in a temporary file, in random order and varied anew each time.

    Parameters
    ----------
    dataset
        Samples as the model takes them.
    vary
        Mirror and shift inputs that are images, and mix samples of models whose inputs are all floating point, with
        probability 1/2 each: a network that is to be imitated can be asked at any point (Beyer et al. 2022,
        "Knowledge distillation: a good teacher is patient and consistent").
    seed
        Of all draws.

    Raises
    ------
    DataError
        The temporary file cannot be written.
    """

    def __init__(self, dataset: Dataset, *, vary: bool, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._folder = Path(tempfile.mkdtemp(prefix="pot-sparsity-"))
        self._count = len(dataset)
        self._arrays: dict[str, AnyArray] = {}
        try:
            self._store(dataset)
        except BaseException:
            self.close()
            raise
        floats = all(array.dtype.kind == "f" for array in self._arrays.values())
        self._mixes = vary and floats
        self._moves = vary and floats and all(array.ndim == 4 for array in self._arrays.values())

    def __enter__(self) -> Drawn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the file."""
        self._arrays.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def epoch(self, size: int) -> Iterator[Batch]:
        """All samples once, in full batches; those that fill none are left out, or drawn twice if there are no more."""
        order = self._rng.permutation(self._count)
        if self._count < size:
            order = np.resize(order, size)
        for start in range(0, len(order) - size + 1, size):
            yield Batch(self._batch(order[start : start + size]))

    def _batch(self, indices: NDArray[np.int64]) -> dict[str, AnyArray]:
        batch = {name: np.asarray(array[indices]) for name, array in self._arrays.items()}
        if self._moves:
            batch = {name: self._moved(array) for name, array in batch.items()}
        if self._mixes:
            batch = self._mixed(batch)
        return batch

    def _moved(self, images: AnyArray) -> AnyArray:
        layout = infer_layout(images.shape)
        if layout is None:
            return images
        axis = 1 if layout == "NHWC" else 2
        for image in images:
            rows, columns = pick(self._rng, image.shape[axis - 1], image.shape[axis], ("flip", "crop"))
            image[...] = image.take(rows, axis - 1).take(columns, axis)
        return images

    def _mixed(self, batch: dict[str, AnyArray]) -> dict[str, AnyArray]:
        size = len(next(iter(batch.values())))
        weight = np.where(self._rng.random(size) < 0.5, self._rng.beta(MIXING, MIXING, size), 1.0)
        other = self._rng.permutation(size)
        result: dict[str, AnyArray] = {}
        for name, array in batch.items():
            share = weight.astype(array.dtype).reshape(-1, *[1] * (array.ndim - 1))
            result[name] = share * array + (1 - share) * array[other]
        return result

    def _store(self, dataset: Dataset) -> None:
        try:
            with ExitStack() as stack:
                files: dict[str, BinaryIO] = {}
                for batch in dataset.batches(READ):
                    for name, array in batch.inputs.items():
                        if name not in files:
                            path = self._folder / f"{len(files)}.npy"
                            files[name] = stack.enter_context(path.open("wb"))
                            shape = (self._count, *array.shape[1:])
                            kind = np.lib.format.dtype_to_descr(array.dtype)
                            head = {"descr": kind, "fortran_order": False, "shape": shape}
                            np.lib.format.write_array_header_2_0(files[name], head)
                        files[name].write(np.ascontiguousarray(array).data)
            for index, name in enumerate(files):
                self._arrays[name] = np.load(self._folder / f"{index}.npy", mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(f"samples cannot be kept in a temporary file: {error.strerror}") from None
