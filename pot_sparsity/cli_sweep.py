"""The command ``pot-sparsity sweep``, and how ``optimize`` starts from a point of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pot_sparsity import cli_options as options
from pot_sparsity.cli_session import session
from pot_sparsity.errors import RecipeError, UserError

if TYPE_CHECKING:
    from pot_sparsity.recipe import Recipe
    from pot_sparsity.report.sweep_schema import Sweep

EXAMPLES = """\b
Examples:
  pot-sparsity sweep model.onnx -c calibration.npz -o trade-off
  pot-sparsity sweep model.onnx -c images/ --resize 32x32 --validation val.npz
      --allocation output_distortion --allocation lamp --points 0.5,0.7,0.8,0.9 -o trade-off
  pot-sparsity sweep model.xml -c images/ --budget flops=0.5,0.33,0.25 --correct full -o trade-off

Then write the model of a point, with the same model, calibration data and preprocessing options:
  pot-sparsity optimize model.onnx -c calibration.npz --from-sweep trade-off --max-drop 1 -o out
  pot-sparsity optimize model.onnx -c calibration.npz --from-sweep trade-off --point lamp@0.80 -o out

The folder holds the plot (sweep.svg, sweep.png, sweep.html), its figures (sweep.csv, sweep.json) and the solved
layers (database/).
"""

Allocations = Annotated[
    list[str] | None,
    typer.Option(
        "--allocation", metavar="NAME", help="Compare this allocation; may be repeated.  [default: all]"
    ),
]
Points = Annotated[
    str | None,
    typer.Option(metavar="S,S,...", help="Sparsities.  [default: 0.3,0.5,0.6,0.7,0.8,0.9]"),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="KIND=F,F,...",
        help="Fractions of the dense model's flops, bops, size or latency that may remain; may be repeated.",
    ),
]
Correct = Annotated[
    Literal["none", "bias", "full"],
    typer.Option(
        "--correct",
        help="After pruning: nothing, one-shot bias correction, or all corrections of the recipe, in sequence (slow).",
    ),
]
Grid = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="Layers are pruned to densities R^i, so that points share solved layers.  [default: 0.95]",
    ),
]
Database = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of the solved layers.  [default: database in the output folder]"
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the sweep.")]


def sweep(
    model: options.Model,
    calibration: options.Calibration,
    output: Output,
    validation: options.Validation = None,
    validation_labels: options.Labels = None,
    validation_split: options.Split = None,
    metric: options.Metric = "top1",
    allocation: Allocations = None,
    points: Points = None,
    budget: Budgets = None,
    timings: options.Timings = None,
    correct: Correct = "bias",
    grid: Grid = None,
    recipe: options.RecipeSource = None,
    pattern: options.PatternName = None,
    int8: options.Int8 = None,
    settings: options.Settings = None,
    ignored_name: options.IgnoredNames = None,
    ignored_pattern: options.IgnoredPatterns = None,
    ignored_type: options.IgnoredTypes = None,
    keep_structure: options.KeepStructure = False,
    samples: options.Samples = None,
    seed: options.Seed = None,
    augment: options.Augment = None,
    augment_factor: options.AugmentFactor = None,
    mean_values: options.MeanValues = None,
    scale_values: options.ScaleValues = None,
    layout: options.LayoutName = None,
    reverse_input_channels: options.ReverseChannels = False,
    resize: options.ResizeText = None,
    center_crop: options.CenterCrop = None,
    preprocess: options.PreprocessFile = None,
    engine: options.Engine = "openvino",
    threads: options.Threads = None,
    resume: options.Resume = False,
    force: options.Force = False,
    database: Database = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what sparsity costs: several allocations at several sparsities, side by side."""
    with session(verbose=verbose, quiet=quiet, folder=output) as progress:
        if resume and force:
            raise UserError("--resume and --force exclude each other: go on with the old run, or replace it")
        asked = None if points is None else _numbers("--points", points)
        bounds = read_budgets(budget or ())
        full_recipe = options.build_recipe(
            recipe,
            settings or (),
            pattern=pattern,
            int8=int8,
            samples=samples,
            seed=seed,
            augment=augment,
            augment_factor=augment_factor,
            ignored_names=ignored_name or (),
            ignored_patterns=ignored_pattern or (),
            ignored_types=ignored_type or (),
        )
        pictures = options.build_preprocess(
            preprocess,
            mean_values=mean_values,
            scale_values=scale_values,
            layout=layout,
            reverse_input_channels=reverse_input_channels,
            resize=resize,
            center_crop=center_crop,
        )
        from pot_sparsity import pipeline
        from pot_sparsity.pipeline.sweeping.sweep import GRID

        result = pipeline.sweep(
            model,
            calibration,
            validation=validation,
            validation_labels=validation_labels,
            validation_split=validation_split,
            metric=metric,
            recipe=full_recipe,
            preprocess=pictures,
            engine=engine,
            keep_structure=keep_structure,
            allocations=allocation,
            points=asked,
            budget=bounds,
            timings=timings,
            correct=correct,
            grid=GRID if grid is None else grid,
            output=output,
            resume=resume,
            force=force,
            database=database,
            threads=threads,
            progress=progress,
        )
    _show(result, output, verbose)


def _show(result: Sweep, output: Path, verbose: bool) -> None:
    from pot_sparsity.report.console import print_results
    from pot_sparsity.report.sweep_page import summary_tables

    print_results(*summary_tables(result, verbose=verbose))
    print(f"plot:    {output / 'sweep.html'}")
    print(f"figures: {output / 'sweep.csv'}")
    print(f"a model: pot-sparsity optimize ... --from-sweep {output} --point {result.points[0].id}")


def read_budgets(given: Sequence[str]) -> dict[str, list[float]]:
    """``KIND=F,F,...`` texts as numbers by kind; RecipeError where one is not of this form."""
    found: dict[str, list[float]] = {}
    for text in given:
        kind, equals, numbers = text.partition("=")
        if not equals:
            raise RecipeError(f"--budget {text!r} must look like flops=0.5,0.25")
        found.setdefault(kind.strip(), []).extend(_numbers("--budget", numbers))
    return found


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} needs numbers with commas between them, got {text!r}") from None


def start_from(
    folder: Path,
    point: str | None,
    *,
    recipe: str | None,
    sparsity: float | None,
    budget: Sequence[str],
    max_drop: float | None,
) -> tuple[dict[str, Any], str]:
    """The recipe of a point of a sweep, before options change it, and the point's name.

    Without ``point`` the other options choose it.

    Raises
    ------
    UserError
        Options that do not go together, no such sweep or point.
    """
    from pot_sparsity.pipeline.sweeping.sweep_points import choose

    if recipe is not None:
        raise UserError(
            "--from-sweep brings the sweep's recipe: change keys of it with --set, not with --recipe"
        )
    given = options.read_budget({}, budget, None) or {}
    wanted = {kind: float(str(bound)) for kind, bound in given.items()}
    wanted |= {} if sparsity is None else {"sparsity": sparsity}
    if point is not None and wanted:
        raise UserError("--point names a point of the sweep: --sparsity and --budget cannot change it")
    wanted |= {} if max_drop is None else {"max_drop": max_drop}
    chosen = choose(folder, point if point is not None else wanted)
    settings: Recipe = chosen.settings(None, wanted)
    return settings.model_dump(mode="json"), chosen.point.id
