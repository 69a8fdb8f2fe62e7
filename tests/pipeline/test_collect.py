"""Moments collected in one sweep against a direct computation on tapped activations."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pot_sparsity.algorithms.arrays import ConvGeometry, Float64, Moments
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import DataError, ModelError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.pipeline import collect
from pot_sparsity.pipeline.collect import collect_moments, fitting_batch
from pot_sparsity.pipeline.progress import Silent
from tests.pipeline.nets import Array, conv_net, dataset, images, normal, run_onnx, shared_net


def tapped(model: onnx.ModelProto, tensor: str, x: Array) -> Float64:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    if tensor == "x":
        return x.astype(np.float64)
    if tensor not in {output.name for output in copy.graph.output}:
        copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    session = ort.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([tensor], {"x": x})[0], np.float64)


def unfolded(x: Float64, layer: Layer) -> Float64:
    """``[groups, cols, samples]`` of a 2-D convolution or a MatMul, patch by patch."""
    geometry = layer.places[0].geometry
    if not isinstance(geometry, ConvGeometry):
        return x.reshape(-1, x.shape[-1]).T[None]
    begin, end = geometry.pads_begin, geometry.pads_end
    padded = np.pad(x, ((0, 0), (0, 0), (begin[0], end[0]), (begin[1], end[1])))
    kernel, strides = geometry.kernel, geometry.strides
    rows = range(0, padded.shape[2] - kernel[0] + 1, strides[0])
    columns = range(0, padded.shape[3] - kernel[1] + 1, strides[1])
    patches = [padded[:, :, i : i + kernel[0], j : j + kernel[1]] for i, j in product(rows, columns)]
    stacked = np.stack([patch.reshape(len(x), geometry.groups, -1) for patch in patches])
    return stacked.transpose(2, 3, 0, 1).reshape(geometry.groups, layer.cols, -1)


def collected(
    proto: onnx.ModelProto,
    x: Array,
    *,
    batch_size: int = 16,
    threads: int = 1,
    positions: int | None = None,
) -> dict[str, Moments]:
    model = OnnxModel(proto)
    layers = find_layers(model.graph).layers
    return collect_moments(
        model,
        layers,
        get_engine("openvino", 1),
        dataset(model, x),
        batch_size=batch_size,
        threads=threads,
        max_positions=positions,
        progress=Silent(),
    )


@pytest.mark.parametrize("net", ["conv", "shared"])
def test_moments_equal_a_direct_computation(net: str) -> None:
    proto, x = (conv_net(), images(30)) if net == "conv" else (shared_net(), normal(5, 30, 7))
    moments = collected(proto, x, batch_size=8)
    layers = find_layers(OnnxModel(proto).graph).layers
    assert moments.keys() == {layer.name for layer in layers}
    for layer in layers:
        columns = np.concatenate([unfolded(tapped(proto, p.input, x), layer) for p in layer.places], axis=2)
        found, count = moments[layer.name], columns.shape[2]
        second = columns @ columns.swapaxes(1, 2) / count
        assert found.count == count
        np.testing.assert_allclose(found.mean, columns.mean(axis=2), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.second, second, rtol=1e-4, atol=1e-5 * second.max())


def test_results_do_not_depend_on_threads() -> None:
    one, two = (collected(conv_net(), images(40), threads=threads) for threads in (1, 2))
    for name, moments in one.items():
        assert moments.count == two[name].count
        assert np.array_equal(moments.mean, two[name].mean)
        assert np.array_equal(moments.second, two[name].second)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_results_depend_on_the_batch_size_by_rounding_only(size: int) -> None:
    reference, other = collected(conv_net(), images(40)), collected(conv_net(), images(40), batch_size=size)
    for name, moments in reference.items():
        assert moments.count == other[name].count
        np.testing.assert_allclose(moments.second, other[name].second, rtol=1e-4, atol=1e-5)


def test_fixed_batch_uses_full_batches() -> None:
    x = images(14)
    fixed, free = collected(conv_net(batch=4), x, batch_size=64), collected(conv_net(), x[:12])
    for name, moments in free.items():
        assert fixed[name].count == moments.count
        np.testing.assert_allclose(fixed[name].second, moments.second, rtol=1e-4, atol=1e-5)


def test_fixed_batch_larger_than_the_data() -> None:
    with pytest.raises(ModelError, match="saw no calibration sample: give at least one full batch"):
        collected(conv_net(batch=8), images(7))


def test_drawn_positions_are_the_same_every_time() -> None:
    one, two = (collected(conv_net(), images(20), positions=10) for _ in range(2))
    assert one["conv1"].count == 200
    for name, moments in one.items():
        assert np.array_equal(moments.second, two[name].second)


def test_a_batch_is_as_large_as_its_tensors_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxModel(conv_net())
    executable = get_engine("openvino", 1).compile(model.extract(outputs=("relu1",)))
    data = dataset(model, images(10))
    one = 8 * 8 * 8 * 4
    for budget, expected in ((100 * one, 32), (5 * one + 1, 5), (1, 1)):
        monkeypatch.setattr(collect, "TAP_BUDGET", budget)
        assert fitting_batch(model, executable, data, 32) == expected
    assert fitting_batch(OnnxModel(conv_net(batch=3)), executable, data, 32) == 3


def test_activations_that_overflow_are_the_samples_fault() -> None:
    with pytest.raises(DataError, match=r"calibration of layer '.*' failed: .*float32's range"):
        collected(shared_net(), np.full((4, 7), 3e38, np.float32))


def test_the_oracle_taps_what_the_model_computes() -> None:
    proto, x = conv_net(), images(2)
    np.testing.assert_allclose(tapped(proto, "y", x), run_onnx(proto, x))
