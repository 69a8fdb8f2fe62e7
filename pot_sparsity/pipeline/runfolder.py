"""The run directory: checked before it is touched, resumable, and never with half a file under its name."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.errors import OutputError
from pot_sparsity.graph.model import Model

STATE = "state"


@dataclass(frozen=True)
class Contents:
    """What one kind of run leaves in its folder; anything else there is the user's and is never removed.

    Attributes
    ----------
    name
        What users call it.
    files
        Its files and folders.
    marks
        Those of them that tell it was there.
    """

    name: str
    files: tuple[str, ...]
    marks: frozenset[str]


RUN = Contents(
    "run",
    (
        "model.onnx",
        "model.onnx.data",
        "model.xml",
        "model.bin",
        "float",
        "recipe.yaml",
        "report.json",
        "report.html",
        "run.log",
        "timings.json",
        STATE,
    ),
    frozenset({"report.json", "recipe.yaml", STATE, "model.onnx", "model.xml"}),
)


class RunFolder:
    """Output folder and state of one run.

    Parameters
    ----------
    path
        Where the run goes; None keeps everything in memory (no resume).
    resume
        Continue a run with the same fingerprint.
    force
        Replace what an earlier run left there.
    contents
        What kind of run it is.

    Raises
    ------
    OutputError
        Not writable, a file, not empty and neither ``resume`` nor ``force``, or nothing to resume. Nothing has
        been written then.
    """

    def __init__(
        self, path: Path | None, *, resume: bool = False, force: bool = False, contents: Contents = RUN
    ) -> None:
        self.path = path
        self._contents = contents
        self._resume = resume
        self._force = force
        self._created = False
        self._log: MemoryHandler | None = None
        if path is not None:
            try:
                self._check(path)
            except OSError as error:
                raise OutputError(
                    f"output folder {str(path)!r} cannot be used: {error.strerror}; give another with -o"
                ) from None

    def _check(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise OutputError(f"output {str(path)!r} is a file; give a folder with -o")
        if path.is_dir():
            entries = {entry.name for entry in path.iterdir()}
            what = self._contents.name
            run = bool(entries & self._contents.marks)
            if run and not (self._resume or self._force):
                raise OutputError(
                    f"output folder {str(path)!r} already holds a {what}; use --resume to go on, --force to replace "
                    "it, or another folder"
                )
            if entries and not run:
                raise OutputError(
                    f"output folder {str(path)!r} is not empty and holds no {what}; give another folder"
                )
            if run and self._resume and not self._marker(path).is_file():
                raise OutputError(
                    f"output folder {str(path)!r} holds a {what} that is finished: there is nothing to resume; "
                    "use --force to replace it, or give another folder"
                )
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(f"output folder {str(path)!r} is not writable; give another with -o")

    def open(self, fingerprint: Mapping[str, object]) -> None:
        """Create the folder, or take up the state in it if it belongs to the same run.

        ``fingerprint`` is everything that decides the result (model, data, recipe); a resumed run must match
        it.
        """
        if self.path is None or self._created:
            return
        marker = self._marker(self.path)
        if self._resume and marker.is_file():
            self.check_resumable(fingerprint)
            self._created = True
            return
        new = not self.path.exists()
        with writing(self.path):
            if self.path.is_dir():
                self._clear()
            try:
                (self.path / STATE).mkdir(parents=True, exist_ok=True)
                write_text(marker, json.dumps({"fingerprint": _digest(fingerprint)}))
            except BaseException:
                shutil.rmtree(self.path if new else self.path / STATE, ignore_errors=True)
                raise
        self._created = True

    def check_resumable(self, fingerprint: Mapping[str, object]) -> None:
        """Raise OutputError if there is a run to resume and it is another one; nothing is written."""
        if self.path is None or not self._resume or not self._marker(self.path).is_file():
            return
        with writing(self.path):
            text = self._marker(self.path).read_text(encoding="utf-8", errors="replace")
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("fingerprint") != _digest(fingerprint):
            raise OutputError(
                f"the {self._contents.name} in {str(self.path)!r} was started with another model, data, recipe or "
                "version; use --force to start over or give another folder"
            )

    @staticmethod
    def _marker(path: Path) -> Path:
        return path / STATE / "run.json"

    def _clear(self) -> None:
        assert self.path is not None
        for name in self._contents.files:
            entry = self.path / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def load(self, key: str) -> dict[str, AnyArray] | None:
        """Arrays stored under ``key`` by this run or the one it resumes; None if there are none."""
        if not self.has(key):
            return None
        file = self._state_file(key)
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError):
            logging.getLogger(__name__).warning("state %s is damaged and will be computed again", key)
            return None

    def has(self, key: str) -> bool:
        """Whether something is stored under ``key`` that this run may use."""
        usable = self._created or self._resume
        return self.path is not None and usable and self._state_file(key).is_file()

    def store(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under ``key`` for a later resume."""
        if self.path is None:
            return
        file = self._state_file(key)
        with writing(file.parent):
            partial = file.with_name(f".{file.name}.partial")
            try:
                save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, partial)
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)

    def _state_file(self, key: str) -> Path:
        assert self.path is not None
        safe = hashlib.sha256(key.encode()).hexdigest()[:24]
        return self.path / STATE / f"{safe}.safetensors"

    def save(self, model: Model, part: str | None) -> tuple[Path, ...]:
        """Write a model as ``model`` + suffix, into the folder or a part of it; returns its files."""
        assert self.path is not None
        target = self.path / part if part else self.path
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            return tuple(model.save(target, "model"))

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Send the package's log to ``run.log``; it is held in memory until the folder exists."""
        logger = logging.getLogger("pot_sparsity")
        self._log = MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._log.setLevel(logging.INFO)
        level = logger.level
        if self.path is not None:
            logger.addHandler(self._log)
            logger.setLevel(min(logging.INFO, level) if level else logging.INFO)
        try:
            yield
        except BaseException:
            if self.path is not None:
                logger.exception("the run failed")
            raise
        finally:
            self._write_log()
            logger.removeHandler(self._log)
            logger.setLevel(level)
            self._log.close()

    def _write_log(self) -> None:
        """Append what was logged so far, once there is a folder to put it."""
        if self.path is None or not self._created or self._log is None:
            return
        try:
            handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        except OSError:
            return
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._log.setTarget(handler)
        self._log.flush()
        self._log.setTarget(None)
        handler.close()

    def finish_state(self) -> None:
        """Drop the state of a finished run: nothing is left to resume."""
        if self.path is not None:
            shutil.rmtree(self.path / STATE, ignore_errors=True)


def _digest(fingerprint: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Translate what the file system refuses into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"the disk is full: cannot write to {str(where)!r}; free some space and use --resume"
            ) from error
        raise OutputError(f"cannot write to {str(where)!r}: {error.strerror or error}") from error
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OutputError(
                f"the disk is full: cannot write to {str(where)!r}; free some space and use --resume"
            ) from error
        raise OutputError(f"cannot write to {str(where)!r}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears under its name only when it is complete."""
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            partial.chmod(0o644)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
