"""``max_drop`` by bisection, end to end: the sparsest model within the limit, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pot_sparsity.errors import AccuracyGateError, RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline import delivery as pipeline_delivery
from pot_sparsity.pipeline import int8 as pipeline_int8
from pot_sparsity.pipeline.bisection import bisects
from pot_sparsity.pipeline.compress import compress
from pot_sparsity.quantization import quantize
from pot_sparsity.recipe import load_recipe, validate_recipe
from pot_sparsity.report.io import read_report
from pot_sparsity.report.schema import Report
from tests.pipeline.nets import QUICK, conv_net, images, labelled

#: No step that takes time.
CHEAP: dict[str, Any] = {
    **QUICK,
    "allocation": {"method": "uniform"},
    "pruning": {"method": "wanda_refit"},
    "reconstruction": {"input": "dense"},
    "correction": {"differential": "never", "normalization": "never"},
    "finish": {"activations": "never", "distillation": "never"},
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("data") / "validation.npz", conv_net(), 200)


def job(judged: Path | None, sparsity: float, schedule: dict[str, Any], **named: Any) -> Result:
    sections = {**CHEAP, **named.pop("sections", {})}
    recipe = validate_recipe({"sparsity": sparsity, "schedule": schedule, **sections})
    options = {"measure_latency": False, "baseline_int8": False, "threads": 1, **named}
    return optimize(conv_net(), images(64), validation=judged, recipe=recipe, **options)


def tried(report: Report) -> list[tuple[float, bool]]:
    return [(item.sparsity, item.accepted) for item in report.iterations]


@pytest.fixture(scope="module")
def drops(judged: Path) -> dict[float, float]:
    """The true drop at every tenth of sparsity below 0.9, each by a run of its own."""
    found = {}
    for tenth in range(1, 10):
        report = job(judged, tenth / 10, {"kind": "one_shot"}).report
        found[tenth / 10] = 100.0 - report.iterations[0].metrics["top1"]
    return found


def test_the_answer_is_that_of_a_scan(judged: Path, drops: dict[float, float]) -> None:
    rising = np.maximum.accumulate(list(drops.values())).tolist()
    assert list(drops.values()) == rising, "the network of this test is no longer monotone"
    for limit in (drops[0.3], (drops[0.5] + drops[0.6]) / 2, drops[0.9] + 1.0):
        best = max(sparsity for sparsity, drop in drops.items() if drop <= limit)
        result = job(judged, 0.9, {"max_drop": limit, "resolution": 0.1})
        report = result.report
        assert report.chosen_iteration is not None
        chosen = report.iterations[report.chosen_iteration]
        assert chosen.sparsity == pytest.approx(best)
        assert report.sparsity_reached == pytest.approx(best, abs=0.001)
        assert report.iterations[0].sparsity == 0.9
        assert [item.index for item in report.iterations] == list(range(len(report.iterations)))
        for item in report.iterations:
            assert item.drop == pytest.approx(drops[round(item.sparsity, 1)])
            assert item.accepted == (item.drop is not None and item.drop <= limit + 1e-9)
        model = load_model(result.model)
        zeros = sum(
            int((read_weight(model, layer) == 0.0).sum()) for layer in find_layers(model.graph).layers
        )
        assert zeros == chosen.zeros


def test_agreement_is_watched_where_there_are_no_labels(drops: dict[float, float]) -> None:
    report = job(None, 0.9, {"kind": "bisection", "max_drop": 15.0, "resolution": 0.2}).report
    assert report.data.metric == "agreement"
    assert report.chosen_iteration is not None
    assert report.iterations[report.chosen_iteration].accepted
    assert {round(0.9 - item.sparsity, 6) for item in report.iterations} <= {0.0, 0.2, 0.4, 0.6, 0.8}


def test_no_more_trials_than_allowed(judged: Path, drops: dict[float, float]) -> None:
    schedule = {"max_drop": drops[0.3], "resolution": 0.01, "iterations": 2}
    try:
        report = job(judged, 0.9, schedule).report
    except AccuracyGateError:
        return
    assert len(report.iterations) == 2
    assert report.chosen_iteration == 1


def test_none_is_good_enough(judged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AccuracyGateError, match=r"no iteration keeps top1 within 0\.0 points") as caught:
        job(judged, 0.95, {"max_drop": 0.0, "resolution": 0.5}, output=out)
    assert caught.value.exit_code == 3
    report = read_report(out)
    assert report.status == "gate_not_met"
    assert tried(report) == [(0.95, False), (0.45, False)]
    assert not (out / "model.onnx").exists()


def test_a_resumed_search_is_the_same(
    judged: Path, drops: dict[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"max_drop": drops[0.5], "resolution": 0.1}
    whole = job(judged, 0.9, schedule, output=tmp_path / "whole")
    calls: list[int] = []

    def stopping(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compress(*args, **named)

    monkeypatch.setattr("pot_sparsity.pipeline.candidates.compress", stopping)
    with pytest.raises(KeyboardInterrupt):
        job(judged, 0.9, schedule, output=tmp_path / "out")
    resumed = job(judged, 0.9, schedule, output=tmp_path / "out", resume=True)
    assert resumed.report.iterations == whole.report.iterations
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> list[int]:
    """INT8 of models whose zeros in ``branch2`` are ``bad`` answers nonsense."""
    seen: list[int] = []

    def spoiled(model: Any, *args: Any, **named: Any) -> Any:
        result = quantize(model, *args, **named)
        layers = {layer.name: layer for layer in find_layers(model.graph).layers}
        seen.append(int((read_weight(model, layers["branch2"]) == 0.0).sum()))
        if bad(seen[-1]):
            constant = layers["y"].constant
            result = model.copy()
            result.set_constant(constant, -result.graph.value(constant))
        return result

    monkeypatch.setattr(pipeline_int8, "quantize", spoiled)
    monkeypatch.setattr(pipeline_delivery, "lost_zeros", lambda *models: {})
    return seen


INT8 = {"quantization": {"enabled": True, "samples": 8, "ranges": "default", "bias_correction": "fast"}}


def test_int8_that_drops_too_far_is_searched_around(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All would do before INT8; of those that do behind it, a sparse one is delivered."""
    size = 8 * 8 * 9
    seen = spoil(monkeypatch, lambda zeros: zeros > 0.65 * size)
    report = job(judged, 0.9, {"max_drop": 70.0, "resolution": 0.1}, sections=INT8).report
    assert report.chosen_iteration is not None
    chosen = report.iterations[report.chosen_iteration]
    assert chosen.accepted
    assert chosen.sparsity < 0.65
    assert seen[0] > 0.65 * size
    assert seen[-1] == round(chosen.sparsity * size)
    refused = [item for item in report.decisions if item.what.startswith("iteration ") and not item.kept]
    assert len(refused) == len(seen) - 1
    assert all(item.after is not None and item.after > 70.0 for item in refused)


def test_int8_that_always_drops_too_far(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spoil(monkeypatch, lambda zeros: True)
    with pytest.raises(AccuracyGateError):
        job(judged, 0.9, {"max_drop": 70.0, "resolution": 0.3, "iterations": 3}, sections=INT8)
    assert 1 <= len(seen) <= 3


def test_a_pattern_that_fixes_the_zeros_is_tried_once(judged: Path) -> None:
    sections = {"pruning": {"method": "wanda_refit", "pattern": "2:4"}}
    report = job(judged, 0.5, {"max_drop": 90.0}, sections=sections).report
    assert tried(report) == [(0.5, True)]
    with pytest.raises(AccuracyGateError):
        job(judged, 0.5, {"max_drop": 0.0}, sections=sections)


def test_budgets_are_loosened_together(judged: Path, drops: dict[float, float]) -> None:
    sections = {"budget": {"flops": 0.2, "sparsity": 0.6}}
    report = job(judged, 0.0, {"max_drop": drops[0.4], "resolution": 0.25}, sections=sections).report
    assert report.chosen_iteration is not None
    chosen = report.iterations[report.chosen_iteration]
    first = report.iterations[0]
    assert not first.accepted
    assert first.sparsity >= 0.6 - 1e-3
    assert chosen.accepted
    assert chosen.sparsity < first.sparsity
    assert report.sparsity_reached == pytest.approx(chosen.sparsity, abs=0.002)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, False),
        ({"max_drop": 1.0}, True),
        ({"kind": "bisection", "max_drop": 1.0}, True),
        ({"kind": "cubic", "max_drop": 1.0}, False),
        ({"kind": "one_shot", "max_drop": 1.0}, False),
        ({"max_drop": 1.0, "start": "previous"}, False),
    ],
)
def test_when_the_sparsity_is_bisected(schedule: dict[str, Any], expected: bool) -> None:
    assert bisects(validate_recipe({"schedule": schedule})) is expected


def test_rounds_that_build_on_each_other_are_not_bisected() -> None:
    allocation = {"rounds": "iterative"}
    assert not bisects(validate_recipe({"schedule": {"max_drop": 1.0}, "allocation": allocation}))
    with pytest.raises(
        RecipeError, match=r"^recipe: 'schedule\.kind: bisection' needs 'allocation\.rounds: one'$"
    ):
        validate_recipe({"schedule": {"kind": "bisection", "max_drop": 1.0}, "allocation": allocation})


def test_the_papers_schedule_is_as_before() -> None:
    assert not bisects(load_recipe("pot", ["schedule.max_drop=1"]))


@pytest.mark.parametrize(
    ("schedule", "match"),
    [
        ({"kind": "bisection"}, "'kind: bisection' needs max_drop"),
        ({"kind": "bisection", "max_drop": 1.0, "start": "previous"}, "needs 'start: dense'"),
        ({"resolution": 0.0}, "schedule.resolution"),
        ({"iterations": 0}, "schedule.iterations"),
        ({"kind": "bisect"}, "schedule.kind"),
    ],
)
def test_bad_schedules(schedule: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        validate_recipe({"schedule": schedule})
    assert "\n" not in str(caught.value)


def test_the_result_does_not_depend_on_the_database(
    judged: Path, drops: dict[float, float], tmp_path: Path
) -> None:
    schedule = {"max_drop": drops[0.5], "resolution": 0.1}
    found = [
        job(judged, 0.9, schedule, database=database) for database in (None, tmp_path / "db", tmp_path / "db")
    ]
    models = [item.model for item in found]
    assert all(isinstance(model, onnx.ModelProto) for model in models)
    assert len({onnx.ModelProto.SerializeToString(model, deterministic=True) for model in models}) == 1
