from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pot_sparsity.data import Dataset, DataSource, load_dataset
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import TensorInfo

IMAGE = TensorInfo("data", (None, 3, 4, 4), np.dtype(np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("a.png", "b.png", "c.png", "sub/a.png", "sub/d.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(path)
    return tmp_path / "images"


def read(dataset: Dataset) -> tuple[list[int], list[int]]:
    """(number in the picture, label) of all samples."""
    (batch,) = dataset.batches(99)
    numbers: NDArray[np.float64] = np.asarray(batch.inputs["data"], np.float64)[:, 0, 0, 0]
    assert batch.labels is not None
    assert batch.labels.dtype == np.int64
    return [int(number) for number in numbers], [int(label) for label in batch.labels]


def table(folder: Path, text: str) -> Path:
    path = folder.parent / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_match_by_relative_path_or_by_name_in_any_order(folder: Path) -> None:
    labels = table(
        folder,
        'file,name,label\nsub/a.png,"x, y",13\nelsewhere/d.png,x,14\nc.png,,12\n'
        "b.png,,11\na.png,,10\nnot-there.png,,1\n",
    )
    assert read(load_dataset(folder, [IMAGE], labels=labels)) == ([0, 1, 2, 3, 4], [10, 11, 12, 13, 14])
    drawn = load_dataset(folder, [IMAGE], labels=labels, samples=3)
    numbers, values = read(drawn)
    assert values == [number + 10 for number in numbers]


def test_a_byte_order_mark_and_windows_paths_are_understood(folder: Path) -> None:
    labels = table(folder, "\ufefffile,label\r\nsub\\a.png,3\r\nd.png,4\r\na.png,0\r\nb.png,1\r\nc.png,2\r\n")
    assert read(load_dataset(folder, [IMAGE], labels=labels)) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])


def test_a_split_selects_rows_and_with_them_images(folder: Path) -> None:
    labels = table(
        folder, "split,file,label\ndev,c.png,2\ntrain,c.png,7\ndev,a.png,5\ndev,gone.png,1\ntrain,b.png,3\n"
    )
    assert read(load_dataset(folder, [IMAGE], labels=labels, split="dev")) == ([0, 2, 3], [5, 2, 5])
    assert read(load_dataset(folder, [IMAGE], labels=labels, split="train")) == ([1, 2], [3, 7])


def test_labels_from_an_npz_replace_those_in_the_data(tmp_path: Path, folder: Path) -> None:
    np.savez(tmp_path / "y.npz", labels=np.arange(5))
    np.savez(tmp_path / "x.npz", images=np.zeros((5, 4, 4, 3), np.uint8), labels=np.zeros(5, np.int64))
    np.savez(tmp_path / "r.npz", data=np.zeros((5, 3, 4, 4), np.float32), labels=np.zeros((5, 2), np.uint8))
    for spec in (folder, tmp_path / "x.npz", tmp_path / "r.npz", [np.zeros((3, 4, 4), np.float32)] * 5):
        assert read(load_dataset(spec, [IMAGE], labels=tmp_path / "y.npz"))[1] == [0, 1, 2, 3, 4]
    (batch,) = load_dataset(tmp_path / "r.npz", [IMAGE]).batches(5)
    assert batch.labels is not None
    assert batch.labels.shape == (5, 2)


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        (
            "file,class\na.png,1\n",
            None,
            "has no column 'label' (found: file, class): its first line must name file, label",
        ),
        ("a.png,1\nb.png,2\n", None, "has no column 'file' and no column 'label' (found: a.png, 1)"),
        ("file,label\na.png,1\n", "dev", "has no column 'split' (found: file, label)"),
        ("", None, "has no rows: give columns file,label"),
        ("file,label\n", None, "has no rows: give columns file,label"),
        (
            "file,label,split\na.png,1,x\nb.png,2,y\n",
            "dev",
            "has no rows of split 'dev': its splits are x, y",
        ),
        ("file,label\na.png,cat\n", None, "row 1 has label 'cat': labels are whole numbers"),
        ("file,label\na.png,1\nb.png\n", None, "row 2 has label '': labels are whole numbers"),
        (
            "file,label\na.png,1\nb.png,1\na.png,2\n",
            None,
            "row 3 gives 'a.png' a second label: correct it, or select rows",
        ),
        ("file,label\na.png,1\n", None, "has no (single) label for b.png, c.png, sub/d.png: add rows"),
        (
            "file,label\nz.png,1\n",
            None,
            "label for a.png, b.png, c.png and 2 more: add rows 'file,label', or select",
        ),
        ("file,label,split\nz.png,1,dev\n", "dev", "none of the 5 images in"),
        (
            "file,label\nx/a.png,1\ny/a.png,2\nb.png,1\nc.png,1\nd.png,1\n",
            None,
            "label for a.png, sub/a.png: add rows",
        ),
    ],
)
def test_bad_tables_say_what_is_wrong(folder: Path, text: str, split: str | None, message: str) -> None:
    labels = table(folder, text)
    with pytest.raises(DataError) as caught:
        load_dataset(folder, [IMAGE], labels=labels, split=split)
    assert message in str(caught.value)
    assert str(labels) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_files_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read label file '.*none\.csv': No such file"):
        load_dataset(folder, [IMAGE], labels=tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="is no CSV text: give columns file,label"):
        load_dataset(folder, [IMAGE], labels=tmp_path / "binary.csv")
    with pytest.raises(DataError, match=r"cannot read '.*none\.npz': No such file"):
        load_dataset(folder, [IMAGE], labels=tmp_path / "none.npz")
    np.savez(tmp_path / "y.npz", y=np.arange(5))
    with pytest.raises(DataError, match=r"has no array 'labels': give an \.npz with labels \[5\] or a CSV"):
        load_dataset(folder, [IMAGE], labels=tmp_path / "y.npz")


@pytest.mark.parametrize("labels", [np.arange(4), np.arange(6), np.int64(3)])
def test_labels_of_another_length(folder: Path, tmp_path: Path, labels: NDArray[np.int64]) -> None:
    np.savez(tmp_path / "y.npz", labels=labels)
    np.savez(tmp_path / "x.npz", images=np.zeros((5, 4, 4, 3), np.uint8), labels=labels)
    ready = [np.zeros((3, 4, 4), np.float32)] * 5
    cases: list[tuple[DataSource, Path | None]] = [
        (folder, tmp_path / "y.npz"),
        (tmp_path / "x.npz", None),
        (ready, tmp_path / "y.npz"),
    ]
    for spec, file in cases:
        with pytest.raises(
            DataError, match=r"array 'labels' in '.*' has shape \[\d?\] for 5 samples: give one label per"
        ):
            load_dataset(spec, [IMAGE], labels=file)


def test_labels_that_are_no_whole_numbers_or_have_no_files(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0.5, 1.0]))
    with pytest.raises(
        DataError, match=r"array 'labels' in '.*x\.npz' has dtype float64: labels are whole numbers"
    ):
        load_dataset(tmp_path / "x.npz", [IMAGE])
    labels = table(folder, "file,label\na.png,1\n")
    with pytest.raises(
        DataError, match=r"is matched by file name, but '.*x\.npz' has no files: give an \.npz with"
    ):
        load_dataset(tmp_path / "x.npz", [IMAGE], labels=labels)
    with pytest.raises(
        DataError, match="split 'dev' selects rows of a label CSV: name it with --validation-labels"
    ):
        load_dataset(folder, [IMAGE], split="dev")
    mixed = [(np.zeros((3, 4, 4), np.float32), 1), np.zeros((3, 4, 4), np.float32)]
    with pytest.raises(
        DataError, match="sample 1 of the list of samples differs from the first in batch size or in"
    ):
        list(load_dataset(mixed, [IMAGE]).batches(2))
    with pytest.raises(
        DataError, match="only 1 of 2 samples of the list_iterator of samples have a label: give all"
    ):
        load_dataset(iter(mixed), [IMAGE])
