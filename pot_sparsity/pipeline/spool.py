"""Batches of tensors kept between two stages: in memory up to a budget, on disk beyond it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.pipeline.runfolder import writing

#: Bytes that one spool keeps in memory before it spills to disk.
MEMORY_BUDGET = 32 * 2**20


class Spool:
    """A sequence of batches, each a mapping from tensor name to array, read as often as needed.

    Parameters
    ----------
    budget
        Bytes held in memory; further batches go to files in a temporary folder that vanishes on
        :meth:`close`. None takes :data:`MEMORY_BUDGET`.
    """

    def __init__(self, budget: int | None = None) -> None:
        self._budget = MEMORY_BUDGET if budget is None else budget
        self._held = 0
        self._batches: list[dict[str, AnyArray | Path]] = []
        self._folder: Path | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, batch: Mapping[str, AnyArray]) -> None:
        """Add a batch at the end."""
        stored: dict[str, AnyArray | Path] = {}
        for index, (name, array) in enumerate(batch.items()):
            if self._held + array.nbytes <= self._budget:
                self._held += array.nbytes
                stored[name] = array
            else:
                stored[name] = self._write(array, index)
        self._batches.append(stored)

    def __iter__(self) -> Iterator[dict[str, AnyArray]]:
        for position in range(len(self._batches)):
            yield self.read(position)

    def read(self, position: int) -> dict[str, AnyArray]:
        """The batch at ``position``."""
        return {
            name: np.load(value, allow_pickle=False) if isinstance(value, Path) else value
            for name, value in self._batches[position].items()
        }

    def drop(self, position: int) -> None:
        """Forget the content of one batch (its place stays)."""
        for value in self._batches[position].values():
            if isinstance(value, Path):
                value.unlink(missing_ok=True)
            else:
                self._held -= value.nbytes
        self._batches[position] = {}

    def close(self) -> None:
        """Free memory and files."""
        self._batches.clear()
        self._held = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, array: AnyArray, index: int) -> Path:
        with writing(self._folder or Path(tempfile.gettempdir())):
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="pot-sparsity-"))
            path = self._folder / f"{len(self._batches)}_{index}.npy"
            np.save(path, array, allow_pickle=False)
        return path
