"""Points of a sweep: how they are asked for and named, and how one of them is found again to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pot_sparsity.algorithms.allocation import ALLOCATIONS
from pot_sparsity.errors import DataError, ModelError, RecipeError, UserError
from pot_sparsity.pipeline.job import Job
from pot_sparsity.pipeline.reporting import digest
from pot_sparsity.recipe import OUTPUT_DISTORTION, Recipe, load_recipe, validate_recipe
from pot_sparsity.report.schema import BudgetKind, Decision
from pot_sparsity.report.sweep_io import read_sweep
from pot_sparsity.report.sweep_schema import Sweep, SweepPoint

#: What a point can be asked for.
KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
#: Sparsities of a sweep that is not told any.
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Allocations that a sweep compares, the first drawn first.
ALL = (OUTPUT_DISTORTION, "l2_normalized_magnitude", "lamp", "erk", "uniform", "magnitude")


@dataclass(frozen=True)
class Asked:
    """One point of the trade-off: ``sparsity`` at least, or a fraction of the dense model's cost at most."""

    kind: BudgetKind
    bound: float

    def __str__(self) -> str:
        number = f"{self.bound:.2f}" if round(self.bound, 2) == self.bound else f"{self.bound:g}"
        return number if self.kind == "sparsity" else f"{self.kind}={number}"


def read_asked(
    points: Sequence[float] | None, budget: Mapping[str, Sequence[float]] | None
) -> tuple[Asked, ...]:
    """Points in order, from dense to sparse, each once; :data:`SPARSITIES` where there are neither.

    Raises
    ------
    RecipeError
        A kind that does not exist, or a bound out of range.
    """
    if points is None and not budget:
        points = SPARSITIES
    found = [Asked("sparsity", float(bound)) for bound in points or ()]
    for name, bounds in (budget or {}).items():
        kind = next((kind for kind in KINDS if kind == name), None)
        if kind is None:
            raise RecipeError(f"a sweep has no budget {name!r}: it has {', '.join(KINDS)}")
        found += [Asked(kind, float(bound)) for bound in bounds]
    for asked in found:
        if asked.kind == "sparsity" and not 0.0 <= asked.bound < 1.0:
            raise RecipeError(f"points must be sparsities from 0 to below 1, got {asked.bound:g}")
        if asked.kind != "sparsity" and not 0.0 < asked.bound <= 1.0:
            raise RecipeError(f"budget {asked.kind} must be above 0 and at most 1, got {asked.bound:g}")
    if not found:
        raise RecipeError("a sweep needs at least one point")
    return tuple(sorted(dict.fromkeys(found), key=_sparser))


def _sparser(asked: Asked) -> tuple[int, float]:
    return KINDS.index(asked.kind), asked.bound if asked.kind == "sparsity" else -asked.bound


def read_allocations(names: Sequence[str] | None) -> tuple[str, ...]:
    """Allocations to compare, each once; RecipeError for one that does not exist."""
    for name in names or ():
        if name not in ALLOCATIONS and name != OUTPUT_DISTORTION:
            raise RecipeError(
                f"allocation {name!r} is not known: use one of {', '.join((OUTPUT_DISTORTION, *ALLOCATIONS))}"
            )
    return tuple(dict.fromkeys(names)) if names else ALL


@dataclass(frozen=True)
class Chosen:
    """A point of a sweep that is to be written.

    Attributes
    ----------
    sweep, point
        The sweep, and the point in it.
    database
        Folder of the layer solutions, or None where the sweep kept none.
    zeros
        Of each layer, by name.
    """

    sweep: Sweep
    point: SweepPoint
    database: Path | None
    zeros: dict[str, int]

    def settings(
        self,
        changes: Recipe | str | Path | Mapping[str, Any] | None,
        point: str | int | Mapping[str, float] | None = None,
    ) -> Recipe:
        """The sweep's recipe as it fits the point, with ``changes`` on top; a whole recipe takes the sweep's place.

        The layers' solutions stand as they are: nothing is reconstructed and there are no last steps (set
        ``reconstruction.input: sparse`` and ``finish.activations: helps`` for both), only the recipe's corrections.
        A ``max_drop`` that the point was chosen by holds for the result. Allocation and sparsity are the point's.
        """
        asked = self.point.bound if self.point.budget == "sparsity" else self.point.sparsity
        if isinstance(changes, Recipe | str | Path):
            whole = changes if isinstance(changes, Recipe) else load_recipe(changes)
            plain = whole.model_dump(mode="json")
        else:
            limit = point.get("max_drop") if isinstance(point, Mapping) else None
            plain = merged(at_once(self.sweep.recipe), {"schedule": {"max_drop": limit}})
            plain = merged(plain, changes or {})
        return validate_recipe(at_point(plain, self.point.allocation, asked))

    @property
    def decision(self) -> Decision:
        """What the report says about it."""
        return Decision(
            what=f"point {self.point.id} of a sweep",
            kept=True,
            reason=f"{self.point.allocation} and the layers as the sweep pruned them",
        )

    def check(self, job: Job) -> None:
        """Raise UserError where a job is about another model, or calibrates it on other samples.

        Samples and their preprocessing decide which layer solutions fit.
        """
        if digest(job.original) != self.sweep.model.sha256:
            raise ModelError(
                f"the sweep is about another model ({self.sweep.model.file}, SHA-256 {self.sweep.model.sha256[:12]}): "
                "give that one, or sweep this"
            )
        if job.samples.fingerprint != self.sweep.calibration:
            raise DataError(
                "the calibration samples differ from the sweep's: give the same --calibration, --samples, --seed and "
                "preprocessing options"
            )


def at_once(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, as plain data, that takes layers as they were pruned: corrections only."""
    return merged(
        recipe,
        {
            "reconstruction": {"method": "closed_form", "input": "dense"},
            "finish": {"activations": "never", "rescaling": "never", "distillation": "never"},
        },
    )


def at_point(recipe: Mapping[str, Any], allocation: str, sparsity: float) -> dict[str, Any]:
    """A recipe, as plain data, with the allocation and sparsity of a point, reached in one step."""
    other = recipe["allocation"]["method"] != allocation  # whose options are not this one's
    return merged(
        recipe,
        {
            "sparsity": sparsity,
            "budget": {},
            "allocation": {"method": allocation, "rounds": "one", **({"options": {}} if other else {})},
            "schedule": {"kind": "one_shot"},
        },
    )


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with others on top; what is empty in ``changes`` (options, a budget) empties the base's."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping) and value
        result[key] = merged(cast(Mapping[str, Any], old), value) if nested else value
    return result


def with_allocation(recipe: Recipe, method: str) -> Recipe:
    """The recipe with another allocation; options belong to the method they were given for."""
    if recipe.allocation.method == method:
        return recipe
    return validate_recipe(
        merged(recipe.model_dump(mode="json"), {"allocation": {"method": method, "options": {}}})
    )


def choose(folder: str | Path, point: str | int | Mapping[str, float] | None) -> Chosen:
    """Read a sweep and find a point in it.

    Parameters
    ----------
    folder
        The sweep's folder, or its ``sweep.json``.
    point
        Its name; its number in the sweep's table, from 1; or what it must fulfil: ``max_drop``, ``sparsity`` (at
        least), ``flops``, ``bops``, ``size`` and ``latency`` (fractions of the dense model's that remain, at most).
        With ``max_drop`` alone that is the sparsest point (to the percent), else the one of smallest drop.

    Raises
    ------
    UserError
        There is no sweep, no such point, or none that fulfils that; the message lists the points.
    """
    path = Path(folder)
    sweep = read_sweep(path)
    found = _named(sweep, point) if isinstance(point, str | int) else _best(sweep, point or {})
    home = path if path.is_dir() else path.parent
    database = None if sweep.database is None else home / sweep.database
    names = [layer.name for layer in sweep.layers]
    if len(names) != len(found.layers):
        raise UserError(
            f"the sweep in {str(path)!r} has {len(names)} layers, its point {found.id} {len(found.layers)}"
        )
    return Chosen(sweep, found, database, dict(zip(names, found.layers, strict=True)))


def _named(sweep: Sweep, point: str | int) -> SweepPoint:
    if isinstance(point, str) and not point.isdecimal():
        found = next((each for each in sweep.points if each.id == point), None)
    else:
        found = next((each for number, each in enumerate(sweep.points, 1) if number == int(point)), None)
    if found is None:
        raise UserError(f"the sweep has no point {str(point)!r}; {_list(sweep)}")
    return found


def _best(sweep: Sweep, wanted: Mapping[str, float]) -> SweepPoint:
    unknown = [kind for kind in wanted if kind not in (*KINDS, "max_drop")]
    if unknown:
        raise UserError(
            f"a point of a sweep is not chosen by {unknown[0]!r}, but by max_drop or {', '.join(KINDS)}"
        )
    if not wanted:
        raise UserError(
            f"choose a point of the sweep with --point, --max-drop, --sparsity or --budget; {_list(sweep)}"
        )
    good = [point for point in sweep.points if _fulfils(point, wanted, 0.5 / sweep.weights)]
    if not good:
        asked = ", ".join(f"{kind} {bound:g}" for kind, bound in wanted.items())
        raise UserError(f"no point of the sweep fulfils {asked}; {_list(sweep)}")
    if list(wanted) == ["max_drop"]:
        return min(good, key=lambda point: (-round(point.sparsity, 2), *_cost(point)))
    return min(good, key=lambda point: (*_cost(point), -point.sparsity))


def _fulfils(point: SweepPoint, wanted: Mapping[str, float], rounding: float) -> bool:
    """Whether a point keeps all bounds; ``rounding`` is what a sparsity loses where half a weight is rounded off."""
    for kind, bound in wanted.items():
        if kind == "max_drop":
            good = point.drop is not None and point.drop <= bound + 1e-9
        elif kind == "sparsity":
            good = point.sparsity >= bound - rounding - 1e-9
        else:
            value = getattr(point, kind)
            good = value is not None and value <= bound + 1e-9
        if not good:
            return False
    return True


def _cost(point: SweepPoint) -> tuple[float, float]:
    """What a point loses: drop of the metric, then distance of the output; less is better."""
    worst = float("inf")
    error = worst if point.relative_error is None else point.relative_error
    return (worst if point.drop is None else point.drop), error


def _list(sweep: Sweep) -> str:
    """All points, those of one allocation together: ``lamp@0.50|0.60``."""
    groups: dict[str, list[str]] = {}
    for point in sweep.points:
        groups.setdefault(point.allocation, []).append(point.id.partition("@")[2])
    return "it has " + ", ".join(f"{name}@{'|'.join(bounds)}" for name, bounds in groups.items())
