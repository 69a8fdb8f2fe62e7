"""Tables on the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from pot_sparsity.report import words
from pot_sparsity.report.console import ConsoleProgress
from pot_sparsity.report.io import read_report
from pot_sparsity.report.render import headline, summary_tables
from pot_sparsity.report.schema import Report


@pytest.fixture
def report() -> Report:
    return read_report(Path(__file__).parent / "sample_report.json")


def show(report: Report, *, verbose: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=False)
    for part in summary_tables(report, verbose=verbose):
        console.print(part)
    return stream.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    lines = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {cells[0]: cells[1:] for cells in lines}


def test_variants_side_by_side(report: Report) -> None:
    table = rows(show(report, verbose=True))
    assert table["dense"] == ["99.50", "–", "–", "–", "–", "0.0 %", "24.0 kB", "22.0 kB", "0.050 ms"]
    metrics, sizes = ["98.75", "99.00", "0.0021", "31.2"], ["60.8 %", "9.0 kB", "4.0 kB", "12.3 ms"]
    assert table["sparse INT8"] == [*metrics, "-0.75 [-1.30, -0.20]", *sizes]


def test_the_short_table_shows_the_watched_metric_and_agreement(report: Report) -> None:
    table = rows(show(report))
    assert table["sparse INT8"][:3] == ["98.75", "99.00", "-0.75 [-1.30, -0.20]"]
    assert table["int8"] == ["12.3 s", "1,500 MiB", "top-1 98.75"]
    assert max(len(line.rstrip()) for line in show(report).splitlines()) <= 104


def test_layers_only_when_asked_for(report: Report) -> None:
    assert "stem/conv" not in show(report)
    assert "stem/conv" in show(report, verbose=True)


def test_names_are_neither_markup_nor_terminal_control(report: Report) -> None:
    text = show(report, verbose=True)
    assert "[red]" in text
    assert "\x1b" not in text
    assert "\\x1b[31m" in text


def test_decisions_and_warnings(report: Report) -> None:
    text = show(report, verbose=True)
    line = "decided: differential correction: not kept (held-out error 0.01235 -> 0.02): it did not help"
    assert line in text
    assert "left alone: late/bn: its input is an Add" in text
    assert "warning: only 300 calibration samples <i>" in show(report)


def test_headline(report: Report) -> None:
    reached = "sparsity 60.6 % (3,160 of 5,216 weights)"
    assert headline(report) == f"{reached}, iteration 1 of 1 towards 60.0 %"
    assert headline(report.model_copy(update={"chosen_iteration": None})) == reached
    missed = headline(report.model_copy(update={"status": "gate_not_met"}))
    assert missed == "no model: no step of the schedule respects the drop of top1 that was allowed"


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (2_500_000, "2.50 MB")],
)
def test_sizes(number: int | None, text: str) -> None:
    assert words.size(number) == text


def test_unknown_metrics_come_last_in_their_order() -> None:
    assert words.metric_names([{"zeta": 1.0, "top5": 2.0}, {"alpha": 0.0, "top1": 1.0}]) == [
        "top1",
        "top5",
        "zeta",
        "alpha",
    ]
    assert words.metric_value("zeta", 0.123456) == "0.1235"
    assert words.percent(0, 0) == "–"


def test_progress_without_a_terminal_is_one_line_a_step() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(Console(file=stream, force_terminal=False))
    progress.start("outer", None)
    progress.start("inner [b]", 2)
    progress.advance()
    progress.advance()
    progress.finish()
    progress.finish()
    progress.finish()
    progress.advance()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.rpartition(":")[0] for line in lines] == ["inner [b]", "outer"]


def test_progress_on_a_terminal_can_start_again_after_it_stopped() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(Console(file=stream, force_terminal=True, width=100))
    for step in ("first", "second"):
        progress.start(step, 1)
        progress.advance()
        progress.finish()
    progress.start("broken off", 3)
    progress.close()
    text = stream.getvalue()
    assert "first: 0.0" in text
    assert "second: 0.0" in text
