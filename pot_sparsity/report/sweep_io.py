"""Reading and writing a sweep: ``sweep.json`` and what is drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from pot_sparsity.errors import UserError
from pot_sparsity.report.io import replace_file
from pot_sparsity.report.sweep_page import render_csv, render_page, render_plot
from pot_sparsity.report.sweep_schema import SWEEP_VERSION, Sweep

SWEEP_JSON = "sweep.json"
#: Everything :func:`write_sweep` writes.
SWEEP_FILES = (SWEEP_JSON, "sweep.csv", "sweep.svg", "sweep.png", "sweep.html")


def write_sweep(sweep: Sweep, folder: Path) -> tuple[Path, ...]:
    """Write a sweep into an existing folder: JSON, table, plot (vector and pixels) and page.

    Each file appears under its name only when it is complete, and all are rendered before the first is written; JSON,
    which makes the folder a sweep, comes last.

    Raises
    ------
    OSError
        What the file system says; nothing half-written is left under a final name.
    ValueError
        A number is NaN or infinite, which JSON cannot hold.
    """
    data = json.dumps(sweep.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    drawing = render_plot(sweep, "svg")
    page = render_page(sweep, drawing.decode())
    contents = (data, render_csv(sweep), drawing, render_plot(sweep, "png"), page)
    files: dict[str, str | bytes] = dict(zip(SWEEP_FILES, contents, strict=True))
    for name in reversed(SWEEP_FILES):
        replace_file(folder / name, files[name])
    return tuple(folder / name for name in SWEEP_FILES)


def read_sweep(path: Path) -> Sweep:
    """Read ``sweep.json``, given by its path or that of the sweep's folder.

    Raises
    ------
    UserError
        Missing, not a sweep, or written by an incompatible version.
    """
    file = path / SWEEP_JSON if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read sweep {str(file)!r}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{str(file)!r} is not a sweep: it is not JSON") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    wanted = SWEEP_VERSION.split(".")[0]
    if not isinstance(version, str) or version.split(".")[0] != wanted or "points" not in data:
        raise UserError(f"{str(file)!r} is not a sweep of schema version {wanted}")
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{str(file)!r} is not a valid sweep: {where}: {first['msg']}") from None
