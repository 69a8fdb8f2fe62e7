"""docs/results.md, written from the outcomes of its experiments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from results_sections import (  # type: ignore[import-not-found]
    SECTIONS,
    ZOO,
    Experiment,
    Section,
    command,
)

from pot_sparsity.pipeline.evaluate import relative_error
from pot_sparsity.report import words
from pot_sparsity.report.schema import DataSpec, Machine, Report, Variant, Versions

VARIANTS = ("dense", "dense_int8", "sparse", "sparse_int8")
#: Last lines of the page.
ELSEWHERE = (
    "",
    "## Elsewhere",
    "",
    "- [Bit operations against accuracy](bop-curve.md): 8 or 4 bits and 2:4 layer by layer, OBC's Figure 3",
    "- [Allocations compared](allocation-tables.md) on all classifiers, with biases alone corrected",
    "- [Rate-distortion pruning, repeated](rd-tables.md): the ablations of the paper, additivity, speed",
    "- [Layer-wise calibration, repeated](pot-tables.md): Tables 4 to 6 of the POT paper",
    "- [The finish](finish.md): what was tried after layer-wise reconstruction",
)


@dataclass(frozen=True)
class Outcome:
    """What the page needs of a report."""

    versions: Versions
    machine: Machine
    data: DataSpec
    variants: dict[str, Variant]
    seconds: float
    peak_memory_mib: float

    @classmethod
    def of(cls, report: Report) -> Outcome:
        """Those parts of a report."""
        return cls(
            report.versions,
            report.machine,
            report.data,
            {variant.name: variant for variant in report.variants},
            report.seconds,
            report.peak_memory_mib,
        )

    @property
    def zeros(self) -> str:
        """Percent of zeros in the sparse INT8 model."""
        final = self.variants["sparse_int8"]
        return f"{100.0 * final.zeros / final.weights:.2f}"


def cell(variant: Variant | None, metric: str) -> str:
    """A metric, and its paired difference to the dense model where there is one."""
    if variant is None or metric not in variant.metrics:
        return words.ABSENT
    value = words.metric_value(metric, variant.metrics[metric])
    return (
        value
        if variant.name == "dense"
        else f"{value} {words.interval(variant, metric)}".removesuffix(f" {words.ABSENT}")
    )


def error(variant: Variant | None) -> str:
    """Energy of the output's error in percent of the output's."""
    if variant is None or "sqnr" not in variant.metrics:
        return words.ABSENT
    return f"{100.0 * relative_error(variant.metrics):.2f}"


def row(outcome: Outcome, shown: Sequence[str], *, with_error: bool = False) -> list[str]:
    """One line of a table, but for what tells it from the others."""
    metric = outcome.data.metric
    return [
        *(cell(outcome.variants.get(name), metric) for name in shown),
        *([error(outcome.variants.get("sparse"))] if with_error else []),
        *([] if metric.endswith("agreement") else [cell(outcome.variants["sparse_int8"], "agreement")]),
        outcome.zeros,
        f"{outcome.seconds:.0f}",
        f"{outcome.peak_memory_mib:.0f}",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def section_lines(section: Section, outcomes: Mapping[str, Outcome], zoo: Mapping[str, Any]) -> list[str]:
    """A section with its table and commands; nothing if none of its experiments has run."""
    done: list[Experiment] = [e for e in section.experiments if e.name in outcomes]
    if not done:
        return []
    first = outcomes[done[0].name]
    metric = first.data.metric
    shown = [name for name in VARIANTS if not (section.compact and name.startswith("dense"))]
    head = [column.title for column in section.columns]
    head += [words.variant_title(name) for name in shown]
    head += ["error %"] if section.compact else []
    head += [] if metric.endswith("agreement") else ["agreement"]
    head += ["zeros %", "seconds", "peak MiB"]
    lines = ["", f"## {section.title}", "", section.text, ""]
    if section.compact:
        lines += [f"For comparison: {_dense(done, outcomes)}. The command is that of the first row.", ""]
    rows = [
        [
            *(c.cell(e) for c in section.columns),
            *row(outcomes[e.name], shown, with_error=section.compact),
        ]
        for e in done
    ]
    lines += table(head, rows)
    return [*lines, "", "```sh", *_commands(section, done, zoo), "```"]


def _dense(done: Sequence[Experiment], outcomes: Mapping[str, Outcome]) -> str:
    """Metrics of the dense variants, which are the same in all rows of a network."""
    found: dict[str, Outcome] = {}
    for experiment in done:
        found.setdefault(experiment.entry, outcomes[experiment.name])
    parts = [
        f"{f'{entry} ' if len(found) > 1 else ''}{words.variant_title(name)} "
        f"{cell(outcome.variants[name], outcome.data.metric)}"
        for entry, outcome in found.items()
        for name in VARIANTS
        if name.startswith("dense") and name in outcome.variants
    ]
    return ", ".join(parts)


def _commands(section: Section, done: Sequence[Experiment], zoo: Mapping[str, Any]) -> list[str]:
    """The command behind each row, or behind the first of a compact table."""
    if section.compact:
        return [command(done[0], zoo)]
    lines: list[str] = []
    for experiment in done:
        label = ", ".join(column.cell(experiment) for column in section.columns)
        lines += [f"# {label.replace('`', '')}", command(experiment, zoo)]
    return lines


def page(
    outcomes: Mapping[str, Outcome], zoo: Mapping[str, Any], more: Sequence[str] = (), note: str = ""
) -> str:
    """The whole page; ``more`` are lines that go below the sections, ``note`` tells how the runs were made."""
    lines = [
        "# Results",
        "",
        "This page is generated by `tools/make_results.py` from the reports of the runs; do not edit it.",
        "",
        "Accuracies are top-1 in percent. Behind each stands the difference to the dense model on the same",
        "samples, in points, with its 95 % interval (paired). Agreement is the percent of samples on which",
        "the sparse INT8 model decides as the dense one does. Error, where it is shown, is the energy of",
        "the difference between the sparse model's output (before INT8) and the dense model's, in percent",
        "of that of the dense model's output. Zeros are counted in the written INT8 model,",
        "over all layers that take part. Seconds and peak memory are those of the whole run: moments,",
        "pruning, reconstruction and correction, INT8, a dense INT8 model for comparison, validation of all",
        "four, latency. No labels are used but to judge.",
        "",
        *_setting(outcomes),
        *([note] if note else []),
        "",
        f"The commands reproduce each row; `{ZOO}` is a folder with the networks and data.",
    ]
    for section in SECTIONS:
        lines += section_lines(section, outcomes, zoo)
    return "\n".join([*lines, *more, *ELSEWHERE]) + "\n"


def _setting(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Machines and versions, once each."""
    machines = {
        f"{o.machine.processor}, {o.machine.cores} cores, {o.machine.memory_mib / 1024:.0f} GiB memory": None
        for o in outcomes.values()
    }
    versions = {
        ", ".join(
            [f"Python {o.versions.python}", *(f"{k} {v}" for k, v in o.versions.packages.items())]
        ): None
        for o in outcomes.values()
    }
    return [f"Measured on {'; '.join(machines)}; {'; '.join(versions)}."]
