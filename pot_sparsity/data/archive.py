"""Reading ``.npz`` files that nobody vouches for: never through pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.errors import DataError


def npz_keys(path: Path) -> tuple[str, ...]:
    """Names of the arrays in an ``.npz`` file; DataError if it is none."""
    with _open(path) as archive:
        return tuple(archive.files)


def read_npz(path: Path, keys: Collection[str]) -> dict[str, AnyArray]:
    """Those of the arrays ``keys`` that an ``.npz`` file holds.

    Raises
    ------
    DataError
        Missing or damaged file, an array of Python objects (which only pickle could read).
    """
    arrays: dict[str, AnyArray] = {}
    with _open(path) as archive:
        for key in archive.files:
            if key not in keys:
                continue
            try:
                arrays[key] = np.asarray(archive[key])
            except ValueError as error:
                if "allow_pickle" in str(error):
                    raise DataError(
                        f"array {key!r} in '{path}' holds Python objects (dtype object), which are not read: "
                        "save plain numbers of one shape"
                    ) from None
                raise _damaged(path, error) from None
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
                raise _damaged(path, error) from None
    return arrays


@contextmanager
def _open(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from None
    with stream:  # opened here, for numpy leaves the file open where the archive is damaged
        try:
            archive = np.load(stream, allow_pickle=False)
        except ValueError:  # numpy takes whatever it does not know for a pickle
            raise DataError(f"'{path}' is no .npz archive: save arrays with numpy.savez") from None
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"'{path}' is no .npz archive but a single array: save it with numpy.savez")
        with archive:
            yield archive


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(
        f"cannot read '{path}' as an .npz archive ({error}): it is damaged or something else, save it again"
    )
