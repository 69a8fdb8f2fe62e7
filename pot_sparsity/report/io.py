"""Writing and reading the report: ``report.json`` and the page ``report.html`` made from it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from pot_sparsity.errors import UserError
from pot_sparsity.report.html import render_html
from pot_sparsity.report.schema import SCHEMA_VERSION, Report

JSON_NAME = "report.json"
HTML_NAME = "report.html"


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
    file = path / JSON_NAME if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read report {str(file)!r}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{str(file)!r} is not a report: it is not JSON") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, str) or version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise UserError(f"{str(file)!r} is not a report of schema version {SCHEMA_VERSION.split('.')[0]}")
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{str(file)!r} is not a valid report: {where}: {first['msg']}") from None


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
