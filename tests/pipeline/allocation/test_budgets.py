"""Budgets from end to end: they hold in the files that were written, waste nothing, and are refused out of reach."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pot_sparsity.algorithms.allocation import ALLOCATIONS
from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline.allocation.allocate import allocate
from pot_sparsity.pipeline.allocation.costs import Costs, build_costs
from pot_sparsity.pipeline.allocation.targets import Target, budget_targets
from pot_sparsity.pipeline.solve import DenseLayer, read_dense
from pot_sparsity.recipe import Recipe, validate_recipe
from pot_sparsity.report.html import render_html
from pot_sparsity.report.io import read_report
from pot_sparsity.report.render import budget_lines
from tests.pipeline.nets import QUICK, conv_net, images, normal, plain_net, shared_net, to_ir

#: Multiply-accumulates of one weight of each layer, for a sample, and the layers' sizes.
POSITIONS = {"conv1": 64, "branch1": 64, "branch2": 64, "depthwise": 16, "y": 1}
SIZES = {"conv1": 216, "branch1": 64, "branch2": 576, "depthwise": 72, "y": 40}
FAST: dict[str, Any] = {
    "pruning": {"method": "wanda_refit"},
    "reconstruction": {"input": "dense"},
    "correction": {"differential": "never", "normalization": "never"},
    "finish": {"activations": "never", "distillation": "never"},
}


def recipe(budget: dict[str, float], method: str = "output_distortion", **sections: Any) -> Recipe:
    allocation = {"method": method, "levels": 3, "samples": 24, **sections.pop("allocation", {})}
    return validate_recipe({**QUICK, **FAST, "budget": budget, "allocation": allocation, **sections})


def run(settings: Recipe, output: Path | None = None, model: Any = None, **named: Any) -> Result:
    return optimize(
        conv_net() if model is None else model,
        images(32),
        recipe=settings,
        output=output,
        **{
            "engine": "openvino" if isinstance(model, Path) else "onnxruntime",
            "baseline_int8": False,
            "measure_latency": False,
            "threads": 1,
            **named,
        },
    )


def zeros_in(path: Path) -> dict[str, int]:
    model = load_model(path)
    layers = find_layers(model.graph).layers
    return {layer.name: int((read_weight(model, layer) == 0.0).sum()) for layer in layers}


def fraction(kind: str, zeros: list[int], int8: bool = False) -> float:
    """What remains of the network, counted by hand."""
    kept = [size - count for size, count in zip(SIZES.values(), zeros, strict=True)]
    products = [p * k for p, k in zip(POSITIONS.values(), kept, strict=True)]
    whole = sum(p * s for p, s in zip(POSITIONS.values(), SIZES.values(), strict=True))
    if kind == "flops":
        return sum(products) / whole
    if kind == "bops":
        return sum(products) / whole / (16 if int8 else 1)
    if kind == "sparsity":
        return sum(zeros) / sum(SIZES.values())
    scales = {"conv1": 8, "branch1": 8, "branch2": 8, "depthwise": 8, "y": 5}
    width = 1 if int8 else 4
    stored = [
        min(-(-size // 8) + k * width, size * width) + (4 * scales[name] if int8 else 0)
        for (name, size), k in zip(SIZES.items(), kept, strict=True)
    ]
    return sum(stored) / (4 * sum(SIZES.values()))


def source(kind: str, folder: Path) -> Any:
    return conv_net() if kind == "onnx" else to_ir(conv_net(), folder / "m.xml")


@pytest.mark.parametrize(
    ("kind", "method", "budget"),
    [
        ("onnx", "output_distortion", {"flops": 0.4}),
        ("onnx", "output_distortion", {"bops": 0.35, "size": 0.5}),
        ("ir", "output_distortion", {"size": 0.3}),
        ("ir", "output_distortion", {"sparsity": 0.55, "flops": 0.5}),
        ("onnx", "lamp", {"size": 0.3}),
        ("ir", "lamp", {"bops": 0.35, "size": 0.5}),
    ],
)
def test_budgets_hold_in_what_was_written(
    kind: str, method: str, budget: dict[str, float], tmp_path: Path
) -> None:
    result = run(recipe(budget, method), tmp_path / "out", source(kind, tmp_path))
    written = zeros_in(next(path for path in result.files if path.suffix in (".onnx", ".xml")))
    found = list(written.values())
    assert [layer.weights for layer in result.report.layers] == list(SIZES.values())
    assert [entry.kind for entry in result.report.budgets] == list(budget)
    for entry in result.report.budgets:
        counted = fraction(entry.kind, found)
        assert entry.asked == budget[entry.kind]
        assert entry.reached == pytest.approx(counted, abs=1e-12)
        if entry.kind == "sparsity":
            assert round(entry.asked * sum(SIZES.values())) <= sum(found)
        else:
            assert counted <= entry.asked + 1e-12
            assert entry.cost == pytest.approx(counted * entry.dense)
    if method == "output_distortion":
        for index in range(len(found)):
            more = [count - (place == index) for place, count in enumerate(found)]
            assert found[index] == 0 or any(exceeded(entry, bound, more) for entry, bound in budget.items())


def exceeded(kind: str, bound: float, zeros: list[int]) -> bool:
    if kind == "sparsity":
        return sum(zeros) < round(bound * sum(SIZES.values()))
    return fraction(kind, zeros) > bound


def test_budgets_count_in_int8_where_the_run_quantizes(tmp_path: Path) -> None:
    int8 = {"enabled": True, "samples": 24, "ranges": "default", "bias_correction": "fast"}
    result = run(recipe({"bops": 0.02, "size": 0.2}, "uniform", quantization=int8), tmp_path / "out")
    found = list(zeros_in(tmp_path / "out" / "float" / "model.onnx").values())
    for entry in result.report.budgets:
        assert entry.reached == pytest.approx(fraction(entry.kind, found, int8=True), abs=1e-12)
        assert entry.reached <= entry.asked
    assert sum(zeros_in(tmp_path / "out" / "model.onnx").values()) >= sum(found)


def test_a_budget_that_the_dense_model_keeps_prunes_nothing() -> None:
    report = run(recipe({"flops": 1.0, "size": 1.0})).report
    assert report.zeros == 0
    assert [entry.reached for entry in report.budgets] == [1.0, 1.0]


@pytest.mark.parametrize("method", ["output_distortion", "erk"])
def test_a_budget_of_sparsity_is_the_sparsity(method: str, tmp_path: Path) -> None:
    one = run(recipe({"sparsity": 0.6}, method), tmp_path / "budget")
    settings = recipe({}, method, sparsity=0.6)
    two = run(settings, tmp_path / "sparsity")
    assert (tmp_path / "budget" / "model.onnx").read_bytes() == (
        tmp_path / "sparsity" / "model.onnx"
    ).read_bytes()
    assert one.report.zeros == round(0.6 * sum(SIZES.values()))
    assert one.report.recipe == two.report.recipe
    dense = read_dense(load_model(conv_net()), find_layers(load_model(conv_net()).graph).layers)
    other = recipe({"flops": 0.5}, method, sparsity=0.1)
    assert allocate(dense, other, 0.1, budget={"sparsity": 0.6}) == allocate(dense, settings, 0.6)


# the allocation alone


def layers_of(native: Any) -> tuple[list[DenseLayer], Costs]:
    model = load_model(native)
    dense = read_dense(model, find_layers(model.graph).layers)
    return dense, build_costs(model, dense, recipe({}), ("sparsity", "flops", "size", "bops"))


@pytest.mark.parametrize("method", sorted(ALLOCATIONS))
def test_weights_alone_keep_as_many_as_the_budgets_allow(method: str) -> None:
    dense, costs = layers_of(conv_net())
    settings = recipe({"flops": 0.45, "size": 0.6}, method)
    zeros = allocate(dense, settings, 0.5, costs=costs)
    weights = sum(item.layer.size for item in dense)
    total = sum(zeros.values())
    assert zeros == allocate(dense, recipe({}, method), total / weights)
    assert costs.fraction("flops", zeros) <= 0.45
    assert costs.fraction("size", zeros) <= 0.6
    before = allocate(dense, recipe({}, method), (total - 1) / weights)
    assert costs.fraction("flops", before) > 0.45 or costs.fraction("size", before) > 0.6


def made_curves(dense: list[DenseLayer], levels: int) -> dict[str, Curve]:
    random = np.random.default_rng(5)
    curves = {}
    for item in dense:
        zeros = np.unique(np.linspace(0, item.layer.size, levels).round().astype(np.int64))
        distortion = random.lognormal() * (zeros / item.layer.size) ** random.uniform(1.5, 4.0)
        curves[item.layer.name] = Curve(
            item.layer.name, item.layer.size, distortion, {NONZEROS: (item.layer.size - zeros).astype(float)}
        )
    return curves


@pytest.mark.parametrize("budget", [{"flops": 0.4}, {"size": 0.35}, {"flops": 0.5, "size": 0.4}])
@pytest.mark.parametrize("solver", ["auto", "dynamic_program", "hull"])
def test_no_choice_of_levels_is_better(budget: dict[str, float], solver: str) -> None:
    dense, costs = layers_of(shared_net())
    curves = made_curves(dense, 7)
    settings = recipe(budget, allocation={"solver": solver})
    zeros = allocate(dense, settings, 0.5, curves, costs=costs)
    assert all(costs.fraction(kind, zeros) <= bound + 1e-12 for kind, bound in budget.items())

    best = np.inf
    for levels in product(*(curve.zeros.tolist() for curve in curves.values())):
        named = dict(zip(curves, levels, strict=True))
        if all(costs.fraction(kind, named) <= bound for kind, bound in budget.items()):
            best = min(best, sum(float(curve.at(np.array(named[name]))) for name, curve in curves.items()))
    reached = sum(float(curve.at(np.array(zeros[name]))) for name, curve in curves.items())
    assert reached <= best + 1e-12


def test_solvers_can_be_chosen_for_a_sparsity_too() -> None:
    dense, _ = layers_of(conv_net())
    curves = made_curves(dense, 20)
    found = {
        solver: allocate(dense, recipe({}, allocation={"solver": solver}), 0.6, curves)
        for solver in ("auto", "dynamic_program", "hull")
    }
    assert found["auto"] == found["dynamic_program"]
    assert {sum(zeros.values()) for zeros in found.values()} == {round(0.6 * sum(SIZES.values()))}


def test_zeros_that_exist_stay_and_count() -> None:
    model = conv_net()
    dense, costs = layers_of(model)
    half = [
        DenseLayer(
            item.layer,
            np.where(np.arange(item.weight.size).reshape(item.weight.shape) % 2, item.weight, 0.0),
            item.biases,
        )
        for item in dense
    ]
    zeros = allocate(half, recipe({"flops": 0.7}, "uniform"), 0.5, costs=costs)
    assert all(zeros[item.layer.name] == int((item.weight == 0).sum()) for item in half)
    less = allocate(half, recipe({"flops": 0.3}), 0.5, made_curves(dense, 9), costs=costs)
    assert all(less[item.layer.name] >= int((item.weight == 0).sum()) for item in half)
    assert costs.fraction("flops", less) <= 0.3


@pytest.mark.parametrize("method", ["output_distortion", "lamp"])
def test_whole_blocks_keep_the_budget(method: str) -> None:
    settings = recipe({"flops": 0.45}, method, pruning={"method": "wanda_refit", "pattern": "block:4"})
    report = run(settings).report
    assert report.budgets[0].reached <= 0.45
    assert report.budgets[0].reached > 0.35
    sizes = {layer.name: layer.zeros for layer in report.layers}
    assert sizes["branch2"] % 4 == 0


def test_blocks_that_do_not_fill_up_keep_the_budget() -> None:
    settings = recipe({"flops": 0.5}, "uniform", pruning={"method": "wanda_refit", "pattern": "block:4"})
    report = run(settings, model=plain_net()).report  # three input channels: every block is a short one
    assert report.budgets[0].reached <= 0.5


def test_a_fixed_pattern_keeps_its_zeros_or_is_refused() -> None:
    report = run(recipe({"flops": 0.6}, pruning={"method": "wanda_refit", "pattern": "2:4"})).report
    assert {layer.name: layer.zeros for layer in report.layers} == {
        layer.name: layer.target_zeros for layer in report.layers
    }
    assert report.budgets[0].reached < 0.6
    with pytest.raises(
        RecipeError, match=r"flops=0.3 is out of reach: at least 0.\d+.*pattern 2:4 fixes the"
    ):
        run(recipe({"flops": 0.3}, pruning={"method": "wanda_refit", "pattern": "2:4"}))


# schedules


def test_budgets_shrink_along_the_cubic_schedule() -> None:
    settings = recipe(
        {"flops": 0.5, "sparsity": 0.3}, schedule={"kind": "cubic", "iterations": 4, "initial": 0.1}
    )
    targets = budget_targets(settings)
    assert targets[-1] == Target(0.5, {"sparsity": 0.3, "flops": 0.5})
    for step, target in enumerate(targets):
        left = (1.0 - step / 4) ** 3
        assert target.budget["flops"] == pytest.approx(1.0 - (0.5 + (0.1 - 0.5) * left))
        assert target.budget["sparsity"] == pytest.approx(0.3 + (0.1 - 0.3) * left)
    assert len({target.key for target in targets}) == 5


@pytest.mark.parametrize("start", ["dense", "previous"])
def test_every_iteration_of_a_schedule_keeps_its_budgets(start: str) -> None:
    schedule = {"kind": "cubic", "iterations": 2, "start": start}
    report = run(recipe({"flops": 0.4}, "l2_normalized_magnitude", schedule=schedule)).report
    zeros = [iteration.zeros for iteration in report.iterations]
    assert len(zeros) == 3
    assert zeros[0] < zeros[1] < zeros[2]
    assert report.budgets[0].reached <= 0.4
    assert report.sparsity_asked == pytest.approx(report.sparsity_reached)


def test_iterative_rounds_go_with_a_sparsity_only() -> None:
    with pytest.raises(RecipeError, match=r"allocation\.rounds iterative goes with a sparsity"):
        run(recipe({"flops": 0.4}, allocation={"rounds": "iterative"}))


# what cannot be


@pytest.mark.parametrize(
    ("budget", "sections", "match"),
    [
        (
            {"flops": 0.1},
            {"allocation": {"max_layer_sparsity": 0.8}},
            r"budget flops=0.1 is out of reach: at least 0.1986 of the dense model's FLOPs remain "
            r"\(allocation.max_layer_sparsity is 0.8\)",
        ),
        ({"size": 0.01}, {}, r"budget size=0.01 is out of reach: at least 0.0313 of the dense model's bytes"),
        (
            {"sparsity": 0.95, "flops": 0.5},
            {"allocation": {"max_layer_sparsity": 0.9}},
            r"budget sparsity=0.95 is out of reach: at most 0.9\d* can be zero",
        ),
    ],
)
@pytest.mark.parametrize("method", ["output_distortion", "uniform"])
def test_budgets_out_of_reach_are_refused_before_anything_is_written(
    method: str, budget: dict[str, float], sections: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        run(recipe(budget, method, **sections), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["output_distortion", "uniform"])
def test_what_is_named_as_the_least_is_in_reach(method: str) -> None:
    dense, costs = layers_of(conv_net())
    curves = made_curves(dense, 9)
    with pytest.raises(RecipeError) as caught:
        allocate(dense, recipe({"size": 0.01}, method), 0.5, curves, costs=costs)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    assert (
        costs.fraction("size", allocate(dense, recipe({"size": least}, method), 0.5, curves, costs=costs))
        <= least
    )


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({"flop": 0.5}, r"unknown budget 'flop'; did you mean 'flops'\?"),
        ({"flops": 0.0}, "budget flops must be above 0 and at most 1"),
        ({"size": 1.5}, "budget size must be above 0 and at most 1"),
        ({"sparsity": -0.1, "size": 0.5}, "budget sparsity must be at least 0 and at most 1"),
        ({"latency": float("nan")}, "budget latency must be above 0"),
        ({"sparsity": 1.5}, "recipe key 'sparsity'"),
        ({"flops": "half"}, "recipe key 'budget.flops'"),
        ("flops", "recipe key 'budget'"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budget: Any, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        validate_recipe({"budget": budget})


# the report


def test_the_report_says_what_was_asked_and_reached(tmp_path: Path) -> None:
    result = run(recipe({"sparsity": 0.2, "flops": 0.4}, "uniform"), tmp_path / "out")
    report = read_report(tmp_path / "out")
    assert report.budgets == result.report.budgets
    lines = budget_lines(report)
    zeros, left = (100 * entry.reached for entry in report.budgets)
    assert lines[0] == f"budget sparsity: {zeros:.1f} % zeros, at least 20.0 % asked"
    cost = f"{report.budgets[1].cost:,.0f} of 111,952 FLOPs"
    assert lines[1] == f"budget flops: {left:.1f} % of the dense model's ({cost}), at most 40.0 % asked"
    page = render_html(report)
    assert all(line.split("'")[0] in page for line in lines)
    assert run(recipe({}, sparsity=0.5)).report.budgets == []


def test_inputs_that_are_rows_have_budgets_too() -> None:
    report = optimize(
        shared_net(),
        normal(1, 32, 7),
        recipe=recipe({"flops": 0.5}),
        engine="onnxruntime",
        baseline_int8=False,
        measure_latency=False,
    ).report
    assert report.budgets[0].reached <= 0.5
