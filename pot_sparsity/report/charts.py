"""Charts of a report as inline SVG.

Layers are drawn by their number in the layer table: the drawing holds no text that comes from the model.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from pot_sparsity.report.schema import Iteration, LayerReport

_PRUNED, _DENSE, _LINE = "#2f6f9f", "#b8c4cc", "#b4502d"


def sparsity_chart(layers: Sequence[LayerReport], reached: float) -> str:
    """Bars of the sparsity of each layer; ignored layers are grey, the dashed line is the whole model."""
    figure = Figure(figsize=(9.0, 2.6), layout="constrained")
    axes = figure.add_subplot()
    colours = [_DENSE if layer.ignored else _PRUNED for layer in layers]
    axes.bar(range(1, len(layers) + 1), [100 * layer.sparsity for layer in layers], color=colours)
    axes.axhline(100 * reached, color=_LINE, linewidth=1, linestyle="--")
    axes.set(xlabel="layer", ylabel="zeros, %", ylim=(0, 100), xlim=(0.4, len(layers) + 0.6))
    axes.locator_params(axis="x", integer=True)
    return _svg(figure, "sparsity")


def error_chart(layers: Sequence[LayerReport]) -> str | None:
    """Bars of the relative error of each layer's output, logarithmic; None where none was measured."""
    measured = [
        (number, layer.relative_error)
        for number, layer in enumerate(layers, 1)
        if layer.relative_error is not None and layer.relative_error > 0
    ]
    if not measured:
        return None
    figure = Figure(figsize=(9.0, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar([number for number, _ in measured], [error for _, error in measured], color=_PRUNED)
    axes.set(xlabel="layer", ylabel="error / output energy", yscale="log", xlim=(0.4, len(layers) + 0.6))
    axes.locator_params(axis="x", integer=True)
    return _svg(figure, "error")


def schedule_chart(iterations: Sequence[Iteration], metric: str) -> str | None:
    """The watched metric against sparsity over the schedule; None for fewer than two measured iterations."""
    points = [(i.sparsity, i.metrics[metric], i.accepted) for i in iterations if metric in i.metrics]
    if len(points) < 2:
        return None
    points.sort(key=lambda point: point[0])
    figure = Figure(figsize=(9.0, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([100 * s for s, _, _ in points], [value for _, value, _ in points], color=_DENSE)
    colours = [_PRUNED if accepted else _LINE for _, _, accepted in points]
    axes.scatter([100 * s for s, _, _ in points], [value for _, value, _ in points], c=colours, zorder=3)
    axes.set(xlabel="zeros, %", ylabel="watched metric")
    return _svg(figure, "schedule")


def _svg(figure: Figure, name: str) -> str:
    """The drawing from ``<svg`` on, with ``name`` in front of every identifier; same numbers, same bytes."""
    absent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata=absent)
    drawing = text.getvalue()
    return re.sub(r'( id="|"#|url\(#)', rf"\g<1>{name}-", drawing[drawing.index("<svg") :])
