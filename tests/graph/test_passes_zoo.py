"""Passes on real networks: the fused float model agrees with the original on random and on real input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from PIL import Image

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.engines import get_engine
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.passes import add_missing_biases, fold_weight_chains, fuse_batchnorm

RNG = np.random.default_rng(5)


def _ops(model: Model) -> list[str]:
    return [node.op for node in model.graph]


def _random_feeds(model: Model) -> dict[str, AnyArray]:
    feeds: dict[str, AnyArray] = {}
    for info in model.inputs:
        shape = [2 if size is None else size for size in info.shape or ()]
        integers = info.dtype is not None and np.issubdtype(info.dtype, np.integer)
        if integers:
            feeds[info.name] = RNG.integers(0, 50, shape)
        else:
            feeds[info.name] = RNG.normal(size=shape).astype(np.float32)
    return feeds


def _real_feeds(model: Model, folder: Path, entry: dict[str, Any]) -> dict[str, AnyArray]:
    data = folder / entry["calibration"]
    if data.suffix == ".npz":
        with np.load(data, allow_pickle=False) as arrays:
            if "images" not in arrays:
                names = {info.name.removesuffix(":0"): info.name for info in model.inputs}
                return {name: arrays[key][:4] for key, name in names.items()}
            pictures = arrays["images"][:4].astype(np.float32)
    else:
        height, width = model.inputs[0].shape[2:] if model.inputs[0].shape else (None, None)
        files = sorted(path for path in data.iterdir() if path.suffix in (".jpg", ".png"))[:1]
        size = (width or 224, height or 224)
        opened = [Image.open(path).convert("RGB").resize(size) for path in files]
        pictures = np.stack([np.asarray(picture, dtype=np.float32) for picture in opened])
    words = entry["preprocess"]
    pictures = pictures[..., ::-1] if words.get("reverse_input_channels") else pictures
    mean, scale = (
        np.array(words.get(key) or default) for key, default in (("mean_values", 0), ("scale_values", 1))
    )
    x = ((pictures - mean) / scale).transpose(0, 3, 1, 2).astype(np.float32)
    shape = model.inputs[0].shape or ()
    return {model.inputs[0].name: np.ascontiguousarray(x.transpose(0, 2, 3, 1) if shape[-1] == 3 else x)}


def _assert_fused_equals(model: Model, folder: Path, entry: dict[str, Any], what: str) -> None:
    had_norms = "BatchNormalization" in _ops(model)
    fused = model.copy()
    kept = fuse_batchnorm(fused)
    assert not kept, (what, kept)
    assert "BatchNormalization" not in _ops(fused), what
    assert fused.edits or not had_norms
    edited = [fused] if fused.edits else []
    if had_norms:
        folded = fused.copy()
        fold_weight_chains(folded)
        add_missing_biases(folded, find_layers(folded.graph).layers)
        layers = find_layers(folded.graph).layers
        assert all(place.bias is not None for layer in layers for place in layer.places), what
        assert all(layer.chain == () for layer in layers), what
        edited.append(folded)
    if edited:
        samples = [_random_feeds(model), _real_feeds(model, folder, entry)]
        engine = get_engine("onnxruntime" if model.format == "onnx" else "openvino")
        dense = engine.compile(model.extract())
        before = [dense.run(feeds) for feeds in samples]
        for changed in edited:
            executable = engine.compile(changed.extract())
            for feeds, expected in zip(samples, before, strict=True):
                for name, y in executable.run(feeds).items():
                    old, new = expected[name].astype(np.float64), y.astype(np.float64)
                    assert np.linalg.norm(old - new) <= 1e-4 * np.linalg.norm(old), (what, name)


@pytest.mark.zoo
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_fused_real_networks_agree_with_the_originals(
    zoo: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # convert_model reports its use from forked processes, which JAX, once loaded, warns of
    monkeypatch.setattr("openvino_telemetry.utils.sender.TelemetrySender.send", lambda *_: None)
    entries = json.loads((zoo / "zoo.json").read_text(encoding="utf-8"))
    for name, entry in entries.items():
        path = zoo / entry["model"]
        if path.suffix == ".xml":
            if form == "openvino":
                _assert_fused_equals(load_model(path), zoo, entry, name)
        elif form == "onnx":
            _assert_fused_equals(load_model(path), zoo, entry, name)
        else:
            _assert_fused_equals(load_model(ov.Core().read_model(path)), zoo, entry, f"{name} as read")
            _assert_fused_equals(load_model(ov.convert_model(path)), zoo, entry, f"{name} as converted")
