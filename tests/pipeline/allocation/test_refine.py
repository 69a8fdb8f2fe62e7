"""Curves corrected in the sparse model, against distances of whole models."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.data import Dataset, spread
from pot_sparsity.engines import get_engine
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import sample_distances
from pot_sparsity.pipeline.allocation import refine
from pot_sparsity.pipeline.allocation.curves import Meter, measure_curves
from pot_sparsity.pipeline.allocation.refine import BOUNDS, STEP, Trials, refined_curves
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.optimize import optimize
from pot_sparsity.pipeline.prepare import Prepared, prepare
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import Solution, apply, prune_layer, read_dense
from pot_sparsity.recipe import Recipe, load_recipe
from tests.pipeline.nets import QUICK, conv_net, dataset, images


class Case:
    """A small network, half of every layer pruned by itself."""

    def __init__(self) -> None:
        self.recipe: Recipe = load_recipe(None, ["allocation.levels=3"])
        self.engine = get_engine("onnxruntime", threads=1)
        original = load_model(conv_net())
        self.samples: Dataset = dataset(original, images(48))
        self.prepared: Prepared = prepare(
            original, self.recipe, self.engine, self.samples, ignored_scope=None, keep_structure=False
        )
        self.dense = read_dense(self.prepared.model, self.prepared.layers)
        self.moments = collect_moments(
            self.prepared.model,
            self.prepared.layers,
            self.engine,
            self.samples,
            batch_size=16,
            threads=1,
            max_positions=None,
            progress=Silent(),
        )
        self.curves = measure_curves(
            self.prepared.model,
            self.dense,
            self.moments,
            {},
            self.samples,
            self.engine,
            self.recipe,
            threads=1,
            folder=RunFolder(None),
            progress=Silent(),
        )
        self.solutions: dict[str, Solution] = {
            item.layer.name: prune_layer(
                item, self.moments[item.layer.name], None, item.layer.size // 2, self.recipe, shrinkage=0.0
            )
            for item in self.dense
        }
        self.sparse = self.prepared.model.copy()
        for item in self.dense:
            apply(self.sparse, item.layer, self.solutions[item.layer.name])
        self.trials = Trials(self.prepared.model, self.dense, self.moments, {}, self.engine, self.recipe)

    def run(self, model: Model) -> Float64:
        """The output, ``[samples, classes]``."""
        whole = self.engine.compile(model.extract())
        found = whole.run({name: images(48) for name in whole.inputs})
        return np.asarray(found[model.outputs[0].name], np.float64)

    def outputs(self, changed: Solution | None = None, name: str = "") -> Float64:
        """Of the sparse model, with another solution in one layer."""
        model = self.sparse.copy()
        for item in self.dense:
            if item.layer.name == name and changed is not None:
                apply(model, item.layer, changed)
        return self.run(model)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_the_meter_compares_with_another_model(case: Case) -> None:
    with ExitStack() as stack:
        meter = Meter(
            case.sparse, case.engine, case.samples, case.recipe, stack, reference=case.prepared.model
        )
        wanted = case.run(case.prepared.model)
        expected = sample_distances(wanted, case.outputs(), "error")
        for layer, look in meter.visit([item.layer for item in case.dense]):
            np.testing.assert_allclose(look(case.solutions[layer.name]), expected, rtol=1e-3, atol=1e-6)


def test_every_curve_is_scaled_by_measured_over_predicted(case: Case) -> None:
    found = refined_curves(case.trials, case.sparse, case.solutions, case.curves, case.samples, None)
    wanted = case.run(case.prepared.model)
    start = sample_distances(wanted, case.outputs(), "error").mean()
    factors = {}
    for item in case.dense:
        name, solution = item.layer.name, case.solutions[item.layer.name]
        zeros = int((solution.weight == 0).sum())
        more = zeros + round(STEP * (item.layer.size - zeros))
        if item.layer.size - zeros < refine.FEWEST:
            continue
        sparser = refine._sparser(case.trials, item, solution, more)
        assert int((sparser.weight == 0).sum()) == more
        assert not sparser.weight[solution.weight == 0].any()
        rise = sample_distances(wanted, case.outputs(sparser, name), "error").mean() - start
        curve = case.curves[name]
        factors[name] = max(0.0, rise) / float(np.diff(curve.at(np.array([zeros, more])))[0])
    middle = np.median([factor for factor in factors.values() if factor > 0])
    for name, curve in case.curves.items():
        factor = np.clip(factors.get(name, middle) / middle, *BOUNDS)
        np.testing.assert_allclose(found[name].distortion, factor * curve.distortion, rtol=2e-2, atol=1e-9)
        assert found[name].costs is curve.costs


def test_without_anything_to_measure_curves_stay(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "FEWEST", 10**9)
    found = refined_curves(case.trials, case.sparse, case.solutions, case.curves, case.samples, None)
    assert {name: curve.distortion.tolist() for name, curve in found.items()} == {
        name: curve.distortion.tolist() for name, curve in case.curves.items()
    }


def test_samples_are_spread_over_all(case: Case) -> None:
    assert len(spread(case.samples, 10)) == 10
    assert len(spread(case.samples, 1000)) == 48


@pytest.mark.parametrize(("start", "tried"), [(0.0, True), (1e9, False)])
def test_a_run_decides_by_held_out_samples(start: float, tried: bool) -> None:
    result = optimize(
        conv_net(), images(64), recipe={**QUICK, "sparsity": 0.7, "allocation": {"refine_from": start}}
    )
    made = [decision for decision in result.report.decisions if "allocated again" in decision.what]
    assert len(made) == int(tried)
    for decision in made:
        assert decision.kept == (decision.after < decision.before)  # type: ignore[operator]
    layers = result.report.layers
    assert sum(layer.zeros for layer in layers) == round(0.7 * sum(layer.weights for layer in layers))


@pytest.mark.parametrize("batch", [8, 16])
def test_a_fixed_batch_larger_than_the_samples_asked_for(batch: int) -> None:
    recipe = {**QUICK, "sparsity": 0.7, "allocation": {"refine_from": 0.0, "samples": 4, "exchanges": 2}}
    result = optimize(conv_net(batch), images(40), recipe=recipe)
    made = [decision.what for decision in result.report.decisions]
    assert any("allocated again" in what for what in made)
    assert any("exchanges" in what for what in made)
