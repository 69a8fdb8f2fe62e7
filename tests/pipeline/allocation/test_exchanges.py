"""Exchanges of zeros between layers, judged by the whole pruned network."""

from __future__ import annotations

import numpy as np

from pot_sparsity.metrics import sample_distances
from pot_sparsity.pipeline.allocation.exchanges import exchanged
from pot_sparsity.pipeline.allocation.refine import Trials
from pot_sparsity.pipeline.optimize import optimize
from pot_sparsity.pipeline.repair.correction import OneShot, corrected
from pot_sparsity.pipeline.solve import apply, prune_layer
from tests.pipeline.allocation.test_refine import Case
from tests.pipeline.nets import QUICK, conv_net, images


def distance(case: Case, zeros: dict[str, int]) -> float:
    """Of the network with every layer pruned by itself, in one batch."""
    model = case.prepared.model.copy()
    for item in case.dense:
        moments = case.moments[item.layer.name]
        solution = prune_layer(item, moments, None, zeros[item.layer.name], case.recipe)
        apply(model, item.layer, corrected(item, solution, moments, OneShot("none", bias=True)))
    return float(sample_distances(case.run(case.prepared.model), case.run(model), "error").mean())


def test_the_network_comes_nearer_with_as_many_zeros() -> None:
    case = Case()
    recipe = case.recipe.model_copy(
        update={"allocation": case.recipe.allocation.model_copy(update={"exchanges": 15})}
    )
    trials = Trials(case.prepared.model, case.dense, case.moments, {}, case.engine, recipe)
    zeros = {item.layer.name: round(0.6 * item.layer.size) for item in case.dense}
    sparsity = sum(zeros.values()) / sum(item.layer.size for item in case.dense)
    found, history = exchanged(trials, zeros, sparsity, case.curves, case.samples, prune_layer)
    assert sum(found.values()) == sum(zeros.values())
    assert all(0 <= found[item.layer.name] <= item.layer.size for item in case.dense)
    assert 0 < len(history.trials) <= 15
    assert any(trial.kept for trial in history.trials)
    np.testing.assert_allclose(history.before, distance(case, zeros), rtol=1e-3)
    np.testing.assert_allclose(history.after, distance(case, found), rtol=1e-3)
    assert history.after < history.before


def test_a_run_says_what_they_brought() -> None:
    recipe = {**QUICK, "sparsity": 0.7, "allocation": {"exchanges": 4, "refine": "never"}}
    result = optimize(conv_net(), images(64), recipe=recipe)
    made = [decision for decision in result.report.decisions if "exchanges" in decision.what]
    assert len(made) == 1
    assert made[0].what.endswith("of 4 exchanges of zeros between layers")
    assert made[0].kept == (made[0].after < made[0].before)  # type: ignore[operator]
    layers = result.report.layers
    assert sum(layer.zeros for layer in layers) == round(0.7 * sum(layer.weights for layer in layers))
