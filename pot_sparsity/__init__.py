"""Post-training sparsity and INT8 for exported networks.

>>> import pot_sparsity
>>> result = pot_sparsity.optimize("model.onnx", "calibration.npz", recipe={"sparsity": 0.6})  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pot_sparsity.data import Preprocess, load_dataset
    from pot_sparsity.errors import PotSparsityError
    from pot_sparsity.pipeline import Inspection, Result, Sweep, inspect, optimize, sweep, validate
    from pot_sparsity.recipe import Recipe, load_recipe

__all__ = [
    "Inspection",
    "PotSparsityError",
    "Preprocess",
    "Recipe",
    "Result",
    "Sweep",
    "inspect",
    "load_dataset",
    "load_recipe",
    "optimize",
    "sweep",
    "validate",
]

# Engines and NNCF take seconds to import: they are, when something of theirs is asked for.
_HOMES = {
    "Inspection": "pot_sparsity.pipeline",
    "PotSparsityError": "pot_sparsity.errors",
    "Preprocess": "pot_sparsity.data",
    "Recipe": "pot_sparsity.recipe",
    "Result": "pot_sparsity.pipeline",
    "Sweep": "pot_sparsity.pipeline",
    "inspect": "pot_sparsity.pipeline",
    "load_dataset": "pot_sparsity.data",
    "load_recipe": "pot_sparsity.recipe",
    "optimize": "pot_sparsity.pipeline",
    "sweep": "pot_sparsity.pipeline",
    "validate": "pot_sparsity.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import what is public when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pot_sparsity' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
