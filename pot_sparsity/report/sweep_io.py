"""Reading and writing a sweep: ``sweep.json`` and what is drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

from pot_sparsity.report.io import read_document, replace_file
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
    return read_document(path, SWEEP_JSON, "sweep", Sweep, SWEEP_VERSION, needs=("points",))
