"""``pot-sparsity sweep`` and ``optimize --from-sweep`` on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
from onnx import numpy_helper

from pot_sparsity.cli import main
from pot_sparsity.data.preprocess import Preprocess
from pot_sparsity.pipeline.sweeping.sweep import GRID
from pot_sparsity.recipe import Recipe, load_recipe
from pot_sparsity.report.io import read_report
from pot_sparsity.report.sweep_io import read_sweep
from tests.pipeline.nets import plain_net

ASSETS = Path(str(resources.files("pot_sparsity.demo_assets")))
MODEL, CALIBRATION, VALIDATION = (
    str(ASSETS / name) for name in ("digits_cnn.onnx", "digits_calibration.npz", "digits_validation.npz")
)
DATA = ["-c", CALIBRATION, "--scale-values", "16"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    given = ["sweep", MODEL, *DATA, "--validation", VALIDATION, "--points", "0.8,0.5", "-o", str(out), "-q"]
    given += ["--allocation", "output_distortion", "--allocation", "uniform", "--grid", "0.9"]
    given += ["--set", "pruning.method=wanda_refit", "--set", "allocation.levels=3", "--no-int8"]
    assert main(given) == 0
    return out


def from_sweep(swept: Path, output: Path, *more: str) -> int:
    given = ["optimize", MODEL, *DATA, "--from-sweep", str(swept), "-o", str(output), "-q", "--no-latency"]
    return main([*given, *more])


def zeros_of(path: Path) -> int:
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return sum(int((weight == 0).sum()) for weight in weights if weight.ndim >= 2 and weight.size >= 300)


def test_the_digits_keep_their_accuracy_where_zeros_are_placed_well(swept: Path) -> None:
    found = read_sweep(swept)
    drops = {point.id: point.drop for point in found.points}
    assert list(drops) == [
        "output_distortion@0.50",
        "output_distortion@0.80",
        "uniform@0.50",
        "uniform@0.80",
    ]
    assert found.dense.metrics["top1"] >= 97.0
    assert cast(float, drops["output_distortion@0.50"]) <= 1.0
    assert cast(float, drops["output_distortion@0.80"]) < cast(float, drops["uniform@0.80"])


def test_what_is_printed(swept: Path, tmp_path: Path, capsys: Capture) -> None:
    given = ["sweep", MODEL, *DATA, "--points", "0.5", "--allocation", "uniform", "-o", str(tmp_path / "out")]
    given += ["--set", "pruning.method=magnitude", "--no-int8", "--correct", "none", "--verbose", "-q"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 point of 1 allocation, 57,184 weights; dense: agreement % 100.00")
    assert "@0.50" in out
    assert "uniform@0.50" in out
    assert f"plot:    {tmp_path / 'out' / 'sweep.html'}" in out


def test_the_point_is_written_as_it_stood(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert from_sweep(swept, out, "--point", "uniform@0.80") == 0
    point = next(point for point in read_sweep(swept).points if point.id == "uniform@0.80")
    report = read_report(out)
    assert report.zeros == point.zeros == zeros_of(out / "model.onnx")
    assert report.sparsity_asked == 0.8
    assert report.recipe["quantization"] == load_recipe(out / "recipe.yaml").quantization.model_dump(
        mode="json"
    )
    assert not load_recipe(out / "recipe.yaml").quantization.enabled


def test_the_sparsest_point_within_a_drop(swept: Path, tmp_path: Path, capsys: Capture) -> None:
    points = [point for point in read_sweep(swept).points if point.drop is not None and point.drop <= 1.0]
    best = max(points, key=lambda point: (round(point.sparsity, 2), -cast(float, point.drop)))
    out = tmp_path / "out"
    assert from_sweep(swept, out, "--max-drop", "1", "--validation", VALIDATION) == 0
    report = read_report(out)
    assert report.zeros == best.zeros
    assert load_recipe(out / "recipe.yaml").schedule.max_drop == 1.0
    assert [iteration.accepted for iteration in report.iterations] == [True]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "choose a point of the sweep with --point, --max-drop, --sparsity or --budget; it has output_d"),
        (
            ["--point", "lamp@0.50"],
            "the sweep has no point 'lamp@0.50'; it has output_distortion@0.50|0.80, unif",
        ),
        (["--sparsity", "0.95"], "no point of the sweep fulfils sparsity 0.95"),
        (["--budget", "flops=0.01"], "no point of the sweep fulfils flops 0.01"),
        (["--point", "1", "--sparsity", "0.5"], "--sparsity and --budget cannot change it"),
        (["--point", "1", "--recipe", "pot"], "change keys of it with --set, not with --recipe"),
        (["--point", "1", "--samples", "20"], "the calibration samples differ from the sweep's"),
        (["--point", "1", "--set", "sparsty=1"], "unknown recipe key 'sparsty'"),
    ],
)
def test_wrong_choices_are_one_line(
    more: list[str], words: str, swept: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert from_sweep(swept, tmp_path / "out", *more) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(swept: Path, tmp_path: Path, capsys: Capture) -> None:
    onnx.save(plain_net(), tmp_path / "other.onnx")
    onnx.save(_edited(), tmp_path / "edited.onnx")
    given = [*DATA, "--from-sweep", str(swept), "--point", "1", "-o", str(tmp_path / "out"), "-q"]
    assert main(["optimize", str(tmp_path / "edited.onnx"), *given]) == 2
    assert "the sweep is about another model (digits_cnn.onnx, SHA-256 " in capsys.readouterr().err
    assert main(["optimize", str(tmp_path / "other.onnx"), *given]) == 2
    assert not (tmp_path / "out").exists()


def _edited() -> onnx.ModelProto:
    """The network of the digits with one weight changed."""
    model = onnx.load(MODEL)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "block/1/conv_weight")
    value = numpy_helper.to_array(tensor).copy()
    value[0, 0, 0, 0] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


class Calls:
    """Stands in for the pipeline's function and remembers what it was given."""

    def __init__(self) -> None:
        self.named: Mapping[str, Any] = {}

    def __call__(self, model: str, calibration: str, **named: Any) -> None:
        self.named = {"model": model, "calibration": calibration, **named}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr("pot_sparsity.pipeline.sweep", found)
    monkeypatch.setattr("pot_sparsity.cli_sweep._show", lambda *_: None)
    return found


def test_options_reach_the_pipeline(calls: Calls) -> None:
    assert main(["sweep", "m.onnx", "-c", "data.npz", "-o", "out"]) == 0
    named = dict(calls.named)
    assert named.pop("recipe") == load_recipe("default")
    assert named.pop("preprocess") == Preprocess()
    assert named.pop("progress") is not None
    assert named == {
        "model": "m.onnx",
        "calibration": "data.npz",
        "validation": None,
        "validation_labels": None,
        "validation_split": None,
        "metric": "top1",
        "engine": "openvino",
        "keep_structure": False,
        "allocations": None,
        "points": None,
        "budget": {},
        "timings": None,
        "correct": "bias",
        "grid": GRID,
        "output": Path("out"),
        "resume": False,
        "force": False,
        "database": None,
        "threads": None,
    }
    more = [
        "--allocation",
        "lamp",
        "--allocation",
        "erk",
        "--points",
        "0.5,0.9",
        "--budget",
        "flops=0.5,0.25",
    ]
    more += [
        "--budget",
        "size=0.2",
        "--timings",
        "cpu.json",
        "--correct",
        "full",
        "--grid",
        "0.9",
        "--database",
        "d",
        "--pattern",
        "block:4",
    ]
    assert main(["sweep", "m.onnx", "-c", "data.npz", "-o", "out", *more]) == 0
    assert calls.named["allocations"] == ["lamp", "erk"]
    assert calls.named["points"] == [0.5, 0.9]
    assert calls.named["budget"] == {"flops": [0.5, 0.25], "size": [0.2]}
    assert calls.named["timings"] == Path("cpu.json")
    assert (calls.named["correct"], calls.named["grid"], calls.named["database"]) == ("full", 0.9, Path("d"))
    assert cast(Recipe, calls.named["recipe"]).pruning.pattern == "block:4"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--points", "0.5;0.9"], "--points needs numbers with commas between them, got '0.5;0.9'"),
        (["--budget", "flops"], "--budget 'flops' must look like flops=0.5,0.25"),
        (["--budget", "flops=x"], "--budget needs numbers with commas between them, got 'x'"),
        (
            ["--resume", "--force"],
            "--resume and --force exclude each other: go on with the old run, or replace it",
        ),
    ],
)
def test_wrong_values(more: list[str], line: str, calls: Calls, capsys: Capture) -> None:
    assert main(["sweep", "m.onnx", "-c", "data.npz", "-o", "out", *more]) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
    assert not calls.named


def test_point_needs_a_sweep(capsys: Capture) -> None:
    assert main(["optimize", "m.onnx", "-c", "d.npz", "-o", "out", "--point", "lamp@0.50"]) == 2
    assert "--point is a point of a sweep: name its folder with --from-sweep" in capsys.readouterr().err


def test_help_shows_how_to_go_on(capsys: Capture) -> None:
    assert main(["sweep", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:\n    pot-sparsity sweep model.onnx" in out
    assert "--from-sweep trade-off --max-drop 1" in out
    assert main(["optimize", "--help"]) == 0
    assert "--from-sweep SWEEP" in capsys.readouterr().out
