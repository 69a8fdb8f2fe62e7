"""Timings: read from files, measured here, and budgets of latency that count in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest

from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.allocation import timings
from pot_sparsity.pipeline.allocation.timings import (
    DENSITIES,
    Timings,
    latency_costs,
    measure_timings,
    parse_timings,
    read_timings,
)
from pot_sparsity.pipeline.solve import DenseLayer, read_dense
from pot_sparsity.recipe import Recipe, validate_recipe
from tests.pipeline.nets import QUICK, conv_net, dataset, images, normal, plain_net, shared_net, to_ir

SIZES = {"conv1": 216, "branch1": 64, "branch2": 576, "depthwise": 72, "y": 40}


def recipe(budget: dict[str, float], method: str = "output_distortion", **sections: Any) -> Recipe:
    return validate_recipe(
        {
            **QUICK,
            "pruning": {"method": "wanda_refit"},
            "reconstruction": {"input": "dense"},
            "correction": {"differential": "never", "normalization": "never"},
            "finish": {"activations": "never", "distillation": "never"},
            "budget": budget,
            "allocation": {"method": method, "levels": 3, "samples": 24},
            **sections,
        }
    )


def run(settings: Recipe, output: Path | None = None, **named: Any) -> Any:
    named = {
        "engine": "onnxruntime" if "timings" in named else "openvino",
        "baseline_int8": False,
        "measure_latency": False,
        "threads": 1,
        **named,
    }
    return optimize(conv_net(), images(32), recipe=settings, output=output, **named).report


def seconds_of(levels: int = 30) -> dict[str, list[dict[str, float]]]:
    """Optimal Brain Compression's levels: each removes a tenth of what is left; time falls with density."""
    full = {"conv1": 3.0, "branch1": 1.0, "branch2": 6.0, "depthwise": 1.5, "y": 0.5}
    return {
        name: [{"level": i, "seconds": 1e-3 * value * (0.2 + 0.8 * 0.9**i)} for i in range(levels)]
        for name, value in full.items()
    }


def file_of(folder: Path, **content: Any) -> Path:
    path = folder / "timings.json"
    path.write_text(json.dumps({"base": 0.001, "layers": seconds_of(), **content}))
    return path


def by_hand(zeros: dict[str, int], levels: int = 30) -> float:
    """What remains of the time, interpolated between levels by hand."""
    total, dense = 0.001, 0.001
    for name, entries in seconds_of(levels).items():
        densities = [0.9 ** entry["level"] for entry in entries]
        values = [entry["seconds"] for entry in entries]
        total += float(np.interp(1 - zeros[name] / SIZES[name], densities[::-1], values[::-1]))
        dense += values[0]
    return total / dense


# from a file


@pytest.mark.parametrize("method", ["output_distortion", "erk"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4"])
def test_a_latency_budget_counts_in_the_timings_given(method: str, pattern: str, tmp_path: Path) -> None:
    settings = recipe({"latency": 0.6}, method, pruning={"method": "wanda_refit", "pattern": pattern})
    report = run(settings, timings=file_of(tmp_path))
    zeros = {layer.name: layer.zeros for layer in report.layers}
    (entry,) = report.budgets
    assert entry.reached == pytest.approx(by_hand(zeros), rel=1e-9)
    assert 0.55 < entry.reached <= 0.6
    assert entry.dense == pytest.approx(0.013)
    assert entry.unit == "seconds"


def test_latency_goes_with_other_budgets(tmp_path: Path) -> None:
    report = run(recipe({"latency": 0.8, "flops": 0.4}), timings=str(file_of(tmp_path)))
    assert {entry.kind for entry in report.budgets} == {"flops", "latency"}
    for entry in report.budgets:
        assert entry.reached <= entry.asked + 1e-12


def test_more_than_the_last_level_brings_is_out_of_reach(tmp_path: Path) -> None:
    path = file_of(tmp_path, layers=seconds_of(8))
    least = by_hand(SIZES, 8)
    text = rf"latency=0.3 is out of reach: at least {np.ceil(least * 1e4) / 1e4:g} of the dense model's time remains"
    with pytest.raises(RecipeError, match=text):
        run(recipe({"latency": 0.3}), tmp_path / "out", timings=path)
    assert not (tmp_path / "out").exists()


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        "base: 0.25\nratio: 0.5\nlayers:\n"
        "  a: [{density: 0.25, seconds: 1}, {density: 1, seconds: 4}]\n"
        "  b:\n  - {level: 2, seconds: 1}\n  - {level: 0, seconds: 4}\n"
    )
    found = read_timings(path)
    assert found == Timings({"a": ((1.0, 4.0), (0.25, 1.0)), "b": ((1.0, 4.0), (0.25, 1.0))}, 0.25)
    assert parse_timings(found.dump()) == found


def layers_of(native: Any) -> tuple[Model, list[DenseLayer]]:
    model = load_model(native)
    return model, read_dense(model, find_layers(model.graph).layers)


def test_seconds_that_rise_with_zeros_are_evened_out() -> None:
    _, dense = layers_of(plain_net())
    names = [item.layer.name for item in dense]
    levels = ((1.0, 4.0), (0.5, 1.0), (0.25, 3.0), (0.0, 1.0))
    costs = latency_costs(Timings(dict.fromkeys(names, levels), 2.0), dense)
    table, size = costs.tables["latency"][names[0]], dense[0].layer.size
    assert [table.cost(round(part * size)) for part in (0.0, 0.5, 1.0)] == [4.0, 2.0, 1.0]
    assert costs.dense["latency"] == 2.0 + 4.0 * len(names)
    assert costs.fraction("latency", {item.layer.name: item.layer.size for item in dense}) == pytest.approx(
        (2.0 + len(names)) / (2.0 + 4.0 * len(names))
    )


def test_layers_and_timings_must_agree() -> None:
    _, dense = layers_of(conv_net())
    whole = dict.fromkeys(SIZES, ((1.0, 1.0),))
    with pytest.raises(RecipeError, match=r"no layer 'conv' that takes part; did you mean 'conv1'\?"):
        latency_costs(Timings({**whole, "conv": ((1.0, 1.0),)}), dense)
    del whole["branch2"]
    with pytest.raises(RecipeError, match="1 layers have none, 'branch2' first"):
        latency_costs(Timings(whole), dense)
    with pytest.raises(RecipeError, match="all of them are zero"):
        latency_costs(Timings(dict.fromkeys(SIZES, ((1.0, 0.0),))), dense)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("layers: [", "not valid JSON or YAML at line"),
        ("seconds", "the file: Input should be a valid dictionary"),
        ("{}", "layers: Field required"),
        ("layers: {}", "layers: Dictionary should have at least 1 item"),
        ("layers: {a: [{density: 1}]}", "layers.a.0.seconds: Field required"),
        ("layers: {a: [{density: 1, seconds: -1}]}", "layers.a.0.seconds: Input should be greater"),
        ("layers: {a: [{density: 1, seconds: .inf}]}", "layers.a.0.seconds: Input should be a finite number"),
        ("layers: {a: [{density: 1.5, seconds: 1}]}", "layers.a.0.density: Input should be less"),
        ("layers: {a: [{seconds: 1}]}", "layer 'a': every level needs either 'density' or 'level'"),
        ("layers: {a: [{density: 1, level: 0, seconds: 1}]}", "every level needs either"),
        ("layers: {a: [{density: 1, seconds: 1}, {level: 0, seconds: 1}]}", "density 1 stands there twice"),
        ("layers: {a: [{density: 0.5, seconds: 1}]}", "seconds of the dense layer"),
        ("layers: {a: [{density: 1, seconds: 1}]}\nbass: 1", "bass: Extra inputs"),
        ("base: -1\nlayers: {a: [{density: 1, seconds: 1}]}", "base: Input should be greater"),
        ("!!python/object/apply:os.system ['true']", "not valid JSON or YAML"),
    ],
)
def test_files_that_make_no_sense_are_refused(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "timings.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=match) as caught:
        read_timings(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"timings '{path}'")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read timings .*: No such file"):
        read_timings(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="not a text file"):
        read_timings(tmp_path / "binary")


def test_timings_without_a_budget_of_latency_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--timings goes with a budget of latency"):
        run(recipe({"flops": 0.5}), timings=file_of(tmp_path))


# measured


def samples(model: Model, count: int = 3) -> Dataset:
    shape = model.inputs[0].shape
    assert shape is not None
    return dataset(model, images(count) if len(shape) == 4 else normal(9, count, int(shape[1] or 1)))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("net", [conv_net, lambda: conv_net(2), shared_net])
def test_every_layer_is_timed(engine: Literal["openvino", "onnxruntime"], net: Any) -> None:
    model, dense = layers_of(net())
    found = measure_timings(model, dense, samples(model), get_engine(engine, 1), recipe({}), threads=1)
    assert list(found.layers) == [item.layer.name for item in dense]
    for levels in found.layers.values():
        assert [density for density, _ in levels] == list(DENSITIES)
        seconds = [value for _, value in levels]
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[-1] >= 0.0
    costs = latency_costs(found, dense)
    assert 0.0 < costs.dense["latency"] < 1.0


def test_ir_is_timed_by_its_own_names(tmp_path: Path) -> None:
    model, dense = layers_of(to_ir(conv_net(), tmp_path / "m.xml"))
    found = measure_timings(model, dense, samples(model), get_engine("openvino", 1), recipe({}), threads=1)
    assert list(found.layers) == [item.layer.name for item in dense]


class _Counted:
    """Stands in for a model with counters: time goes with the density of what it was given."""

    def __init__(self, runnable: Any, threads: int) -> None:
        self._density = density_of(runnable)

    def run(self, feeds: Any, runs: int) -> dict[tuple[str, ...], float]:
        counted: dict[tuple[str, ...], float] = {(): 0.002, ("relu2", "residual"): 0.003}
        for name, size in SIZES.items():
            counted[name, f"{name}/fused"] = size * self._density * 1e-4
        return counted


def density_of(runnable: Any) -> float:
    _, layers = layers_of(onnx.load_from_string(runnable.model))
    kept = sum(int(np.count_nonzero(item.weight)) for item in layers)
    return kept / sum(item.weight.size for item in layers)


def test_counters_are_given_to_the_layers_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "CountedModel", _Counted)
    model, dense = layers_of(conv_net())
    found = measure_timings(model, dense, samples(model), get_engine("openvino", 1), recipe({}), threads=1)
    for name, levels in found.layers.items():
        expected = [SIZES[name] * density * 1e-4 for density in DENSITIES]
        assert [seconds for _, seconds in levels] == pytest.approx(expected, rel=0.02)


def test_gains_within_the_noise_count_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(_Counted):
        def run(self, feeds: Any, runs: int) -> dict[tuple[str, ...], float]:
            return {(name,): 1e-3 * (0.95 + 0.05 * self._density) for name in SIZES}

    monkeypatch.setattr(timings, "CountedModel", Noisy)
    model, dense = layers_of(conv_net())
    found = measure_timings(model, dense, samples(model), get_engine("openvino", 1), recipe({}), threads=1)
    assert all({seconds for _, seconds in levels} == {1e-3} for levels in found.layers.values())


def test_gains_that_come_and_go_count_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Jumpy(_Counted):
        turn = 0

        def run(self, feeds: Any, runs: int) -> dict[tuple[str, ...], float]:
            self.turn += 1
            sparse = 1.2 if self.turn % 2 else 0.5
            return {(name,): 1e-3 * (sparse if self._density < 1.0 else 1.0) for name in SIZES}

    monkeypatch.setattr(timings, "CountedModel", Jumpy)
    model, dense = layers_of(conv_net())
    found = measure_timings(model, dense, samples(model), get_engine("openvino", 1), recipe({}), threads=1)
    assert all({seconds for _, seconds in levels} == {1e-3} for levels in found.layers.values())


def test_a_machine_where_zeros_bring_no_time_refuses_the_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Flat(_Counted):
        def run(self, feeds: Any, runs: int) -> dict[tuple[str, ...], float]:
            return {(name,): 1e-3 for name in SIZES}

    monkeypatch.setattr(timings, "CountedModel", Flat)
    with pytest.raises(
        RecipeError, match=r"at least 1 of the dense model's time remains, a speed-up of 1.00"
    ):
        run(recipe({"latency": 0.9}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_measured_timings_are_written_and_can_be_given_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timings, "CountedModel", _Counted)
    first = run(recipe({"latency": 0.5}, "uniform"), tmp_path / "one")
    monkeypatch.undo()
    second = run(
        recipe({"latency": 0.5}, "uniform"), tmp_path / "two", timings=tmp_path / "one" / "timings.json"
    )
    assert first.budgets == second.budgets
    assert [layer.zeros for layer in first.layers] == [layer.zeros for layer in second.layers]
    assert not (tmp_path / "two" / "timings.json").exists()


def test_a_resumed_run_uses_what_it_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timings, "CountedModel", _Counted)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pot_sparsity.pipeline.compress.prune_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe({"latency": 0.5}, "uniform"), tmp_path / "out")
    written = (tmp_path / "out" / "timings.json").read_bytes()
    monkeypatch.setattr("pot_sparsity.pipeline.allocation.targets.measure_timings", stop)
    report = run(recipe({"latency": 0.5}, "uniform"), tmp_path / "out", resume=True)
    assert report.budgets[0].reached <= 0.5
    assert (tmp_path / "out" / "timings.json").read_bytes() == written
