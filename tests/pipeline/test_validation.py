"""Judging one model, with labels or against a reference; looking at one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pot_sparsity.errors import DataError, ModelError, UserError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.graph.weights import read_weight, write_weight
from pot_sparsity.pipeline import inspect, validate
from tests.pipeline.nets import conv_net, images, labelled, plain_net, run_onnx, shared_net, to_ir


def weaker() -> OnnxModel:
    """The network with its first layer halved and a fifth of its second layer zero."""
    model = OnnxModel(conv_net())
    first, second = find_layers(model.graph).layers[:2]
    write_weight(model, first, read_weight(model, first) * 0.5)
    weight = read_weight(model, second)
    weight.reshape(-1)[::5] = 0.0
    write_weight(model, second, weight)
    return model


def test_labels_alone(tmp_path: Path) -> None:
    data = labelled(tmp_path / "v.npz", conv_net(), 60)
    assert validate(conv_net(), data) == {"top1": 100.0, "top5": 100.0}
    model = weaker().native
    right = run_onnx(model, images(60, 7)).argmax(axis=1) == run_onnx(conv_net(), images(60, 7)).argmax(
        axis=1
    )
    assert validate(model, data, metric="top5")["top1"] == pytest.approx(100 * right.mean())
    assert 0 < right.mean() < 1


def test_reference_without_labels(tmp_path: Path) -> None:
    found = validate(weaker().native, images(30), reference=to_ir(conv_net(), tmp_path / "net.xml"))
    assert found.keys() == {"agreement", "logit_kl", "sqnr", "output_mse"}
    assert found["sqnr"] < 30
    assert validate(conv_net(), images(30), reference=conv_net(), samples=5)["agreement"] == 100.0


def test_nothing_to_judge_by() -> None:
    with pytest.raises(DataError, match="give labels, or the dense model with --reference"):
        validate(conv_net(), images(5))


def test_unknown_metric() -> None:
    with pytest.raises(UserError, match="top7"):
        validate(conv_net(), images(5), metric="top7")


def test_inspection_describes_the_model() -> None:
    found = inspect(weaker().native)
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == ["conv1", "branch1", "branch2", "depthwise", "y"]
    assert found.batchnorms_fusable == 1
    assert (layers["depthwise"].groups, layers["depthwise"].rows, layers["depthwise"].cols) == (8, 1, 9)
    assert layers["conv1"].flops == 2 * 8 * 27 * 64
    assert (layers["branch1"].zeros, layers["branch1"].weights) == (13, 64)
    assert found.model.format == "onnx"
    assert found.model.inputs[0].shape == [None, 3, 8, 8]
    assert found.model.parameters == sum(int(np.prod(value.dims)) for value in conv_net().graph.initializer)


def test_inspection_counts_shared_weights_once(tmp_path: Path) -> None:
    assert [layer.weights for layer in inspect(shared_net()).layers] == [42, 36, 24]
    assert inspect(to_ir(plain_net(), tmp_path / "net.xml")).model.file == "net.xml"


def test_inspection_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file"):
        inspect(tmp_path / "none.onnx")
