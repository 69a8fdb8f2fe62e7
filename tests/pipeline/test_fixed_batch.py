"""Models whose batch is fixed, on few samples: layers with few samples are judged all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pot_sparsity.data.holdout import filled, split_holdout
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.load import load_model
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.prepare import prepare
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.solve import read_dense, scarce
from pot_sparsity.recipe import validate_recipe
from pot_sparsity.report.schema import Report
from tests.pipeline.nets import QUICK, conv_net, dataset, images, to_ir

BATCH = 16


def run(model: Any, samples: int = 40, **sections: Any) -> Report:
    recipe = validate_recipe({**QUICK, **sections})
    return optimize(model, images(samples), recipe=recipe, baseline_int8=False, measure_latency=False).report


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("method", ["output_distortion", "lamp"])
def test_fewer_held_out_samples_than_a_batch(form: str, method: str, tmp_path: Path) -> None:
    net = conv_net(BATCH)
    model = net if form == "onnx" else to_ir(net, tmp_path / "net.xml")
    report = run(model, allocation={"method": method}, sparsity=0.7)
    assert report.sparsity_reached == pytest.approx(0.7, abs=0.01)
    assert ("curves" in [stage.name for stage in report.stages]) == (method == "output_distortion")


def test_its_layers_are_scarce_and_choose_their_shrinkage_on_held_out_samples() -> None:
    """The premise of the test above, and that moments of too few samples are still refused."""
    settings = validate_recipe(QUICK)
    engine = get_engine("openvino", 2)
    original = load_model(conv_net(BATCH))
    samples = dataset(original, images(40))
    fit, held_out = split_holdout(samples)
    ready = prepare(original, settings, engine, samples, ignored_scope=None, keep_structure=False)
    named: dict[str, Any] = {
        "batch_size": 64,
        "threads": 1,
        "max_positions": None,
        "progress": Silent(),
    }
    moments = collect_moments(ready.model, ready.layers, engine, fit, **named)
    assert any(scarce(item, moments[item.layer.name]) for item in read_dense(ready.model, ready.layers))
    assert len(held_out) < BATCH
    with pytest.raises(ModelError, match="saw no calibration sample"):
        collect_moments(ready.model, ready.layers, engine, held_out, **named)
    found = collect_moments(ready.model, ready.layers, engine, filled(held_out, BATCH), **named)
    free = load_model(conv_net())
    free_ready = prepare(
        free, settings, engine, dataset(free, images(40)), ignored_scope=None, keep_structure=False
    )
    # Four samples fill a batch of 16 four times each: their moments are those of a model that takes any number.
    expected = collect_moments(
        free_ready.model, free_ready.layers, engine, split_holdout(dataset(free, images(40)))[1], **named
    )
    for name, one in expected.items():
        np.testing.assert_allclose(found[name].mean, one.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[name].second, one.second, rtol=1e-4, atol=1e-5)


def test_as_many_held_out_samples_as_a_batch() -> None:
    assert run(conv_net(4), sparsity=0.8).sparsity_reached == pytest.approx(0.8, abs=0.01)


def test_filling() -> None:
    samples = dataset(load_model(conv_net()), images(5))
    assert filled(samples, 4) is samples
    assert filled(samples, 5) is samples
    (batch,) = filled(samples, 12).batches(12)
    order = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    np.testing.assert_array_equal(batch.inputs["x"], images(5)[order])
