"""The ablations of the POT paper: their recipes, the cache, the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools.loading import tool

pot = tool("reproduce_pot")


def rows() -> list[Any]:
    return [row for table in pot.TABLES for row in table.rows]


def outcome(top1: float) -> dict[str, Any]:
    return {
        "dense": {"top1": 91.0},
        "sparse": {"top1": top1},
        "interval": {"top1": [top1 - 91.0, -2.0, 1.0]},
        "zeros": 50,
        "weights": 100,
        "seconds": 1.0,
    }


def test_every_row_is_a_recipe_of_its_own() -> None:
    recipes = [pot.recipe_of(row, 70) for row in rows()]
    assert all(recipe.sparsity == 0.7 and not recipe.quantization.enabled for recipe in recipes)
    for table in pot.TABLES:
        keys = [pot.recipe_of(row, 50).dump() for row in table.rows]
        assert len(set(keys)) == len(keys)


def test_both_rows_of_the_schedule_take_the_same_number_of_updates() -> None:
    (table,) = (table for table in pot.TABLES if table.key == "6")
    without, scheduled = (pot.recipe_of(row, 50) for row in table.rows)
    assert (without.schedule.kind, scheduled.schedule.kind) == ("one_shot", "cubic")
    assert scheduled.schedule.start == "previous"
    steps = scheduled.schedule.iterations + 1
    assert without.reconstruction.tuning.iterations == steps * scheduled.reconstruction.tuning.iterations


def test_tables_come_from_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table,) = (table for table in pot.TABLES if table.key == "5")
    cache = tmp_path / "cache.jsonl"
    records = [{"name": pot.name_of("net", 50, row), "outcome": outcome(90.5)} for row in table.rows[:2]]
    cache.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["--cache", str(cache), "--network", "net", "--sparsity", "50", "--table", "5", "--render-only"]
    assert pot.main(given) == 0
    text = capsys.readouterr().out
    assert "Dense: net 91.00." in text
    assert "| 1e-6 | 90.50 (-0.50 [-2.00, +1.00]) | 67.78 |" in text
    assert "1e-5" not in text  # not a row that has not run anywhere
    assert "Table 4" not in text


def test_only_what_is_missing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def instead(network: str, recipe: Any, folder: Path, zoo: Any) -> dict[str, Any]:
        ran.append((network, recipe.sparsity))
        return outcome(80.0)

    monkeypatch.setattr(pot, "run", instead)
    (tmp_path / "zoo.json").write_text(json.dumps({"net": {}}))
    given = ["--zoo", str(tmp_path), "--cache", str(tmp_path / "cache"), "--network", "net", "--table", "4"]
    assert pot.main([*given, "--sparsity", "50"]) == 0
    assert ran == [("net", 0.5)] * 3
    assert pot.main(given) == 0
    assert ran[3:] == [("net", 0.7)] * 3


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pot.main(["--zoo", str(tmp_path / "nothing"), "--cache", "cache"])
    assert "name the folder with --zoo" in capsys.readouterr().err
    (tmp_path / "zoo.json").write_text(json.dumps({"other": {}}))
    with pytest.raises(SystemExit):
        pot.main(["--zoo", str(tmp_path), "--cache", "cache"])
    assert "the zoo has no network 'resnet20_akamaster_cifar10'; it has other" in capsys.readouterr().err
