"""Recipes: reading, overriding, and what a typing error says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pot_sparsity.cli import main
from pot_sparsity.errors import RecipeError
from pot_sparsity.recipe import known_keys, load_recipe, shipped_recipes, validate_recipe

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def test_every_yaml_in_configs_ships() -> None:
    assert shipped_recipes() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert {"default", "pot"} <= set(shipped_recipes())


def test_the_command_line_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"one that ships: {', '.join(shipped_recipes())}." in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    by_file, by_name = load_recipe(path), load_recipe(path.stem)
    assert by_file == by_name
    assert validate_recipe(yaml.safe_load(by_file.dump())) == by_file


def test_pot_is_as_published() -> None:
    recipe = load_recipe("pot")
    assert recipe.allocation.method == "l2_normalized_magnitude"
    assert recipe.pruning.method == "magnitude"
    assert (recipe.schedule.kind, recipe.schedule.initial, recipe.schedule.iterations) == ("cubic", 0.1, 10)
    assert recipe.schedule.start == "previous"
    assert recipe.correction.weights == "published"
    fit = recipe.reconstruction
    assert (fit.method, fit.input, fit.when) == ("tuning", "dense", "always")
    assert (fit.tuning.optimizer, fit.tuning.loss, fit.tuning.batch_size) == ("adam", "mse", 50)
    assert (fit.tuning.learning_rate, fit.tuning.bias_learning_rate) == (1e-5, 1e-4)
    assert fit.tuning.weight_decay == 0.0
    assert recipe.quantization.preset == "performance"


def test_default_is_used_when_nothing_is_named() -> None:
    assert load_recipe() == load_recipe("default")


def test_a_mapping_is_not_changed_by_overrides() -> None:
    source = {"sparsity": 0.3, "pruning": {"method": "magnitude"}}
    recipe = load_recipe(source, ["pruning.method=admm", "sparsity=0.4"])
    assert (recipe.sparsity, recipe.pruning.method) == (0.4, "admm")
    assert source == {"sparsity": 0.3, "pruning": {"method": "magnitude"}}


def test_overrides_are_yaml_and_come_in_order() -> None:
    overrides = [
        "sparsity=0.7",
        "calibration.augment=[flip, crop]",
        "schedule.max_drop=1",
        "quantization.enabled=no",
        "sparsity=0.8",
    ]
    recipe = load_recipe(None, overrides)
    assert recipe.sparsity == 0.8
    assert recipe.calibration.augment == ("flip", "crop")
    assert recipe.schedule.max_drop == 1.0
    assert recipe.quantization.enabled is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsty=0.5", "unknown recipe key 'sparsty'; did you mean 'sparsity'?"),
        ("pruning.metod=admm", "unknown recipe key 'pruning.metod'; did you mean 'pruning.method'?"),
        ("max_drop=1", "unknown recipe key 'max_drop'; did you mean 'schedule.max_drop'?"),
        ("prunning.method=admm", "unknown recipe key 'prunning'; did you mean 'pruning'?"),
        ("sparsity", "--set 'sparsity' must look like key.path=value"),
        ("pruning.method.x=1", "--set 'pruning.method.x=1': 'method' is a single value, not a section"),
        ("sparsity.x=1", "recipe key 'sparsity': Input should be a valid number (got {'x': 1})"),
        ("sparsity={", "--set 'sparsity={': the value is not valid YAML"),
        ("sparsity=1.5", "recipe key 'sparsity': Input should be less than or equal to 1 (got 1.5)"),
        ("sparsity=.nan", "recipe key 'sparsity': Input should be less than or equal to 1 (got nan)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [override])
    assert str(caught.value) == message


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown pruning method 'adm'; did you mean 'admm'\? \(known: "):
        load_recipe({"pruning": {"method": "adm"}})
    with pytest.raises(RecipeError, match="unknown allocation 'unifrm'; did you mean 'uniform'"):
        load_recipe({"allocation": {"method": "unifrm"}})


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"cannot read recipe 'nothing': No such file .* one of default, .*pot"
    ):
        load_recipe("nothing")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match="must be a mapping of keys, got list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("sparsity: 0.5\npruning: [\n")
    with pytest.raises(RecipeError, match="is not valid YAML at line 3"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "object.yaml").write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_recipe(tmp_path / "object.yaml")


def test_an_empty_file_is_the_defaults_of_the_schema(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_recipe(tmp_path / "empty.yaml") == validate_recipe({})


def test_every_key_is_described() -> None:
    assert not [key for key, text in known_keys().items() if not text]


def test_corrections_and_when_they_are_kept() -> None:
    recipe = load_recipe({"correction": {"weights": "exact", "bias": "helps"}}, ["correction.bias=false"])
    assert (recipe.correction.weights, recipe.correction.weights_when) == ("exact", "helps")
    assert recipe.correction.bias is False
    assert load_recipe({"correction": {"bias": "helps"}}).correction.bias == "helps"
    assert load_recipe("pot").correction.weights_when == "always"
    with pytest.raises(
        RecipeError, match=r"recipe key 'correction\.bias': Input should be True, False or 'helps'"
    ):
        load_recipe({"correction": {"bias": "always"}})
    with pytest.raises(RecipeError, match=r"'correction\.clip': it must be \[smallest, largest\] with 0 <"):
        load_recipe(None, ["correction.clip=[1.5, 2]"])


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "block:4", "unstructured"])
def test_patterns_need_no_quotes(tmp_path: Path, pattern: str) -> None:
    """To YAML 1.1, 2:4 is a number in base 60."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"pruning:\n  pattern: {pattern}\nsparsity: 0.5\nseed: 12\n")
    for recipe in (load_recipe(path), load_recipe(None, [f"pruning.pattern={pattern}", "seed=12"])):
        assert recipe.pruning.pattern == pattern
        assert (recipe.sparsity, recipe.seed) == (0.5, 12)
        path.write_text(recipe.dump())
        assert load_recipe(path) == recipe
