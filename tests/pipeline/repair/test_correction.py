"""Corrections on real runs of small networks: what they promise holds in the engine, and each is guarded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pot_sparsity.algorithms.arrays import AnyArray, Float64, Moments
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines import get_engine
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.normalization import find_normalizations, read_normalization
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.prepare import Prepared, prepare
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.repair.correction import MOVED, OneShot, Steps, attempts, corrected
from pot_sparsity.pipeline.repair.sequential import Walker, walk
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, read_dense
from pot_sparsity.recipe import Recipe, validate_recipe
from pot_sparsity.report.schema import Decision, Report
from tests.pipeline.nets import QUICK, Array, conv_net, dataset, images, plain_net, run_onnx
from tests.pipeline.norm_nets import FORMS, KINDS, load_kind, norm_net, tokens

WIDE = {"clip": [1e-3, 1e3]}


#: Layers are fitted to their own output on the masks they have, and nothing comes after the corrections.
PLAIN: dict[str, Any] = {
    "reconstruction": {"masks": "kept", "target": "layer"},
    "finish": {"activations": "never", "rescaling": "never", "distillation": "never"},
}


def recipe(sparsity: float = 0.6, **sections: Any) -> Recipe:
    return validate_recipe({"sparsity": sparsity, **QUICK, **PLAIN, **sections})


@dataclass(frozen=True)
class Walked:
    """A network before and after a walk."""

    prepared: Prepared
    dense: list[DenseLayer]
    sparse: Model
    solutions: dict[str, Solution]


def halved(item: DenseLayer) -> Solution:
    """Every second weight by magnitude, nothing else."""
    weight = np.where(np.abs(item.weight) < np.median(np.abs(item.weight)), 0.0, item.weight)
    return Solution(weight, item.biases, 0.0, 0.0)


def untouched(item: DenseLayer) -> Solution:
    return Solution(item.weight, item.biases, 0.0, 0.0)


def walked(
    model: Model,
    samples: AnyArray,
    steps: Steps | None,
    *,
    prune: bool = True,
    folder: RunFolder | None = None,
    **correction: Any,
) -> Walked:
    """Prune by magnitude (or not), then walk; None for steps re-estimates every absorbed BatchNorm."""
    settings, engine = recipe(correction={**WIDE, **correction}), get_engine("openvino", 1)
    data: Dataset = dataset(model, samples)
    prepared = prepare(model, settings, engine, data, ignored_scope=None, keep_structure=False)
    dense = read_dense(prepared.model, prepared.layers)
    moments = collect_moments(
        prepared.model,
        prepared.layers,
        engine,
        data,
        batch_size=16,
        threads=1,
        max_positions=None,
        progress=Silent(),
    )
    solutions = {item.layer.name: (halved if prune else untouched)(item) for item in dense}
    sparse = prepared.model.copy()
    for item in dense:
        apply(sparse, item.layer, solutions[item.layer.name])
    chosen = Steps(batch_norm=prepared.batch_norms) if steps is None else steps
    walker = Walker("test", sparse, chosen, solutions, [])
    walk(
        prepared.model,
        [walker],
        dense,
        moments,
        data,
        None,
        engine,
        settings,
        threads=1,
        folder=RunFolder(None) if folder is None else folder,
        progress=Silent(),
    )
    return Walked(prepared, dense, walker.model, walker.solutions)


def tap(model: Model, tensors: list[str], x: AnyArray) -> dict[str, Array]:
    executable = get_engine("openvino", 1).compile(model.extract(outputs=tuple(dict.fromkeys(tensors))))
    return executable.run({model.graph.inputs[0]: x})


def moments_of(tensor: Array, axis: int) -> tuple[Float64, Float64]:
    values = np.moveaxis(tensor.astype(np.float64), axis, 0).reshape(tensor.shape[axis], -1)
    return values.mean(axis=1), values.std(axis=1)


def assert_zeros(found: Walked) -> None:
    for item in found.dense:
        masked = halved(item).weight == 0.0
        assert masked.any()
        assert (read_weight(found.sparse, item.layer)[masked] == 0.0).all()


# the walk


@pytest.mark.parametrize("reconstruct", [False, True])
def test_differential_correction_restores_every_layers_statistics(reconstruct: bool) -> None:
    x = images(40)
    found = walked(load_model(conv_net()), x, Steps(reconstruct=reconstruct, differential=True))
    assert_zeros(found)
    places = [item.layer.places[0] for item in found.dense]
    dense, sparse = (
        tap(model, [place.output for place in places], x) for model in (found.prepared.model, found.sparse)
    )
    for place in places:
        expected, reached = (moments_of(side[place.output], place.channel_axis) for side in (dense, sparse))
        np.testing.assert_allclose(reached[0], expected[0], atol=2e-4)
        np.testing.assert_allclose(reached[1], expected[1], rtol=1e-3, atol=1e-5)


def test_sequential_bias_correction_restores_the_means_and_leaves_the_weights() -> None:
    x = images(40)
    found = walked(load_model(conv_net()), x, Steps(bias=True))
    assert_zeros(found)
    for item in found.dense:
        np.testing.assert_array_equal(found.solutions[item.layer.name].weight, halved(item).weight)
    places = [item.layer.places[0] for item in found.dense]
    dense, sparse = (
        tap(model, [place.output for place in places], x) for model in (found.prepared.model, found.sparse)
    )
    for place in places:
        expected, reached = (
            moments_of(side[place.output], place.channel_axis)[0] for side in (dense, sparse)
        )
        np.testing.assert_allclose(reached, expected, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_normalization_correction_restores_the_statistics_behind_it(kind: str, tmp_path: Path) -> None:
    x = tokens(40)
    found = walked(load_kind(kind, tmp_path), x, Steps(normalization=True))
    assert_zeros(found)
    items = find_normalizations(found.sparse.graph)
    assert len(items) == 2
    dense, sparse = (
        tap(model, [item.output for item in items], x) for model in (found.prepared.model, found.sparse)
    )
    slack = 2e-3 if kind.endswith("half") else 1e-4
    for item in items:
        expected, reached = (moments_of(side[item.output], -1) for side in (dense, sparse))
        if item.shift is None:
            expected, reached = ((np.hypot(*both), np.zeros(0)) for both in (expected, reached))
        np.testing.assert_allclose(reached[0], expected[0], atol=slack)
        np.testing.assert_allclose(reached[1], expected[1], rtol=slack)
    scale = read_normalization(found.sparse, items[0])[0]
    assert np.abs(scale - read_normalization(found.prepared.model, items[0])[0]).max() > 0.01


def test_without_rescaling_normalizations_are_only_shifted() -> None:
    found = walked(
        load_model(norm_net(FORMS["operator"])), tokens(40), Steps(normalization=True), scale=False
    )
    for item in find_normalizations(found.sparse.graph):
        dense, sparse = (read_normalization(side, item) for side in (found.prepared.model, found.sparse))
        np.testing.assert_array_equal(sparse[0], dense[0])
        assert sparse[1] is not None
        assert dense[1] is not None
        assert np.abs(sparse[1] - dense[1]).max() > 1e-3


@pytest.mark.parametrize("kind", [*KINDS[:6:3], "conv"])
@pytest.mark.parametrize(
    "steps",
    [Steps(differential=True), Steps(bias=True), Steps(normalization=True)],
    ids=["differential", "bias", "normalization"],
)
def test_on_the_dense_model_they_are_the_identity(kind: str, steps: Steps, tmp_path: Path) -> None:
    conv = kind == "conv"
    model, x = (load_model(conv_net()), images(30)) if conv else (load_kind(kind, tmp_path), tokens(30))
    found = walked(model, x, steps, prune=False)
    outputs = list(found.sparse.graph.outputs)
    dense, sparse = (tap(side, outputs, x) for side in (found.prepared.model, found.sparse))
    for name in outputs:
        np.testing.assert_allclose(sparse[name], dense[name], rtol=1e-4, atol=1e-4)


def test_a_walk_takes_up_normalizations_from_the_run_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open({})
    model = load_model(norm_net(FORMS["decomposed"]))
    first = walked(model, tokens(40), Steps(normalization=True), folder=folder)
    other = walked(model, tokens(40, 9), Steps(normalization=True), folder=folder)
    for item in find_normalizations(model.graph):
        for before, after in zip(
            read_normalization(first.sparse, item), read_normalization(other.sparse, item), strict=True
        ):
            assert before is not None
            assert after is not None
            np.testing.assert_array_equal(after, before)


# re-estimated BatchNorm


def normed(model: onnx.ModelProto, mean: AnyArray, variance: AnyArray) -> onnx.ModelProto:
    """The same network with other statistics in its one BatchNormalization."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name, value in (("mean", mean), ("var", variance)):
        tensor = next(item for item in copy.graph.initializer if item.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return copy


def test_preparation_records_what_layers_absorb() -> None:
    model = load_model(conv_net())
    prepared = walked(model, images(20), Steps(), prune=False).prepared
    (name,) = prepared.batch_norms
    assert name == "branch2"
    constants = {item.name: numpy_helper.to_array(item) for item in conv_net().graph.initializer}
    norm = prepared.batch_norms[name]
    for found, expected in ((norm.gamma, "gamma"), (norm.beta, "beta"), (norm.variance, "var")):
        np.testing.assert_allclose(found, constants[expected], rtol=1e-7)
    assert norm.epsilon == pytest.approx(1e-5)


def test_reestimation_equals_that_of_the_network_before_it_was_fused() -> None:
    """The dense network: its BatchNorm given the statistics of what it reads on these samples."""
    x = images(40)
    source = conv_net()
    found = walked(load_model(source), x, None, prune=False)
    read = tap(load_model(source), ["branch2"], x)["branch2"]
    mean, deviation = moments_of(read, 1)
    expected = run_onnx(normed(source, mean, np.square(deviation)), x)
    output = found.sparse.graph.outputs[0]
    np.testing.assert_allclose(tap(found.sparse, [output], x)[output], expected, rtol=1e-4, atol=1e-4)


def test_reestimation_of_a_sparse_network() -> None:
    x = images(40)
    found = walked(load_model(conv_net()), x, None)
    assert_zeros(found)
    norm = found.prepared.batch_norms["branch2"]
    place = next(item.layer.places[0] for item in found.dense if item.layer.name == "branch2")
    mean, deviation = moments_of(tap(found.sparse, [place.output], x)[place.output], 1)
    np.testing.assert_allclose(mean, norm.beta, atol=1e-4)
    np.testing.assert_allclose(deviation, np.abs(norm.gamma), rtol=1e-3)


# whole runs


def run(model: Any = None, samples: Any = None, sparsity: float = 0.7, **sections: Any) -> Report:
    return optimize(
        conv_net() if model is None else model,
        images(60) if samples is None else samples,
        recipe=recipe(sparsity, **sections),
        baseline_int8=False,
        measure_latency=False,
    ).report


def decided(report: Report) -> dict[str, Decision]:
    for decision in report.decisions:
        assert decision.before is not None
        assert decision.after is not None
        assert decision.measure == "relative output error on held-out samples"
    return {decision.what: decision for decision in report.decisions}


DENSE_INPUTS: dict[str, Any] = {"reconstruction": {"input": "dense"}, "pruning": {"method": "magnitude"}}
NEVER = {"differential": "never", "normalization": "never"}


@pytest.mark.parametrize("weights", ["published", "exact"])
def test_weights_and_biases_are_judged_one_after_the_other(weights: str) -> None:
    report = run(correction={"weights": weights, "bias": "helps", **NEVER}, **DENSE_INPUTS)
    found = decided(report)
    assert list(found) == [f"weight correction ({weights})", "one-shot activation-bias correction"]
    first, second = found.values()
    for decision in (first, second):
        assert decision.kept == (decision.after < decision.before)  # type: ignore[operator]
        assert bool(decision.reason) != decision.kept
    assert second.before == (first.after if first.kept else first.before)


def test_what_is_always_or_never_done_is_not_judged() -> None:
    outputs = {}
    for when in ("always", "never"):
        correction = {"weights": "exact", "weights_when": when, "bias": True, **NEVER}
        report = run(correction=correction, **DENSE_INPUTS)
        assert report.decisions == []
        outputs[when] = report.variants[-1].metrics["output_mse"]
    plain = run(correction={"bias": True, **NEVER}, **DENSE_INPUTS)
    assert outputs["never"] == plain.variants[-1].metrics["output_mse"]
    assert outputs["always"] != outputs["never"]


def test_one_layer_corrected_by_hand() -> None:
    layer: Any = None
    item = DenseLayer(layer, np.array([[[1.0, -2.0, 3.0]]]), (np.array([[0.5]]), None))
    pruned = Solution(np.array([[[1.0, 0.0, 3.0]]]), item.biases, 0.0, 0.0)
    moments = Moments(4.0, np.array([[1.0, 10.0, 100.0]]), np.zeros((1, 3, 3)))

    biased = corrected(item, pruned, moments, OneShot("none", bias=True))
    np.testing.assert_array_equal(biased.weight, pruned.weight)
    first, second = biased.biases
    assert first is not None
    assert second is None
    np.testing.assert_allclose(first, np.array([[0.5 - 2.0 * 10.0]]))

    exact = corrected(item, pruned, moments, OneShot("exact", bias=True))
    assert (exact.weight == 0.0).tolist() == [[[False, True, False]]]
    assert exact.weight.sum() == pytest.approx(2.0)
    assert np.square(exact.weight).sum() == pytest.approx(14.0)
    gap = ((item.weight - exact.weight) * moments.mean).sum()
    assert exact.biases[0] is not None
    np.testing.assert_allclose(exact.biases[0], np.array([[0.5 + gap]]))

    published = corrected(item, pruned, moments, OneShot("published", bias=False))
    assert (published.weight == 0.0).tolist() == [[[False, True, False]]]
    np.testing.assert_array_equal(published.biases[0], [[0.5]])


@pytest.mark.parametrize("bias", [True, "helps"])
def test_sequential_bias_correction_is_a_walk_of_its_own(bias: bool | str) -> None:
    correction = {"bias": bias, "bias_mode": "sequential", **NEVER}
    report = run(correction=correction, **DENSE_INPUTS)
    expected = ["sequential activation-bias correction"]
    assert list(decided(report))[-1:] == expected
    if bias is True:
        assert [decision.kept for decision in report.decisions] == [True]
    fitted = run(correction=correction, reconstruction={"input": "sparse"})
    assert not any("sequential" in decision.what for decision in fitted.decisions)


CORRECTIONS = ["sparse-input reconstruction", "sparse-input reconstruction with differential correction"]


def test_decisions_of_a_run_without_the_finish() -> None:
    assert list(decided(run())) == CORRECTIONS


def test_decisions_of_a_default_run() -> None:
    found = decided(run(reconstruction={}, finish={}))
    refits = [f"refit behind the activations, slack {slack}" for slack in ("0.15", "0.3")]
    assert list(found) == [*CORRECTIONS, *refits, "distilled from the dense network's output"]
    assert found[refits[0]].before == min(found[what].after for what in CORRECTIONS if found[what].kept)  # type: ignore[type-var]


@pytest.mark.parametrize("when", ["helps", "always", "never"])
def test_normalization_correction_is_kept_where_it_helps(when: str) -> None:
    source = norm_net(FORMS["operator"])
    report = run(source, tokens(60), correction={"normalization": when, "differential": "never"})
    found = decided(report)
    basis = "sparse-input reconstruction"
    corrected_too = f"{basis} with normalization correction"
    expected = {"helps": [basis, corrected_too], "always": [corrected_too], "never": [basis]}
    assert list(found) == expected[when]
    if when == "always":
        assert found[corrected_too].kept
    if when == "helps":
        _, second = found.values()
        assert second.kept == (second.after < second.before)  # type: ignore[operator]


def test_reestimation_warns_where_it_moves_the_dense_model() -> None:
    shifted = images(60) * 2.0 + 0.5  # not what the network's statistics were taken from
    report = run(samples=shifted, correction={"batch_norm": "reestimate"})
    found = decided(report)
    check = found["batch normalization re-estimated in the dense model"]
    assert check.after is not None
    assert check.after > MOVED
    assert not check.kept
    text = next(text for text in report.warnings if "re-estimating BatchNorm moves the output" in text)
    assert f"relative output error {check.after:.2g}, limit 0.01" in text
    assert "sparse-input reconstruction with re-estimated batch normalization" in found


def test_reestimation_does_not_warn_where_the_statistics_are_the_networks_own() -> None:
    x = images(60)
    read = tap(load_model(conv_net()), ["branch2"], x)["branch2"]
    mean, deviation = moments_of(read, 1)
    source = normed(conv_net(), mean, np.square(deviation))
    report = run(source, x, correction={"batch_norm": "reestimate", "batch_norm_when": "always"})
    found = decided(report)
    check = found["batch normalization re-estimated in the dense model"]
    assert check.after is not None
    assert check.after < MOVED
    assert not any("re-estimating" in text for text in report.warnings)
    assert found["sparse-input reconstruction with re-estimated batch normalization"].kept


def test_reestimation_checks_the_dense_model_once() -> None:
    report = run(
        correction={"batch_norm": "reestimate"},
        schedule={"kind": "cubic", "iterations": 2, "max_drop": None},
    )
    names = [decision.what for decision in report.decisions]
    assert names.count("batch normalization re-estimated in the dense model") == 1
    assert names.count("sparse-input reconstruction with re-estimated batch normalization") == 3


def test_reestimation_without_a_fused_normalization_is_said_to_be_idle() -> None:
    report = run(plain_net(), correction={"batch_norm": "reestimate"})
    assert report.warnings == [
        "correction.batch_norm has nothing to do: no layer has absorbed a BatchNormalization"
    ]
    assert not any("re-estimated" in decision.what for decision in report.decisions)


def names(**correction: Any) -> list[str]:
    """What is tried on a network that has everything."""
    sections: dict[str, Any] = {
        "reconstruction": {"input": correction.pop("input", "sparse")},
        "correction": correction,
    }
    norm: Any = {"layer": None}
    return [attempt.what for attempt in attempts(recipe(**sections), norm, [norm])]


def test_one_walk_for_what_is_always_done_and_one_for_each_that_may_help() -> None:
    basis = "sparse-input reconstruction"
    every = {"differential": "helps", "normalization": "helps", "batch_norm": "reestimate"}
    assert names(**every) == [
        basis,
        f"{basis} with differential correction",
        f"{basis} with re-estimated batch normalization",
        f"{basis} with normalization correction",
    ]
    assert names(**{**every, "differential": "always"}) == [
        f"{basis} with differential correction",
        f"{basis} with differential correction and re-estimated batch normalization",
        f"{basis} with differential correction and normalization correction",
    ]
    assert names(**{**every, "batch_norm_when": "never"}) == names(**{**every, "batch_norm": "none"})
    assert names(input="dense", **NEVER) == []
    assert names(input="dense", differential="helps", normalization="never") == ["differential correction"]
    assert names(input="dense", bias=False, bias_mode="sequential", **NEVER) == []
