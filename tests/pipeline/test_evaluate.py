"""Judging models: metrics, distance to the dense model, latency."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pot_sparsity.data.loading import load_dataset
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import DataError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.metrics import Comparison
from pot_sparsity.pipeline.evaluate import Evaluator, distance, feeds, measure_latency
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.reporting import input_specs
from tests.pipeline.nets import (
    Array,
    conv_net,
    dataset,
    images,
    labelled,
    node,
    normal,
    plain_net,
    proto,
    run_onnx,
)


def evaluator(model: OnnxModel, data: Array | Path, batch: int = 8) -> Evaluator:
    samples = load_dataset(data, input_specs(model)) if isinstance(data, Path) else dataset(model, data)
    engine = get_engine("onnxruntime", 1)
    return Evaluator(engine, samples, model, ("top1", "top5"), batch, Silent(), "Testing")


def changed(model: OnnxModel, factor: float = 0.5) -> OnnxModel:
    other = model.copy()
    layer = find_layers(other.graph).layers[0]
    other.set_constant(
        layer.constant, np.asarray(other.graph.value(layer.constant), np.float32) * np.float32(factor)
    )
    return other


def softmax(x: Array) -> Array:
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_metrics_are_those_of_all_outputs_at_once(tmp_path: Path, batch: int) -> None:
    dense = OnnxModel(conv_net())
    other = changed(dense)
    judge = evaluator(dense, labelled(tmp_path / "v.npz", conv_net(), 43), batch)
    assert judge.dense.metrics["top1"] == 100.0
    assert judge.dense.metrics["agreement"] == 100.0
    assert judge.dense.metrics["logit_kl"] == pytest.approx(0.0, abs=1e-12)
    found = judge(other)
    x = images(43, 7)
    a, b = run_onnx(dense.native, x), run_onnx(other.native, x)
    same = a.argmax(axis=1) == b.argmax(axis=1)
    p, q = softmax(a), softmax(b)
    expected = {
        "top1": 100.0 * same.mean(),
        "top5": 100.0,
        "agreement": 100.0 * same.mean(),
        "logit_kl": (p * np.log(p / q)).sum(axis=1).mean(),
        "sqnr": 10 * np.log10((a.astype(float) ** 2).sum() / ((a.astype(float) - b) ** 2).sum()),
        "output_mse": ((a.astype(float) - b) ** 2).mean(),
    }
    assert 0 < same.mean() < 1
    assert found.metrics == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found.correct["top1"].tolist() == same.tolist()
    judge.close()


def test_without_labels_there_are_no_label_metrics() -> None:
    dense = OnnxModel(conv_net())
    judge = evaluator(dense, images(10))
    assert set(judge(changed(dense)).metrics) == {"agreement", "logit_kl", "sqnr", "output_mse"}
    assert judge.dense.correct == {}


def test_fixed_batch_judges_every_sample(tmp_path: Path) -> None:
    path = labelled(tmp_path / "v.npz", conv_net(), 11)
    fixed, free = OnnxModel(conv_net(batch=4)), OnnxModel(conv_net())
    a, b = evaluator(fixed, path)(changed(fixed)), evaluator(free, path)(changed(free))
    assert a.metrics == pytest.approx(b.metrics, rel=1e-4)
    assert a.correct["top1"].size == 11


def test_further_outputs_are_compared_by_name() -> None:
    model = proto(
        [node("MatMul", ["x", "w"], "y"), node("Relu", ["y"], "z")],
        {"w": normal(0, 4, 3)},
        ["n", 4],
        ["y", "z"],
    )
    dense = OnnxModel(model)
    found = evaluator(dense, normal(1, 9, 4))(changed(dense, 0.9)).metrics
    assert found["z.sqnr"] == pytest.approx(20.0, abs=1e-4)
    assert found["sqnr"] == pytest.approx(20.0, abs=1e-4)


def test_a_model_without_real_output_has_nothing_to_compare() -> None:
    model = proto(
        [node("MatMul", ["x", "w"], "y"), node("ArgMax", ["y"], "z")], {"w": normal(0, 4, 3)}, ["n", 4], ["z"]
    )
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(DataError, match="no floating-point output"):
        evaluator(OnnxModel(model), normal(1, 3, 4))


def test_distance_is_the_relative_error_of_the_output() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=(20, 5))
    candidate = reference + 0.1 * random.normal(size=(20, 5))
    comparison = Comparison("out")
    comparison.update(reference, candidate)
    name, value = distance(comparison.result())
    assert name == "relative output error"
    assert value == pytest.approx(((candidate - reference) ** 2).sum() / (reference**2).sum())


def test_reference_outputs_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("pot_sparsity.pipeline.spool.MEMORY_BUDGET", 0)
    judge = evaluator(OnnxModel(conv_net()), images(5))
    judge.close()
    assert list(tmp_path.iterdir()) == []


def test_latency_of_every_model_is_a_time(tmp_path: Path) -> None:
    models = [OnnxModel(plain_net()), OnnxModel(conv_net(batch=2))]
    found = measure_latency(get_engine("openvino", 1), models, dataset(models[0], images(4)), rounds=3)
    assert len(found) == 2
    assert all(0 < value < 1000 for value in found)


def test_feeds_go_by_the_users_names() -> None:
    model = OnnxModel(onnx.ModelProto.FromString(conv_net().SerializeToString()))
    executable = get_engine("openvino", 1).compile(model.extract(outputs=("relu1",)))
    batch = next(iter(dataset(model, images(3)).batches(2)))
    assert list(feeds(model, executable, batch)) == ["x"]
