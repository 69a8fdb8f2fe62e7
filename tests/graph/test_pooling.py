"""Which layers read the mean over space, and of what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.pooling import before_pooling
from tests.pipeline.nets import node, normal, proto, to_ir

CHANNELS = 6


def net(*between: onnx.NodeProto, last: str, spatial: tuple[int, ...] = (5, 4)) -> onnx.ModelProto:
    """A convolution, the nodes given, and a head of 3 classes that reads ``last``."""
    constants: dict[str, AnyArray] = {
        "w": normal(1, CHANNELS, 2, *(3,) * len(spatial)),
        "h": normal(2, CHANNELS, 3),
        "axes": np.arange(2, 2 + len(spatial)),
    }
    nodes = [node("Conv", ["x", "w"], "conv"), *between, node("MatMul", [last, "h"], "y")]
    return proto(nodes, constants, ("n", 2, *(size + 2 for size in spatial)))


POOLED = {
    "pool": (
        node("GlobalAveragePool", ["conv"], "pool"),
        node("Flatten", ["pool"], "flat"),
    ),
    "mean": (node("ReduceMean", ["conv"], "flat", axes=[2, 3], keepdims=0),),
    "whole kernel": (
        node("AveragePool", ["conv"], "pool", kernel_shape=[5, 4]),
        node("Squeeze", ["pool", "axes"], "flat"),
    ),
}


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("kind", POOLED)
def test_the_head_behind_a_global_pooling_is_found(kind: str, form: str, tmp_path: Path) -> None:
    model = net(*POOLED[kind], last="flat")
    graph = load_model(model if form == "onnx" else to_ir(model, tmp_path / "net.xml")).graph
    layers = find_layers(graph).layers
    head = next(layer for layer in layers if layer.cols == CHANNELS)
    found = before_pooling(graph, head)
    assert found is not None
    place = found.places[0]
    assert graph.tensor(place.input).shape is not None
    assert graph.tensor(place.input).shape[1:] == (CHANNELS, 5, 4)  # type: ignore[index]
    assert (found.name, found.cols) == (head.name, CHANNELS)
    assert [before_pooling(graph, layer) for layer in layers if layer is not head] == [None]


def test_three_dimensions() -> None:
    nodes = (node("GlobalAveragePool", ["conv"], "pool"), node("Flatten", ["pool"], "flat"))
    graph = load_model(net(*nodes, last="flat", spatial=(3, 4, 2))).graph
    head = next(layer for layer in find_layers(graph).layers if layer.cols == CHANNELS)
    found = before_pooling(graph, head)
    assert found is not None
    assert len(found.places[0].geometry.kernel) == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "nodes",
    [
        (node("GlobalMaxPool", ["conv"], "pool"), node("Flatten", ["pool"], "flat")),
        (
            node("GlobalAveragePool", ["conv"], "pool"),
            node("Flatten", ["pool"], "f"),
            node("Relu", ["f"], "flat"),
        ),
        (node("ReduceMean", ["conv"], "flat", axes=[1, 3], keepdims=0),),
    ],
    ids=["maximum", "something in between", "mean over channels"],
)
def test_other_heads_are_not(nodes: tuple[onnx.NodeProto, ...]) -> None:
    spatial = (CHANNELS, 4) if len(nodes) == 1 else (5, 4)
    graph = load_model(net(*nodes, last="flat", spatial=spatial)).graph
    for layer in find_layers(graph).layers:
        assert before_pooling(graph, layer) is None
