"""Layer-wise tuning in a run: which samples it sees, what it does to the zeros and to the error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pot_sparsity.algorithms.arrays import Float32
from pot_sparsity.algorithms.tuning import RATES, TuningSettings
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline.repair.stages import StagePlan, plan_stages
from pot_sparsity.pipeline.repair.tuning import TuningPool, TuningSamples, tune, tuning_settings
from pot_sparsity.pipeline.solve import Solution, read_dense
from pot_sparsity.recipe import Recipe, validate_recipe
from tests.pipeline.nets import (
    QUICK,
    conv_net,
    images,
    node,
    normal,
    one_dimension,
    proto,
    shared_net,
    transposed,
    two_inputs,
)

FAST = {"iterations": 4, "updates_per_batch": 10, "batch_size": 16, "learning_rate": 1e-3}


def recipe(inputs: str = "dense", sparsity: float = 0.6, **sections: Any) -> Recipe:
    """Magnitude pruning, then tuning whatever the judge says, and nothing behind it."""
    tuning = {"method": "tuning", "input": inputs, "when": "always", "tuning": FAST}
    tuning |= {"masks": "kept", "target": "layer"}
    tuning |= sections.pop("reconstruction", {})
    correction = {"differential": "never", "normalization": "never"}
    return validate_recipe(
        {
            "sparsity": sparsity,
            "pruning": {"method": "magnitude"},
            "reconstruction": tuning,
            "correction": correction,
            "finish": {"activations": "never", "rescaling": "never", "distillation": "never"},
            **QUICK,
            **sections,
        }
    )


def run(settings: Recipe, model: Any = None, samples: Any = None) -> Result:
    return optimize(
        conv_net() if model is None else model,
        images(64) if samples is None else samples,
        validation=images(64, 9) if samples is None else None,
        recipe=settings,
        baseline_int8=False,
        measure_latency=False,
    )


def distance(result: Result) -> float:
    return result.report.variants[-1].metrics["output_mse"]


@pytest.mark.parametrize("inputs", ["dense", "sparse"])
def test_it_lowers_the_error_and_keeps_the_zeros(inputs: str) -> None:
    pruned = run(recipe(reconstruction={"method": "closed_form", "input": "dense"}))
    tuned = run(recipe(inputs))
    assert tuned.report.zeros == pruned.report.zeros == round(0.6 * tuned.report.weights)
    assert all(layer.zeros == layer.target_zeros for layer in tuned.report.layers)
    (decision,) = tuned.report.decisions
    assert (decision.what, decision.kept) == (f"layer-wise tuning from {inputs} inputs", True)
    assert decision.before is not None
    assert decision.after is not None
    assert decision.after < 0.98 * decision.before
    if inputs == "sparse":
        assert distance(tuned) < 0.6 * distance(pruned)


def test_enough_updates_come_near_the_closed_form() -> None:
    exact = run(recipe("sparse", reconstruction={"method": "closed_form"}))
    start = run(recipe(reconstruction={"method": "closed_form", "input": "dense"}))
    long = {**FAST, "iterations": 20, "updates_per_batch": 50, "batch_size": 64, "learning_rate": 3e-3}
    tuned = run(recipe("sparse", reconstruction={"tuning": long}))
    assert abs(distance(tuned) - distance(exact)) < 0.1 * (distance(start) - distance(exact))


def test_what_does_not_help_is_left_out() -> None:
    harmful = {**FAST, "optimizer": "sgd", "weight_decay": 1e5, "updates_per_batch": 1}
    harmful |= {"learning_rate": 1e-6, "bias_learning_rate": 1e-6}
    result = run(recipe(reconstruction={"when": "helps", "tuning": harmful}))
    (decision,) = result.report.decisions
    assert not decision.kept
    kept = run(recipe(reconstruction={"tuning": harmful}))
    assert kept.report.decisions[0].kept
    assert distance(kept) > distance(result)


def test_same_seed_same_weights_whatever_the_threads() -> None:
    found = []
    for threads in (1, 2):
        result = optimize(
            conv_net(),
            images(40),
            recipe=recipe("sparse"),
            threads=threads,
            baseline_int8=False,
            measure_latency=False,
        )
        model = result.sparse_model
        found.append(model.SerializeToString())
    assert found[0] == found[1]


NETS: dict[str, tuple[Any, Any]] = {
    "shared": (shared_net, normal(4, 40, 7)),
    "two inputs": (two_inputs, {"x": normal(5, 40, 6), "z": normal(6, 40, 4)}),
    "transposed": (transposed, images(30)),
    "one dimension": (one_dimension, normal(4, 30, 3, 12)),
    "fixed batch": (lambda: conv_net(4), images(60)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_other_networks(name: str, loss: str) -> None:
    build, samples = NETS[name]
    inputs = "dense" if loss == "mse" else "sparse"
    result = run(recipe(inputs, 0.5, reconstruction={"tuning": {**FAST, "loss": loss}}), build(), samples)
    assert abs(result.report.zeros - 0.5 * result.report.weights) <= 1


def test_a_schedule_goes_on_from_the_previous_weights() -> None:
    schedule = {"kind": "cubic", "iterations": 3, "initial": 0.2}
    results = {start: run(recipe(schedule={**schedule, "start": start})) for start in ("dense", "previous")}
    assert all(result.report.zeros == round(0.6 * result.report.weights) for result in results.values())
    assert distance(results["previous"]) != distance(results["dense"])
    assert distance(results["dense"]) == distance(run(recipe()))
    assert [item.zeros for item in results["previous"].report.iterations] == [
        item.zeros for item in results["dense"].report.iterations
    ]


def stage(model: OnnxModel) -> StagePlan:
    return plan_stages(model.graph, find_layers(model.graph).layers, dense_inputs=True)[0]


def test_the_samples_drawn_are_those_that_are_kept() -> None:
    model = OnnxModel(proto([node("MatMul", ["x", "w"], "y")], {"w": normal(1, 3, 2)}, ["n", 3]))
    plan = stage(model)
    (layer,) = find_layers(model.graph).layers
    for inputs in ("dense", "sparse"):
        settings = recipe(inputs, reconstruction={"tuning": {"samples": 6}})
        samples = TuningSamples(settings, 10, 4, [1, 2])
        rows: Float32 = np.arange(30, dtype=np.float32).reshape(10, 3)
        for position in range(3):
            part = rows[4 * position : 4 * position + 4]
            for side in range(3):
                samples.see(
                    plan, position, side, {"x": part + 100 * side}, {"x": part, "y": part[:, :2] + 0.5}
                )
        assert samples.pool(0, layer.name) is None
        for side in (1, 2):
            pool = samples.pool(side, layer.name)
            assert pool is not None
            assert len(pool) == 6
            ((x, y),) = pool.batches(1, 50, seed=0)
            offset = 100 * side if inputs == "sparse" else 0
            assert len({row[0] for row in x}) == 6
            np.testing.assert_array_equal(x[:, :2] - offset + 0.5, y)
        samples.clear()


def test_batches_are_drawn_without_replacement() -> None:
    pool = TuningPool()
    for value in range(7):
        pool.append(np.full((1, 2), value), np.full((1, 3), value))
    batches = list(pool.batches(5, 4, seed=3))
    assert len(batches) == 5
    assert all(len(set(x[:, 0])) == 4 and np.array_equal(x[:, 0], y[:, 0]) for x, y in batches)
    assert len({tuple(x[:, 0]) for x, _ in batches}) > 1
    assert [tuple(x[:, 0]) for x, _ in batches] == [tuple(x[:, 0]) for x, _ in pool.batches(5, 4, seed=3)]
    pool.close()


@pytest.mark.parametrize(
    ("x", "y", "count", "rows"),
    [((12, 3), (12, 2), 2, 6), ((1, 4, 3), (1, 4, 2), 1, 1), ((4, 3), (2, 4, 2), 1, 4)],
    ids=["folded axes", "batch elsewhere", "one input for all groups"],
)
def test_a_first_axis_that_is_not_the_batch(
    x: tuple[int, ...], y: tuple[int, ...], count: int, rows: int
) -> None:
    model = OnnxModel(proto([node("MatMul", ["x", "w"], "y")], {"w": normal(1, 3, 2)}, ["n", 3]))
    samples = TuningSamples(recipe(reconstruction={"tuning": {"samples": 100}}), 2, 2, [0])
    samples.see(stage(model), 0, 0, {}, {"x": np.ones(x), "y": np.ones(y)})
    pool = samples.pool(0, "y")
    assert pool is not None
    assert len(pool) == count
    assert next(pool.batches(1, 1, 0))[0].shape[0] == rows
    samples.clear()


def test_divergence_is_said_with_the_layer() -> None:
    harmful = {**FAST, "optimizer": "sgd", "learning_rate": 1e30}
    with pytest.raises(
        RecipeError, match=r"reconstruction.tuning: layer 'conv1': sgd diverged .* lower them"
    ):
        run(recipe(reconstruction={"tuning": harmful}))


def test_settings_reach_the_loop() -> None:
    section = recipe(
        reconstruction={
            "tuning": {"optimizer": "sgd", "momentum": 0.5, "lookahead_steps": 5, "iterations": 7}
        }
    ).reconstruction.tuning
    wanted = TuningSettings("sgd", iterations=7, momentum=0.5, lookahead_steps=5)
    assert tuning_settings(section) == wanted
    assert wanted.rates == RATES["sgd"]


def test_a_layer_is_tuned_from_its_pruned_state() -> None:
    model = OnnxModel(proto([node("MatMul", ["x", "w"], "y")], {"w": normal(1, 3, 2)}, ["n", 3]))
    (item,) = read_dense(model, find_layers(model.graph).layers)
    pool = TuningPool()
    x = normal(2, 20, 3)
    for row in x:
        pool.append(row[None], row[None] @ item.weight[0].T.astype(np.float32))
    pruned = np.where(np.abs(item.weight) > 0.6, item.weight, 0.0)
    tuned = tune(item.layer, Solution(pruned, (None,), 0.0, 0.0), pool, recipe())
    assert tuned.bias is None
    assert np.array_equal(tuned.weight == 0, pruned == 0)
    assert tuned.losses[-1, 1] < tuned.losses[0, 0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tuning": {"optimizer": "adma"}}, "unknown optimizer 'adma'; did you mean 'adam'"),
        ({"tuning": {"loss": "mae"}}, r"unknown loss 'mae'.* \(known: cosine, huber, l1, mse\)"),
    ],
)
def test_illegal_settings(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(reconstruction=section)


def test_dense_inputs_are_at_hand_when_the_output_is() -> None:
    model = OnnxModel(conv_net())
    plans = plan_stages(model.graph, find_layers(model.graph).layers, dense_inputs=True)
    engine = get_engine("openvino", 1)
    feeds = {model.graph.inputs[0]: images(2)}
    alive: dict[str, Any] = dict(feeds)
    for plan in plans:
        after = {name: alive[name] for name in plan.dense.carried}
        if plan.dense.outputs:
            part = model.extract(outputs=plan.dense.outputs, inputs=plan.dense.inputs)
            executable = engine.compile(part)
            after |= executable.run({name: alive[name] for name in executable.inputs})
        alive = after
        for _, place in plan.layers:
            assert {place.input, place.output} <= set(alive)
