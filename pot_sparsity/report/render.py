"""A report as tables for the terminal; the names in them come from untrusted models and are never markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pot_sparsity.report import words
from pot_sparsity.report.schema import LayerReport, Left, Report, Variant


def summary_tables(report: Report, *, verbose: bool = False) -> list[RenderableType]:
    """Everything the terminal shows at the end of a run.

    Parameters
    ----------
    report
        The finished report.
    verbose
        Show all metrics, the layers and what was decided on the way.

    Returns
    -------
    list of rich renderables
        The sparsity reached, the variants, the stages, the layers if ``verbose``, and the warnings.
    """
    variants = variants_table(report.variants, report.data.metric, verbose=verbose)
    parts: list[RenderableType] = [Text(headline(report)), variants, _stages_table(report, verbose)]
    parts[1:1] = [_cell(line) for line in budget_lines(report)]
    if verbose:
        parts.append(layers_table(report.layers))
        parts.extend(_cell(f"decided: {line}") for line in decision_lines(report))
        parts.extend(_cell(f"left alone: {left.node}: {left.reason}") for left in _left(report))
    parts.extend(_cell(f"warning: {warning}", style="yellow") for warning in report.warnings)
    return parts


def headline(report: Report) -> str:
    """One sentence: the sparsity reached, and which iteration it is where there was a schedule."""
    weights = f"{report.zeros:,} of {report.weights:,} weights"
    reached = f"sparsity {words.percent(report.sparsity_reached)} ({weights})"
    if report.status == "gate_not_met":
        return f"no model: no step of the schedule respects the drop of {report.data.metric} that was allowed"
    if report.chosen_iteration is None or len(report.iterations) < 2:
        return reached
    last = max(iteration.index for iteration in report.iterations)
    asked = words.percent(report.sparsity_asked)
    return f"{reached}, iteration {report.chosen_iteration} of {last} towards {asked}"


def budget_lines(report: Report) -> list[str]:
    """Each budget as one line: what was asked for and what the written model reaches."""
    lines = []
    for budget in report.budgets:
        asked, reached = words.percent(budget.asked), words.percent(budget.reached)
        if budget.kind == "sparsity":
            lines.append(f"budget sparsity: {reached} zeros, at least {asked} asked")
            continue
        amounts = f"{words.amount(budget.cost)} of {words.amount(budget.dense)} {budget.unit}"
        lines.append(
            f"budget {budget.kind}: {reached} of the dense model's ({amounts}), at most {asked} asked"
        )
    return lines


def decision_lines(report: Report) -> list[str]:
    """Each decision as one line."""
    lines = []
    for decision in report.decisions:
        verdict = "kept" if decision.kept else "not kept"
        measured = ""
        if decision.before is not None and decision.after is not None:
            change = f"{decision.before:.4g} -> {decision.after:.4g}"
            measured = f" ({f'{decision.measure} {change}'.strip()})"
        reason = f": {decision.reason}" if decision.reason else ""
        lines.append(f"{decision.what}: {verdict}{measured}{reason}")
    return lines


def variants_table(variants: Sequence[Variant], watched: str, *, verbose: bool = False) -> Table:
    """The models side by side: metrics, paired difference of the watched metric, zeros, sizes, latency."""
    measured = [variant.metrics for variant in variants]
    metrics = words.metric_names(measured) if verbose else words.main_metrics(measured, watched)
    paired = words.paired_metric(variants, watched)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    for name in metrics:
        table.add_column(Text(words.metric_title(name)), justify="right")
    if paired is not None:
        table.add_column(Text(f"{paired} to dense [95 %]"), justify="right")
    for title in ("zeros", "file", "compressed", "latency"):
        table.add_column(title, justify="right")
    for variant in variants:
        cells = [words.variant_title(variant.name)]
        cells += [words.metric_value(name, variant.metrics.get(name)) for name in metrics]
        if paired is not None:
            cells.append(words.interval(variant, paired))
        cells += [
            words.percent(variant.zeros, variant.weights),
            words.size(variant.file_bytes),
            words.size(variant.compressed_bytes),
            words.milliseconds(variant.latency_ms),
        ]
        table.add_row(*(_cell(cell) for cell in cells))
    return table


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """Every layer: shape, weights, zeros, FLOPs, layer error, and why it was left dense if it was."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("#", "layer", "kind", "shape", "weights", "zeros", "MFLOPs", "error", "left dense because"):
        number = title in ("#", "weights", "zeros", "MFLOPs", "error")
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for index, layer in enumerate(layers, 1):
        cells = [
            str(index),
            layer.name,
            layer.kind,
            "x".join(str(extent) for extent in layer.shape),
            f"{layer.weights:,}",
            words.percent(layer.sparsity),
            words.ABSENT if layer.flops is None else f"{layer.flops / 1e6:.3f}",
            words.small(layer.relative_error),
            layer.ignored or "",
        ]
        table.add_row(*(_cell(cell) for cell in cells))
    return table


def left_table(left: Sequence[Left], title: str) -> Table:
    """Nodes that were left alone, and why."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("node", overflow="fold")
    table.add_column("reason", overflow="fold")
    for entry in left:
        table.add_row(_cell(entry.node), _cell(entry.reason))
    return table


def metrics_table(metrics: dict[str, float]) -> Table:
    """Metrics of one model."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in words.metric_names([metrics]):
        table.add_row(Text(words.metric_title(name)), Text(words.metric_value(name, metrics[name])))
    return table


def _cell(text: str, style: str = "") -> Text:
    return Text(words.printable(text), style)


def _stages_table(report: Report, verbose: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("peak memory", justify="right")
    table.add_column("metrics after")
    for stage in report.stages:
        memory = f"{stage.peak_memory_mib:,.0f} MiB"
        shown = stage.metrics_after
        if not verbose:
            shown = {name: shown[name] for name in words.main_metrics([shown], report.data.metric)}
        after = words.metrics_line(shown)
        table.add_row(*(_cell(cell) for cell in (stage.name, words.seconds(stage.seconds), memory, after)))
    table.add_section()
    table.add_row("total", words.seconds(report.seconds), f"{report.peak_memory_mib:,.0f} MiB", "")
    return table


def _left(report: Report) -> list[Left]:
    return [*report.not_fused, *report.skipped]
