"""The trade-off in one run: points as asked, files as documented, and any point can be written at once."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pot_sparsity.errors import AccuracyGateError, DataError, ModelError, OutputError, RecipeError, UserError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, Sweep, optimize, sweep
from pot_sparsity.pipeline.allocation.timings import Timings, read_timings
from pot_sparsity.pipeline.evaluate import Evaluator
from pot_sparsity.pipeline.store.database import Database
from pot_sparsity.pipeline.sweeping.sweep_points import ALL, choose, merged, read_asked
from pot_sparsity.recipe import load_recipe, validate_recipe
from pot_sparsity.report.sweep_io import SWEEP_FILES, read_sweep
from pot_sparsity.report.sweep_page import COLUMNS
from tests.pipeline.nets import conv_net, images, labelled, plain_net, run_openvino, transposed

#: A solver and levels of curves that cost next to nothing.
FAST: dict[str, Any] = {
    "pruning": {"method": "wanda_refit"},
    "allocation": {"levels": 3},
    "quantization": {"enabled": False},
}
POINTS = (0.8, 0.5)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over all allocations, with its folder's files."""
    folder = tmp_path_factory.mktemp("sweep")
    onnx.save(conv_net(), folder / "net.onnx")
    np.savez(folder / "calibration.npz", x=images(48))
    labelled(folder / "validation.npz", conv_net(), 60)
    sweep(
        folder / "net.onnx",
        folder / "calibration.npz",
        validation=folder / "validation.npz",
        recipe=FAST,
        points=POINTS,
        budget={"flops": [0.4]},
        output=folder / "out",
        threads=1,
    )
    return folder


def quick(**named: Any) -> Sweep:
    given: dict[str, Any] = {"recipe": FAST, "points": [0.5], "allocations": ["lamp"], "threads": 1, **named}
    return sweep(given.pop("model", None) or plain_net(), given.pop("calibration", images(40)), **given)


def write(folder: Path, **named: Any) -> Result:
    """A point of the finished sweep as a model."""
    return optimize(
        named.pop("model", folder / "net.onnx"),
        named.pop("calibration", folder / "calibration.npz"),
        from_sweep=folder / "out",
        **{"baseline_int8": False, "measure_latency": False, "threads": 1, **named},
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def zeros_in(model: Any) -> dict[str, int]:
    loaded = load_model(model)
    return {
        layer.name: int((read_weight(loaded, layer) == 0.0).sum())
        for layer in find_layers(loaded.graph).layers
    }


# the sweep


def test_every_allocation_at_every_point_from_dense_to_sparse(swept: Path) -> None:
    found = read_sweep(swept / "out")
    asked = ["0.50", "0.80", "flops=0.40"]
    assert [point.id for point in found.points] == [f"{name}@{text}" for name in ALL for text in asked]
    for point in found.points:
        assert point.zeros == sum(point.layers)
        assert point.sparsity == point.zeros / found.weights
        if point.budget == "sparsity":
            assert round(point.bound * found.weights) <= point.zeros
            assert point.sparsity <= point.bound + 0.02  # levels of a tiny network are coarse
        else:
            assert point.flops is not None
            assert point.flops <= point.bound
            assert point.flops >= point.bound - 0.06


def test_figures_are_those_of_the_model(swept: Path) -> None:
    found = read_sweep(swept / "out")
    with np.load(swept / "validation.npz", allow_pickle=False) as data:
        samples, labels = data["x"], data["labels"]
    dense = run_openvino(swept / "net.onnx", samples)
    assert found.dense.metrics["top1"] == 100.0
    written = write(swept, point="erk@0.50", recipe={"correction": {"differential": "never"}})
    outputs = run_openvino(written.sparse_model, samples)
    point = next(point for point in found.points if point.id == "erk@0.50")
    right = 100.0 * float((outputs.argmax(axis=1) == labels).mean())
    assert point.metrics["top1"] == pytest.approx(right)
    assert point.drop == pytest.approx(100.0 - right)
    error = float(((outputs - dense) ** 2).sum() / (dense**2).sum())
    assert point.relative_error == pytest.approx(error, rel=1e-3)
    layers = {layer.name: layer for layer in written.report.layers}
    operations = {name: layer.flops or 0 for name, layer in layers.items()}
    left = sum(operations[name] * (1.0 - layer.zeros / layer.weights) for name, layer in layers.items())
    assert point.flops == pytest.approx(left / sum(operations.values()))
    size = sum(
        min(4 * layer.weights, -(-layer.weights // 8) + 4 * (layer.weights - layer.zeros))
        for layer in layers.values()
    )
    assert point.size_bytes == size
    assert found.dense.size_bytes == 4 * found.weights
    assert point.size == pytest.approx(size / found.dense.size_bytes)


def test_files(swept: Path) -> None:
    out = swept / "out"
    top = sorted(path.name for path in out.iterdir())
    assert top == sorted([*SWEEP_FILES, "database", "run.log"])
    rows = list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))
    found = read_sweep(out)
    assert list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    assert {"top1", "agreement", "logit_kl", "sqnr"} <= rows[0].keys()
    assert [row["id"] for row in rows] == [point.id for point in found.points]
    assert [float(row["sparsity"]) for row in rows] == [point.sparsity for point in found.points]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "sweep.svg").read_bytes()
    assert "output_distortion@0.80" in (out / "sweep.html").read_text()
    assert found.database == "database"
    assert (found.correction, found.keep_structure, found.data.metric) == ("bias", False, "top1")


def test_layers_are_solved_once_for_all_points(
    swept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Database] = []
    monkeypatch.setattr(Database, "report", lambda self: seen.append(self))
    again = sweep(
        swept / "net.onnx",
        swept / "calibration.npz",
        validation=swept / "validation.npz",
        recipe=FAST,
        points=[0.5],
        allocations=["erk", "uniform"],
        database=swept / "out" / "database",
        output=tmp_path / "other",
        threads=1,
    )
    assert (seen[-1].hits > 0, seen[-1].misses) == (True, 0)
    first = {point.id: point for point in read_sweep(swept / "out").points}
    for point in again.points:
        assert point.model_copy(update={"seconds": 0.0}) == first[point.id].model_copy(
            update={"seconds": 0.0}
        )
    assert again.database == str((swept / "out" / "database").resolve())
    assert not (tmp_path / "other" / "database").exists()


def test_corrections() -> None:
    errors = {
        how: quick(correct=how, points=[0.7]).points[0].relative_error for how in ("none", "bias", "full")
    }
    assert errors["none"] is not None
    assert errors["bias"] is not None
    assert errors["full"] is not None
    assert errors["full"] <= errors["bias"] * 1.001 < errors["none"]


def test_existing_zeros_stay_and_outputs_that_are_no_scores() -> None:
    model = transposed()
    found = quick(model=model, points=[0.0, 0.5], allocations=["output_distortion", "uniform"])
    assert [point.zeros for point in found.points if point.bound == 0.0] == [0, 0]
    assert all(point.drop is None for point in found.points)
    assert found.database is None


def test_the_plot_and_its_figures_are_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        quick(output=tmp_path / name)
    for name in ("sweep.svg", "sweep.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# folders


def test_a_finished_sweep_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick(output=out)
    before = tree(out)
    with pytest.raises(OutputError, match="already holds a sweep; use --resume"):
        quick(output=out)
    with pytest.raises(OutputError, match="holds a sweep that is finished"):
        quick(output=out, resume=True)
    with pytest.raises(OutputError, match="holds no run"):
        optimize(plain_net(), images(40), recipe=FAST, output=out, force=True)
    assert tree(out) == before
    quick(output=out, force=True, points=[0.6])
    assert [point.id for point in read_sweep(out).points] == ["lamp@0.60"]
    kept = {name for name in before if name.startswith("database/")}
    assert kept <= tree(out).keys()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty and holds no sweep"):
        quick(output=tmp_path / "mine", force=True)


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "out", [0]
    run = Evaluator.__call__

    def stopping(self: Evaluator, model: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return run(self, model, **named)

    monkeypatch.setattr(Evaluator, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        quick(output=out, points=[0.5, 0.7, 0.9])
    assert not any((out / name).exists() for name in SWEEP_FILES)
    assert (out / "state").is_dir()
    found = quick(output=out, points=[0.5, 0.7, 0.9], resume=True)
    assert calls[0] == 4  # the first point was measured before
    assert [point.id for point in found.points] == ["lamp@0.50", "lamp@0.70", "lamp@0.90"]
    assert not (out / "state").exists()


def test_points_within_a_budget_of_latency(tmp_path: Path) -> None:
    onnx.save(plain_net(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calibration.npz", x=images(40))
    weights = {layer.name: layer.size for layer in find_layers(load_model(plain_net()).graph).layers}
    seconds = {name: 1e-3 * (index + 1) for index, name in enumerate(weights)}
    levels = {
        name: [{"level": i, "seconds": full * (0.3 + 0.7 * 0.9**i)} for i in range(30)]
        for name, full in seconds.items()
    }
    (tmp_path / "cpu.json").write_text(json.dumps({"base": 0.001, "layers": levels}))
    given = {"model": tmp_path / "net.onnx", "calibration": tmp_path / "calibration.npz"}
    found = quick(
        **given,
        points=[0.5],
        budget={"latency": [0.8, 0.6]},
        allocations=["lamp", "output_distortion"],
        timings=tmp_path / "cpu.json",
        output=tmp_path / "out",
    )
    dense = 0.001 + sum(seconds.values())
    assert found.dense.latency == pytest.approx(dense)
    asked = ["0.50", "latency=0.80", "latency=0.60"]
    assert [p.id for p in found.points] == [f"{n}@{a}" for n in ("lamp", "output_distortion") for a in asked]
    for point in found.points:
        names = [layer.name for layer in found.layers]
        density = {n: 1.0 - z / weights[n] for n, z in zip(names, point.layers, strict=True)}
        ladder = 0.9 ** np.arange(29, -1, -1.0)
        left = 0.001 + sum(
            seconds[n] * float(np.interp(density[n], ladder, 0.3 + 0.7 * ladder)) for n in weights
        )
        assert point.latency is not None
        assert point.latency == pytest.approx(left / dense, rel=1e-9)
        if point.budget == "latency":
            assert point.bound - 0.1 <= point.latency <= point.bound
    with (tmp_path / "out" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["latency"]) for row in rows] == [point.latency for point in found.points]
    best = choose(tmp_path / "out", {"latency": 0.6}).point
    assert best.id in ("lamp@latency=0.60", "output_distortion@latency=0.60")


def test_latency_is_measured_once_where_no_timings_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [layer.name for layer in find_layers(load_model(plain_net()).graph).layers]
    calls = []

    def measured(*given: Any, **named: Any) -> Timings:
        calls.append(1)
        return Timings(dict.fromkeys(names, ((1.0, 0.002), (0.1, 0.001))), 0.001)

    monkeypatch.setattr("pot_sparsity.pipeline.allocation.targets.measure_timings", measured)
    found = quick(points=[], budget={"latency": [0.9, 0.8]}, output=tmp_path / "out")
    assert len(calls) == 1
    assert all(point.latency is not None and point.latency <= point.bound for point in found.points)
    written = read_timings(tmp_path / "out" / "timings.json")
    assert written.layers == dict.fromkeys(names, ((1.0, 0.002), (0.1, 0.001)))
    again = quick(
        points=[],
        budget={"latency": [0.8]},
        timings=tmp_path / "out" / "timings.json",
        output=tmp_path / "again",
    )
    assert again.points[0].layers == found.points[1].layers
    assert not (tmp_path / "again" / "timings.json").exists()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"points": [1.5]}, "points must be sparsities from 0 to below 1, got 1.5"),
        ({"points": []}, "at least one point"),
        (
            {"budget": {"watts": [0.5]}},
            "a sweep has no budget 'watts': it has sparsity, flops, bops, size, latency",
        ),
        ({"budget": {"flops": [0.0]}}, "budget flops must be above 0"),
        ({"budget": {"size": [0.001]}}, "out of reach"),
        ({"allocations": ["lamb"]}, "allocation 'lamb' is not known: use one of output_distortion"),
        ({"timings": "cpu.json"}, "--timings goes with a budget of latency"),
        ({"budget": {"latency": [0.5]}, "timings": "cpu.json"}, "cannot read timings 'cpu.json'"),
        ({"grid": 1.0}, "the grid of densities"),
        ({"recipe": merged(FAST, {"mixed": {"enabled": True}})}, "about zeros, not about bits"),
        ({"recipe": merged(FAST, {"pruning": {"pattern": "2:4"}})}, "fixes the zeros of every layer"),
        ({"recipe": merged(FAST, {"allocation": {"rounds": "iterative"}})}, "measures curves once"),
        ({"recipe": merged(FAST, {"schedule": {"start": "model"}})}, "prunes the dense model"),
        ({"recipe": merged(FAST, {"allocation": {"max_layer_sparsity": 0.4}})}, "max_layer_sparsity"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(named: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        quick(output=tmp_path / "out", **named)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_points_are_sorted_and_named_by_what_they_are() -> None:
    asked = read_asked([0.9, 0.5, 0.9, 0.333], {"size": [0.25], "flops": [0.3, 0.5]})
    assert [str(each) for each in asked] == ["0.333", "0.50", "0.90", "flops=0.50", "flops=0.30", "size=0.25"]
    assert [str(each) for each in read_asked(None, None)] == ["0.30", "0.50", "0.60", "0.70", "0.80", "0.90"]


# from a point to a model


def test_a_point_is_written_with_its_zeros(swept: Path, tmp_path: Path) -> None:
    result = write(swept, point="output_distortion@0.80", output=tmp_path / "out")
    point = choose(swept / "out", "output_distortion@0.80").point
    found = read_sweep(swept / "out")
    asked = dict(zip([layer.name for layer in found.layers], point.layers, strict=True))
    assert zeros_in(tmp_path / "out" / "model.onnx") == asked
    assert {layer.name: layer.zeros for layer in result.report.layers} == asked
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (recipe.allocation.method, recipe.sparsity, recipe.pruning.method) == (
        "output_distortion",
        0.8,
        "wanda_refit",
    )
    assert (recipe.reconstruction.input, recipe.finish.activations) == ("dense", "never")
    assert recipe.finish.distillation == "never"
    before = next(variant for variant in result.report.variants if variant.name == "sparse").metrics
    assert (
        before["sqnr"] >= point.metrics["sqnr"] - 0.5
    )  # the walk is kept only where it helps on held-out samples


def test_its_layers_are_read_and_not_solved(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Database] = []
    monkeypatch.setattr(Database, "report", lambda self: seen.append(self))
    layers = len(read_sweep(swept / "out").layers)
    write(swept, point=1)
    assert (seen[-1].hits, seen[-1].misses) == (layers, 0)


def test_the_full_run_on_the_zeros_of_a_point(swept: Path) -> None:
    full = {"reconstruction": {"input": "sparse"}}
    result = write(swept, point="lamp@0.50", recipe=full)
    assert result.report.zeros == choose(swept / "out", "lamp@0.50").point.zeros
    assert any("sparse-input reconstruction" in decision.what for decision in result.report.decisions)
    given = validate_recipe({"sparsity": 0.1, "pruning": {"method": "admm"}, "schedule": {"max_drop": 2.0}})
    whole = choose(swept / "out", "lamp@0.50").settings(given)
    assert (whole.sparsity, whole.allocation.method, whole.schedule.kind) == (0.5, "lamp", "one_shot")
    assert (whole.pruning.method, whole.schedule.max_drop) == ("admm", 2.0)
    assert whole.reconstruction == given.reconstruction


@pytest.mark.parametrize(
    ("wanted", "best"),
    [
        (
            {"max_drop": 100.0},
            lambda points: max(points, key=lambda p: (round(p.sparsity, 2), -p.drop, -p.relative_error)),
        ),
        ({"sparsity": 0.8}, lambda points: min(points, key=lambda p: (p.drop, p.relative_error))),
        ({"flops": 0.4}, lambda points: min(points, key=lambda p: (p.drop, p.relative_error))),
    ],
)
def test_the_best_point_that_fulfils_what_is_wanted(
    wanted: dict[str, float], best: Callable[[list[Any]], Any], swept: Path
) -> None:
    points = [
        point
        for point in read_sweep(swept / "out").points
        if point.drop is not None
        and point.flops is not None
        and point.drop <= wanted.get("max_drop", 100.0)
        and point.sparsity >= wanted.get("sparsity", 0.0) - 0.001
        and point.flops <= wanted.get("flops", 1.0)
    ]
    assert choose(swept / "out", wanted).point == best(points)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        (None, "choose a point of the sweep with --point"),
        (
            "lamp@0.99",
            "the sweep has no point 'lamp@0.99'; it has output_distortion@0.50|0.80|flops=0.40, l2",
        ),
        (99, "the sweep has no point '99'"),
        ({"sparsity": 0.99}, "no point of the sweep fulfils sparsity 0.99; it has"),
        ({"latency": 0.5}, "no point of the sweep fulfils latency 0.5; it has"),
        ({"watts": 0.5}, "not chosen by 'watts'"),
    ],
)
def test_no_such_point(point: Any, words: str, swept: Path) -> None:
    with pytest.raises(UserError) as caught:
        choose(swept / "out", point)
    assert words in str(caught.value)


def test_a_point_for_another_model_or_other_samples_is_refused(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="about another model"):
        write(swept, model=plain_net(), point=1, output=tmp_path / "out")
    with pytest.raises(DataError, match="calibration samples differ"):
        write(swept, calibration=images(48, seed=3), point=1, output=tmp_path / "out")
    with pytest.raises(RecipeError, match="found with other layers: 'branch1'"):
        write(swept, point=1, output=tmp_path / "out", recipe={"allocation": {"ignored_names": ["branch1"]}})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read sweep"),
        ("{", "is not a sweep: it is not JSON"),
        ("[]", "is not a sweep of schema version 1"),
        ('{"schema_version": "2.0", "points": []}', "is not a sweep of schema version 1"),
        ('{"schema_version": "1.0", "points": []}', "is not a valid sweep: versions"),
    ],
)
def test_what_is_no_sweep(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError) as caught:
        choose(tmp_path, 1)
    assert words in str(caught.value)


def test_a_point_that_drops_too_far_is_not_written(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(AccuracyGateError, match=r"point uniform@0\.80 of the sweep: no iteration keeps"):
        write(
            swept,
            point="uniform@0.80",
            validation=swept / "validation.npz",
            recipe={"schedule": {"max_drop": 0.5}},
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_lost_database_is_built_again(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept / "out", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "database")
    data = json.loads((tmp_path / "moved" / "sweep.json").read_text())
    result = optimize(
        swept / "net.onnx",
        swept / "calibration.npz",
        from_sweep=tmp_path / "moved" / "sweep.json",
        point="uniform@0.50",
        baseline_int8=False,
        measure_latency=False,
    )
    point = next(point for point in data["points"] if point["id"] == "uniform@0.50")
    assert result.report.zeros == point["zeros"]
