"""Moments in the run folder, so that a resumed run need not read the calibration data again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.graph.layers import Layer
from pot_sparsity.pipeline.runfolder import RunFolder


def load_moments(folder: RunFolder, kind: str, layers: Sequence[Layer]) -> dict[str, Moments] | None:
    """Moments of this kind of all layers, or None if any is missing (or there is none to ask for)."""
    moments: dict[str, Moments] = {}
    for layer in layers:
        stored = folder.load(f"{kind}/{layer.name}")
        if stored is None:
            return None
        count = float(np.asarray(stored["count"], np.float64)[0])
        moments[layer.name] = Moments(
            count, np.asarray(stored["mean"], np.float64), np.asarray(stored["second"], np.float64)
        )
    return moments or None


def store_moments(folder: RunFolder, kind: str, moments: Mapping[str, Moments]) -> None:
    """Keep the moments of every layer that are not kept yet."""
    for name, value in moments.items():
        key = f"{kind}/{name}"
        if not folder.has(key):
            folder.store(key, {"count": np.array([value.count]), "mean": value.mean, "second": value.second})
