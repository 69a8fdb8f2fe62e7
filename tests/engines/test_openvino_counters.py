"""Counters: every operator's seconds under the names of the model's own operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.engines.openvino_counters import CountedModel
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Runnable
from tests.pipeline.nets import conv_net, images, plain_net, to_ir


@pytest.mark.parametrize("kind", ["onnx", "ir"])
def test_operators_go_by_their_own_names(kind: str, tmp_path: Path) -> None:
    model = load_model(conv_net() if kind == "onnx" else to_ir(conv_net(), tmp_path / "m.xml"))
    counted = CountedModel(model.extract(), threads=1)
    for runs in (2, 5):
        seconds = counted.run({model.graph.inputs[0]: images(1).astype(np.float64)}, runs)
        names = {name for group in seconds for name in group}
        assert {"conv1", "relu1", "depthwise", "y"} <= names
        assert all(value >= 0.0 for value in seconds.values())


class Request:
    """Stands in for OpenVINO's: counters hold the mean over all inferences so far."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self._seconds = seconds
        self._spent: list[float] = []

    def infer(self, arrays: Sequence[AnyArray]) -> None:
        self._spent.append(next(self._seconds))

    @property
    def profiling_info(self) -> list[SimpleNamespace]:
        mean = timedelta(seconds=sum(self._spent) / len(self._spent))
        return [SimpleNamespace(node_name=name, real_time=mean) for name in ("y", "reorder")]


def test_means_are_over_the_last_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(plain_net())
    counted = CountedModel(model.extract(), threads=1)
    monkeypatch.setattr(counted, "_request", Request(iter([0.9, 0.1, 0.2, 0.3, 0.4, 0.5])))
    feeds = {model.graph.inputs[0]: images(1)}
    found = [counted.run(feeds, runs) for runs in (1, 2, 3)]
    of_y = [value for seconds in found for group, value in seconds.items() if "y" in group]
    assert of_y == pytest.approx([0.9, 0.15, 0.4], abs=1e-5)
    assert [seconds[()] for seconds in found] == pytest.approx([0.9, 0.15, 0.4], abs=1e-5)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="OpenVINO cannot run the model"):
        CountedModel(Runnable(b"nothing", ("x",), ("y",)), 1)
