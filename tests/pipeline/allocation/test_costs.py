"""Cost tables against counting by hand, layer by layer and weight by weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.allocation.costs import UNITS, Costs, build_costs, with_costs
from pot_sparsity.pipeline.solve import DenseLayer, read_dense
from pot_sparsity.recipe import validate_recipe
from pot_sparsity.settings import BUDGETS
from tests.pipeline.nets import conv_net, node, normal, plain_net, proto, shared_net, to_ir

#: Positions at which each layer of the network is applied to compute a sample.
POSITIONS = {"conv1": 64, "branch1": 64, "branch2": 64, "depthwise": 16, "y": 1}
KINDS = ("sparsity", "flops", "bops", "size")


def built(
    native: Any, int8: bool = False, kinds: tuple[str, ...] = KINDS
) -> tuple[Model, list[DenseLayer], Costs]:
    model = load_model(native)
    dense = read_dense(model, find_layers(model.graph).layers)
    recipe = validate_recipe({"quantization": {"enabled": int8}})
    return model, dense, build_costs(model, dense, recipe, kinds)


def some_zeros(dense: list[DenseLayer], seed: int = 0) -> dict[str, int]:
    random = np.random.default_rng(seed)
    return {item.layer.name: int(random.integers(0, item.layer.size + 1)) for item in dense}


def test_every_kind_of_budget_has_a_unit() -> None:
    assert set(UNITS) == set(BUDGETS)


@pytest.mark.parametrize("kind", ["onnx", "ir"])
def test_operations_are_those_of_kept_weights(kind: str, tmp_path: Path) -> None:
    native: Any = conv_net() if kind == "onnx" else to_ir(conv_net(), tmp_path / "m.xml")
    _, dense, costs = built(native)
    zeros = some_zeros(dense)
    sizes = {item.layer.name: item.layer.size for item in dense}
    if kind == "onnx":
        assert sizes.keys() == POSITIONS.keys()
    positions = dict(zip(sizes, POSITIONS.values(), strict=True))
    products = sum(positions[name] * (sizes[name] - zeros[name]) for name in sizes)
    dense_products = sum(positions[name] * sizes[name] for name in sizes)
    assert costs.total("flops", zeros) == pytest.approx(2 * products, rel=1e-12)
    assert costs.dense["flops"] == 2 * dense_products
    assert costs.total("bops", zeros) == pytest.approx(products * 32 * 32, rel=1e-12)
    assert costs.fraction("bops", zeros) == pytest.approx(products / dense_products, rel=1e-12)
    assert costs.total("sparsity", zeros) == sum(sizes.values()) - sum(zeros.values())


def test_int8_counts_eight_by_eight_bits_of_thirty_two_by_thirty_two() -> None:
    _, dense, costs = built(conv_net(), int8=True)
    none = dict.fromkeys((item.layer.name for item in dense), 0)
    assert costs.fraction("bops", none) == pytest.approx(1 / 16)
    assert costs.fraction("flops", none) == 1.0


def packed(size: int, kept: int, width: int, scales: int) -> int:
    return min(-(-size // 8) + kept * width, size * width) + scales


@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize("int8", [False, True])
def test_size_is_a_mask_and_kept_weights_or_all_weights(width: int, int8: bool, tmp_path: Path) -> None:
    native: Any = to_ir(conv_net(), tmp_path / "m.xml", half=True) if width == 2 else conv_net()
    _, dense, costs = built(native, int8)
    scales = 4 if int8 else 0
    for item in dense:
        size, name = item.layer.size, item.layer.name
        expected = [
            packed(size, size - count, 1 if int8 else width, scales * item.layer.channels)
            for count in range(size + 1)
        ]
        table = costs.tables["size"][name]
        assert table.at(np.arange(size + 1)) == pytest.approx(expected, rel=1e-12)
    assert costs.dense["size"] == width * sum(item.layer.size for item in dense)


def test_a_layer_so_small_that_its_mask_is_larger_stays_dense() -> None:
    constants = {"w": normal(1, 1, 1, 1, 1), "v": normal(2, 4, 1, 1, 1)}
    nodes = [node("Conv", ["x", "w"], "a"), node("Relu", ["a"], "r"), node("Conv", ["r", "v"], "y")]
    _, dense, costs = built(proto(nodes, constants, ["n", 1, 4, 4]), int8=True)
    assert [item.layer.size for item in dense] == [1, 4]
    assert costs.tables["size"]["a"].at(np.arange(2)).tolist() == [5.0, 5.0]
    assert costs.tables["size"]["y"].at(np.arange(5)).tolist() == [20.0, 20.0, 19.0, 18.0, 17.0]


def test_a_shared_weight_is_stored_once_and_used_in_every_place() -> None:
    _, dense, costs = built(shared_net())
    shared = next(item.layer for item in dense if item.layer.shared)
    assert costs.tables["flops"][shared.name].cost(0) == 2 * shared.size * len(shared.places)
    assert costs.tables["size"][shared.name].cost(0) == 4 * shared.size


def test_curves_get_the_costs_of_their_levels() -> None:
    _, dense, costs = built(plain_net())
    curves = {}
    for item in dense:
        zeros = np.array([0, item.layer.size // 2, item.layer.size])
        kept = (item.layer.size - zeros).astype(np.float64)
        curves[item.layer.name] = Curve(item.layer.name, item.layer.size, np.arange(3.0), {NONZEROS: kept})
    found = with_costs(curves, costs)
    for name, curve in found.items():
        assert set(curve.costs) == {NONZEROS, *KINDS}
        assert curve.cost("flops")[2] == 0.0
        assert curve.cost("sparsity").tolist() == curve.cost(NONZEROS).tolist()
        assert curve.cost("size").tolist() == costs.tables["size"][name].at(curve.zeros).tolist()


def test_limits_are_fractions_or_for_sparsity_whole_weights() -> None:
    _, dense, costs = built(plain_net())
    weights = sum(item.layer.size for item in dense)
    assert costs.limit("sparsity", 0.333) == weights - round(0.333 * weights)
    assert costs.limit("flops", 0.25) == 0.25 * costs.dense["flops"]
    fixed = Costs(costs.tables, costs.dense, {"flops": 10.0})
    assert fixed.limit("flops", 0.25) == 0.25 * costs.dense["flops"] - 10.0


def test_flops_that_depend_on_an_open_dimension_are_refused() -> None:
    constants = {"w": normal(1, 4, 3, 3, 3)}
    model = proto([node("Conv", ["x", "w"], "y")], constants, ["n", 3, "h", "w"])
    for kind in ("flops", "bops"):
        with pytest.raises(
            RecipeError, match=rf"budget of {kind} needs the FLOPs of layer 'y'.*fix the model's"
        ):
            built(model, kinds=(kind,))
    _, _, costs = built(model, kinds=("size", "sparsity"))
    assert costs.dense == {"size": 4 * 108, "sparsity": 108}
