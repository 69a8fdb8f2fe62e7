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
@pytest.mark.parametrize(("groups", "rows", "cols"), [(2, 6, 30), (1, 150, 60), (70, 2, 9)])
def test_same_bytes_whatever_the_workers(method: str, groups: int, rows: int, cols: int) -> None:
    target, second = make_layer(4, groups, rows, cols)
    first, again, parallel = (
        SOLVERS[method](
            target, second, target.size * 2 // 3, options=SolverOptions(polish=rows == 6, workers=workers)
        )
        for workers in (1, 1, 3)
    )
    assert first.weight.tobytes() == again.weight.tobytes() == parallel.weight.tobytes()


@METHODS
@pytest.mark.parametrize("samples", [3, 20])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4"])
def test_fewer_samples_than_columns(method: str, samples: int, pattern: str) -> None:
    target, second = make_layer(9, 1, 8, 64, rank=samples)
    result = SOLVERS[method](target, second, target.size // 2, Pattern.parse(pattern))
    assert np.isfinite(result.weight).all()
    assert np.count_nonzero(~result.mask) == target.size // 2
    assert result.error == pytest.approx(oracle_error(result.weight, target, second), rel=1e-6, abs=1e-6)
    if method in REFITTED:
        assert result.damping > 0.0
        # What is kept could always stay as it was.
        untouched = oracle_error(np.where(result.mask, target, 0.0), target, second)
        assert result.error <= untouched * (1 + 1e-6)


@METHODS
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 20), (20, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_one_row_or_one_column(method: str, rows: int, cols: int, sparsity: float) -> None:
    target, second = make_layer(10, 1, rows, cols)
    zeros = round(sparsity * target.size)
    result = SOLVERS[method](target, second, zeros, options=SolverOptions(polish=True))
    assert np.count_nonzero(~result.mask) == zeros
    if zeros == 0:
        np.testing.assert_array_equal(result.weight, target)
        assert result.error == 0.0
    if zeros == target.size:
        assert result.relative_error == pytest.approx(1.0)


@METHODS
def test_a_pattern_longer_than_the_row_still_fits(method: str) -> None:
    target, second = make_layer(11, 1, 3, 5)
    assert (SOLVERS[method](target, second, 0, Pattern("n:m", n=2, m=8)).mask.sum(axis=-1) == 2).all()
    assert not SOLVERS[method](target, second, 15, Pattern("block", m=16)).mask.any()
    assert SOLVERS[method](target, second, 0, Pattern("block", m=16)).mask.all()


def test_sparsegpt_is_the_published_walk() -> None:
    target, second = make_layer(12, 1, 7, 20)
    weight, gone = target[0].copy(), np.zeros((7, 20), np.bool_)
    damped = second[0] + 0.01 * np.trace(second[0]) / 20 * np.eye(20)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    score = weight**2 / upper.diagonal() ** 2
    gone.ravel()[np.argsort(score.ravel(), kind="stable")[:63]] = True
    for column in range(20):
        error = np.where(gone[:, column], weight[:, column] / upper[column, column], 0.0)
        weight -= error[:, None] * upper[column]
    weight[gone] = 0.0
    result = SOLVERS["sparsegpt"](target, second, 63)
    np.testing.assert_array_equal(~result.mask[0], gone)
    np.testing.assert_allclose(result.weight[0], weight, rtol=1e-8, atol=1e-10)
    assert result.damping == 0.01


def test_sparsegpt_lets_every_block_of_columns_lose_its_share() -> None:
    target, second = make_layer(13, 1, 10, 300)
    result = SOLVERS["sparsegpt"](target, second, 1001)
    assert np.count_nonzero(~result.mask) == 1001
    assert np.count_nonzero(~result.mask[..., :128]) == 1280 * 1001 // 3000
    refitted = SOLVERS["magnitude_refit"](target, second, 1001)
    assert result.error < SOLVERS["magnitude"](target, second, 1001).error
    assert oracle_error(oracle_refit(target, second, result.mask), target, second) < refitted.error


def test_wanda_weighs_by_the_size_of_the_input() -> None:
    target, second = make_layer(14, 1, 6, 12)
    result = SOLVERS["wanda"](target, second, 30)
    score = np.abs(target[0]) * np.sqrt(second[0].diagonal())
    assert set(np.flatnonzero(~result.mask)) == set(np.argsort(score.ravel())[:30].tolist())
    np.testing.assert_array_equal(result.weight[result.mask], target[result.mask])


def test_l_obs_scores_once_on_the_dense_inverse() -> None:
    target, second = make_layer(15, 1, 6, 12)
    result = SOLVERS["l_obs"](target, second, 30)
    score = target[0] ** 2 / np.linalg.inv(second[0]).diagonal()
    assert set(np.flatnonzero(~result.mask)) == set(np.argsort(score.ravel())[:30].tolist())
    inverse = np.linalg.inv(second[0])
    for row, mask in enumerate(result.mask[0]):
        gone = np.flatnonzero(~mask)
        pull = np.linalg.solve(inverse[np.ix_(gone, gone)], target[0, row, gone])
        np.testing.assert_allclose(
            result.weight[0, row],
            np.where(mask, target[0, row] - pull @ inverse[gone], 0.0),
            rtol=1e-6,
            atol=1e-9,
        )


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
    with pytest.raises(ValueError, match="restarts must not be negative"):
        SolverOptions(restarts=-1)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        SolverOptions(workers=0)
    with pytest.raises(ValueError, match="polish_swaps must not be negative"):
        SolverOptions(polish_swaps=-1)
    with pytest.raises(ValueError, match="polish_seconds must not be negative"):
        SolverOptions(polish_seconds=float("nan"))
    with pytest.raises(ValueError, match="refit_products must be at least 1"):
        SolverOptions(refit_products=0)


def test_effort_and_rho_reach_the_solver() -> None:
    target, second = make_layer(8, 1, 40, 90)
    errors = [
        SOLVERS["admm"](target, second, 2700, options=SolverOptions(rho=(1.0,), effort=effort)).error
        for effort in (1.0, 8.0)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4"])
def test_restarts_never_raise_the_error(pattern: str) -> None:
    target, second = make_layer(16, 1, 60, 80)
    shape = Pattern.parse(pattern)
    errors = [
        SOLVERS["admm"](
            target, second, 3600 if pattern != "2:4" else 0, shape, options=SolverOptions(restarts=restarts)
        ).error
        for restarts in (0, 1, 4)
    ]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[0] > errors[2]


def test_registry_names_what_there_is() -> None:
    assert get_solver(DEFAULT_METHOD) is SOLVERS["admm"]
    with pytest.raises(ValueError, match="'obc' is not known: use one of admm, exact_obs, sparsegpt, l_obs,"):
        get_solver("obc")
