"""The real data sets load with the right counts and labels, and as their own scripts preprocess them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pot_sparsity.data import Dataset, load_dataset, load_preprocess
from pot_sparsity.graph.graph import TensorInfo

pytestmark = pytest.mark.zoo
FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)


def entry(zoo: Path, name: str) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((zoo / "zoo.json").read_text(encoding="utf-8"))[name]
    return described


def load(zoo: Path, name: str, key: str, *inputs: TensorInfo, split: str | None = None) -> Dataset:
    described = entry(zoo, name)
    labels = Path(described["labels"]) if split else None
    preprocess = load_preprocess(described.get("preprocess"))
    return load_dataset(described[key], inputs, preprocess, labels=labels, split=split, base=zoo)


def test_cifar(zoo: Path) -> None:
    info = TensorInfo("input", (None, 3, 32, 32), FLOAT)
    assert len(load(zoo, "resnet20_akamaster_cifar10", "calibration", info)) == 1024
    dataset = load(zoo, "resnet20_akamaster_cifar10", "validation", info)
    assert len(dataset) == 5000
    assert dataset.has_labels
    with np.load(zoo / entry(zoo, "resnet20_akamaster_cifar10")["validation"]) as archive:
        pixels, labels = archive["images"][:64], archive["labels"]
    batch = next(dataset.batches(64))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(batch.inputs["input"].astype(np.float64), expected, rtol=1e-6, atol=1e-6)
    loaded = [b.labels for b in dataset.batches(512) if b.labels is not None]
    np.testing.assert_array_equal(np.concatenate(loaded), labels)


def test_imagenet(zoo: Path) -> None:
    info = TensorInfo("data", (None, 3, 227, 227), FLOAT)
    dataset = load(zoo, "squeezenet1_1", "validation", info, split="dev")
    with (zoo / "imagenet" / "labels.csv").open(encoding="utf-8") as stream:
        rows = sorted((r["file"], int(r["label"])) for r in csv.DictReader(stream) if r["split"] == "dev")
    assert len(dataset) == len(rows) == 500
    batch = next(dataset.batches(10))
    np.testing.assert_array_equal(batch.labels, [label for _, label in rows[:10]])
    for (file, _), got in zip(rows, batch.inputs["data"], strict=False):
        with Image.open(zoo / "imagenet" / "dev" / file) as image:
            x = np.asarray(image.convert("RGB"), np.float64)
        np.testing.assert_array_equal(got, (x[:, :, ::-1] - [104, 117, 123]).transpose(2, 0, 1))


def test_imagenet_calibration_pictures_are_cropped(zoo: Path) -> None:
    info = TensorInfo("input", (None, 3, 224, 224), FLOAT)
    dataset = load(zoo, "mobilenet_v1_025", "calibration", info)
    assert len(dataset) == 500
    assert not dataset.has_labels
    file = min(path.name for path in (zoo / "imagenet" / "calib").iterdir())
    with Image.open(zoo / "imagenet" / "calib" / file) as image:
        x = np.asarray(image.convert("RGB"), np.float64)
    top, left = (x.shape[0] - 224) // 2, (x.shape[1] - 224) // 2
    x = x[top : top + 224, left : left + 224]
    expected = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    got = next(dataset.batches(1)).inputs["input"][0].astype(np.float64)
    np.testing.assert_allclose(got, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_detection(zoo: Path) -> None:
    yolox = load(zoo, "yolox_nano", "validation", TensorInfo("images", (None, 3, 416, 416), FLOAT))
    person = load(zoo, "person-detection-0200", "calibration", TensorInfo("image", (1, 3, 256, 256), FLOAT))
    assert (len(yolox), len(person)) == (40, 28)
    assert next(person.batches(2)).inputs["image"].shape == (2, 3, 256, 256)
    file = min(path.name for path in (zoo / "detection" / "dev").iterdir())
    with Image.open(zoo / "detection" / "dev" / file) as image:
        width, height = image.size
        r = min(416 / width, 416 / height)
        w, h = int(width * r), int(height * r)
        a = np.full((416, 416, 3), 114.0)
        a[:h, :w] = np.asarray(image.convert("RGB").resize((w, h), Image.Resampling.BILINEAR))[:, :, ::-1]
    np.testing.assert_array_equal(next(yolox.batches(1)).inputs["images"][0], a.transpose(2, 0, 1))


def test_named_inputs(zoo: Path) -> None:
    user, item = TensorInfo("user", (None,), INT), TensorInfo("item", (None,), INT)
    ratings = load(zoo, "ncf_mlp_ml1m", "calibration", user, item)
    assert len(ratings) == 20480
    assert sorted(next(ratings.batches(5)).inputs) == ["item", "user"]
    sequences = load(zoo, "iclrec_beauty", "validation", TensorInfo("seq", (None, 50), INT))
    assert (len(sequences), sequences.has_labels) == (11181, False)
    text = load(zoo, "stories260k", "validation", TensorInfo("input_ids", (None, None), INT))
    batch = next(text.batches(4))
    assert len(text) == 160
    assert batch.labels is not None
    assert batch.labels.shape == batch.inputs["input_ids"].shape == (4, 512)
