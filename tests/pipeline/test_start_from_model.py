"""Iterations that each prune the model that the one before ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline import compress as compressing
from pot_sparsity.pipeline.allocation.targets import Target
from pot_sparsity.pipeline.compress import Compressed, Surroundings
from pot_sparsity.pipeline.moments_state import store_moments
from pot_sparsity.pipeline.repair import finish as finishing
from pot_sparsity.recipe import Recipe, load_recipe, validate_recipe
from tests.pipeline.nets import QUICK, conv_net, images, to_ir

SCHEDULE = {"kind": "cubic", "iterations": 2, "initial": 0.0, "start": "model"}


def recipe(sparsity: float = 0.7, **sections: Any) -> Recipe:
    sections.setdefault("schedule", SCHEDULE)
    sections.setdefault("finish", {"distillation": "never"})
    return validate_recipe({"sparsity": sparsity, **QUICK, **sections})


def run(settings: Recipe, model: Any = None, **named: Any) -> Result:
    model = conv_net() if model is None else model
    return optimize(model, {"x": images(60)}, recipe=settings, **named)


def weights(path: Path) -> dict[str, AnyArray]:
    model = load_model(path)
    return {layer.name: read_weight(model, layer) for layer in find_layers(model.graph).layers}


@pytest.mark.parametrize("to_openvino", [False, True])
def test_zeros_rise_to_what_was_asked_and_stay(tmp_path: Path, to_openvino: bool) -> None:
    model = to_ir(conv_net(), tmp_path / "net.xml") if to_openvino else conv_net()
    whole, half = recipe(), recipe(0.7 - 0.7 / 8, schedule={"kind": "one_shot"})
    result = run(whole, model, output=tmp_path / "whole")
    first = run(half, model, output=tmp_path / "half")
    report = result.report
    assert report.zeros == round(0.7 * report.weights)
    assert [item.zeros for item in report.iterations] == [first.report.zeros, report.zeros]
    assert report.chosen_iteration == 1
    # The first iteration is a run of its own; what it removes is not brought back.
    name = "model.xml" if to_openvino else "model.onnx"
    before, after = weights(tmp_path / "half" / name), weights(tmp_path / "whole" / name)
    assert all(np.all(after[layer][before[layer] == 0.0] == 0.0) for layer in before)
    assert sum(int((weight == 0.0).sum()) for weight in after.values()) == report.zeros


def test_layers_are_fitted_to_the_model_that_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Surroundings, Compressed]] = []
    finished: list[tuple[Any, Any]] = []
    whole, init = compressing._finished, finishing.Finish.__init__

    def remember(around: Surroundings, best: Compressed, *rest: Any) -> Compressed:
        result = whole(around, best, *rest)
        seen.append((around, result))
        return result

    def kept(self: Any, base: Any, dense_model: Any, *rest: Any) -> None:
        finished.append((base, dense_model))
        init(self, base, dense_model, *rest)

    monkeypatch.setattr(compressing, "_finished", remember)
    monkeypatch.setattr(finishing.Finish, "__init__", kept)
    run(recipe(finish={"distillation": "never", "from_error": 0.0}))
    (first, middle), (second, _) = seen
    assert second.prepared.model is middle.model
    assert second.reference is first.reference is first.prepared.model
    assert finished == [(first.prepared.model, first.reference), (middle.model, first.reference)]
    for item in second.dense:
        name = item.layer.name
        np.testing.assert_array_equal(item.weight == 0.0, middle.solutions[name].weight == 0.0)
        np.testing.assert_allclose(item.weight, middle.solutions[name].weight, rtol=1e-6)
        assert second.moments[name] is not first.moments[name]
    assert any(
        not np.allclose(second.moments[name].second, first.moments[name].second) for name in first.moments
    )
    # Where inputs have not changed, neither have moments.
    entry = first.dense[0].layer.name
    np.testing.assert_allclose(second.moments[entry].second, first.moments[entry].second)
    assert set(second.curves) == set(first.curves)
    assert any(
        not np.array_equal(second.curves[name].distortion, first.curves[name].distortion)
        for name in first.curves
    )


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe()
    run(settings, output=tmp_path / "once")

    def interrupted(folder: Any, kind: str, moments: Any) -> None:
        store_moments(folder, kind, moments)
        if kind == "moments-1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pot_sparsity.pipeline.run.store_moments", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, output=tmp_path / "twice")
    run(settings, output=tmp_path / "twice", resume=True)
    once, twice = (weights(tmp_path / name / "model.onnx") for name in ("once", "twice"))
    for layer in once:
        np.testing.assert_array_equal(once[layer], twice[layer])


def test_an_iteration_that_asks_for_nothing_is_left_out() -> None:
    assert [Target(0.0).asks, Target(0.1).asks] == [False, True]
    assert not Target(0.5, {"flops": 1.0, "sparsity": 0.0}).asks
    assert Target(0.5, {"flops": 1.0, "sparsity": 0.1}).asks
    assert Target(0.5, {"flops": 0.9}).asks
    report = run(recipe(budget={"flops": 0.5})).report
    assert len(report.iterations) == 2
    assert report.budgets[0].reached <= 0.5
    assert len(run(recipe(0.0)).report.iterations) == 1


def test_one_that_drops_too_far_ends_the_run() -> None:
    report = run(
        recipe(0.95, schedule={**SCHEDULE, "max_drop": 0.0, "iterations": 4, "initial": 0.01})
    ).report
    refused = [item for item in report.iterations if not item.accepted]
    assert refused == [report.iterations[-1]]
    assert report.chosen_iteration is not None
    assert report.zeros == report.iterations[report.chosen_iteration].zeros


def test_it_does_not_go_with_bisection() -> None:
    with pytest.raises(RecipeError, match="needs 'start: dense'"):
        recipe(schedule={"kind": "bisection", "max_drop": 1.0, "start": "model"})


def test_the_recipe_that_ships() -> None:
    thorough, default = load_recipe("thorough"), load_recipe("default")
    assert thorough.schedule.start == "model"
    assert thorough.model_copy(update={"schedule": default.schedule}) == default
