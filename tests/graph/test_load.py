from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

from pot_sparsity.algorithms.arrays import ConvGeometry
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.graph import Node
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.openvino_model import OpenVINOModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
NHWC, NCHW = (1, 8, 8, 3), (1, 3, 8, 8)
FOREIGN = [
    pytest.param("conv_net.tflite", NHWC, 1, id="tflite"),
    pytest.param("conv_net_saved_model", NHWC, None, id="saved_model"),
    pytest.param("conv_net.pdmodel", NCHW, None, id="paddle"),
]


def run(model: ov.Model, value: Any) -> Any:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([value])[0])


def native(model: Model) -> ov.Model:
    assert isinstance(model, OpenVINOModel)
    return model.native


def nodes(model: Model, op: str) -> list[Node]:
    return [node for node in model.graph if node.op == op]


@pytest.mark.parametrize(("name", "shape", "batch"), FOREIGN)
def test_foreign_models(tmp_path: Path, name: str, shape: tuple[int, ...], batch: int | None) -> None:
    model = load_model(FIXTURES / name)
    assert model.format == "openvino"
    assert model.batch_size == batch
    assert model.inputs[0].shape == (batch, *shape[1:])
    conv, depthwise = nodes(model, "Convolution")
    for node, groups, layout in ((conv, 1, "oi"), (depthwise, 6, "goi")):
        geometry = node.attrs["geometry"]
        assert isinstance(geometry, ConvGeometry)
        assert (geometry.kernel, geometry.groups, node.attrs["weight_layout"]) == ((3, 3), groups, layout)
        assert model.graph.is_constant(node.inputs[1])
    (product,) = nodes(model, "MatMul")
    weight = product.inputs[1]
    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    original = run(native(model), value)
    assert original.shape == (1, 5)
    part = model.extract([product.inputs[0], model.graph.outputs[0]])
    assert isinstance(part.model, ov.Model)
    features = run(part.model, value)
    changed = model.graph.value(weight).astype(np.float32)
    dense = changed.T if product.attrs["transpose_b"] else changed
    offset = original - features @ dense
    changed[:, 2:] = 0
    dense = changed.T if product.attrs["transpose_b"] else changed
    stored = model.set_constant(weight, changed)
    written = model.save(tmp_path, "out")
    assert [file.name for file in written] == ["out.xml", "out.bin"]
    again = load_model(written[0])
    np.testing.assert_array_equal(again.graph.value(weight), stored)
    assert [node.name for node in again.graph] == [node.name for node in model.graph]
    np.testing.assert_allclose(run(native(again), value), features @ dense + offset, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shape", "batch"), FOREIGN)
def test_what_is_written_does_not_depend_on_what_was_read_before(
    tmp_path: Path, name: str, shape: object, batch: object
) -> None:
    first = [file.read_bytes() for file in load_model(FIXTURES / name).save(tmp_path, "first")]
    load_model(FIXTURES / "conv_net.tflite")
    assert [file.read_bytes() for file in load_model(FIXTURES / name).save(tmp_path, "second")] == first


def test_batch_norm_of_foreign_models_is_fused() -> None:
    model = load_model(FIXTURES / "conv_net_saved_model")
    assert not nodes(model, "BatchNormalization")
    assert not nodes(model, "Multiply")
    assert len(nodes(model, "Add")) == 3


def onnx_model() -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    weights = {
        "conv.weight": rng.normal(size=(8, 3, 3, 3)),
        "conv.bias": rng.normal(size=8),
        "fc.weight": rng.normal(size=(8, 5)),
    }
    graph = helper.make_graph(
        [
            helper.make_node(
                "Conv", ["image", "conv.weight", "conv.bias"], ["c"], name="conv", auto_pad="SAME_UPPER"
            ),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
            helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
            helper.make_node("MatMul", ["f", "fc.weight"], ["logits"], name="fc"),
        ],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("compressed", [False, True])
def test_ir_converted_from_onnx(tmp_path: Path, compressed: bool) -> None:
    onnx.save(onnx_model(), tmp_path / "net.onnx")
    ov.save_model(
        ov.Core().read_model(tmp_path / "net.onnx"), tmp_path / "net.xml", compress_to_fp16=compressed
    )
    model = load_model(str(tmp_path / "net.xml"))
    (product,) = nodes(model, "MatMul")
    weight = product.inputs[1]
    while not model.graph.is_constant(weight):
        producer = model.graph.producer(weight)
        assert producer is not None
        weight = producer.inputs[0]
    value = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    dense = model.graph.value(weight).astype(np.float32)
    assert model.graph.value(weight).dtype == (np.float16 if compressed else np.float32)
    expected = run(native(model), value)
    stored = model.set_constant(weight, dense / 2)
    files = model.save(tmp_path, "out")
    assert files[0].read_bytes() == (tmp_path / "net.xml").read_bytes()
    again = load_model(files[0])
    np.testing.assert_array_equal(again.graph.value(weight), stored)
    np.testing.assert_allclose(run(native(again), value), expected / 2, rtol=1e-4, atol=1e-5)


def test_objects_and_onnx_files(tmp_path: Path) -> None:
    proto = onnx_model()
    onnx.save(proto, tmp_path / "NET.ONNX")
    assert isinstance(load_model(proto), OnnxModel)
    loaded = load_model(tmp_path / "NET.ONNX")
    assert isinstance(loaded, OnnxModel)
    assert loaded.source == tmp_path / "NET.ONNX"
    model = ov.Core().read_model(FIXTURES / "conv_net.tflite")
    assert isinstance(load_model(model), OpenVINOModel)


def test_the_file_inside_a_saved_model_stands_for_the_folder() -> None:
    model = load_model(FIXTURES / "conv_net_saved_model" / "saved_model.pb")
    assert model.source == FIXTURES / "conv_net_saved_model"


def text_file(folder: Path, name: str, content: bytes = b"no model at all") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.onnx", "is not an ONNX model"),
        ("m.xml", "is not well-formed XML"),
        ("m.tflite", "is not a TFLite model: export or download it again"),
        ("m.pb", "is not a TensorFlow model"),
        ("m.pdmodel", "is not a Paddle model"),
        ("m.pt", "files ending in '.pt' are not known: give an ONNX file (.onnx), an OpenVINO IR"),
        ("m", "files ending in 'nothing' are not known"),
        ("m.json", "files ending in '.json' are not known"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ModelError, match=re.escape(text)) as caught:
        load_model(text_file(tmp_path, name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_tflite_file_is_refused(tmp_path: Path) -> None:
    content = (FIXTURES / "conv_net.tflite").read_bytes()
    with pytest.raises(ModelError, match="OpenVINO cannot read it as a TFLite model"):
        load_model(text_file(tmp_path, "m.tflite", content[:1200]))


def test_a_truncated_paddle_model_is_refused(tmp_path: Path) -> None:
    content = (FIXTURES / "conv_net.pdmodel").read_bytes()
    with pytest.raises(
        ModelError, match=r"OpenVINO cannot read it as a Paddle model \(Model can't be parsed\)"
    ):
        load_model(text_file(tmp_path, "m.pdmodel", content[:5000]))


def test_a_saved_model_without_its_variables_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(FIXTURES / "conv_net_saved_model", folder)
    shutil.rmtree(folder / "variables")
    with pytest.raises(ModelError, match="OpenVINO cannot read it as a TensorFlow model") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_advice_for_near_misses(tmp_path: Path) -> None:
    for name in ("m.xml", "m.bin", "n.pdmodel", "n.pdiparams", "o.json", "o.pdiparams"):
        text_file(tmp_path, name)
    with pytest.raises(ModelError, match=r"holds only weights: give m\.xml"):
        load_model(tmp_path / "m.bin")
    with pytest.raises(ModelError, match=r"holds only weights: give n\.pdmodel"):
        load_model(tmp_path / "n.pdiparams")
    with pytest.raises(ModelError, match=r"save it as \.pdmodel"):
        load_model(tmp_path / "o.json")
    with pytest.raises(ModelError, match=r"without saved_model\.pb"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="there is no such file"):
        load_model(tmp_path / "absent.onnx")
    wrong: Any = 3
    with pytest.raises(ModelError, match="an object of type int is no model"):
        load_model(wrong)
