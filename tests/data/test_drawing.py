"""Samples drawn over and over: each once per epoch, varied as images may be, and nothing left behind on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.dataset import Batch
from pot_sparsity.data.drawing import READ, Drawn
from pot_sparsity.errors import DataError

SIZE = (16, 8)


class Rows:
    """Samples of any type and shape by input name."""

    has_labels = False
    fingerprint = "rows"

    def __init__(self, **arrays: AnyArray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch({name: array[start : start + size] for name, array in self.arrays.items()})

    def subset(self, indices: NDArray[np.int64]) -> Rows:
        return Rows(**{name: array[indices] for name, array in self.arrays.items()})


class Broken(Rows):
    """Cannot be read beyond the first batch."""

    def batches(self, size: int) -> Iterator[Batch]:
        yield next(super().batches(size))
        raise DataError("sample 33 cannot be read")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go in these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def epochs(rows: Rows, size: int, count: int = 1, *, vary: bool = True, seed: int = 0) -> list[Batch]:
    """All batches of some epochs."""
    with Drawn(rows, vary=vary, seed=seed) as drawn:
        return [batch for _ in range(count) for batch in drawn.epoch(size)]


def joined(batches: list[Batch], name: str = "x") -> AnyArray:
    return np.concatenate([batch.inputs[name] for batch in batches])


# without variations


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3 * READ), st.integers(1, 40), st.integers(0, 5))
def test_every_sample_once_per_epoch(count: int, size: int, seed: int) -> None:
    rows = Rows(x=normal(count, 3), number=np.arange(count))
    with Drawn(rows, vary=False, seed=seed) as drawn:
        for _ in range(2):
            batches = list(drawn.epoch(size))
            assert len(batches) == max(1, count // size)
            assert all(batch.size == size for batch in batches)
            numbers = joined(batches, "number")
            drawn_times = np.bincount(numbers, minlength=count)
            if count >= size:
                assert drawn_times.max() == 1
            else:
                assert drawn_times.max() - drawn_times.min() <= 1
            found = joined(batches)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, rows.arrays["x"][numbers])


def test_each_epoch_has_an_order_of_its_own() -> None:
    numbers = [batch.inputs["x"] for batch in epochs(Rows(x=np.arange(64)), 64, 3, vary=False)]
    np.testing.assert_array_equal(np.sort(numbers, axis=1), np.tile(np.arange(64), (3, 1)))
    assert len(np.unique([np.arange(64), *numbers], axis=0)) == 4


def test_what_is_done_to_a_batch_does_not_reach_the_samples() -> None:
    rows = Rows(x=normal(8, 3, *SIZE))
    kept = rows.arrays["x"].copy()
    with Drawn(rows, vary=True, seed=0) as drawn:
        for _ in range(5):
            for batch in drawn.epoch(4):
                batch.inputs["x"][...] = np.nan
        assert all(np.isfinite(batch.inputs["x"]).all() for batch in drawn.epoch(4))
    np.testing.assert_array_equal(rows.arrays["x"], kept)


# with variations


@pytest.mark.parametrize("beside", [{}, {"x": normal(40, 3, *SIZE)}], ids=["alone", "beside images"])
def test_whole_numbers_are_left_alone(beside: Mapping[str, AnyArray]) -> None:
    """And so is all that a model reads beside them: a picture mixed with another would go with neither number."""
    rows = Rows(number=np.arange(40), **beside)
    batches = epochs(rows, 8, 4)
    for name, array in rows.arrays.items():
        np.testing.assert_array_equal(joined(batches, name), array[joined(batches, "number")])


def moved(x: AnyArray, *, nhwc: bool = False) -> list[AnyArray]:
    """What an image may become: crops of itself with its edge repeated by an eighth, plain and mirrored."""
    image = x.transpose(2, 0, 1) if nhwc else x
    tall, wide = SIZE[0] // 8, SIZE[1] // 8
    big = np.pad(image, ((0, 0), (tall, tall), (wide, wide)), mode="edge")
    crops = [
        big[:, top : top + SIZE[0], left : left + SIZE[1]]
        for top in range(2 * tall + 1)
        for left in range(2 * wide + 1)
    ]
    both = crops + [crop[:, :, ::-1] for crop in crops]
    return [crop.transpose(1, 2, 0) for crop in both] if nhwc else both


@pytest.mark.parametrize("nhwc", [False, True])
def test_images_are_mirrored_and_shifted(nhwc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawn, "_mixed", lambda self, batch: batch)
    shape = (*SIZE, 3) if nhwc else (3, *SIZE)
    rows = Rows(x=normal(6, *shape))
    found = joined(epochs(rows, 6, 60))
    candidates = [moved(image, nhwc=nhwc) for image in rows.arrays["x"]]
    seen = [{i for i, c in enumerate(per) if (found == c).all(axis=(1, 2, 3)).any()} for per in candidates]
    matches = [sum(int(np.array_equal(image, c)) for per in candidates for c in per) for image in found]
    assert set(matches) == {1}
    assert set.union(*seen) == set(range(30))  # 5 x 3 shifts, plain and mirrored


def test_maps_that_are_no_images_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawn, "_mixed", lambda self, batch: batch)
    for shape in ((8, *SIZE), (16,), (3, 16)):
        rows = Rows(x=normal(12, *shape))
        found = joined(epochs(rows, 12))
        assert sorted(map(bytes, found)) == sorted(map(bytes, rows.arrays["x"]))


def shares(found: AnyArray, batch: AnyArray) -> list[tuple[int, int, float]]:
    """By row, the two samples it is made of and the weight of the first, by trying all pairs; fails without such."""
    result = []
    plain = batch.reshape(len(batch), -1).astype(np.float64)
    for row in found.reshape(len(found), -1).astype(np.float64):
        best: tuple[float, int, int, float] = (np.inf, 0, 0, 1.0)
        for i, one in enumerate(plain):
            for j, other in enumerate(plain):
                line = one - other
                share = float((row - other) @ line / (line @ line)) if i != j else 1.0
                error = float(np.abs(share * one + (1 - share) * other - row).max())
                if -1e-5 <= share <= 1 + 1e-5 and error < best[0] - 1e-6:
                    best = error, i, j, share
        assert best[0] < 1e-5
        result.append(best[1:])
    return result


def test_mixed_samples_lie_between_two_with_one_weight_for_all_inputs() -> None:
    rows = Rows(x=normal(7, 5), z=normal(7, 2, 3, seed=1))
    for batch in epochs(rows, 7, 8):
        pairs = shares(batch.inputs["x"], rows.arrays["x"])
        mixed = [
            share * rows.arrays["z"][i].astype(np.float64) + (1 - share) * rows.arrays["z"][j]
            for i, j, share in pairs
        ]
        np.testing.assert_allclose(batch.inputs["z"], mixed, atol=1e-5)


def test_about_half_of_the_samples_are_mixed_with_weights_from_0_to_1() -> None:
    rows = Rows(x=normal(8, 5))
    found = [pair for batch in epochs(rows, 8, 60) for pair in shares(batch.inputs["x"], rows.arrays["x"])]
    weights = np.array([share for i, j, share in found if i != j and 1e-4 < share < 1 - 1e-4])
    # 1/2 of 480 minus those that are their own partner, 1 in 8
    assert len(weights) / len(found) == pytest.approx(0.5 * 7 / 8, abs=0.08)
    folded = np.maximum(weights, 1 - weights)
    np.testing.assert_allclose(np.quantile(folded, [0.25, 0.5, 0.75]), [0.625, 0.75, 0.875], atol=0.05)


@pytest.mark.parametrize("nhwc", [False, True])
def test_images_are_moved_before_they_are_mixed(nhwc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(x=normal(4, *((*SIZE, 1) if nhwc else (1, *SIZE))))
    before: list[AnyArray] = []
    genuine = Drawn._mixed

    def watched(self: Drawn, batch: dict[str, AnyArray]) -> dict[str, AnyArray]:
        before.append(batch["x"].copy())
        return genuine(self, batch)

    monkeypatch.setattr(Drawn, "_mixed", watched)
    allowed = [image for x in rows.arrays["x"] for image in moved(x, nhwc=nhwc)]
    for batch, images in zip(epochs(rows, 4, 10), before, strict=True):
        assert all(any(np.array_equal(image, other) for other in allowed) for image in images)
        shares(batch.inputs["x"], images)


def test_half_precision_stays_half_precision() -> None:
    rows = Rows(x=normal(8, 5).astype(np.float16))
    batches = epochs(rows, 4, 4)
    assert joined(batches).dtype == np.float16
    assert np.abs(joined(batches)).max() <= np.abs(rows.arrays["x"]).max() * 1.01


# draws


def test_the_seed_decides_all_draws() -> None:
    rows = Rows(x=normal(12, 3, *SIZE))
    first, again, other = (joined(epochs(rows, 5, 2, seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# what stays behind


def test_the_file_is_gone_behind_the_last_draw(temporary: Path) -> None:
    with Drawn(Rows(x=normal(3, 4)), vary=True, seed=0) as drawn:
        next(drawn.epoch(2))
        assert len(list(temporary.iterdir())) == 1
    assert not list(temporary.iterdir())


def test_a_full_disk_is_an_error_of_the_data(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, limit = Path.open, 100

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.written = file, 0

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *what: object) -> None:
            self.file.close()

        def write(self, data: Any) -> None:
            self.written += memoryview(data).nbytes
            if self.written > limit:
                raise OSError(28, "No space left on device")
            self.file.write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode="r": Full(genuine(path, mode)))
    with pytest.raises(DataError, match=r"temporary file: No space left on device"):
        Drawn(Rows(x=normal(30, 4)), vary=True, seed=0)
    assert not list(temporary.iterdir())


def test_the_file_is_gone_after_an_error(temporary: Path) -> None:
    def interrupted() -> None:
        with Drawn(Rows(x=normal(3, 4)), vary=True, seed=0) as drawn:
            next(drawn.epoch(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(temporary.iterdir())


def test_the_file_is_gone_when_samples_cannot_be_read(temporary: Path) -> None:
    with pytest.raises(DataError, match="sample 33"):
        Drawn(Broken(x=normal(READ + 3, 4)), vary=True, seed=0)
    assert not list(temporary.iterdir())
