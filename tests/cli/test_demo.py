"""The command line on the real pipeline: the demo, what users do with its result, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pot_sparsity.cli import DEMO_SPARSITY, main
from pot_sparsity.report.io import read_report
from pot_sparsity.report.schema import Variant

ASSETS = Path(str(resources.files("pot_sparsity.demo_assets")))
MODEL, CALIBRATION, VALIDATION = (
    str(ASSETS / name) for name in ("digits_cnn.onnx", "digits_calibration.npz", "digits_validation.npz")
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "pot-sparsity-demo"
    assert main(["demo", "-o", str(folder), "--quiet"]) == 0
    return folder


def zeros_of(path: Path) -> tuple[int, int]:
    """Zeros and size of all weights of two or more dimensions, float or INT8 ones."""
    weights = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    kernels = [w for w in weights if w.ndim >= 2 and w.size >= 300]
    return sum(int(np.count_nonzero(w == 0)) for w in kernels), sum(w.size for w in kernels)


def test_the_network_that_ships_is_as_good_as_it_says() -> None:
    facts = json.loads((ASSETS / "digits_cnn.json").read_text())
    assert facts["test_accuracy"] >= 97.0
    assert Path(MODEL).stat().st_size == facts["model_bytes"] < 500_000
    model = onnx.load(MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 5
    with np.load(CALIBRATION, allow_pickle=False) as data:
        assert list(data) == ["images"]
        assert data["images"].shape == (facts["calibration_images"], 8, 8, 1)
    with np.load(VALIDATION, allow_pickle=False) as data:
        assert data["labels"].shape == (facts["test_images"],)


def test_the_demo_keeps_its_promise(demo: Path) -> None:
    report = read_report(demo)
    variants: dict[str, Variant] = {variant.name: variant for variant in report.variants}
    assert list(variants) == ["dense", "dense_int8", "sparse", "sparse_int8"]
    facts = json.loads((ASSETS / "digits_cnn.json").read_text())
    assert variants["dense"].metrics["top1"] == pytest.approx(facts["test_accuracy"], abs=1e-3)
    assert variants["sparse"].metrics["top1"] >= facts["test_accuracy"] - 1.0
    assert variants["sparse_int8"].metrics["top1"] >= facts["test_accuracy"] - 1.0
    assert report.zeros == round(DEMO_SPARSITY * report.weights)
    compressed = [variants[name].compressed_bytes for name in ("sparse_int8", "dense_int8", "dense")]
    assert compressed == sorted(size for size in compressed if size is not None)
    for path in ("model.onnx", "float/model.onnx"):
        zeros, size = zeros_of(demo / path)
        assert zeros / size >= DEMO_SPARSITY - 1e-3
    assert {"recipe.yaml", "report.json", "report.html", "run.log"} <= {
        entry.name for entry in demo.iterdir()
    }


def test_the_result_validates_on_both_engines(demo: Path, capsys: Capture) -> None:
    found = {}
    for engine in ("openvino", "onnxruntime"):
        given = ["validate", str(demo / "model.onnx"), "--validation", VALIDATION, "--scale-values", "16"]
        assert main([*given, "--reference", MODEL, "--engine", engine, "--json", "-q"]) == 0
        found[engine] = json.loads(capsys.readouterr().out)
    reported = read_report(demo).variants[-1].metrics
    assert found["openvino"]["top1"] == pytest.approx(reported["top1"], abs=0.4)
    assert found["onnxruntime"]["top1"] == pytest.approx(reported["top1"], abs=0.7)
    assert found["onnxruntime"]["agreement"] >= 98.5


def test_inspect_the_network(capsys: Capture) -> None:
    assert main(["inspect", MODEL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = {layer["name"]: layer["weights"] for layer in found["layers"]}
    assert weights == {
        "stem/conv": 432,
        "block/1/conv": 20736,
        "block/2/conv": 20736,
        "depthwise/conv": 432,
        "pointwise/conv": 12288,
        "head/linear": 2560,
    }
    assert found["batchnorms_fusable"] == 5


def test_a_finished_run_is_not_overwritten(demo: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in demo.rglob("*") if path.is_file()}
    assert main(["optimize", MODEL, "-c", CALIBRATION, "--scale-values", "16", "-o", str(demo)]) == 2
    line = f"output folder {str(demo)!r} already holds a run; use --resume to go on, --force to replace it, "
    assert capsys.readouterr().err == f"error: {line}or another folder\n"
    assert {path: path.read_bytes() for path in demo.rglob("*") if path.is_file()} == before


def not_a_model(folder: Path) -> list[str]:
    (folder / "m.onnx").write_text("hello")
    return [str(folder / "m.onnx"), "-c", CALIBRATION]


def truncated_model(folder: Path) -> list[str]:
    (folder / "m.onnx").write_bytes(Path(MODEL).read_bytes()[:5000])
    return [str(folder / "m.onnx"), "-c", CALIBRATION]


def nan_weights(folder: Path) -> list[str]:
    model = onnx.load(MODEL)
    (tensor,) = (t for t in model.graph.initializer if t.name == "block/1/conv_weight")
    value = numpy_helper.to_array(tensor).copy()
    value[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, folder / "m.onnx")
    return [str(folder / "m.onnx"), "-c", CALIBRATION]


def no_data(folder: Path) -> list[str]:
    return [MODEL, "-c", str(folder / "none.npz")]


def wrong_size(folder: Path) -> list[str]:
    return [MODEL, "-c", CALIBRATION, "--resize", "9x9"]


def unknown_layer(folder: Path) -> list[str]:
    return [MODEL, "-c", CALIBRATION, "--ignored-name", "nope"]


def unknown_metric(folder: Path) -> list[str]:
    return [MODEL, "-c", CALIBRATION, "--metric", "top3"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (not_a_model, "is not an ONNX model"),
        (truncated_model, "is truncated"),
        (nan_weights, "NaN"),
        (no_data, "no such file or folder"),
        (wrong_size, "takes 8x8"),
        (unknown_layer, "ignored layer 'nope' is not in the model"),
        (unknown_metric, "metric 'top3' is not known"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    given: Callable[[Path], list[str]], words: str, tmp_path: Path, capsys: Capture
) -> None:
    arguments = given(tmp_path)
    output = tmp_path / "out"
    assert main(["optimize", *arguments, "-o", str(output), "-q"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not output.exists()
