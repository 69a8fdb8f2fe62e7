"""The run directory: checked before it is touched, resumed only by the same run, never half written."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from pot_sparsity.errors import OutputError
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.pipeline import runfolder
from pot_sparsity.pipeline.runfolder import RunFolder, write_text
from tests.pipeline.nets import plain_net

MARK = {"model": "abc", "recipe": {"sparsity": 0.5}}
ARRAYS = {"weight": np.arange(6.0).reshape(2, 3), "bias0": np.ones(2)}


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def opened(path: Path, *, resume: bool = False, force: bool = False) -> RunFolder:
    folder = RunFolder(path, resume=resume, force=force)
    folder.open(MARK)
    return folder


def refused(match: str, action: Callable[[], object]) -> None:
    with pytest.raises(OutputError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_nothing_is_made_before_it_is_opened(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    assert folder.load("x") is None
    assert not folder.has("x")
    assert tree(tmp_path) == []
    folder.open(MARK)
    assert tree(tmp_path / "a" / "b") == ["state", "state/run.json"]


def test_without_a_path_everything_is_forgotten() -> None:
    folder = RunFolder(None)
    folder.check_resumable(MARK)
    folder.open(MARK)
    folder.store("x", ARRAYS)
    assert folder.load("x") is None
    folder.finish_state()


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused("is a file; give a folder", lambda: RunFolder(tmp_path / "out"))
    refused("is not writable; give another", lambda: RunFolder(tmp_path / "out" / "below"))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("is not writable; give another", lambda: RunFolder(tmp_path / "out"))
    refused("is not writable; give another", lambda: RunFolder(tmp_path))


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    refused("cannot be used: Permission denied; give another", lambda: RunFolder(tmp_path))


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    refused("give another with -o", lambda: RunFolder(tmp_path / ("n" * 300)))


@pytest.mark.parametrize("left", ["report.json", "recipe.yaml", "model.onnx", "model.xml", "state"])
def test_a_folder_that_holds_a_run(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir() if left == "state" else (tmp_path / left).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    refused("already holds a run; use --resume to go on, --force", lambda: RunFolder(tmp_path))
    assert tree(tmp_path) == before
    opened(tmp_path, force=True)
    assert tree(tmp_path) == ["notes.txt", "state", "state/run.json"]


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for named in ({}, {"force": True}, {"resume": True}):
        refused("is not empty and holds no run", lambda named=named: RunFolder(tmp_path, **named))  # type: ignore[misc]
    assert tree(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    opened(tmp_path)
    opened(tmp_path / "new", resume=True)
    assert tree(tmp_path / "new") == ["state", "state/run.json"]


def test_state_comes_back_bit_for_bit_in_a_resumed_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = opened(out)
    first.store("iteration-0.5/prune/conv/1", ARRAYS)
    second = RunFolder(out, resume=True)
    second.check_resumable(MARK)
    second.open(MARK)
    found = second.load("iteration-0.5/prune/conv/1")
    assert found is not None
    assert found.keys() == ARRAYS.keys()
    assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    assert second.load("iteration-0.5/prune/conv/2") is None
    assert not second.has("iteration-0.5/prune/conv")


def test_a_resumed_run_must_be_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    opened(out).store("x", ARRAYS)
    before = tree(out)
    other = {**MARK, "recipe": {"sparsity": 0.6}}
    refused("another model, data, recipe", lambda: RunFolder(out, resume=True).check_resumable(other))
    refused("another model, data, recipe", lambda: RunFolder(out, resume=True).open(other))
    assert tree(out) == before
    folder = RunFolder(out, force=True)
    folder.open(other)
    assert folder.load("x") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": 3}', "\udc80"])
def test_a_damaged_mark_belongs_to_no_run(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    opened(out)
    (out / "state" / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused("use --force to start over", lambda: opened(out, resume=True))


def test_a_finished_run_is_not_resumed_but_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = opened(out)
    write_text(out / "report.json", "{}")
    folder.finish_state()
    refused("finished: there is nothing to resume; use --force", lambda: RunFolder(out, resume=True))
    assert tree(out) == ["report.json"]


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_damaged_state_is_computed_again(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    folder = opened(out)
    folder.store("x", ARRAYS)
    (file,) = (out / "state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    assert opened(out, resume=True).load("x") is None
    assert "damaged and will be computed again" in caplog.text
    folder.store("x", ARRAYS)
    assert opened(out, resume=True).load("x") is not None


def full(*args: object, **kwargs: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_opening_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full)
    refused("the disk is full: .* free some space", lambda: opened(tmp_path / "out"))
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space"), SafetensorError("No space left on device")]
)
def test_full_disk_while_storing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    folder = opened(tmp_path / "out")

    def half(arrays: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(runfolder, "save_file", half)
    refused("the disk is full: .* use --resume", lambda: folder.store("x", ARRAYS))
    assert tree(tmp_path / "out") == ["state", "state/run.json"]
    assert folder.load("x") is None


def test_full_disk_while_saving_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", full)
    refused("No space left on device", lambda: folder.save(OnnxModel(plain_net()), None))
    assert tree(tmp_path / "out") == ["state", "state/run.json"]


def test_text_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    write_text(path, "old: ü\n")
    monkeypatch.setattr(os, "replace", full)
    refused("the disk is full", lambda: write_text(path, "new"))
    assert path.read_text(encoding="utf-8") == "old: ü\n"
    assert tree(tmp_path) == ["recipe.yaml"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_log_is_written_once_there_is_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    logger = logging.getLogger("pot_sparsity.test")
    folder = RunFolder(out)

    def work() -> None:
        logger.info("before")
        folder.open(MARK)
        logger.info("after")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder.logging():
        work()
    text = (out / "run.log").read_text(encoding="utf-8")
    assert "INFO pot_sparsity.test: before" in text
    assert "after" in text
    assert "KeyboardInterrupt" in text
    assert logging.getLogger("pot_sparsity").handlers == []


def test_a_run_that_fails_before_its_folder_exists_logs_nowhere(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    with pytest.raises(ValueError, match="no"), folder.logging():
        raise ValueError("no")
    assert tree(tmp_path) == []


def test_a_finished_state_is_dropped(tmp_path: Path) -> None:
    folder = opened(tmp_path / "out")
    folder.store("x", ARRAYS)
    assert json.loads((tmp_path / "out" / "state" / "run.json").read_text())["fingerprint"]
    folder.finish_state()
    assert tree(tmp_path / "out") == []
