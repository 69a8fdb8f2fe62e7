"""Arrays on disk under the digest of what they were computed from, for many runs and processes at once.

A folder holds a marker with the version of its layout and one file for each entry, ``ab/cdef....safetensors``. Files
get their names only when they are complete, and each carries a checksum: a damaged one counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.errors import OutputError
from pot_sparsity.pipeline.runfolder import write_text, writing

MARKER = "pot-sparsity-database.json"
#: Layout of the files; another version's folder is refused.
VERSION = 1
_CHECKSUM = "checksum"

log = logging.getLogger(__name__)


class Entries:
    """A folder of entries; nothing is written before the first one is stored.

    Parameters
    ----------
    path
        The folder; it may be absent or empty.

    Raises
    ------
    OutputError
        It is a file, cannot be written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._opened = self._check()
        except OSError as error:
            raise OutputError(
                f"database folder {str(path)!r} cannot be used: {error.strerror}; give another with --database"
            ) from None

    def _check(self) -> bool:
        """Whether the marker is there; raises where the folder cannot serve."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise OutputError(f"database {str(path)!r} is a file; give a folder with --database")
        marked = (path / MARKER).is_file()
        if marked:
            self._check_version()
        elif path.is_dir() and any(path.iterdir()):
            raise OutputError(
                f"database folder {str(path)!r} is not empty and holds no database; give another with --database"
            )
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(f"database folder {str(path)!r} is not writable; give another with --database")
        return marked

    def _check_version(self) -> None:
        try:
            found = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
        except ValueError:
            found = None
        version = found.get("version") if isinstance(found, dict) else None
        if version != VERSION:
            raise OutputError(
                f"database folder {str(self.path)!r} has layout {version!r}, this version reads {VERSION}; give "
                "another with --database"
            )

    def load(self, key: str) -> dict[str, AnyArray] | None:
        """Arrays stored under a key (hexadecimal digits); None where there are none or they are damaged."""
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            arrays: dict[str, AnyArray] = dict(load_file(file))
        except (SafetensorError, OSError):
            arrays = {}
        checksum = arrays.pop(_CHECKSUM, None)
        if checksum is None or checksum.tobytes() != _digest(key, arrays):
            log.warning("database entry %s is damaged and will be computed again", file.name)
            return None
        return arrays

    def store(self, key: str, arrays: Mapping[str, AnyArray]) -> None:
        """Keep arrays under a key; raises OutputError where the disk refuses."""
        self._open()
        file = self._file(key)
        packed = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        packed[_CHECKSUM] = np.frombuffer(_digest(key, packed), np.uint8)
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
            os.close(handle)
            partial = Path(name)
            try:
                save_file(packed, partial)
                partial.chmod(0o644)
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)

    def _open(self) -> None:
        if not self._opened:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / MARKER, json.dumps({"kind": "layer solutions", "version": VERSION}) + "\n")
            self._opened = True

    def _file(self, key: str) -> Path:
        return self.path / key[:2] / f"{key[2:]}.safetensors"


def _digest(key: str, arrays: Mapping[str, AnyArray]) -> bytes:
    total = hashlib.sha256(key.encode())
    for name in sorted(arrays):
        value = arrays[name]
        total.update(repr((name, value.dtype.str, value.shape)).encode())
        total.update(value.tobytes())
    return total.digest()
