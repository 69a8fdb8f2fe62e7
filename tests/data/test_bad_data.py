"""Bad data: one clear line that says what, where and what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pot_sparsity.data import DataSource, Preprocess, load_dataset
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import TensorInfo

FLOAT = np.dtype(np.float32)
IMAGE = TensorInfo("data", (None, 3, 8, 6), FLOAT)
ROW = TensorInfo("row", (1, 4), FLOAT)
IDS = TensorInfo("ids", (1, 4), np.dtype(np.int32))
USER, ITEM = TensorInfo("user", (None,), np.dtype(np.int64)), TensorInfo("item", (None,), np.dtype(np.int64))


def message(
    spec: DataSource, *inputs: TensorInfo, preprocess: Preprocess | None = None, **options: Any
) -> str:
    with pytest.raises(DataError) as caught:
        for _ in load_dataset(spec, inputs, preprocess, **options).batches(4):
            pass
    text = str(caught.value)
    assert "\n" not in text
    return text


def picture(height: int = 8, width: int = 6) -> Image.Image:
    return Image.fromarray(np.zeros((height, width, 3), np.uint8))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    forms = "DATA is a folder of images, an .npz file or module:callable"
    assert message(tmp_path / "none", IMAGE) == f"no such file or folder: '{tmp_path / 'none'}'; {forms}"
    assert message("none", IMAGE, base=tmp_path) == f"no such file or folder: '{tmp_path / 'none'}'; {forms}"
    (tmp_path / "notes.txt").write_text("x")
    assert f"folder '{tmp_path}' holds no images (.jpg, .jpeg, .png, .bmp, .webp): {forms}" in message(
        tmp_path, IMAGE
    )
    assert message(tmp_path / "notes.txt", IMAGE).endswith(f"is neither a folder nor an .npz file: {forms}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_images_are_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    for name in ("a", "b"):
        Image.fromarray(noise).save(tmp_path / f"{name}.{suffix}")
    path = tmp_path / f"b.{suffix}"
    path.write_bytes(path.read_bytes()[:-40])
    text = message(tmp_path, IMAGE)
    assert text.startswith(f"cannot read image '{path}' (")
    assert text.endswith("): replace or remove it")


def test_files_that_are_no_images_are_named_before_anything_is_read(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(
        DataError, match=r"cannot read image '.*b\.png' \(no known image format\): replace or remove it"
    ):
        load_dataset(tmp_path, [IMAGE])
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read image '.*b\.png'"):
        load_dataset(tmp_path, [IMAGE])


def test_images_with_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 6), np.uint16)).save(tmp_path / "a.png")
    assert re.search(
        r"image '.*a\.png' has more than 8 bits a channel \(mode I;16\): convert it", message(tmp_path, IMAGE)
    )


def test_sizes_that_do_not_fit_name_the_option(tmp_path: Path) -> None:
    picture(10, 7).save(tmp_path / "a.png")
    wanted = "but model input 'data' takes 8x6: give --resize 8x6 or --center-crop 8x6"
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path, [IMAGE])
    assert str(caught.value) == f"image '{tmp_path / 'a.png'}' is 10x7 (HxW), {wanted}"
    text = message(tmp_path, IMAGE, preprocess=Preprocess(center_crop="8"))
    becomes = "is 10x7 (HxW) and becomes 8x8 by --resize and --center-crop"
    assert text == f"image '{tmp_path / 'a.png'}' {becomes}, {wanted}"
    array = np.zeros((2, 5, 6, 3), np.uint8)
    assert message(array, IMAGE) == f"the ndarray of samples is 5x6 (HxW), {wanted}"
    free = TensorInfo("data", (None, 3, None, None), FLOAT)
    picture(9, 7).save(tmp_path / "b.png")
    text = message(tmp_path, free)
    assert (
        "is 9x7 (HxW) but 'a.png' is 10x7 and model input 'data' takes any size: give --resize 10x7" in text
    )


def test_models_that_take_no_images(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    assert "images feed a model with one input, this one has 2 ('user', 'item'): give an .npz" in message(
        tmp_path, USER, ITEM
    )
    assert (
        "model input 'row' of shape [1,4] takes no images [N,C,H,W] or [N,H,W,C] with 1 or 3 channels"
        in message(tmp_path, ROW)
    )
    maps = TensorInfo("maps", (1, 16, 8, 6), FLOAT)
    assert "model input 'maps' of shape [1,16,8,6] takes no images" in message(tmp_path, maps)
    text = message(tmp_path, maps, preprocess=Preprocess(model_layout="NCHW"))
    assert "has 16 channels in layout NCHW, images have 1 or 3: correct model_layout" in text
    text = message(tmp_path, IMAGE, preprocess=Preprocess(mean_values=(1, 2)))
    assert "mean_values has 2 values but model input 'data' has 3 channels: give one value or 3" in text


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("hello")
    assert message(path, ROW) == f"'{path}' is no .npz archive: save arrays with numpy.savez"
    path.write_bytes(b"")
    assert message(path, ROW).startswith(f"cannot read '{path}' as an .npz archive (")
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    assert message(path, ROW) == f"'{path}' is no .npz archive but a single array: save it with numpy.savez"
    np.savez(path, row=np.random.default_rng(0).standard_normal((50, 4)))
    whole = path.read_bytes()
    path.write_bytes(whole[:900])
    assert message(path, ROW).startswith(f"cannot read '{path}' as an .npz archive (")
    damaged = bytearray(whole)
    damaged[600] ^= 255
    path.write_bytes(bytes(damaged))
    assert re.search(
        r"as an \.npz archive \(Bad CRC.*\): it is damaged or something else, save it again",
        message(path, ROW),
    )
    np.savez(path, row=np.array([{}, []], object))
    text = message(path, ROW)
    assert text.startswith(
        f"array 'row' in '{path}' holds Python objects (dtype object), which are not read: save"
    )


def test_keys_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, rows=np.zeros((2, 4)), labels=np.arange(2))
    assert message(path, ROW) == (
        f"'{path}' has the arrays rows, labels, expected the model's inputs row (ready arrays) or 'images' "
        "(uint8): "
        "rename them"
    )
    np.savez(path, images=np.zeros((2, 8, 6, 3), np.float32))
    assert message(path, IMAGE) == (
        f"array 'images' in '{path}' has dtype float32: images are uint8; save ready arrays under the "
        "model's input "
        "names data"
    )
    np.savez(path, user=np.arange(3), item=np.arange(4))
    assert (
        "have different numbers of samples {'user': 3, 'item': 4}: give the same for all inputs"
        in message(path, USER, ITEM)
    )
    assert "the dict of samples has no key 'item' (found: user): give one array per model input" in message(
        {"user": np.arange(3)}, USER, ITEM
    )
    assert "feeds one input, the model has user, item: give a mapping of arrays" in message(
        np.arange(3), USER, ITEM
    )


@pytest.mark.parametrize(
    ("array", "info", "expected"),
    [
        (np.zeros((3, 5)), ROW, "has shape [3,5], model input 'row' takes [?,4]: give arrays of that shape"),
        (np.zeros((3, 4, 1)), ROW, "has shape [3,4,1], model input 'row' takes [?,4]"),
        (np.zeros((0, 4)), ROW, "holds no samples (shape [0,4]): give at least one"),
        (np.zeros((2, 0)), TensorInfo("row", (1, None), FLOAT), "is empty (shape [2,0])"),
        (np.array([["a"] * 4]), ROW, "has dtype <U1: give real numbers"),
        (np.zeros((2, 4), complex), ROW, "has dtype complex128: give real numbers"),
        (np.zeros((2, 4), "datetime64[s]"), ROW, "has dtype datetime64[s]: give real numbers"),
        (
            np.array([[0, 1, 2, np.nan]] * 2),
            ROW,
            "holds NaN or infinite values in sample 0: repair or remove it",
        ),
        (np.array([[0.0] * 4, [np.inf] * 4]), ROW, "holds NaN or infinite values in sample 1"),
        (np.full((1, 4), 1e300), ROW, "as float32 holds NaN or infinite values"),
        (np.zeros((2, 4)), IDS, "has dtype float64, model input 'ids' takes int32: give whole numbers"),
        (
            np.full((2, 4), 2**40),
            IDS,
            "which cannot hold its values 1099511627776..1099511627776: check the array",
        ),
        (np.full((2, 4), 2), TensorInfo("ids", (1, 4), np.dtype(bool)), "takes bool: give only 0 and 1"),
        (np.zeros((2, 8, 6, 3), np.uint8), IMAGE, "(or, for uint8 images, the key 'images')"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, array: NDArray[Any], info: TensorInfo, expected: str) -> None:
    path = tmp_path / "x.npz"
    named: dict[str, Any] = {info.name: array}
    np.savez(path, **named)
    text = message(path, info)
    assert text.startswith(f"array '{info.name}' in '{path}'")
    assert expected in text


def test_pictures_that_do_not_fit() -> None:
    text = message(np.zeros((2, 3, 8, 6), np.uint8), IMAGE)
    assert text == (
        "the ndarray of samples has shape [2,3,8,6], expected images [N,H,W,3]: transpose it, or name its "
        "layout with "
        "--layout NHWC or --layout NCHW"
    )
    text = message(np.zeros((2, 8, 6, 3), np.uint8), IMAGE, preprocess=Preprocess(layout="NCHW"))
    assert "has shape [2,8,6,3], expected images [N,3,H,W]" in text
    assert "holds no samples" in message(np.zeros((0, 8, 6, 3), np.uint8), IMAGE)
    assert "sample 0 of the list of samples has shape [1,8,6,4], expected images" in message(
        [np.zeros((8, 6, 4), np.uint8)], IMAGE
    )


@pytest.mark.parametrize(
    ("samples", "inputs", "expected"),
    [
        ([], [ROW], "the list of samples holds no samples: give at least one"),
        ([None], [ROW], "sample 0 of the list of samples is None: give an array or a mapping"),
        (
            [np.zeros(4), np.zeros(5)],
            [ROW],
            "sample 1 of the list of samples has shape [1,5], model input 'row' takes",
        ),
        (
            [np.zeros(4), np.full(4, np.nan)],
            [ROW],
            "sample 1 of the list of samples holds NaN or infinite values",
        ),
        ([{"x": np.zeros(4)}], [ROW], "sample 0 of the list of samples has no key 'row' (found: x)"),
        ([np.zeros(4)], [USER, ITEM], "is ndarray but the model has inputs user, item: give a mapping"),
        ([(np.zeros(4), 1, 2)], [ROW], "is a tuple of 3: give inputs, or a pair (inputs, label)"),
        ([(np.zeros(4), "cat")], [ROW], "label of sample 0 of the list of samples has dtype <U3"),
        (
            [(np.zeros(4), 0.5)],
            [ROW],
            "label of sample 0 of the list of samples has dtype float64: labels are whole",
        ),
        ([[[1.0, 2.0], [3.0]]], [ROW], "sample 0 of the list of samples is no array ("),
        ([object()], [ROW], "sample 0 of the list of samples has dtype object (object): give real numbers"),
        (
            [{"user": np.zeros(2, int), "item": np.zeros(3, int)}],
            [USER, ITEM],
            "has inputs of different batch sizes {'user': 2, 'item': 3}: give the same for all",
        ),
        ([(np.zeros((2, 4)), [1, 2, 3])], [ROW], "has shape [3] for 2 samples: give one label per sample"),
        (
            [np.zeros((1, 3)), np.zeros((1, 5))],
            [TensorInfo("row", (None, None), FLOAT)],
            "input 'row' of sample 1 of the list of samples is [5], of sample 0 [3]: bring all samples to "
            "one shape",
        ),
    ],
)
def test_samples_that_do_not_fit(samples: list[object], inputs: list[TensorInfo], expected: str) -> None:
    assert expected in message(samples, *inputs)


def test_callables_that_fail(tmp_path: Path) -> None:
    def nothing() -> None:
        return None

    def empty() -> Iterator[object]:
        yield from ()

    def broken() -> Iterator[object]:
        yield np.zeros(4)
        raise KeyError("gone")

    assert message(nothing, ROW) == "callable 'nothing' returned nothing: return an iterable of samples"
    assert message(empty, ROW) == "callable 'empty' holds no samples: give at least one"
    assert message(broken, ROW) == "callable 'broken' raised KeyError: 'gone'; correct that code"
    assert message(lambda: 3, ROW) == "callable '<lambda>' is or returned int: give an iterable of samples"


def test_named_callables_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "calibration_module_b.py").write_text("import absent_module_c\n")
    (tmp_path / "calibration_module_d.py").write_text(
        "value = 3\ndef broken():\n    raise OSError('no disk')\n"
    )
    (tmp_path / "calibration_module_e.py").write_text("def (:\n")
    before = list(sys.path)
    try:
        assert message("absent_module:f", ROW, base=tmp_path) == (
            "no module 'absent_module' for 'absent_module:f': run where absent_module.py lies, or install it"
        )
        assert message("calibration_module_b:f", ROW, base=tmp_path) == (
            "importing module 'calibration_module_b' raised ModuleNotFoundError: No module named "
            "'absent_module_c'; "
            "correct that code"
        )
        for name in ("none", "value", "value.none"):
            assert message(f"calibration_module_d:{name}", ROW, base=tmp_path) == (
                f"module 'calibration_module_d' has no callable '{name}': define a function that returns the "
                "samples"
            )
        assert message("calibration_module_d:broken", ROW, base=tmp_path) == (
            "'calibration_module_d:broken' raised OSError: no disk; correct that code"
        )
        assert "importing module 'calibration_module_e' raised SyntaxError: " in message(
            "calibration_module_e:f", ROW, base=tmp_path
        )
    finally:
        for name in "bde":
            sys.modules.pop(f"calibration_module_{name}", None)
    assert sys.path == before


def test_counts_below_one() -> None:
    assert message(np.zeros((3, 4)), ROW, samples=0) == "--samples 0: ask for at least 1"


def test_only_the_four_image_formats_are_read(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.eps", format="EPS")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert "a.png' (no known image format): replace or remove it" in message(tmp_path, IMAGE)
