"""Layers nobody would choose, through the whole job with every solver: no NaN, or an error that names the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pot_sparsity.algorithms.arrays import Moments
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.errors import DataError, PotSparsityError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, prune_layers, read_dense
from pot_sparsity.recipe import validate_recipe
from tests.pipeline.nets import QUICK, Array, images, node, normal, plain_net, proto, run_onnx

METHODS = pytest.mark.parametrize("method", sorted(SOLVERS))
PATTERNS = pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4"])


def wounded_net() -> onnx.ModelProto:
    """A net whose layers hold zero filters, a dead input channel, one row and one column.

    The first layer's filter 2 is zero and its bias negative, so that behind the ReLU the channel never wakes; the
    filters 4 and 5 are equal, and so are the channels that come of them.
    """
    first = normal(81, 6, 3, 3, 3, scale=0.3)
    first[2] = 0.0
    first[5] = first[4]
    second = normal(82, 8, 6, 3, 3, scale=0.3)
    second[3] = 0.0
    second[:, 1] = 0.0
    constants = {
        "w1": first,
        "b1": np.array([0.1, 0.0, -1.0, 0.2, 0.1, 0.1], np.float32),
        "w2": second,
        "b2": normal(83, 8, scale=0.1),
        "one_row": normal(84, 1, 8, 1, 1),
        "one_column": normal(85, 5, 1, 1, 1),
        "nothing": np.zeros((5, 5, 1, 1), np.float32),
        "w5": normal(86, 3, 5),
        "b5": normal(87, 3),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], "first", pads=[1, 1, 1, 1]),
        node("Relu", ["first"], "r1"),
        node("Conv", ["r1", "w2", "b2"], "second"),
        node("Relu", ["second"], "r2"),
        node("Conv", ["r2", "one_row"], "row"),
        node("Conv", ["row", "one_column"], "column"),
        node("Conv", ["column", "nothing"], "empty"),
        node("Add", ["column", "empty"], "sum"),
        node("GlobalAveragePool", ["sum"], "pool"),
        node("Flatten", ["pool"], "flat"),
        node("Gemm", ["flat", "w5", "b5"], "y", transB=1),
    ]
    return proto(nodes, constants, ["n", 3, 8, 8])


def job(model: onnx.ModelProto, samples: Array, sparsity: float, **pruning: str) -> Result:
    recipe = validate_recipe({"sparsity": sparsity, "pruning": pruning, **QUICK})
    return optimize(model, samples, recipe=recipe, threads=2, measure_latency=False)


def weights(model: Any) -> dict[str, Array]:
    """Weight matrices by layer, as they stand in the model."""
    loaded = load_model(model)
    return {layer.name: read_weight(loaded, layer) for layer in find_layers(loaded.graph).layers}


def assert_sound(result: Result, x: Array) -> None:
    """Nothing in the model or in what comes out of it is NaN or infinite."""
    assert isinstance(result.sparse_model, onnx.ModelProto)
    for tensor in result.sparse_model.graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all()
    assert np.isfinite(run_onnx(result.sparse_model, x)).all()
    for layer in result.report.layers:
        assert np.isfinite(layer.relative_error or 0.0)


@pytest.mark.parametrize(
    ("method", "pattern", "count"),
    [*((name, "unstructured", 2) for name in sorted(SOLVERS))]
    + [(name, pattern, 40) for name in ("admm", "exact_obs") for pattern in ("2:4", "block:4")],
)
def test_zero_filters_dead_channels_and_few_samples(method: str, pattern: str, count: int) -> None:
    samples = images(count)
    samples[:, 1] = 0.0
    result = job(wounded_net(), samples, 0.5, method=method, pattern=pattern)
    assert_sound(result, images(20, 3))
    found = weights(result.sparse_model)
    assert (found["first"][0, 2] == 0.0).all()
    assert (found["second"][0, 3] == 0.0).all()
    assert (found["empty"] == 0.0).all()
    zeros = sum(int((weight == 0.0).sum()) for weight in found.values())
    assert zeros == result.report.zeros
    if pattern == "unstructured":
        assert zeros == round(0.5 * sum(weight.size for weight in found.values()))


@METHODS
def test_nothing_and_everything(method: str) -> None:
    before, x = weights(plain_net()), images(20, 3)
    none = job(plain_net(), images(20), 0.0, method=method)
    for name, weight in weights(none.sparse_model).items():
        np.testing.assert_allclose(weight, before[name], rtol=1e-3, atol=1e-5)
    everything = job(plain_net(), images(20), 1.0, method=method)
    assert_sound(everything, x)
    assert all((weight == 0.0).all() for weight in weights(everything.sparse_model).values())
    assert np.ptp(run_onnx(everything.sparse_model, x), axis=0).max() == 0.0


def dense_layers() -> tuple[list[DenseLayer], dict[str, Moments]]:
    """The layers of a small net, with moments of white inputs."""
    model = load_model(plain_net())
    dense = read_dense(model, find_layers(model.graph).layers)
    moments = {
        item.layer.name: Moments(
            1e6, np.zeros((item.layer.groups, item.layer.cols)), np.eye(item.layer.cols)[None]
        )
        for item in dense
    }
    return dense, moments


def prune(dense: list[DenseLayer], moments: Mapping[str, Moments], **pruning: str) -> None:
    prune_layers(
        dense,
        moments,
        {},
        {item.layer.name: item.layer.size // 2 for item in dense},
        validate_recipe({"pruning": pruning}),
        threads=2,
        folder=RunFolder(None),
        key="test",
        progress=Silent(),
    )


def poisoned_moments(dense: list[DenseLayer], moments: dict[str, Moments]) -> None:
    moments["conv1"].second[0, 2, 5] = np.nan


def poisoned_weight(dense: list[DenseLayer], moments: dict[str, Moments]) -> None:
    dense[0].weight[0, 1, 4] = np.inf


@METHODS
@PATTERNS
@pytest.mark.parametrize(
    ("poison", "match"),
    [
        (poisoned_moments, "layer 'conv1': second moment of the layer's input holds NaN or infinite"),
        (poisoned_weight, "layer 'conv1': target weights hold NaN or infinite"),
    ],
)
def test_what_a_solver_refuses_is_said_with_the_layers_name(
    method: str, pattern: str, poison: Callable[[list[DenseLayer], dict[str, Moments]], None], match: str
) -> None:
    dense, moments = dense_layers()
    assert dense[0].layer.name == "conv1"
    prune(dense, moments, method=method, pattern=pattern)
    poison(dense, moments)
    with pytest.raises(PotSparsityError, match=match) as caught:
        prune(dense, moments, method=method, pattern=pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "what"),
    [(1e18, "layer 'conv1' failed: .* multiplied"), (1e22, "layer 'conv1' failed: .* squared")],
)
def test_inputs_too_large_for_products_name_the_layer(size: float, what: str) -> None:
    """Whether the sweep for the moments meets them, or only the walk, which multiplies inputs with outputs."""
    with pytest.raises(DataError, match=f"calibration of {what} in float32: scale them down"):
        job(plain_net(), np.full((8, 3, 8, 8), size, np.float32), 0.5)
