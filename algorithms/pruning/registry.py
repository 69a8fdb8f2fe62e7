"""The layer solvers by name. A new method is one file and one line here."""

from __future__ import annotations

from pot_sparsity.algorithms.pruning.admm import admm
from pot_sparsity.algorithms.pruning.exact_obs import exact_obs
from pot_sparsity.algorithms.pruning.l_obs import l_obs
from pot_sparsity.algorithms.pruning.magnitude import magnitude, magnitude_refit
from pot_sparsity.algorithms.pruning.problem import Solver
from pot_sparsity.algorithms.pruning.sparsegpt import sparsegpt
from pot_sparsity.algorithms.pruning.wanda import wanda, wanda_refit

SOLVERS: dict[str, Solver] = {
    "admm": admm,
    "exact_obs": exact_obs,
    "sparsegpt": sparsegpt,
    "l_obs": l_obs,
    "wanda_refit": wanda_refit,
    "wanda": wanda,
    "magnitude_refit": magnitude_refit,
    "magnitude": magnitude,
}
DEFAULT_METHOD = "admm"


def get_solver(name: str) -> Solver:
    """Solver of that name; raises ValueError with the names there are."""
    try:
        return SOLVERS[name]
    except KeyError:
        raise ValueError(f"pruning method {name!r} is not known: use one of {', '.join(SOLVERS)}") from None
