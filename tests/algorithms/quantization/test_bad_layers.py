"""Layers nobody would choose, for every quantizer: points of the grid, zeros that stay, or a clear error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.quantization.grid import fit_grid
from pot_sparsity.algorithms.quantization.registry import QUANTIZERS
from tests.algorithms.quantization.oracles import make_layer

NAMES = pytest.mark.parametrize("name", sorted(QUANTIZERS))


def broken(kind: str) -> tuple[Float64, Float64]:
    """A layer of two groups with something wrong in it."""
    shapes = {"one weight": (1, 1), "one row": (1, 9), "one column": (9, 1)}
    target, second = make_layer(31, 2, *shapes.get(kind, (4, 9)))
    if kind == "twin inputs":
        second[:, 1] = second[:, 0]
        second[:, :, 1] = second[:, :, 0]
    elif kind == "slightly indefinite":
        values, vectors = np.linalg.eigh(second)
        values[:, 0] = -0.01 * values[:, -1]
        second = vectors * values[:, None] @ vectors.swapaxes(1, 2)
    elif kind == "no input at all":
        second[...] = 0.0
    elif kind == "rows and columns of zeros":
        target[:, 1] = target[:, :, 2] = 0.0
    elif kind == "only zeros":
        target[...] = 0.0
    return target, second


@NAMES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        *("one weight", "one row", "one column", "twin inputs", "slightly indefinite", "no input at all"),
        *("rows and columns of zeros", "only zeros"),
    ],
)
def test_result_is_on_the_grid_and_zeros_stay(name: str, kind: str, symmetric: bool) -> None:
    target, second = broken(kind)
    target[:, :, 2::3] = 0.0
    grid = fit_grid(target, 3, symmetric=symmetric)
    result = QUANTIZERS[name](target, second, grid)
    assert (result.weight[target == 0.0] == 0.0).all()
    kept = target != 0.0
    assert (result.integers[kept] >= grid.low).all()
    assert (result.integers[kept] <= grid.high).all()
    expected = (result.integers - grid.zero_point[..., None]) * grid.scale[..., None]
    np.testing.assert_allclose(result.weight, np.where(kept, expected, 0.0), rtol=1e-12)
    difference = result.weight - target
    error = float(np.einsum("grc,gcd,grd->", difference, second, difference))
    assert result.error == pytest.approx(max(error, 0.0), rel=1e-9, abs=1e-12)
    assert np.isfinite([result.relative_error, result.damping]).all()
    if kind in ("no input at all", "only zeros"):
        assert result.error == 0.0


@NAMES
@given(st.sampled_from([np.nan, np.inf]), st.integers(0, 2 * 4 * 9 - 1), st.integers(0, 2 * 81 - 1))
@settings(deadline=None, max_examples=10)
def test_one_bad_number_anywhere_is_refused(name: str, value: float, weight: int, moment: int) -> None:
    target, second = make_layer(32, 2, 4, 9)
    grid = fit_grid(target, 4)
    poisoned_target, poisoned_second = target.copy(), second.copy()
    poisoned_target.ravel()[weight] = poisoned_second.ravel()[moment] = value
    with pytest.raises(ValueError, match="target weights hold NaN or infinite"):
        QUANTIZERS[name](poisoned_target, second, grid)
    with pytest.raises(ValueError, match="second moment of the layer's input holds NaN or infinite"):
        QUANTIZERS[name](target, poisoned_second, grid)
