"""The main job, end to end: what is written is what was asked for, and the report is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import numpy_helper

from pot_sparsity.algorithms.allocation import ALLOCATIONS
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.errors import AccuracyGateError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline import int8 as pipeline_int8
from pot_sparsity.pipeline.delivery import Delivery
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.quantization import quantize
from pot_sparsity.recipe import Recipe, load_recipe, validate_recipe
from pot_sparsity.report.io import read_report
from pot_sparsity.report.schema import Report
from tests.pipeline.nets import (
    QUICK,
    Array,
    conv_net,
    images,
    labelled,
    normal,
    one_dimension,
    plain_net,
    run_onnx,
    run_openvino,
    shared_net,
    to_ir,
    transposed,
    two_inputs,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def settings(sparsity: float = 0.5, **sections: Any) -> Recipe:
    """A recipe without INT8, unless it says otherwise."""
    return validate_recipe({"sparsity": sparsity, **QUICK, **sections})


def int8(samples: int) -> dict[str, Any]:
    """Quantization the one way NNCF does it by default."""
    return {"enabled": True, "samples": samples, "ranges": "default", "bias_correction": "fast"}


def quick(model: Any = None, calibration: Any = None, **named: Any) -> Result:
    """A run without what only costs time."""
    return optimize(
        conv_net() if model is None else model,
        images(48) if calibration is None else calibration,
        **{"recipe": settings(), "baseline_int8": False, "measure_latency": False, **named},
    )


def zeros_in(source: Any, names: set[str]) -> dict[str, int]:
    """Exact zeros by layer, counted on the model as it was read back."""
    model = load_model(source)
    layers = [layer for layer in find_layers(model.graph).layers if layer.name in names]
    return {layer.name: int((read_weight(model, layer) == 0.0).sum()) for layer in layers}


def assert_true(report: Report, source: Any) -> None:
    """The report's zeros are those of the file."""
    layers = [layer for layer in report.layers if layer.ignored is None]
    found = zeros_in(source, {layer.name for layer in layers})
    assert found == {layer.name: layer.zeros for layer in layers}
    assert report.zeros == sum(found.values())
    assert report.weights == sum(layer.weights for layer in layers)
    assert report.sparsity_reached == pytest.approx(report.zeros / report.weights)
    assert all(layer.zeros == layer.target_zeros for layer in layers)
    assert abs(report.zeros - report.sparsity_asked * report.weights) <= 1


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# the demo model: the whole job, INT8 included


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Result]:
    out = tmp_path_factory.mktemp("demo") / "out"
    with resources.as_file(resources.files("pot_sparsity.demo_assets")) as assets:
        yield optimize(
            assets / "digits_cnn.onnx",
            assets / "digits_calibration.npz",
            validation=assets / "digits_validation.npz",
            preprocess={"mean_values": [0.0], "scale_values": [16.0]},
            recipe=validate_recipe({"sparsity": 0.6, "quantization": {"samples": 64}}),
            output=out,
        )


def test_demo_keeps_its_accuracy(demo: Result) -> None:
    metrics = {variant.name: variant.metrics for variant in demo.report.variants}
    assert list(metrics) == ["dense", "dense_int8", "sparse", "sparse_int8"]
    assert metrics["dense"]["top1"] >= 97.0
    assert metrics["sparse"]["top1"] >= metrics["dense"]["top1"] - 1.0
    assert metrics["sparse_int8"]["top1"] >= metrics["dense"]["top1"] - 1.5


def test_demo_writes_what_the_report_says(demo: Result) -> None:
    assert demo.folder is not None
    assert files(demo.folder) == [
        "float/model.onnx",
        "model.onnx",
        "recipe.yaml",
        "report.html",
        "report.json",
        "run.log",
    ]
    report = read_report(demo.folder)
    assert report == demo.report
    assert report.status == "done"
    assert_true(report, demo.folder / "float" / "model.onnx")
    names = {layer.name for layer in report.layers}
    quantized = zeros_in(demo.folder / "model.onnx", names)
    assert all(quantized[layer.name] >= layer.zeros for layer in report.layers)
    assert load_recipe(demo.folder / "recipe.yaml").sparsity == 0.6
    assert {item.path: item.bytes for item in report.files} == {
        name: (demo.folder / name).stat().st_size for name in ("float/model.onnx", "model.onnx")
    }
    assert demo.files == (demo.folder / "model.onnx",)


def test_demo_report_is_complete(demo: Result) -> None:
    report = demo.report
    stages = {stage.name: stage for stage in report.stages}
    for name in (
        "pruning",
        "reconstruction and correction",
        "quantization",
        "validation of the sparse model",
    ):
        assert stages[name].metrics_before, name
        assert stages[name].metrics_after, name
        assert stages[name].seconds > 0
    for variant in report.variants:
        assert variant.weights == report.weights
        assert variant.latency_ms is not None
        assert variant.file_bytes is not None
        assert variant.zeros >= (report.zeros if variant.name.startswith("sparse") else 0)
        assert variant.interval["top1"][1] <= variant.interval["top1"][0] <= variant.interval["top1"][2]
    sizes = {variant.name: variant.compressed_bytes or 0 for variant in report.variants}
    assert sizes["sparse_int8"] < sizes["dense_int8"] < sizes["dense"]
    assert {edit.kind for edit in report.edits} >= {"fuse_batchnorm"}
    assert report.data.calibration == report.data.fit + report.data.held_out == 300
    assert report.data.validation == 597


def test_both_engines_agree_on_the_demo(demo: Result) -> None:
    assert demo.folder is not None
    with resources.as_file(resources.files("pot_sparsity.demo_assets")) as assets:
        x = np.load(assets / "digits_validation.npz")["images"][:100].transpose(0, 3, 1, 2) / np.float32(16)
    for name, tolerance in (("float/model.onnx", 1e-4), ("model.onnx", 0.1)):
        path = demo.folder / name
        ours, theirs = run_onnx(onnx.load(path), x), run_openvino(path, x)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(ours).max()
        assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() >= 0.99


# the same bytes, and nothing of the user's touched


def test_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    recipe = settings(quantization=int8(16))
    found = []
    for name, threads in (("a", 1), ("b", 1), ("c", 2)):
        quick(recipe=recipe, threads=threads, output=tmp_path / name)
        found.append([(tmp_path / name / file).read_bytes() for file in ("model.onnx", "float/model.onnx")])
    assert found[0] == found[1]
    assert found[0] == found[2]


def test_seed_decides_the_held_out_slice() -> None:
    first, second = (quick(recipe=settings(seed=seed)) for seed in (0, 1))
    assert first.model != second.model


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_the_users_model_is_not_changed(form: str) -> None:
    proto = conv_net()
    model = proto if form == "onnx" else ov.Core().read_model(proto.SerializeToString())
    before = proto.SerializeToString()
    x = images(4, 9)
    outputs = run_openvino(model, x)
    result = quick(model, recipe=settings(quantization=int8(8)))
    assert result.model is not model
    assert result.sparse_model is not model
    assert proto.SerializeToString() == before
    np.testing.assert_array_equal(run_openvino(model, x), outputs)


# counts


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9, 1.0])
def test_the_sparsity_asked_for_is_reached(tmp_path: Path, sparsity: float) -> None:
    result = quick(recipe=settings(sparsity), output=str(tmp_path / "out"))
    assert result.report.sparsity_asked == sparsity
    assert_true(result.report, tmp_path / "out" / "model.onnx")
    if sparsity == 0.0:
        x = images(10, 4)
        np.testing.assert_allclose(run_onnx(result.model, x), run_onnx(conv_net(), x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_every_allocation_runs(allocation: str) -> None:
    result = quick(recipe=settings(0.6, allocation={"method": allocation}))
    assert_true(result.report, result.model)


@pytest.mark.parametrize("pruning", sorted(SOLVERS))
@pytest.mark.parametrize("masks", ["kept", "solved"])
def test_every_pruning_method_runs(pruning: str, masks: str) -> None:
    recipe = settings(0.6, pruning={"method": pruning}, reconstruction={"masks": masks})
    result = quick(plain_net(), recipe=recipe)
    assert_true(result.report, result.model)


@pytest.mark.parametrize("weights", ["none", "published", "exact"])
@pytest.mark.parametrize("differential", ["always", "never"])
def test_every_correction_runs(weights: str, differential: str) -> None:
    recipe = settings(
        0.6,
        correction={"weights": weights, "differential": differential},
        reconstruction={"input": "dense"},
        pruning={"method": "magnitude"},
    )
    result = quick(plain_net(), recipe=recipe)
    assert_true(result.report, result.model)


def test_pruning_beats_magnitude_and_the_walk_does_no_harm() -> None:
    plain = settings(
        0.7,
        allocation={"method": "l2_normalized_magnitude"},
        pruning={"method": "magnitude"},
        reconstruction={"input": "dense"},
        correction={"bias": False, "differential": "never"},
        finish={"activations": "never", "rescaling": "never", "distillation": "never"},
    )
    distances = []
    for recipe in (plain, settings(0.7)):
        report = quick(calibration=images(200), validation=images(100, 5), recipe=recipe).report
        distances.append(report.variants[-1].metrics["output_mse"])
    assert distances[1] < 0.5 * distances[0]


def test_zeros_that_were_there_stay_and_are_said() -> None:
    model = conv_net()
    tensor = next(value for value in model.graph.initializer if value.name == "w3")
    array = numpy_helper.to_array(tensor).copy()
    array[:6] = 0.0
    tensor.CopyFrom(numpy_helper.from_array(array, "w3"))
    few = quick(model, recipe=settings(0.2)).report
    assert few.zeros == 6 * 72
    assert any("already has 432 zero weights, more than asked for" in text for text in few.warnings)
    more = quick(model, recipe=settings(0.6))
    assert more.report.warnings == []
    assert_true(more.report, more.model)


NETS: dict[str, tuple[Any, Any]] = {
    "two inputs": (two_inputs, {"x": normal(5, 40, 6), "z": normal(6, 40, 4)}),
    "transposed": (transposed, images(30)),
    "one dimension": (one_dimension, normal(4, 30, 3, 12)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("keep_structure", [False, True])
def test_other_networks(name: str, keep_structure: bool) -> None:
    build, samples = NETS[name]
    recipe = settings(0.5, quantization=int8(8))
    result = quick(build(), samples, recipe=recipe, keep_structure=keep_structure)
    assert_true(result.report, result.sparse_model)
    assert result.report.variants[-1].name == "sparse_int8"


@pytest.mark.parametrize(
    "sections",
    [
        {"calibration": {"holdout": 0.0}},
        {"calibration": {"max_positions": 7}},
        {"calibration": {"batch_size": 5}},
        {"correction": {"bias": False, "differential": "always"}},
        {"schedule": {"kind": "one_shot", "max_drop": 100.0}},
    ],
)
def test_other_settings(sections: dict[str, Any]) -> None:
    result = quick(recipe=settings(0.5, **sections))
    assert_true(result.report, result.model)


def test_samples_that_are_all_zero_are_survived() -> None:
    result = quick(calibration=np.zeros((20, 3, 8, 8), np.float32))
    assert_true(result.report, result.model)


def test_a_target_below_the_schedules_start() -> None:
    report = quick(recipe=settings(0.05, schedule={"kind": "cubic", "iterations": 2})).report
    assert [item.sparsity for item in report.iterations] == [0.05] * 3


def test_shared_weights_are_pruned_once() -> None:
    result = quick(shared_net(), normal(3, 60, 7))
    assert [layer.name for layer in result.report.layers] == ["m0", "m1", "y"]
    assert_true(result.report, result.model)


# structure


def test_keep_structure_changes_constants_only() -> None:
    before = conv_net()
    result = quick(before, keep_structure=True)
    assert result.report.edits == []
    assert any("keep-structure" in text for text in result.report.warnings)
    assert isinstance(result.model, onnx.ModelProto)
    after = onnx.ModelProto.FromString(result.model.SerializeToString())
    old = {value.name: numpy_helper.to_array(value) for value in before.graph.initializer}
    changed = {
        value.name
        for value in after.graph.initializer
        if not same(numpy_helper.to_array(value), old[value.name])
    }
    assert {"w1", "w2", "w3", "w4", "w5"} <= changed <= {"w1", "w2", "w3", "w4", "w5", "b1", "b5"}
    del after.graph.initializer[:], before.graph.initializer[:]
    assert after == before
    assert_true(result.report, result.model)


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


def test_edits_are_listed() -> None:
    edits = quick().report.edits
    assert [edit.node for edit in edits if edit.kind == "fuse_batchnorm"] == ["norm"]
    assert {edit.node for edit in edits if edit.kind == "add_bias"} == {"branch1", "branch2", "depthwise"}


@pytest.mark.parametrize("by", ["name", "pattern", "type", "scope"])
def test_ignored_layers_stay_dense_and_do_not_count(by: str) -> None:
    sections: dict[str, Any] = {
        "name": {"ignored_names": ["y", "conv1"]},
        "pattern": {"ignored_patterns": ["y$|conv.*"]},
        "type": {"ignored_types": ["Gemm"]},
    }
    scope = nncf.IgnoredScope(names=["y"], patterns=["conv1"]) if by == "scope" else None
    result = quick(recipe=settings(allocation=sections.get(by, {})), ignored_scope=scope)
    ignored = {layer.name for layer in result.report.layers if layer.ignored}
    assert ignored == ({"y"} if by == "type" else {"y", "conv1"})
    assert_true(result.report, result.model)
    assert isinstance(result.model, onnx.ModelProto)
    values = {value.name: numpy_helper.to_array(value) for value in result.model.graph.initializer}
    old = {value.name: numpy_helper.to_array(value) for value in conv_net().graph.initializer}
    assert np.array_equal(values["w5"], old["w5"])
    assert np.array_equal(values["w1"], old["w1"]) == (by != "type")


def test_ignored_scope_is_left_in_floating_point() -> None:
    recipe = settings(quantization=int8(8))
    result = quick(recipe=recipe, ignored_scope=nncf.IgnoredScope(names=["y"]))
    assert isinstance(result.model, onnx.ModelProto)
    producers = {name: node.op_type for node in result.model.graph.node for name in node.output}
    weights = {
        node.name: producers.get(node.input[1]) for node in result.model.graph.node if len(node.input) > 1
    }
    assert weights["y"] is None
    assert weights["conv1"] == "DequantizeLinear"


# the schedule and its limit


def watched(tmp_path: Path, max_drop: float, **sections: Any) -> dict[str, Any]:
    schedule = {"kind": "cubic", "max_drop": max_drop, "initial": 0.2, "iterations": 3}
    return {
        "recipe": settings(0.95, schedule=schedule, **sections),
        "validation": labelled(tmp_path / "validation.npz", conv_net(), 80),
    }


def test_max_drop_returns_the_last_iteration_that_respects_it(tmp_path: Path) -> None:
    full = quick(**watched(tmp_path, 100.0)).report
    drops = [item.drop for item in full.iterations]
    assert [item.accepted for item in full.iterations] == [True] * 4
    assert full.chosen_iteration == 3
    assert full.sparsity_reached == pytest.approx(0.95, abs=0.001)
    assert drops == [pytest.approx(100.0 - item.metrics["top1"]) for item in full.iterations]
    limits = [drop for drop in drops if drop is not None]
    assert limits[0] < limits[-1]
    limit = (limits[0] + limits[-1]) / 2
    last = next(index for index, drop in enumerate(limits) if drop > limit) - 1
    result = quick(**watched(tmp_path, limit))
    assert result.report.chosen_iteration == last
    assert [item.accepted for item in result.report.iterations] == [True] * (last + 1) + [False]
    assert result.report.iterations == [
        *full.iterations[: last + 1],
        full.iterations[last + 1].model_copy(update={"accepted": False}),
    ]
    assert result.report.sparsity_asked == result.report.iterations[last].sparsity
    assert_true(result.report, result.model)


def test_no_iteration_respects_the_limit(tmp_path: Path) -> None:
    named = watched(tmp_path, 0.0)
    out = tmp_path / "out"
    schedule = {"kind": "cubic", "max_drop": 0.0, "initial": 0.97, "iterations": 1}
    named["recipe"] = settings(0.98, schedule=schedule)
    with pytest.raises(
        AccuracyGateError, match=r"no iteration keeps top1 within 0.0 points .*closest: "
    ) as caught:
        quick(output=out, **named)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert files(out) == ["recipe.yaml", "report.html", "report.json", "run.log"]
    report = read_report(out)
    assert report.status == "gate_not_met"
    assert report.chosen_iteration is None
    assert [item.accepted for item in report.iterations] == [False]


def test_int8_that_drops_too_far_falls_back_to_an_earlier_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT8 of the sparser model is made bad: the iteration before it is delivered."""
    seen: list[float] = []
    genuine = quantize

    def spoiled(model: Any, *args: Any, **named: Any) -> Any:
        result = genuine(model, *args, **named)
        zeros = zeros_in(model.native, {"branch2"})["branch2"]
        seen.append(zeros)
        if zeros > 300:
            layer = next(layer for layer in find_layers(model.graph).layers if layer.name == "y")
            result = model.copy()
            result.set_constant(layer.constant, -result.graph.value(layer.constant))
        return result

    monkeypatch.setattr(pipeline_int8, "quantize", spoiled)
    monkeypatch.setitem(optimize.__globals__, "lost_zeros", lambda *models: {})
    schedule = {"kind": "cubic", "max_drop": 60.0, "initial": 0.1, "iterations": 1}
    recipe = settings(0.6, schedule=schedule, quantization=int8(8))
    report = quick(recipe=recipe, validation=labelled(tmp_path / "v.npz", conv_net(), 60)).report
    assert len(seen) == 2
    assert report.chosen_iteration == 0
    assert [item.accepted for item in report.iterations] == [True, True]
    (decision,) = [item for item in report.decisions if item.what == "iteration 1"]
    assert not decision.kept
    assert decision.after is not None
    assert decision.after > 60.0


def test_the_recipe_of_the_paper(tmp_path: Path) -> None:
    recipe = load_recipe(
        "pot", ["schedule.iterations=2", "quantization.samples=8", "quantization.ranges=default"]
    )
    report = quick(recipe=recipe, output=tmp_path / "out").report
    assert [item.sparsity for item in report.iterations] == pytest.approx([0.1, 0.45, 0.5])
    assert report.chosen_iteration == 2
    assert_true(report, tmp_path / "out" / "float" / "model.onnx")


# resuming


class Stop(Silent):
    """Interrupts the run after some units of one step; 0 units are all that there are."""

    def __init__(self, step: str, units: int) -> None:
        self._step, self._units, self._current = step, units, ""

    def start(self, step: str, total: int | None) -> None:
        self._current = step
        if step == self._step and self._units == 0:
            self._units = total or 1

    def advance(self, units: int = 1) -> None:
        if self._current == self._step:
            self._units -= units
            if self._units <= 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("step", "units"), [("Collecting moments", 1), ("Pruning layers", 2), ("Fitting layers in sequence", 2)]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, step: str, units: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    quick(output=whole, threads=2)
    with pytest.raises(KeyboardInterrupt):
        quick(output=killed, threads=2, progress=Stop(step, units))
    if step == "Collecting moments":
        assert not killed.exists()
    else:
        assert all(name.startswith("state/") or name == "run.log" for name in files(killed))
        assert len(files(killed)) > 3
    report = quick(output=killed, threads=1, resume=True).report
    assert files(killed) == files(whole)
    assert (killed / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert_true(report, killed / "model.onnx")


def test_a_resumed_run_computes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def killed(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Delivery, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            quick(output=out, threads=1)

    def never(*args: object, **named: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("pot_sparsity.pipeline.run.collect_moments", never)
    monkeypatch.setattr(RunFolder, "store", never)
    assert quick(output=out, threads=1, resume=True).report.status == "done"


# formats


@pytest.mark.parametrize("half", [False, True])
def test_ir_in_gives_ir_out(tmp_path: Path, half: bool) -> None:
    path = to_ir(plain_net(), tmp_path / "net.xml", half=half)
    out = tmp_path / "out"
    result = quick(path, output=out)
    assert files(out) == ["model.bin", "model.xml", "recipe.yaml", "report.html", "report.json", "run.log"]
    assert result.report.model.format == "openvino"
    assert result.report.edits == []
    assert (out / "model.xml").read_bytes() == path.read_bytes()
    assert (out / "model.bin").stat().st_size == path.with_suffix(".bin").stat().st_size
    assert_true(result.report, out / "model.xml")
    stored = {
        op.get_element_type() for op in ov.Core().read_model(out / "model.xml").get_ops() if is_weight(op)
    }
    assert stored == {ov.Type.f16 if half else ov.Type.f32}


def is_weight(op: Any) -> bool:
    return bool(op.get_type_name() == "Constant" and len(op.get_output_shape(0)) >= 2 and op.data.size > 100)


def test_ir_with_int8(tmp_path: Path) -> None:
    path = to_ir(plain_net(), tmp_path / "net.xml")
    out = tmp_path / "out"
    report = quick(path, output=out, recipe=settings(quantization=int8(16))).report
    assert_true(report, out / "float" / "model.xml")
    assert (out / "float" / "model.xml").read_bytes() == path.read_bytes()
    names = {layer.name: layer.zeros for layer in report.layers}
    assert all(zeros >= names[name] for name, zeros in zeros_in(out / "model.xml", set(names)).items())
    kinds = {op.get_type_name() for op in ov.Core().read_model(out / "model.xml").get_ops()}
    assert "FakeQuantize" in kinds


@pytest.mark.parametrize("quantized", [False, True])
def test_ir_on_demand(tmp_path: Path, quantized: bool) -> None:
    out = tmp_path / "out"
    recipe = settings(quantization=int8(8) | {"enabled": quantized})
    result = quick(output=out, output_format="openvino", recipe=recipe)
    assert (out / "model.xml").is_file()
    assert not (out / "model.onnx").exists()
    report = result.report
    float_file = out / "float" / "model.xml" if quantized else out / "model.xml"
    assert_true(report, float_file)
    for variant in report.variants:
        assert variant.weights == report.weights, variant.name
        assert variant.zeros >= (report.zeros if variant.name.startswith("sparse") else 0)
    x = images(6, 8)
    sparse = quick().model
    assert isinstance(sparse, onnx.ModelProto)
    np.testing.assert_allclose(run_openvino(float_file, x), run_onnx(sparse, x), rtol=1e-3, atol=1e-4)


def test_ir_on_demand_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        quick(output=tmp_path / name, output_format="openvino")
    for file in ("model.xml", "model.bin"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tflite_gives_ir(tmp_path: Path) -> None:
    path = FIXTURES / "conv_net.tflite"
    inputs = load_model(path).inputs
    samples = {
        name: normal(5, 24, *(size or 1 for size in (info.shape or ())[1:]))
        for name, info in zip(load_model(path).input_names, inputs, strict=True)
    }
    report = quick(path, samples, output=tmp_path / "out").report
    assert len(report.layers) >= 3
    assert_true(report, tmp_path / "out" / "model.xml")


def test_fixed_batch() -> None:
    result = quick(conv_net(batch=4), images(50))
    assert_true(result.report, result.model)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_either_engine_runs_the_job(engine: Any) -> None:
    result = quick(engine=engine)
    assert result.report.engine == engine
    assert_true(result.report, result.model)


# data


def test_calibration_in_every_form_gives_the_same_model() -> None:
    arrays = images(32)
    forms: list[Any] = [
        {"x": arrays},
        list(arrays),
        lambda: iter(arrays),
        nncf.Dataset(list(arrays[:, None])),
        nncf.Dataset([{"x": array} for array in arrays[:, None]]),
    ]
    protos = [quick(calibration=form).model for form in forms]
    assert all(proto == protos[0] for proto in protos)


def test_without_validation_the_held_out_slice_judges() -> None:
    report = quick(calibration=images(40)).report
    assert (report.data.calibration, report.data.fit, report.data.held_out) == (40, 36, 4)
    assert report.data.validation == 4
    assert not report.data.labels
    assert report.data.metric == "agreement"
    assert {"agreement", "logit_kl", "sqnr"} <= report.variants[-1].metrics.keys()


def test_a_single_sample_will_do() -> None:
    result = quick(calibration=images(1))
    assert_true(result.report, result.model)


def test_augmented_samples_enter_the_fit_only() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    recipe = settings(calibration={"augment": ["flip", "crop"], "augment_factor": 3})
    report = quick(calibration=pixels, recipe=recipe, preprocess={"scale_values": [128.0]}).report
    assert (report.data.calibration, report.data.fit, report.data.held_out) == (20, 54, 2)


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = quick()
    assert result.folder is None
    assert result.files == ()
    assert result.report.files == []
    assert list(tmp_path.iterdir()) == []


def test_report_is_plain_json(tmp_path: Path) -> None:
    quick(output=tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text)["schema_version"] == "1.0"
    assert str(tmp_path) not in text
