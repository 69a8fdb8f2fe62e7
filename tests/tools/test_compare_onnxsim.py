"""The comparison with onnxsim: its runs, the lines it keeps, the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.errors import UserError
from pot_sparsity.graph.load import load_model
from tests.pipeline.nets import conv_net, images, labelled, run_onnx
from tests.tools.loading import tool

compare = tool("compare_onnxsim")
jobs = tool("onnxsim_jobs")
tables = tool("onnxsim_tables")


def test_matmul_model_multiplies_with_the_weight() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 7))
    model = jobs.matmul_model(weight)
    rows = np.random.default_rng(1).standard_normal((5, 7)).astype(np.float32)
    np.testing.assert_allclose(run_onnx(model, rows), rows @ weight.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(jobs.pruned_weight(load_model(model)), weight.astype(np.float32))
    assert compare.reached_sparsity(load_model(jobs.matmul_model(np.array([[0.0, 1.0]])))) == 0.5


def test_calibration_rows_have_exactly_the_moment() -> None:
    inputs = np.random.default_rng(0).standard_normal((6, 40))
    second = 2 * inputs @ inputs.T / 40
    rows = jobs.rows_with_moment(second).astype(np.float64)
    np.testing.assert_allclose(2 * rows.T @ rows / len(rows), second, atol=1e-5)


FAKE = """
import sys, types, onnx, onnx.numpy_helper as nh
fake = types.ModuleType("onnxsim")
fake.__version__ = "fake"
fake.simplify = lambda model: (model, True)
def prune(model, sparsity, n, m, calibration_data):
    assert [b["x"].shape for b in calibration_data] == [(2, 4), (2, 4)] and (n, m) == (2, 4)
    weight = model.graph.initializer[0]
    value = nh.to_array(weight).copy()
    value[:2] = 0
    weight.CopyFrom(nh.from_array(value, weight.name))
    return model
fake.apply_wanda_pruning = prune
sys.modules["onnxsim"] = fake
"""


def interpreter(folder: Path, fake: str) -> Path:
    """A program that finds a stand-in for onnxsim before it runs the worker."""
    program = folder / "python"
    program.write_text(
        f"#!{sys.executable}\n{fake}\nimport runpy\nsys.argv = sys.argv[1:]\n"
        'runpy.run_path(sys.argv[0], run_name="__main__")\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program


def test_worker_prunes_with_the_samples_it_is_given(tmp_path: Path) -> None:
    weight = np.arange(1.0, 9.0).reshape(2, 4)
    source, output = tmp_path / "layer.onnx", tmp_path / "pruned.onnx"
    onnx.save(jobs.matmul_model(weight), source)
    program = interpreter(tmp_path, FAKE)
    samples = {"x": np.ones((5, 4), np.float32)}
    pattern = Pattern.parse("2:4")
    version, seconds = jobs.run_onnxsim(
        program, source, output, samples, "wanda", 0.5, pattern, batch=2, simplify=True
    )
    assert version == "fake"
    assert seconds >= 0
    np.testing.assert_array_equal(jobs.pruned_weight(load_model(output)), [[0, 0, 3, 4], [0, 0, 7, 8]])
    with pytest.raises(UserError, match="cannot be run"):
        jobs.run_onnxsim(
            tmp_path / "none", source, output, samples, "wanda", 0.5, pattern, batch=2, simplify=True
        )
    with pytest.raises(UserError, match=r"onnxsim's magnitude failed on layer\.onnx"):
        jobs.run_onnxsim(program, source, output, samples, "magnitude", 0.5, pattern, batch=2, simplify=True)


# Zeroes the first half of every weight.
HALF = """
import sys, types, onnx, onnx.numpy_helper as nh
fake = types.ModuleType("onnxsim")
fake.__version__ = "v0"
fake.simplify = lambda model: (model, True)
def prune(model, sparsity, n, m, calibration_data=None):
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            value = nh.to_array(tensor).copy()
            value.reshape(-1)[: round(sparsity * value.size)] = 0
            tensor.CopyFrom(nh.from_array(value, tensor.name))
    return model
fake.apply_wanda_pruning = fake.apply_sparsegpt_pruning = fake.apply_magnitude_pruning = prune
sys.modules["onnxsim"] = fake
"""


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    folder = tmp_path / "zoo"
    folder.mkdir()
    model = conv_net()
    onnx.save(model, folder / "net.onnx")
    np.savez(folder / "calib.npz", x=images(30))
    labelled(folder / "val.npz", model, 40)
    entry = {"model": "net.onnx", "calibration": "calib.npz", "validation": "val.npz"}
    (folder / "zoo.json").write_text(json.dumps({"net": entry}), encoding="utf-8")
    return folder


def test_a_network_is_measured_once(
    tmp_path: Path, zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "lines.jsonl"
    given = ["--zoo", str(zoo), "--entry", "net", "--images", "24", "--batch", "7", "--threads", "1"]
    given += ["--onnxsim-python", str(interpreter(tmp_path, HALF)), "--lines", str(lines)]
    assert compare.main([*given, "--sparsity", "0.5"]) == 0
    first = capsys.readouterr().out
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    methods = [
        "onnxsim magnitude",
        "onnxsim wanda",
        "onnxsim sparsegpt",
        "pot_sparsity",
        "pot_sparsity uniform",
    ]
    assert [record["method"] for record in records] == ["dense", *methods]
    assert records[0]["metrics"]["top1"] == 100.0
    assert all(record["images"] == 24 for record in records)
    assert all(record["reached"] == pytest.approx(0.5, abs=0.01) for record in records[1:])
    assert records[4]["metrics"]["top1"] > records[1]["metrics"]["top1"]

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(compare, "optimize", refuse)
        patch.setattr(compare, "run_onnxsim", refuse)
        patch.setattr(compare, "validate", refuse)
        assert compare.main([*given, "--sparsity", "0.5"]) == 0
        assert capsys.readouterr().out == first
        with pytest.raises(AssertionError, match="measured again"):
            compare.main([*given, "--sparsity", "0.6"])
    assert len(lines.read_text(encoding="utf-8").splitlines()) == 6


def test_all_samples_reach_onnxsim_in_full_batches(zoo: Path) -> None:
    arguments = compare.parse(
        ["--zoo", str(zoo), "--entry", "net", "--onnxsim-python", "x", "--images", "99", "--batch", "8"]
    )
    (network,) = compare.networks(arguments)
    assert len(network.samples) == 30
    assert network.batch == 6
    found = compare.all_samples(network.samples, network.batch)
    np.testing.assert_array_equal(found["x"], images(30))


def test_an_entry_that_is_not_there(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--onnxsim-python", "x", "--entry", "other", "--zoo"]
    assert compare.main([*given, str(zoo)]) == 2
    assert "--entry 'other' is not in" in capsys.readouterr().err
    assert compare.main([*given, str(zoo / "none")]) == 2
    assert "name the folder with --zoo" in capsys.readouterr().err


def record(model: str, method: str, top1: float, **named: Any) -> dict[str, Any]:
    return {"model": model, "method": method, "metrics": {"top1": top1}, "images": 1024, **named}


def test_tables_put_methods_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5}
    lines = [
        {"layer": "l", "pattern": "2:4", "sparsity": 0.5, "method": "admm", "relative_error": 0.01},
        record("net", "dense", 90.0),
        record("net", "a", 80.0, reached=0.50049, **shared),
        {**record("net", "b", 0.0, reached=0.25, **shared), "metrics": {"agreement": 0.8}},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n| a table |\n", encoding="utf-8")
    assert compare.main(["--render", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| layer | pattern | sparsity | admm |",
        "| --- | --- | --- | --- |",
        "| l | 2:4 | 0.5 | 0.01000 |",
        "",
        "| model | pattern | sparsity | dense | a | b |",
        "| --- | --- | --- | --- | --- | --- |",
        "| net | unstructured | 0.5 | 90.00 | 80.00 | - (25.0) |",
    ]


def test_section_of_the_page_names_version_samples_and_command() -> None:
    shared: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5, "reached": 0.5}
    lines = [
        record("net", "dense", 90.0),
        record("net", "onnxsim wanda", 80.0, version="v0.8.1", **shared),
        {**record("other", "dense", 70.0), "images": 500},
        record("strange", "dense", 70.0),
    ]
    section = tables.section(lines, ["net", "other"], "$ZOO")
    assert section[1] == "## onnxsim 0.8.1"
    assert "the same 1,024 or 500 pictures" in section[3]
    assert "| net | unstructured | 0.5 | 90.00 | 80.00 |" in section
    assert not [line for line in section if "strange" in line]
    assert section[-2].startswith(
        "python tools/compare_onnxsim.py --zoo $ZOO --entry net --entry other --images 1024 "
    )
    assert tables.section(lines, ["none"], "$ZOO") == []


def test_what_is_missing_on_the_command_line_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for given, text in (
        ([], "--onnxsim-python is needed"),
        (["--onnxsim-python", "x"], "nothing to compare"),
        (["--onnxsim-python", "x", "net.onnx"], "go with MODEL"),
        (["--onnxsim-python", "x", "--entry", "net"], "--entry needs --zoo"),
        (["--onnxsim-python", "x", "--shape", "8x9", "--pattern", "block:4"], "no blocks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            compare.parse(given)
        assert text in capsys.readouterr().err
