"""The dynamic program with ternary search: as good as the exact one on convex curves, not on others."""

from __future__ import annotations

import numpy as np
import pytest

from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.algorithms.allocation.rate_distortion import allocate_zeros
from tests.tools.loading import tool

ternary = tool("rd_ternary")


def curve(name: str, distortion: list[float]) -> Curve:
    size = len(distortion) - 1
    return Curve(name, size, np.array(distortion, np.float64), {NONZEROS: size - np.arange(size + 1.0)})


def convex(seed: int, size: int) -> Curve:
    random = np.random.default_rng(seed)
    steps = np.sort(random.exponential(size=size)) * random.lognormal()
    return curve(f"layer{seed}", [0.0, *np.cumsum(steps)])


def total_of(curves: list[Curve], zeros: np.ndarray) -> float:
    return float(sum(c.at(np.array([z]))[0] for c, z in zip(curves, zeros.tolist(), strict=True)))


@pytest.mark.parametrize("total", [1, 17, 60, 99])
def test_convex_curves_are_solved_exactly(total: int) -> None:
    curves = [convex(seed, size) for seed, size in ((1, 20), (2, 50), (3, 30))]
    sizes = np.array([c.size for c in curves])
    exact = allocate_zeros(curves, total, np.zeros_like(sizes), sizes)
    found = ternary.allocate_by_ternary_search(curves, total)
    assert found.sum() == total
    assert (found <= sizes).all()
    assert total_of(curves, found) == pytest.approx(total_of(curves, exact))


def test_a_spike_misleads_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    spiky = curve("spiky", [0.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.1, 0.2, 0.3])
    other = curve("other", [float(count) for count in range(10)])
    sizes = np.array([9, 9])
    exact = allocate_zeros([spiky, other], 9, np.zeros_like(sizes), sizes)
    found = ternary.allocate_by_ternary_search([spiky, other], 9)
    assert found.sum() == exact.sum() == 9
    assert total_of([spiky, other], exact) == pytest.approx(0.3)
    assert total_of([spiky, other], found) >= 0.3


def test_buckets_are_filled_up_to_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary, "BUCKETS", 7)
    curves = [convex(4, 40), convex(5, 33)]
    for total in (10, 37, 73):
        assert ternary.allocate_by_ternary_search(curves, total).sum() == total
