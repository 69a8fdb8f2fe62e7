"""Scales and shifts behind normalizations: found in every form and format, written without touching anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pot_sparsity.engines import get_engine
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.normalization import (
    find_normalizations,
    read_normalization,
    write_normalization,
)
from tests.pipeline.nets import Array, conv_net, node, normal, proto
from tests.pipeline.norm_nets import FORMS, KINDS, LENGTH, WIDTH, load_kind, norm_net, operator, tokens


def tap(model: Model, tensors: list[str], x: Array) -> dict[str, Array]:
    executable = get_engine("openvino", 1).compile(model.extract(outputs=tuple(tensors)))
    return executable.run({model.graph.inputs[0]: x})


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_found_read_and_written(kind: str, tmp_path: Path) -> None:
    model = load_kind(kind, tmp_path)
    found = find_normalizations(model.graph)
    assert len(found) == 2
    outputs = [item.output for item in found]
    before = tap(model, outputs, tokens(5))
    for index, item in enumerate(found, 1):
        assert (item.channel_axis, item.channels) == (-1, WIDTH)
        scale, shift = read_normalization(model, item)
        tolerance = 1e-3 if kind.endswith("half") else 1e-7
        np.testing.assert_allclose(scale, 1 + normal(228 + index, WIDTH, scale=0.2), rtol=tolerance)
        assert (shift is None) == kind.startswith("rms")
        if shift is not None:
            np.testing.assert_allclose(shift, normal(231 + index, WIDTH, scale=0.2), rtol=tolerance)
    item = found[-1]
    scale, shift = read_normalization(model, item)
    write_normalization(model, item, 2.0 * scale, None if shift is None else 2.0 * shift)
    after = tap(model, outputs, tokens(5))
    np.testing.assert_array_equal(after[outputs[0]], before[outputs[0]])
    np.testing.assert_allclose(after[item.output], 2.0 * before[item.output], rtol=1e-5, atol=1e-6)
    assert model.edits == []


def test_networks_without_any() -> None:
    assert find_normalizations(load_model(conv_net()).graph) == ()


def scaled(*before: onnx.NodeProto, **constants: Array) -> onnx.ModelProto:
    """Something multiplied by a constant per channel, then shifted."""
    nodes = [*before, node("Mul", ["d", "s"], "m"), node("Add", ["m", "b"], "y")]
    values = {"s": normal(1, WIDTH), "b": normal(2, WIDTH), **constants}
    return proto(nodes, values, ["n", LENGTH, WIDTH])


def test_what_is_no_normalization() -> None:
    assert find_normalizations(load_model(scaled(node("Relu", ["x"], "d"))).graph) == ()
    softmax = [node("ReduceMean", ["x"], "r", axes=[-1]), node("Div", ["x", "r"], "d")]
    assert find_normalizations(load_model(scaled(*softmax)).graph) == ()


@pytest.mark.parametrize("form", ["operator", "decomposed"])
def test_a_scale_that_others_read_is_left_alone(form: str) -> None:
    source = norm_net(FORMS[form])
    for item in source.graph.node:
        for port, name in enumerate(item.input):
            if name == "scale2":
                item.input[port] = "scale1"
    assert find_normalizations(load_model(source).graph) == ()


@pytest.mark.parametrize("form", ["operator", "decomposed"])
def test_a_shift_that_others_read_is_left_alone(form: str) -> None:
    source = norm_net(FORMS[form])
    for item in source.graph.node:
        for port, name in enumerate(item.input):
            if name == "shift2":
                item.input[port] = "shift1"
    found = find_normalizations(load_model(source).graph)
    assert [item.shift for item in found] == [None, None]
    assert [item.output for item in found] == (
        ["norm1", "norm2"] if form == "operator" else ["norm1_scaled", "norm2_scaled"]
    )


def test_a_scale_for_all_channels_alike_is_left_alone() -> None:
    nodes = [*operator("x", "d", "one", "none"), node("MatMul", ["d", "w"], "y")]
    values = {
        "one": np.ones(1, np.float32),
        "none": np.zeros(1, np.float32),
        "w": normal(3, 1, 4),
    }
    assert find_normalizations(load_model(proto(nodes, values, ["n", LENGTH, 1])).graph) == ()
