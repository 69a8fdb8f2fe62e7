from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import openvino as ov
import pytest
from openvino import opset1, opset13

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.graph import Node
from pot_sparsity.graph.ir_files import read_ir
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Edit, Runnable
from pot_sparsity.graph.openvino_model import OpenVINOModel, load_ir

SHAPE = (2, 3, 6, 6)


def named(node: Any, name: str, *tensors: str) -> Any:
    node.set_friendly_name(name)
    if tensors:
        node.output(0).get_tensor().set_names(set(tensors))
    return node


def small_model(dtype: Any = np.float32, *, batch: int = -1) -> ov.Model:
    """Convolution, batch norm, ReLU, MatMul on the last axis; the batch norm and the product are outputs."""
    rng = np.random.default_rng(1)

    def constant(name: str, *shape: int) -> Any:
        return named(opset13.constant(rng.uniform(0.5, 1.5, shape).astype(dtype)), name, f"{name}_t")

    x = named(opset13.parameter([batch, *SHAPE[1:]], dtype), "x", "image")
    conv = named(
        opset13.convolution(x, constant("w", 4, 3, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]), "conv", "conv_t"
    )
    norm = opset1.batch_norm_inference(
        conv, *(constant(n, 4) for n in ("gamma", "beta", "mean", "variance")), 1e-3
    )
    named(norm, "norm", "norm_t")
    relu = named(opset13.relu(norm), "relu")
    product = named(opset13.matmul(relu, constant("v", 6, 5), False, False), "product", "product_t")
    return ov.Model([norm, product], [x], "small")


def run(model: ov.Model | Runnable, *values: AnyArray) -> list[Any]:
    if isinstance(model, Runnable):
        assert isinstance(model.model, ov.Model)
        model = model.model
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(list(values))
    return [np.array(results[port]) for port in range(len(compiled.outputs))]


@pytest.fixture
def x() -> Any:
    return np.random.default_rng(2).uniform(-1, 1, SHAPE).astype(np.float32)


def saved(model: ov.Model, folder: Path, name: str = "source") -> Path:
    path = folder / f"{name}.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def test_view_of_a_model() -> None:
    model = OpenVINOModel(small_model())
    assert (model.format, model.source, model.batch_size) == ("openvino", None, None)
    assert [info.name for info in model.inputs] == ["x:0"]
    assert [info.name for info in model.outputs] == ["norm:0", "product:0"]
    assert model.inputs[0].shape == (None, 3, 6, 6)
    assert OpenVINOModel(small_model(batch=3)).batch_size == 3


def test_set_constant_changes_the_copy_only(x: Any) -> None:
    original = small_model()
    before = run(original, x)
    model = OpenVINOModel(original)
    graph = model.graph
    twin = model.copy()
    stored = model.set_constant("v:0", np.arange(30.0).reshape(6, 5))
    assert stored.dtype == np.float32
    assert model.graph is graph
    np.testing.assert_array_equal(graph.value("v:0"), np.arange(30).reshape(6, 5))
    np.testing.assert_allclose(run(original, x)[1], before[1])
    np.testing.assert_allclose(run(twin.native, x)[1], before[1])
    relu = np.maximum(before[0], 0)
    np.testing.assert_allclose(run(model.native, x)[1], relu @ stored, rtol=1e-4, atol=1e-4)
    names = {n.get_friendly_name(): n for n in model.native.get_ordered_ops()}
    assert names["v"].output(0).get_names() == {"v_t"}
    assert model.edits == []


@pytest.mark.parametrize(
    ("tensor", "value", "text"),
    [
        ("v:0", np.zeros((5, 6)), "has shape"),
        ("v:0", np.full((6, 5), 1e39), "is not finite in float32"),
        ("relu:0", np.zeros(1), "is not a constant"),
        ("nothing", np.zeros(1), "is not a constant"),
    ],
)
def test_set_constant_refuses(tensor: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OpenVINOModel(small_model()).set_constant(tensor, value)


def test_add_bias_to_a_convolution(x: Any) -> None:
    model = OpenVINOModel(small_model())
    before = run(model.extract(["conv:0", "product:0"]), x)
    bias = np.array([1.0, 2, 3, 4])
    graph = model.graph
    constant = model.add_bias("conv", bias)
    assert model.graph is not graph
    assert model.graph.tensor(constant).shape == (1, 4, 1, 1)
    assert model.edits == [Edit("add_bias", "conv", "added a bias of 4 values to conv")]
    node = model.graph.node("conv")
    assert node.op == "Convolution"
    add = model.graph.producer("conv:0")
    assert add is not None
    assert (add.op, add.inputs) == ("Add", (node.output, constant))
    assert model.graph.node("norm").inputs[0] == "conv:0"
    after = run(model.extract(["conv:0", node.output]), x)
    np.testing.assert_allclose(after[0], before[0] + bias[:, None, None], rtol=1e-5)
    np.testing.assert_allclose(after[1], before[0])
    model.set_constant(constant, np.zeros((1, 4, 1, 1)))
    np.testing.assert_allclose(run(model.native, x)[1], before[1], rtol=1e-5)
    holders = [n.get_friendly_name() for n in model.native.get_ops() if "conv_t" in n.output(0).get_names()]
    assert holders == ["conv.add_bias"]


def test_add_bias_to_a_matmul_that_is_an_output(x: Any, tmp_path: Path) -> None:
    model = OpenVINOModel(small_model())
    before = run(model.native, x)
    constant = model.add_bias("product", np.arange(5.0))
    assert model.graph.tensor(constant).shape == (5,)
    assert model.graph.outputs == ("norm:0", "product:0")
    assert [port.get_names() for port in model.native.outputs] == [{"norm_t"}, {"product_t"}]
    model.save(tmp_path, "m")
    again = load_ir(tmp_path / "m.xml")
    assert [port.get_names() for port in again.native.outputs] == [{"norm_t"}, {"product_t"}]
    assert again.graph.node("product").op == "MatMul"
    np.testing.assert_allclose(run(again.native, x)[1], before[1] + np.arange(5), rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_add_bias_where_the_constant_is_on_the_left(transposed: bool) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = opset13.parameter([3, 4], np.float32)
    stored = np.ascontiguousarray(weight.T if transposed else weight).astype(np.float16)
    left = opset13.convert(opset13.constant(stored), "f32")
    product = named(opset13.matmul(left, x, transposed, False), "product")
    model = OpenVINOModel(ov.Model([product], [x]))
    constant = model.add_bias("product", np.array([10.0, 20]))
    assert model.graph.tensor(constant).shape == (2, 1)
    value = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(run(model.native, value)[0], weight @ value + [[10], [20]])


def test_add_bias_to_a_stack_of_matrices() -> None:
    weight = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    x = opset13.parameter([2, 4, 3], np.float32)
    product = named(opset13.matmul(x, opset13.constant(weight), False, False), "product")
    model = OpenVINOModel(ov.Model([product], [x]))
    bias = np.arange(10.0)
    constant = model.add_bias("product", bias)
    assert model.graph.tensor(constant).shape == (2, 1, 5)
    value = np.ones((2, 4, 3), np.float32)
    np.testing.assert_allclose(run(model.native, value)[0], value @ weight + bias.reshape(2, 1, 5), rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (lambda x, w: opset13.group_convolution(x, w(2, 3, 2, 3, 3), [1, 1], [0, 0], [0, 0], [1, 1]), 6),
        (lambda x, w: opset1.convolution_backprop_data(x, w(4, 5, 3, 3), [1, 1]), 5),
        (
            lambda x, w: opset1.group_convolution_backprop_data(
                x, w(2, 2, 3, 3, 3), [1, 1], None, [0, 0], [0, 0]
            ),
            6,
        ),
    ],
)
def test_add_bias_to_other_convolutions(build: Callable[[Any, Any], Any], channels: int) -> None:
    rng = np.random.default_rng(0)
    x = opset13.parameter([1, 4, 6, 6], np.float32)
    conv = named(
        build(x, lambda *shape: opset13.constant(np.asarray(rng.normal(size=shape), np.float32))), "conv"
    )
    model = OpenVINOModel(ov.Model([conv], [x]))
    value = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    before = run(model.native, value)[0]
    model.add_bias("conv", np.arange(channels, dtype=np.float64))
    after = run(model.native, value)[0]
    np.testing.assert_allclose(
        after - before,
        np.broadcast_to(np.arange(channels).reshape(1, -1, 1, 1), after.shape),
        atol=1e-5,
    )


def test_add_bias_refuses() -> None:
    model = OpenVINOModel(small_model())
    with pytest.raises(ValueError, match=r"'relu' .* cannot have a bias"):
        model.add_bias("relu", np.zeros(4))
    with pytest.raises(ValueError, match="needs 4 values, not 3"):
        model.add_bias("conv", np.zeros(3))
    assert model.edits == []


def test_bypass_of_an_inner_node(x: Any) -> None:
    model = OpenVINOModel(small_model())
    before = run(model.native, x)
    model.bypass("relu", kind="fuse_batchnorm", detail="why not")
    assert model.edits == [Edit("fuse_batchnorm", "relu", "why not")]
    assert "relu" not in model.graph
    assert model.graph.node("product").inputs[0] == "norm:0"
    np.testing.assert_allclose(
        run(model.native, x)[1], before[0] @ model.graph.value("v:0"), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="no tensor called 'relu:0'"):
        model.extract(["relu:0"])


def test_edits_in_a_row(x: Any) -> None:
    original = small_model()
    model, steps = OpenVINOModel(original), OpenVINOModel(original)
    for each in (model, steps):
        each.add_bias("conv", np.arange(4.0))
        _ = each.graph if each is steps else None
        each.replace_operand("norm", 3, np.full(4, 0.5), detail="")
        _ = each.graph if each is steps else None
        each.bypass("relu", kind="fold_constant", detail="")
        with pytest.raises(KeyError):
            each.bypass("relu", kind="fold_constant", detail="")
        _ = each.graph if each is steps else None
        each.set_constant("conv.bias:0", np.ones((1, 4, 1, 1)))
        each.add_bias("product", np.arange(5.0))
    assert list(model.graph) == list(steps.graph)
    for ours, theirs in zip(run(model.extract(), x), run(steps.extract(), x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="is not a constant"):
        model.set_constant("mean:0", np.zeros(4))


def test_bypass_of_a_node_that_is_an_output(x: Any) -> None:
    model = OpenVINOModel(small_model())
    conv = run(model.extract(["conv:0"]), x)[0]
    model.bypass("norm", kind="fuse_batchnorm", detail="")
    assert model.graph.outputs == ("norm:0", "product:0")
    assert model.graph.node("conv").output == "norm:0"
    assert model.graph.node("relu").inputs == ("norm:0",)
    assert "norm_t" in model.native.output(0).get_names()
    assert not {"gamma", "norm"} & {node.name for node in model.graph}
    np.testing.assert_allclose(run(model.native, x)[0], conv)
    np.testing.assert_allclose(run(model.copy().extract(["norm:0"]), x)[0], conv)


def test_bypass_between_input_and_output() -> None:
    x = named(opset13.parameter([2, 3], np.float32), "x")
    one, two = named(opset13.relu(x), "one", "a"), named(opset13.relu(x), "two", "b")
    model = OpenVINOModel(ov.Model([one, two], [x]))
    model.bypass("one", kind="fold_constant", detail="")
    assert model.graph.inputs == ("x:0",)
    assert model.graph.outputs == ("x:0", "two:0")
    value = np.array([[1, -1, 0], [2, -2, 0]], np.float32)
    np.testing.assert_array_equal(run(model.native, value)[0], value)


def test_bypass_refuses() -> None:
    with pytest.raises(ValueError, match="cannot be bypassed"):
        OpenVINOModel(small_model()).bypass("x", kind="fold_constant", detail="")


def test_replace_operand_folds_a_chain() -> None:
    x = named(opset13.parameter([1, 4, 6, 6], np.float32), "x")
    weight = named(opset13.constant(np.ones((4, 1, 3, 3), np.float32)), "weight")
    reshaped = named(opset13.reshape(weight, opset13.constant(np.array([4, 1, 1, 3, 3])), False), "reshaped")
    conv = named(opset13.group_convolution(x, reshaped, [1, 1], [0, 0], [0, 0], [1, 1]), "conv")
    model = OpenVINOModel(ov.Model([conv], [x]))
    value = np.full((4, 1, 1, 3, 3), 2.0)
    tensor = model.replace_operand("conv", 1, value, detail="folded")
    assert model.edits == [Edit("fold_constant", "conv", "folded")]
    assert {node.name for node in model.graph if node.op != "Result"} == {"x", tensor[:-2], "conv"}
    assert model.graph.value(tensor).dtype == np.float32
    np.testing.assert_allclose(run(model.native, np.ones((1, 4, 6, 6), np.float32))[0], 18)
    with pytest.raises(ValueError, match="has no input 2"):
        model.replace_operand("conv", 2, value, detail="")


def test_replace_operand_speaks_of_canonical_ports() -> None:
    model = OpenVINOModel(small_model())
    tensor = model.replace_operand("norm", 1, np.full(4, 7.0), detail="gamma")
    assert model.graph.node("norm").inputs[1] == tensor
    assert model.graph.node("norm").inputs[2] == "beta:0"
    (norm,) = [n for n in model.native.get_ops() if n.get_type_name() == "BatchNormInference"]
    np.testing.assert_array_equal(norm.input_value(0).get_node().data, 7)


def test_extract_the_whole_model(x: Any) -> None:
    model = OpenVINOModel(small_model())
    whole = model.extract()
    assert (whole.inputs, whole.outputs) == (("x:0",), ("norm:0", "product:0"))
    for ours, theirs in zip(run(whole, x), run(model.native, x), strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_extract_taps_and_cuts(x: Any) -> None:
    model = OpenVINOModel(small_model())
    conv, norm, product = run(model.extract(["conv:0", "norm:0", "product:0"]), x)
    part = model.extract(["product:0", "relu:0", "norm:0"], ["norm:0"])
    assert (part.inputs, part.outputs) == (("norm:0",), ("product:0", "relu:0", "norm:0"))
    assert isinstance(part.model, ov.Model)
    assert part.model.input(0).get_partial_shape()[0].is_dynamic
    results = run(part, norm)
    np.testing.assert_allclose(results[0], product, rtol=1e-5)
    np.testing.assert_allclose(results[1], np.maximum(norm, 0))
    np.testing.assert_allclose(results[2], norm)
    assert model.extract(["relu:0"], ["norm:0", "x:0"]).inputs == ("norm:0",)
    two = model.extract(["norm:0", "product:0"], ["relu:0", "conv:0"])
    assert two.inputs == ("relu:0", "conv:0")
    np.testing.assert_allclose(run(two, np.maximum(norm, 0), conv)[1], product, rtol=1e-5)
    assert [port.get_names() for port in model.native.outputs] == [{"norm_t"}, {"product_t"}]


@pytest.mark.parametrize(
    ("outputs", "inputs", "text"),
    [
        (["conv:0"], ["norm:0"], "need the model's input 'x:0', which is not given"),
        (["nowhere:0"], None, "no tensor called 'nowhere:0'"),
        (["conv:0"], ["nowhere:0"], "no tensor called 'nowhere:0'"),
        (["conv:0"], ["w:0"], "'w:0' is a constant"),
    ],
)
def test_extract_refuses(outputs: list[str], inputs: list[str] | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OpenVINOModel(small_model()).extract(outputs, inputs)


def test_constants_can_be_tapped() -> None:
    model = OpenVINOModel(small_model())
    part = model.extract(["v:0", "relu:0"])
    np.testing.assert_array_equal(run(part, np.zeros(SHAPE, np.float32))[0], model.graph.value("v:0"))


def half_models() -> list[Any]:
    return [pytest.param(np.float16, id="float16"), pytest.param(ov.Type.bf16, id="bfloat16")]


def half_model(dtype: Any) -> ov.Model:
    if dtype is np.float16:
        return small_model(np.float16)
    weight = ov.op.Constant(ov.Type.bf16, ov.Shape([6, 5]), [0.1 * i for i in range(30)])
    x = named(opset13.parameter([-1, *SHAPE[1:]], ov.Type.bf16), "x")
    product = named(opset13.matmul(x, named(weight, "v"), False, False), "product")
    return ov.Model([product], [x])


@pytest.mark.parametrize("dtype", half_models())
def test_half_precision_is_run_in_float32_with_the_values_stored(dtype: Any, x: Any) -> None:
    model = OpenVINOModel(half_model(dtype))
    value = np.random.default_rng(5).normal(size=(6, 5))
    stored = model.set_constant("v:0", value)
    wanted = np.dtype(np.float16 if dtype is np.float16 else ml_dtypes.bfloat16)
    assert stored.dtype == model.graph.value("v:0").dtype == wanted
    np.testing.assert_array_equal(stored, value.astype(wanted))
    np.testing.assert_array_equal(model.graph.value("v:0"), stored)
    source = "relu:0" if dtype is np.float16 else "x:0"
    part = model.extract(["product:0"], [source])
    assert isinstance(part.model, ov.Model)
    assert part.model.input(0).get_element_type() == ov.Type.f32
    x = np.concatenate([x, x[:, :1]], axis=1) if source == "relu:0" else x
    np.testing.assert_allclose(run(part, x)[0], x @ stored.astype(np.float32), rtol=1e-5, atol=1e-5)
    bias = model.add_bias("product", np.full(5, 1 / 3))
    third = float(np.full(1, 1 / 3).astype(wanted)[0])
    part = model.copy().extract(["product:0"], [source])
    np.testing.assert_allclose(run(part, x)[0], x @ stored.astype(np.float32) + third, rtol=1e-5, atol=1e-5)
    assert model.graph.tensor(bias).dtype == wanted


def test_every_edit_reaches_the_float32_twin(x: Any) -> None:
    model = OpenVINOModel(small_model(np.float16))
    plain = OpenVINOModel(small_model(np.float32))
    for name in ("w", "v", "gamma", "beta", "mean", "variance"):
        plain.set_constant(f"{name}:0", model.graph.value(f"{name}:0"))
    for each in (model, plain):
        each.replace_operand("norm", 4, np.full(4, 0.25), detail="")
        each.add_bias("conv", np.full(4, 0.5))
        each.bypass("relu", kind="fold_constant", detail="")
    assert [port.get_element_type() for port in model.native.outputs] == [ov.Type.f16] * 2
    for ours, theirs in zip(run(model.extract(), x), run(plain.extract(), x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_order_in_memory_does_not_matter() -> None:
    model = OpenVINOModel(small_model(np.float16))
    value = np.asfortranarray(np.arange(30).reshape(6, 5).astype(np.float16))
    model.set_constant("v:0", value)
    np.testing.assert_array_equal(model.graph.value("v:0"), value)


def test_float16_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="is not finite in float16"):
        OpenVINOModel(small_model(np.float16)).set_constant("v:0", np.full((6, 5), 7e4))


def test_float16_weights_alone_need_no_twin(x: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.xml"
    ov.save_model(small_model(), path, compress_to_fp16=True)
    model = load_ir(path)
    (node,) = [n for n in model.graph if n.op == "MatMul"]
    convert = model.graph.producer(node.inputs[1])
    assert convert is not None
    assert (convert.op, convert.attrs["dtype"]) == ("Convert", np.float32)
    stored = model.set_constant(convert.inputs[0], np.full((6, 5), 1 / 3))
    assert stored.dtype == np.float16
    model.save(tmp_path, "out")
    again = load_ir(tmp_path / "out.xml")
    np.testing.assert_array_equal(again.graph.value(convert.inputs[0]), stored)
    np.testing.assert_allclose(run(again.extract(), x)[1], run(model.extract(), x)[1])


def differing(one: bytes, two: bytes) -> set[int]:
    return {i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b}


def test_an_ir_is_patched(tmp_path: Path, x: Any) -> None:
    source = saved(small_model(), tmp_path)
    model = load_ir(source)
    assert model.source == source
    value = model.graph.value("w:0") * 2
    model.set_constant("w:0", value)
    written = model.save(tmp_path, "out")
    assert written == [tmp_path / "out.xml", tmp_path / "out.bin"]
    assert model.notes == []
    assert written[0].read_bytes() == source.read_bytes()
    (place,) = [c for c in read_ir(source).constants if c.name == "w"]
    changed = differing(written[1].read_bytes(), source.with_suffix(".bin").read_bytes())
    assert changed
    assert changed <= set(range(place.offset, place.offset + place.size))
    np.testing.assert_allclose(run(load_ir(written[0]).native, x)[0], run(model.native, x)[0])


def test_an_unedited_ir_is_copied_and_may_replace_itself(tmp_path: Path) -> None:
    source = saved(small_model(), tmp_path)
    before = source.read_bytes(), source.with_suffix(".bin").read_bytes()
    model = load_ir(source)
    model.copy().save(tmp_path, "source")
    assert (source.read_bytes(), source.with_suffix(".bin").read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.bin", "source.xml"]


def sharing_model(tmp_path: Path) -> Path:
    """Two products whose equal weights lie at the same place of the .bin."""
    x = named(opset13.parameter([2, 6], np.float32), "x")
    weights = [named(opset13.constant(np.ones((6, 6), np.float32)), f"w{i}") for i in range(2)]
    first = named(opset13.matmul(x, weights[0], False, False), "first")
    second = named(opset13.matmul(first, weights[1], False, False), "second")
    path = saved(ov.Model([first, second], [x]), tmp_path)
    assert len({c.offset for c in read_ir(path).constants}) == 1
    return path


def test_constants_that_share_bytes_are_split(tmp_path: Path) -> None:
    source = sharing_model(tmp_path)
    model = load_ir(source)
    model.set_constant("w1:0", np.full((6, 6), 3.0))
    model.save(tmp_path, "out")
    again = load_ir(tmp_path / "out.xml")
    np.testing.assert_array_equal(again.graph.value("w0:0"), 1)
    np.testing.assert_array_equal(again.graph.value("w1:0"), 3)
    assert model.notes == []
    ours, theirs = (tmp_path / "out.xml").read_bytes(), source.read_bytes()
    assert ours.replace(b'offset="192"', b'offset="0"') == theirs


def test_constants_that_share_bytes_and_agree_stay_together(tmp_path: Path) -> None:
    source = sharing_model(tmp_path)
    model = load_ir(source)
    for tensor in ("w0:0", "w1:0"):
        model.set_constant(tensor, np.full((6, 6), 3.0))
    model.save(tmp_path, "out")
    assert (tmp_path / "out.xml").read_bytes() == source.read_bytes()
    assert (tmp_path / "out.bin").stat().st_size == source.with_suffix(".bin").stat().st_size


def test_an_ir_that_cannot_be_patched_is_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, x: Any
) -> None:
    source = saved(small_model(), tmp_path)
    model = load_ir(source)
    model.set_constant("w:0", np.ones((4, 3, 3, 3)))
    source.with_suffix(".bin").write_bytes(bytes(source.with_suffix(".bin").stat().st_size + 1))
    with caplog.at_level(logging.WARNING):
        model.save(tmp_path, "out")
    assert "written anew instead of patched" in caplog.text
    assert len(model.notes) == 1
    np.testing.assert_allclose(run(load_ir(tmp_path / "out.xml").native, x)[1], run(model.native, x)[1])


def test_saving_edited_models_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = saved(small_model(np.float16), tmp_path)
    written = []
    for name in ("one", "two"):
        model = load_ir(source)
        model.add_bias("conv", np.ones(4))
        written.append([file.read_bytes() for file in model.save(tmp_path, name)])
    assert written[0] == written[1]
    again = load_ir(tmp_path / "one.xml")
    assert {again.graph.tensor(f"{n}:0").dtype for n in ("w", "conv.bias", "product")} == {
        np.dtype(np.float16)
    }


@pytest.mark.parametrize(("name", "bad"), [("w", np.nan), ("v", np.inf), ("variance", np.nan)])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, bad: float) -> None:
    model = small_model()
    (node,) = [n for n in model.get_ops() if n.get_friendly_name() == name]
    value = np.array(node.data)
    value.flat[1] = bad
    replacement = named(opset13.constant(value), name)
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(replacement.output(0))
    with pytest.raises(ModelError, match=rf"'{name}:0'.* 1 NaN or infinite"):
        load_model(saved(model, tmp_path))
    with pytest.raises(ModelError, match=rf"'{name}:0'.* 1 NaN or infinite"):
        load_model(model)


def detection(zoo: Path, name: str) -> OpenVINOModel:
    return load_ir(zoo / "detection" / "models" / f"{name}.xml")


def convolutions(model: OpenVINOModel) -> list[Node]:
    return [node for node in model.graph if node.op == "Convolution"]


@pytest.mark.zoo
def test_float16_detector(zoo: Path, tmp_path: Path) -> None:
    half, full = detection(zoo, "person-detection-0200"), detection(zoo, "person-detection-0200-fp32")
    assert half.batch_size == 1
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, 256, 256)).astype(np.float32)
    layers = convolutions(half)
    assert len(layers) == 60
    taps = [layers[0].output, layers[30].output, layers[-1].output]
    ours, theirs = run(half.extract(taps), image), run(full.extract(taps), image)
    native = [np.array(v, np.float64) for v in run(native_taps(half, taps), image)]
    for twin, reference, stored in zip(ours, theirs, native, strict=True):
        np.testing.assert_allclose(twin, reference, rtol=1e-5, atol=1e-5)
        assert np.linalg.norm(twin - stored) < 2e-3 * np.linalg.norm(stored)
    weight = layers[10].inputs[1]
    zeros = half.set_constant(weight, np.zeros(half.graph.value(weight).shape))
    assert zeros.dtype == np.float16
    written = half.save(tmp_path, "out")
    source = zoo / "detection" / "models" / "person-detection-0200.xml"
    assert written[0].read_bytes() == source.read_bytes()
    before, after = source.with_suffix(".bin").read_bytes(), written[1].read_bytes()
    assert 0 < len(differing(before, after)) <= zeros.nbytes
    assert not half.notes
    np.testing.assert_array_equal(load_ir(written[0]).graph.value(weight), zeros)


def native_taps(model: OpenVINOModel, tensors: list[str]) -> ov.Model:
    clone = model.native.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ordered_ops()}
    return ov.Model([nodes[tensor[:-2]].output(0) for tensor in tensors], clone.get_parameters(), "taps")
