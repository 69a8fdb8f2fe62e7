"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _zoo_folder() -> Path | None:
    root = Path(__file__).resolve().parents[1]
    for candidate in (os.environ.get("POT_SPARSITY_ZOO"), root.parent / "shared" / "zoo"):
        if candidate and (Path(candidate) / "zoo.json").is_file():
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Folder of real networks and data; the test is skipped where it is absent."""
    folder = _zoo_folder()
    if folder is None:
        pytest.skip(
            "the folder of real networks is absent (set POT_SPARSITY_ZOO to the folder that holds zoo.json)"
        )
    return folder
