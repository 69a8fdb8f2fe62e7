"""Layer discovery on graphs built by hand, so that no format is involved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry, MatMulGeometry
from pot_sparsity.graph.discovery import Discovery, find_layers
from pot_sparsity.graph.graph import Graph, Node, Shape, TensorInfo
from pot_sparsity.graph.layers import Layer, flops, pattern_stride

F32 = np.dtype(np.float32)


class Builder:
    """Collects nodes whose output tensor bears the node's own name."""

    def __init__(self, x: Shape | None = (None, 4, 8, 8)) -> None:
        self.nodes: list[Node] = [Node("x", "Parameter", (), ("x",))]
        self.tensors: dict[str, TensorInfo] = {"x": TensorInfo("x", x, F32)}
        self.values: dict[str, AnyArray] = {}

    def constant(self, name: str, value: AnyArray) -> str:
        self.nodes.append(Node(name, "Constant", (), (name,)))
        self.values[name] = value
        self.tensors[name] = TensorInfo(name, value.shape, value.dtype)
        return name

    def add(
        self,
        name: str,
        op: str,
        inputs: Sequence[str],
        shape: Shape | None = None,
        attrs: Mapping[str, object] | None = None,
    ) -> str:
        self.nodes.append(Node(name, op, tuple(inputs), (name,), attrs or {}, op))
        self.tensors[name] = TensorInfo(name, shape, F32)
        return name

    def conv(
        self,
        name: str,
        x: str,
        w: str,
        bias: str = "",
        groups: int = 1,
        layout: str = "oi",
        channels: int = 6,
    ) -> str:
        inputs = (x, w, bias) if bias else (x, w)
        geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), groups, transposed="io" in layout)
        op = "ConvolutionTranspose" if "io" in layout else "Convolution"
        return self.add(
            name, op, inputs, (None, channels, 8, 8), {"geometry": geometry, "weight_layout": layout}
        )

    def matmul(
        self, name: str, a: str, b: str, shape: Shape | None = None, attrs: Mapping[str, object] | None = None
    ) -> str:
        plain: Mapping[str, object] = {"transpose_a": False, "transpose_b": False, "alpha": 1.0, "beta": 1.0}
        return self.add(name, "MatMul", (a, b), shape, {**plain, **(attrs or {})})

    def convert(self, name: str, source: str, shape: Shape) -> str:
        self.nodes.append(Node(name, "Convert", (source,), (name,), {"dtype": F32}, "Convert"))
        self.tensors[name] = TensorInfo(name, shape, F32)
        return name

    def graph(self, *outputs: str) -> Graph:
        results = [Node(f"{name}/result", "Result", (name,), ()) for name in outputs]
        readers = {name: (lambda v=value: v) for name, value in self.values.items()}
        return Graph([*self.nodes, *results], self.tensors, readers, ["x"], outputs)

    def find(self, *outputs: str) -> Discovery:
        return find_layers(self.graph(*outputs))


def weight(*shape: int) -> AnyArray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def only(discovery: Discovery) -> Layer:
    assert discovery.skipped == ()
    assert len(discovery.layers) == 1
    return discovery.layers[0]


def reason(discovery: Discovery, node: str) -> str:
    assert node not in {place.node for layer in discovery.layers for place in layer.places}
    return next(skipped.reason for skipped in discovery.skipped if skipped.node == node)


def test_convolution_with_its_own_bias() -> None:
    b = Builder()
    b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)), b.constant("b", weight(6)))
    layer = only(b.find("conv"))
    assert (layer.name, layer.kind, layer.constant, layer.chain) == ("conv", "convolution", "w", ())
    assert (layer.groups, layer.rows, layer.cols, layer.size, layer.channels) == (1, 6, 36, 216, 6)
    place = layer.places[0]
    assert (place.input, place.output, place.channel_axis) == ("x", "conv", 1)
    assert place.bias is not None
    assert (place.bias.constant, place.bias.shape, place.bias.scale) == ("b", (6,), 1.0)
    assert pattern_stride(layer) == 9


@pytest.mark.parametrize(
    ("layout", "shape", "groups", "expected"),
    [
        ("oi", (6, 2, 3, 3), 2, (2, 3, 18)),
        ("goi", (2, 3, 2, 3, 3), 2, (2, 3, 18)),
        ("io", (4, 3, 3, 3), 2, (2, 3, 18)),
        ("gio", (2, 2, 3, 3, 3), 2, (2, 3, 18)),
        ("oi", (4, 1, 3, 3), 4, (4, 1, 9)),
        ("io", (4, 6, 3, 3), 1, (1, 6, 36)),
    ],
)
def test_sizes_of_every_weight_layout(
    layout: str, shape: tuple[int, ...], groups: int, expected: tuple[int, int, int]
) -> None:
    b = Builder()
    b.conv("conv", "x", b.constant("w", weight(*shape)), groups=groups, layout=layout)
    layer = only(b.find("conv"))
    assert (layer.groups, layer.rows, layer.cols) == expected
    assert layer.places[0].bias is None


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_an_add_of_one_value_per_channel_is_the_bias(shape: tuple[int, ...]) -> None:
    b = Builder()
    conv = b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)))
    b.add("sum", "Add", (b.constant("b", weight(*shape)), conv), (None, 6, 8, 8))
    place = only(b.find("sum")).places[0]
    assert place.output == "sum"
    assert place.bias is not None
    assert (place.bias.constant, place.bias.shape) == ("b", shape)


def test_a_subtracted_constant_is_a_bias_with_a_sign() -> None:
    b = Builder()
    conv = b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)))
    b.add("difference", "Subtract", (conv, b.constant("b", weight(1, 6, 1, 1))), (None, 6, 8, 8))
    place = only(b.find("difference")).places[0]
    assert place.bias is not None
    assert place.bias.scale == -1.0
    b = Builder()
    conv = b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)))
    b.add("difference", "Subtract", (b.constant("b", weight(1, 6, 1, 1)), conv), (None, 6, 8, 8))
    assert only(b.find("difference")).places[0].bias is None


@pytest.mark.parametrize("shape", [(6,), (1, 1, 1, 1), (1, 6, 8, 8), (1, 1, 6, 1, 1), ()])
def test_other_additions_are_no_bias(shape: tuple[int, ...]) -> None:
    b = Builder()
    conv = b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)))
    b.add("sum", "Add", (conv, b.constant("b", np.asarray(weight(*shape)))), (None, 6, 8, 8))
    place = only(b.find("sum")).places[0]
    assert place.bias is None
    assert place.output == "conv"


def test_a_bias_that_others_read_or_see_through_is_not_usable() -> None:
    b = Builder()
    bias = b.constant("b", weight(6))
    first = b.conv("first", "x", b.constant("w1", weight(6, 4, 3, 3)), bias)
    b.conv("second", first, b.constant("w2", weight(6, 6, 3, 3)), bias)
    assert [layer.places[0].bias for layer in b.find("second").layers] == [None, None]

    b = Builder()
    conv = b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)))
    b.add("sum", "Add", (conv, b.constant("b", weight(6, 1, 1))), (None, 6, 8, 8))
    b.add("relu", "Relu", (conv,))
    assert only(b.find("sum", "relu")).places[0].output == "conv"
    assert only(b.find("sum", "conv", "relu")).places[0].bias is None


def test_bias_behind_a_chain() -> None:
    b = Builder()
    b.convert("cast", b.constant("b", weight(6).astype(np.float16)), (6,))
    b.add("shaped", "Reshape", ("cast",), (1, 6, 1, 1))
    conv = b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)))
    b.add("sum", "Add", (conv, "shaped"), (None, 6, 8, 8))
    bias = only(b.find("sum")).places[0].bias
    assert bias is not None
    assert (bias.constant, bias.chain, bias.shape) == ("b", ("cast", "shaped"), (1, 6, 1, 1))


@pytest.mark.parametrize(
    ("attrs", "x", "w", "constant_first", "expected", "axes"),
    [
        ({}, (None, 5), (5, 7), False, (1, 7, 5, "io"), (-1, -1)),
        ({"transpose_b": True}, (None, 5), (7, 5), False, (1, 7, 5, "oi"), (-1, -1)),
        ({"transpose_a": True}, (5, None), (5, 7), False, (1, 7, 5, "io"), (-2, -1)),
        ({}, (5, None), (7, 5), True, (1, 7, 5, "oi"), (-2, -2)),
        ({"transpose_a": True}, (5, None), (5, 7), True, (1, 7, 5, "io"), (-2, -2)),
        ({"transpose_b": True}, (None, 5), (7, 5), True, (1, 7, 5, "oi"), (-1, -2)),
        ({}, (None, 3, 2, 5), (3, 5, 7), False, (3, 7, 5, "gio"), (-1, -1)),
        ({"transpose_b": True}, (3, 2, 5), (3, 7, 5), False, (3, 7, 5, "goi"), (-1, -1)),
        ({}, (3, 5, 2), (3, 7, 5), True, (3, 7, 5, "goi"), (-2, -2)),
        ({}, (None, 5), (1, 1, 5, 7), False, (1, 7, 5, "io"), (-1, -1)),
        ({"transpose_a": True}, (5,), (5, 7), False, (1, 7, 5, "io"), (-1, -1)),
        ({}, None, (5, 7), False, (1, 7, 5, "io"), (-1, -1)),
    ],
)
def test_matmul_sides_and_transposes(
    attrs: dict[str, object],
    x: Shape | None,
    w: tuple[int, ...],
    constant_first: bool,
    expected: tuple[int, int, int, str],
    axes: tuple[int, int],
) -> None:
    b = Builder(x)
    constant = b.constant("w", weight(*w))
    b.matmul("product", *((constant, "x") if constant_first else ("x", constant)), attrs=attrs)
    layer = only(b.find("product"))
    assert (layer.groups, layer.rows, layer.cols, layer.layout) == expected
    place = layer.places[0]
    assert place.geometry == MatMulGeometry(axes[0], expected[0])
    assert (place.input, place.channel_axis) == ("x", axes[1])
    assert pattern_stride(layer) == 1


@pytest.mark.parametrize(
    ("x", "w", "constant_first", "attrs", "words"),
    [
        ((None, 5), (5,), False, {}, "vector"),
        ((None, 2, 3, 5), (2, 3, 5, 7), False, {}, "4 axes"),
        ((None, None, 5), (3, 5, 7), False, {}, "stack"),
        ((None, 5), (3, 5, 7), False, {}, "stack"),
        ((5,), (7, 5), True, {}, "vector"),
        (None, (7, 5), True, {}, "rank"),
        (None, (5, 7), False, {"transpose_a": True}, "rank"),
        ((None, 5), (5, 7), False, {"alpha": 0.0}, "alpha"),
        ((None, 5), (5, 0), False, {}, "empty"),
    ],
)
def test_matmul_left_alone(
    x: Shape | None, w: tuple[int, ...], constant_first: bool, attrs: dict[str, object], words: str
) -> None:
    b = Builder(x)
    constant = b.constant("w", weight(*w))
    b.matmul("product", *((constant, "x") if constant_first else ("x", constant)), attrs=attrs)
    assert words in reason(b.find("product"), "product")


@pytest.mark.parametrize(
    ("x", "w", "first", "shape", "found"),
    [
        ((None, 5), (5, 7), False, (7,), True),
        ((None, 2, 5), (5, 7), False, (1, 7), True),
        ((None, 5), (5, 7), False, (7, 1), False),
        ((5, 4), (7, 5), True, (7, 1), True),
        ((5, 7), (7, 5), True, (7,), False),
        ((3, 2, 5), (3, 5, 7), False, (3, 1, 7), True),
        ((3, 2, 5), (3, 5, 7), False, (7,), False),
        ((None, 5), (5, 1), False, (), True),
    ],
)
def test_bias_of_a_matmul(
    x: Shape, w: tuple[int, ...], first: bool, shape: tuple[int, ...], found: bool
) -> None:
    b = Builder(x)
    constant = b.constant("w", weight(*w))
    rank = max(len(x), len(w))
    product = b.matmul("product", *((constant, "x") if first else ("x", constant)), shape=(None,) * rank)
    b.add("sum", "Add", (product, b.constant("b", np.asarray(weight(*shape)))), (None,) * rank)
    assert (only(b.find("sum")).places[0].bias is not None) == found


def test_gemm_factors_are_kept() -> None:
    b = Builder((None, 5))
    b.constant("w", weight(5, 7))
    b.constant("c", weight(7))
    attrs: dict[str, object] = {"transpose_a": False, "transpose_b": False, "alpha": 0.5, "beta": 2.0}
    b.add("gemm", "MatMul", ("x", "w", "c"), (None, 7), attrs)
    layer = only(b.find("gemm"))
    assert layer.scale == 0.5
    assert layer.places[0].bias is not None
    assert layer.places[0].bias.scale == 2.0


def test_shared_weight_is_one_layer_with_several_places() -> None:
    b = Builder()
    w = b.constant("w", weight(4, 4, 3, 3))
    first = b.conv("first", "x", w, channels=4)
    b.add("same", "Identity", (w,), (4, 4, 3, 3))
    second = b.conv("second", first, "same", channels=4)
    b.add("sum", "Add", (second, b.constant("b", weight(4, 1, 1))), (None, 4, 8, 8))
    layer = only(b.find("sum"))
    assert layer.shared
    assert layer.chain == ()
    assert [place.node for place in layer.places] == ["first", "second"]
    assert [place.bias is None for place in layer.places] == [True, False]


def test_one_weight_used_in_different_ways_is_left_alone() -> None:
    b = Builder((None, 5))
    w = b.constant("w", weight(5, 5))
    first = b.matmul("first", "x", w, (None, 5))
    b.matmul("second", first, w, (None, 5), {"transpose_b": True})
    found = b.find("second")
    assert found.layers == ()
    assert "different ways" in reason(found, "first")
    assert "different ways" in reason(found, "second")

    b = Builder((None, 5))
    w = b.constant("w", weight(5, 5))
    b.add("turned", "Transpose", (w,), (5, 5), {"perm": (1, 0)})
    first = b.matmul("first", "x", w, (None, 5))
    b.matmul("second", first, "turned", (None, 5), {"transpose_b": True})
    assert only(b.find("second")).shared


def test_tied_embedding_is_left_alone() -> None:
    b = Builder((None, 5))
    w = b.constant("w", weight(9, 5))
    b.add("lookup", "Gather", (w, "x"), (None, 5))
    b.matmul("logits", "lookup", w, (None, 9), {"transpose_b": True})
    assert "Gather (lookup)" in reason(b.find("logits"), "logits")


def test_readers_of_the_shape_alone_do_no_harm() -> None:
    b = Builder()
    w = b.constant("w", weight(4, 1, 3, 3))
    b.add("size", "ShapeOf", (w,), (4,))
    b.add("folded", "Reshape", (w, "size"), (4, 1, 1, 3, 3))
    b.conv("conv", "x", "folded", groups=4, layout="goi", channels=4)
    layer = only(b.find("conv"))
    assert (layer.chain, layer.shape) == (("folded",), (4, 1, 1, 3, 3))


def test_weight_that_is_a_model_output_is_left_alone() -> None:
    b = Builder()
    b.conv("conv", "x", b.constant("w", weight(6, 4, 3, 3)))
    assert "output of the model" in reason(b.find("conv", "w"), "conv")


def test_weights_that_are_no_plain_float_constants_are_left_alone() -> None:
    b = Builder()
    w = b.constant("w", weight(6, 4, 3, 3))
    b.add("quantized", "FakeQuantize", (w,), (6, 4, 3, 3))
    b.conv("a", "x", "quantized")
    b.add("noisy", "Multiply", (w, "x"), (6, 4, 3, 3))
    b.conv("b", "x", "noisy")
    b.add("product", "Sqrt", (w,), (6, 4, 3, 3))
    b.conv("c", "x", "product")
    b.conv("d", b.constant("image", weight(1, 4, 8, 8)), b.constant("w2", weight(6, 4, 3, 3)))
    b.conv("e", "x", b.constant("integers", np.ones((6, 4, 3, 3), np.int8)))
    b.add("f", "LSTM", ("x", w))
    b.add("g", "QLinearConv", ("x", w))
    b.nodes.append(Node("h", "GroupConvolution*", ("x", "noisy"), ("h",), {}, "GroupConvolution"))
    b.matmul("i", "x", "x")
    found = b.find("a", "b", "c", "d", "e", "f", "g", "h", "i")
    assert found.layers == ()
    assert [skipped.node for skipped in found.skipped] == list("abcdefghi")
    words = ["FakeQuantize", "depends on", "Sqrt", "both operands are constants", "int8", "recurrent"]
    words += ["quantized already", "not known before run time", "both operands are computed"]
    for skipped, word in zip(found.skipped, words, strict=True):
        assert word in skipped.reason


def _decompressed(zero: float) -> Discovery:
    b = Builder((None, 5))
    w = b.constant("w", np.arange(35, dtype=np.uint8).reshape(5, 7))
    b.convert("wide", w, (5, 7))
    zero_point = b.constant("z", np.full((1, 7), zero, np.float32))
    b.add("centred", "Subtract", ("wide", zero_point), (5, 7))
    b.add("scaled", "Multiply", ("centred", b.constant("s", np.full((1, 7), 0.1, np.float32))), (5, 7))
    b.matmul("product", "x", "scaled")
    return b.find("product")


def test_decompressed_integers_need_a_zero_on_the_grid() -> None:
    assert only(_decompressed(12.0)).chain == ("wide", "centred", "scaled")
    assert "zero" in reason(_decompressed(12.5), "product")
    assert "zero" in reason(_decompressed(-3.0), "product")


def test_layers_and_skipped_nodes_come_in_topological_order() -> None:
    b = Builder()
    b.conv("c3", "c2", b.constant("w3", weight(6, 6, 3, 3)))
    b.conv("c2", "c1", b.constant("w2", weight(6, 6, 3, 3)))
    b.conv("c1", "x", b.constant("w1", weight(6, 4, 3, 3)))
    assert [layer.name for layer in b.find("c3").layers] == ["c1", "c2", "c3"]


def test_flops_count_one_sample() -> None:
    b = Builder()
    b.conv("conv", "x", b.constant("w", weight(6, 2, 3, 3)), groups=2)
    assert flops(only(b.find("conv")), b.graph("conv")) == 2 * 6 * 2 * 9 * 64

    b = Builder((8, None, 5))
    b.matmul("product", "x", b.constant("w", weight(5, 7)))
    assert flops(only(b.find("product")), b.graph("product")) is None

    b = Builder((8, 3, 5))
    b.matmul("product", "x", b.constant("w", weight(5, 7)))
    assert flops(only(b.find("product")), b.graph("product")) == 2 * 3 * 35

    b = Builder((3, 2, 5))
    b.matmul("product", "x", b.constant("w", weight(3, 5, 7)))
    assert flops(only(b.find("product")), b.graph("product")) == 2 * 3 * 2 * 35

    b = Builder((None, 4, 5, 5))
    b.conv("up", "x", b.constant("w", weight(4, 6, 3, 3)), layout="io")
    assert flops(only(b.find("up")), b.graph("up")) == 2 * 4 * 6 * 9 * 25
