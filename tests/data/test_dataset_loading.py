"""Every form of DATA gives the same samples in the same order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pot_sparsity.data import Batch, Dataset, Preprocess, load_dataset
from pot_sparsity.graph.graph import TensorInfo

nncf: Any = pytest.importorskip("nncf")
FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = TensorInfo("data", (None, 3, 8, 6), FLOAT)
ROW = TensorInfo("row", (1, 4), FLOAT)
TWO = (TensorInfo("user", (None,), np.dtype(np.int32)), TensorInfo("items", (None, 3), INT))


def pictures(n: int = 7) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, 8, 6, 3)).astype(np.uint8)


def rows(n: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(n).standard_normal((n, 4)).astype(np.float32)


def folder_of(path: Path, images: NDArray[np.uint8]) -> Path:
    path.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.{('png', 'bmp', 'webp')[i % 3]}", lossless=True)
    return path


def together(dataset: Dataset, size: int = 3) -> Batch:
    batches = list(dataset.batches(size))
    assert [batch.size for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert sum(batch.size for batch in batches) == len(dataset)
    names = batches[0].inputs
    inputs = {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in names}
    labels = [batch.labels for batch in batches if batch.labels is not None]
    assert len(labels) == (len(batches) if dataset.has_labels else 0)
    return Batch(inputs, np.concatenate(labels) if labels else None)


def test_folder_npz_array_and_samples_of_pictures_are_alike(tmp_path: Path) -> None:
    x = pictures()
    np.savez(tmp_path / "x.npz", images=x, labels=np.arange(7, dtype=np.int32))
    preprocess = Preprocess(mean_values=(1, 2, 3), scale_values=(4,), reverse_input_channels=True)
    expected = ((x[..., ::-1].astype(np.float64) - [1, 2, 3]) / 4).transpose(0, 3, 1, 2).astype(np.float32)
    sources = [
        load_dataset(folder_of(tmp_path / "images", x), [IMAGE], preprocess),
        load_dataset(str(tmp_path / "x.npz"), [IMAGE], preprocess),
        load_dataset(x, [IMAGE], preprocess),
        load_dataset(list(x), [IMAGE], preprocess),
        load_dataset((row for row in x), [IMAGE], preprocess),
        load_dataset([{"data": row[None]} for row in x], [IMAGE], preprocess),
        load_dataset(lambda: x, [IMAGE], preprocess),
    ]
    for dataset in sources:
        batch = together(dataset)
        assert batch.inputs["data"].dtype == FLOAT
        assert batch.inputs["data"].flags.c_contiguous
        np.testing.assert_array_equal(batch.inputs["data"], expected)
        assert (batch.labels is None) == (dataset is not sources[1])
    np.testing.assert_array_equal(together(sources[1]).labels, np.arange(7))


def test_ready_samples_in_every_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = rows()
    np.savez_compressed(tmp_path / "x.npz", row=x.astype(np.float64), other=np.zeros(3))
    forms: list[Dataset] = [
        load_dataset("x.npz", [ROW], base=tmp_path),
        load_dataset(x, [ROW]),
        load_dataset({"row": x}, [ROW]),
        load_dataset(list(x), [ROW]),
        load_dataset([row[None] for row in x], [ROW]),
        load_dataset([{"row": row} for row in x], [ROW]),
        load_dataset([x[:3], x[3:4], x[4:]], [ROW]),
        load_dataset(iter([{"row": x[:3]}, {"row": x[3:]}]), [ROW]),
        load_dataset(lambda: (row for row in x), [ROW]),
        load_dataset(nncf.Dataset(list(x)), [ROW]),
        load_dataset(nncf.Dataset(range(7), lambda i: {"row": x[i : i + 1], "other": 3}), [ROW]),
        load_dataset(nncf.Dataset(range(7), lambda i: {0: x[i : i + 1]}), [ROW]),
        load_dataset(nncf.Dataset(row for row in x), [ROW]),
    ]
    for dataset in forms:
        np.testing.assert_array_equal(together(dataset).inputs["row"], x)
        assert not dataset.has_labels
        assert together(dataset).inputs["row"].dtype == FLOAT
    assert not caplog.records
    assert load_dataset(forms[0], [ROW]) is forms[0]


def test_models_with_several_inputs(tmp_path: Path) -> None:
    user, items = np.arange(5), np.arange(15, dtype=np.int32).reshape(5, 3)
    np.savez(tmp_path / "x.npz", user=user, items=items, labels=user * 2)
    pairs = [({"user": np.int64(u), "items": i}, u * 2) for u, i in zip(user, items, strict=True)]
    for dataset in (
        load_dataset(tmp_path / "x.npz", TWO),
        load_dataset(pairs, TWO),
        load_dataset(iter([({"user": user, "items": items}, user * 2)]), TWO),
    ):
        batch = together(dataset, 2)
        assert batch.inputs["user"].dtype == np.int32
        assert batch.inputs["items"].dtype == np.int64
        np.testing.assert_array_equal(batch.inputs["user"], user)
        np.testing.assert_array_equal(batch.inputs["items"], items)
        np.testing.assert_array_equal(batch.labels, user * 2)
    lists = nncf.Dataset([[user[i : i + 1], items[i : i + 1]] for i in range(5)])
    np.testing.assert_array_equal(together(load_dataset(lists, TWO)).inputs["items"], items)


def test_labels_of_samples_may_be_scalars_or_arrays() -> None:
    x, y = rows(4), np.arange(8).reshape(4, 2)
    dataset = load_dataset([(row, label) for row, label in zip(x, y, strict=True)], [ROW])
    np.testing.assert_array_equal(together(dataset).labels, y)
    batched = load_dataset([[x[:2], y[:2]], [x[2:], y[2:]]], [ROW])
    np.testing.assert_array_equal(together(batched).labels, y)


def test_sequences_are_read_when_they_are_needed() -> None:
    asked: list[int] = []
    x = rows()

    class Items:
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> object:
            asked.append(index)
            return x[index]

    dataset = load_dataset(Items(), [ROW])
    assert asked == [0]
    np.testing.assert_array_equal(
        next(dataset.subset(np.array([5, 2, 5])).batches(3)).inputs["row"], x[[5, 2, 5]]
    )
    assert asked == [0, 2, 5]
    seen: list[int] = []

    def transform(i: int) -> object:
        seen.append(i)
        return x[i]

    lazy = load_dataset(nncf.Dataset(range(7), transform), [ROW])
    np.testing.assert_array_equal(next(lazy.subset(np.array([6, 1])).batches(2)).inputs["row"], x[[6, 1]])
    assert seen == [0, 1, 6]


def test_named_callables_are_imported_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "calibration_module_a.py").write_text(
        "import numpy as np\n"
        "def samples():\n    return (np.full(4, i, np.float32) for i in range(3))\n"
        "class Group:\n    @staticmethod\n    def rows():\n        return np.ones((2, 4), np.float32)\n"
    )
    before = list(sys.path)
    try:
        dataset = load_dataset("calibration_module_a:samples", [ROW], base=tmp_path)
        np.testing.assert_array_equal(
            together(dataset).inputs["row"], np.repeat([[0.0], [1.0], [2.0]], 4, axis=1)
        )
        assert len(load_dataset("calibration_module_a:Group.rows", [ROW], base=tmp_path)) == 2
    finally:
        sys.modules.pop("calibration_module_a", None)
    assert sys.path == before


def test_images_named_input_may_be_ready_or_pictures(tmp_path: Path) -> None:
    info = TensorInfo("images", (None, 3, 8, 6), FLOAT)
    ready = np.random.default_rng(0).standard_normal((2, 3, 8, 6)).astype(np.float32)
    np.savez(tmp_path / "ready.npz", images=ready)
    np.savez(tmp_path / "pictures.npz", images=pictures(2))
    np.testing.assert_array_equal(
        together(load_dataset(tmp_path / "ready.npz", [info])).inputs["images"], ready
    )
    got = together(load_dataset(tmp_path / "pictures.npz", [info])).inputs["images"]
    np.testing.assert_array_equal(got, pictures(2).transpose(0, 3, 1, 2))


def test_preprocessing_of_ready_arrays_is_said_to_be_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    load_dataset(rows(), [ROW], Preprocess(mean_values=(1,)))
    assert "holds ready arrays: preprocessing applies to images only" in caplog.text


def test_folders_are_searched_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    x = pictures(4)
    for name, image in zip(("b/1.png", "a/2.png", "c.PNG", "a/1.png"), x, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._c.png").write_text("no image")
    got = together(load_dataset(tmp_path, [IMAGE])).inputs["data"]
    np.testing.assert_array_equal(got, x[[3, 1, 0, 2]].transpose(0, 3, 1, 2))


def test_samples_draw_a_seeded_sorted_subset(caplog: pytest.LogCaptureFixture) -> None:
    x = np.arange(400, dtype=np.float32).reshape(100, 4)
    drawn = [together(load_dataset(x, [ROW], samples=30, seed=seed), 7).inputs["row"] for seed in (0, 0, 1)]
    ids = [np.asarray(d, np.float64)[:, 0] / 4 for d in drawn]
    assert all((np.diff(i) > 0).all() and len(i) == 30 for i in ids)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert not np.array_equal(ids[0], ids[2])
    assert len(load_dataset(x, [ROW], samples=100)) == 100
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(x, [ROW], samples=101)) == 100
    assert "101 samples asked for, there are 100: all are used" in caplog.text
    assert len(load_dataset(load_dataset(x, [ROW]), [ROW], samples=3)) == 3


def test_subsets_keep_order_repetitions_and_labels(tmp_path: Path) -> None:
    x = pictures()
    np.savez(tmp_path / "x.npz", images=x, labels=np.arange(7))
    labels = tmp_path / "y.npz"
    np.savez(labels, labels=np.arange(7))
    order = np.array([4, 0, 4, 6])
    for dataset in (
        load_dataset(tmp_path / "x.npz", [IMAGE]),
        load_dataset(folder_of(tmp_path / "f", x), [IMAGE], labels=labels),
        load_dataset(list(x), [IMAGE], labels=labels),
    ):
        batch = together(dataset.subset(np.array([1, 4, 0, 6])).subset(np.array([1, 2, 1, 3])))
        np.testing.assert_array_equal(batch.labels, order)
        np.testing.assert_array_equal(batch.inputs["data"], x[order].transpose(0, 3, 1, 2))
        with pytest.raises(IndexError, match=r"positions 0\.\.7 reach beyond the 7 samples"):
            dataset.subset(np.array([0, 7]))
        with pytest.raises(ValueError, match="a subset needs at least one sample"):
            dataset.subset(np.array([], np.int64))
        with pytest.raises(ValueError, match="batch size 0 must be at least 1"):
            next(dataset.batches(0))


def test_fingerprints_follow_content_and_preprocessing(tmp_path: Path) -> None:
    x = pictures()
    np.savez(tmp_path / "a.npz", images=x)
    np.savez_compressed(tmp_path / "b.npz", images=x)
    np.savez(tmp_path / "c.npz", images=x, labels=np.arange(7))
    np.savez(tmp_path / "d.npz", images=x[::-1])
    a, b, c, d = (load_dataset(tmp_path / f"{name}.npz", [IMAGE]) for name in "abcd")
    files = load_dataset(folder_of(tmp_path / "f", x), [IMAGE])
    same = load_dataset(folder_of(tmp_path / "g", x), [IMAGE])
    other = load_dataset(tmp_path / "a.npz", [IMAGE], Preprocess(scale_values=(2,)))
    lazy, ready = load_dataset(list(rows()), [ROW]), load_dataset(rows(), [ROW])
    assert a.fingerprint == b.fingerprint == a.subset(np.arange(7)).fingerprint
    assert files.fingerprint == same.fingerprint
    assert lazy.fingerprint == load_dataset(list(rows()), [ROW]).fingerprint
    different = [a, c, d, files, other, lazy, ready, a.subset(np.arange(6)), load_dataset(-rows(), [ROW])]
    assert len({dataset.fingerprint for dataset in different}) == len(different) - (
        lazy.fingerprint == ready.fingerprint
    )
    Image.fromarray(x[1]).save(tmp_path / "g" / "000.png")
    assert load_dataset(tmp_path / "g", [IMAGE]).fingerprint != files.fingerprint


def test_generators_can_be_read_more_than_once() -> None:
    def make() -> Iterator[NDArray[np.float32]]:
        yield from rows()

    dataset = load_dataset(make(), [ROW])
    for _ in range(2):
        np.testing.assert_array_equal(together(dataset).inputs["row"], rows())


def test_casts_keep_the_meaning() -> None:
    half = TensorInfo("row", (1, 4), np.dtype(np.float16))
    flag = TensorInfo("row", (1, 4), np.dtype(np.bool_))
    free = TensorInfo("row", None, None)
    assert together(load_dataset(rows(), [half])).inputs["row"].dtype == np.float16
    ones = np.array([[0, 1, 1, 0]])
    assert together(load_dataset(ones, [flag])).inputs["row"].dtype == np.bool_
    assert together(load_dataset(ones, [free])).inputs["row"].dtype == ones.dtype
    assert together(load_dataset(ones, [ROW])).inputs["row"].dtype == FLOAT


def test_preprocessed_pictures_in_memory_are_not_called_ready(caplog: pytest.LogCaptureFixture) -> None:
    x = pictures(2)
    dataset = load_dataset((row for row in x), [IMAGE], Preprocess(scale_values=(2,)))
    np.testing.assert_array_equal(together(dataset).inputs["data"], x.transpose(0, 3, 1, 2) / 2)
    assert not caplog.records


def test_masks_are_no_pictures() -> None:
    mask = TensorInfo("mask", (None, 1, 8, 6), np.dtype(np.bool_))
    x = pictures(2)[:, None, :, :, 0] & 1
    for spec in (x, list(x), {"mask": x}):
        np.testing.assert_array_equal(together(load_dataset(spec, [mask])).inputs["mask"], x)
