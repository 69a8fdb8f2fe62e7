"""Distillation: steps against a float64 oracle, what is written back, what stays zero, and its place in a run."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper
from openvino import opset13 as ops

from pot_sparsity import engines
from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.engines import get_engine
from pot_sparsity.engines.jax_engine import NotDifferentiable
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.weights import read_bias, read_weight
from pot_sparsity.pipeline import Result, optimize, repair
from pot_sparsity.pipeline.delivery import Delivery
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.repair import distillation
from pot_sparsity.pipeline.repair.distillation import Plan, distilled, plan, trainable
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, read_dense
from pot_sparsity.recipe import validate_recipe
from pot_sparsity.report.schema import Decision
from tests.pipeline.nets import (
    QUICK,
    conv_net,
    dataset,
    images,
    node,
    normal,
    plain_net,
    proto,
    run_onnx,
    run_openvino,
    shared_net,
    to_ir,
)

RATE = 0.01
WHAT = "distilled from the dense network's output"


@dataclass(frozen=True)
class Pruned:
    """A dense model, its layers, and what crude pruning leaves of them."""

    dense_model: Model
    dense: list[DenseLayer]
    solutions: dict[str, Solution]

    @classmethod
    def of(cls, source: Any, part: float) -> Pruned:
        """The smallest weights of each layer set to zero."""
        model = OnnxModel(source) if isinstance(source, onnx.ModelProto) else load_model(source)
        dense = read_dense(model, find_layers(model.graph).layers)
        solutions = {}
        for item in dense:
            limit = np.quantile(np.abs(item.weight), part)
            weight = np.where(np.abs(item.weight) > limit, item.weight, 0.0)
            solutions[item.layer.name] = Solution(weight, item.biases, 0.0, 0.0)
        return cls(model, dense, solutions)

    def written(self, solutions: dict[str, Solution]) -> Model:
        result = self.dense_model.copy()
        for item in self.dense:
            apply(result, item.layer, solutions[item.layer.name])
        return result

    def trained(self, samples: AnyArray, how_long: Plan, **named: Any) -> dict[str, Solution]:
        model = self.written(self.solutions)
        settings: dict[str, Any] = {
            "rate": RATE,
            "vary": False,
            "seed": 0,
            "threads": 2,
            "progress": Silent(),
            **named,
        }
        layers = settings.pop("layers", None) or trainable(
            self.dense, model, self.solutions, plenty(self.dense)
        )
        return distilled(
            self.dense_model,
            model,
            self.solutions,
            layers,
            dataset(self.dense_model, samples),
            get_engine(settings.pop("engine", "openvino")),
            how_long,
            **settings,
        )


def plenty(dense: list[DenseLayer]) -> dict[str, float]:
    """Every layer has seen just enough inputs."""
    return {item.layer.name: 4 * item.layer.cols for item in dense}


def output(model: Model, x: AnyArray, engine: Any = "openvino") -> Float64:
    run = get_engine(engine).compile(model.extract())
    return np.asarray(run.run({run.inputs[0]: x})[run.outputs[0]], dtype=np.float64)


def lost(model: Model, dense: Model, x: AnyArray) -> float:
    """Relative output error."""
    wanted = output(dense, x)
    return float(((output(model, x) - wanted) ** 2).sum() / (wanted**2).sum())


# what training does


@pytest.mark.parametrize(
    ("form", "engine"),
    [("onnx", "onnxruntime"), ("openvino", "openvino"), ("half", "openvino"), ("fixed", "openvino")],
)
def test_training_brings_the_output_back_and_keeps_the_zeros(form: str, engine: Any, tmp_path: Path) -> None:
    """Convolutions, BatchNorm, a residual, a depthwise layer, a pool and a head."""
    net: Any = conv_net(4 if form == "fixed" else "n")
    if form in ("openvino", "half"):
        net = to_ir(net, tmp_path / "net.xml", half=form == "half")
    pruned = Pruned.of(net, 0.6)
    samples = images(32)
    how_long = Plan(60, 4 if form == "fixed" else 8)
    found = pruned.trained(samples, how_long, engine=engine)
    model = pruned.written(found)
    before = lost(pruned.written(pruned.solutions), pruned.dense_model, samples)
    assert lost(model, pruned.dense_model, samples) < 0.1 * before
    for item in pruned.dense:
        solution, start = found[item.layer.name], pruned.solutions[item.layer.name]
        zeros = start.weight == 0.0
        assert zeros.mean() == pytest.approx(0.6, abs=0.01)
        assert not solution.weight[zeros].any()
        assert (solution.weight[~zeros] != start.weight[~zeros]).mean() > 0.7  # the others never see a slope
        stored = read_weight(model, item.layer)
        np.testing.assert_array_equal(stored, solution.weight)
        assert len(solution.biases) == len(start.biases)
        for place, bias, old in zip(item.layer.places, solution.biases, start.biases, strict=True):
            assert (bias is None) == (old is None)
            if bias is not None and old is not None:
                assert (bias != old).any()
                np.testing.assert_array_equal(read_bias(model, item.layer, place), bias)


def test_training_brings_back_what_80_percent_took() -> None:
    pruned = Pruned.of(plain_net(), 0.8)
    samples = images(32)
    before, after = (pruned.written(s) for s in (pruned.solutions, pruned.trained(samples, Plan(60, 8))))
    assert lost(after, pruned.dense_model, samples) < 0.5 * lost(before, pruned.dense_model, samples)


def test_training_a_perceptron_carries_over_to_new_samples() -> None:
    """One of its matrices is used twice."""
    pruned = Pruned.of(shared_net(), 0.5)
    found = pruned.trained(normal(1, 256, 7), Plan(30, 32), vary=True)
    before, after = (pruned.written(solutions) for solutions in (pruned.solutions, found))
    fresh = normal(2, 200, 7)
    assert lost(after, pruned.dense_model, fresh) < 0.5 * lost(before, pruned.dense_model, fresh)
    assert all(
        (found[name].weight == 0).sum() == (s.weight == 0).sum() for name, s in pruned.solutions.items()
    )


def test_the_seed_decides_the_result_bit_by_bit() -> None:
    pruned = Pruned.of(plain_net(), 0.8)
    first, again, other = (
        pruned.trained(images(24), Plan(2, 8), vary=True, seed=which) for which in (7, 7, 8)
    )
    for name, solution in first.items():
        np.testing.assert_array_equal(solution.weight, again[name].weight)
        for one, two in zip(solution.biases, again[name].biases, strict=True):
            assert one is not None
            assert two is not None
            np.testing.assert_array_equal(one, two)
        assert not np.array_equal(solution.weight, other[name].weight)


def test_layers_on_a_grid_stay_as_they_are() -> None:
    pruned = Pruned.of(plain_net(), 0.8)
    name = pruned.dense[0].layer.name
    grid = np.full(pruned.solutions[name].weight.shape[:2], 0.1)
    pruned.solutions[name] = replace(pruned.solutions[name], scale=grid)
    model = pruned.written(pruned.solutions)
    layers = trainable(pruned.dense, model, pruned.solutions, plenty(pruned.dense))
    assert layers == [pruned.dense[1].layer]
    found = pruned.trained(images(24), Plan(2, 8))
    assert found[name] is pruned.solutions[name]
    other = pruned.dense[1].layer.name
    assert not np.array_equal(found[other].weight, pruned.solutions[other].weight)


def test_layers_that_have_seen_too_little_stay_as_they_are() -> None:
    pruned = Pruned.of(plain_net(), 0.8)
    first, second = (item.layer for item in pruned.dense)
    seen = plenty(pruned.dense) | {first.name: 4 * first.cols - 1}
    assert trainable(pruned.dense, pruned.dense_model, pruned.solutions, seen) == [second]


def test_integers_behind_a_scale_are_not_trained() -> None:
    random = np.random.default_rng(3)
    constants: dict[str, AnyArray] = {
        "w": random.integers(-90, 90, (6, 5)).astype(np.int8),
        "scale": np.array(0.01, np.float32),
        "zero": np.array(0, np.int8),
        "v": normal(2, 5, 3),
    }
    nodes = [
        node("DequantizeLinear", ["w", "scale", "zero"], "real"),
        node("MatMul", ["x", "real"], "a"),
        node("Relu", ["a"], "r"),
        node("MatMul", ["r", "v"], "y"),
    ]
    pruned = Pruned.of(proto(nodes, constants, ["n", 6]), 0.5)
    assert [item.layer.name for item in pruned.dense] == ["a", "y"]
    layers = trainable(pruned.dense, pruned.dense_model, pruned.solutions, plenty(pruned.dense))
    assert [layer.name for layer in layers] == ["y"]


# against an oracle


@dataclass(frozen=True)
class Linear:
    """A linear layer ``y = x W^T + b`` in one of the forms that a model may hold it in."""

    form: str
    weight: AnyArray
    bias: AnyArray

    def model(self) -> onnx.ModelProto:
        w, b = self.weight, self.bias
        constants: dict[str, AnyArray]
        match self.form:
            case "gemm":
                constants = {"w": 2 * w, "b": -4 * b}
                nodes = [node("Gemm", ["x", "w", "b"], "y", transB=1, alpha=0.5, beta=-0.25)]
            case "negative":
                constants = {"w": -w.T, "b": b}
                nodes = [node("Gemm", ["x", "w", "b"], "y", alpha=-1.0)]
            case "subtracted":
                constants = {"w": w.T, "b": -b}
                nodes = [node("MatMul", ["x", "w"], "m"), node("Sub", ["m", "b"], "y")]
            case "transposed":
                constants = {"w": w, "b": b}
                nodes = [
                    node("Transpose", ["w"], "t", perm=[1, 0]),
                    node("MatMul", ["x", "t"], "m"),
                    node("Add", ["b", "m"], "y"),
                ]
            case "convolution":
                constants = {"w": w[:, :, None, None], "b": b}
                nodes = [
                    node("Unsqueeze", ["x", "axes"], "u"),
                    node("Conv", ["u", "w", "b"], "c"),
                    node("Flatten", ["c"], "y"),
                ]
                constants["axes"] = np.array([2, 3], np.int64)
            case _:
                constants = {"w": w.T.astype(np.float16), "b": b}
                nodes = [
                    node("Cast", ["w"], "wide", to=TensorProto.FLOAT),
                    node("Gemm", ["x", "wide", "b"], "y"),
                ]
        return proto(nodes, constants, ["n", w.shape[1]])


@dataclass
class Adam:
    """Adam on one array, each entry in its unit, in float64."""

    value: Float64
    unit: Float64

    def __post_init__(self) -> None:
        self.mean, self.power = np.zeros_like(self.value), np.zeros_like(self.value)

    def step(self, slope: Float64, rate: float, count: int) -> None:
        self.mean = 0.9 * self.mean + 0.1 * slope
        self.power = 0.999 * self.power + 0.001 * slope**2
        direction = self.mean / (1 - 0.9**count) / (np.sqrt(self.power / (1 - 0.999**count)) + 1e-30)
        self.value = self.value - rate * self.unit * direction


def units(weight: Float64) -> tuple[Float64, Float64]:
    """Of the weights and of the biases, row by row as the text says."""
    kept = [row[row != 0] for row in weight]
    all_kept = np.concatenate(kept)
    root_of_layer = np.sqrt((all_kept**2).mean())
    mean_energy = np.mean([(row**2).sum() for row in weight])
    entries, shifts = np.zeros_like(weight), np.zeros(len(weight))
    for index, row in enumerate(kept):
        root = np.sqrt((row**2).mean()) if len(row) else 0.0
        entries[index] = np.where(weight[index] != 0, max(root, 0.1 * root_of_layer), 0.0)
        shifts[index] = np.sqrt(max((row**2).sum(), 0.01 * mean_energy))
    return entries, shifts


def share(done: int, total: int) -> float:
    return min(1.0, done / 20) * (1 + math.cos(math.pi * done / (total + 1))) / 2


@pytest.mark.parametrize("steps", [1, 25])
@pytest.mark.parametrize("form", ["gemm", "negative", "subtracted", "transposed", "convolution", "half"])
def test_steps_are_those_of_adam_in_the_channels_units(form: str, steps: int) -> None:
    """One channel has no weights left and one has tiny ones: both move by a tenth of what others do."""
    weight, bias, x = normal(1, 6, 5), normal(2, 6, scale=0.5), normal(3, 12, 5)
    weight = weight.astype(np.float16).astype(np.float32)
    weight[4] *= 2.0**-8
    pruned = Pruned.of(Linear(form, weight, bias).model(), 0.0)
    (name,) = pruned.solutions
    start = weight.astype(np.float64)
    start[::2, 1] = start[1::2, 3] = 0.0
    start[3] = 0.0
    pruned.solutions[name] = replace(pruned.solutions[name], weight=start[None])
    found = pruned.trained(x, Plan(steps, 12))[name]

    wanted = x.astype(np.float64) @ weight.T + bias
    entry_units, shift_units = units(start)
    weights, biases = Adam(start, entry_units), Adam(bias.astype(np.float64), shift_units)
    for count in range(1, steps + 1):
        error = x @ weights.value.T + biases.value - wanted
        slope = 2 * error / (wanted**2).sum()
        rate = RATE * share(count, steps)
        weights.step(slope.T @ x, rate, count)
        biases.step(slope.sum(axis=0), rate, count)

    moved = np.abs(weights.value - start)
    assert (moved[start != 0] > 0).all()
    loose = 1e-3 if form == "half" else 1e-5
    np.testing.assert_allclose(found.weight[0], weights.value, rtol=loose, atol=loose * moved.max())
    assert np.array_equal(found.weight[0] == 0.0, start == 0.0)
    (shifted,) = found.biases
    assert shifted is not None
    np.testing.assert_allclose(shifted[0], biases.value, rtol=1e-5, atol=1e-5)
    model = pruned.written({name: found})
    for engine in ("openvino", "onnxruntime"):
        computed = output(model, x, engine)
        np.testing.assert_allclose(computed, x @ found.weight[0].T + shifted[0], rtol=1e-4, atol=1e-5)


def two_outputs(scale: float) -> onnx.ModelProto:
    """The second output is that multiple of a layer's."""
    constants = {"w": normal(1, 6, 4), "v": normal(2, 6, 4), "scale": np.array(scale, np.float32)}
    nodes = [
        node("MatMul", ["x", "w"], "y"),
        node("MatMul", ["x", "v"], "b"),
        node("Mul", ["b", "scale"], "z"),
    ]
    return proto(nodes, constants, ["n", 6], ["y", "z"])


def test_every_output_counts_in_units_of_its_own_energy() -> None:
    results = []
    for scale in (1.0, 1024.0):
        pruned = Pruned.of(two_outputs(scale), 0.6)
        results.append(pruned.trained(normal(3, 32, 6), Plan(5, 8)))
    for name, solution in results[0].items():
        assert (results[1][name].weight != 0).any()
        np.testing.assert_allclose(results[1][name].weight, solution.weight, rtol=1e-4, atol=1e-6)


def test_an_output_that_is_zero_throughout_does_not_count() -> None:
    """What the sparse model says there has no energy to be compared with."""
    weight, x = -np.abs(normal(1, 6, 4)), np.abs(normal(2, 32, 6))
    nodes = [node("MatMul", ["x", "w"], "y"), node("Relu", ["y"], "z")]
    found = []
    for outputs in (["y"], ["y", "z"]):
        pruned = Pruned.of(proto(nodes[: len(outputs)], {"w": weight}, ["n", 6], outputs), 0.5)
        assert (pruned.solutions["y"].weight != 0).any()
        pruned.solutions["y"] = replace(pruned.solutions["y"], weight=-pruned.solutions["y"].weight)
        assert (output(pruned.written(pruned.solutions), x) > 0).any()
        found.append(pruned.trained(x, Plan(20, 8))["y"].weight)
        assert (found[-1] != pruned.solutions["y"].weight).any()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_slopes_that_are_next_to_nothing_move_next_to_nothing() -> None:
    """Squares of such slopes are zero in float32."""
    constants = {"w": normal(1, 6, 4), "v": normal(2, 6, 4), "tiny": np.array(1e-18, np.float32)}
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("MatMul", ["x", "v"], "b"),
        node("Mul", ["b", "tiny"], "c"),
        node("Add", ["a", "c"], "y"),
    ]
    pruned = Pruned.of(proto(nodes, constants, ["n", 6]), 0.5)
    found = pruned.trained(normal(3, 32, 6), Plan(5, 8))
    moved = {name: np.abs(found[name].weight - s.weight).max() for name, s in pruned.solutions.items()}
    assert moved["a"] > 0.01
    assert moved["b"] < 0.01 * moved["a"]


def test_steps_without_measure_are_refused() -> None:
    pruned = Pruned.of(plain_net(), 0.5)
    with pytest.raises(ModelError, match=r"a smaller step is needed \(finish\.rate\): .*not finite"):
        pruned.trained(images(24), Plan(3, 8), rate=1e30)


def test_whole_numbers_and_two_kinds_of_input() -> None:
    constants = {"table": normal(1, 11, 6), "w": normal(2, 6, 5), "v": normal(4, 3, 5), "u": normal(5, 5, 2)}
    nodes = [
        node("Gather", ["table", "tokens"], "e"),
        node("ReduceMean", ["e"], "mean", axes=[1], keepdims=0),
        node("MatMul", ["mean", "w"], "a"),
        node("MatMul", ["x", "v"], "b"),
        node("Add", ["a", "b"], "sum"),
        node("Relu", ["sum"], "r"),
        node("MatMul", ["r", "u"], "y"),
    ]
    net = proto(nodes, constants, ["n", 3])
    net.graph.input.append(helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", 4]))
    data = {"x": normal(6, 300, 3), "tokens": np.random.default_rng(0).integers(0, 11, (300, 4))}
    (decision,) = decided(run(net, data, distillation="helps", epochs=20, rate=0.03))
    assert decision.kept


@pytest.mark.parametrize("kind", ["perceptron", "convolution"])
def test_networks_in_half_precision(kind: str) -> None:
    """Inputs, weights and activations are all float16."""
    net = plain_net() if kind == "convolution" else shared_net()
    for tensor in net.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for value in (*net.graph.input, *net.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del net.graph.value_info[:]
    pruned = Pruned.of(onnx.shape_inference.infer_shapes(net), 0.7)
    data = (images(32) if kind == "convolution" else normal(1, 32, 7)).astype(np.float16)
    found = pruned.trained(data, Plan(20, 8), vary=True)
    before, after = (pruned.written(s) for s in (pruned.solutions, found))
    assert lost(after, pruned.dense_model, data) < 0.9 * lost(before, pruned.dense_model, data)
    for item in pruned.dense:
        np.testing.assert_array_equal(read_weight(after, item.layer), found[item.layer.name].weight)


# how long it goes on

#: Of one sample through ``shared_net``: floating-point operations of its layers, and elements of its activations.
FLOPS = 2 * (7 * 6 + 2 * 6 * 6 + 6 * 4)
ELEMENTS = 6 * 6 + 4


#: What an epoch of ten samples costs: four passes, and the memory that each element of an activation waits for.
EPOCH = 10 * (4 * FLOPS + 300 * ELEMENTS)


@pytest.mark.parametrize(("budget", "epochs"), [(1e12, 30), (EPOCH * 5.5, 5), (EPOCH * 0.99, 0), (0.0, 0)])
def test_a_budget_pays_for_so_many_epochs(budget: float, epochs: int) -> None:
    pruned = Pruned.of(shared_net(), 0.0)
    assert plan(pruned.dense_model, pruned.dense, 10, 30, budget) == Plan(epochs, 64)


@pytest.mark.parametrize(("memory", "batch"), [(2**28, 64), (20 * ELEMENTS, 20), (ELEMENTS, 1), (1, 1)])
def test_steps_fit_into_memory(memory: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "ACTIVATIONS", memory)
    pruned = Pruned.of(shared_net(), 0.0)
    assert plan(pruned.dense_model, pruned.dense, 10, 3, 1e12).batch == batch
    fixed = Pruned.of(conv_net(4), 0.0)
    assert plan(fixed.dense_model, fixed.dense, 10, 3, 1e12).batch == 4


# in a run


def run(net: Any, data: Any, sparsity: float = 0.7, **finish: Any) -> Result:
    settings = {"distill_from": 0.0, "activations": "never", **finish}
    others = {"allocation": {"method": "magnitude"}, "correction": {"differential": "never"}}
    recipe = validate_recipe({"sparsity": sparsity, **QUICK, **others, "finish": settings})
    return optimize(net, data, recipe=recipe, baseline_int8=False, measure_latency=False)


def decided(result: Result) -> list[Decision]:
    return [decision for decision in result.report.decisions if decision.what == WHAT]


def weights(source: Any) -> list[Float64]:
    model = OnnxModel(source)
    return [read_weight(model, layer) for layer in find_layers(model.graph).layers]


def test_it_is_kept_where_it_helps() -> None:
    data = normal(1, 200, 7)
    without = run(shared_net(), data, distillation="never")
    assert not decided(without)
    assert "finish" not in {stage.name for stage in without.report.stages}

    helped = run(shared_net(), data, distillation="helps", epochs=40, rate=0.03)
    (decision,) = decided(helped)
    assert decision.kept
    assert decision.before is not None
    assert decision.after is not None
    assert decision.after < 0.85 * decision.before
    assert decision.measure == "relative output error on held-out samples"
    (stage,) = (stage for stage in helped.report.stages if stage.name == "finish")
    assert stage.metrics_after["sqnr"] > stage.metrics_before["sqnr"]
    for one, two in zip(weights(without.model), weights(helped.model), strict=True):
        assert np.array_equal(one == 0.0, two == 0.0)
        assert not np.array_equal(one, two)
    x = normal(2, 8, 7)
    np.testing.assert_allclose(run_openvino(helped.model, x), run_onnx(helped.model, x), atol=1e-5)

    wild = run(shared_net(), data, distillation="helps", epochs=1, rate=300.0)
    (decision,) = decided(wild)
    assert not decision.kept
    assert decision.reason == "the output moved away from the dense model's"
    assert all(map(np.array_equal, weights(wild.model), weights(without.model)))

    forced = run(shared_net(), data, distillation="always", epochs=1, rate=300.0)
    (decision,) = decided(forced)
    assert decision.kept
    assert decision.after is not None
    assert decision.before is not None
    assert decision.after > decision.before


def test_it_is_on_unless_the_recipe_says_otherwise() -> None:
    assert validate_recipe({}).finish.distillation == "helps"


def unknown() -> onnx.ModelProto:
    """Holds an operator without derivative."""
    constants = {"w": normal(1, 6, 5), "v": normal(2, 5, 3)}
    nodes = [node("MatMul", ["x", "w"], "a"), node("Asinh", ["a"], "s"), node("MatMul", ["s", "v"], "y")]
    return proto(nodes, constants, ["n", 6])


def test_networks_without_derivatives_are_left_as_they_are() -> None:
    pruned = Pruned.of(unknown(), 0.5)
    with pytest.raises(NotDifferentiable, match="Asinh"):
        pruned.trained(normal(3, 40, 6), Plan(1, 8))
    found = run(unknown(), normal(3, 40, 6), distillation="always")
    assert found.report.warnings == ["the dense network is not distilled: no derivative is known for Asinh"]
    assert not decided(found)
    assert found.report.sparsity_reached == pytest.approx(0.7, abs=0.02)


def test_constants_of_one_name_are_not_confused() -> None:
    x = ops.parameter([-1, 6], np.float32, name="x")
    weights = [ops.constant(normal(1, 6, 5), name="w"), ops.constant(normal(2, 5, 3), name="w")]
    hidden = ops.relu(ops.matmul(x, weights[0], False, False))
    net = ov.Model([ops.matmul(hidden, weights[1], False, False)], [x])
    for node_ in (x, net.get_results()[0].input_value(0).get_node()):
        node_.output(0).set_names({node_.get_friendly_name()})
    found = run(net, normal(3, 40, 6), distillation="helps")
    assert found.report.warnings == [
        "the dense network is not distilled: the model has 2 constants called 'w:0', not one"
    ]
    assert found.report.sparsity_reached == pytest.approx(0.7, abs=0.02)


def test_too_small_a_budget_is_told() -> None:
    cheap: dict[str, Any] = {"distillation": "helps", "distillation_budget": 1e-9}
    (warning,) = run(shared_net(), normal(1, 40, 7), **cheap).report.warnings
    assert warning == (
        "the dense network is not distilled: 1e-09 TFLOP are less than 3 epochs (finish.distillation_budget)"
    )
    assert not run(unknown(), normal(3, 40, 6), distillation="never").report.warnings


def test_a_machine_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    for room, name in ((repair, "distillation"), (engines, "jax_engine")):
        monkeypatch.delitem(sys.modules, f"{room.__name__}.{name}", raising=False)
        monkeypatch.delattr(room, name, raising=False)
    found = run(shared_net(), normal(1, 40, 7), distillation="helps")
    assert found.report.warnings == [
        "the dense network is not distilled: jax is not installed: pip install jax"
    ]
    assert not decided(found)
    assert found.report.sparsity_reached == pytest.approx(0.7, abs=0.02)


class Stop(Silent):
    """Interrupts the run where it would be distilled."""

    def start(self, step: str, total: int | None) -> None:
        if step == "Distilling the dense network":
            raise KeyboardInterrupt


def kept(folder: Path, **named: Any) -> Result:
    finish = {"distill_from": 0.0, "activations": "never", "epochs": 3, "distillation": "always"}
    others = {"allocation": {"method": "lamp"}, "pruning": {"method": "magnitude_refit"}}
    recipe = validate_recipe({"sparsity": 0.7, **QUICK, **others, "finish": finish})
    return optimize(
        shared_net(),
        normal(1, 40, 7),
        recipe=recipe,
        output=folder,
        baseline_int8=False,
        measure_latency=False,
        **named,
    )


@pytest.mark.parametrize("done", [False, True])
def test_a_run_that_is_resumed_is_not_distilled_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """Killed where the distillation begins, and behind it."""
    whole = kept(tmp_path / "whole")
    killed = tmp_path / "killed"

    def stop(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if done:
            patch.setattr(Delivery, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            kept(killed, progress=Silent() if done else Stop())

    calls: list[int] = []

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(len(args))
        return distilled(*args, **named)

    monkeypatch.setattr(distillation, "distilled", counted)
    resumed = kept(killed, resume=True)
    assert len(calls) == (0 if done else 1)
    assert (killed / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert resumed.report.decisions == whole.report.decisions
