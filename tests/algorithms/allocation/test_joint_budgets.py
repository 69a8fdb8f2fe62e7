"""Several budgets at once, against trying everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.allocation.budget_dp import solve_bucketed
from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.algorithms.allocation.joint_budgets import solve_joint
from tests.algorithms.allocation.level_problems import brute_force, problems, pruned_network


@settings(deadline=None, max_examples=150)
@given(curves=problems(kinds=("flops", "bytes")), flops=st.integers(0, 25), size=st.integers(0, 25))
def test_two_budgets_are_kept_whenever_any_choice_keeps_them(
    curves: list[Curve], flops: int, size: int
) -> None:
    budgets = {"flops": float(flops), "bytes": float(size)}
    expected = brute_force(curves, budgets)
    if expected is None:
        with pytest.raises(ValueError, match=r"out of reach|no choice of levels keeps all budgets at once"):
            solve_joint(curves, budgets)
        return

    choice = solve_joint(curves, budgets)

    assert choice.costs["flops"] <= flops
    assert choice.costs["bytes"] <= size
    assert choice.distortion >= expected[0]
    if len(curves) <= 2:  # exchanges of two layers try every pair of levels
        assert choice.distortion == expected[0]


def test_two_budgets_come_close_to_the_optimum() -> None:
    ratios = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        curves = []
        for index in range(5):
            kept = np.sort(random.random(5))
            costs = {
                "flops": kept * random.uniform(1, 9),
                "bytes": kept * random.uniform(1, 9) + 0.1 * random.random(5),
            }
            curves.append(Curve(f"layer{index}", 9, random.lognormal(0.0, 1.0) * (1.0 - kept) ** 3, costs))
        budgets = {
            kind: 0.4 * sum(curve.costs[kind].max() for curve in curves) for kind in ("flops", "bytes")
        }
        expected = brute_force(curves, budgets)
        if expected is None:
            continue
        ratios.append(solve_joint(curves, budgets).distortion / expected[0])

    assert len(ratios) > 50
    assert np.mean(np.array(ratios) < 1.0 + 1e-9) > 0.8
    assert max(ratios) < 1.5


def test_three_budgets_of_a_network() -> None:
    curves = pruned_network(3, 20, 12, noise=0.4)
    random = np.random.default_rng(0)
    curves = [
        Curve(
            curve.name,
            curve.size,
            curve.distortion,
            {**curve.costs, "seconds": curve.costs["flops"] * random.lognormal()},
        )
        for curve in curves
    ]
    budgets = {kind: 0.3 * sum(curve.costs[kind].max() for curve in curves) for kind in curves[0].costs}

    choice = solve_joint(curves, budgets)

    assert all(choice.costs[kind] <= budget for kind, budget in budgets.items())
    alone = [solve_bucketed(curves, kind, budget).distortion for kind, budget in budgets.items()]
    assert choice.distortion >= max(alone) * 0.999
    again = solve_joint(curves, budgets)
    np.testing.assert_array_equal(choice.levels, again.levels)


def test_one_budget_and_one_that_does_not_bind_are_the_plain_problem() -> None:
    curves = pruned_network(4, 15, 10)
    weights = sum(curve.size for curve in curves)
    flops = sum(curve.costs["flops"].max() for curve in curves)
    best = solve_bucketed(curves, NONZEROS, 0.2 * weights).distortion

    assert solve_joint(curves, {NONZEROS: 0.2 * weights}).distortion <= best * 1.01
    assert solve_joint(curves, {NONZEROS: 0.2 * weights, "flops": flops}).distortion <= best * 1.01


def test_budgets_out_of_reach_are_named() -> None:
    costs = {"flops": np.array([0.0, 4.0]), "bytes": np.array([4.0, 0.0])}
    curves = [Curve("a", 4, np.array([0.0, 0.0]), costs)]

    with pytest.raises(
        ValueError, match=r"keeps all budgets at once \(flops, bytes\).* is 4 'bytes' for 3; raise"
    ):
        solve_joint(curves, {"flops": 3.0, "bytes": 3.0})
    with pytest.raises(ValueError, match="no budget to keep"):
        solve_joint(curves, {})
