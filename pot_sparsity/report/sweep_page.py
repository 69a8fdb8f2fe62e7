"""A sweep as a table for spreadsheets, a plot, a page and a table for the terminal.

Names on them that come from a model are escaped; the plot holds names of allocations and metrics only.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Literal

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pot_sparsity.report import words
from pot_sparsity.report.sweep_schema import Sweep, SweepPoint

_COLOURS = ("#2f6f9f", "#b4502d", "#3d8b5f", "#8a5aa3", "#c79a1b", "#5b6770")
_MARKERS = "osD^vP"
_DENSE = "#1c2329"
#: Columns of the table in front of the metrics.
COLUMNS = (
    "id",
    "allocation",
    "budget",
    "bound",
    "sparsity",
    "zeros",
    "weights",
    "flops",
    "bops",
    "size",
    "size_bytes",
    "latency",
    "drop",
    "relative_error",
    "seconds",
)


def shown_metric(sweep: Sweep) -> str:
    """The metric that is drawn: the watched one, or the signal-to-noise ratio of outputs that are no class scores."""
    return sweep.data.metric if all(sweep.data.metric in point.metrics for point in sweep.points) else "sqnr"


def render_csv(sweep: Sweep) -> str:
    """One row for each point; metrics that are known by name follow on :data:`COLUMNS`, what is absent is empty."""
    known = [
        name for name in words.metric_names([p.metrics for p in sweep.points]) if name in words.METRIC_TITLES
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *known])
    for point in sweep.points:
        values = {**point.model_dump(include=set(COLUMNS)), "weights": sweep.weights}
        writer.writerow([*(values[name] for name in COLUMNS), *(point.metrics.get(name) for name in known)])
    return text.getvalue()


def render_plot(sweep: Sweep, form: Literal["svg", "png"]) -> bytes:
    """All allocations side by side: the metric against zeros, FLOPs and bytes that remain; same numbers, same bytes."""
    metric = shown_metric(sweep)
    axes_of: list[tuple[str, Callable[[SweepPoint], float | None]]] = [
        ("zeros, %", lambda point: point.sparsity)
    ]
    if all(point.flops is not None for point in sweep.points):
        axes_of.append(("FLOPs left, %", lambda point: point.flops))
    axes_of.append(("bytes left, packed, %", lambda point: point.size))
    if all(point.latency is not None for point in sweep.points):
        axes_of.append(("time left, %", lambda point: point.latency))
    figure = Figure(figsize=(4.2 * len(axes_of), 3.9), layout="constrained")
    panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    for axes, (title, measure) in zip(panels, axes_of, strict=True):
        _draw(axes, sweep, metric, measure)
        axes.set_xlabel(title)
        if title != "zeros, %":
            axes.invert_xaxis()
    panels[0].set_ylabel(words.metric_title(metric))
    if (floor := plot_floor(sweep)) is not None:
        top = max(sweep.dense.metrics[metric], *(point.metrics[metric] for point in sweep.points))
        panels[0].set_ylim(floor, top + 0.05 * (top - floor))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    data = io.BytesIO()
    # neither the time nor the version of what draws
    absent: dict[str, None] = dict.fromkeys(
        ("Creator", "Date", "Format", "Type") if form == "svg" else ("Software",)
    )
    with matplotlib.rc_context({"svg.hashsalt": "sweep", "svg.fonttype": "path"}):
        figure.savefig(data, format=form, dpi=150, metadata=absent)
    return data.getvalue()


def _draw(axes: Axes, sweep: Sweep, metric: str, measure: Callable[[SweepPoint], float | None]) -> None:
    for index, allocation in enumerate(allocations(sweep)):
        drawn = sorted(
            (100.0 * position, point.metrics[metric])
            for point in sweep.points
            if point.allocation == allocation and (position := measure(point)) is not None
        )
        axes.plot(
            [x for x, _ in drawn],
            [y for _, y in drawn],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.4,
            label=allocation.replace("_", " "),
            zorder=20 - index,
        )
    if metric in sweep.dense.metrics and metric != "sqnr":
        axes.axhline(sweep.dense.metrics[metric], color=_DENSE, linewidth=1, linestyle="--", label="dense")
    axes.grid(color="#e6ebee", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_floor(sweep: Sweep) -> float | None:
    """Where the plot ends below, so that bad points do not flatten the good ones; None where nothing is cut off."""
    metric, best = shown_metric(sweep), best_points(sweep)
    dense = sweep.dense.metrics.get(metric)
    if dense is None or metric == "sqnr":
        return None
    values = [point.metrics[metric] for point in sweep.points]
    lowest_of_best = min(point.metrics[metric] for point in sweep.points if point.id in best)
    floor = dense - 3.0 * max(0.0, dense - lowest_of_best) - 2.0
    return floor if floor > min(values) else None


def allocations(sweep: Sweep) -> list[str]:
    """Allocations in the order of the points."""
    return list(dict.fromkeys(point.allocation for point in sweep.points))


def best_points(sweep: Sweep) -> set[str]:
    """Of the points that were asked for the same, the one with the best metric: its id, for each."""
    metric = shown_metric(sweep)
    best: dict[tuple[str, float], SweepPoint] = {}
    for point in sweep.points:
        key = point.budget, point.bound
        if key not in best or point.metrics[metric] > best[key].metrics[metric]:
            best[key] = point
    return {point.id for point in best.values()}


def render_page(sweep: Sweep, drawing: str) -> str:
    """One self-contained page: plot and table; ``drawing`` is :func:`render_plot`'s SVG."""
    environment = Environment(
        loader=PackageLoader("pot_sparsity.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("sweep.html").render(
        sweep=sweep,
        words=words,
        headline=headline(sweep),
        metrics=words.metric_names([point.metrics for point in sweep.points]),
        best=best_points(sweep),
        # the only markup that is not escaped: drawn here from numbers and names of our own
        drawing=Markup(drawing[drawing.index("<svg") :]),
    )


def headline(sweep: Sweep) -> str:
    """One sentence: how many points, of how many allocations, against which dense model."""
    metric = shown_metric(sweep)
    dense = words.metric_value(metric, sweep.dense.metrics.get(metric)) if metric != "sqnr" else ""
    against = f"; dense: {words.metric_title(metric)} {dense}" if dense else ""
    compared = allocations(sweep)
    counted = f"{_count(len(sweep.points), 'point')} of {_count(len(compared), 'allocation')}"
    return f"{counted}, {sweep.weights:,} weights{against}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def summary_tables(sweep: Sweep, *, verbose: bool = False) -> list[RenderableType]:
    """What the terminal shows: every allocation at every point; with ``verbose`` all figures of each point."""
    parts: list[RenderableType] = [Text(headline(sweep)), _comparison(sweep)]
    if verbose:
        parts.append(_points_table(sweep))
    parts.extend(Text(words.printable(f"warning: {warning}"), "yellow") for warning in sweep.warnings)
    return parts


def _comparison(sweep: Sweep) -> Table:
    """The shown metric: a row for each point that was asked for, a column for each allocation."""
    metric, names, best = shown_metric(sweep), allocations(sweep), best_points(sweep)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(Text(words.metric_title(metric)))
    for name in names:
        table.add_column(Text(name), justify="right")
    rows: dict[str, dict[str, SweepPoint]] = {}
    for point in sweep.points:
        rows.setdefault(point.id.partition("@")[2], {})[point.allocation] = point
    for asked, points in rows.items():
        table.add_row(Text(f"@{asked}"), *(_value(points.get(name), metric, best) for name in names))
    return table


def _value(point: SweepPoint | None, metric: str, best: set[str]) -> Text:
    if point is None:
        return Text(words.ABSENT)
    return Text(words.metric_value(metric, point.metrics[metric]), "bold" if point.id in best else "")


def _points_table(sweep: Sweep) -> Table:
    metrics = words.metric_names([point.metrics for point in sweep.points])
    table = Table(box=box.SIMPLE_HEAD)
    titles = ["zeros", "FLOPs left", "packed", *(words.metric_title(name) for name in metrics), "drop"]
    table.add_column("#", justify="right")
    table.add_column("point")
    for title in titles:
        table.add_column(Text(words.printable(title)), justify="right")
    for number, point in enumerate(sweep.points, 1):
        cells: Sequence[str] = [
            str(number),
            point.id,
            words.percent(point.sparsity),
            words.ABSENT if point.flops is None else words.percent(point.flops),
            words.size(point.size_bytes),
            *(words.metric_value(name, point.metrics.get(name)) for name in metrics),
            words.ABSENT if point.drop is None else f"{point.drop:.2f}",
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table
