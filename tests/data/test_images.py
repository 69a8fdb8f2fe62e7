"""Preprocessing against plain, independent implementations in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pot_sparsity.data import Preprocess, load_dataset
from pot_sparsity.data.images import ImageInput, infer_layout
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import Shape, TensorInfo

FLOAT = np.dtype(np.float32)


def info(*shape: int | None, dtype: type[np.generic] = np.float32) -> TensorInfo:
    return TensorInfo("data", shape, np.dtype(dtype))


def draw(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def crop_like_evaluate(image: Image.Image, size: int) -> NDArray[np.float64]:
    w, h = image.size
    if min(w, h) < size:
        s = size / min(w, h)
        image = image.resize((max(size, round(w * s)), max(size, round(h * s))), Image.Resampling.BILINEAR)
        w, h = image.size
    left, top = (w - size) // 2, (h - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), np.float64)


def load_one(folder: Path, preprocess: Preprocess, *shape: int | None) -> NDArray[np.float64]:
    (batch,) = load_dataset(folder, [info(*shape)], preprocess).batches(8)
    assert batch.inputs["data"].dtype == FLOAT
    return np.asarray(batch.inputs["data"][0], np.float64)


@pytest.mark.parametrize("size", [(40, 30), (24, 24), (19, 50), (25, 24)])
def test_center_crop_mean_and_scale_equal_evaluate(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(draw(1, *size, 3)).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    mean, scale = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    x = crop_like_evaluate(image, 24)
    torch = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    got = load_one(
        tmp_path,
        Preprocess(mean_values=tuple(mean), scale_values=tuple(scale), center_crop="24"),
        1,
        3,
        24,
        24,
    )
    np.testing.assert_allclose(got, torch.transpose(2, 0, 1), rtol=2e-6, atol=2e-7)


def test_reversal_comes_before_the_mean_as_in_evaluate(tmp_path: Path) -> None:
    Image.fromarray(draw(2, 30, 40, 3)).save(tmp_path / "a.png")
    x = crop_like_evaluate(Image.open(tmp_path / "a.png"), 27)
    caffe = (x[:, :, ::-1] - [104, 117, 123]).transpose(2, 0, 1)
    settings_ = Preprocess(mean_values=(104, 117, 123), reverse_input_channels=True, center_crop="27")
    np.testing.assert_array_equal(load_one(tmp_path, settings_, 1, 3, 27, 27), caffe)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (20, 33), (100, 7)])
def test_letterbox_equals_the_detectors_preprocessing(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(draw(3, *size, 3)).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    W, H = image.size
    r = min(41 / W, 41 / H)
    w, h = int(W * r), int(H * r)
    a = np.full((41, 41, 3), 114.0)
    a[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR), np.float64)[:, :, ::-1]
    settings_ = Preprocess(resize="letterbox:41", reverse_input_channels=True)
    np.testing.assert_array_equal(load_one(tmp_path, settings_, None, 3, 41, 41), a.transpose(2, 0, 1))


def test_stretch_equals_pil(tmp_path: Path) -> None:
    Image.fromarray(draw(4, 20, 30, 3)).save(tmp_path / "a.png")
    expected = np.asarray(
        Image.open(tmp_path / "a.png").resize((9, 16), Image.Resampling.BILINEAR), np.float64
    )
    got = load_one(tmp_path, Preprocess(resize="16x9"), None, 16, 9, 3)
    np.testing.assert_array_equal(got, expected)


def test_shorter_side_then_crop(tmp_path: Path) -> None:
    Image.fromarray(draw(5, 20, 30, 3)).save(tmp_path / "a.png")
    resized = Image.open(tmp_path / "a.png").resize((24, 16), Image.Resampling.BILINEAR)
    expected = crop_like_evaluate(resized, 14).transpose(2, 0, 1)
    np.testing.assert_array_equal(
        load_one(tmp_path, Preprocess(resize="shorter:16", center_crop="14"), 1, 3, 14, 14), expected
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.sampled_from(["NHWC", "NCHW"]),
    st.sampled_from(["NHWC", "NCHW"]),
    st.booleans(),
    st.integers(0, 999),
)
def test_arrays_equal_the_formula(
    n: int,
    height: int,
    width: int,
    channels: int,
    source: Literal["NHWC", "NCHW"],
    model: Literal["NHWC", "NCHW"],
    reverse: bool,
    seed: int,
) -> None:
    x = draw(seed, n, height, width, channels)
    rng = np.random.default_rng(seed)
    mean, scale = rng.uniform(0, 255, channels), rng.uniform(1, 99, channels)
    expected = ((x[..., ::-1] if reverse else x).astype(np.float64) - mean) / scale
    preprocess = Preprocess(
        mean_values=tuple(mean),
        scale_values=tuple(scale),
        layout=source,
        model_layout=model,
        reverse_input_channels=reverse,
    )
    shape = (n, channels, height, width) if model == "NCHW" else (n, height, width, channels)
    stored = x if source == "NHWC" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    dataset = load_dataset(stored, [info(*shape)], preprocess)
    got = np.concatenate([batch.inputs["data"] for batch in dataset.batches(2)])
    assert got.shape == shape
    np.testing.assert_array_equal(
        got, (expected.transpose(0, 3, 1, 2) if model == "NCHW" else expected).astype(np.float32)
    )


@pytest.mark.parametrize(("height", "width", "crop"), [(9, 8, "5x4"), (5, 9, "6x4"), (6, 4, "6x4")])
def test_arrays_and_files_are_cropped_alike(tmp_path: Path, height: int, width: int, crop: str) -> None:
    x = draw(6, 3, height, width, 3)
    for i, picture in enumerate(x):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    h, w = (int(part) for part in crop.split("x"))
    preprocess = Preprocess(center_crop=crop)
    (files,) = load_dataset(tmp_path, [info(None, 3, h, w)], preprocess).batches(3)
    (arrays,) = load_dataset(x, [info(None, 3, h, w)], preprocess).batches(3)
    assert files.inputs["data"].shape == (3, 3, h, w)
    np.testing.assert_array_equal(files.inputs["data"], arrays.inputs["data"])


def test_grey_models_get_grey_pictures(tmp_path: Path) -> None:
    x = draw(7, 6, 5, 3)
    Image.fromarray(x).save(tmp_path / "a.png")
    expected = np.asarray(Image.open(tmp_path / "a.png").convert("L"), np.float64)
    np.testing.assert_array_equal(load_one(tmp_path, Preprocess(), 1, 1, 6, 5)[0], expected)
    grey = draw(8, 4, 6, 5)
    for stored in (grey, grey[..., None]):
        (batch,) = load_dataset(stored, [info(None, 1, 6, 5)], Preprocess(resize="6x5")).batches(9)
        np.testing.assert_array_equal(np.asarray(batch.inputs["data"], np.float64)[:, 0], grey)


def test_palette_and_alpha_pictures_become_rgb(tmp_path: Path) -> None:
    x = draw(9, 6, 5, 4)
    Image.fromarray(x).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_one(tmp_path, Preprocess(), 1, 6, 5, 3), x[..., :3])


def test_integer_inputs_take_plain_pixels_only() -> None:
    x = draw(10, 2, 4, 4, 3)
    (batch,) = load_dataset(x, [info(1, 4, 4, 3, dtype=np.uint8)], Preprocess()).batches(2)
    assert batch.inputs["data"].dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(batch.inputs["data"], np.uint8), x)
    (shifted,) = load_dataset(x, [info(1, 4, 4, 3, dtype=np.int8)], Preprocess(mean_values=(128,))).batches(2)
    np.testing.assert_array_equal(np.asarray(shifted.inputs["data"], np.int64), x.astype(np.int64) - 128)
    for settings_ in (Preprocess(scale_values=(2,)), Preprocess(mean_values=(1,))):
        with pytest.raises(
            DataError, match="input 'data' is uint8, which cannot hold the preprocessed pixels: drop mean"
        ):
            load_dataset(x, [info(1, 4, 4, 3, dtype=np.uint8)], settings_)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((None, 3, 32, 32), "NCHW"),
        ((1, 32, 32, 3), "NHWC"),
        ((None, 28, 28, 1), "NHWC"),
        ((None, 3, 9, 3), "NCHW"),
        ((None, None, None, None), "NCHW"),
        ((None, None, None, 3), "NHWC"),
        ((None, 16, 8, 8), None),
        ((None, 3, 32), None),
        (None, None),
    ],
)
def test_layout_is_inferred_from_where_the_channels_stand(shape: Shape | None, expected: str | None) -> None:
    assert infer_layout(shape) == expected


def test_models_of_any_size_take_the_pictures_size() -> None:
    (batch,) = load_dataset(draw(11, 2, 5, 7, 3), [info(None, 3, None, None)]).batches(2)
    assert batch.inputs["data"].shape == (2, 3, 5, 7)
    unknown = ImageInput.bind([info(None, None, None, None)], Preprocess())
    assert (unknown.channels, unknown.height, unknown.width) == (3, None, None)
