"""Recipes: one YAML file, or the same words in Python, that names the stages of a run and their settings.

A recipe is read from a file or by the name of one that ships with the package (``default``, ``obc``, ``pot``, ...),
then single keys are overridden (``--set pruning.method=magnitude``). Unknown keys are refused with the nearest known
one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pot_sparsity.allocation_settings import OUTPUT_DISTORTION
from pot_sparsity.errors import RecipeError
from pot_sparsity.settings import (
    CorrectionSettings,
    QuantizationSettings,
    Recipe,
    TuningSection,
)

__all__ = [
    "OUTPUT_DISTORTION",
    "CorrectionSettings",
    "QuantizationSettings",
    "Recipe",
    "TuningSection",
    "known_keys",
    "load_recipe",
    "shipped_recipes",
    "validate_recipe",
]


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("pot_sparsity.configs")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides (values in YAML).

    Parameters
    ----------
    source
        A file, the name of a shipped recipe, a mapping, or None for ``default``.
    overrides
        ``key.path=value`` strings, applied in order.

    Raises
    ------
    RecipeError
        File missing or not YAML, unknown key (the nearest known one is named), illegal value.
    """
    settings = _read(source)
    for text in overrides:
        _override(settings, text)
    return validate_recipe(settings)


def validate_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Validate a nested mapping; RecipeError in one line names the key and what is wrong with it."""
    try:
        return Recipe.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(_unknown_key(path)) from None
        message = str(first["msg"]).removeprefix("Value error, ")
        if not path:
            raise RecipeError(f"recipe: {message}") from None
        raise RecipeError(f"recipe key '{path}': {message} (got {first['input']!r})") from None


def _read(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return _deep_copy(source)
    name = "default" if source is None else str(source)
    if name in shipped_recipes():
        text = resources.files("pot_sparsity.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a text file"
            raise RecipeError(
                f"cannot read recipe {name!r}: {reason}; give a YAML file or one of {', '.join(shipped_recipes())}"
            ) from None
    try:
        settings = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"recipe {name!r} is not valid YAML{where}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise RecipeError(f"recipe {name!r} must be a mapping of keys, got {type(settings).__name__}")
    return settings


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``2:4`` as text, as YAML 1.2 does: to YAML 1.1 it is 124, in base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"[0-9]+:[0-9]+")), *known]
    if first in "123456789"
    else known
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> Any:
    """Python objects of a YAML text."""
    return yaml.load(text, Loader=_Loader)


def _deep_copy(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in source.items()}


def _override(settings: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text!r} must look like key.path=value")
    *parents, last = key.strip().split(".")
    section = settings
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {text!r}: '{parent}' is a single value, not a section")
    try:
        section[last] = _parse(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML") from None


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the recipe with its description."""
    keys: dict[str, str] = {}
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= known_keys(kind, f"{prefix}{name}.")
        else:
            choices = [str(c) for c in get_args(kind) if isinstance(c, str)]
            keys[prefix + name] = (info.description or "") + (f" [{' | '.join(choices)}]" if choices else "")
    return keys


def _unknown_key(path: str) -> str:
    known = known_keys()
    sections = sorted({key.rsplit(".", 1)[0] for key in known if "." in key})
    parent = path.rpartition(".")[0]
    here = [key for key in [*known, *sections] if key.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(path, here, 1, 0.5) or difflib.get_close_matches(
        path, [*known, *sections], 1, 0.5
    )
    if not near:
        leaf = path.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == leaf][:1]
    hint = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(sorted(here))}"
    return f"unknown recipe key '{path}'{hint}"
