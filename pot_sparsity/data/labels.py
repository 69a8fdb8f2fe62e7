"""Labels from an ``.npz`` or a CSV file."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.data.archive import read_npz
from pot_sparsity.data.conform import as_array
from pot_sparsity.data.images import shape_text
from pot_sparsity.errors import DataError

logger = logging.getLogger(__name__)
Labels = NDArray[np.int64]


def as_labels(value: object, where: str, count: int | None = None) -> Labels:
    """int64 labels ``[n, ...]``; DataError if they are no whole numbers or not ``count`` of them."""
    array = as_array(value, where)
    if array.dtype.kind == "f" or (array.dtype == np.uint64 and array.size and int(array.max()) > 2**63 - 1):
        raise DataError(f"{where} has dtype {array.dtype}: labels are whole numbers (class indices)")
    if count is not None and (array.ndim == 0 or array.shape[0] != count):
        raise DataError(
            f"{where} has shape {shape_text(array.shape)} for {count} samples: give one label per sample, "
            f"[{count}] or [{count},...]"
        )
    return array.astype(np.int64)


def labels_from_npz(path: Path, count: int) -> Labels:
    """The array ``labels`` of an ``.npz`` file, in the order of the samples."""
    arrays = read_npz(path, ("labels",))
    if "labels" not in arrays:
        raise DataError(
            f"labels file '{path}' has no array 'labels': give an .npz with labels [{count}] or a CSV"
        )
    return as_labels(arrays["labels"], f"array 'labels' in '{path}'", count)


@dataclass(frozen=True)
class LabelTable:
    """Rows of a label CSV: the label of every file as it is written there, and by bare file name.

    ``None`` stands for a bare name that has several labels, so that only its path can tell.
    """

    path: Path
    split: str | None
    by_file: dict[str, int]
    by_name: dict[str, int | None]

    @classmethod
    def read(cls, path: Path, split: str | None) -> LabelTable:
        """Read columns ``file`` and ``label``, of the given ``split`` only if there is one.

        Raises
        ------
        DataError
            Unreadable file, missing columns, a split that does not occur, a label that is no whole number, a
            file with two labels.
        """
        columns, rows = _read_rows(path)
        needed = ("file", "label") if split is None else ("file", "label", "split")
        missing = [column for column in needed if column not in columns]
        if missing:
            found = ", ".join(columns) or "none"
            raise DataError(
                f"label file '{path}' has no column {' and no column '.join(map(repr, missing))} (found: "
                f"{found}): its first line must name {', '.join(needed)}"
            )
        if split is not None:
            values = sorted({row["split"] for row in rows})
            if split not in values:
                known = ", ".join(values[:10]) + (", ..." if len(values) > 10 else "")
                raise DataError(f"label file '{path}' has no rows of split {split!r}: its splits are {known}")
        by_file: dict[str, int] = {}
        by_name: dict[str, int | None] = {}
        for number, row in enumerate(rows, start=1):
            if split is not None and row["split"] != split:
                continue
            file, label = PurePosixPath(row["file"].replace("\\", "/")), _label(path, number, row["label"])
            if by_file.setdefault(str(file), label) != label:
                raise DataError(
                    f"label file '{path}' row {number} gives '{file}' a second label: correct it, or select "
                    "rows with --validation-split"
                )
            by_name[file.name] = label if by_name.get(file.name, label) == label else None
        return cls(path, split, by_file, by_name)

    def label(self, file: str) -> int | None:
        """Label of a relative path, by the path as a whole or else by its file name; None if it has none."""
        found = self.by_file.get(file)
        return self.by_name.get(PurePosixPath(file).name) if found is None else found

    def select(self, files: Sequence[str], folder: Path) -> tuple[NDArray[np.int64], Labels]:
        """Positions of the files that take part, and their labels.

        With a split these are the files it lists; without one every file needs a label.

        Raises
        ------
        DataError
            Files without a label (up to three are named), or a split without files.
        """
        labels = [self.label(file) for file in files]
        missing = [file for file, label in zip(files, labels, strict=True) if label is None]
        if len(missing) == len(files) and self.split is not None:
            raise DataError(
                f"none of the {len(files)} images in '{folder}' is in split {self.split!r} of '{self.path}': "
                "check the folder, or the column 'file'"
            )
        if missing and self.split is None:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(
                f"label file '{self.path}' has no (single) label for {', '.join(missing[:3])}{more}: add "
                "rows 'file,label', or select rows with --validation-split"
            )
        if missing:
            logger.info(
                "%d images of %s are not in split %s and are left out", len(missing), folder, self.split
            )
        kept = [(i, label) for i, label in enumerate(labels) if label is not None]
        return np.array([i for i, _ in kept], np.int64), np.array([label for _, label in kept], np.int64)


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restval="")
            columns = [str(name) for name in reader.fieldnames or ()]
            rows = [{column: row[column] for column in columns} for row in reader]
    except OSError as error:
        raise DataError(f"cannot read label file '{path}': {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError(
            f"label file '{path}' is no CSV text: give columns file,label (and optionally split)"
        ) from None
    if not rows:
        raise DataError(f"label file '{path}' has no rows: give columns file,label (and optionally split)")
    return columns, rows


def _label(path: Path, number: int, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(
            f"label file '{path}' row {number} has label {text!r}: labels are whole numbers (class indices)"
        ) from None
