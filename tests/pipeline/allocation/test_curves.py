"""Curves against the plain way: write the pruned layer into the model, run the whole model, compare outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.arrays import AnyArray, Float64, Moments
from pot_sparsity.algorithms.correction import activation_bias_correction
from pot_sparsity.data import Dataset
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.metrics import sample_distances
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.allocation.allocate import allocate, needs_curves
from pot_sparsity.pipeline.allocation.curves import FEWEST, measure_curves, sample_number
from pot_sparsity.pipeline.allocation.probes import level_sparsities
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.prepare import prepare
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, apply, prune_layer, read_dense
from pot_sparsity.recipe import Recipe, validate_recipe
from tests.pipeline.nets import QUICK, conv_net, dataset, images, node, normal, plain_net, shared_net, to_ir

ENGINE = get_engine("openvino", 2)


def inputs(model: Model, count: int, seed: int = 0) -> Dataset:
    """Images, or rows where the model takes those."""
    shape = model.inputs[0].shape
    assert shape is not None
    rows = normal(200 + seed, count, int(shape[1] or 1))
    return dataset(model, images(count, seed) if len(shape) == 4 else rows)


def recipe(**allocation: Any) -> Recipe:
    return validate_recipe(
        {**QUICK, "allocation": {"method": "output_distortion", "levels": 3, **allocation}}
    )


def prepared(native: Any, settings: Recipe) -> tuple[Model, list[DenseLayer], dict[str, Moments]]:
    original = load_model(native)
    samples = inputs(original, 48)
    ready = prepare(original, settings, ENGINE, samples, ignored_scope=None, keep_structure=False)
    moments = collect_moments(
        ready.model,
        ready.layers,
        ENGINE,
        samples,
        batch_size=16,
        threads=2,
        max_positions=None,
        progress=Silent(),
    )
    return ready.model, read_dense(ready.model, ready.layers), moments


def measured(
    model: Model,
    dense: Sequence[DenseLayer],
    moments: dict[str, Moments],
    settings: Recipe,
    folder: RunFolder | None = None,
    threads: int = 2,
) -> dict[str, Curve]:
    return measure_curves(
        model,
        dense,
        moments,
        {},
        inputs(model, 40, 5),
        ENGINE,
        settings,
        threads=threads,
        folder=folder or RunFolder(None),
        progress=Silent(),
    )


def distances_of(reference: AnyArray, found: AnyArray, settings: Recipe) -> Float64:
    """Sample by sample, or the relative squared error of a scalar for all samples."""
    if reference.ndim:
        return sample_distances(reference, found, settings.allocation.distance)
    energy = 1.0 if settings.allocation.distance == "squared" else float(reference) ** 2
    return np.full(40, (float(found) - float(reference)) ** 2 / energy)


def by_whole_runs(
    model: Model, item: DenseLayer, moments: Moments, settings: Recipe
) -> tuple[list[int], list[float]]:
    """Zeros and distances of every level, from runs of the whole model."""
    samples = next(iter(inputs(model, 40, 5).batches(40)))
    x = dict(zip(model.graph.inputs, samples.inputs.values(), strict=True))
    reference = ENGINE.compile(model.extract()).run(x)
    zeros, distances = [], []
    for sparsity in level_sparsities(settings.allocation.levels):
        count = round(float(sparsity) * item.layer.size)
        solution = prune_layer(item, moments, None, count, settings)
        biases = tuple(
            None
            if bias is None
            else activation_bias_correction(item.weight, solution.weight, moments.mean, bias)
            for bias in item.biases
        )
        changed = model.copy()
        apply(changed, item.layer, replace(solution, biases=biases))
        found = ENGINE.compile(changed.extract()).run(x)
        both = [(reference[info.name], found[info.name]) for info in model.outputs]
        total = np.sum([distances_of(*pair, settings) for pair in both], axis=0)
        zeros.append(count)
        distances.append(float(total.mean() if settings.allocation.aggregate == "mean" else total.max()))
    return zeros, distances


@pytest.mark.parametrize("net", [conv_net, plain_net, shared_net])
@pytest.mark.parametrize("aggregate", ["mean", "worst"])
def test_points_are_those_of_whole_runs(net: Callable[[], onnx.ModelProto], aggregate: str) -> None:
    settings = recipe(aggregate=aggregate)
    settings = settings.model_copy(
        update={"calibration": settings.calibration.model_copy(update={"batch_size": 40})}
    )
    model, dense, moments = prepared(net(), settings)
    curves = measured(model, dense, moments, settings)
    assert sorted(curves) == sorted(item.layer.name for item in dense)
    for item in dense:
        zeros, distances = by_whole_runs(model, item, moments[item.layer.name], settings)
        if distances == sorted(distances) and len(set(zeros)) == len(zeros):
            found = curves[item.layer.name].at(np.array(zeros))
            np.testing.assert_allclose(found, distances, rtol=2e-3, atol=1e-9)


def test_curves_rise_from_nothing_to_everything() -> None:
    settings = recipe()
    model, dense, moments = prepared(conv_net(), settings)
    for item in dense:
        curve = measured(model, dense, moments, settings)[item.layer.name]
        assert curve.zeros[0] == 0
        assert curve.zeros[-1] == item.layer.size
        assert curve.distortion[0] == 0.0
        assert (np.diff(curve.distortion) >= 0.0).all()


def test_threads_change_nothing_and_finished_layers_are_not_measured_again(tmp_path: Path) -> None:
    settings = recipe()
    model, dense, moments = prepared(conv_net(), settings)
    folder = RunFolder(tmp_path / "out")
    folder.open({"what": "a test"})
    first = measured(model, dense, moments, settings, folder, threads=1)
    others = [
        measured(model, dense, moments, settings, threads=3),
        measured(model, dense, {}, settings, folder),  # without moments nothing could be solved
    ]
    for again in others:
        for name, curve in first.items():
            np.testing.assert_array_equal(again[name].distortion, curve.distortion)


def test_large_networks_are_measured_on_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(samples=200)
    _, dense, moments = prepared(conv_net(), settings)
    assert sample_number(dense, moments, 48, settings) == 200
    monkeypatch.setattr("pot_sparsity.pipeline.allocation.curves.PASSES", 1.0)
    assert sample_number(dense, moments, 48, settings) == FEWEST


def total_net() -> onnx.ModelProto:
    """One more output than the plain net has: the sum over everything, without an axis of samples."""
    net = plain_net()
    net.graph.node.append(node("ReduceSum", ["y"], "total", keepdims=0))
    net.graph.output.append(onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, None))
    return onnx.shape_inference.infer_shapes(net)


def only_total_net() -> onnx.ModelProto:
    net = total_net()
    del net.graph.output[0]
    return net


@pytest.mark.parametrize("net", [total_net, only_total_net])
@pytest.mark.parametrize("distance", ["error", "kl", "squared"])
def test_an_output_without_an_axis_of_samples_counts_as_one(
    net: Callable[[], onnx.ModelProto], distance: str
) -> None:
    settings = recipe(distance=distance)
    settings = settings.model_copy(
        update={"calibration": settings.calibration.model_copy(update={"batch_size": 40})}
    )
    model, dense, moments = prepared(net(), settings)
    curves = measured(model, dense, moments, settings)
    compared = 0
    for item in dense:
        zeros, distances = by_whole_runs(model, item, moments[item.layer.name], settings)
        if distances == sorted(distances):
            found = curves[item.layer.name].at(np.array(zeros))
            np.testing.assert_allclose(found, distances, rtol=2e-3, atol=1e-9)
            compared += 1
    assert compared


def test_a_last_batch_that_is_not_full_counts_its_samples() -> None:
    settings = recipe(aggregate="worst")
    model, dense, moments = prepared(total_net(), settings)
    size = settings.model_copy(
        update={"calibration": settings.calibration.model_copy(update={"batch_size": 16})}
    )
    for name, curve in measured(model, dense, moments, size).items():
        assert np.isfinite(curve.distortion).all(), name
        assert curve.distortion[-1] > 0.0


def test_a_fixed_batch_is_filled() -> None:
    """Large networks are measured on few samples, but on no fewer than they take at once."""
    settings = recipe(samples=FEWEST // 2).model_dump() | {"calibration": {"holdout": 0.0}}
    report = optimize(
        conv_net(FEWEST + 8),
        images(2 * FEWEST + 16),
        recipe=settings,
        baseline_int8=False,
        measure_latency=False,
    ).report
    assert "curves" in [stage.name for stage in report.stages]
    assert report.sparsity_reached == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("as_ir", [False, True])
def test_optimize_reaches_the_sparsity(as_ir: bool, tmp_path: Path) -> None:
    model = to_ir(conv_net(), tmp_path / "net.xml") if as_ir else conv_net()
    settings = recipe().model_copy(update={"sparsity": 0.6})
    report = optimize(model, images(48), recipe=settings, baseline_int8=False, measure_latency=False).report
    layers = [layer for layer in report.layers if layer.ignored is None]
    assert sum(layer.zeros for layer in layers) == round(0.6 * sum(layer.weights for layer in layers))
    assert "curves" in [stage.name for stage in report.stages]


@pytest.mark.parametrize(
    ("method", "pattern", "needed"),
    [
        ("output_distortion", "unstructured", True),
        ("output_distortion", "block:4", True),
        ("output_distortion", "2:4", False),
        ("lamp", "unstructured", False),
    ],
)
def test_patterns_that_fix_the_count_need_no_curves(method: str, pattern: str, needed: bool) -> None:
    settings = validate_recipe({"allocation": {"method": method}, "pruning": {"pattern": pattern}})
    assert needs_curves(settings) == needed


def test_options_of_other_allocations_are_refused() -> None:
    settings = recipe(options={"power": 0.5})
    _, dense, _ = prepared(plain_net(), settings)
    with pytest.raises(RecipeError, match="has no option 'power'"):
        allocate(dense, settings, 0.5)
