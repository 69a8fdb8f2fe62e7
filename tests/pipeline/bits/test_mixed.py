"""Bits layer by layer against costs by hand, brute force and a float64 simulation of the finished network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest

from pot_sparsity.algorithms.arrays import Float64, Pattern
from pot_sparsity.algorithms.quantization.choices import BitChoice
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import RecipeError, UserError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.layers import pattern_stride
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.metrics import sample_distances
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.allocation.curves import FEWEST
from pot_sparsity.pipeline.bits import bit_levels
from pot_sparsity.pipeline.bits.bit_levels import BOPS, Measured, bit_costs, dense_bops, measure_bits
from pot_sparsity.pipeline.bits.mixed import BitModel, compress_bits, with_integers
from pot_sparsity.pipeline.compress import Surroundings
from pot_sparsity.pipeline.evaluate import distance
from pot_sparsity.pipeline.intake import Sources, load_job
from pot_sparsity.pipeline.job import Options
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import apply
from pot_sparsity.recipe import Recipe, validate_recipe
from tests.pipeline.nets import conv_net, images, labelled, node, normal, proto, shared_net, to_ir

FREE: dict[str, Any] = {"first_and_last": None}


def recipe(budget: float = 0.03, **mixed: Any) -> Recipe:
    return validate_recipe(
        {
            "budget": {BOPS: budget},
            "mixed": {"enabled": True, **mixed},
            "quantization": {"enabled": False},
            "allocation": {"samples": FEWEST},
        }
    )


def mlp() -> onnx.ModelProto:
    """Three matrices with biases and ReLUs between them."""
    constants = {
        "w1": normal(61, 12, 16, scale=0.3),
        "b1": normal(62, 16, scale=0.2),
        "w2": normal(63, 16, 16, scale=0.3),
        "b2": normal(64, 16, scale=0.2),
        "w3": normal(65, 16, 5, scale=0.4),
        "b3": normal(66, 5, scale=0.2),
    }
    nodes = [
        node("Gemm", ["x", "w1", "b1"], "h1"),
        node("Relu", ["h1"], "r1"),
        node("Gemm", ["r1", "w2", "b2"], "h2"),
        node("Relu", ["h2"], "r2"),
        node("Gemm", ["r2", "w3", "b3"], "y"),
    ]
    return proto(nodes, constants, ["n", 12])


Nets = Callable[[str, str], tuple["Surroundings", "Measured"]]
NETS = {"conv": conv_net, "mlp": mlp, "shared": shared_net}


def samples(name: str, count: int, seed: int = 0) -> Any:
    shape = {"mlp": (12,), "shared": (7,)}.get(name)
    return images(count, seed) if shape is None else normal(300 + seed, count, *shape)


def source(name: str, form: str, folder: Path) -> onnx.ModelProto | Path:
    return NETS[name]() if form == "onnx" else to_ir(NETS[name](), folder / "net.xml")


@contextmanager
def surroundings(
    name: str,
    form: str,
    folder: Path,
    settings: Recipe,
    state: RunFolder | None = None,
    engine: Literal["openvino", "onnxruntime"] = "openvino",
) -> Iterator[Surroundings]:
    with ExitStack() as stack:
        sources = Sources(
            source(name, form, folder), {"x": samples(name, 72)}, None, None, None, None, engine
        )
        options = Options("top1", None, False, False, 2, False, False)
        job = load_job(sources, settings, options, state or RunFolder(None), None)
        yield Run(job, stack).surroundings(curves=False)[0]


@pytest.fixture(scope="module")
def measured_nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nets]:
    """Networks with all choices free and measured, each made when it is first asked for."""
    known: dict[tuple[str, str], tuple[Surroundings, Measured]] = {}
    with ExitStack() as stack:

        def get(name: str, form: str) -> tuple[Surroundings, Measured]:
            if (name, form) not in known:
                folder = tmp_path_factory.mktemp(f"{name}_{form}")
                around = stack.enter_context(surroundings(name, form, folder, recipe(0.014, **FREE)))
                known[name, form] = around, measure_bits(around)
            return known[name, form]

        yield get


def run(model: Model, x: Any, engine: Literal["openvino", "onnxruntime"] = "openvino") -> Float64:
    executable = get_engine(engine, 1).compile(model.extract())
    return np.asarray(executable.run({executable.inputs[0]: x})[executable.outputs[0]], np.float64)


def test_costs_by_hand(measured_nets: Nets) -> None:
    around, _ = measured_nets("conv", "onnx")
    costs = bit_costs(around.prepared.model, around.dense, around.recipe)
    # positions x weights; output is 8 x 8, behind the depthwise layer 4 x 4
    macs = {"conv1": 64 * 8 * 27, "branch1": 64 * 64, "branch2": 64 * 64 * 9, "depthwise": 16 * 72, "y": 40}
    assert dense_bops(around.prepared.model, around.dense) == sum(macs.values()) * 1024
    for name, number in macs.items():
        found = {str(choice): cost for choice, cost in costs[name].items()}
        # Of three input channels two stay; a depthwise layer has one, so no pattern; elsewhere half.
        density = {"conv1": 2 / 3, "depthwise": None}.get(name, 0.5)
        wanted = {"8w8a": number * 64.0, "4w4a": number * 16.0}
        if density is not None:
            wanted |= {f"{key}+2:4": cost * density for key, cost in wanted.items()}
        assert found == pytest.approx(wanted)
    fixed = bit_costs(around.prepared.model, around.dense, recipe())
    assert [list(map(str, fixed[name])) for name in ("conv1", "y")] == [["8w8a"], ["8w8a"]]
    assert len(fixed["branch2"]) == 4


@pytest.mark.parametrize(("name", "form"), [("conv", "onnx"), ("conv", "openvino"), ("shared", "onnx")])
def test_distances_are_those_of_the_whole_model(name: str, form: str, measured_nets: Nets) -> None:
    around, measured = measured_nets(name, form)
    some = around.fit.subset(np.linspace(0, len(around.fit) - 1, FEWEST).astype(np.int64))
    x = np.concatenate([next(iter(batch.inputs.values())) for batch in some.batches(64)])
    dense = run(around.prepared.model, x)
    for levels in measured.layers[1:3]:
        layer = levels.item.layer
        for at, choice in enumerate(levels.choices):
            model = around.prepared.model.copy()
            apply(model, layer, levels.solutions[at])
            for place in layer.places:
                port = model.graph.node(place.node).inputs.index(place.input)
                grid = measured.ranges[place.input][choice.activation_bits]
                model.insert_quantizer(place.input, [(place.node, port)], grid)
            wanted = sample_distances(dense, run(model, x), "error").mean()
            assert levels.curve.distortion[at] == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def brute_force(measured: Measured, budget: float) -> float:
    """The least sum of distortions within a budget, over all combinations of choices."""
    best = np.inf
    for levels in itertools.product(*(range(len(item.choices)) for item in measured.layers)):
        pairs = list(zip(measured.layers, levels, strict=True))
        cost = sum(item.curve.costs[BOPS][level] for item, level in pairs)
        if cost <= budget * measured.dense_bops * (1 + 1e-12):
            best = min(best, sum(item.curve.distortion[level] for item, level in pairs))
    return float(best)


def test_choices_are_the_best_within_the_budget(measured_nets: Nets) -> None:
    _, measured = measured_nets("conv", "onnx")
    for budget in (0.0625, 0.05, 0.03, 0.02, 0.012):
        chosen = measured.chosen(budget)
        assert measured.bops(chosen) <= budget * (1 + 1e-12)
        found = sum(item.curve.distortion[chosen[item.item.layer.name]] for item in measured.layers)
        assert found == pytest.approx(brute_force(measured, budget), rel=1e-9)
    with pytest.raises(RecipeError, match="out of reach"):
        measured.chosen(0.005)


def check_layer(model: Model, layer_name: str, choice: BitChoice, weight: Float64) -> None:
    """A weight ``[groups, rows, cols]`` stands on its grid and keeps its pattern."""
    layer = next(layer for layer in find_layers(model.graph).layers if layer.name == layer_name)
    found = read_weight(model, layer)
    np.testing.assert_allclose(found, weight, rtol=1e-5)
    np.testing.assert_array_equal(found == 0.0, weight == 0.0)
    for row in found.reshape(-1, layer.cols):
        values = np.unique(row)
        assert values.size <= 2**choice.weight_bits
    if choice.pattern is not None:
        stride = pattern_stride(layer)
        by_channel = found.reshape(-1, layer.cols // stride, stride)
        for begin in range(0, by_channel.shape[1], choice.pattern.m):
            kept = (by_channel[:, begin : begin + choice.pattern.m] != 0.0).sum(axis=1)
            assert kept.max() <= choice.pattern.n


def finished(nets: Nets, name: str, form: str, budget: float) -> tuple[Surroundings, Measured, BitModel]:
    around, measured = nets(name, form)
    around.recorder.decisions.clear()
    return around, measured, compress_bits(around, measured, measured.chosen(budget), f"{budget}")


@pytest.mark.parametrize(
    ("name", "form"), [("conv", "onnx"), ("conv", "openvino"), ("mlp", "openvino"), ("shared", "onnx")]
)
def test_the_finished_model_keeps_its_grids_its_pattern_and_its_budget(
    name: str, form: str, measured_nets: Nets
) -> None:
    around, measured, built = finished(measured_nets, name, form, 0.014)
    solutions = built.compressed.solutions
    for model in (built.compressed.model, with_integers(built.compressed.model, solutions)):
        for layer_name, choice in built.choices.items():
            check_layer(model, layer_name, choice, solutions[layer_name].weight)
    for layer_name, solution in solutions.items():
        assert solution.scale is not None
        integers = solution.weight / solution.scale[..., None]
        half = 2 ** (built.choices[layer_name].weight_bits - 1)
        np.testing.assert_allclose(integers, np.rint(integers), atol=1e-6)
        assert -half - 1e-6 <= integers.min() <= integers.max() <= half - 1 + 1e-6
    total = 0.0
    for levels in measured.layers:
        at = levels.choices.index(built.choices[levels.item.layer.name])
        total += float(levels.curve.costs[BOPS][at])
    assert built.bops == pytest.approx(total / measured.dense_bops)
    assert built.bops <= 0.014
    # Nothing that was tried and kept has moved the output away.
    decisions = [d for d in around.recorder.decisions if d.what.startswith("few-bit layers")]
    assert decisions
    reached = distance(around.judge(built.compressed.model).metrics)[1]
    assert all(d.before is not None and reached <= d.before + 1e-9 for d in decisions)


def quantized(x: Float64, scale: float, zero: int, levels: int) -> Float64:
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, levels - 1) - zero) * scale, np.float64)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_the_finished_network_computes_what_float64_says(form: str, measured_nets: Nets) -> None:
    around, measured, built = finished(measured_nets, "mlp", form, 0.03)
    model = with_integers(built.compressed.model, built.compressed.solutions)
    x = samples("mlp", 40, 3)
    hidden = np.asarray(x, np.float64)
    for number, item in enumerate(around.dense):
        layer, choice = item.layer, built.choices[item.layer.name]
        grid = measured.ranges[layer.places[0].input][choice.activation_bits]
        hidden = quantized(hidden, grid.scale, grid.zero_point, grid.levels)
        solution = built.compressed.solutions[layer.name]
        assert solution.biases[0] is not None
        hidden = hidden @ solution.weight[0].T + solution.biases[0][0]
        hidden = np.maximum(hidden, 0.0) if number < 2 else hidden
    engines: tuple[Literal["openvino", "onnxruntime"], ...] = ("openvino", "onnxruntime")
    for engine in engines[: 2 if form == "onnx" else 1]:
        found = run(model, x, engine)
        # A value on the edge between two levels may go either way in float32.
        assert (np.abs(found - hidden).max(axis=1) < 1e-4).mean() > 0.9


def test_layers_are_fitted_to_the_inputs_they_really_read(measured_nets: Nets) -> None:
    """On the samples that fit, the mean of every output is the dense model's, rounded inputs and all."""
    around, _, built = finished(measured_nets, "mlp", "onnx", 0.014)
    x = np.concatenate([next(iter(batch.inputs.values())) for batch in around.fit.batches(64)])
    engine = get_engine("onnxruntime", 1)
    names = [item.layer.places[0].output for item in around.dense]
    dense, found = (
        engine.compile(model.extract(outputs=names)).run({"x": x})
        for model in (around.prepared.model, built.compressed.model)
    )
    for name in names:
        np.testing.assert_allclose(found[name].mean(axis=0), dense[name].mean(axis=0), atol=2e-3)


def test_both_engines_measure_the_same(measured_nets: Nets, tmp_path: Path) -> None:
    _, first = measured_nets("conv", "onnx")
    settings = recipe(0.014, **FREE)
    with surroundings("conv", "onnx", tmp_path, settings, engine="onnxruntime") as around:
        second = measure_bits(around)
    for one, other in zip(first.curves, second.curves, strict=True):
        np.testing.assert_allclose(one.distortion, other.distortion, rtol=0.02, atol=1e-6)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunFolder(tmp_path / "run")
    with surroundings("mlp", "onnx", tmp_path, recipe(0.04), state) as around:
        first = measure_bits(around)

        def fails(*given: object) -> None:
            raise AssertionError("measured twice")

        monkeypatch.setattr(bit_levels, "Meter", fails)
        second = measure_bits(around)
    for one, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(one.curve.distortion, other.curve.distortion)
        for a, b in zip(one.solutions, other.solutions, strict=True):
            np.testing.assert_array_equal(a.biases[0], b.biases[0])


@pytest.mark.parametrize("form", ["onnx", "openvino", "converted"])
def test_optimize_writes_one_model_with_quantizers(form: str, tmp_path: Path) -> None:
    native = conv_net()
    baseline = form == "onnx"
    int8 = {"enabled": baseline, "ranges": "minmax", "bias_correction": "fast"}
    settings = recipe(0.03).model_dump(mode="json") | {"quantization": int8}
    result = optimize(
        source("conv", "openvino" if form == "openvino" else "onnx", tmp_path),
        {"x": images(96)},
        validation=labelled(tmp_path / "val.npz", native, 64),
        recipe=settings,
        output=tmp_path / "out",
        output_format="openvino" if form == "converted" else "same",
        measure_latency=False,
        threads=2,
    )
    report = result.report
    assert [v.name for v in report.variants] == ["dense", *(["dense_int8"] if baseline else []), "mixed"]
    assert not (tmp_path / "out" / "float").exists()
    model = load_model(next(path for path in result.files if path.suffix in (".onnx", ".xml")))
    assert model.format == ("onnx" if form == "onnx" else "openvino")
    mixed = report.variants[-1]
    assert mixed.metrics["agreement"] > 70.0
    found = {layer.name: layer for layer in find_layers(model.graph).layers}
    zeros = sum(int((read_weight(model, layer) == 0.0).sum()) for layer in found.values())
    assert (mixed.zeros, report.zeros) == (zeros, zeros)
    assert all(model.graph.value(layer.constant).dtype == np.int8 for layer in found.values())
    kinds = [edit.kind for edit in report.edits]
    # Two layers read one tensor: on the same grid they share a quantizer.
    assert kinds.count("fake_quantize") in (4, 5)
    assert kinds.count("integer_weight") == 5
    whole = next(decision for decision in report.decisions if decision.what == "bits layer by layer")
    assert whole.after is not None
    assert whole.after <= 0.03
    assert [(item.kind, item.asked) for item in report.budgets] == [(BOPS, 0.03)]
    assert report.budgets[0].reached == pytest.approx(whole.after)
    assert sum(decision.what.startswith("layer ") for decision in report.decisions) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {}}, "needs a budget of bops and no other"),
        ({"budget": {"bops": 0.03, "flops": 0.5}}, "needs a budget of bops and no other"),
        ({"schedule": {"max_drop": 1.0}}, "does not watch max_drop"),
        ({"budget": {"bops": 0.001}}, "out of reach: the cheapest choices of all layers leave 0.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    settings = recipe().model_dump(mode="json") | dict(changes)
    with pytest.raises(RecipeError, match=message):
        optimize(conv_net(), {"x": images(24)}, recipe=settings, output=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section", [{"choices": ["3q"]}, {"choices": []}, {"first_and_last": "16w16a"}])
def test_choices_that_are_none_are_named(section: Mapping[str, Any]) -> None:
    with pytest.raises(RecipeError, match="mixed"):
        validate_recipe({"mixed": section})


def test_an_old_opset_is_refused() -> None:
    native = mlp()
    native.opset_import[0].version = 12
    with pytest.raises(UserError, match="opset 13"):
        optimize(native, {"x": samples("mlp", 48)}, recipe=recipe(0.04), threads=1)


def test_a_pattern_may_be_any_n_of_m(tmp_path: Path) -> None:
    settings = recipe(0.01, choices=["8w8a", "4w4a+1:4"], **FREE)
    with surroundings("mlp", "onnx", tmp_path, settings) as around:
        measured = measure_bits(around)
        built = compress_bits(around, measured, measured.chosen(0.01), "test")
        chosen = [name for name, choice in built.choices.items() if choice.pattern == Pattern.parse("1:4")]
        assert chosen
        for name in chosen:
            check_layer(
                built.compressed.model, name, built.choices[name], built.compressed.solutions[name].weight
            )
