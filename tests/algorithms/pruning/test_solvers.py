from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.algorithms.pruning.problem import SolverOptions
from pot_sparsity.algorithms.pruning.projection import block_count, pattern_index
from pot_sparsity.algorithms.pruning.registry import DEFAULT_METHOD, SOLVERS, get_solver
from tests.algorithms.pruning.layers import brute_force, make_layer, oracle_error, oracle_refit

METHODS = pytest.mark.parametrize("method", sorted(SOLVERS))
REFITTED = ["admm", "exact_obs", "l_obs", "magnitude_refit", "wanda_refit"]


@METHODS
@given(
    st.integers(0, 999),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.floats(0, 1),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_counts_zeros_and_error_are_exact(
    method: str, seed: int, groups: int, rows: int, cols: int, sparsity: float, holes: bool
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    if holes:
        target[np.random.default_rng(seed).random(target.shape) < 0.3] = 0.0
    zeros = round(sparsity * target.size)
    result = SOLVERS[method](target, second, zeros)
    assert np.count_nonzero(~result.mask) == zeros
    assert (result.weight[~result.mask] == 0.0).all()
    assert result.weight.dtype == np.float64
    assert result.error == pytest.approx(oracle_error(result.weight, target, second), rel=1e-6, abs=1e-9)
    empty = target == 0.0
    if empty.sum() <= zeros:
        assert not result.mask[empty].any()
    else:
        assert result.error == 0.0
    if method in REFITTED:
        expected = oracle_refit(target, second, result.mask)
        energy = oracle_error(np.zeros_like(target), target, second)
        assert result.error <= oracle_error(expected, target, second) + 1e-9 * energy


@pytest.mark.parametrize("method", REFITTED)
@given(st.integers(0, 999), st.integers(1, 2), st.integers(1, 2), st.integers(2, 3), st.data())
@settings(deadline=None, max_examples=25)
def test_never_below_the_best_of_all_masks(
    method: str, seed: int, groups: int, rows: int, cols: int, data: st.DataObject
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    zeros = data.draw(st.integers(0, target.size))
    best = brute_force(target, second, zeros)
    result = SOLVERS[method](target, second, zeros, options=SolverOptions(polish=method != "magnitude_refit"))
    assert result.error >= best * (1 - 1e-6) - 1e-9
    if method == "admm":
        assert result.error <= SOLVERS["magnitude_refit"](target, second, zeros).error * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.9])
def test_admm_beats_exact_obs_and_exact_obs_beats_magnitude(sparsity: float) -> None:
    errors = np.zeros(3)
    for seed in range(6):
        target, second = make_layer(seed, 1, 12, 40)
        zeros = round(sparsity * target.size)
        results = [SOLVERS[m](target, second, zeros) for m in ("admm", "exact_obs", "magnitude_refit")]
        errors += [result.relative_error for result in results]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("method", ["admm", "exact_obs", "sparsegpt"])
@pytest.mark.parametrize("cols", [1, 5, 12, 18])
@pytest.mark.parametrize("stride", [1, 3])
def test_n_of_m_holds_everywhere(method: str, cols: int, stride: int) -> None:
    if cols % stride:
        pytest.skip("the stride must divide the columns")
    target, second = make_layer(cols, 2, 3, cols)
    result = SOLVERS[method](target, second, 0, Pattern("n:m", n=2, m=4, stride=stride))
    for index in pattern_index(cols, 4, stride):
        members = index[index < cols]
        assert (result.mask[..., members].sum(axis=-1) <= 2).all()
    expected = oracle_refit(target, second, result.mask)
    if method in REFITTED:
        assert result.error <= oracle_error(expected, target, second) * (1 + 1e-6) + 1e-12
    magnitude = SOLVERS["magnitude_refit"](target, second, 0, Pattern("n:m", n=2, m=4, stride=stride))
    assert result.mask.sum() == magnitude.mask.sum()
    if cols > 5 and method in REFITTED:
        assert result.error < magnitude.error


@METHODS
@pytest.mark.parametrize("cols", [1, 6, 15])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 1.0])
def test_blocks_go_as_a_whole(method: str, cols: int, sparsity: float) -> None:
    target, second = make_layer(cols, 2, 4, cols)
    zeros = round(sparsity * target.size)
    result = SOLVERS[method](target, second, zeros, Pattern("block", m=4))
    blocks = [index[index < cols] for index in pattern_index(cols, 4, 1)]
    gone = np.stack([(~result.mask[..., b]).all(axis=-1) for b in blocks], axis=-1)
    kept = np.stack([result.mask[..., b].all(axis=-1) for b in blocks], axis=-1)
    assert (gone ^ kept).all()
    assert gone.sum() == block_count(zeros, target.size, gone.size)


@METHODS
@pytest.mark.parametrize("kind", ["singular", "indefinite", "dead", "zero", "one sample", "zero rows"])
@pytest.mark.parametrize("cols", [7, 60])
def test_bad_moments_never_give_nan(method: str, kind: str, cols: int) -> None:
    target, second = make_layer(1, 2, 5, cols, rank=1 if kind == "one sample" else None)
    if kind == "singular":
        second[:, 1] = second[:, 0]
        second[:, :, 1] = second[:, :, 0]
    elif kind == "indefinite":
        second -= 0.2 * np.linalg.eigvalsh(second)[:, :1, None] * 2 * np.eye(cols) + 1e-3 * np.eye(cols)
    elif kind == "dead":
        second[:, 2:5] = second[:, :, 2:5] = 0.0
    elif kind == "zero":
        second[...] = 0.0
    elif kind == "zero rows":
        target[:, 0] = 0.0
    zeros = target.size // 2
    result = SOLVERS[method](target, second, zeros, options=SolverOptions(polish=True))
    assert np.isfinite(result.weight).all()
    assert np.isfinite([result.error, result.relative_error, result.damping]).all()
    assert np.count_nonzero(~result.mask) == zeros
    assert 0.0 <= result.relative_error <= 1.0 + 1e-9 or method not in REFITTED
    if kind == "dead":
        assert not result.mask[..., 2:5].any()
    if kind == "zero":
        assert result.error == 0.0


@METHODS
def test_more_dead_inputs_than_zeros_change_nothing(method: str) -> None:
    target, second = make_layer(2, 1, 4, 6)
    second[:, 1:4] = second[:, :, 1:4] = 0.0
    result = SOLVERS[method](target, second, 5)
    assert result.error == 0.0
    np.testing.assert_array_equal(result.weight[result.mask], target[result.mask])


@METHODS
def test_bad_input_is_named(method: str) -> None:
    target, second = make_layer(3, 1, 2, 3)
    solve = SOLVERS[method]
    nan = np.full_like(target, np.nan)
    with pytest.raises(ValueError, match="target weights hold NaN"):
        solve(nan, second, 1)
    with pytest.raises(ValueError, match=r"second moment .* NaN or infinite"):
        solve(target, second * np.inf, 1)
    with pytest.raises(ValueError, match="zeros must be between 0 and 6, got 7"):
        solve(target, second, 7)
    with pytest.raises(ValueError, match=r"must have shape \(1, 3, 3\)"):
        solve(target, second[:, :2, :2], 1)
    with pytest.raises(ValueError, match=r"must be \[groups, rows, cols\]"):
        solve(target[0], second, 1)
    with pytest.raises(ValueError, match="stride 2 does not divide"):
        solve(target, second, 1, Pattern("n:m", n=1, m=2, stride=2))


@METHODS
def test_same_input_same_bytes(method: str) -> None:
    target, second = make_layer(4, 2, 6, 30)
    first, again = (SOLVERS[method](target, second, 200) for _ in range(2))
    assert first.weight.tobytes() == again.weight.tobytes()


def test_many_depthwise_groups_share_one_budget() -> None:
    target, second = make_layer(5, 300, 1, 9)
    zeros = round(0.6 * target.size)
    errors = {name: SOLVERS[name](target, second, zeros).error for name in REFITTED}
    assert errors["admm"] < errors["exact_obs"] * 1.01 < min(errors["magnitude_refit"], errors["wanda_refit"])


def test_polish_lowers_the_error_and_respects_its_budget() -> None:
    target, second = make_layer(6, 1, 8, 30)
    for name in ("admm", "exact_obs"):
        plain = SOLVERS[name](target, second, 150)
        polished = SOLVERS[name](target, second, 150, options=SolverOptions(polish=True))
        none = SOLVERS[name](target, second, 150, options=SolverOptions(polish=True, polish_swaps=0))
        assert polished.error <= plain.error
        assert none.error == pytest.approx(plain.error)
    assert polished.error < plain.error


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="rho must hold positive"):
        SolverOptions(rho=(0.0,))
    with pytest.raises(ValueError, match=r"effort must be between 1 and 100, got 0\.5"):
        SolverOptions(effort=0.5)
    with pytest.raises(ValueError, match="polish_swaps must not be negative"):
        SolverOptions(polish_swaps=-1)
    with pytest.raises(ValueError, match="polish_seconds must not be negative"):
        SolverOptions(polish_seconds=float("nan"))


def test_effort_and_rho_reach_the_solver() -> None:
    target, second = make_layer(8, 1, 40, 90)
    errors = [
        SOLVERS["admm"](target, second, 2700, options=SolverOptions(rho=(1.0,), effort=effort)).error
        for effort in (1.0, 8.0)
    ]
    assert errors[1] < errors[0]


def test_registry_names_what_there_is() -> None:
    assert get_solver(DEFAULT_METHOD) is SOLVERS["admm"]
    with pytest.raises(ValueError, match="'obc' is not known: use one of admm, exact_obs, sparsegpt, l_obs,"):
        get_solver("obc")
