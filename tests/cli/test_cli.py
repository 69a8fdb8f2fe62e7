"""The command line: what reaches the pipeline, what is printed where, and the exit codes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pot_sparsity.cli import DEMO_SPARSITY, main
from pot_sparsity.data.preprocess import Preprocess
from pot_sparsity.errors import AccuracyGateError, DataError, PotSparsityError
from pot_sparsity.recipe import Recipe, load_recipe
from pot_sparsity.report.io import read_report, write_report
from pot_sparsity.report.schema import Report

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tests" / "report" / "sample_report.json"

Capture = pytest.CaptureFixture[str]


class Calls:
    """Stands in for a function of the pipeline: remembers its arguments, then does what the test says."""

    def __init__(self, act: Callable[..., object]) -> None:
        self.positional: tuple[Any, ...] = ()
        self.named: Mapping[str, Any] = {}
        self._act = act

    def __call__(self, *positional: Any, **named: Any) -> object:
        self.positional, self.named = positional, named
        return self._act(**named)


def result(output: Path, **_: object) -> object:
    report = read_report(SAMPLE)
    return SimpleNamespace(report=report, folder=output, files=(output / "model.onnx",))


@pytest.fixture
def optimize(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(result)
    monkeypatch.setattr("pot_sparsity.pipeline.optimize", calls)
    return calls


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str = "optimize") -> None:
    def act(**_: object) -> object:
        raise error

    monkeypatch.setattr(f"pot_sparsity.pipeline.{name}", Calls(act))


def arguments(*more: str, output: str = "out") -> list[str]:
    return ["optimize", "m.onnx", "--calibration", "data.npz", "-o", output, *more]


def test_defaults_reach_the_pipeline(optimize: Calls, capsys: Capture) -> None:
    assert main(arguments()) == 0
    assert optimize.positional == ("m.onnx", "data.npz")
    named = dict(optimize.named)
    assert named.pop("recipe") == load_recipe("default")
    assert named.pop("preprocess") == Preprocess()
    assert named.pop("progress") is not None
    assert named == {
        "validation": None,
        "validation_labels": None,
        "validation_split": None,
        "metric": "top1",
        "engine": "openvino",
        "keep_structure": False,
        "output": Path("out"),
        "output_format": "same",
        "resume": False,
        "force": False,
        "database": None,
        "timings": None,
        "threads": None,
        "baseline_int8": True,
        "measure_latency": True,
        "from_sweep": None,
        "point": None,
    }
    captured = capsys.readouterr()
    assert "sparse INT8" in captured.out
    assert captured.out.splitlines()[-2:] == ["model:  out/model.onnx", "report: out/report.html"]
    assert captured.err == ""


def test_options_become_the_recipe(optimize: Calls) -> None:
    given = arguments(
        *("--sparsity", "0.7", "--pattern", "2:4", "--no-int8", "--max-drop", "1.5", "--samples", "20"),
        *("--seed", "3", "--augment", "flip,crop", "--augment-factor", "4", "--ignored-name", "a: b"),
        *("--ignored-name", "c", "--ignored-pattern", "^x", "--ignored-type", "MatMul"),
        *("--set", "pruning.method=magnitude", "--set", "calibration.batch_size=8"),
    )
    assert main(given) == 0
    recipe = cast(Recipe, optimize.named["recipe"])
    assert recipe.sparsity == 0.7
    assert recipe.pruning.pattern == "2:4"
    assert recipe.pruning.method == "magnitude"
    assert recipe.quantization.enabled is False
    assert recipe.schedule.max_drop == 1.5
    assert recipe.seed == 3
    assert recipe.calibration.samples == 20
    assert recipe.calibration.batch_size == 8
    assert recipe.calibration.augment == ("flip", "crop")
    assert recipe.calibration.augment_factor == 4
    assert recipe.allocation.ignored_names == ("a: b", "c")
    assert recipe.allocation.ignored_patterns == ("^x",)
    assert recipe.allocation.ignored_types == ("MatMul",)


def test_ignored_layers_are_added_to_those_of_the_recipe(optimize: Calls, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "allocation:\n  ignored_names: [first]\nquantization:\n  enabled: false\n"
    )
    assert main(arguments("--recipe", str(tmp_path / "r.yaml"), "--ignored-name", "second", "--int8")) == 0
    recipe = cast(Recipe, optimize.named["recipe"])
    assert recipe.allocation.ignored_names == ("first", "second")
    assert recipe.quantization.enabled is True


def test_set_wins_over_options_and_augment_defaults_to_ten(optimize: Calls) -> None:
    assert main(arguments("--sparsity", "0.7", "--set", "sparsity=0.2", "--augment", "flip")) == 0
    recipe = cast(Recipe, optimize.named["recipe"])
    assert recipe.sparsity == 0.2
    assert recipe.calibration.augment_factor == 10


def test_other_options_reach_the_pipeline(optimize: Calls) -> None:
    given = arguments(
        *(
            "--validation",
            "v",
            "--validation-labels",
            "l.csv",
            "--validation-split",
            "dev",
            "--metric",
            "top5",
        ),
        *(
            "--engine",
            "onnxruntime",
            "--threads",
            "2",
            "--format",
            "openvino",
            "--keep-structure",
            "--resume",
        ),
    )
    assert main(given) == 0
    named = optimize.named
    assert (named["validation"], named["validation_labels"], named["validation_split"]) == (
        "v",
        Path("l.csv"),
        "dev",
    )
    assert (named["metric"], named["engine"], named["threads"]) == ("top5", "onnxruntime", 2)
    assert (named["output_format"], named["keep_structure"], named["resume"]) == ("openvino", True, True)
    assert main(arguments("--force")) == 0
    assert (optimize.named["resume"], optimize.named["force"]) == (False, True)


@pytest.mark.parametrize(
    ("given", "dense_int8", "latency"),
    [
        (["--no-dense-int8"], False, True),
        (["--no-latency"], True, False),
        (["--no-dense-int8", "--no-latency"], False, False),
        (["--dense-int8", "--latency"], True, True),
    ],
)
def test_what_the_report_may_leave_out(
    given: list[str], dense_int8: bool, latency: bool, optimize: Calls
) -> None:
    assert main(arguments(*given)) == 0
    assert optimize.named["baseline_int8"] is dense_int8
    assert optimize.named["measure_latency"] is latency


def test_preprocessing_from_options_and_file(optimize: Calls, tmp_path: Path) -> None:
    options = [
        "--mean-values",
        "1,2,3",
        "--scale-values",
        "4",
        "--layout",
        "NCHW",
        "--reverse-input-channels",
    ]
    assert main(arguments(*options, "--resize", "shorter:256", "--center-crop", "224")) == 0
    expected = Preprocess(
        mean_values=(1, 2, 3),
        scale_values=(4,),
        layout="NCHW",
        reverse_input_channels=True,
        resize="shorter:256",
        center_crop="224",
    )
    assert optimize.named["preprocess"] == expected
    (tmp_path / "p.json").write_text('{"mean_values": [1, 2, 3], "resize": "32x32"}')
    assert main(arguments("--preprocess", str(tmp_path / "p.json"), "--resize", "8x8")) == 0
    assert optimize.named["preprocess"] == Preprocess(mean_values=(1, 2, 3), resize="8x8")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "Missing argument 'MODEL'"),
        (["m.onnx", "-o", "out"], "Missing option '--calibration' / '-c'"),
        (["--zzz"], "No such option: --zzz"),
    ],
)
def test_usage_errors(given: list[str], line: str, capsys: Capture) -> None:
    assert main(["optimize", *given]) == 2
    assert capsys.readouterr() == ("", f"error: {line}; see: pot-sparsity optimize --help\n")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--sparsity", "50"], "--sparsity must lie between 0 and 1 (0.5 is half of the weights), got 50"),
        (["--sparsity", "nan"], "--sparsity must lie between 0 and 1 (0.5 is half of the weights), got nan"),
        (["--max-drop", "-1"], "--max-drop must be 0 or more points of the metric, got -1"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (
            ["--augment-factor", "3"],
            "--augment-factor needs --augment: name the augmentations, e.g. --augment flip,crop",
        ),
        (["--set", "sparsty=1"], "unknown recipe key 'sparsty'; did you mean 'sparsity'?"),
        (["--set", "sparsity"], "--set 'sparsity' must look like key.path=value"),
        (
            ["--resume", "--force"],
            "--resume and --force exclude each other: go on with the old run, or replace it",
        ),
        (
            ["--resize", "big"],
            "preprocessing key 'resize': resize 'big' is not known: use 'HxW' (stretch), 'shorter:N' or "
            "'letterbox:N[,pad=114,anchor=topleft|center]'",
        ),
        (
            ["--preprocess", "none.json"],
            "cannot read preprocessing file 'none.json': No such file or directory",
        ),
    ],
)
def test_wrong_values(given: list[str], line: str, optimize: Calls, capsys: Capture) -> None:
    assert main(arguments(*given)) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
    assert not optimize.named


@pytest.mark.parametrize(
    "given", [["--engine", "torch"], ["--format", "pb"], ["--threads", "0"], ["--seed", "x"]]
)
def test_values_refused_by_their_type(given: list[str], capsys: Capture) -> None:
    assert main(arguments(*given)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: Invalid value for '{given[0]}'")
    assert len(captured.err.splitlines()) == 1


def test_unknown_command_names_the_nearest(capsys: Capture) -> None:
    assert main(["optimise", "m.onnx"]) == 2
    assert capsys.readouterr().err.startswith("error: No such command 'optimise'. Did you mean 'optimize'?")


def test_user_error_is_one_line_without_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fails_with(monkeypatch, DataError("image 'a\x1b[31m.png'\nis empty: remove it"))
    assert main(arguments()) == 2
    assert capsys.readouterr() == ("", "error: image 'a\\x1b[31m.png' is empty: remove it\n")


def test_gate_and_own_internal_error(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fails_with(monkeypatch, AccuracyGateError("top1 falls by 3.0 points, 1.0 allowed"))
    assert main(arguments()) == 3
    assert capsys.readouterr().err == "error: top1 falls by 3.0 points, 1.0 allowed\n"
    fails_with(monkeypatch, PotSparsityError("layer 'x' gives NaN"))
    assert main(arguments()) == 1
    assert capsys.readouterr().err == "error: layer 'x' gives NaN\n"


def test_unexpected_error_leaves_its_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    fails_with(monkeypatch, ZeroDivisionError("oh"))
    assert main(arguments(output=str(tmp_path))) == 1
    log = tmp_path / "run.log"
    line = f"error: internal error: ZeroDivisionError: oh; the traceback is in {log}\n"
    assert capsys.readouterr() == ("", line)
    assert log.read_text().count("Traceback") == 1
    assert main(arguments(output=str(tmp_path))) == 1
    assert log.read_text().count("Traceback") == 1


def test_unexpected_error_before_there_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    fails_with(monkeypatch, ZeroDivisionError("oh"))
    output = str(tmp_path / "new")
    assert main(arguments(output=output)) == 1
    line = "error: internal error: ZeroDivisionError: oh; run again with --verbose to see where\n"
    assert capsys.readouterr().err == line
    assert not Path(output).exists()
    assert main(arguments("--verbose", output=output)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    fails_with(monkeypatch, KeyboardInterrupt())
    assert main(arguments(output=str(tmp_path))) == 130
    assert capsys.readouterr().err == "interrupted.\n"
    (tmp_path / "state").mkdir()
    assert main(arguments(output=str(tmp_path))) == 130
    assert capsys.readouterr().err == "interrupted. Run again with --resume to go on.\n"


def test_progress_goes_to_stderr_unless_quiet(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def act(progress: Any, **named: Any) -> object:
        progress.start("collecting", 1)
        progress.advance()
        progress.finish()
        return result(**named)

    monkeypatch.setattr("pot_sparsity.pipeline.optimize", Calls(act))
    assert main(arguments()) == 0
    first = capsys.readouterr()
    assert first.err.startswith("collecting: 0.0")
    assert main(arguments("--quiet")) == 0
    assert capsys.readouterr() == (first.out, "")


def test_messages_go_to_stderr_and_tracebacks_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    logger = logging.getLogger("pot_sparsity.somewhere")

    def act(**named: Any) -> object:
        logger.info("a detail")
        logger.warning("mind [this]")
        try:
            raise ValueError("inside")
        except ValueError:
            logger.exception("the run failed")
        return result(**named)

    monkeypatch.setattr("pot_sparsity.pipeline.optimize", Calls(act))
    assert main(arguments()) == 0
    assert capsys.readouterr().err.split() == ["WARNING", "mind", "[this]"]
    assert main(arguments("--quiet")) == 0
    assert capsys.readouterr().err == ""
    assert main(arguments("--verbose")) == 0
    assert capsys.readouterr().err.split() == ["INFO", "a", "detail", "WARNING", "mind", "[this]"]


def test_validate(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    calls = Calls(lambda **_: {"top1": 91.5, "sqnr": 20.0})
    monkeypatch.setattr("pot_sparsity.pipeline.validate", calls)
    given = ["validate", "m.xml", "--validation", "v.npz", "--reference", "d.xml", "--scale-values", "255"]
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"top1": 91.5, "sqnr": 20.0}
    assert calls.positional == ("m.xml", "v.npz")
    assert calls.named["reference"] == "d.xml"
    assert calls.named["preprocess"] == Preprocess(scale_values=(255,))
    assert (calls.named["labels"], calls.named["split"], calls.named["metric"]) == (None, None, "top1")
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "top-1 %" in out
    assert "91.50" in out


def inspection() -> object:
    report = read_report(SAMPLE)
    return SimpleNamespace(
        model=report.model,
        layers=report.layers,
        skipped=report.skipped,
        not_fused=report.not_fused,
        batchnorms_fusable=2,
    )


def test_inspect(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("pot_sparsity.pipeline.inspect", lambda model: inspection())
    assert main(["inspect", "m.onnx"]) == 0
    out = capsys.readouterr().out
    assert "4 layers with 5,648 weights, 55.9 % zeros; 2 BatchNorms to fuse" in out
    assert "<script>alert(1)</script>" in out
    assert "both operands are activations" in out
    assert main(["inspect", "m.onnx", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sorted(data) == ["batchnorms_fusable", "layers", "model", "not_fused", "skipped"]
    assert [layer["weights"] for layer in data["layers"]] == [432, 4608, 288, 320]


def test_demo_runs_on_what_ships(optimize: Calls, capsys: Capture, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    model, calibration = (Path(path) for path in optimize.positional)
    assert model.is_file()
    assert calibration.is_file()
    assert Path(optimize.named["validation"]).is_file()
    assert optimize.named["recipe"].sparsity == DEMO_SPARSITY
    assert Preprocess.model_validate(optimize.named["preprocess"]).scale_values == (16.0,)
    assert optimize.named["output"] == Path("pot-sparsity-demo")
    assert optimize.named["force"] is True
    assert "report: pot-sparsity-demo/report.html" in capsys.readouterr().out


def test_demo_replaces_a_demo_and_nothing_else(optimize: Calls, capsys: Capture, tmp_path: Path) -> None:
    report: Report = read_report(SAMPLE)
    write_report(report, tmp_path)
    assert main(["demo", "-o", str(tmp_path)]) == 2
    refused = f"error: output folder {str(tmp_path)!r} holds something else; give another folder with -o\n"
    assert capsys.readouterr().err == refused
    assert not optimize.named
    report.model.file = "digits_cnn.onnx"
    write_report(report, tmp_path)
    assert main(["demo", "-o", str(tmp_path)]) == 0


def run(*given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pot_sparsity", *given]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.parametrize("command", [(), ("optimize",), ("sweep",), ("inspect",), ("validate",), ("demo",)])
def test_help(command: tuple[str, ...], capsys: Capture) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: pot-sparsity")
    assert not command or f"Examples:\n    pot-sparsity {command[0]}" in out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from pot_sparsity.cli import main; main(['optimize', '--help']); "
        "print([m for m in ('numpy', 'openvino', 'onnx', 'nncf', 'matplotlib') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_as_a_process() -> None:
    nothing = run()
    assert (nothing.returncode, nothing.stderr) == (0, "")
    assert "optimize" in nothing.stdout
    wrong = run("optimize", "no.onnx", "-c", "d", "-o", "o", "--set", "sparsty=1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: unknown recipe key 'sparsty'; did you mean 'sparsity'?\n"


def test_version(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pot_sparsity.cli.metadata.version", lambda name: "1.2.3")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "1.2.3\n"
