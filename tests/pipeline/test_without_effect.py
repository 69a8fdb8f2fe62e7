"""Warnings of settings that change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pot_sparsity.pipeline import optimize
from pot_sparsity.recipe import Recipe, load_recipe, shipped_recipes, validate_recipe
from tests.pipeline.nets import QUICK, conv_net, images, plain_net


def warnings(recipe: Recipe | Mapping[str, Any], net: Any = None, **named: Any) -> list[str]:
    return optimize(
        conv_net() if net is None else net,
        images(24),
        recipe=recipe,
        baseline_int8=False,
        measure_latency=False,
        **named,
    ).report.warnings


def patterned(pattern: str, **settings: Any) -> dict[str, Any]:
    return {
        **QUICK,
        "pruning": {"pattern": pattern, "method": "magnitude"},
        "reconstruction": {"input": "dense"},
        "finish": {"activations": "never", "distillation": "never"},
        **settings,
    }


@pytest.mark.parametrize(
    ("pattern", "sparsity", "said"),
    [
        ("2:4", 0.7, "2:4 fixes the sparsity at 0.5: sparsity 0.7 is not used"),
        ("1:4", 0.5, "1:4 fixes the sparsity at 0.75: sparsity 0.5 is not used"),
        ("1:3", 0.6, "1:3 fixes the sparsity at 0.667: sparsity 0.6 is not used"),
        ("2:4", 0.5, None),
        ("1:3", 0.667, None),
        ("block:4", 0.7, None),
        ("unstructured", 0.7, None),
    ],
)
def test_a_sparsity_that_the_pattern_overrides(pattern: str, sparsity: float, said: str | None) -> None:
    found = [text for text in warnings(patterned(pattern, sparsity=sparsity)) if "fixes" in text]
    assert found == ([] if said is None else [said])


def test_only_a_sparsity_that_was_asked_for_is_missed() -> None:
    assert not [text for text in warnings(patterned("1:4")) if "fixes" in text]
    quick = ["quantization.enabled=false", "pruning.pattern=1:4", "pruning.method=magnitude"]
    assert not [text for text in warnings(load_recipe(None, quick)) if "fixes" in text]
    asked = warnings(load_recipe(None, [*quick, "sparsity=0.5"]))
    assert "1:4 fixes the sparsity at 0.75: sparsity 0.5 is not used" in asked


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_leave_the_sparsity_to_the_user(name: str) -> None:
    assert "sparsity" not in load_recipe(name).model_fields_set
    assert load_recipe(name).sparsity == 0.5


def test_unfused_weights_where_nothing_was_fused() -> None:
    recipe = validate_recipe(
        patterned("unstructured", allocation={"method": "magnitude", "options": {"unfused": True}})
    )
    said = (
        "allocation.options.unfused has nothing to undo: the model came without BatchNorm, or with it fused"
    )
    assert said in warnings(recipe, plain_net())
    assert said not in warnings(recipe, conv_net())
    assert said not in warnings(recipe, conv_net(), keep_structure=True)
