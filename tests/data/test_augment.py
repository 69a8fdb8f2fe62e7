from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pot_sparsity.data import Augmented, Batch, Dataset, load_dataset, split_holdout
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import TensorInfo


def images(n: int = 5, *, nhwc: bool = False, labels: bool = False) -> tuple[Dataset, NDArray[np.float32]]:
    shape = (n, 16, 8, 3) if nhwc else (n, 3, 16, 8)
    x = np.random.default_rng(n).standard_normal(shape).astype(np.float32)
    info = TensorInfo("data", (None, *shape[1:]), np.dtype(np.float32))
    if labels:
        return load_dataset([(row, i) for i, row in enumerate(x)], [info]), x
    return load_dataset(x, [info]), x


def values(dataset: Dataset, size: int) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(batch.inputs["data"], np.float64) for batch in dataset.batches(size)])


def padded_crops(x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """All crops of an edge-padded [C, 16, 8] image, plain and mirrored."""
    big = np.pad(x, ((0, 0), (2, 2), (1, 1)), mode="edge")
    crops = [big[:, top : top + 16, left : left + 8] for top in range(5) for left in range(3)]
    return crops + [crop[:, :, ::-1] for crop in crops]


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("kinds", [("flip",), ("crop",), ("flip", "crop")])
def test_copies_are_flips_and_crops_of_their_sample(kinds: tuple[str, ...], nhwc: bool) -> None:
    dataset, x = images(nhwc=nhwc)
    got = values(Augmented(dataset, kinds, 6, seed=3), 7)
    assert got.shape == (30, *x.shape[1:])
    for position, image in enumerate(got):
        sample = x[position // 6]
        if position % 6 == 0:
            np.testing.assert_array_equal(image, sample)
            continue
        plain = sample.transpose(2, 0, 1) if nhwc else sample
        image = image.transpose(2, 0, 1) if nhwc else image
        candidates = {
            ("flip",): [plain, plain[:, :, ::-1]],
            ("crop",): padded_crops(plain)[:15],
            ("flip", "crop"): padded_crops(plain),
        }[kinds]
        assert sum(np.array_equal(image, candidate) for candidate in candidates) == 1
    assert len(np.unique(got.reshape(30, -1), axis=0)) > (8 if kinds == ("flip",) else 20)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.data())
def test_batches_and_subsets_change_no_sample(size: int, factor: int, data: st.DataObject) -> None:
    dataset, _ = images(4, labels=True)
    augmented = Augmented(dataset, ("flip", "crop"), factor, seed=1)
    whole = values(augmented, len(augmented))
    assert len(augmented) == 4 * factor
    np.testing.assert_array_equal(values(augmented, size), whole)
    indices = np.array(data.draw(st.lists(st.integers(0, 4 * factor - 1), min_size=1)), np.int64)
    part = augmented.subset(indices)
    assert len(part) == len(indices)
    np.testing.assert_array_equal(values(part, size), whole[indices])
    labels = [batch.labels for batch in part.batches(size) if batch.labels is not None]
    np.testing.assert_array_equal(np.concatenate(labels), indices // factor)
    assert part.has_labels


def test_seed_and_settings_are_in_the_fingerprint() -> None:
    dataset, _ = images()
    base = Augmented(dataset, ("flip",), 3)
    assert base.fingerprint == Augmented(images()[0], ("flip",), 3).fingerprint
    others = [
        Augmented(dataset, ("flip",), 3, seed=1),
        Augmented(dataset, ("crop",), 3),
        Augmented(dataset, ("flip",), 4),
        base.subset(np.arange(3)),
        Augmented(images(4)[0], ("flip",), 3),
    ]
    assert len({base.fingerprint, dataset.fingerprint, *(other.fingerprint for other in others)}) == 7
    assert not np.array_equal(values(base, 9), values(others[0], 9))


def test_only_images_are_augmented() -> None:
    rows = load_dataset(np.ones((4, 7), np.float32), [TensorInfo("row", (None, 7), np.dtype(np.float32))])
    with pytest.raises(DataError, match=r"input 'row' of shape \[\?,7\] is no image .*: leave out --augment"):
        Augmented(rows, ("flip",), 2)
    maps = load_dataset(
        np.ones((4, 8, 4, 4), np.float32), [TensorInfo("m", (None, 8, 4, 4), np.dtype(np.float32))]
    )
    with pytest.raises(DataError, match=r"input 'm' of shape \[\?,8,4,4\] is no image"):
        Augmented(maps, ("flip",), 2)
    assert len(Augmented(maps, ("flip",), 2, layout="NCHW")) == 8


@pytest.mark.parametrize(
    ("kinds", "factor", "message"),
    [
        (("rotate",), 2, "augmentation 'rotate' is not known: use flip or crop"),
        (("flip",), 0, "augmentation factor 0 with kinds"),
        ((), 2, "give a factor >= 1 and --augment flip,crop"),
    ],
)
def test_bad_settings(kinds: tuple[str, ...], factor: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augmented(images()[0], kinds, factor)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 9))
def test_holdout_splits_every_sample_once(n: int, fraction: float, seed: int) -> None:
    x = np.arange(n, dtype=np.float32)[:, None]
    info = TensorInfo("data", (None, 1), np.dtype(np.float32))
    fit, held = split_holdout(load_dataset(x, [info]), fraction, seed)
    again = split_holdout(load_dataset(x, [info]), fraction, seed)
    assert len(held) == min(n - 1, max(1, round(fraction * n)))
    ids = values(fit, 7)[:, 0], values(held, 7)[:, 0]
    assert all((np.diff(part) > 0).all() for part in ids)
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), x[:, 0])
    np.testing.assert_array_equal(values(again[1], 5)[:, 0], ids[1])


def test_what_cannot_be_split_is_both_parts() -> None:
    dataset, _ = images(1)
    assert split_holdout(dataset) == (dataset, dataset)
    several, _ = images(4)
    assert split_holdout(several, 0.0) == (several, several)
    with pytest.raises(ValueError, match=r"held-out fraction 1.0 is not in 0 <= fraction < 1"):
        split_holdout(several, 1.0)


def test_labels_stay_with_their_samples() -> None:
    dataset, x = images(9, labels=True)
    for part in split_holdout(dataset, 0.4):
        for batch in part.batches(2):
            assert isinstance(batch, Batch)
            assert batch.labels is not None
            np.testing.assert_array_equal(batch.inputs["data"], x[batch.labels])
