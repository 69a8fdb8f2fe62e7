"""Which layers are solved with all threads on their rows, and that nothing but time depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pot_sparsity.algorithms.arrays import Float32, Float64, Pattern, PruningResult
from pot_sparsity.algorithms.pruning.problem import SolverOptions
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.solve import dominant
from tests.pipeline.nets import CLASSES, node, normal, proto


def tall_net() -> onnx.ModelProto:
    """Two small equal layers, one of several parts of rows, and one that outweighs them all."""
    sizes = [12, 12, 12, 150, CLASSES]
    constants: dict[str, Float32] = {}
    nodes, last = [], "x"
    for index, (cols, rows) in enumerate(pairwise(sizes)):
        constants[f"w{index}"] = normal(60 + index, rows, cols, scale=0.4)
        constants[f"b{index}"] = normal(70 + index, rows, scale=0.1)
        output = "y" if index == len(sizes) - 2 else f"layer{index}"
        nodes.append(node("Gemm", [last, f"w{index}", f"b{index}"], output, transB=1))
        last = f"relu{index}"
        nodes.append(node("Relu", [output], last))
    return proto(nodes[:-1], constants, ["n", 12])


def run(threads: int, sections: Mapping[str, Any] | None = None, **pruning: Any) -> onnx.ModelProto:
    recipe = {"sparsity": 0.6, "pruning": pruning, "quantization": {"enabled": False}, **(sections or {})}
    samples = normal(67, 400, 12)
    result = optimize(tall_net(), samples, recipe=recipe, threads=threads, measure_latency=False)
    assert isinstance(result.sparse_model, onnx.ModelProto)
    return result.sparse_model


def recorder(seen: list[tuple[int, int, int]]) -> Callable[..., PruningResult]:
    """Wanda that notes the rows and columns of each layer it is given and the workers it may use."""

    def solve(
        target: Float64, second: Float64, zeros: int, pattern: Pattern, *, options: SolverOptions
    ) -> PruningResult:
        seen.append((*target.shape[1:], options.workers))
        return SOLVERS["wanda"](target, second, zeros, pattern, options=options)

    return solve


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(2, 8))
@settings(deadline=None, max_examples=200)
def test_what_runs_alone_is_more_than_a_share_of_what_is_left(sizes: list[int], threads: int) -> None:
    work = sorted(sizes, reverse=True)
    alone = dominant(work, threads)
    for count in range(alone):
        assert work[count] > sum(work[count:]) / threads
    if alone < len(work):
        assert work[alone] <= sum(work[alone:]) / threads


@pytest.mark.parametrize(
    ("work", "threads", "alone"),
    [
        ([10, 1], 1, 0),
        ([10], 1, 0),
        ([10], 2, 1),
        ([10, 10], 2, 0),
        ([10, 10], 4, 2),
        ([100, 9, 9, 9], 2, 1),
        ([8, 8, 8, 8], 4, 0),
        ([], 4, 0),
    ],
)
def test_layers_that_run_alone(work: list[int], threads: int, alone: int) -> None:
    assert dominant(work, threads) == alone


@pytest.mark.parametrize(("threads", "workers"), [(1, 1), (2, 2), (3, 3)])
def test_dominant_layers_get_all_threads(monkeypatch: pytest.MonkeyPatch, threads: int, workers: int) -> None:
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setitem(SOLVERS, "magnitude", recorder(seen))
    # Curves and the walk would call the solver too.
    run(
        threads,
        {"allocation": {"method": "l2_normalized_magnitude"}, "reconstruction": {"masks": "kept"}},
        method="magnitude",
    )
    small = workers if threads > 2 else 1
    assert list(dict.fromkeys(seen)) == [(CLASSES, 150, workers), (150, 12, workers), (12, 12, small)]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [*((name, "unstructured") for name in sorted(SOLVERS))]
    + [(name, pattern) for name in ("admm", "exact_obs") for pattern in ("2:4", "block:4")],
)
def test_same_bytes_with_one_thread_and_with_four(method: str, pattern: str) -> None:
    one, four = (run(threads, method=method, pattern=pattern) for threads in (1, 4))
    assert one.SerializeToString() == four.SerializeToString()
    zeros = [int((numpy_helper.to_array(value) == 0).sum()) for value in one.graph.initializer]
    # The last group of 150 columns holds two, which 2:4 may both keep.
    assert sum(zeros) >= round(0.5 * (2 * 12 * 12 + 150 * 12 + CLASSES * 148))
