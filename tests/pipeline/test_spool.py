"""Batches kept between stages: what comes back is what went in, and no file outlives its spool."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pot_sparsity.errors import OutputError
from pot_sparsity.pipeline.spool import Spool


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that temporary files go to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def batch(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "a": random.normal(size=(4, 8)),
        "b/c:0": random.integers(0, 9, (2, 3)),
        "": np.full(1, seed, np.float32),
    }


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name])
        for name in expected
    )


@pytest.mark.parametrize("budget", [0, 300, 700, 10**6])
def test_what_comes_back_is_what_went_in_wherever_it_was_kept(scratch: Path, budget: int) -> None:
    with Spool(budget) as spool:
        for seed in range(5):
            spool.append(batch(seed))
        assert len(spool) == 5
        assert bool(files(scratch)) == (budget < 10**6)
        assert all(same(found, batch(seed)) for seed, found in enumerate(spool))
        assert same(spool.read(3), batch(3))
        assert same(spool.read(1), batch(1))
    assert list(scratch.iterdir()) == []


def test_memory_is_filled_first_and_freed_by_dropping(scratch: Path) -> None:
    one = {"x": np.ones(10, np.float64)}
    with Spool(160) as spool:
        spool.append(one)
        spool.append(one)
        assert not files(scratch)
        spool.append(one)
        assert len(files(scratch)) == 1
        spool.drop(0)
        spool.append(one)
        assert len(files(scratch)) == 1
        spool.drop(2)
        assert not files(scratch)
        assert spool.read(0) == {}
        assert same(spool.read(3), one)


def test_files_vanish_when_an_exception_passes(scratch: Path) -> None:
    spool = Spool(0)
    spool.append(batch(0))
    assert files(scratch)
    with pytest.raises(KeyboardInterrupt), spool:
        raise KeyboardInterrupt
    assert list(scratch.iterdir()) == []
    assert len(spool) == 0


def test_a_full_disk_is_one_clear_line(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with Spool(0) as spool, pytest.raises(OutputError, match=r"the disk is full: .* free some space"):
        spool.append(batch(0))
    assert list(scratch.iterdir()) == []
