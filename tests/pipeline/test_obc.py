"""The recipe of Optimal Brain Compression: what it says, and that it does so in every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.allocation.probes import level_sparsities
from pot_sparsity.recipe import Recipe, load_recipe
from tests.pipeline.nets import conv_net, images, plain_net, to_ir
from tests.pipeline.norm_nets import FORMS, norm_net, tokens

#: Less of everything; the shipped recipe measures 35 levels.
LESS = ["allocation.levels=4", "calibration.samples=40", "quantization.samples=8"]


def less(*overrides: str) -> Recipe:
    return load_recipe("obc", [*LESS, *overrides])


def test_is_as_published() -> None:
    recipe = load_recipe("obc")
    assert recipe.pruning.method == "exact_obs"
    assert (recipe.reconstruction.input, recipe.reconstruction.masks) == ("dense", "kept")
    assert recipe.calibration.samples == 1024
    allocation = recipe.allocation
    assert (allocation.method, allocation.distance, allocation.aggregate) == (
        "output_distortion",
        "kl",
        "mean",
    )
    assert allocation.solver == "dynamic_program"
    densities = 1.0 - level_sparsities(allocation.levels)
    np.testing.assert_allclose(densities[1:] / densities[:-1], 0.9, atol=0.002)
    correction = recipe.correction
    assert (correction.weights, correction.bias) == ("none", False)
    assert (correction.batch_norm, correction.batch_norm_when) == ("reestimate", "always")
    assert (correction.differential, correction.normalization) == ("always", "always")
    assert {recipe.finish.activations, recipe.finish.rescaling, recipe.finish.distillation} == {"never"}
    assert (recipe.quantization.preset, recipe.quantization.weights) == ("mixed", "obq")


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_runs_and_quantizes(form: str, tmp_path: Path) -> None:
    model = conv_net() if form == "onnx" else to_ir(conv_net(), tmp_path / "net.xml")
    report = optimize(
        model,
        images(48),
        recipe=less("sparsity=0.6"),
        output=tmp_path / "out",
        baseline_int8=False,
        measure_latency=False,
    ).report
    assert report.sparsity_reached == pytest.approx(0.6, abs=0.01)
    found = {decision.what: decision.kept for decision in report.decisions}
    statistics = [what for what in found if what.startswith("differential correction")]
    assert len(statistics) == 1
    assert found[statistics[0]]
    assert ("re-estimated batch normalization" in statistics[0]) == (form == "onnx")
    assert not any("reconstruction" in what or "refit" in what for what in found)
    suffix = "onnx" if form == "onnx" else "xml"
    assert (tmp_path / "out" / f"model.{suffix}").is_file()
    float_model = load_model(tmp_path / "out" / "float" / f"model.{suffix}")
    zeros = sum(
        int((read_weight(float_model, layer) == 0.0).sum()) for layer in find_layers(float_model.graph).layers
    )
    assert zeros == sum(layer.zeros for layer in report.layers)


def test_layer_norms_are_corrected() -> None:
    report = optimize(
        norm_net(FORMS["operator"]),
        tokens(48),
        recipe=less("sparsity=0.5", "quantization.enabled=false"),
        baseline_int8=False,
        measure_latency=False,
    ).report
    (decision,) = [item for item in report.decisions if "normalization correction" in item.what]
    assert decision.kept


def test_one_pattern_for_all_layers() -> None:
    report = optimize(
        plain_net(),
        images(48),
        recipe=less("pruning.pattern=2:4", "quantization.enabled=false"),
        baseline_int8=False,
        measure_latency=False,
    ).report
    assert "curves" not in [stage.name for stage in report.stages]
    assert not any("fixes the sparsity" in text for text in report.warnings)
