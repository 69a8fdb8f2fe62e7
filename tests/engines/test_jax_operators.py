"""Every rule gives what OpenVINO's CPU plugin gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import openvino as ov
import pytest
from openvino import opset1, opset8, opset10, opset11, opset14
from openvino import opset13 as ops

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.engines import get_engine
from pot_sparsity.engines.jax_engine import DifferentiableModel, NotDifferentiable
from pot_sparsity.graph.model import Runnable

Build = Callable[..., Any]
PLAIN = (2, 6, 9, 8)
VECTOR = (3, 7)
ENGINE = get_engine("openvino", threads=1)


def c(*shape: int, positive: bool = False) -> Any:
    """A constant of random numbers."""
    value = np.random.default_rng(sum(shape) + 5).standard_normal(shape).astype(np.float32)
    return ops.constant(np.abs(value) + np.float32(0.2) if positive else value)


def i(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


def scalar(value: Any, dtype: Any = np.int64) -> Any:
    return ops.constant(np.array(value, dtype))


def feeds(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> list[AnyArray]:
    rng = np.random.default_rng(11)
    return [
        rng.integers(0, 4, shape).astype(dtype)
        if np.issubdtype(dtype, np.integer)
        else (rng.standard_normal(shape) * 2).astype(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def as_runnable(build: Build, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> Runnable:
    parameters = [ops.parameter(list(s), d) for s, d in zip(shapes, dtypes, strict=True)]
    results = build(*parameters)
    results = results if isinstance(results, list) else [results]
    names = tuple(f"x{index}" for index in range(len(shapes)))
    outputs = tuple(f"y{index}" for index in range(len(results)))
    return Runnable(ov.Model(results, parameters), names, outputs)


def compare(build: Build, *shapes: tuple[int, ...], dtypes: Sequence[Any] | None = None) -> None:
    kinds = [np.float32] * len(shapes) if dtypes is None else dtypes
    runnable = as_runnable(build, shapes, kinds)
    arrays = feeds(shapes, kinds)
    expected = ENGINE.compile(runnable)
    wanted = expected.run(dict(zip(runnable.inputs, arrays, strict=True)))
    model = DifferentiableModel(runnable, 1, ())
    found = jax.jit(model)({}, [jnp.asarray(array) for array in arrays])
    for name, result in zip(runnable.outputs, found, strict=True):
        want = wanted[name]
        assert result.shape == want.shape
        scale = max(1.0, float(np.abs(want.astype(np.float64)).max(initial=0)))
        np.testing.assert_allclose(np.asarray(result), want, rtol=1e-4, atol=2e-5 * scale, err_msg=name)


CONVOLUTIONS = {
    "plain": ((2, 3, 9, 8), (4, 3, 3, 3), [1, 1], [0, 0], [0, 0], [1, 1], "explicit"),
    "strided": ((2, 3, 9, 8), (4, 3, 3, 2), [2, 3], [1, 0], [0, 2], [1, 1], "explicit"),
    "dilated": ((2, 3, 9, 8), (4, 3, 3, 2), [1, 2], [2, 1], [1, 1], [2, 3], "explicit"),
    "same_upper": ((2, 3, 9, 8), (4, 3, 4, 3), [2, 2], [0, 0], [0, 0], [1, 1], "same_upper"),
    "same_lower": ((2, 3, 9, 8), (4, 3, 4, 3), [2, 2], [0, 0], [0, 0], [1, 2], "same_lower"),
    "valid": ((2, 3, 9, 8), (4, 3, 4, 3), [2, 2], [5, 5], [5, 5], [1, 1], "valid"),
    "one axis": ((2, 3, 9), (4, 3, 3), [2], [1], [0], [1], "explicit"),
    "three axes": ((2, 3, 5, 6, 4), (4, 3, 3, 2, 2), [1, 2, 1], [1, 0, 0], [0, 1, 0], [1, 1, 2], "explicit"),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str) -> None:
    shape, weight, strides, begin, end, dilations, mode = CONVOLUTIONS[case]
    compare(lambda x: ops.convolution(x, c(*weight), strides, begin, end, dilations, mode), shape)


@pytest.mark.parametrize(
    ("case", "rows", "columns"),
    [*((case, 2, 1) for case in CONVOLUTIONS), ("strided", 1, 1), ("strided", 2, 3), ("one axis", 2, 3)],
)
def test_group_convolution(case: str, rows: int, columns: int) -> None:
    shape, weight, strides, begin, end, dilations, mode = CONVOLUTIONS[case]
    operand = c(3, rows, columns, *weight[2:])
    size = (shape[0], 3 * columns, *shape[2:])
    compare(lambda x: ops.group_convolution(x, operand, strides, begin, end, dilations, mode), size)


@pytest.mark.parametrize(
    ("strides", "begin", "end", "dilations", "mode", "extra"),
    [
        ([1, 1], [0, 0], [0, 0], [1, 1], "explicit", [0, 0]),
        ([2, 3], [1, 0], [0, 1], [1, 1], "explicit", [1, 2]),
        ([2, 2], [1, 1], [1, 1], [2, 1], "explicit", [0, 1]),
        ([2, 2], [0, 0], [0, 0], [1, 1], "valid", [0, 0]),
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_transposed_convolution(
    strides: list[int],
    begin: list[int],
    end: list[int],
    dilations: list[int],
    mode: str,
    extra: list[int],
    grouped: bool,
) -> None:
    def build(x: Any) -> Any:
        function = ops.group_convolution_backprop_data if grouped else ops.convolution_backprop_data
        weight = c(2, 3, 4, 3, 2) if grouped else c(6, 4, 3, 2)
        keywords = {"pads_begin": begin, "pads_end": end, "dilations": dilations, "auto_pad": mode}
        return function(x, weight, strides, output_padding=extra, **keywords)

    compare(build, (2, 6, 5, 4))


@pytest.mark.parametrize("mode", ["same_upper", "same_lower"])
@pytest.mark.parametrize("size", [(10, 8), (9, 7)])
def test_transposed_convolution_to_a_given_size(mode: str, size: tuple[int, int]) -> None:
    compare(
        lambda x: ops.convolution_backprop_data(x, c(6, 4, 3, 4), [2, 2], i(*size), auto_pad=mode),
        (2, 6, 5, 4),
    )


POOLS = [
    ([2, 2], [2, 2], [0, 0], [0, 0], "floor", "explicit"),
    ([3, 2], [2, 3], [1, 0], [0, 1], "floor", "explicit"),
    ([3, 3], [2, 2], [0, 0], [0, 0], "ceil", "explicit"),
    ([3, 3], [2, 2], [1, 1], [1, 1], "ceil", "explicit"),
    ([5, 5], [3, 3], [2, 2], [2, 2], "ceil", "explicit"),
    ([5, 4], [1, 1], [0, 0], [0, 0], "floor", "same_upper"),
    ([2, 3], [2, 2], [0, 0], [0, 0], "floor", "same_lower"),
    ([2, 3], [2, 2], [0, 0], [0, 0], "floor", "valid"),
    ([9, 8], [1, 1], [0, 0], [0, 0], "floor", "explicit"),
]


@pytest.mark.parametrize(("kernel", "strides", "begin", "end", "rounding", "mode"), POOLS)
def test_pools(
    kernel: list[int], strides: list[int], begin: list[int], end: list[int], rounding: str, mode: str
) -> None:
    def build(x: Any) -> list[Any]:
        averages = [
            ops.avg_pool(x, strides, begin, end, kernel, exclude, rounding, mode) for exclude in (False, True)
        ]
        return [opset1.max_pool(x, strides, begin, end, kernel, rounding, mode), *averages]

    compare(build, PLAIN)


@pytest.mark.parametrize("kernel", [[3, 2], [5, 4]])
def test_dilated_max_pool(kernel: list[int]) -> None:
    def build(x: Any) -> list[Any]:
        return [o.max_pool(x, [2, 1], [2, 1], [1, 0], [1, 0], kernel).output(0) for o in (opset8, opset14)]

    compare(build, (2, 3, 11, 9))


def test_pools_along_one_and_three_axes() -> None:
    compare(lambda x: opset1.max_pool(x, [2], [1], [0], [3]), (2, 3, 9))
    compare(lambda x: ops.avg_pool(x, [2, 1, 2], [1, 0, 0], [0, 0, 1], [2, 2, 3], True), (2, 3, 5, 4, 6))


UNARY = [
    "abs",
    "ceiling",
    "cos",
    "erf",
    "exp",
    "floor",
    "hsigmoid",
    "hswish",
    "mish",
    "negative",
    "relu",
    "sigmoid",
    "sign",
    "sin",
    "softplus",
    "swish",
    "tanh",
]


def test_elementwise() -> None:
    def build(x: Any) -> list[Any]:
        positive = ops.add(ops.abs(x), scalar(0.1, np.float32))
        results = [getattr(ops, name)(x) for name in UNARY]
        return [*results, opset14.softsign(x), ops.gelu(x, "erf"), ops.log(positive), ops.sqrt(positive)]

    compare(build, VECTOR)


ARITHMETIC = ["add", "subtract", "multiply", "divide", "maximum", "minimum", "squared_difference"]


def test_arithmetic_broadcasts() -> None:
    compare(lambda x, y: [getattr(ops, name)(x, y) for name in ARITHMETIC], (2, 1, 4), (3, 1))
    compare(lambda x: [getattr(ops, name)(c(2, 3, 1), x) for name in ARITHMETIC], (4,))


COMPARISONS = ["equal", "not_equal", "greater", "greater_equal", "less", "less_equal"]


def test_comparisons() -> None:
    def build(x: Any, y: Any) -> list[Any]:
        return [ops.convert(getattr(ops, name)(x, y), "f32") for name in COMPARISONS]

    compare(build, (5, 4), (4,), dtypes=[np.int32, np.int32])


def test_logic() -> None:
    def build(a: Any, b: Any) -> Any:
        one, two = ops.greater(a, scalar(0, np.float32)), ops.less(b, scalar(1, np.float32))
        results = [
            ops.logical_and(one, two),
            ops.logical_or(one, two),
            ops.logical_xor(one, two),
            ops.logical_not(one),
        ]
        return [*(ops.convert(result, "f32") for result in results), ops.select(one, a, b)]

    compare(build, (3, 4), (4,))


ACTIVATIONS: dict[str, Build] = {
    "gelu tanh": lambda x: ops.gelu(x, "tanh"),
    "clamp": lambda x: ops.clamp(x, -0.5, 1.0),
    "elu": lambda x: ops.elu(x, 0.7),
    "selu": lambda x: ops.selu(x, scalar(1.6, np.float32), scalar(1.05, np.float32)),
    "hard sigmoid": lambda x: ops.hard_sigmoid(x, scalar(0.3, np.float32), scalar(0.4, np.float32)),
    "prelu": lambda x: ops.prelu(x, c(6)),
    "leaky relu": lambda x: ops.prelu(x, scalar([0.1], np.float32)),
    "prelu full": lambda x: ops.prelu(x, c(1, 6, 1, 1)),
    "swish beta": lambda x: ops.swish(x, scalar(1.5, np.float32)),
    "softmax": lambda x: ops.softmax(x, 1),
    "softmax last": lambda x: ops.softmax(x, -1),
    "log softmax": lambda x: ops.log_softmax(x, -1),
    "square": lambda x: ops.power(x, scalar(2.0, np.float32)),
    "inverse": lambda x: ops.power(ops.add(x, scalar(30, np.float32)), scalar(-1.0, np.float32)),
    "power": lambda x: ops.power(ops.exp(x), scalar(0.4, np.float32)),
    "powers": lambda x: ops.power(ops.exp(x), c(8)),
    "mvn": lambda x: ops.mvn(x, i(1, 3), True, 1e-3, "inside_sqrt"),
    "mvn outside": lambda x: ops.mvn(x, i(-1), True, 1e-2, "outside_sqrt"),
    "mvn mean": lambda x: ops.mvn(x, i(2), False, 1e-2, "inside_sqrt"),
    "batch norm": lambda x: ops.batch_norm_inference(x, c(6), c(6), c(6), c(6, positive=True), 1e-3),
    "batch norm 1": lambda x: opset1.batch_norm_inference(x, c(6), c(6), c(6), c(6, positive=True), 1e-3),
    "group normalization": lambda x: ops.group_normalization(x, c(6), c(6), 3, 1e-3),
    "lrn": lambda x: ops.lrn(x, i(1), 0.3, 0.7, 2.0, 3),
    "lrn space": lambda x: ops.lrn(x, i(2, 3), 0.3, 0.7, 2.0, 4),
    "normalize add": lambda x: ops.normalize_l2(x, i(1), 1e-2, "add"),
    "normalize max": lambda x: ops.normalize_l2(x, i(1, 2, 3), 1e-2, "max"),
    "fake quantize": lambda x: ops.fake_quantize(x, -1.0, 1.5, -0.9, 1.6, 11),
    "fake quantize channels": lambda x: ops.fake_quantize(
        x, c(6, 1, 1), ops.add(c(6, 1, 1), scalar(2, np.float32)), c(1, 1, 1), c(6, 1, 1), 256
    ),
    "cumulative": lambda x: ops.cum_sum(x, scalar(2)),
    "cumulative backward": lambda x: ops.cum_sum(x, scalar(-1), True, True),
    "floor mod": lambda x: ops.floor_mod(x, scalar(0.7, np.float32)),
    "integer division": lambda x: ops.convert(ops.divide(ops.convert(x, "i32"), scalar(2, np.int32)), "f32"),
    "convert like": lambda x: ops.convert_like(ops.convert(x, "i32"), c(1)),
    "adaptive": lambda x: ops.adaptive_avg_pool(x, i(4, 3)),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_and_normalizations(case: str) -> None:
    compare(ACTIVATIONS[case], PLAIN)


@pytest.mark.parametrize("keep", [False, True])
def test_reductions(keep: bool) -> None:
    functions = [getattr(ops, f"reduce_{kind}") for kind in ("mean", "sum", "max", "min", "l1", "l2", "prod")]

    def build(x: Any) -> list[Any]:
        return [function(x, axes, keep) for function in functions for axes in (i(1, -1), scalar(0))]

    compare(build, (2, 3, 2, 4))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_matmul(first: bool, second: bool) -> None:
    a, b = ((2, 1, 5, 3) if first else (2, 1, 3, 5)), ((4, 6, 5) if second else (4, 5, 6))
    compare(lambda x, y: ops.matmul(x, y, first, second), a, b)
    compare(lambda x, y: ops.matmul(x, y, first, second), (5,), b)
    compare(lambda x, y: ops.matmul(x, y, first, second), a, (5,))


MOVES: dict[str, Build] = {
    "reshape": lambda x: ops.reshape(x, i(0, -1, 4), True),
    "squeeze": lambda x: ops.squeeze(ops.reduce_sum(x, i(1), True), i(1)),
    "unsqueeze": lambda x: ops.unsqueeze(x, i(0, -1)),
    "transpose": lambda x: ops.transpose(x, i(3, 1, 0, 2)),
    "transpose reversed": lambda x: ops.transpose(x, ops.constant(np.zeros(0, np.int64))),
    "concat": lambda x: ops.concat([x, c(2, 6, 3, 8), x], -2),
    "split": lambda x: ops.split(x, scalar(1), 3).outputs(),
    "variadic split": lambda x: ops.variadic_split(x, scalar(-1), i(3, -1, 1)).outputs(),
    "slice": lambda x: ops.slice(x, i(1, -2), i(10**10, -(10**10)), i(2, -3), i(2, -1)),
    "slice all": lambda x: ops.slice(x, i(0, 1), i(2, 5), i(1, 2)),
    "strided slice": lambda x: ops.strided_slice(
        x, i(1, 2, 7), i(0, 5, 0), i(1, 2, -1), [0, 0, 0], [1, 0, 1]
    ),
    "strided slice new": lambda x: ops.strided_slice(
        x,
        i(0, 1, 0, 2),
        i(0, 2, 0, 5),
        i(1, 1, 1, 2),
        [0] * 4,
        [0] * 4,
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
    ),
    "pad": lambda x: ops.pad(x, i(0, 1, 2, 0), i(1, 0, 3, 2), "constant", scalar(0.5, np.float32)),
    "pad negative": lambda x: ops.pad(x, i(0, -1, 2, 0), i(0, 0, -3, 2), "constant"),
    "pad edge": lambda x: ops.pad(x, i(0, 1, 2, 0), i(1, 0, 3, 2), "edge"),
    "pad reflect": lambda x: ops.pad(x, i(0, 1, 2, 0), i(1, 0, 3, 2), "reflect"),
    "pad symmetric": lambda x: ops.pad(x, i(0, 1, 2, 0), i(1, 0, 3, 2), "symmetric"),
    "gather": lambda x: ops.gather(x, ops.constant(np.array([[3, -1], [0, 2]])), scalar(1)),
    "gather one": lambda x: ops.gather(x, scalar(2), scalar(-1)),
    "gather batch": lambda x: ops.gather(x, ops.constant(np.array([[3, -1, 1], [0, 2, 2]])), scalar(1), 1),
    "depth to space": lambda x: ops.depth_to_space(ops.concat([x, x], 1), "blocks_first", 2),
    "depth to space depth": lambda x: ops.depth_to_space(ops.concat([x, x], 1), "depth_first", 2),
    "space to depth": lambda x: ops.space_to_depth(ops.concat([x, x], 2), "blocks_first", 2),
    "space to depth depth": lambda x: ops.space_to_depth(ops.concat([x, x], 2), "depth_first", 2),
    "shuffle": lambda x: ops.shuffle_channels(x, 1, 3),
    "tile": lambda x: ops.tile(x, i(2, 1, 1, 2, 3)),
    "broadcast": lambda x: ops.broadcast(x, i(3, 2, 6, 9, 8)),
    "broadcast explicit": lambda x: ops.broadcast(
        ops.reduce_sum(x, i(0, 2, 3), False), i(4, 6, 2), i(1), "explicit"
    ),
    "broadcast both": lambda x: ops.broadcast(x, i(3, 2, 1, 1, 1), None, "bidirectional"),
}


@pytest.mark.parametrize("case", MOVES)
def test_moving_elements(case: str) -> None:
    compare(MOVES[case], PLAIN)


def test_computed_indices() -> None:
    def build(indices: Any) -> Any:
        found = ops.one_hot(indices, scalar(4), scalar(2.0, np.float32), scalar(-1.0, np.float32), 1)
        return [ops.gather(c(4, 3), ops.subtract(indices, scalar(1)), scalar(0)), found]

    compare(build, (2, 5), dtypes=[np.int64])


COORDINATES = ["half_pixel", "pytorch_half_pixel", "asymmetric", "tf_half_pixel_for_nn", "align_corners"]


NEAREST = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple"]


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("size", [(16, 20), (5, 3), (8, 1)])
def test_interpolate(coordinates: str, size: tuple[int, int]) -> None:
    def build(x: Any) -> list[Any]:
        modes = [("nearest", mode) for mode in NEAREST] + [("linear_onnx", "floor")]
        if size == (16, 20):
            modes.append(("linear", "floor"))
        return [
            opset11.interpolate(x, i(*size), mode, "sizes", [0], [0], coordinates, nearest, axes=i(2, 3))
            for mode, nearest in modes
        ]

    compare(build, (1, 2, 8, 7))


def test_interpolate_by_scales() -> None:
    factors = ops.constant(np.array([2.3, 1.5], np.float32))

    def build(x: Any) -> list[Any]:
        keywords = {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric", "axes": i(2, 3)}
        return [
            opset11.interpolate(x, factors, "nearest", "scales", [0], [0], **keywords),
            opset10.interpolate(x, i(18, 10), factors, "nearest", "scales", [0], [0], **keywords),
        ]

    compare(build, (1, 2, 8, 7))


def test_modes_without_a_rule_are_named() -> None:
    def build(x: Any) -> list[Any]:
        cubic = opset11.interpolate(x, i(16, 16), "cubic", "sizes", axes=i(2, 3))
        indices = opset8.max_pool(x, [1, 1], [1, 1], [0, 0], [0, 0], [2, 2]).output(1)
        return [cubic.output(0), indices]

    with pytest.raises(NotDifferentiable) as caught:
        DifferentiableModel(as_runnable(build, [(1, 2, 8, 8)], [np.float32]), 1, ())
    assert str(caught.value) == "no derivative is known for Interpolate (mode cubic), MaxPool (output 1)"


def _slope(build: Build, x: Float32) -> tuple[AnyArray, AnyArray]:
    model = DifferentiableModel(as_runnable(build, [x.shape], [np.float32]), 1, ())
    return np.asarray(model({}, [jnp.asarray(x)])[0]), np.asarray(
        jax.jit(jax.grad(lambda v: jnp.sum(model({}, [v])[0])))(jnp.asarray(x))
    )


def test_rounding_lets_gradients_through_inside_the_range() -> None:
    x = np.array([-3.0, -0.4, 0.3, 0.9, 4.0], np.float32)
    value, slope = _slope(lambda v: ops.fake_quantize(v, -1.0, 1.0, -2.0, 2.0, 3), x)
    np.testing.assert_array_equal(value, [-2, 0, 0, 2, 2])
    np.testing.assert_array_equal(slope, [0, 2, 2, 2, 0])


def test_gradients_at_zero_are_finite() -> None:
    zeros = np.zeros((2, 3), np.float32)
    for build in (
        lambda v: ops.reduce_l2(v, i(1), False),
        lambda v: ops.mvn(v, i(1), True, 1e-3, "outside_sqrt"),
        lambda v: ops.power(v, scalar(2.0, np.float32)),
        lambda v: ops.selu(ops.multiply(v, v), scalar(1.0, np.float32), scalar(1.0, np.float32)),
    ):
        assert np.isfinite(_slope(build, zeros)[1]).all()


@pytest.mark.parametrize("case", ["strided", "dilated", "same_lower", "one axis"])
def test_gradient_of_depthwise_convolutions(case: str) -> None:
    """The written-out gradient is that of the same convolution with full groups."""
    shape, weight, strides, begin, end, dilations, mode = CONVOLUTIONS[case]
    kernel = np.random.default_rng(4).standard_normal((3, 2, 1, *weight[2:])).astype(np.float32)

    def build(operand: Any) -> Build:
        return lambda x: ops.group_convolution(x, operand, strides, begin, end, dilations, mode)

    full = np.zeros((6, 3, *weight[2:]), np.float32)
    for group in range(3):
        full[2 * group : 2 * group + 2, group] = kernel[group, :, 0]

    def dense(operand: Any) -> Build:
        return lambda x: ops.convolution(x, operand, strides, begin, end, dilations, mode)

    x = jnp.asarray(feeds([shape], [np.float32])[0])
    slopes = []
    for make, value in ((build, kernel), (dense, full)):
        constant = ops.constant(value)
        constant.set_friendly_name("w")
        model = DifferentiableModel(as_runnable(make(constant), [shape], [np.float32]), 1, ["w"])

        def loss(w: jax.Array, v: jax.Array, model: DifferentiableModel = model) -> jax.Array:
            return jnp.sum(jnp.sin(model({"w": w}, [v])[0]))

        slopes.append(jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(value), x))
    (by_kernel, by_x), (by_full, by_x_full) = slopes
    picked = jnp.stack([by_full[2 * group : 2 * group + 2, group] for group in range(3)])[:, :, None]
    np.testing.assert_allclose(by_kernel, picked, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(by_x, by_x_full, rtol=1e-3, atol=1e-4)


def test_gradient_of_a_large_dilated_pool() -> None:
    """It goes to the largest element of each window."""
    x = feeds([(2, 3, 12, 11)], [np.float32])[0].astype(np.float32)
    value, slope = _slope(lambda v: opset8.max_pool(v, [2, 1], [2, 2], [1, 0], [0, 2], [5, 5]).output(0), x)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 2)), constant_values=-np.inf)
    wanted = np.zeros_like(padded)
    assert value.shape == (2, 3, 3, 5)
    for image, channel, row, column in np.ndindex(*value.shape):
        rows, columns = 2 * row + 2 * np.arange(5), column + 2 * np.arange(5)
        window = padded[image, channel][np.ix_(rows, columns)]
        at = np.unravel_index(window.argmax(), window.shape)
        assert value[image, channel, row, column] == window[at]
        wanted[image, channel, rows[at[0]], columns[at[1]]] += 1
    np.testing.assert_array_equal(slope, wanted[:, :, 1:, :-2])
