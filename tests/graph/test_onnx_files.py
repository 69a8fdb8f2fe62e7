"""Bad ONNX files end in one clear line; written files appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pot_sparsity.errors import ModelError, OutputError
from pot_sparsity.graph import onnx_files
from pot_sparsity.graph.onnx_model import OnnxModel, load_onnx


def _model(weight: np.ndarray | None = None) -> onnx.ModelProto:
    value = np.arange(600, dtype=np.float32).reshape(30, 20) if weight is None else weight
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 30])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 20])],
        [numpy_helper.from_array(value, "w")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _fails(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_onnx(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"hello, I am a text file\n", "not an ONNX model"),
        (bytes(range(256)) * 8, "not an ONNX model"),
        (np.random.default_rng(0).bytes(4096), "not an ONNX model"),
        (b"\x08\x08", "no graph"),
    ],
)
def test_not_a_model(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    _fails(path, word)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    _fails(tmp_path / "none.onnx", "cannot read the model", "No such file")
    _fails(tmp_path, "cannot read the model", "directory")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = _model().SerializeToString()
    path = tmp_path / "m.onnx"
    for size in [*range(1, 40), *range(40, len(data) - 40, 97), *range(len(data) - 40, len(data))]:
        path.write_bytes(data[:size])
        with pytest.raises(ModelError):
            load_onnx(path)
    path.write_bytes(data[: len(data) // 2])
    _fails(path, "truncated")


def test_tensor_with_too_little_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = _model()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-8]
    onnx.save(model, path)
    _fails(path, "'w'", "needs 2400 bytes but holds 2392", "truncated")
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0, 2.0])
    onnx.save(model, path)
    _fails(path, "needs 600 values but holds 2")
    model.graph.initializer[0].dims[0] = -3
    onnx.save(model, path)
    _fails(path, "impossible shape")
    model.graph.initializer[0].data_type = 99
    onnx.save(model, path)
    _fails(path, "no known type")


def test_model_that_needs_something_else(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"

    def check(model: onnx.ModelProto, *words: str) -> None:
        path.write_bytes(model.SerializeToString())
        _fails(path, *words)

    model = _model()
    model.opset_import[0].version = 999
    check(model, "opset 999", "older opset")
    model = _model()
    del model.opset_import[:]
    check(model, "no opset")
    model = _model()
    model.ir_version = 999
    check(model, "IR version 999", "update onnx")
    model = _model()
    del model.graph.output[:]
    check(model, "no graph outputs")
    model = _model()
    model.graph.sparse_initializer.add().dims.extend([2, 2])
    check(model, "sparse initializers", "dense weights")
    model = _model()
    model.graph.node[0].input[1] = "nowhere"
    check(model, "nothing produces tensor 'nowhere', read by 'fc'")
    model = _model()
    model.graph.node.add(op_type="Relu", input=["y"], output=["y"])
    check(model, "tensor 'y' is produced by both 'fc' and 'Relu_y'")
    model = _model()
    model.graph.node[0].attribute.add(name="strange")
    check(model, "an attribute of operator 'fc' has no value")


def _external(tmp_path: Path) -> tuple[Path, onnx.ModelProto]:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "m.onnx"
    onnx.save(_model(), path, save_as_external_data=True, location="weights.bin")
    return path, onnx.load(path, load_external_data=False)


def _set_entry(model: onnx.ModelProto, key: str, value: str) -> None:
    entries = model.graph.initializer[0].external_data
    for entry in entries:
        if entry.key == key:
            entry.value = value
            return
    entries.add(key=key, value=value)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin", "C:\\secret.bin", "..\\secret.bin"]
)
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    path, model = _external(tmp_path)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 2400)
    _set_entry(model, "location", location)
    path.write_bytes(model.SerializeToString())
    _fails(path, "'w'", "points outside the model's folder", "refused")


def test_external_data_behind_a_link_is_refused(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    (path.parent / "weights.bin").rename(tmp_path / "outside.bin")
    (path.parent / "weights.bin").symlink_to(tmp_path / "outside.bin")
    _fails(path, "link that leaves the model's folder", "refused")
    (path.parent / "weights.bin").unlink()
    (tmp_path / "outside.bin").rename(path.parent / "inside.bin")
    (path.parent / "weights.bin").symlink_to(path.parent / "inside.bin")
    assert load_onnx(path).graph.value("w").shape == (30, 20)


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    path, model = _external(tmp_path)
    data = path.parent / "weights.bin"
    _set_entry(model, "offset", "100")
    path.write_bytes(model.SerializeToString())
    _fails(path, "runs past the end of weights.bin", "2500 of 2400 bytes")
    _set_entry(model, "offset", "-1")
    path.write_bytes(model.SerializeToString())
    _fails(path, "'w'")
    _set_entry(model, "offset", "zero")
    path.write_bytes(model.SerializeToString())
    _fails(path, "no number")
    _set_entry(model, "offset", "0")
    _set_entry(model, "length", "2396")
    path.write_bytes(model.SerializeToString())
    _fails(path, "needs 2400 bytes, not 2396")
    _set_entry(model, "length", "2400")
    path.write_bytes(model.SerializeToString())
    data.write_bytes(data.read_bytes()[:-4])
    _fails(path, "runs past the end", "truncated")
    data.unlink()
    _fails(path, "'weights.bin' is missing")


def test_external_data_round_trip(tmp_path: Path) -> None:
    path, raw = _external(tmp_path)
    model = load_onnx(path)
    np.testing.assert_array_equal(model.graph.value("w"), np.arange(600, dtype=np.float32).reshape(30, 20))
    out = tmp_path / "out"
    out.mkdir()
    files = model.save(out, "copy")
    assert [file.name for file in files] == ["copy.onnx", "copy.onnx.data"]
    assert sorted(os.listdir(out)) == ["copy.onnx", "copy.onnx.data"]
    again = load_onnx(files[0])
    assert again.native == model.native
    with pytest.raises(ModelError, match=r"not loaded: read it with onnx\.load"):
        OnnxModel(raw)
    passed = OnnxModel(raw, path)
    assert passed.native == model.native
    assert raw.graph.initializer[0].data_location == TensorProto.EXTERNAL


def test_large_models_get_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "PROTOBUF_LIMIT", 1000)
    proto = _model()
    tensor = proto.graph.initializer[0]
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values.tolist())
    files = OnnxModel(proto).save(tmp_path, "large")
    assert len(files) == 2
    np.testing.assert_array_equal(load_onnx(files[0]).graph.value("w").ravel(), values)


def test_failed_writes_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxModel(_model())
    with pytest.raises(OutputError, match=r"cannot write .*none/m\.onnx: No such file"):
        model.save(tmp_path / "none", "m")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "m.onnx").write_bytes(b"older")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OutputError, match="No space left on device: free some space or choose another folder"
    ):
        model.save(tmp_path, "m")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"older"


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    file = OnnxModel(_model()).save(tmp_path, "m")[0]
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
