"""The page of results: its experiments, the cache, the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pot_sparsity.algorithms.allocation import ALLOCATIONS
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.cli_options import build_recipe
from pot_sparsity.recipe import load_recipe
from tests.tools.loading import TOOLS, tool

sections = tool("results_sections")
pages = tool("results_page")
make = tool("make_results")

ENTRY = {"model": "net.onnx", "calibration": "calib", "validation": "val", "labels": "labels.csv"}
ZOO = {experiment.entry: ENTRY for experiment in sections.experiments()}
REPORT = TOOLS.parent / "tests" / "report" / "sample_report.json"


def combinations() -> list[Any]:
    return [section for section in sections.SECTIONS if section.title.startswith("Methods, patterns")]


def recipe_of(experiment: Any) -> Any:
    """What the command line makes of the command."""
    given = iter(experiment.arguments(ZOO))
    options: dict[str, Any] = {"source": None, "settings": []}
    for word in given:
        if word == "--recipe":
            options["source"] = next(given)
        elif word == "--sparsity":
            options["sparsity"] = float(next(given))
        elif word == "--budget":
            options["budget"] = [next(given)]
        elif word == "--pattern":
            options["pattern"] = next(given)
        elif word == "--set":
            options["settings"].append(next(given))
    return build_recipe(options.pop("source"), options.pop("settings"), **options)


def test_names_are_unique_and_every_recipe_is_valid() -> None:
    everything = sections.experiments()
    assert len({experiment.name for experiment in everything}) == len(everything)
    for experiment in everything:
        recipe = recipe_of(experiment)
        if experiment.flops is None:
            assert (recipe.sparsity, recipe.budget) == (experiment.percent / 100, {})
        else:
            assert recipe.budget == {"flops": float(experiment.flops)}


@pytest.mark.parametrize("section", combinations(), ids=lambda section: section.title.split()[-1])
def test_methods_patterns_and_bits_are_all_there(section: Any) -> None:
    found = set()
    for experiment in section.experiments:
        recipe = recipe_of(experiment)
        weights = (recipe.quantization.weights, recipe.quantization.weight_bits)
        row = tuple(column.cell(experiment) for column in section.columns)
        assert row == (
            f"`{recipe.pruning.method}`",
            recipe.pruning.pattern,
            f"{weights[0]}, {weights[1]} bits",
        )
        found.add((recipe.pruning.method, recipe.pruning.pattern, *weights))
    assert len(found) == len(section.experiments)
    assert {(name, "unstructured", "nncf", 8) for name in SOLVERS} <= found
    for pattern in ("2:4", "block:4"):
        assert {(name, pattern, "nncf", 8) for name in ("admm", "exact_obs")} <= found
    for bits in (8, 4):
        assert {("admm", pattern, "obq", bits) for pattern in ("unstructured", "2:4")} <= found
    allocations = {recipe_of(experiment).allocation.method for experiment in section.experiments}
    assert allocations == {"l2_normalized_magnitude"}


def test_steps_are_switched_on_one_after_the_other() -> None:
    (section,) = (section for section in sections.SECTIONS if section.title.startswith("What each step"))
    recipes = [recipe_of(e) for e in section.experiments]
    assert len({recipe.dump() for recipe in recipes}) == len(recipes)
    first, last = recipes[0], recipes[-1]
    assert (first.pruning.method, first.reconstruction.input) == ("magnitude", "dense")
    assert (first.correction.differential, first.finish.activations) == ("never", "never")
    assert [recipe.finish.distillation for recipe in recipes] == ["never"] * (len(recipes) - 1) + ["helps"]
    assert last == load_recipe(None, ["sparsity=0.9"])


def test_allocations_are_compared_with_all_else_equal() -> None:
    (section,) = (section for section in sections.SECTIONS if section.title == "Allocations")
    recipes = [recipe_of(experiment) for experiment in section.experiments]
    for percent in (70, 80, 90):
        compared = [recipe for recipe in recipes if recipe.sparsity == percent / 100]
        assert {recipe.allocation.method for recipe in compared} == {*ALLOCATIONS, "output_distortion"}
        others = {recipe.model_copy(update={"allocation": None}).model_dump_json() for recipe in compared}
        assert len(others) == 1


def test_commands_can_be_typed() -> None:
    experiment = sections.Experiment("net", 50, None, ("pruning.method=wanda",), "2:4")
    assert experiment.name == "net/50/2:4/pruning.method=wanda"
    assert sections.command(experiment, {"net": ENTRY}) == (
        "pot-sparsity optimize $ZOO/net.onnx --calibration $ZOO/calib --validation $ZOO/val "
        "--validation-labels $ZOO/labels.csv --validation-split dev --sparsity 0.5 --pattern 2:4 "
        "--set pruning.method=wanda -o out"
    )


def test_preprocessing_becomes_options() -> None:
    found = sections.preprocess_arguments(
        {"mean_values": [1, 2, 3], "layout": "NHWC", "reverse_input_channels": True, "center_crop": 8}
    )
    assert found == ["--mean-values", "1,2,3", "--reverse-input-channels", "--center-crop", "8"]


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, Any]:
    """A cache with the first two rows of a compact table, one line of a command of old, and a zoo."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    (tmp_path / "zoo.json").write_text(json.dumps(ZOO), encoding="utf-8")
    first, second, third = combinations()[0].experiments[:3]
    lines = [{"name": e.name, "command": sections.command(e, ZOO), "report": report} for e in (first, second)]
    lines.append({"name": third.name, "command": "another command", "report": report})
    cache = tmp_path / "cache.jsonl"
    cache.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {"cache": cache, "first": first, "report": report}


def test_the_page_shows_what_is_in_the_cache(
    tmp_path: Path,
    cached: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, onnxsim = tmp_path / "results.md", tmp_path / "onnxsim.jsonl"
    line = {"model": cached["first"].entry, "method": "dense", "images": 9, "metrics": {"top1": 12.5}}
    shared = {"pattern": "unstructured", "sparsity": 0.5, "reached": 0.5, "method": "pot_sparsity"}
    onnxsim.write_text(f"{json.dumps(line)}\n{json.dumps(line | shared)}\n", encoding="utf-8")
    given = ["make_results.py", "--zoo", str(tmp_path), "--cache", str(cached["cache"]), "--render-only"]
    monkeypatch.setattr(
        "sys.argv", [*given, "--output", str(output), "--onnxsim", str(onnxsim), "--note", "By moonlight."]
    )
    assert make.main() == 0
    assert "not in the cache: " in capsys.readouterr().err
    text = output.read_text(encoding="utf-8")
    assert "\nBy moonlight.\n" in text.partition("\n## ")[0]
    title = combinations()[0].title
    table = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    variants = {variant["name"]: variant for variant in cached["report"]["variants"]}
    metric = cached["report"]["data"]["metric"]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    assert [row.split(" | ")[0] for row in rows] == ["| `pruning.method`", "| `admm`", "| `exact_obs`"]
    for name in ("sparse", "sparse_int8"):
        assert f"| {variants[name]['metrics'][metric]:.2f}" in rows[1]
    found = 100.0 * 10.0 ** (-variants["sparse"]["metrics"]["sqnr"] / 10.0)
    assert "| error % |" in table
    assert f"| {found:.2f} |" in rows[1]
    assert f"For comparison: dense {variants['dense']['metrics'][metric]:.2f}" in table
    assert table.count("pot-sparsity optimize") == 1
    assert f"| {cached['first'].entry} | unstructured | 0.5 | 12.50 | 12.50 |" in text


def test_what_is_cached_does_not_run_again(
    tmp_path: Path, cached: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def fake(experiment: Any, zoo: Any, folder: Path) -> dict[str, Any]:
        ran.append(experiment.name)
        report: dict[str, Any] = cached["report"]
        return report

    monkeypatch.setattr(make, "run", fake)
    entry = cached["first"].entry
    for _ in range(2):
        assert make.fill_cache(cached["cache"], tmp_path, ZOO, [f"{entry}/50/bare/*pruning*"]) == 0
    rows = combinations()[0].experiments
    expected = [e.name for e in rows[2:] if e.pattern is None and any("pruning" in s for s in e.settings)]
    assert ran == expected
    assert expected
    assert set(make.read_cache(cached["cache"], ZOO)) == {e.name for e in rows[:2]} | set(expected)
