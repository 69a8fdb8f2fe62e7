"""Cuts and taps of ONNX models give exactly what the whole model computes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.engines import get_engine
from pot_sparsity.engines.base import Engine
from pot_sparsity.graph import onnx_files
from pot_sparsity.graph.onnx_model import OnnxModel

RNG = np.random.default_rng(11)


@pytest.fixture(params=["openvino", "onnxruntime"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return get_engine(str(request.param), threads=1)


def _random(*shape: int) -> Float32:
    return RNG.standard_normal(shape).astype(np.float32)


def _model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: Sequence[str],
    constants: dict[str, AnyArray],
    kind: int = TensorProto.FLOAT,
    **options: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    options = {"ir_version": 8, "opset_imports": [helper.make_opsetid("", 17)], **options}
    return helper.make_model(graph, **options)


def _close(found: AnyArray, expected: AnyArray, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance
    )


def _residual(dtype: Any = np.float32, batch: int | str = "n") -> onnx.ModelProto:
    """Two inputs, a residual, a Split, and a Constant node; every intermediate has a name."""
    bias = numpy_helper.from_array(np.full((4, 1, 1), 0.5, dtype))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Constant", [], ["k"], name="k", value=bias),
        helper.make_node("Add", ["c", "k"], ["a"], name="add"),
        helper.make_node("Split", ["a", "sizes"], ["s1", "s2"], name="split", axis=1),
        helper.make_node("Mul", ["s1", "s2"], ["m"], name="mul"),
        helper.make_node("Sub", ["m", "other"], ["y"], name="sub"),
        helper.make_node("Relu", ["other"], ["z"], name="relu"),
    ]
    constants = {"w": _random(4, 3, 3, 3).astype(dtype), "sizes": np.array([2, 2])}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs: dict[str, Sequence[int | str]] = {"x": (batch, 3, 8, 8), "other": (batch, 2, 8, 8)}
    return _model(nodes, inputs, ["y", "z"], constants, kind)


def _reference(proto: onnx.ModelProto, feeds: dict[str, AnyArray]) -> dict[str, AnyArray]:
    """All tensors by onnx's own reference implementation."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    names = [tensor for node in proto.graph.node for tensor in node.output]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = ReferenceEvaluator(copy).run(None, feeds)
    return dict(zip(names, values, strict=True)) | feeds


def test_taps_equal_the_whole_model(engine: Engine) -> None:
    proto = _residual()
    feeds: dict[str, AnyArray] = {"x": _random(2, 3, 8, 8), "other": _random(2, 2, 8, 8)}
    expected = _reference(proto, feeds)
    taps = ("m", "c", "y", "s2", "other", "w", "k", "c")
    runnable = OnnxModel(proto).extract(taps)
    assert runnable.outputs == ("m", "c", "y", "s2", "other", "w", "k")
    assert runnable.inputs == ("x", "other")
    found = engine.compile(runnable).run(feeds)
    expected["w"] = numpy_helper.to_array(proto.graph.initializer[0])
    for name in runnable.outputs:
        _close(found[name], expected[name])


def test_cuts_compose_to_the_whole_model(engine: Engine) -> None:
    proto = _residual()
    model = OnnxModel(proto)
    feeds: dict[str, AnyArray] = {"x": _random(3, 3, 8, 8), "other": _random(3, 2, 8, 8)}
    expected = _reference(proto, feeds)
    head = model.extract(["s1", "s2"])
    assert head.inputs == ("x",)
    middle = engine.compile(head).run(feeds)
    tail = model.extract(["y", "s1"], inputs=["s1", "other", "s2", "x"])
    assert tail.inputs == ("s1", "other", "s2")
    found = engine.compile(tail).run(middle | feeds)
    _close(found["y"], expected["y"])
    np.testing.assert_array_equal(found["s1"], middle["s1"])


def test_cut_through_one_of_two_outputs(engine: Engine) -> None:
    proto = _residual()
    feeds: dict[str, AnyArray] = {"x": _random(2, 3, 8, 8), "s1": np.ones((2, 2, 8, 8), np.float32)}
    runnable = OnnxModel(proto).extract(["m"], inputs=["x", "s1"])
    found = engine.compile(runnable).run(feeds)["m"]
    expected = _reference(proto, {"x": feeds["x"], "other": _random(2, 2, 8, 8)})["s2"]
    _close(found, expected)


def test_extract_refuses_what_it_cannot_cut() -> None:
    nodes = [
        helper.make_node("Strange", ["x"], ["a"], domain="custom"),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)]
    unknown = OnnxModel(_model(nodes, {"x": (1, 3)}, ["y"], {}, opset_imports=imports))
    with pytest.raises(ValueError, match="'a' cannot be an input: its element type is not known"):
        unknown.extract(["y"], inputs=["a"])
    model = OnnxModel(_residual())
    with pytest.raises(ValueError, match="no tensor called 'nothing'"):
        model.extract(["nothing"])
    with pytest.raises(ValueError, match="no tensor called 'nothing'"):
        model.extract(["y"], inputs=["nothing"])
    with pytest.raises(ValueError, match="'w' is a constant"):
        model.extract(["y"], inputs=["w"])
    with pytest.raises(ValueError, match="depends on the model's input 'other', which is not among"):
        model.extract(["y"], inputs=["x"])


def test_cut_leaves_out_what_it_does_not_need() -> None:
    runnable = OnnxModel(_residual()).extract(["z"])
    assert runnable.inputs == ("other",)
    assert isinstance(runnable.model, bytes)
    graph = onnx.ModelProto.FromString(runnable.model).graph
    assert [node.op_type for node in graph.node] == ["Relu"]
    assert not graph.initializer


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_runs_in_float32(engine: Engine, dtype: Any) -> None:
    proto = _residual(dtype)
    model = OnnxModel(proto)
    before = proto.SerializeToString(deterministic=True)
    feeds: dict[str, AnyArray] = {"x": _random(2, 3, 8, 8), "other": _random(2, 2, 8, 8)}
    found = engine.compile(model.extract(["y", "c", "w", "k"])).run(feeds)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    wide = onnx.ModelProto.FromString(before)
    for tensor in (wide.graph.initializer[0], wide.graph.node[1].attribute[0].t):
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        )
    expected = _reference(wide, feeds)
    _close(found["c"], expected["c"])
    _close(found["y"], expected["y"])
    assert proto.SerializeToString(deterministic=True) == before


def test_type_attributes_become_float32(engine: Engine) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Shape", ["h"], ["shape"]),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float16))
        ),
        helper.make_node("Add", ["h", "ones"], ["sum"]),
        helper.make_node("If", ["yes"], ["b"], then_branch=_half_branch(), else_branch=_half_branch()),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    model = OnnxModel(_model(nodes, {"x": (2, 3)}, ["y"], {"yes": np.array(True)}))
    x = np.array([[1e-4, 2.00001, 3.0], [0, 0, 70000]], np.float32)
    found = engine.compile(model.extract()).run({"x": x})["y"]
    _close(found, x + 2, 1e-6)


def _half_branch() -> onnx.GraphProto:
    nodes = [
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array(1, np.float16))),
        helper.make_node("Add", ["sum", "one"], ["out"]),
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT16, None)
    return helper.make_graph(nodes, "branch", [], [output])


def test_fixed_batch_stays_in_cuts(engine: Engine) -> None:
    proto = _residual(batch=2)
    model = OnnxModel(proto)
    assert model.batch_size == 2
    feeds: dict[str, AnyArray] = {"x": _random(5, 3, 8, 8), "other": _random(5, 2, 8, 8)}
    first = engine.compile(model.extract(["s1", "s2"])).run(feeds)
    found = engine.compile(model.extract(["y"], inputs=["s1", "s2", "other"])).run(first | feeds)
    expected = OnnxModel(_residual(batch="n"))
    expected.set_constant("w", model.graph.value("w"))
    _close(found["y"], engine.compile(expected.extract(["y"])).run(feeds)["y"])


def test_large_cuts_go_through_a_file(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(onnx_files, "PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr(onnx_files, "EXTERNAL_THRESHOLD", 16)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = _random(20, 20)
    runnable = OnnxModel(_model(nodes, {"x": ("n", 20)}, ["y"], {"w": weight})).extract()
    path = runnable.model
    assert isinstance(path, Path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["part.onnx", "part.onnx.data"]
    executable = engine.compile(runnable)
    x = _random(3, 20)
    _close(executable.run({"x": x})["y"], x @ weight, 1e-4)
    del runnable
    gc.collect()
    assert not path.parent.exists()
    _close(executable.run({"x": x})["y"], x @ weight, 1e-4)
