"""Real ONNX networks: parsed, tapped in both engines, and saved without a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.engines import get_engine
from pot_sparsity.graph.finite import check_finite
from pot_sparsity.graph.onnx_model import OnnxModel, load_onnx

pytestmark = pytest.mark.zoo

MODELS = [
    "cifar/resnet8_mlperftiny_cifar10.onnx",
    "cifar/resnet20_akamaster_cifar10.onnx",
    "cifar/resnet20b_distiller_cifar10.onnx",
    "cifar/resnet32_akamaster_cifar10.onnx",
    "cifar/resnet56_akamaster_cifar10.onnx",
    "imagenet/models/mobilenet_v1_025.onnx",
    "imagenet/models/squeezenet1_1.onnx",
    "imagenet/models/mobilenet_v2_100_dequant.onnx",
    "detection/models/yolox_nano.onnx",
    "recsys/models/ncf_mlp_ml1m.onnx",
    "recsys/models/ncf_neumf_ml1m.onnx",
    "recsys/models/iclrec_beauty.onnx",
    "nlp/models/stories260k.onnx",
]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, zoo: Path) -> OnnxModel:
    return load_onnx(zoo / str(request.param))


def _feeds(model: OnnxModel) -> dict[str, AnyArray]:
    rng = np.random.default_rng(0)
    feeds: dict[str, AnyArray] = {}
    for info in model.inputs:
        assert info.shape is not None
        assert info.dtype is not None
        shape = tuple(size or (4 if axis else 2) for axis, size in enumerate(info.shape))
        floating = info.dtype.kind == "f"
        feeds[info.name] = rng.standard_normal(shape) if floating else rng.integers(1, 8, shape)
    return feeds


def _distance(found: AnyArray, expected: AnyArray) -> float:
    """L2 distance relative to the norm of ``expected``."""
    reference = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - reference) / np.linalg.norm(reference))


def test_every_tensor_is_known_and_taps_agree_between_engines(model: OnnxModel) -> None:
    check_finite(model)
    tensors = [tensor for node in model.graph for tensor in node.outputs]
    for tensor in tensors:
        info = model.graph.tensor(tensor)
        assert info.dtype is not None
        assert info.shape is not None
    layers = [n.output for n in model.graph if n.op in ("Convolution", "MatMul")]
    taps = [*model.graph.outputs, *layers[:: max(1, len(layers) // 6)]]
    runnable = model.extract(taps)
    feeds = _feeds(model)
    first = get_engine("openvino", 2).compile(runnable).run(feeds)
    second = get_engine("onnxruntime", 2).compile(runnable).run(feeds)
    assert list(first) == list(second) == list(dict.fromkeys(taps))
    for name, value in first.items():
        other = second[name]
        assert value.shape == other.shape
        assert _distance(value, other) <= 1e-4, name


def test_cutting_between_two_layers_changes_nothing(model: OnnxModel) -> None:
    layers = [
        n for n in model.graph if n.op in ("Convolution", "MatMul") and model.graph.is_constant(n.inputs[1])
    ]
    last = layers[-1]
    engine = get_engine("onnxruntime", 2)
    feeds = _feeds(model)
    whole = engine.compile(model.extract([last.inputs[0], last.output])).run(feeds)
    part = engine.compile(model.extract([last.output], inputs=[last.inputs[0]])).run(whole)
    assert _distance(part[last.output], whole[last.output]) <= 1e-5


def test_save_and_load_round_trip(model: OnnxModel, tmp_path: Path) -> None:
    assert model.source is not None
    before = onnx.load(model.source)
    weights = [t.name for t in before.graph.initializer]
    for name in weights:
        model.set_constant(name, model.graph.value(name))
    (file,) = model.save(tmp_path, "copy")
    again = load_onnx(file)
    assert [node.name for node in again.graph] == [node.name for node in model.graph]
    for name in weights:
        np.testing.assert_array_equal(again.graph.value(name), model.graph.value(name))
    engine = get_engine("onnxruntime", 2)
    feeds = _feeds(model)
    first = engine.compile(load_onnx(model.source).extract()).run(feeds)
    second = engine.compile(again.extract()).run(feeds)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
