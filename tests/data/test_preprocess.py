from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pot_sparsity.data import Preprocess, Resize, load_preprocess
from pot_sparsity.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("32x48", "32x48"),
        ("32", "32x32"),
        ("shorter:256", "shorter:256"),
        ("letterbox:416", "letterbox:416x416,pad=114,anchor=topleft"),
        ("letterbox:320x416,pad=0,anchor=center", "letterbox:320x416,pad=0,anchor=center"),
    ],
)
def test_resize_reads_every_form_and_writes_it_back(text: str, canonical: str) -> None:
    assert str(Resize.parse(text)) == canonical
    assert Resize.parse(canonical) == Resize.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0x3",
        "3x4x5",
        "longer:3",
        "shorter:3x4",
        "shorter:3,pad=1",
        "letterbox:9,pad=256",
        "letterbox:9,anchor=x",
    ],
)
def test_resize_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"use 'HxW' \(stretch\), 'shorter:N' or 'letterbox:N"):
        Resize.parse(text)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("10x20", (33, 7), (10, 20)),
        ("shorter:10", (20, 33), (10, 16)),
        ("shorter:10", (33, 20), (16, 10)),
        ("shorter:10", (5, 5), (10, 10)),
        ("letterbox:16", (5, 9), (16, 16)),
    ],
)
def test_resize_tells_the_size_it_gives(text: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    resize = Resize.parse(text)
    image = Image.fromarray(np.zeros((*size, 3), np.uint8))
    assert resize.size(*size) == expected
    assert resize.apply(image).size == expected[::-1]


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("anchor", ["topleft", "center"])
def test_letterbox_keeps_proportions_and_fills_the_rest(bands: int, anchor: str) -> None:
    pixels = np.full((8, 16) if bands == 1 else (8, 16, 3), 7, np.uint8)
    boxed = np.asarray(Resize.parse(f"letterbox:32,pad=200,anchor={anchor}").apply(Image.fromarray(pixels)))
    top = 8 if anchor == "center" else 0
    expected = np.full(boxed.shape, 200, np.uint8)
    expected[top : top + 16] = 7
    np.testing.assert_array_equal(boxed, expected)


def test_values_may_be_one_number_a_list_or_text() -> None:
    assert Preprocess.model_validate({"mean_values": 3}).mean_values == (3.0,)
    assert Preprocess.model_validate({"mean_values": "1, 2.5,3"}).mean_values == (1.0, 2.5, 3.0)
    assert Preprocess.model_validate({"scale_values": [2]}).scale_values == (2.0,)
    assert Preprocess.model_validate({"mean_values": ""}).mean_values == ()


@pytest.mark.parametrize(
    ("crop", "expected"), [(224, "224x224"), ("3x4", "3x4"), ([5, 6], "5x6"), ("7", "7x7")]
)
def test_center_crop_forms(crop: Any, expected: str) -> None:
    settings = Preprocess.model_validate({"center_crop": crop})
    assert settings.center_crop == expected
    assert settings.crop_size == tuple(int(part) for part in expected.split("x"))


def test_resize_may_be_spread_over_keys() -> None:
    letterbox = {"resize": "letterbox", "size": 416, "pad_value": 114}
    assert load_preprocess(letterbox).resize == "letterbox:416x416,pad=114,anchor=topleft"
    assert load_preprocess({"resize": "stretch", "size": [256, 128]}).resize == "256x128"
    assert load_preprocess({"resize": "shorter", "size": 9}).resize == "shorter:9"


def test_it_is_frozen_and_hashable() -> None:
    settings = Preprocess(mean_values=(1.0,))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "mean_values", (2.0,))  # noqa: B010 - assigned as code that is not type-checked would
    assert hash(settings) == hash(Preprocess(mean_values=(1.0,)))


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files_hold_the_same_keys(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"preprocess.{suffix}"
    settings = {
        "mean_values": [1, 2, 3],
        "scale_values": [4],
        "reverse_input_channels": True,
        "center_crop": 5,
    }
    path.write_text(
        json.dumps(settings) if suffix == "json" else "\n".join(f"{k}: {v}" for k, v in settings.items())
    )
    loaded = load_preprocess(path)
    assert loaded == load_preprocess(settings) == load_preprocess(loaded)
    assert loaded.mean_values == (1.0, 2.0, 3.0)
    assert loaded.reverse_input_channels
    assert load_preprocess(None) == Preprocess()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean_value": 1}, "unknown preprocessing key 'mean_value'; did you mean 'mean_values'?"),
        ({"zzz": 1}, "unknown preprocessing key 'zzz'; known: mean_values, scale_values, layout, "),
        ({"pad_value": 1}, "unknown preprocessing key 'pad_value'"),
        ({"scale_values": [1, 0]}, "key 'scale_values': a scale of 0 divides by zero: use 1"),
        ({"mean_values": [float("nan")]}, "key 'mean_values.0': Input should be a finite number"),
        ({"layout": "CHW"}, "key 'layout': Input should be 'NHWC' or 'NCHW'"),
        ({"resize": "bicubic:3"}, "key 'resize': resize 'bicubic:3' is not known: use 'HxW' (stretch)"),
        ({"resize": "letterbox"}, "resize 'letterbox' needs the key 'size' beside it"),
        ({"center_crop": 0}, "key 'center_crop': center_crop 0 is not known: use N or 'HxW'"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_preprocess(settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(RecipeError, match=r"cannot read preprocessing file '.*p\.json': No such file"):
        load_preprocess(path)
    path.write_text("{")
    with pytest.raises(RecipeError, match="is neither valid JSON nor YAML"):
        load_preprocess(path)
    path.write_text("[1]")
    with pytest.raises(RecipeError, match="must be a mapping of keys"):
        load_preprocess(path)
