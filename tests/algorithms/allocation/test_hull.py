"""The frontier of all budgets, against its definition and against the exact solver."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from pot_sparsity.algorithms.allocation.budget_dp import solve_exact
from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve, choose
from pot_sparsity.algorithms.allocation.hull import lower_hull, solve_hull, trace_frontier
from tests.algorithms.allocation.level_problems import brute_force, problems, pruned_network


def relaxed_optimum(curves: list[Curve], budget: float) -> float:
    """Least distortion where layers may mix levels: a linear program over all weights of levels."""
    sizes = [curve.distortion.size for curve in curves]
    one_each = np.repeat(np.eye(len(curves)), sizes, axis=1)
    result = linprog(
        np.concatenate([curve.distortion for curve in curves]),
        A_ub=np.concatenate([curve.costs["cost"] for curve in curves])[None],
        b_ub=[budget],
        A_eq=one_each,
        b_eq=np.ones(len(curves)),
    )
    assert result.fun is not None
    return float(result.fun)


@settings(deadline=None, max_examples=150)
@given(curves=problems(), budget=st.integers(0, 30))
def test_breakpoint_within_the_budget_is_at_most_one_step_above_the_bound(
    curves: list[Curve], budget: int
) -> None:
    frontier = trace_frontier(curves, "cost")
    expected = brute_force(curves, {"cost": budget})
    if expected is None:
        with pytest.raises(ValueError, match="out of reach: the cheapest choice costs"):
            frontier.allocation_at(budget)
        with pytest.raises(ValueError, match="out of reach"):
            solve_hull(curves, "cost", budget)
        return

    choice = choose(curves, frontier.allocation_at(budget))

    assert choice.costs["cost"] <= budget
    bound = frontier.lower_bound(budget)
    assert bound == pytest.approx(relaxed_optimum(curves, budget), abs=1e-7)
    largest = max(np.ptp(curve.distortion) for curve in curves)
    assert bound - 1e-9 <= expected[0] <= choice.distortion + 1e-9 <= bound + largest + 2e-9
    improved = solve_hull(curves, "cost", budget)
    assert improved.costs["cost"] <= budget
    assert expected[0] <= improved.distortion <= choice.distortion


@settings(deadline=None, max_examples=150)
@given(curves=problems())
def test_breakpoints_are_sorted_convex_and_optimal_for_what_they_cost(curves: list[Curve]) -> None:
    frontier = trace_frontier(curves, "cost")

    rise, fall = np.diff(frontier.cost), np.diff(frontier.distortion)
    assert (rise > 0.0).all()
    assert (fall < 0.0).all()
    assert (np.diff(fall / rise) >= -1e-9).all()
    for steps in range(frontier.layer.size + 1):
        levels = frontier.levels_after(steps)
        choice = choose(curves, levels)
        assert choice.costs["cost"] == pytest.approx(frontier.cost[steps])
        assert choice.distortion == pytest.approx(frontier.distortion[steps])
        expected = brute_force(curves, {"cost": frontier.cost[steps]})
        assert expected is not None
        assert expected[0] == pytest.approx(choice.distortion)
        assert expected[1] == pytest.approx(choice.costs["cost"])
        # Steps of equal slope may lie in between; the bisection takes the last that fits.
        np.testing.assert_array_equal(frontier.allocation_at(frontier.cost[steps]), levels)


@settings(deadline=None, max_examples=200)
@given(curves=problems(whole=False))
def test_hull_lies_below_all_levels_and_bends_upwards(curves: list[Curve]) -> None:
    cost, distortion = curves[0].costs["cost"], curves[0].distortion

    hull = lower_hull(cost, distortion)

    assert cost[hull[0]] == cost.min()
    assert distortion[hull[-1]] == distortion.min()
    slopes = np.diff(distortion[hull]) / np.diff(cost[hull])
    assert (np.diff(slopes) > 0.0).all()
    between = (cost >= cost[hull[0]]) & (cost <= cost[hull[-1]])
    line = np.interp(cost[between], cost[hull], distortion[hull])
    assert (distortion[between] >= line - 1e-9).all()


@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_exchanges_between_layers_close_the_gap_to_the_exact_optimum(noise: float) -> None:
    curves = pruned_network(1, 25, 20, noise=noise)
    weights = sum(curve.size for curve in curves)
    frontier = trace_frontier(curves, NONZEROS)

    for density in (0.6, 0.3, 0.1):
        budget = int(density * weights)
        exact = solve_exact(curves, NONZEROS, budget).distortion
        choice = solve_hull(curves, NONZEROS, budget)

        assert choice.costs[NONZEROS] <= budget
        assert frontier.lower_bound(budget) <= exact <= choice.distortion <= exact * 1.01


def test_distortion_falls_as_the_budget_grows() -> None:
    curves = pruned_network(2, 20, 10, noise=0.5, most=300)
    frontier = trace_frontier(curves, NONZEROS)
    budgets = np.linspace(0.0, sum(curve.size for curve in curves), 200)

    values = [choose(curves, frontier.allocation_at(budget)).distortion for budget in budgets]

    assert (np.diff(values) <= 1e-9).all()
    assert values[-1] == 0.0


def test_equal_layers_take_their_steps_in_order() -> None:
    costs = {"cost": np.array([0.0, 1.0, 2.0])}
    curves = [Curve(name, 2, np.array([4.0, 1.0, 0.0]), costs) for name in "abc"]

    frontier = trace_frontier(curves, "cost")

    assert frontier.layer.tolist() == [0, 1, 2, 0, 1, 2]
    assert frontier.level.tolist() == [1, 1, 1, 2, 2, 2]
    assert frontier.allocation_at(4.0).tolist() == [2, 1, 1]


def test_no_curves_are_refused() -> None:
    with pytest.raises(ValueError, match="no curves"):
        trace_frontier([], "cost")
