"""Figures 1 and 4 of the paper on rate-distortion pruning, drawn from what was measured, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

ADDITIVITY = "rd-additivity.svg"
APPROXIMATION = "rd-approximation.svg"
_COLOURS = ("#1f6fb4", "#d9772b", "#4b9e58")


def fit_of(alone: Sequence[float], together: Sequence[float]) -> tuple[float, float, float]:
    """How well distances of layers pruned together are the sums of those alone.

    Returns the correlation, the slope of the best line through the origin, and the largest relative deviation from
    the sum.
    """
    x, y = np.asarray(alone), np.asarray(together)
    return (
        float(np.corrcoef(x, y)[0, 1]),
        float((x @ y) / (x @ x)),
        float(np.abs(y / x - 1.0).max()),
    )


def draw(folder: Path, additivity: Mapping[str, Any], approximation: Mapping[str, Any]) -> None:
    """Write both figures; each mapping holds outcomes by network."""
    mpl.use("Agg")
    with mpl.rc_context({"svg.hashsalt": "rd", "font.size": 8, "svg.fonttype": "none"}):
        if additivity:
            _save(_additivity(additivity), folder / ADDITIVITY)
        if approximation:
            _save(_approximation(approximation), folder / APPROXIMATION)


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None, "Creator": None})


def _additivity(outcomes: Mapping[str, Any]) -> Figure:
    percents = list(next(iter(outcomes.values())))
    figure = Figure(figsize=(2.1 * len(percents), 2.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(percents)))
    for percent, plot in zip(percents, axes, strict=True):
        values = []
        for colour, (network, found) in zip(_COLOURS, outcomes.items(), strict=False):
            points = found[percent]
            plot.plot(points["alone"], points["together"], ".", color=colour, ms=4, label=_short(network))
            values += [*points["alone"], *points["together"]]
        _diagonal(plot, values)
        plot.set_title(f"{percent} %")
        plot.set_xlabel("sum of the two alone")
    axes[0].set_ylabel("two adjacent layers together")
    axes[0].legend(frameon=False)
    return figure


def _approximation(outcomes: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = []
    for colour, (network, found) in zip(_COLOURS, outcomes.items(), strict=False):
        for kind, mark in (("allocated", "."), ("uniform", "+")):
            points = found[kind]
            label = f"{_short(network)}, {kind}"
            left.plot(points["sum"], points["real"], mark, color=colour, ms=5, label=label)
            error = np.abs(np.asarray(points["real"]) - np.asarray(points["sum"]))
            right.plot(points["percent"], error, mark + "-", color=colour, ms=5, lw=0.7)
            values += [*points["sum"], *points["real"]]
    _diagonal(left, values)
    left.set_xlabel("sum over the layers")
    left.set_ylabel("all layers together")
    left.legend(frameon=False, fontsize=6)
    right.set_xlabel("sparsity, %")
    right.set_ylabel("|together - sum|")
    right.set_yscale("log")
    return figure


def _diagonal(plot: Axes, values: Sequence[float]) -> None:
    ends = [0.7 * min(values), 1.4 * max(values)]
    plot.plot(ends, ends, "-", color="grey", lw=0.7)
    plot.set_xscale("log")
    plot.set_yscale("log")
    for axis in (plot.xaxis, plot.yaxis):
        axis.set_minor_formatter(NullFormatter())


def _short(network: str) -> str:
    return network.partition("_")[0]
