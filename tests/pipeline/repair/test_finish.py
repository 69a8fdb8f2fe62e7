"""The finish: what it sees behind a layer, that it recovers what it can, and that it never makes the output worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline.delivery import Delivery
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.repair import finish as pipeline_finish
from pot_sparsity.pipeline.repair.rectify import Behind, Candidate, behind, fit_behind
from pot_sparsity.pipeline.repair.rescale import OUTPUTS, Measurement, rescaled, suffix, tunables
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, read_dense
from pot_sparsity.recipe import validate_recipe
from pot_sparsity.report.schema import Decision
from tests.pipeline.nets import (
    QUICK,
    Array,
    conv_net,
    dataset,
    images,
    node,
    normal,
    one_dimension,
    plain_net,
    proto,
    run_onnx,
    shared_net,
    to_ir,
    transposed,
    two_inputs,
)

ENGINES = ("openvino", "onnxruntime")


def residual_net() -> onnx.ModelProto:
    """A residual block between two layers that end in a ReLU6 and a ReLU."""
    constants = {
        "w1": normal(61, 8, 3, 3, 3, scale=0.3),
        "b1": normal(62, 8, scale=0.1),
        "w2": normal(63, 8, 8, 3, 3, scale=0.15),
        "b2": normal(64, 8, scale=0.1),
        "w3": normal(65, 8, 8, 1, 1, scale=0.3),
        "b3": normal(66, 8, scale=0.1),
        "w4": normal(67, 8, 5, scale=0.5),
        "b4": normal(68, 5, scale=0.1),
        "low": np.array(0.0, np.float32),
        "high": np.array(1.0, np.float32),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], "conv1", pads=[1, 1, 1, 1]),
        node("Clip", ["conv1", "low", "high"], "clip1"),
        node("Conv", ["clip1", "w2", "b2"], "conv2", pads=[1, 1, 1, 1]),
        node("Add", ["clip1", "conv2"], "sum"),
        node("Relu", ["sum"], "relu2"),
        node("Conv", ["relu2", "w3", "b3"], "conv3"),
        node("Relu", ["conv3"], "relu3"),
        node("GlobalAveragePool", ["relu3"], "pool"),
        node("Flatten", ["pool"], "flat"),
        node("Gemm", ["flat", "w4", "b4"], "y"),
    ]
    return proto(nodes, constants, ["n", 3, 8, 8])


def opened(net: onnx.ModelProto) -> tuple[Model, list[DenseLayer]]:
    model = OnnxModel(net)
    return model, read_dense(model, find_layers(model.graph).layers)


def output(model: Model, x: AnyArray) -> Array:
    run = get_engine("openvino").compile(model.extract())
    return np.asarray(run.run({run.inputs[0]: x})[run.outputs[0]], dtype=np.float64)


def lost(model: Model, dense: Model, x: AnyArray) -> float:
    wanted = output(dense, x)
    return float(((output(model, x) - wanted) ** 2).sum() / (wanted**2).sum())


def written(model: Model, dense: Sequence[DenseLayer], solutions: dict[str, Solution]) -> Model:
    result = model.copy()
    for item in dense:
        apply(result, item.layer, solutions[item.layer.name])
    return result


def solutions_of(dense: Sequence[DenseLayer]) -> dict[str, Solution]:
    return {item.layer.name: Solution(item.weight, item.biases, 0.0, 0.0) for item in dense}


def pruned(dense: Sequence[DenseLayer], part: float) -> dict[str, Solution]:
    """The smallest weights of each layer set to zero."""
    found = solutions_of(dense)
    for name, solution in found.items():
        limit = np.quantile(np.abs(solution.weight), part)
        found[name] = replace(
            solution, weight=np.where(np.abs(solution.weight) > limit, solution.weight, 0.0)
        )
    return found


def run(net: Any, data: Any, sparsity: float = 0.7, engine: Any = "openvino", **finish: Any) -> Result:
    """With the first two steps of the finish, however near the model already is, unless ``finish`` says otherwise."""
    settings = {"from_error": 0.0, "rescaling": "helps", "distillation": "never", **finish}
    recipe = validate_recipe({"sparsity": sparsity, **QUICK, "finish": settings})
    return optimize(net, data, recipe=recipe, engine=engine, baseline_int8=False, measure_latency=False)


# what stands behind a layer


def test_sees_residual_branches_and_flat_sides() -> None:
    model, dense = opened(residual_net())
    found = {item.layer.name: behind(model.graph, item.layer.places[0]) for item in dense}
    assert found == {
        "conv1": Behind(None, 0.0, 1.0),
        "conv2": Behind("clip1", 0.0),
        "conv3": Behind(None, 0.0),
        "y": Behind(),
    }


def test_sees_the_bounds_of_an_ir(tmp_path: Path) -> None:
    model = load_model(to_ir(residual_net(), tmp_path / "net.xml"))
    layers = find_layers(model.graph).layers
    found = [behind(model.graph, layer.places[0]) for layer in layers]
    assert [(item.low, item.high) for item in found] == [
        (0.0, 1.0),
        (0.0, np.inf),
        (0.0, np.inf),
        (-np.inf, np.inf),
    ]
    assert [item.skip is None for item in found] == [True, False, True, True]


def test_an_output_that_others_read_is_left_as_it_is() -> None:
    constants = {"w": normal(1, 4, 4), "b": normal(2, 4)}
    nodes = [node("Gemm", ["x", "w", "b"], "y"), node("Relu", ["y"], "z")]
    model, dense = opened(proto(nodes, constants, ["n", 4], ["y", "z"]))
    assert behind(model.graph, dense[0].layer.places[0]) == Behind()


# fits behind activations


def refitted(model: Model, dense: Sequence[DenseLayer], start: dict[str, Solution], engine: Any) -> Candidate:
    """A candidate that begins with those solutions, behind its second walk."""
    candidate = Candidate(0.3, written(model, dense, start), dict(start))
    fit_behind(
        model,
        [candidate],
        dense,
        dataset(model, images(96)),
        get_engine(engine),
        batch_size=32,
        positions=2000,
        threads=2,
        seed=0,
        progress=Silent(),
    )
    return candidate


@pytest.mark.parametrize("engine", ENGINES)
def test_fits_behind_activations_near_the_output(engine: Any) -> None:
    model, dense = opened(residual_net())
    start = pruned(dense, 0.6)
    before = written(model, dense, start)
    candidate = refitted(model, dense, start, engine)
    fresh = images(64, seed=9)
    assert lost(candidate.model, model, fresh) < 0.6 * lost(before, model, fresh)
    for name, solution in candidate.solutions.items():
        assert np.array_equal(solution.weight == 0.0, start[name].weight == 0.0)


@pytest.mark.parametrize(("widest", "left"), [(8 * 72**2, set()), (8 * 72**2 - 1, {"conv2"}), (0, None)])
def test_layers_that_are_too_wide_are_left_alone(
    widest: int, left: set[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 rows and 72 columns the second convolution is the widest: a product with H costs 8 * 72^2."""
    monkeypatch.setattr("pot_sparsity.pipeline.repair.rectify.WIDEST", widest)
    model, dense = opened(residual_net())
    start = pruned(dense, 0.6)
    candidate = refitted(model, dense, start, "openvino")
    before = written(model, dense, start)
    for item in dense:
        name = item.layer.name
        same = np.array_equal(candidate.solutions[name].weight, start[name].weight)
        assert same == (left is None or name in left)
        assert (
            np.array_equal(read_weight(candidate.model, item.layer), read_weight(before, item.layer)) == same
        )
        if same:
            assert candidate.solutions[name] is start[name]


# scales and biases


def test_suffix_reads_what_stands_beside() -> None:
    graph = OnnxModel(residual_net()).graph
    part = suffix(graph, "conv2", graph.outputs)
    assert part.beside == ("clip1",)
    assert part.outputs == graph.outputs
    assert suffix(graph, "y", graph.outputs).beside == ()


@pytest.mark.parametrize("engine", ENGINES)
def test_recovers_scales_and_biases(engine: Any) -> None:
    model, dense = opened(residual_net())
    random = np.random.default_rng(4)
    exact = solutions_of(dense)
    solutions = {
        name: replace(
            solution,
            weight=solution.weight * (1 + 0.1 * random.normal(size=solution.weight.shape[:2]))[..., None],
            biases=tuple(
                None if b is None else b + 0.05 * random.normal(size=b.shape) for b in solution.biases
            ),
        )
        for name, solution in exact.items()
    }
    found = tunables(model.graph, dense, 1e12)
    measurement = Measurement(model, dataset(model, images(64)), 64, 32, get_engine(engine), 0)
    current = written(model, dense, solutions)
    fresh = images(64, seed=9)
    first = lost(current, model, fresh)
    for _ in range(3):
        equations, units = measurement.equations(current, found, Silent())
        solutions = rescaled(solutions, found, equations.step(1e-4), units)
        current = written(model, dense, solutions)
    assert lost(current, model, fresh) < 0.02 * first


def test_takes_the_last_layers_first_when_the_budget_is_short() -> None:
    model, dense = opened(residual_net())
    assert [item.layer.name for item in tunables(model.graph, dense, 1e12)] == [
        "conv1",
        "conv2",
        "conv3",
        "y",
    ]
    assert [item.layer.name for item in tunables(model.graph, dense, 0.0)] == ["y"]
    some = tunables(model.graph, dense, 5000.0)
    assert [item.layer.name for item in some] == ["conv3", "y"]
    assert (some[0].scales, some[0].shifts) == (slice(0, 8), slice(8, 16))
    assert some[1].first == 16


def test_outputs_that_do_not_run_over_samples_do_not_count() -> None:
    constants = {"w": normal(1, 4, 200), "b": normal(2, 200)}
    nodes = [node("Gemm", ["x", "w", "b"], "y"), node("ReduceSum", ["y"], "z", keepdims=0)]
    model, dense = opened(proto(nodes, constants, ["n", 4], ["y", "z"]))
    measurement = Measurement(model, dataset(model, normal(3, 8, 4)), 8, 4, get_engine("openvino"), 0)
    assert measurement.outputs == [0]
    equations, units = measurement.equations(model, tunables(model.graph, dense, 0.0), Silent())
    assert units.shape == (400,)
    assert OUTPUTS < 200
    np.testing.assert_allclose(equations.step(0.1), 0.0, atol=1e-6)


# in a run


def zeros(source: Any) -> dict[str, int]:
    model = load_model(source)
    return {
        layer.name: int((read_weight(model, layer) == 0.0).sum()) for layer in find_layers(model.graph).layers
    }


@pytest.mark.parametrize(
    ("form", "engine"), [("onnx", "openvino"), ("onnx", "onnxruntime"), ("openvino", "openvino")]
)
def test_never_worse_on_held_out_samples(form: str, engine: Any, tmp_path: Path) -> None:
    net: Any = residual_net() if form == "onnx" else to_ir(residual_net(), tmp_path / "net.xml")
    data = images(120)
    with_it = run(net, data, engine=engine, slack=[0.3, 0.6], sweeps=2, samples=64)
    without = run(net, data, engine=engine, activations="never", rescaling="never")
    stages = {stage.name: stage for stage in with_it.report.stages}
    assert stages["finish"].metrics_after["sqnr"] >= stages["finish"].metrics_before["sqnr"]
    assert "finish" not in {stage.name for stage in without.report.stages}
    decided = [
        d for d in with_it.report.decisions if d.what.startswith(("refit behind", "scales and biases"))
    ]
    assert len(decided) >= 3
    assert any(decision.kept for decision in decided)
    for decision in decided:
        assert decision.before is not None
        assert decision.after is not None
        assert (decision.after < decision.before) == decision.kept
    assert zeros(with_it.model) == zeros(without.model)


def test_starts_where_the_output_is_far_enough_off() -> None:
    data = images(80)

    def finished(**finish: Any) -> list[Decision]:
        report = run(residual_net(), data, slack=[0.3], **{"rescaling": "never", **finish}).report
        decided = [d for d in report.decisions if d.what.startswith(("refit behind", "scales and biases"))]
        assert ("finish" in {stage.name for stage in report.stages}) == bool(decided)
        return decided

    distance = finished(from_error=0.0)[0].before
    assert distance is not None
    assert distance > 0.0
    assert len(finished(from_error=distance)) == 1
    assert not finished(from_error=1.001 * distance)
    assert not finished(from_error=1.001 * distance, rescaling="helps", samples=16)
    assert not finished(from_error=0.0, activations="never")
    (forced,) = finished(from_error=1e9, activations="always")
    assert forced.kept
    assert forced.before == distance
    assert len(finished(from_error=1e9, activations="never", rescaling="always", samples=16)) == 1


def test_the_same_twice() -> None:
    one, two = (run(residual_net(), images(80), samples=32) for _ in range(2))
    x = images(16, seed=5)
    assert np.array_equal(run_onnx(one.model, x), run_onnx(two.model, x))


@pytest.mark.parametrize(
    ("net", "data"),
    [
        (conv_net(), images(48)),
        (conv_net(4), images(48)),
        (plain_net(), images(48)),
        (shared_net(), normal(1, 48, 7)),
        (transposed(), images(48)),
        (one_dimension(), normal(2, 48, 3, 12)),
        (two_inputs(), {"x": normal(3, 48, 6), "z": normal(4, 48, 4)}),
    ],
    ids=["residual", "fixed batch", "plain", "shared", "transposed", "1-D", "two inputs"],
)
def test_takes_any_network(net: onnx.ModelProto, data: Any) -> None:
    report = run(net, data, samples=24).report
    assert report.sparsity_reached == pytest.approx(0.7, abs=0.02)
    assert any(decision.what.startswith("scales and biases") for decision in report.decisions)
    assert not report.warnings


def test_always_is_kept_whatever_the_output_says() -> None:
    finish: dict[str, Any] = {"activations": "always", "rescaling": "always", "slack": [0.3], "samples": 16}
    report = run(residual_net(), images(60), **finish).report
    decided = [d for d in report.decisions if d.what.startswith(("refit behind", "scales and biases"))]
    assert len(decided) == 2
    assert all(decision.kept for decision in decided)


def test_says_when_outputs_cannot_be_used() -> None:
    net = plain_net()
    last = node("ReduceSum", ["y"], "total", keepdims=0)
    net.graph.node.append(last)
    del net.graph.output[:]
    net.graph.output.append(onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, None))
    report = run(onnx.shape_inference.infer_shapes(net), images(40)).report
    assert any("no output runs over the samples" in text for text in report.warnings)


@pytest.mark.parametrize("value", [[-0.1], [1.5], []])
def test_refuses_an_illegal_slack(value: list[float]) -> None:
    with pytest.raises(RecipeError, match=r"finish\.slack"):
        validate_recipe({"finish": {"slack": value}})


# resuming


class Stop(Silent):
    """Interrupts the run where a step starts."""

    def __init__(self, step: str) -> None:
        self._step = step

    def start(self, step: str, total: int | None) -> None:
        if step == self._step:
            raise KeyboardInterrupt


def kept(folder: Path, net: onnx.ModelProto, **named: Any) -> Result:
    finish = {
        "from_error": 0.0,
        "rescaling": "helps",
        "slack": [0.3, 0.6],
        "sweeps": 2,
        "samples": 24,
        "distillation": "never",
    }
    others = {"allocation": {"method": "lamp"}, "pruning": {"method": "magnitude_refit"}}
    recipe = validate_recipe({"sparsity": 0.7, **QUICK, **others, "finish": finish})
    return optimize(
        net,
        images(60),
        recipe=recipe,
        output=folder,
        baseline_int8=False,
        measure_latency=False,
        **named,
    )


@pytest.mark.parametrize("done", ["", "fit_behind", "both"])
def test_a_run_that_is_resumed_keeps_what_the_finish_has_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    """Killed before the finish, between its two steps, and behind both."""
    whole = kept(tmp_path / "whole", residual_net())
    killed = tmp_path / "killed"

    def stop(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    steps = {"": "Fitting layers behind their activations", "fit_behind": "Measuring scales and biases"}
    with monkeypatch.context() as patch:
        if done == "both":
            patch.setattr(Delivery, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            kept(killed, residual_net(), progress=Stop(steps.get(done, "")))

    calls: list[str] = []

    def counted(name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            calls.append(name)
            return genuine(*args, **named)

        return call

    monkeypatch.setattr(pipeline_finish, "fit_behind", counted("fit_behind", fit_behind))
    monkeypatch.setattr(Measurement, "equations", counted("equations", Measurement.equations))
    resumed = kept(killed, residual_net(), resume=True)
    expected = {"": {"fit_behind", "equations"}, "fit_behind": {"equations"}, "both": set()}
    assert set(calls) == expected[done]
    assert (killed / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert resumed.report.decisions == whole.report.decisions
    assert zeros(resumed.model) == zeros(whole.model)
