"""Unfolding against plain loops and against what ONNX Runtime computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pot_sparsity.algorithms.arrays import ConvGeometry
from pot_sparsity.algorithms.patches import (
    Workspace,
    axis_taps,
    matrix_to_weight,
    output_size,
    unfold,
    weight_to_matrix,
    window_sums,
)

AUTO_PAD = {"explicit": "NOTSET", "same_upper": "SAME_UPPER", "same_lower": "SAME_LOWER", "valid": "VALID"}


@dataclass(frozen=True)
class Case:
    geometry: ConvGeometry
    spatial: tuple[int, ...]
    batch: int
    inputs: int
    outputs: int


def slow_unfold(
    x: NDArray[Any], geometry: ConvGeometry, begin: tuple[int, ...], out: tuple[int, ...]
) -> NDArray[Any]:
    """Unfold by definition, one position at a time."""
    batch, channels = x.shape[:2]
    kernel = geometry.kernel
    columns = np.zeros((channels, prod(kernel), batch * prod(out)))
    for (number, tap), (sample, position) in product(
        enumerate(np.ndindex(*kernel)), product(range(batch), enumerate(np.ndindex(*out)))
    ):
        index = []
        for axis, o in enumerate(position[1]):
            if geometry.transposed:
                reach = o + begin[axis] - tap[axis] * geometry.dilations[axis]
                index.append(reach // geometry.strides[axis] if reach % geometry.strides[axis] == 0 else -1)
            else:
                index.append(o * geometry.strides[axis] + tap[axis] * geometry.dilations[axis] - begin[axis])
        if all(0 <= i < size for i, size in zip(index, x.shape[2:], strict=True)):
            columns[:, number, sample * prod(out) + position[0]] = x[(sample, slice(None), *index)]
    return columns.reshape(geometry.groups, -1, batch * prod(out))


def run_layer(
    x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], geometry: ConvGeometry
) -> NDArray[Any]:
    attributes: dict[str, Any] = {
        "kernel_shape": geometry.kernel,
        "strides": geometry.strides,
        "dilations": geometry.dilations,
        "group": geometry.groups,
        "auto_pad": AUTO_PAD[geometry.pad_mode],
    }
    if geometry.pad_mode == "explicit" and geometry.output_size is None:
        attributes["pads"] = (*geometry.pads_begin, *geometry.pads_end)
    if geometry.output_padding:
        attributes["output_padding"] = geometry.output_padding
    if geometry.output_size is not None:
        attributes["output_shape"] = geometry.output_size
    node = helper.make_node(
        "ConvTranspose" if geometry.transposed else "Conv", ["x", "w", "b"], ["y"], **attributes
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@st.composite
def cases(draw: st.DrawFn, transposed: bool) -> Case:
    rank = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, strides, dilations = sizes(1, 3), sizes(1, 3), sizes(1, 2)
    mode: Any = draw(st.sampled_from(["explicit", "explicit", "same_upper", "same_lower", "valid"]))
    if not transposed and mode.startswith("same"):
        dilations = (1,) * rank  # ONNX Runtime refuses to compute these pads for dilated convolutions
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    groups = draw(st.integers(1, 3))
    begin, end = (sizes(0, 2), sizes(0, 2)) if mode == "explicit" else ((0,) * rank, (0,) * rank)
    begin = tuple(min(p, e - 1) for p, e in zip(begin, extent, strict=True))
    end = tuple(min(p, e - 1) for p, e in zip(end, extent, strict=True))
    low = 3 if transposed else max(extent)
    spatial = sizes(low, low + (2 if rank == 3 else 5))
    padding: tuple[int, ...] = ()
    wanted: tuple[int, ...] | None = None
    if transposed:
        padding = tuple(draw(st.integers(0, s - 1)) for s in strides)  # ONNX Runtime's bound
        if mode == "explicit" and draw(st.booleans()):
            natural = [
                s * (i - 1) + e + p for s, i, e, p in zip(strides, spatial, extent, padding, strict=True)
            ]
            wanted = tuple(n - draw(st.integers(0, min(3, n - 1))) for n in natural)
            begin = end = (0,) * rank
        elif mode.startswith("same"):
            padding = ()
            strides = tuple(min(s, e) for s, e in zip(strides, extent, strict=True))
    geometry = ConvGeometry(
        kernel,
        strides,
        dilations,
        begin,
        end,
        groups,
        mode,
        transposed,
        padding,
        wanted,
    )
    return Case(
        geometry,
        spatial,
        draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
    )


def check_against_runtime(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    geometry = case.geometry
    x = rng.standard_normal((case.batch, case.inputs, *case.spatial), dtype=np.float32)
    stored = (case.inputs, case.outputs) if geometry.transposed else (case.outputs, case.inputs)
    weight = rng.standard_normal(
        (stored[0], stored[1] // geometry.groups, *geometry.kernel), dtype=np.float32
    )
    bias = rng.standard_normal(case.outputs, dtype=np.float32)
    expected = run_layer(x, weight, bias, geometry)
    size = output_size(geometry, case.spatial)
    assert size == expected.shape[2:]
    matrix = weight_to_matrix(weight, geometry)
    np.testing.assert_array_equal(matrix_to_weight(matrix, geometry), weight)
    columns = unfold(x, geometry)
    assert columns.flags.c_contiguous
    product_ = (matrix @ columns).reshape(case.outputs, case.batch, *size).swapaxes(0, 1)
    actual = product_ + bias.reshape(-1, *(1,) * len(size))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=150)
@given(case=cases(transposed=False), seed=st.integers(0, 2**16))
def test_conv_equals_onnx_runtime(case: Case, seed: int) -> None:
    check_against_runtime(case, seed)


@settings(deadline=None, max_examples=150)
@given(case=cases(transposed=True), seed=st.integers(0, 2**16))
def test_conv_transpose_equals_onnx_runtime(case: Case, seed: int) -> None:
    check_against_runtime(case, seed)


@settings(deadline=None, max_examples=60)
@given(case=st.one_of(cases(transposed=False), cases(transposed=True)))
def test_columns_equal_slow_loops(case: Case) -> None:
    geometry = replace(case.geometry, pad_mode="explicit", output_size=None)
    try:
        out = output_size(geometry, case.spatial)
    except ValueError:
        return
    x = np.random.default_rng(0).standard_normal((case.batch, case.inputs, *case.spatial))
    expected = slow_unfold(x, geometry, geometry.pads_begin, out)
    np.testing.assert_array_equal(unfold(x, geometry), expected)
    np.testing.assert_array_equal(unfold(x.astype(np.float32), geometry), expected.astype(np.float32))
    sums = window_sums(x.sum(axis=0), axis_taps(geometry, case.spatial))
    np.testing.assert_allclose(sums.reshape(geometry.groups, -1), expected.sum(axis=-1), atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(case=st.one_of(cases(transposed=False), cases(transposed=True)), data=st.data())
def test_window_restricts_the_outputs(case: Case, data: st.DataObject) -> None:
    for axis in axis_taps(case.geometry, case.spatial):
        first = data.draw(st.integers(0, axis.size_out - 1))
        last = data.draw(st.integers(first + 1, axis.size_out))
        np.testing.assert_array_equal(axis.window(first, last).indices(), axis.indices()[:, first:last])


@pytest.mark.parametrize(("mode", "begin"), [("same_upper", 1), ("same_lower", 2)])
def test_same_padding_of_a_dilated_convolution(mode: Any, begin: int) -> None:
    geometry = ConvGeometry((4,), (2,), (1,), (0,), (0,), pad_mode=mode)
    x = np.random.default_rng(1).standard_normal((1, 1, 9))  # 5 outputs, total padding 3
    expected = slow_unfold(x, geometry, (begin,), (5,))
    np.testing.assert_array_equal(unfold(x, geometry), expected)
    dilated = replace(geometry, kernel=(2,), dilations=(3,), strides=(2,))
    np.testing.assert_array_equal(unfold(x, dilated), slow_unfold(x, dilated, (begin,), (5,)))


def test_workspace_is_reused_and_its_padding_stays_zero() -> None:
    rng = np.random.default_rng(2)
    workspace = Workspace()
    padded = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    other = ConvGeometry((2, 2), (2, 2), (1, 1), (0, 1), (1, 0))
    batches = [rng.standard_normal((n, 3, 5, 6), dtype=np.float32) for n in (4, 4, 2, 4)]
    first = unfold(batches[0], padded, workspace)
    second = unfold(batches[1], padded, workspace)
    assert np.shares_memory(first, second)
    for geometry in (padded, other, padded):
        for batch in batches:
            np.testing.assert_array_equal(unfold(batch, geometry, workspace), unfold(batch, geometry))


def test_bad_shapes_are_refused() -> None:
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (0, 0), (0, 0), groups=2)
    with pytest.raises(ValueError, match="2 spatial axes, the input 1"):
        unfold(np.zeros((1, 2, 5)), geometry)
    with pytest.raises(ValueError, match="3 channels do not divide into 2 groups"):
        unfold(np.zeros((1, 3, 5, 5)), geometry)
    with pytest.raises(ValueError, match="spatial axis 1 of size 2 is too small"):
        unfold(np.zeros((1, 2, 5, 2)), geometry)
