"""--budget and --timings: what reaches the pipeline, and one line for what makes no sense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pot_sparsity.cli import main
from pot_sparsity.recipe import Recipe
from pot_sparsity.report.io import read_report

SAMPLE = Path(__file__).resolve().parents[1] / "report" / "sample_report.json"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The named arguments that reached the pipeline."""
    found: dict[str, Any] = {}

    def optimize(*_: object, **named: Any) -> object:
        found.update(named)
        return SimpleNamespace(report=read_report(SAMPLE), folder=Path("out"), files=())

    monkeypatch.setattr("pot_sparsity.pipeline.optimize", optimize)
    return found


def run(*more: str) -> int:
    return main(["optimize", "m.onnx", "-c", "data.npz", "-o", "out", *more])


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (["--budget", "flops=0.5"], {"flops": 0.5}),
        (["--budget", "flops=0.5", "--budget", "size=.2"], {"flops": 0.5, "size": 0.2}),
        (["--budget", "flops=0.5, latency = 1"], {"flops": 0.5, "latency": 1.0}),
        (["--budget", "flops=0.5", "--sparsity", "0.6"], {"sparsity": 0.6, "flops": 0.5}),
        (["--budget", "sparsity=0.6,bops=0.1"], {"sparsity": 0.6, "bops": 0.1}),
        (["--set", "budget.flops=0.5"], {"flops": 0.5}),
        ([], {}),
    ],
)
def test_budgets_reach_the_recipe(
    given: Sequence[str], budget: dict[str, float], called: dict[str, Any]
) -> None:
    assert run(*given) == 0
    assert called["recipe"].budget == budget


def test_a_budget_of_sparsity_alone_is_the_sparsity(called: dict[str, Any]) -> None:
    assert run("--budget", "sparsity=0.6") == 0
    recipe: Recipe = called["recipe"]
    assert (recipe.sparsity, recipe.budget) == (0.6, {})


def test_options_replace_the_recipes_budgets(called: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("budget: {size: 0.3, bops: 0.5}\n")
    assert run("--recipe", str(path)) == 0
    assert called["recipe"].budget == {"size": 0.3, "bops": 0.5}
    assert run("--recipe", str(path), "--sparsity", "0.4") == 0
    assert called["recipe"].budget == {"sparsity": 0.4, "size": 0.3, "bops": 0.5}
    assert run("--recipe", str(path), "--budget", "flops=0.5") == 0
    assert called["recipe"].budget == {"flops": 0.5}


def test_timings_reach_the_pipeline(called: dict[str, Any]) -> None:
    assert run("--budget", "latency=0.5", "--timings", "t.json") == 0
    assert called["timings"] == Path("t.json")
    assert run() == 0
    assert called["timings"] is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--budget", "flops"], "--budget 'flops' must look like KIND=V, e.g. flops=0.5"),
        (["--budget", "=0.5"], "--budget '=0.5' must look like KIND=V"),
        (["--budget", "flops=half"], "--budget 'flops=half' must look like KIND=V"),
        (["--budget", "flops=nan"], "--budget 'flops=nan' must look like KIND=V"),
        (["--budget", ""], "--budget '' must look like KIND=V"),
        (["--budget", "flops=0.5,"], "--budget '' must look like KIND=V"),
        (["--budget", "flop=0.5"], "unknown budget 'flop'; did you mean 'flops'?"),
        (["--budget", "flops=0"], "budget flops must be above 0 and at most 1, not 0"),
        (["--budget", "size=1.2"], "budget size must be above 0 and at most 1, not 1.2"),
        (["--budget", "size=inf"], "budget size must be above 0 and at most 1, not inf"),
        (["--budget", "size=-1"], "budget size must be above 0 and at most 1, not -1"),
        (["--budget", "flops=0.5", "--budget", "flops=0.4"], "--budget flops is given twice"),
        (["--sparsity", "0.5", "--budget", "sparsity=0.6"], "--sparsity and --budget sparsity say the same"),
        (["--sparsity", "2", "--budget", "flops=0.6"], "--sparsity must lie between 0 and 1"),
    ],
)
def test_budgets_that_make_no_sense_end_in_one_line(
    given: Sequence[str], text: str, called: dict[str, Any], capsys: Capture
) -> None:
    assert run(*given) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("\n") == 1
    assert called == {}
    assert not Path("out").exists()
