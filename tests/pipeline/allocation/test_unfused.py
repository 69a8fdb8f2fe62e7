"""Allocation by magnitude on weights as they were before BatchNorm was fused, end to end in both formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import numpy_helper

from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.pipeline import optimize
from pot_sparsity.recipe import load_recipe
from pot_sparsity.report.schema import Report
from tests.pipeline.nets import conv_net, images

SPARSITY = 0.6
QUICKLY = [
    f"sparsity={SPARSITY}",
    "allocation.method=magnitude",
    "pruning.method=magnitude",
    "reconstruction.input=dense",
    "correction.differential=never",
    "finish.activations=never",
    "finish.distillation=never",
    "quantization.enabled=false",
]


def scaled_net(gone: int = 0) -> onnx.ModelProto:
    """BatchNorm blows the weights before it up by a factor of ten; some of its channels are wiped out."""
    model = conv_net()
    gamma = next(value for value in model.graph.initializer if value.name == "gamma")
    values = 10.0 * numpy_helper.to_array(gamma) * np.array([1, -1] * 4, np.float32)
    values[:gone] = 0.0
    gamma.CopyFrom(numpy_helper.from_array(values.astype(np.float32), "gamma"))
    return model


def weights(model: onnx.ModelProto) -> dict[str, Float64]:
    """The weights of the file, which are those before BatchNorm, by name."""
    found = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    return {name: found[name].astype(np.float64) for name in ("w1", "w2", "w3", "w4", "w5")}


def by_global_magnitude(arrays: dict[str, Float64]) -> dict[int, int]:
    """Zeros by number of weights, which tells the layers apart in every format; zeros that exist come first."""
    everything = np.sort(np.abs(np.concatenate([array.ravel() for array in arrays.values()])))
    threshold = everything[round(SPARSITY * everything.size) - 1]
    return {array.size: int((np.abs(array) <= threshold).sum()) for array in arrays.values()}


def saved(model: onnx.ModelProto, form: str, folder: Path) -> Any:
    """The model as ONNX or as IR with its BatchNorm as it is."""
    if form == "onnx":
        return model
    ov.save_model(ov.Core().read_model(model.SerializeToString()), folder / "net.xml", compress_to_fp16=False)
    return folder / "net.xml"


def run(model: Any, *overrides: str, **named: Any) -> Report:
    recipe = load_recipe(None, [*QUICKLY, *overrides])
    return optimize(
        model, images(40), recipe=recipe, baseline_int8=False, measure_latency=False, **named
    ).report


def zeros(report: Report) -> dict[int, int]:
    return {layer.weights: layer.zeros for layer in report.layers}


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_zeros_are_those_of_the_weights_in_the_file(form: str, tmp_path: Path) -> None:
    net = scaled_net()
    model = saved(net, form, tmp_path)
    expected = by_global_magnitude(weights(net))
    report = run(model, "allocation.options.unfused=true")
    assert [edit.kind for edit in report.edits if edit.kind == "fuse_batchnorm"]
    assert zeros(report) == expected
    assert not report.warnings
    assert zeros(run(model)) != expected
    assert zeros(run(model, keep_structure=True)) == expected


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_channels_that_were_wiped_out_count_first(form: str, tmp_path: Path) -> None:
    net = scaled_net(gone=3)
    arrays: dict[str, AnyArray] = dict(weights(net))
    arrays["w3"][:3] = 0.0
    report = run(saved(net, form, tmp_path), "allocation.options.unfused=true")
    assert zeros(report) == by_global_magnitude(arrays)
