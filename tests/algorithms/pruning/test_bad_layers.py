"""Layers nobody would choose, for every solver and pattern: a correct result or a clear error, never NaN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern
from pot_sparsity.algorithms.pruning.problem import SolverOptions
from pot_sparsity.algorithms.pruning.projection import block_count, pattern_index
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from tests.algorithms.pruning.layers import make_layer, oracle_error, oracle_refit

METHODS = pytest.mark.parametrize("method", sorted(SOLVERS))
REFITTED = ["admm", "exact_obs", "l_obs", "magnitude_refit", "wanda_refit"]
UNSTRUCTURED, TWO_FOUR, BLOCKS = Pattern(), Pattern("n:m", n=2, m=4), Pattern("block", m=4)
PATTERNS = pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_FOUR, BLOCKS], ids=str)
STRIDED = pytest.mark.parametrize(
    "pattern", [Pattern("n:m", n=2, m=4, stride=3), Pattern("block", m=4, stride=3)], ids=str
)
COLS = 18


def broken(kind: str) -> tuple[Float64, Float64]:
    """A layer of two groups with something wrong in it."""
    target, second = make_layer(21, 2, 5, COLS, rank=3 if kind == "three samples" else None)
    if kind == "twin inputs":
        second[:, 1], target[:, :, 1] = second[:, 0], target[:, :, 0]
        second[:, :, 1] = second[:, :, 0]
    elif kind == "indefinite":
        second -= 0.4 * np.linalg.eigvalsh(second).mean() * np.eye(COLS)
        assert (np.linalg.eigvalsh(second)[:, 0] < 0).all()
    elif kind == "dead inputs":
        second[:, 4:13:4] = second[:, :, 4:13:4] = 0.0
    elif kind == "no input at all":
        second[...] = 0.0
    elif kind == "rows of zeros":
        target[:, 1:3] = 0.0
    elif kind == "columns of zeros":
        target[:, :, 4:13:4] = 0.0
    elif kind == "only zeros":
        target[...] = 0.0
    return target, second


KINDS = [
    "twin inputs",
    "indefinite",
    "dead inputs",
    "no input at all",
    "three samples",
    "rows of zeros",
    "columns of zeros",
    "only zeros",
]


def assert_pattern(mask: Bool, zeros: int, pattern: Pattern, free: Bool | None = None) -> None:
    """The mask obeys the pattern and has as many zeros as were asked for.

    A group of ``n:m`` may keep fewer than n only where it drops ``free`` weights, which cost nothing.
    """
    cols = mask.shape[-1]
    if pattern.kind == "unstructured":
        assert np.count_nonzero(~mask) == zeros
        return
    groups = [index[index < cols] for index in pattern_index(cols, pattern.m, pattern.stride)]
    kept = np.stack([mask[..., members].sum(axis=-1) for members in groups], axis=-1)
    sizes = np.array([len(members) for members in groups])
    if pattern.kind == "n:m":
        limit = np.minimum(sizes, pattern.n)
        assert (kept <= limit).all()
        costly = mask if free is None else mask | ~free
        able = np.stack([costly[..., members].sum(axis=-1) for members in groups], axis=-1)
        assert (kept >= np.minimum(limit, able)).all()
    else:
        assert ((kept == 0) | (kept == sizes)).all()
        assert np.count_nonzero(kept == 0) == block_count(zeros, mask.size, kept.size)


@METHODS
@PATTERNS
@pytest.mark.parametrize("kind", KINDS)
def test_result_is_finite_and_obeys(method: str, pattern: Pattern, kind: str) -> None:
    target, second = broken(kind)
    zeros = target.size // 2
    result = SOLVERS[method](target, second, zeros, pattern)
    assert np.isfinite(result.weight).all()
    assert (result.weight[~result.mask] == 0.0).all()
    free = (target == 0.0) | (np.einsum("gcc->gc", second) <= 0.0)[:, None, :]
    assert_pattern(result.mask, zeros, pattern, free)
    error = max(0.0, oracle_error(result.weight, target, second))
    assert result.error == pytest.approx(error, rel=1e-6, abs=1e-9)
    if method in REFITTED and kind != "indefinite":
        # What is kept could always stay as it was.
        untouched = oracle_error(np.where(result.mask, target, 0.0), target, second)
        assert result.error <= untouched * (1 + 1e-6) + 1e-9
    if kind == "rows of zeros":
        np.testing.assert_allclose(result.weight[:, 1:3], 0.0, atol=1e-12)
    if kind in ("columns of zeros", "dead inputs") and pattern.kind != "block":
        assert not result.mask[:, :, 4:13:4].any()
    if kind in ("only zeros", "no input at all"):
        assert result.error == 0.0


@pytest.mark.parametrize("method", REFITTED)
@pytest.mark.parametrize("kind", ["twin inputs", "three samples"])
def test_singular_moments_lose_nothing_that_can_be_kept(method: str, kind: str) -> None:
    """The error is that of the best weights on the mask, which least squares finds without an inverse."""
    target, second = broken(kind)
    result = SOLVERS[method](target, second, target.size // 2)
    best = 0.0
    for group, row in np.ndindex(*target.shape[:2]):
        kept = result.mask[group, row]
        values, vectors = np.linalg.eigh(second[group])
        root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
        found = np.linalg.lstsq(root[:, kept], root @ target[group, row])[0]
        best += float(np.sum((root[:, kept] @ found - root @ target[group, row]) ** 2))
    energy = oracle_error(np.zeros_like(target), target, second)
    assert best - 1e-9 * energy <= result.error <= best * 1.01 + 1e-5 * energy


@METHODS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [UNSTRUCTURED, BLOCKS], ids=str)
def test_nothing_and_everything(method: str, kind: str, pattern: Pattern) -> None:
    target, second = broken(kind)
    none, everything = (SOLVERS[method](target, second, zeros, pattern) for zeros in (0, target.size))
    np.testing.assert_array_equal(none.weight, target)
    assert none.mask.all()
    assert none.error == none.relative_error == 0.0
    assert not everything.mask.any()
    assert (everything.weight == 0.0).all()
    energy = max(0.0, oracle_error(np.zeros_like(target), target, second))
    assert everything.error == pytest.approx(energy)
    assert everything.relative_error == pytest.approx(1.0 if energy else 0.0)


@METHODS
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 18), (18, 1), (1, 3)])
@pytest.mark.parametrize("pattern", [TWO_FOUR, BLOCKS], ids=str)
def test_one_row_or_one_column_under_a_pattern(method: str, rows: int, cols: int, pattern: Pattern) -> None:
    target, second = make_layer(22, 1, rows, cols)
    zeros = target.size // 2
    result = SOLVERS[method](target, second, zeros, pattern)
    assert_pattern(result.mask, zeros, pattern)
    assert np.isfinite(result.weight).all()
    if method in REFITTED:
        best = oracle_error(oracle_refit(target, second, result.mask), target, second)
        assert result.error == pytest.approx(best, rel=1e-6, abs=1e-9)


@METHODS
@STRIDED
def test_groups_over_input_channels(method: str, pattern: Pattern) -> None:
    target, second = make_layer(23, 1, 4, COLS)
    result = SOLVERS[method](target, second, target.size // 2, pattern)
    assert_pattern(result.mask, target.size // 2, pattern)


@METHODS
@pytest.mark.parametrize("kind", ["n:m", "block"])
@pytest.mark.parametrize(("cols", "stride"), [(18, 4), (18, 0), (1, 9)])
def test_a_stride_that_does_not_fit_is_refused(method: str, kind: str, cols: int, stride: int) -> None:
    target, second = make_layer(24, 1, 3, cols)
    pattern = TWO_FOUR if kind == "n:m" else BLOCKS
    awkward = Pattern(pattern.kind, pattern.n, pattern.m, stride)
    with pytest.raises(ValueError, match=f"stride {stride} does not divide the layer's {cols} columns"):
        SOLVERS[method](target, second, 1, awkward)


@METHODS
@given(
    st.sampled_from([UNSTRUCTURED, TWO_FOUR, BLOCKS]),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.integers(0, 2 * 3 * 6 - 1),
    st.integers(0, 2 * 6 * 6 - 1),
)
@settings(deadline=None, max_examples=20)
def test_one_bad_number_anywhere_is_refused(
    method: str, pattern: Pattern, value: float, weight: int, moment: int
) -> None:
    target, second = make_layer(25, 2, 3, 6)
    poisoned_target, poisoned_second = target.copy(), second.copy()
    poisoned_target.ravel()[weight] = poisoned_second.ravel()[moment] = value
    with pytest.raises(ValueError, match="target weights hold NaN or infinite"):
        SOLVERS[method](poisoned_target, second, 18, pattern)
    with pytest.raises(ValueError, match="second moment of the layer's input holds NaN or infinite"):
        SOLVERS[method](target, poisoned_second, 18, pattern)


@METHODS
@PATTERNS
@pytest.mark.parametrize("zeros", [-1, 37])
def test_counts_that_no_layer_has_are_refused(method: str, pattern: Pattern, zeros: int) -> None:
    target, second = make_layer(26, 2, 3, 6)
    with pytest.raises(ValueError, match=f"zeros must be between 0 and 36, got {zeros}"):
        SOLVERS[method](target, second, zeros, pattern)


@pytest.mark.parametrize("method", sorted(set(SOLVERS) - {"exact_obs"}))
@PATTERNS
@pytest.mark.parametrize("power", [-150, 150])
def test_the_size_of_the_inputs_changes_no_weight(method: str, pattern: Pattern, power: int) -> None:
    """Inputs of any size that float64 moments can hold, though squares of their products leave float32."""
    target, second = make_layer(27, 2, 5, COLS)
    usual = SOLVERS[method](target, second, target.size // 2, pattern)
    scaled = SOLVERS[method](target, np.ldexp(second, power), target.size // 2, pattern)
    np.testing.assert_array_equal(scaled.mask, usual.mask)
    np.testing.assert_allclose(scaled.weight, usual.weight, rtol=1e-9, atol=1e-12)
    assert scaled.error == pytest.approx(np.ldexp(usual.error, power), rel=1e-6)


@pytest.mark.parametrize("cols", [9, 18])
def test_restarts_with_a_short_last_block(cols: int) -> None:
    """Masks of as many blocks may keep different numbers of weights, which no price per weight evens out."""
    target, second = make_layer(2, 24, 1, cols)
    zeros = int(0.6 * target.size)
    plain, restarted = (
        SOLVERS["admm"](target, second, zeros, BLOCKS, options=SolverOptions(restarts=restarts))
        for restarts in (0, 2)
    )
    assert_pattern(restarted.mask, zeros, BLOCKS)
    assert restarted.error <= plain.error
