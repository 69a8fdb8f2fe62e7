"""Bad input of every kind ends in one line that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import numpy_helper
from PIL import Image

from pot_sparsity.errors import DataError, ModelError, OutputError, RecipeError, UserError
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.recipe import load_recipe, validate_recipe
from tests.pipeline.nets import QUICK, conv_net, images, node, normal, plain_net, proto, to_ir

Make = Callable[[Path], Any]


def refused(
    tmp_path: Path,
    kind: type[UserError],
    match: str,
    model: Any = None,
    calibration: Any = None,
    **named: Any,
) -> str:
    """Run the job and assert that it is refused in the way all bad input is; returns the message."""
    out = named.pop("output", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(kind, match=match) as caught:
        optimize(
            conv_net() if model is None else model,
            images(24) if calibration is None else calibration,
            **{"recipe": {"sparsity": 0.5, **QUICK}, "output": out, "measure_latency": False, **named},
        )
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    assert len(text) < 500
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    return text


# models


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def text_file(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_text("This is not a model, it is a letter.\n" * 20)
    return path


def empty(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.touch()
    return path


def truncated(folder: Path) -> Path:
    path = save(conv_net(), folder / "model.onnx")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def without_bin(folder: Path) -> Path:
    path = to_ir(plain_net(), folder / "model.xml")
    path.with_suffix(".bin").unlink()
    return path


def short_bin(folder: Path) -> Path:
    path = to_ir(plain_net(), folder / "model.xml")
    weights = path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-100])
    return path


def outside(location: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "models").mkdir()
        model = conv_net()
        (folder / "secret.bin").write_bytes(bytes(4096))
        tensor = next(value for value in model.graph.initializer if value.name == "w3")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        where = str(folder / "secret.bin") if location == "absolute" else location
        tensor.external_data.add(key="location", value=where)
        path = folder / "models" / "model.onnx"
        path.write_bytes(model.SerializeToString())
        if location == "link.bin":
            (folder / "models" / "link.bin").symlink_to(folder / "secret.bin")
        return path

    return make


def entities(folder: Path) -> Path:
    path = to_ir(plain_net(), folder / "model.xml")
    bomb = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition("?>")
    path.write_text(f"{head}?>{bomb}{rest}", encoding="utf-8")
    return path


def poisoned(value: float, where: str = "w3") -> Make:
    def make(folder: Path) -> Path:
        model = conv_net()
        tensor = next(entry for entry in model.graph.initializer if entry.name == where)
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[3] = value
        tensor.CopyFrom(numpy_helper.from_array(array, where))
        return save(model, folder / "model.onnx")

    return make


def poisoned_ir(folder: Path) -> Path:
    path = to_ir(plain_net(), folder / "model.xml")
    weights = path.with_suffix(".bin")
    values = np.frombuffer(weights.read_bytes(), np.float32).copy()
    values[int(np.argmax(np.abs(values) > 0.1))] = np.nan
    weights.write_bytes(values.tobytes())
    return path


def no_layer(folder: Path) -> Path:
    model = proto([node("Relu", ["x"], "r"), node("Flatten", ["r"], "y")], {}, ["n", 3, 8, 8])
    return save(model, folder / "model.onnx")


MODELS: dict[str, tuple[Make, str]] = {
    "missing": (lambda folder: folder / "none.onnx", "there is no such file or folder: check the path"),
    "text": (text_file, "is not an ONNX model"),
    "empty": (
        lambda folder: empty(folder),
        "is empty.*export or download",
    ),
    "other suffix": (
        lambda folder: text_file(folder).rename(folder / "model.doc"),
        "are not known: give an ONNX",
    ),
    "object": (lambda folder: {"weights": 1}, "an object of type dict is no model: give"),
    "folder": (lambda folder: folder, "is a folder without saved_model.pb"),
    "tflite": (
        lambda folder: text_file(folder).rename(folder / "model.tflite"),
        "is not a TFLite .*: export or download it again",
    ),
    "truncated": (truncated, "is truncated: export or copy the ONNX model again"),
    "IR without bin": (without_bin, "weights file model.bin is missing: put it beside"),
    "IR with short bin": (short_bin, "truncated or belongs to another model; copy or export both"),
    "data above the folder": (outside("../secret.bin"), "secret.bin"),
    "data at an absolute path": (outside("absolute"), "secret.bin"),
    "data behind a link": (outside("link.bin"), "link.bin"),
    "entities": (entities, "declares <!DOCTYPE>.*refused; export the model again"),
    "NaN": (poisoned(np.nan), "weight 'w3' holds 1 NaN or infinite values: repair it or export"),
    "infinity": (poisoned(np.inf, "w5"), "weight 'w5' holds 1 NaN or infinite values"),
    "NaN in BatchNorm": (poisoned(np.nan, "var"), "'var' holds 1 NaN or infinite values"),
    "NaN in IR": (poisoned_ir, "NaN or infinite values"),
    "no layer": (no_layer, "the model has no layer to compress"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path: Path, name: str) -> None:
    make, match = MODELS[name]
    refused(tmp_path, ModelError, match, make(tmp_path))


def test_external_data_says_what_to_do(tmp_path: Path) -> None:
    text = refused(tmp_path, ModelError, "folder", outside("../secret.bin")(tmp_path))
    assert "outside" in text or "own folder" in text


def test_ignoring_every_layer(tmp_path: Path) -> None:
    recipe = {**QUICK, "allocation": {"ignored_patterns": [".*"]}}
    refused(tmp_path, ModelError, "no layer to compress .* that is not ignored", recipe=recipe)


def test_onnxruntime_reads_no_ir(tmp_path: Path) -> None:
    path = to_ir(plain_net(), tmp_path / "model.xml")
    refused(tmp_path, UserError, "use --engine openvino", path, engine="onnxruntime")
    refused(tmp_path, UserError, "use --engine openvino", engine="onnxruntime", output_format="openvino")


# data


def picture_folder(folder: Path, *, broken: str) -> Path:
    target = folder / "images"
    target.mkdir()
    random = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(target / f"{index:02}.png")
    if broken == "not an image":
        (target / "05.png").write_text("no picture")
    elif broken == "cut off":
        data = (target / "05.png").read_bytes()
        (target / "05.png").write_bytes(data[:120])
    elif broken == "of another size":
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(target / "05.png")
    return target


def broken_code() -> list[object]:
    raise ZeroDivisionError("by zero\nsecond line")


CALIBRATIONS: dict[str, tuple[Make, str]] = {
    "missing": (lambda folder: folder / "none.npz", "no such file or folder"),
    "shape": (
        lambda folder: {"x": normal(0, 10, 3, 9, 8)},
        r"has shape .*takes .*: give arrays of that shape",
    ),
    "rank": (lambda folder: {"x": normal(0, 10, 3)}, "give arrays of that shape"),
    "type": (lambda folder: {"x": np.array(["a"] * 10)}, "give real numbers"),
    "complex": (lambda folder: {"x": np.ones((4, 3, 8, 8), complex)}, "give real numbers"),
    "key": (lambda folder: {"y": images(10)}, "has no key 'x' .*give one array per model input"),
    "empty": (lambda folder: images(0), "holds no samples"),
    "no samples": (lambda folder: [], "holds no samples.*give at least one"),
    "empty folder": (lambda folder: folder, "holds no images"),
    "NaN": (
        lambda folder: np.full((4, 3, 8, 8), np.nan, np.float32),
        "NaN or infinite values.*repair or remove it",
    ),
    "nothing": (lambda folder: lambda: None, "returned nothing: return an iterable"),
    "exception": (lambda folder: broken_code, "raised ZeroDivisionError: by zero; correct that code"),
    "number": (lambda folder: lambda: 3, "returned int: give an iterable of samples"),
    "not an image": (lambda folder: picture_folder(folder, broken="not an image"), "05.png"),
    "cut off": (lambda folder: picture_folder(folder, broken="cut off"), "05.png"),
    "of another size": (lambda folder: picture_folder(folder, broken="of another size"), "05.png.*9x9"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
@pytest.mark.parametrize("validated", [False, True])
def test_calibration(tmp_path: Path, name: str, validated: bool) -> None:
    make, match = CALIBRATIONS[name]
    named = {"validation": images(4, 2)} if validated else {}
    refused(tmp_path, DataError, match, None, make(tmp_path), **named)


def archive(folder: Path, arrays: dict[str, Any]) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"wrong": np.zeros((3, 3, 8, 8), np.float32)}, "expected the model's inputs x .*rename them"),
        ({"x": np.zeros((0, 3, 8, 8), np.float32)}, "holds no samples"),
        ({"x": np.zeros((5, 3, 8, 8), np.float32), "labels": np.arange(4)}, "5"),
        ({"images": np.zeros((5, 8, 8, 3), np.float32)}, "images are uint8"),
    ],
)
def test_archives(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    refused(tmp_path, DataError, match, None, archive(tmp_path, arrays))


def test_objects_in_an_archive_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.array([{"a": 1}], dtype=object))
    refused(tmp_path, DataError, "data.npz", None, tmp_path / "data.npz")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("no zip")
    refused(tmp_path, DataError, "data.npz", None, tmp_path / "data.npz")


def test_labels_of_another_length(tmp_path: Path) -> None:
    path = tmp_path / "labels.npz"
    np.savez(path, labels=np.arange(7) % 5)
    text = refused(tmp_path, DataError, "labels", validation=images(8, 1), validation_labels=path)
    assert "7" in text
    assert "8" in text


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    path = archive(tmp_path, {"x": images(6), "labels": np.full(6, 99)})
    refused(tmp_path, DataError, "99", validation=path)


def test_activations_beyond_float32(tmp_path: Path) -> None:
    refused(tmp_path, UserError, "NaN|finite", None, np.full((8, 3, 8, 8), 1e38, np.float32))


def test_fixed_batch_larger_than_the_data(tmp_path: Path) -> None:
    refused(tmp_path, UserError, "give at least one full batch", conv_net(batch=32))


# settings

RECIPES: dict[str, tuple[Any, str]] = {
    "above one": ({"sparsity": 1.01}, "recipe key 'sparsity': .*less than or equal to 1 .*1.01"),
    "below zero": ({"sparsity": -0.1}, "recipe key 'sparsity': .*greater than or equal to 0"),
    "no number": ({"sparsity": "half"}, "recipe key 'sparsity': .*number"),
    "NaN": ({"sparsity": float("nan")}, "recipe key 'sparsity'"),
    "key": ({"sparcity": 0.5}, "unknown recipe key 'sparcity'; did you mean 'sparsity'"),
    "nested key": (
        {"pruning": {"metod": "admm"}},
        "unknown recipe key 'pruning.metod'; did you mean 'pruning.method'",
    ),
    "method": ({"pruning": {"method": "admn"}}, "unknown pruning method 'admn'; did you mean 'admm'"),
    "allocation": ({"allocation": {"method": "lampp"}}, "did you mean 'lamp'"),
    "solver option": ({"pruning": {"options": {"roh": 1}}}, "pruning.options has no key 'roh'; it has .*rho"),
    "solver value": ({"pruning": {"options": {"rho": -1}}}, "rho must hold positive finite numbers"),
    "allocation option": ({"allocation": {"options": {"powr": 1.0}}}, "has no option 'powr'"),
    "out of reach": (
        {"sparsity": 0.9, "allocation": {"max_layer_sparsity": 0.5}},
        "raise max_layer_sparsity",
    ),
    "ignored name": ({"allocation": {"ignored_names": ["nope"]}}, "'nope' is not in the model"),
    "ignored pattern": ({"allocation": {"ignored_patterns": ["("]}}, "is not a regular expression"),
    "pattern": ({"pruning": {"pattern": "4:2"}}, "pattern '4:2' is not known: use"),
    "name": ("defualt", "cannot read recipe 'defualt'.*give a YAML file or one of default, .*pot"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(tmp_path: Path, name: str) -> None:
    recipe, match = RECIPES[name]
    refused(tmp_path, RecipeError, match, recipe=recipe)


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsity: [unclosed\n")
    refused(tmp_path, RecipeError, "is not valid YAML at line", recipe=path)
    path.write_text("- just\n- a list\n")
    refused(tmp_path, RecipeError, "must be a mapping", recipe=path)


def test_overrides() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'quantization\.preset'"):
        load_recipe(None, ["quantization.preste=mixed"])


def test_other_options(tmp_path: Path) -> None:
    refused(tmp_path, UserError, "engine 'tensorrt' is not known", engine="tensorrt")
    refused(tmp_path, UserError, "metric", metric="top7")
    refused(tmp_path, UserError, "threads must be at least 1", threads=-2)


def test_max_drop_without_anything_to_watch(tmp_path: Path) -> None:
    model = proto([node("Conv", ["x", "w"], "y")], {"w": normal(0, 4, 3, 3, 3)}, ["n", 3, 8, 8])
    recipe = {**QUICK, "schedule": {"max_drop": 1.0}}
    refused(
        tmp_path, RecipeError, "max_drop needs labels, or an output of class scores", model, recipe=recipe
    )


# the output folder


def test_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(tmp_path, OutputError, "is a file; give a folder")
    refused(tmp_path, OutputError, "is not writable; give another", output=tmp_path / "out" / "below")


def test_output_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(tmp_path, OutputError, "is not writable; give another with -o")


def test_output_holds_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    named: dict[str, Any] = {
        "recipe": {"sparsity": 0.5, **QUICK},
        "measure_latency": False,
        "baseline_int8": False,
    }
    optimize(plain_net(), images(12), output=out, **named)
    refused(tmp_path, OutputError, "already holds a run; use --resume to go on, --force to replace it")
    refused(tmp_path, OutputError, "finished: there is nothing to resume; use --force", resume=True)
    optimize(plain_net(), images(16), output=out, force=True, **named)
    assert (out / "model.onnx").is_file()


def test_output_holds_another_run(tmp_path: Path) -> None:
    class Stop(Silent):
        def advance(self, units: int = 1) -> None:
            if (tmp_path / "out" / "state").is_dir():
                raise KeyboardInterrupt

    recipe = validate_recipe({"sparsity": 0.5, **QUICK})
    with pytest.raises(KeyboardInterrupt):
        optimize(plain_net(), images(12), recipe=recipe, output=tmp_path / "out", progress=Stop())
    for model, samples, sparsity in (
        (conv_net(), images(12), 0.5),
        (plain_net(), images(13), 0.5),
        (plain_net(), images(12), 0.6),
    ):
        other = {"sparsity": sparsity, **QUICK}
        refused(
            tmp_path, OutputError, "another model, data, recipe", model, samples, recipe=other, resume=True
        )


class FullDisk:
    """Lets some files be put in their places, then no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
        self._left = files
        genuine = os.replace

        def replace(source: Any, target: Any) -> None:
            self._left -= 1
            if self._left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            genuine(source, target)

        monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("files", [0, 1, 4, 7, 10, 12, 13, 14])
def test_a_full_disk_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """Wherever it happens: one line, no partial file, and the run goes on once there is space."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    recipe = validate_recipe({"sparsity": 0.5, "quantization": {"enabled": False}})
    named: dict[str, Any] = {"recipe": recipe, "measure_latency": False, "threads": 1}
    with monkeypatch.context() as patch:
        FullDisk(patch, files)
        with pytest.raises(OutputError, match=r"No space left on device|the disk is full") as caught:
            optimize(plain_net(), images(16), output=out, **named)
    assert "\n" not in str(caught.value)
    left = (
        sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
        if out.exists()
        else []
    )
    assert not [name for name in left if "partial" in name or "tmp" in name.split("/")[-1]]
    assert "report.json" not in left
    written = (out / "model.onnx").read_bytes() if "model.onnx" in left else None
    assert (len(left) == 0) == (files == 0)
    optimize(plain_net(), images(16), output=out, resume=out.exists(), **named)
    optimize(plain_net(), images(16), output=whole, **named)
    assert (out / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert written in (None, (whole / "model.onnx").read_bytes())


def test_no_half_ir_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = to_ir(plain_net(), tmp_path / "net.xml")
    monkeypatch.setattr(ov, "save_model", full)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        optimize(path, images(12), recipe={**QUICK}, output=tmp_path / "out", measure_latency=False)
    names = {item.name for item in (tmp_path / "out").iterdir()}
    assert names <= {"state", "run.log"}
