"""Both engines behave the same; what goes in and out is checked once for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.engines import ENGINES, get_engine
from pot_sparsity.engines.base import Engine
from pot_sparsity.engines.batching import BatchedExecutable
from pot_sparsity.errors import DataError, ModelError, UserError
from pot_sparsity.graph.graph import TensorInfo
from pot_sparsity.graph.model import Runnable

WEIGHT = np.random.default_rng(3).standard_normal((4, 3)).astype(np.float32)


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    return get_engine(str(request.param), threads=2)


def _runnable(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Sequence[str],
    constants: dict[str, AnyArray] | None = None,
) -> Runnable:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return Runnable(proto.SerializeToString(), tuple(inputs), tuple(outputs))


def _linear(batch: int | str = "n") -> Runnable:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("ReduceMax", ["y"], ["top"], keepdims=0),
    ]
    return _runnable(nodes, {"x": (TensorProto.FLOAT, (batch, 4))}, ["y", "top"], {"w": WEIGHT})


def _samples(count: int) -> Float32:
    return np.random.default_rng(count).standard_normal((count, 4)).astype(np.float32)


def _close(found: AnyArray, expected: AnyArray, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance
    )


def test_registry() -> None:
    assert set(ENGINES) == {"openvino", "onnxruntime"}
    assert [get_engine(name).name for name in ENGINES] == list(ENGINES)
    with pytest.raises(UserError, match="engine 'tensorrt' is not known: use openvino or onnxruntime"):
        get_engine("tensorrt")
    with pytest.raises(UserError, match="threads must be at least 1, not 0"):
        get_engine("openvino", threads=0)


@pytest.mark.parametrize("exact", [True, False])
def test_results_belong_to_the_caller(engine: Engine, exact: bool) -> None:
    executable = engine.compile(_linear(), exact=exact)
    assert executable.inputs == ("x",)
    assert executable.outputs == ("y", "top")
    x = _samples(5)
    x.flags.writeable = False
    first = executable.run({"x": x, "unused": x})
    kept = first["y"].copy()
    second = executable.run({"x": -x})
    tolerance = 1e-5 if exact else 3e-2
    _close(first["y"], x @ WEIGHT, tolerance)
    np.testing.assert_array_equal(first["y"], kept)
    _close(second["y"], -(x @ WEIGHT), tolerance)
    first["y"][:] = 0
    assert first["top"].shape == ()


def test_exact_openvino_is_float32() -> None:
    compiled: list[Any] = []

    class Spy(ov.Core):  # type: ignore[misc]
        def compile_model(self, *arguments: Any) -> Any:
            compiled.append(super().compile_model(*arguments))
            return compiled[-1]

    engine = get_engine("openvino", threads=1)
    engine._core = Spy()  # type: ignore[attr-defined]
    engine.compile(_linear())
    assert compiled[0].get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    assert compiled[0].get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled[0].get_property("NUM_STREAMS") == 1


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, np.bool_])
def test_feeds_are_cast_to_float(engine: Engine, dtype: Any) -> None:
    x = np.arange(8).reshape(2, 4).astype(dtype)
    found = engine.compile(_linear()).run({"x": x[:, ::-1]})["y"]
    _close(found, x[:, ::-1].astype(np.float32) @ WEIGHT)


def test_integer_feeds(engine: Engine) -> None:
    nodes = [helper.make_node("Gather", ["table", "i"], ["y"])]
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    executable = engine.compile(_runnable(nodes, {"i": (TensorProto.INT32, ("n",))}, ["y"], {"table": table}))
    for dtype in (np.int64, np.uint8, np.int32):
        np.testing.assert_array_equal(executable.run({"i": np.array([2, 0], dtype)})["y"], table[[2, 0]])
    with pytest.raises(DataError, match="input 'i' expects int32 and got float32"):
        executable.run({"i": np.array([2.0], np.float32)})
    with pytest.raises(DataError, match="expects int32 and got int64 values that do not fit"):
        executable.run({"i": np.array([2**40])})
    with pytest.raises(DataError, match="input 'i' expects int32 and got <U1"):
        executable.run({"i": np.array(["a"])})


def test_wrong_feeds(engine: Engine) -> None:
    executable = engine.compile(_linear())
    with pytest.raises(DataError, match="input 'x' is missing: the model reads x"):
        executable.run({"data": _samples(2)})
    with pytest.raises(DataError, match=r"input 'x' expects shape \[\?,4\] and got \[2,5\]"):
        executable.run({"x": np.zeros((2, 5))})
    with pytest.raises(DataError, match=r"input 'x' expects shape \[\?,4\] and got \[4\]"):
        executable.run({"x": np.zeros(4)})
    fixed = engine.compile(_linear(2))
    with pytest.raises(DataError, match=r"input 'x' expects shape \[2,4\] and got \[0,4\]"):
        fixed.run({"x": np.zeros((0, 4))})


def test_failing_inference_is_a_data_error() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {
        "x": (TensorProto.FLOAT, ("n",)),
        "shape": (TensorProto.INT64, (1,)),
    }
    executable = get_engine("onnxruntime").compile(_runnable(nodes, inputs, ["y"]))
    with pytest.raises(DataError, match=r"the model cannot be run on these data: .*Reshape") as caught:
        executable.run({"x": np.zeros(4), "shape": np.array([3])})
    assert "\n" not in str(caught.value)

    def infer(arrays: Sequence[AnyArray]) -> list[AnyArray]:
        raise RuntimeError(
            "Exception from src/a.cpp:1:\nException from src/b.cpp:2:\nreal cause\n\n" + "x" * 999
        )

    broken = BatchedExecutable((), ("y",), infer)
    with pytest.raises(DataError, match=r"on these data: real cause x+\.\.\.$") as caught:
        broken.run({})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_models_that_do_not_compile(engine: Engine) -> None:
    nodes = [helper.make_node("Nonsense", ["x"], ["y"])]
    for runnable in (
        _runnable(nodes, {"x": (TensorProto.FLOAT, (1,))}, ["y"]),
        Runnable(b"no model", ("x",), ("y",)),
    ):
        with pytest.raises(ModelError, match="cannot run the model: ") as caught:
            engine.compile(runnable)
        assert "\n" not in str(caught.value)
    wrong = _linear()
    with pytest.raises(ModelError, match="sees 1 inputs and 2 outputs where the model has 2 and 2"):
        engine.compile(Runnable(wrong.model, ("x", "other"), wrong.outputs))


def test_openvino_models() -> None:
    parameter = ov.opset13.parameter([-1, 4], np.float32)
    product = ov.opset13.matmul(parameter, ov.opset13.constant(WEIGHT), False, False)
    runnable = Runnable(ov.Model([product], [parameter]), ("in",), ("out",))
    found = get_engine("openvino").compile(runnable).run({"in": _samples(3)})["out"]
    _close(found, _samples(3) @ WEIGHT)
    with pytest.raises(UserError, match="--engine onnxruntime runs ONNX models only: use --engine openvino"):
        get_engine("onnxruntime").compile(runnable)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_fixed_batches_are_split(engine: Engine, count: int) -> None:
    x = _samples(count)
    found = engine.compile(_linear(2)).run({"x": x})
    _close(found["y"], x @ WEIGHT)
    tops = [np.max(x[i : i + 2] @ WEIGHT) for i in range(0, count, 2)]
    _close(found["top"], np.array(tops[0] if count == 2 else tops))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 17), st.integers(1, 3))
def test_splitting_equals_one_large_batch(batch: int, count: int, tokens: int) -> None:
    """Rows follow samples whether an output has one row, or several, for each of them."""

    def infer(arrays: Sequence[AnyArray]) -> list[AnyArray]:
        x = np.asarray(arrays[0], np.float32)
        assert x.shape == (batch, tokens)
        return [x * 2, x.reshape(-1, 1)]

    ports = (TensorInfo("x", (batch, tokens), np.dtype(np.float32)),)
    x = np.arange(count * tokens, dtype=np.float32).reshape(count, tokens)
    found = BatchedExecutable(ports, ("rows", "flat"), infer).run({"x": x})
    np.testing.assert_array_equal(found["rows"], x * 2)
    np.testing.assert_array_equal(found["flat"], x.reshape(-1, 1))


def test_inputs_with_different_fixed_sizes() -> None:
    def infer(arrays: Sequence[AnyArray]) -> list[AnyArray]:
        a, b = (np.asarray(array, np.float32) for array in arrays)
        return [a + b.reshape(2, 3).sum(axis=1)]

    kind = np.dtype(np.float32)
    executable = BatchedExecutable((TensorInfo("a", (2,), kind), TensorInfo("b", (6,), kind)), ("y",), infer)
    a, b = np.arange(4.0), np.arange(12.0)
    np.testing.assert_array_equal(executable.run({"a": a, "b": b})["y"], a + b.reshape(4, 3).sum(axis=1))
    with pytest.raises(DataError, match=r"input 'a' expects shape \[2\] and got \[4\]; the inputs' batches"):
        executable.run({"a": a, "b": b[:6]})
    mixed = BatchedExecutable((TensorInfo("a", (2,), kind), TensorInfo("b", (None,), kind)), ("y",), infer)
    np.testing.assert_array_equal(mixed.run({"a": a[:2], "b": b[:6]})["y"], a[:2] + np.array([3.0, 12.0]))
    with pytest.raises(DataError, match="do not fit together"):
        mixed.run({"a": a, "b": b})


def test_chunks_of_changing_shape() -> None:
    def infer(arrays: Sequence[AnyArray]) -> list[AnyArray]:
        return [np.zeros((1, int(np.asarray(arrays[0], np.float32)[0])))]

    executable = BatchedExecutable((TensorInfo("x", (1,), np.dtype(np.float32)),), ("y",), infer)
    with pytest.raises(
        DataError, match=r"output 'y' .* changes its shape between samples \(\(1, 2\), \(1, 3\)\)"
    ):
        executable.run({"x": np.array([2.0, 3.0])})
