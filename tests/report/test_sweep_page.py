"""The pages of a sweep: nothing of a model reaches them unescaped, and bad points do not flatten good ones."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from pot_sparsity.report import sweep_page
from pot_sparsity.report.io import read_report
from pot_sparsity.report.sweep_io import read_sweep, write_sweep
from pot_sparsity.report.sweep_schema import DenseFigures, Sweep, SweepLayer, SweepPoint

REPORT = read_report(Path(__file__).parent / "sample_report.json")
HOSTILE = "<script>alert(1)</script>"


def point(allocation: str, bound: float, top1: float) -> SweepPoint:
    return SweepPoint(
        id=f"{allocation}@{bound:.2f}",
        allocation=allocation,
        budget="sparsity",
        bound=bound,
        sparsity=bound,
        zeros=round(100 * bound),
        flops=None,
        bops=None,
        size=1.0 - bound,
        size_bytes=round(400 * (1.0 - bound)),
        metrics={"top1": top1, "sqnr": 10.0, f"=cmd|{HOSTILE}.sqnr": 3.0},
        drop=92.0 - top1,
        relative_error=0.1,
        layers=[round(100 * bound)],
        seconds=0.5,
    )


@pytest.fixture
def sweep() -> Sweep:
    return Sweep(
        versions=REPORT.versions,
        machine=REPORT.machine,
        seed=0,
        engine="openvino",
        recipe={},
        model=REPORT.model.model_copy(update={"file": HOSTILE}),
        data=REPORT.data.model_copy(update={"metric": "top1"}),
        calibration="abc",
        keep_structure=False,
        correction="bias",
        grid=0.95,
        database="database",
        weights=100,
        layers=[SweepLayer(name=HOSTILE, weights=100)],
        dense=DenseFigures(metrics={"top1": 92.0, "sqnr": 200.0}, flops=None, size_bytes=400),
        points=[
            point("lamp", 0.5, 91.0),
            point("lamp", 0.9, 88.0),
            point("uniform", 0.5, 89.0),
            point("uniform", 0.9, 10.0),
        ],
        stages=[],
        warnings=[HOSTILE],
        seconds=3.0,
        peak_memory_mib=100.0,
    )


def test_what_is_written_is_read_again(sweep: Sweep, tmp_path: Path) -> None:
    files = write_sweep(sweep, tmp_path)
    assert [path.name for path in files] == [
        "sweep.json",
        "sweep.csv",
        "sweep.svg",
        "sweep.png",
        "sweep.html",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)
    assert read_sweep(tmp_path) == read_sweep(files[0]) == sweep
    first = [path.read_bytes() for path in files]
    write_sweep(sweep, tmp_path)
    assert [path.read_bytes() for path in files] == first


def test_nothing_is_written_if_a_number_cannot_be(sweep: Sweep, tmp_path: Path) -> None:
    sweep.points[0].metrics["top1"] = float("nan")
    with pytest.raises(ValueError, match="Out of range float values"):
        write_sweep(sweep, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_are_escaped(sweep: Sweep) -> None:
    page = sweep_page.render_page(sweep, sweep_page.render_plot(sweep, "svg").decode())
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "<svg" in page


def test_the_table_holds_known_metrics_only(sweep: Sweep) -> None:
    rows = list(csv.DictReader(io.StringIO(sweep_page.render_csv(sweep))))
    assert list(rows[0]) == [*sweep_page.COLUMNS, "top1", "sqnr"]
    assert [(row["id"], row["flops"], row["top1"], row["weights"]) for row in rows[:2]] == [
        ("lamp@0.50", "", "91.0", "100"),
        ("lamp@0.90", "", "88.0", "100"),
    ]


def test_the_best_of_every_row(sweep: Sweep) -> None:
    assert sweep_page.best_points(sweep) == {"lamp@0.50", "lamp@0.90"}
    assert sweep_page.headline(sweep) == "4 points of 2 allocations, 100 weights; dense: top-1 % 92.00"


def test_the_plot_ends_where_good_points_are_told_apart(sweep: Sweep) -> None:
    assert sweep_page.plot_floor(sweep) == pytest.approx(92.0 - 3 * 4.0 - 2.0)
    sweep.points.pop()
    assert sweep_page.plot_floor(sweep) is None


def test_outputs_that_are_no_scores_are_drawn_by_their_noise(sweep: Sweep) -> None:
    for each in sweep.points:
        del each.metrics["top1"]
    assert sweep_page.shown_metric(sweep) == "sqnr"
    assert sweep_page.plot_floor(sweep) is None
    assert sweep_page.render_plot(sweep, "png").startswith(b"\x89PNG")
    assert sweep_page.headline(sweep) == "4 points of 2 allocations, 100 weights"
