"""Where distillation ends early or not at all: interrupts, divergence, and models that not every step suits."""

from __future__ import annotations

import signal
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.loading import load_dataset
from pot_sparsity.engines import get_engine
from pot_sparsity.engines.jax_engine import NotDifferentiable
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.repair import distillation
from pot_sparsity.pipeline.repair.distillation import Plan, distilled, interruptible, plan
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.recipe import validate_recipe
from tests.pipeline.nets import QUICK, images, node, normal, plain_net, proto, shared_net
from tests.pipeline.repair.test_distillation import WHAT, Pruned, plenty

# interrupts


@pytest.fixture
def handler() -> Any:
    """The handler that is there before, which must be so afterwards."""

    def own(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the handler from before has been called")

    before = signal.signal(signal.SIGINT, own)
    yield own
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_until_it_is_asked_for(handler: Any) -> None:
    reached = []

    def work() -> None:
        with interruptible() as check:
            check()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("behind the interrupt")
            check()
            reached.append("behind the check")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["behind the interrupt"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_that_nobody_asks_for_comes_at_the_end(handler: Any) -> None:
    reached = []

    def work() -> None:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            reached.append("end of the block")
        reached.append("behind the block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["end of the block"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_handler_comes_back_without_an_interrupt_and_behind_errors(handler: Any) -> None:
    with interruptible() as check:
        assert signal.getsignal(signal.SIGINT) is not handler
        check()
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(ValueError, match="of the block"), interruptible():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_counts_more_than_an_error_behind_it(handler: Any) -> None:
    def block() -> None:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_leave_interrupts_alone(handler: Any) -> None:
    seen: list[object] = []

    def work() -> None:
        with interruptible() as check:
            seen.append(signal.getsignal(signal.SIGINT))
            check()
        seen.append("end")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler, "end"]
    assert signal.getsignal(signal.SIGINT) is handler


class Interrupting(Silent):
    """Interrupts the process after the third step."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def advance(self, units: int = 1) -> None:
        self.events.append("step")
        if len(self.events) == 3:
            signal.raise_signal(signal.SIGINT)
            self.events.append("behind the interrupt")

    def finish(self) -> None:
        self.events.append("finish")


def test_training_ends_behind_the_step_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pruned, progress = Pruned.of(shared_net(), 0.5), Interrupting()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pruned.trained(normal(1, 32, 7), Plan(5, 8), progress=progress)
    assert progress.events == ["step"] * 3 + ["behind the interrupt", "finish"]
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


# divergence


class Counting(Silent):
    """Counts the steps."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, units: int = 1) -> None:
        self.steps += units


def test_training_that_diverges_ends_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "LOOK", 4)
    pruned, progress = Pruned.of(plain_net(), 0.5), Counting()
    with pytest.raises(ModelError, match=r"training has diverged: a smaller step is needed \(finish\.rate\)"):
        pruned.trained(images(24), Plan(20, 8), rate=1e30, progress=progress)
    assert progress.steps == 3


# models and their batches


def rigid() -> onnx.ModelProto:
    """Says that it takes any batch, and takes one sample only."""
    constants: dict[str, AnyArray] = {
        "w": normal(1, 6, 8, scale=0.5),
        "shape": np.array([1, 8], np.int64),
        "v": normal(2, 8, 5, scale=0.5),
    }
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Reshape", ["a", "shape"], "flat"),
        node("Relu", ["flat"], "r"),
        node("MatMul", ["r", "v"], "y"),
    ]
    return proto(nodes, constants, ["n", 6])


def test_a_step_takes_no_more_samples_than_it_may() -> None:
    pruned = Pruned.of(rigid(), 0.6)
    assert pruned.dense_model.batch_size is None
    assert plan(pruned.dense_model, pruned.dense, 32, 20, 1e12) == Plan(20, 64)
    assert plan(pruned.dense_model, pruned.dense, 32, 20, 1e12, asked=1) == Plan(20, 1)
    samples = normal(3, 32, 6)
    with pytest.raises(NotDifferentiable, match="does not take batches of 8"):
        pruned.trained(samples, Plan(1, 8))
    found = pruned.trained(samples, Plan(2, 1))
    for name, solution in found.items():
        assert not np.array_equal(solution.weight, pruned.solutions[name].weight)


def test_models_that_take_single_samples_are_distilled_in_a_run() -> None:
    recipe = validate_recipe(
        {
            "sparsity": 0.6,
            **QUICK,
            "allocation": {"method": "magnitude"},
            "correction": {"differential": "never"},
            "calibration": {"batch_size": 1},
            "finish": {"distill_from": 0.0, "activations": "never", "distillation": "always", "epochs": 3},
        }
    )
    found = optimize(rigid(), normal(3, 60, 6), recipe=recipe, baseline_int8=False, measure_latency=False)
    assert not [text for text in found.report.warnings if "not distilled" in text]
    (decision,) = (decision for decision in found.report.decisions if decision.what == WHAT)
    assert decision.kept


def test_an_input_of_one_row_does_not_grow_with_the_batch() -> None:
    constants = {"w": normal(1, 6, 5), "v": normal(2, 4, 5), "u": normal(3, 5, 3)}
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("MatMul", ["z", "v"], "b"),
        node("Add", ["a", "b"], "sum"),
        node("Relu", ["sum"], "r"),
        node("MatMul", ["r", "u"], "y"),
    ]
    net = proto(nodes, constants, ["n", 6])
    net.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4]))
    pruned = Pruned.of(net, 0.5)
    assert pruned.dense_model.batch_size is None
    specs = input_specs(OnnxModel(net))
    fit = load_dataset({"x": normal(4, 16, 6), "z": normal(5, 16, 4)}, specs)
    model = pruned.written(pruned.solutions)
    with pytest.raises(NotDifferentiable, match="its inputs do not all take batches of 8"):
        distilled(
            pruned.dense_model,
            model,
            pruned.solutions,
            distillation.trainable(pruned.dense, model, pruned.solutions, plenty(pruned.dense)),
            fit,
            get_engine("openvino"),
            Plan(1, 8),
            rate=0.01,
            vary=False,
            seed=0,
            threads=1,
            progress=Silent(),
        )


def test_a_budget_without_end_pays_for_all_epochs() -> None:
    pruned = Pruned.of(shared_net(), 0.0)
    assert plan(pruned.dense_model, pruned.dense, 10, 30, np.inf) == Plan(30, 64)


@pytest.mark.parametrize("kind", ["ArgMax", "TopK"])
def test_outputs_of_whole_numbers_are_left_out(kind: str) -> None:
    """They have no derivative, and the result is that of the model without them."""
    constants: dict[str, AnyArray] = {"w": normal(1, 6, 5), "v": normal(2, 5, 4), "k": np.array([2])}
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Relu", ["a"], "r"),
        node("MatMul", ["r", "v"], "y"),
    ]
    with_index = [
        *nodes,
        node("ArgMax", ["y"], "best", axis=1)
        if kind == "ArgMax"
        else helper.make_node("TopK", ["y", "k"], ["values", "best"], name="best"),
    ]
    net = proto(with_index, constants, ["n", 6])
    net.graph.output.insert(0, helper.make_tensor_value_info("best", TensorProto.INT64, None))
    samples = normal(3, 32, 6)
    pruned = Pruned.of(onnx.shape_inference.infer_shapes(net), 0.5)
    assert [info.name for info in pruned.dense_model.outputs] == ["best", "y"]
    found = pruned.trained(samples, Plan(3, 8))
    plain = Pruned.of(proto(nodes, constants, ["n", 6]), 0.5).trained(samples, Plan(3, 8))
    for name, solution in found.items():
        assert not np.array_equal(solution.weight, pruned.solutions[name].weight)
        np.testing.assert_allclose(solution.weight, plain[name].weight, rtol=1e-5, atol=1e-7)
