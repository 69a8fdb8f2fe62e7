"""The schema is what is documented, and a report survives being written and read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pot_sparsity.errors import UserError
from pot_sparsity.report.io import read_report, write_report
from pot_sparsity.report.schema import SCHEMA_VERSION, Report

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(__file__).parent / "sample_report.json"


@pytest.fixture
def report() -> Report:
    return read_report(SAMPLE)


def test_a_committed_report_can_still_be_read(report: Report) -> None:
    assert report.schema_version == SCHEMA_VERSION
    assert [variant.name for variant in report.variants] == ["dense", "dense_int8", "sparse", "sparse_int8"]


def test_written_and_read_again(report: Report, tmp_path: Path) -> None:
    json_path, html_path = write_report(report, tmp_path)
    assert (json_path, html_path) == (tmp_path / "report.json", tmp_path / "report.html")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert read_report(tmp_path) == read_report(json_path) == report
    first = json_path.read_bytes(), html_path.read_bytes()
    write_report(report, tmp_path)
    assert (json_path.read_bytes(), html_path.read_bytes()) == first


def test_unknown_fields_are_refused(report: Report) -> None:
    with pytest.raises(ValidationError, match="surprise"):
        Report.model_validate(report.model_dump() | {"surprise": 1})


def test_nan_is_refused_and_nothing_written(report: Report, tmp_path: Path) -> None:
    report.seconds = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report, tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    report.seed = 7
    with pytest.raises(OSError, match="No space left"):
        write_report(report, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a report: it is not JSON"),
        ("[]", "is not a report of schema version 1"),
        ('{"schema_version": "2.0"}', "is not a report of schema version 1"),
        ('{"schema_version": "1.0"}', "is not a valid report: status: Field required"),
    ],
)
def test_what_is_not_a_report(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_report(tmp_path)


def test_no_report_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read report .*: No such file"):
        read_report(tmp_path / "report.json")


def test_the_documentation_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_report_schema.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_every_field_is_in_the_documentation(report: Report) -> None:
    page = (ROOT / "docs" / "report-schema.md").read_text()

    def keys(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*(keys(item) for item in value))
        if isinstance(value, dict):
            return set(value).union(*(keys(item) for item in value.values()))
        return set()

    free = {"recipe", "packages", "metrics", "metrics_before", "metrics_after", "interval"}
    data = json.loads(SAMPLE.read_text())
    fixed = keys(data) - set().union(*(keys(found) for found in _values_of(data, free)))
    assert len(fixed) > 60
    assert not [key for key in fixed if f"`{key}`" not in page]


def _values_of(value: object, names: set[str]) -> list[object]:
    if isinstance(value, list):
        return [found for item in value for found in _values_of(item, names)]
    if isinstance(value, dict):
        here = [item for key, item in value.items() if key in names]
        return here + [found for item in value.values() for found in _values_of(item, names)]
    return []
