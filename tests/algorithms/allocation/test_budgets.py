"""Budgets on any cost: kept, used up to the last weight, and near the best of all choices."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation.base import Int64
from pot_sparsity.algorithms.allocation.budgets import (
    CostTable,
    LayerTables,
    add_costs,
    allocate_within,
    fewest_zeros,
    give_back,
    keeps_all,
)
from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.algorithms.arrays import Float64


def floats(*values: float) -> Float64:
    return np.array(values, dtype=np.float64)


def ints(*values: int) -> Int64:
    return np.array(values, dtype=np.int64)


def straight(size: int, full: float) -> CostTable:
    return CostTable(floats(0, size), floats(full, 0))


def convex(name: str, size: int, scale: float, power: float = 3.0, levels: int | None = None) -> Curve:
    zeros = np.unique(np.linspace(0, size, levels or size + 1).round().astype(np.int64))
    return Curve(name, size, scale * (zeros / size) ** power, {NONZEROS: (size - zeros).astype(np.float64)})


def network(
    seed: int, layers: int, most: int, levels: int | None = None
) -> tuple[list[Curve], list[LayerTables]]:
    """Curves, and tables of two kinds: one straight, one with a flat beginning."""
    random = np.random.default_rng(seed)
    curves: list[Curve] = []
    tables: list[LayerTables] = []
    for index in range(layers):
        size = int(random.integers(1, most + 1))
        curves.append(convex(f"layer{index}", size, random.lognormal(), random.uniform(1.2, 6.0), levels))
        flat, full = float(random.uniform(0.1, 0.9)) * size, float(random.uniform(1.0, 50.0))
        packed = CostTable(floats(0, flat, size), floats(full, full, 0.1 * full))
        tables.append({"flops": straight(size, float(random.uniform(1.0, 99.0))), "size": packed})
    return curves, tables


def totals(tables: list[LayerTables], zeros: Any) -> dict[str, float]:
    return {
        kind: sum(table[kind].cost(int(count)) for table, count in zip(tables, zeros, strict=True))
        for kind in tables[0]
    }


def distortion(curves: list[Curve], zeros: Any) -> float:
    return sum(float(curve.at(np.asarray(count))) for curve, count in zip(curves, zeros, strict=True))


def best_of_all(curves: list[Curve], tables: list[LayerTables], budgets: dict[str, float]) -> float:
    """The least distortion of every possible number of zeros in every layer."""
    best = np.inf
    for zeros in product(*(range(curve.size + 1) for curve in curves)):
        cost = totals(tables, zeros)
        if all(cost[kind] <= bound * (1 + 1e-12) for kind, bound in budgets.items()):
            best = min(best, distortion(curves, zeros))
    return best


def bounds(curves: list[Curve]) -> tuple[Int64, Int64]:
    return np.zeros(len(curves), np.int64), ints(*(curve.size for curve in curves))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    kinds=st.sampled_from([("flops",), ("size",), ("flops", "size")]),
    part=st.floats(0.15, 1.0),
    solver=st.sampled_from(["dynamic_program", "hull"]),
)
def test_every_budget_holds_and_no_weight_more_would_fit(
    seed: int, kinds: tuple[str, ...], part: float, solver: Any
) -> None:
    curves, tables = network(seed, 3, 12, levels=5)
    full = totals(tables, [0, 0, 0])
    budgets = {kind: part * full[kind] for kind in kinds}
    lower, upper = bounds(curves)

    zeros = allocate_within(curves, tables, budgets, lower, upper, solver=solver)

    assert ((zeros >= lower) & (zeros <= upper)).all()
    assert keeps_all(tables, budgets, zeros)
    for index in np.flatnonzero(zeros > lower):
        fewer = zeros.copy()
        fewer[index] -= 1
        assert not keeps_all(tables, budgets, fewer)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["flops", "size"]), part=st.floats(0.2, 0.9))
def test_one_budget_is_spent_as_the_best_of_all_choices_does(seed: int, kind: str, part: float) -> None:
    curves, tables = network(seed, 2, 9)
    budgets = {kind: part * totals(tables, [0, 0])[kind]}
    lower, upper = bounds(curves)

    zeros = allocate_within(curves, tables, budgets, lower, upper)

    assert distortion(curves, zeros) == pytest.approx(best_of_all(curves, tables, budgets), abs=1e-9)


def test_two_budgets_come_close_to_the_best_of_all_choices() -> None:
    ratios = []
    for seed in range(25):
        curves, tables = network(seed, 3, 9)
        full = totals(tables, [0, 0, 0])
        budgets = {"flops": 0.45 * full["flops"], "size": 0.5 * full["size"]}
        zeros = allocate_within(curves, tables, budgets, *bounds(curves))
        ratios.append(distortion(curves, zeros) / best_of_all(curves, tables, budgets))
    assert min(ratios) >= 1.0 - 1e-9
    assert np.mean(np.array(ratios) < 1.0 + 1e-9) > 0.7
    assert max(ratios) < 1.3


def test_a_layer_stays_between_its_bounds() -> None:
    curves, tables = network(3, 3, 40)
    lower, upper = ints(*(curve.size // 4 for curve in curves)), ints(*(curve.size // 2 for curve in curves))
    least, full = totals(tables, upper), totals(tables, lower)
    zeros = allocate_within(
        curves, tables, {"flops": (least["flops"] + full["flops"]) / 2}, lower, upper, solver="hull"
    )
    assert ((zeros >= lower) & (zeros <= upper)).all()
    with pytest.raises(ValueError, match="out of reach"):
        allocate_within(curves, tables, {"flops": 0.9 * least["flops"]}, lower, upper)


def test_what_costs_nothing_is_given_back_even_where_no_distortion_falls() -> None:
    curves = [Curve("flat", 10, np.zeros(2), {NONZEROS: floats(10, 0)}), convex("steep", 10, 1.0)]
    tables: list[LayerTables] = [
        {"size": CostTable(floats(0, 6, 10), floats(5, 5, 1))},
        {"size": straight(10, 10.0)},
    ]
    zeros = give_back(curves, tables, {"size": 7.0}, ints(9, 9), ints(0, 0))
    assert totals(tables, zeros)["size"] <= 7.0
    assert zeros.tolist() == [9, 5]  # 2 and 5: what the steep layer takes is worth more
    alone = give_back(curves[:1], tables[:1], {"size": 5.0}, ints(7), ints(2))
    assert alone.tolist() == [2]


@settings(deadline=None, max_examples=100)
@given(
    edge=st.integers(2, 1_000_000),
    power=st.floats(0.2, 5.0),
    beyond=st.integers(0, 1_000_000),
    step=st.sampled_from([0.0, 1e-3, 0.3]),
)
def test_fewest_zeros_finds_the_edge(edge: int, power: float, beyond: int, step: float) -> None:
    high = edge + beyond
    asked = []

    def place(total: int) -> Int64:
        asked.append(total)
        return ints(total // 2, total - total // 2)

    def excess(zeros: Int64) -> float:
        """Falls with the total, smoothly or in steps, through zero between ``edge - 1`` and ``edge``."""
        total = int(zeros.sum())
        value = (1.0 - total / high) ** power - (1.0 - edge / high) ** power
        value = np.sign(value) * max(abs(value) // step * step, 1e-9) if step else value
        return max(float(value), 1e-12) if total < edge else min(float(value), 0.0)

    low = (0, excess(ints(0, 0)))
    found = fewest_zeros(place, excess, low, (high, excess(ints(high, 0))))
    assert found.sum() == edge
    assert len(asked) <= 45


def test_fewest_zeros_takes_fewer_trials_than_bits() -> None:
    asked = []

    def place(total: int) -> Int64:
        asked.append(total)
        return ints(total)

    def excess(zeros: Int64) -> float:
        return float((1.0 - zeros[0] / 25_000_000) ** 0.8 - 0.4)

    found = fewest_zeros(place, excess, (0, 0.6), (25_000_000, -0.4))
    assert excess(found) <= 0.0 < excess(found - 1)
    assert len(asked) <= 14


def test_costs_are_read_off_at_the_zeros_of_a_curve() -> None:
    curve = convex("layer", 8, 1.0, levels=3)
    more = add_costs(curve, {"flops": straight(8, 16.0)})
    assert more.cost("flops").tolist() == [16.0, 8.0, 0.0]
    assert more.cost(NONZEROS).tolist() == [8.0, 4.0, 0.0]
    assert CostTable(floats(2, 4), floats(3, 1)).at(ints(0, 2, 3, 4, 9)).tolist() == [3, 3, 2, 1, 1]


@pytest.mark.parametrize(
    ("zeros", "costs", "match"),
    [
        ([], [], "at least one"),
        ([0, 1], [1], "as many costs"),
        ([1, 1], [2, 1], "ascend"),
        ([0, 1], [1, 2], "rise"),
        ([0, 1], [1, -1], "not negative"),
        ([0, 1], [np.inf, 1], "finite"),
    ],
)
def test_tables_that_make_no_sense_are_refused(zeros: list[float], costs: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CostTable(floats(*zeros), floats(*costs))
