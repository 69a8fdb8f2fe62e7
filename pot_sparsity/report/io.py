"""Writing and reading the report: ``report.json`` and the page ``report.html`` made from it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pot_sparsity.errors import UserError
from pot_sparsity.report.html import render_html
from pot_sparsity.report.schema import SCHEMA_VERSION, Report

JSON_NAME = "report.json"
HTML_NAME = "report.html"

Document = TypeVar("Document", bound=BaseModel)


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into an existing folder.

    Each file appears under its name only when it is complete, and both are rendered before either is written.

    Returns
    -------
    json, html
        Paths of the two files.

    Raises
    ------
    OSError
        What the file system says; nothing half-written is left under a final name.
    ValueError
        A number is NaN or infinite, which JSON cannot hold.
    """
    data = json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_html(report)
    paths = folder / JSON_NAME, folder / HTML_NAME
    for path, text in zip(paths, (data, page), strict=True):
        replace_file(path, text)
    return paths


def read_report(path: Path) -> Report:
    """Read ``report.json``, given by its path or that of the run directory.

    Raises
    ------
    UserError
        Missing, not a report, or written by an incompatible version.
    """
    return read_document(path, JSON_NAME, "report", Report, SCHEMA_VERSION)


def read_document(
    path: Path, name: str, what: str, kind: type[Document], version: str, *, needs: Sequence[str] = ()
) -> Document:
    """A validated document, given by its path or that of the folder that has it under ``name``.

    Parameters
    ----------
    what
        What messages call it.
    kind, version
        Its schema, and the version of that; the major part has to be the same.
    needs
        Keys without which it is something else of that version.

    Raises
    ------
    UserError
        Missing, not such a document, or written by an incompatible version.
    """
    file = path / name if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {what} {str(file)!r}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{str(file)!r} is not a {what}: it is not JSON") from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    major = version.split(".")[0]
    if not isinstance(found, str) or found.split(".")[0] != major or any(key not in data for key in needs):
        raise UserError(f"{str(file)!r} is not a {what} of schema version {major}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{str(file)!r} is not a valid {what}: {where}: {first['msg']}") from None


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name only when it is complete."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
