from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.pruning.problem import row_errors
from pot_sparsity.algorithms.quantization import gptq as gptq_module
from pot_sparsity.algorithms.quantization import obq as obq_module
from pot_sparsity.algorithms.quantization.descent import descend
from pot_sparsity.algorithms.quantization.gptq import gptq, round_columns
from pot_sparsity.algorithms.quantization.grid import Grid, fit_grid, shrunk_grids
from pot_sparsity.algorithms.quantization.obq import obq
from pot_sparsity.algorithms.quantization.problem import GridProblem, QuantizerOptions
from pot_sparsity.algorithms.quantization.registry import QUANTIZERS, get_quantizer
from tests.algorithms.quantization.oracles import (
    best_possible,
    make_grid,
    make_layer,
    textbook_gptq,
    textbook_obq,
)

SHAPES = (st.integers(0, 9999), st.integers(1, 2), st.integers(1, 4), st.integers(1, 12))


def pruned(target: Float64, seed: int, share: float) -> Float64:
    return np.where(np.random.default_rng(seed + 7).random(target.shape) < share, 0.0, target)


@given(*SHAPES, st.booleans(), st.sampled_from([0.0, 0.5, 0.9]))
@settings(deadline=None, max_examples=80)
def test_obq_equals_the_textbook(
    seed: int, groups: int, rows: int, cols: int, symmetric: bool, sparsity: float
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    target, grid = pruned(target, seed, sparsity), make_grid(seed, groups, rows, symmetric=symmetric)
    result = obq(target, second, grid)
    np.testing.assert_array_equal(result.integers, textbook_obq(target, second, grid, target != 0))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("lazy", [1, 3, 7])
def test_rebuilding_the_inverse_changes_nothing(
    lazy: int, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, second = make_layer(1, 1, 5, 23)
    target, grid = pruned(target, 1, sparsity), make_grid(1, 1, 5, symmetric=True)
    monkeypatch.setattr(obq_module, "_LAZY", lazy)
    monkeypatch.setattr(obq_module, "_MEMORY", 2 * 8 * 23**2)
    result = obq(target, second, grid)
    np.testing.assert_array_equal(result.integers, textbook_obq(target, second, grid, target != 0))


def test_single_precision_serves_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    target, second = make_layer(2, 1, 6, 40)
    grid = fit_grid(target, 4)
    exact = obq(target, second, grid)
    monkeypatch.setattr(obq_module, "_SINGLE_COLS", 1)
    assert obq(target, second, grid).error == pytest.approx(exact.error, rel=0.05)


@given(*SHAPES, st.booleans(), st.sampled_from([0.0, 0.5, 0.9]), st.booleans())
@settings(deadline=None, max_examples=80)
def test_gptq_equals_the_textbook(
    seed: int, groups: int, rows: int, cols: int, symmetric: bool, sparsity: float, diagonal: bool
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    target, grid = pruned(target, seed, sparsity), make_grid(seed, groups, rows, symmetric=symmetric)
    result = gptq(target, second, grid, options=QuantizerOptions("diagonal" if diagonal else "columns"))
    expected = textbook_gptq(target, second, grid, target != 0, diagonal)
    np.testing.assert_array_equal(result.integers, expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_blocks_of_columns_change_nothing(sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    target, second = make_layer(4, 1, 5, 29)
    target, grid = pruned(target, 4, sparsity), make_grid(4, 1, 5, symmetric=False)
    monkeypatch.setattr(gptq_module, "_BLOCK", 4)
    monkeypatch.setattr(gptq_module, "_MEMORY", 2 * 8 * 16**2)
    expected = textbook_gptq(target, second, grid, target != 0, True)
    np.testing.assert_array_equal(gptq(target, second, grid).integers, expected)


def test_damping_is_that_of_the_damped_moment() -> None:
    target, second = make_layer(5, 1, 4, 12)
    grid = make_grid(5, 1, 4, symmetric=True)
    damped = second + 0.1 * np.trace(second[0]) / 12 * np.eye(12)
    for method in (obq, gptq):
        result = method(target, second, grid, options=QuantizerOptions(damping=0.1))
        assert result.damping == 0.1
        np.testing.assert_array_equal(result.integers, method(target, damped, grid).integers)


def test_the_best_grid_is_taken_row_by_row() -> None:
    target, second = make_layer(6, 2, 5, 14)
    grids = list(shrunk_grids(target, 3, steps=8))
    problem = GridProblem.of(target, second)
    integers, grid, _ = round_columns(problem, grids, QuantizerOptions())
    alone = np.stack([row_errors(gptq(target, second, g).weight, target, second) for g in grids])
    found = problem.result(integers, grid, 0.0)
    np.testing.assert_allclose(row_errors(found.weight, target, second), alone.min(axis=0))
    np.testing.assert_array_equal(
        grid.scale, np.take_along_axis(np.stack([g.scale for g in grids]), alone.argmin(axis=0)[None], 0)[0]
    )


@given(*SHAPES, st.booleans(), st.sampled_from(["nearest", "obq", "gptq"]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_descent_never_raises_the_error_of_a_row_and_ends_where_no_integer_wants_to_move(
    seed: int, groups: int, rows: int, cols: int, symmetric: bool, start: str, refit: bool
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    target, grid = pruned(target, seed, 0.3), make_grid(seed, groups, rows, symmetric=symmetric)
    options = QuantizerOptions(refit_scale=refit)
    first = QUANTIZERS[start](target, second, grid)
    result = QUANTIZERS[f"{start}_descent"](target, second, grid, options=options)
    before, after = (row_errors(r.weight, target, second) for r in (first, result))
    assert (after <= before * (1 + 1e-9) + 1e-12).all()
    assert (result.weight[target == 0] == 0).all()
    if not refit:
        assert result.grid is grid
        best = QUANTIZERS["best_descent"](target, second, grid)
        ends = [QUANTIZERS[name](target, second, grid) for name in ("gptq_descent", "obq_descent")]
        errors = np.stack([row_errors(end.weight, target, second) for end in ends])
        np.testing.assert_allclose(row_errors(best.weight, target, second), errors.min(axis=0), atol=1e-12)
    for group, row, col in np.argwhere(target != 0):
        for point in range(grid.low, grid.high + 1):
            moved = result.integers.copy()
            moved[group, row, col] = point
            other = row_errors(result.grid.dequantize(moved), target, second)
            assert other[group, row] >= after[group, row] * (1 - 1e-9) - 1e-9


@given(*SHAPES, st.booleans())
@settings(deadline=None, max_examples=25)
def test_refitted_scales_are_stationary(
    seed: int, groups: int, rows: int, cols: int, symmetric: bool
) -> None:
    target, second = make_layer(seed, groups, rows, cols)
    grid = make_grid(seed, groups, rows, symmetric=symmetric)
    fixed = get_quantizer("gptq_descent")(target, second, grid)
    free = get_quantizer("gptq_descent")(target, second, grid, options=QuantizerOptions(refit_scale=True))
    assert free.error <= fixed.error * (1 + 1e-9) + 1e-12
    steps = (free.integers - free.grid.zero_point[..., None]).astype(np.float64)
    for factor in (0.999, 1.001):
        other = steps * (free.grid.scale * factor)[..., None]
        rise = row_errors(other, target, second) - row_errors(free.weight, target, second)
        moved = free.grid.scale != grid.scale
        assert (rise[moved] > -1e-3 * row_errors(free.weight, target, second)[moved] - 1e-12).all()


@given(st.integers(0, 9999), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=40)
def test_no_method_beats_all_integers(seed: int, cols: int, symmetric: bool) -> None:
    target, second = make_layer(seed, 1, 2, cols)
    grid = make_grid(seed, 1, 2, symmetric=symmetric)
    least = [
        best_possible(
            target[0, r], second[0], float(grid.scale[0, r]), int(grid.zero_point[0, r]), grid.low, grid.high
        )
        for r in range(2)
    ]
    for method in QUANTIZERS.values():
        errors = row_errors(method(target, second, grid).weight, target, second)[0]
        assert (errors >= np.array(least) * (1 - 1e-9) - 1e-12).all()
        if cols == 1:
            np.testing.assert_allclose(errors, least, atol=1e-12)


def test_uncorrelated_inputs_need_no_compensation() -> None:
    target, _ = make_layer(8, 2, 3, 7)
    second = np.stack([np.diag(np.arange(1.0, 8.0))] * 2)
    grid = make_grid(8, 2, 3, symmetric=True)
    expected = QUANTIZERS["nearest"](target, second, grid).integers
    for method in QUANTIZERS.values():
        np.testing.assert_array_equal(method(target, second, grid).integers, expected)


def test_compensation_pays_on_correlated_inputs() -> None:
    random = np.random.default_rng(9)
    inputs = np.cumsum(random.normal(size=(48, 600)), axis=0)
    target, second = random.normal(size=(1, 16, 48)), (inputs @ inputs.T / 600)[None]
    grid = fit_grid(target, 4, importance=np.einsum("gcc->gc", second))
    error = {name: method(target, second, grid).error for name, method in QUANTIZERS.items()}
    assert error["obq"] < 0.3 * error["nearest"]
    assert error["gptq"] < 0.3 * error["nearest"]
    assert error["gptq_descent"] <= error["gptq"]
    assert error["obq_descent"] <= error["obq"]


def test_a_mask_that_takes_from_the_target_refits_first() -> None:
    target, second = make_layer(10, 1, 4, 10)
    mask = np.random.default_rng(1).random(target.shape) < 0.5
    grid = fit_grid(target, 6)
    for name, method in QUANTIZERS.items():
        result = method(target, second, grid, mask)
        assert (result.weight[~mask] == 0).all()
        difference = result.weight - target
        assert result.error == pytest.approx(
            float(np.einsum("grc,gcd,grd->", difference, second, difference))
        )
        masked = np.where(mask, target, 0.0)
        if name != "nearest":
            assert result.error < float(np.einsum("grc,gcd,grd->", masked - target, second, masked - target))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_scarce_and_dead_inputs(name: str) -> None:
    """Fewer samples than columns, a column that is never active, a row and a group of zeros."""
    random = np.random.default_rng(11)
    inputs = random.normal(size=(2, 12, 5))
    inputs[:, 3] = 0.0
    inputs[1] = 0.0
    target = random.normal(size=(2, 3, 12))
    target[0, 1] = 0.0
    second = inputs @ inputs.swapaxes(1, 2) / 5
    grid = fit_grid(target, 4)
    result = QUANTIZERS[name](target, second, grid)
    assert np.isfinite(result.weight).all()
    assert (result.weight[0, 1] == 0).all()
    assert (result.damping > 0) == (not name.startswith("nearest"))
    rounded = grid.dequantize(grid.quantize(target))
    np.testing.assert_array_equal(result.weight[:, :, 3], rounded[:, :, 3])
    np.testing.assert_array_equal(result.weight[1], rounded[1])
    assert 0 <= result.relative_error < 0.1


def test_an_indefinite_moment_is_damped_or_refused() -> None:
    target, second = make_layer(12, 1, 3, 6)
    grid = make_grid(12, 1, 3, symmetric=True)
    values, vectors = np.linalg.eigh(second[0])
    values[0] = -0.01 * values[-1]
    slightly = (vectors * values @ vectors.T)[None]
    for name in ("obq_descent", "gptq_descent"):
        result = QUANTIZERS[name](target, slightly, grid)
        assert result.damping > 0
        assert np.isfinite(result.weight).all()


def test_bad_input_is_refused() -> None:
    target, second = make_layer(13, 1, 2, 3)
    grid = make_grid(13, 1, 2, symmetric=True)
    for method in QUANTIZERS.values():
        with pytest.raises(ValueError, match="NaN"):
            method(np.full_like(target, np.nan), second, grid)
        with pytest.raises(ValueError, match="second moment must have shape"):
            method(target, second[:, :2, :2], grid)
        with pytest.raises(ValueError, match=r"the grid must have scales \(1, 2\), got \(1, 3\)"):
            method(target, second, make_grid(13, 1, 3, symmetric=True))
        with pytest.raises(ValueError, match="mask must have shape"):
            method(target, second, grid, np.ones((1, 2, 2), np.bool_))
    with pytest.raises(ValueError, match="quantizer 'best' is not known: use one of best_descent"):
        get_quantizer("best")
    with pytest.raises(ValueError, match="damping must not be negative"):
        QuantizerOptions(damping=-1.0)
    with pytest.raises(ValueError, match="sweeps must not be negative"):
        QuantizerOptions(sweeps=-1)


def test_no_sweep_leaves_everything_as_it_is() -> None:
    target, second = make_layer(14, 1, 3, 8)
    grid = make_grid(14, 1, 3, symmetric=True)
    problem = GridProblem.of(target, second)
    start = problem.nearest(grid)
    integers, same = descend(problem, start, grid, QuantizerOptions(sweeps=0))
    np.testing.assert_array_equal(integers, start)
    assert same is grid


def test_the_same_call_gives_the_same_integers() -> None:
    target, second = make_layer(15, 2, 4, 20)
    grid = Grid(np.full((2, 4), 0.2), np.zeros((2, 4), np.int32), -8, 7)
    for method in QUANTIZERS.values():
        first, again = method(target, second, grid), method(target.copy(), second.copy(), grid)
        np.testing.assert_array_equal(first.integers, again.integers)
