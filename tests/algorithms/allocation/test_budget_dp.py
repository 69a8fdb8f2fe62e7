"""Dynamic programming over levels, against trying everything and against a plain table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation.budget_dp import solve_bucketed, solve_exact
from pot_sparsity.algorithms.allocation.curves import NONZEROS, Choice, Curve, choose
from pot_sparsity.algorithms.allocation.level_moves import improve_levels, pareto_levels
from tests.algorithms.allocation.level_problems import brute_force, problems, pruned_network, table_oracle


def check_sums(curves: list[Curve], choice: Choice, budget: float) -> None:
    assert choice.levels.shape == (len(curves),)
    cost = sum(curve.costs["cost"][level] for curve, level in zip(curves, choice.levels, strict=True))
    assert choice.costs["cost"] == pytest.approx(cost)
    assert cost <= budget + 1e-9
    distortion = sum(curve.distortion[level] for curve, level in zip(curves, choice.levels, strict=True))
    assert choice.distortion == pytest.approx(distortion)


@settings(deadline=None, max_examples=200)
@given(curves=problems(), budget=st.integers(0, 30))
def test_exact_solver_equals_brute_force_and_takes_the_cheapest_of_equals(
    curves: list[Curve], budget: int
) -> None:
    expected = brute_force(curves, {"cost": budget})
    if expected is None:
        with pytest.raises(ValueError, match="out of reach"):
            solve_exact(curves, "cost", budget)
        return

    choice = solve_exact(curves, "cost", budget)

    check_sums(curves, choice, budget)
    assert (choice.distortion, choice.costs["cost"]) == expected
    again = solve_exact(curves, "cost", budget)
    np.testing.assert_array_equal(choice.levels, again.levels)


@settings(deadline=None, max_examples=200)
@given(curves=problems(), budget=st.integers(0, 30))
def test_bucketed_solver_is_exact_where_units_are_whole_and_few(curves: list[Curve], budget: int) -> None:
    expected = brute_force(curves, {"cost": budget})
    if expected is None:
        with pytest.raises(ValueError, match=f"a budget of {budget} 'cost' is out of reach"):
            solve_bucketed(curves, "cost", budget)
        return

    choice = solve_bucketed(curves, "cost", budget)

    check_sums(curves, choice, budget)
    assert choice.distortion == expected[0]


@settings(deadline=None, max_examples=200)
@given(
    curves=problems(whole=False),
    budget=st.floats(0.0, 30.0),
    buckets=st.sampled_from([1, 2, 7, 50, 1000]),
)
def test_any_unit_never_exceeds_the_budget_and_loses_at_most_a_bucket_per_layer(
    curves: list[Curve], budget: float, buckets: int
) -> None:
    least = sum(curve.costs["cost"].min() for curve in curves)
    if least > budget * (1 + 1e-9):
        with pytest.raises(ValueError, match="out of reach"):
            solve_bucketed(curves, "cost", budget, buckets=buckets)
        return

    choice = solve_bucketed(curves, "cost", max(budget, least), buckets=buckets)

    check_sums(curves, choice, max(budget, least))
    smaller = budget - len(curves) * (budget - least) / buckets
    bound = brute_force(curves, {"cost": smaller}) if smaller > least else None
    if bound is not None:
        assert choice.distortion <= bound[0]


@pytest.mark.parametrize("seed", range(4))
def test_exact_solver_equals_a_plain_table_on_networks(seed: int) -> None:
    curves = pruned_network(seed, 12, 9, noise=0.5, most=300)
    weights = sum(curve.size for curve in curves)

    for density in (0.9, 0.4, 0.1, 0.02):
        budget = int(density * weights)
        choice = solve_exact(curves, NONZEROS, budget)

        assert choice.distortion == pytest.approx(table_oracle(curves, NONZEROS, budget), rel=1e-12)
        assert choice.costs[NONZEROS] <= budget


@pytest.mark.parametrize("seed", range(3))
def test_buckets_come_close_to_the_exact_optimum(seed: int) -> None:
    curves = pruned_network(seed, 30, 20, noise=0.5)
    weights = sum(curve.size for curve in curves)

    for density in (0.5, 0.2, 0.1):
        exact = solve_exact(curves, NONZEROS, int(density * weights))
        bucketed = solve_bucketed(curves, NONZEROS, density * weights, buckets=2000)

        assert bucketed.costs[NONZEROS] <= density * weights
        assert bucketed.distortion <= exact.distortion * 1.005


def test_distortion_falls_as_the_budget_grows() -> None:
    curves = pruned_network(5, 10, 8, noise=0.5, most=200)
    budgets = range(sum(curve.size for curve in curves))

    values = [solve_exact(curves, NONZEROS, budget).distortion for budget in budgets[::7]]

    assert (np.diff(values) <= 0.0).all()
    assert values[0] == pytest.approx(sum(curve.distortion.max() for curve in curves))


def test_budget_that_pays_for_everything_and_for_nothing() -> None:
    curves = pruned_network(6, 5, 6)
    dense = sum(curve.costs["flops"].max() for curve in curves)

    assert solve_bucketed(curves, "flops", 2 * dense).distortion == 0.0
    nothing = solve_bucketed(curves, "flops", 0.0)
    assert nothing.costs["flops"] == 0.0


def test_ties_cut_the_last_of_the_widest_layers() -> None:
    costs = {"cost": np.array([0.0, 1.0])}
    wide = {"cost": np.array([0.0, 1.0, 2.0])}
    narrow = [Curve(name, 1, np.array([1.0, 0.0]), costs) for name in "ab"]

    assert solve_exact(narrow, "cost", 1).levels.tolist() == [1, 0]
    three = [Curve("wide", 2, np.array([1.0, 0.0, -2.0]), wide), *narrow]
    assert solve_exact(three, "cost", 1).levels.tolist() == [0, 1, 0]


def test_more_levels_than_a_byte_counts() -> None:
    levels = np.arange(700.0)
    curves = [Curve(name, 699, 2.0 * (699.0 - levels) ** 2, {"cost": levels}) for name in "ab"]

    choice = solve_exact(curves, "cost", 1001)

    assert sorted(choice.levels.tolist()) == [500, 501]


def test_bad_input_is_refused() -> None:
    half = Curve("half", 1, np.array([1.0, 0.0]), {"cost": np.array([0.0, 0.5])})

    with pytest.raises(ValueError, match="'half': costs 'cost' must be whole numbers"):
        solve_exact([half], "cost", 1)
    with pytest.raises(ValueError, match="no curves"):
        solve_exact([], "cost", 1)
    with pytest.raises(ValueError, match="'half' has no cost 'flops': it has cost"):
        solve_bucketed([half], "flops", 1.0)
    with pytest.raises(ValueError, match="buckets must be at least 1"):
        solve_bucketed([half], "cost", 1.0, buckets=0)
    with pytest.raises(ValueError, match="must be finite"):
        solve_bucketed([half], "cost", np.nan)


@settings(deadline=None, max_examples=200)
@given(curves=problems())
def test_pareto_levels_drop_what_another_level_beats(curves: list[Curve]) -> None:
    cost, distortion = curves[0].costs["cost"], curves[0].distortion

    levels = pareto_levels(cost, distortion)

    assert (np.diff(cost[levels]) > 0.0).all()
    assert (np.diff(distortion[levels]) < 0.0).all()
    for level in range(cost.size):
        beaten_by = (cost[levels] <= cost[level]) & (distortion[levels] <= distortion[level])
        assert beaten_by.any()


@settings(deadline=None, max_examples=200)
@given(curves=problems(kinds=("cost", "bytes")), budget=st.integers(0, 20), data=st.data())
def test_moves_keep_the_budgets_and_leave_nothing_that_two_layers_could_gain(
    curves: list[Curve], budget: int, data: st.DataObject
) -> None:
    start = np.array([data.draw(st.integers(0, curve.distortion.size - 1)) for curve in curves])
    before = choose(curves, start)
    budgets = {"cost": before.costs["cost"] + budget, "bytes": before.costs["bytes"] + budget}

    after = improve_levels(curves, budgets, start)

    assert after.distortion <= before.distortion
    assert all(after.costs[kind] <= budgets[kind] for kind in budgets)
    if len(curves) <= 2:
        expected = brute_force(curves, budgets)
        assert expected is not None
        assert after.distortion == expected[0]
