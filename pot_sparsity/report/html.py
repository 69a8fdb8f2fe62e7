"""The report as one HTML page that needs nothing else: no network, no scripts, drawings inline.

Every name on the page comes from an untrusted model, so everything but our own drawings is escaped.
"""

from __future__ import annotations

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pot_sparsity.report import charts, words
from pot_sparsity.report.render import budget_lines, decision_lines, headline
from pot_sparsity.report.schema import Report


def render_html(report: Report) -> str:
    """One self-contained page with the same content as ``report.json``.

    The same report gives the same bytes.
    """
    environment = Environment(
        loader=PackageLoader("pot_sparsity.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    drawings = [
        ("Zeros by layer", charts.sparsity_chart(report.layers, report.sparsity_reached)),
        ("Error of each layer's output", charts.error_chart(report.layers)),
        ("Schedule", charts.schedule_chart(report.iterations, report.data.metric)),
    ]
    return environment.get_template("report.html").render(
        report=report,
        words=words,
        headline=headline(report),
        budgets=budget_lines(report),
        decisions=decision_lines(report),
        metrics=words.metric_names([variant.metrics for variant in report.variants]),
        step_metrics=words.metric_names([iteration.metrics for iteration in report.iterations]),
        paired=words.paired_metric(report.variants, report.data.metric),
        # the only markup that is not escaped: drawn here from numbers alone
        drawings=[(title, Markup(drawing)) for title, drawing in drawings if drawing is not None],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False),
    )
