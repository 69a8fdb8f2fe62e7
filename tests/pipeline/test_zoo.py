"""The main job on real networks: quick looks, and (slow) the accuracy that is promised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from pot_sparsity.data import load_dataset, load_preprocess
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.recipe import load_recipe
from pot_sparsity.report.schema import Report

pytestmark = pytest.mark.zoo


def entry(zoo: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((zoo / "zoo.json").read_text(encoding="utf-8"))[name]
    return found


def job(zoo: Path, name: str, sparsity: float, overrides: tuple[str, ...] = (), **named: Any) -> Result:
    """The job of an entry with its own data; labels of pictures come from the CSV's dev split."""
    facts = entry(zoo, name)
    if "labels" in facts:
        named |= {"validation_labels": zoo / facts["labels"], "validation_split": "dev"}
    return optimize(
        zoo / facts["model"],
        zoo / facts["calibration"],
        recipe=load_recipe(None, [f"sparsity={sparsity}", *overrides]),
        preprocess=facts["preprocess"],
        **{"validation": zoo / facts["validation"], "measure_latency": False, **named},
    )


def top1(report: Report) -> Mapping[str, float]:
    return {variant.name: variant.metrics["top1"] for variant in report.variants}


def zeros(source: Path) -> dict[str, int]:
    model = load_model(source)
    return {
        layer.name: int((read_weight(model, layer) == 0).sum()) for layer in find_layers(model.graph).layers
    }


def first(path: Path, target: Path, count: int) -> Path:
    """The first samples of an archive, as an archive."""
    with np.load(path, allow_pickle=False) as archive:
        np.savez(target, **{name: archive[name][:count] for name in archive.files})
    return target


def test_resnet20_loses_little(zoo: Path, tmp_path: Path) -> None:
    name = "resnet20_akamaster_cifar10"
    validation = first(zoo / entry(zoo, name)["validation"], tmp_path / "validation.npz", 500)
    report = job(
        zoo,
        name,
        0.5,
        ("calibration.samples=128", "quantization.samples=64", "quantization.ranges=minmax"),
        validation=validation,
        baseline_int8=False,
        output=tmp_path / "out",
    ).report
    found = top1(report)
    assert found["sparse"] >= found["dense"] - 2.0
    assert found["sparse_int8"] >= found["dense"] - 2.0
    sparse = zeros(tmp_path / "out" / "float" / "model.onnx")
    assert sum(sparse.values()) == report.zeros
    assert abs(report.zeros - 0.5 * report.weights) <= 1
    int8 = zeros(tmp_path / "out" / "model.onnx")
    assert all(int8[layer] >= number for layer, number in sparse.items())


def test_a_float16_detector_stays_what_it_is(zoo: Path, tmp_path: Path) -> None:
    name = "person-detection-0200"
    facts = entry(zoo, name)
    source = zoo / facts["model"]
    specs = input_specs(load_model(source))
    samples = load_dataset(zoo / facts["calibration"], specs, load_preprocess(facts["preprocess"]), samples=4)
    few = {specs[0].name: np.concatenate([batch.inputs[specs[0].name] for batch in samples.batches(4)])}
    out = tmp_path / "out"
    overrides = (
        "quantization.enabled=false",
        "reconstruction.input=dense",
        "correction.differential=never",
        "pruning.method=magnitude",
    )
    result = optimize(
        source,
        few,
        recipe=load_recipe(None, ["sparsity=0.5", *overrides]),
        keep_structure=True,
        baseline_int8=False,
        measure_latency=False,
        output=out,
    )
    assert result.report.edits == []
    assert (out / "model.xml").read_bytes() == source.read_bytes()
    assert (out / "model.bin").stat().st_size == source.with_suffix(".bin").stat().st_size
    assert sum(zeros(out / "model.xml").values()) == result.report.zeros >= 0.5 * result.report.weights - 1
    model = ov.Core().read_model(out / "model.xml")
    kinds = {op.get_output_element_type(0) for op in model.get_ops() if op.get_type_name() == "Constant"}
    assert ov.Type.f16 in kinds
    assert ov.Type.f32 not in kinds
    assert result.report.variants[-1].metrics["detection_agreement"] > 20.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sparsity", "least"),
    [
        ("resnet20_akamaster_cifar10", 0.5, 91.5),
        ("resnet20_akamaster_cifar10", 0.7, 90.8),
        ("resnet20_akamaster_cifar10", 0.8, 87.5),
        ("resnet56_akamaster_cifar10", 0.6, 92.9),
    ],
)
def test_cifar_accuracy(zoo: Path, name: str, sparsity: float, least: float) -> None:
    report = job(zoo, name, sparsity, baseline_int8=False).report
    found = top1(report)
    assert found["dense"] == pytest.approx(entry(zoo, name)["dense"], abs=0.01)
    assert abs(report.zeros - sparsity * report.weights) <= 1
    assert found["sparse_int8"] >= least


def dense_int8(zoo: Path, name: str, preset: str) -> float:
    """Top-1 of the dense model in INT8 as NNCF makes it with a preset and all its other settings untouched."""
    quantization = (
        f"quantization.preset={preset}",
        "quantization.ranges=default",
        "quantization.bias_correction=fast",
    )
    nothing_else = (
        "pruning.method=magnitude",
        "reconstruction.input=dense",
        "correction.bias=false",
        "correction.differential=never",
    )
    return top1(job(zoo, name, 0.0, (*quantization, *nothing_else)).report)["dense_int8"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v1_025", "squeezenet1_1", "mobilenet_v2_100_dequant"])
def test_imagenet_accuracy(zoo: Path, name: str) -> None:
    """At 40 % and INT8: at most 2.5 points lost, 1 against the better of NNCF's presets on the dense model."""
    report = job(zoo, name, 0.4, baseline_int8=False).report
    found = top1(report)
    dense = entry(zoo, name)["dense"]
    assert found["dense"] == pytest.approx(dense, abs=0.01)
    best = max(dense_int8(zoo, name, preset) for preset in ("mixed", "performance"))
    assert found["sparse_int8"] >= best - 1.0
    assert found["sparse_int8"] >= dense - 2.5
    variant = report.variants[-1]
    assert variant.metrics["agreement"] > 80.0
    difference, low, high = variant.interval["top1"]
    assert low <= difference <= high


@pytest.mark.slow
def test_a_float16_detector_end_to_end(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = job(zoo, "person-detection-0200", 0.5, validation=None, output=out).report
    assert report.status == "done"
    assert abs(report.zeros - 0.5 * report.weights) <= 1
    assert sum(zeros(out / "float" / "model.xml").values()) >= report.zeros
    assert (out / "model.xml").is_file()
    assert "detection_agreement" in report.variants[-1].metrics
