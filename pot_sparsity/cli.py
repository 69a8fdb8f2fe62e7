"""The command line ``pot-sparsity``: optimize, sweep, inspect, validate, demo.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 internal error, 2 wrong usage or
input (one line that says what to do), 3 accuracy gate not met, 130 interrupted. Heavy packages are imported
when a command needs them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pot_sparsity import cli_options as options
from pot_sparsity import cli_sweep
from pot_sparsity.cli_session import INTERRUPTED, UsageError, session
from pot_sparsity.errors import OutputError, PotSparsityError, UserError

if TYPE_CHECKING:
    from pot_sparsity.pipeline import Inspection, Result

DEMO_FOLDER = Path("pot-sparsity-demo")
DEMO_MODEL = "digits_cnn.onnx"
DEMO_SPARSITY = 0.6

app = typer.Typer(
    name="pot-sparsity",
    help="Make exported networks sparse and INT8 after training, on a CPU, without labels.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_OPTIMIZE_EXAMPLES = """\b
Examples:
  pot-sparsity optimize model.onnx -c calibration.npz -o out
  pot-sparsity optimize model.onnx -c images/ --resize shorter:256 --center-crop 224
      --mean-values 123.675,116.28,103.53 --scale-values 58.395,57.12,57.375
      --validation val/ --validation-labels labels.csv --sparsity 0.6 -o out
  pot-sparsity optimize model.onnx -c calibration.npz --budget flops=0.5 --budget size=0.2 -o out
  pot-sparsity optimize model.xml -c images/ --recipe pot --max-drop 1 --set schedule.iterations=5 -o out
  pot-sparsity optimize model.onnx -c images/ --sparsity 0.9 --max-drop 1 --database layers -o out

The folder holds the model in the input's format, report.html, report.json and the recipe as used.
"""
_INSPECT_EXAMPLES = """\b
Examples:
  pot-sparsity inspect model.onnx
  pot-sparsity inspect model.xml --json
"""
_VALIDATE_EXAMPLES = """\b
Examples:
  pot-sparsity validate out/model.onnx --validation val.npz
  pot-sparsity validate out/model.xml --validation images/ --reference model.xml --json
"""
_DEMO_EXAMPLES = """\b
Examples:
  pot-sparsity demo
  pot-sparsity demo --sparsity 0.8 -o /tmp/demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises for what the user or the model did."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return int(app(args=given, prog_name="pot-sparsity", standalone_mode=False) or 0)
    except UsageError as error:
        text = getattr(error, "format_message", error.__str__)()
        command = f"{given[0]} " if given[0] in ("optimize", "sweep", "inspect", "validate", "demo") else ""
        return _fail(f"{text.removesuffix('.')}; see: pot-sparsity {command}--help", UserError.exit_code)
    except PotSparsityError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED


def _show_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("pot-sparsity"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


@app.command(epilog=_OPTIMIZE_EXAMPLES)
def optimize(
    model: options.Model,
    calibration: options.Calibration,
    output: options.Output,
    validation: options.Validation = None,
    validation_labels: options.Labels = None,
    validation_split: options.Split = None,
    metric: options.Metric = "top1",
    recipe: options.RecipeSource = None,
    sparsity: options.Sparsity = None,
    budget: options.Budget = None,
    timings: options.Timings = None,
    pattern: options.PatternName = None,
    int8: options.Int8 = None,
    max_drop: options.MaxDrop = None,
    dense_int8: options.DenseInt8 = True,
    latency: options.Latency = True,
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
    output_format: options.FormatName = "same",
    resume: options.Resume = False,
    force: options.Force = False,
    database: options.Database = None,
    from_sweep: options.FromSweep = None,
    point: options.Point = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune, correct, quantize and validate a model."""
    with session(verbose=verbose, quiet=quiet, folder=output) as progress:
        if resume and force:
            raise UserError("--resume and --force exclude each other: go on with the old run, or replace it")
        source: str | dict[str, Any] | None = recipe
        if from_sweep is not None:
            source, point = cli_sweep.start_from(
                from_sweep, point, recipe=recipe, sparsity=sparsity, budget=budget or (), max_drop=max_drop
            )
            sparsity, budget = None, None  # they have chosen the point
        elif point is not None:
            raise UserError("--point is a point of a sweep: name its folder with --from-sweep")
        full_recipe = options.build_recipe(
            source,
            settings or (),
            sparsity=sparsity,
            budget=budget or (),
            pattern=pattern,
            int8=int8,
            max_drop=max_drop,
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

        result = pipeline.optimize(
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
            output=output,
            output_format=output_format,
            resume=resume,
            force=force,
            database=database,
            timings=timings,
            threads=threads,
            progress=progress,
            baseline_int8=dense_int8,
            measure_latency=latency,
            from_sweep=from_sweep,
            point=point,
        )
    _show(result, verbose)


app.command(epilog=cli_sweep.EXAMPLES)(cli_sweep.sweep)


@app.command(epilog=_INSPECT_EXAMPLES)
def inspect(
    model: options.Model,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the layers of a model: shapes, weights, FLOPs, zeros, what can be pruned and why not."""
    with session(verbose=verbose, quiet=False):
        from pot_sparsity import pipeline

        found = pipeline.inspect(model)
    if as_json:
        print(json.dumps(_inspection_data(found), indent=2))
        return
    from pot_sparsity.report import render, words
    from pot_sparsity.report.console import print_results

    spec, layers = found.model, found.layers
    weights, zeros = sum(layer.weights for layer in layers), sum(layer.zeros for layer in layers)
    print_results(
        f"{words.printable(spec.file)}: {spec.format}, {spec.parameters:,} parameters; "
        f"{len(layers)} layers with {weights:,} weights, {words.percent(zeros, weights)} zeros; "
        f"{found.batchnorms_fusable} BatchNorms to fuse",
        render.layers_table(layers),
    )
    for title, left in (("not compressed", found.skipped), ("BatchNorm that stays", found.not_fused)):
        if left:
            print_results(render.left_table(left, title))


@app.command(epilog=_VALIDATE_EXAMPLES)
def validate(
    model: options.Model,
    validation: options.RequiredValidation,
    validation_labels: options.Labels = None,
    validation_split: options.Split = None,
    metric: options.Metric = "top1",
    reference: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Compare the outputs with those of this model.")
    ] = None,
    mean_values: options.MeanValues = None,
    scale_values: options.ScaleValues = None,
    layout: options.LayoutName = None,
    reverse_input_channels: options.ReverseChannels = False,
    resize: options.ResizeText = None,
    center_crop: options.CenterCrop = None,
    preprocess: options.PreprocessFile = None,
    engine: options.Engine = "openvino",
    threads: options.Threads = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a model on labelled samples, or against a reference model."""
    with session(verbose=verbose, quiet=quiet) as progress:
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

        metrics = pipeline.validate(
            model,
            validation,
            reference=reference,
            metric=metric,
            labels=validation_labels,
            split=validation_split,
            preprocess=pictures,
            engine=engine,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    from pot_sparsity.report import render
    from pot_sparsity.report.console import print_results

    print_results(render.metrics_table(metrics))


@app.command(epilog=_DEMO_EXAMPLES)
def demo(
    output: options.Output = DEMO_FOLDER,
    sparsity: Annotated[float, typer.Option(metavar="S", help="Fraction of zeros.")] = DEMO_SPARSITY,
    threads: options.Threads = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the main job on the handwritten digits and the small network that ship with the package."""
    with ExitStack() as stack:
        progress = stack.enter_context(session(verbose=verbose, quiet=quiet, folder=output))
        recipe = options.build_recipe(None, (), sparsity=sparsity)
        _check_demo_folder(output)
        assets = resources.files("pot_sparsity.demo_assets")
        model, calibration, validation = (
            str(stack.enter_context(resources.as_file(assets / name)))
            for name in (DEMO_MODEL, "digits_calibration.npz", "digits_validation.npz")
        )
        facts = json.loads((assets / "digits_cnn.json").read_text(encoding="utf-8"))
        from pot_sparsity import pipeline

        result = pipeline.optimize(
            model,
            calibration,
            validation=validation,
            recipe=recipe,
            preprocess={key: facts[key] for key in ("mean_values", "scale_values")},
            output=output,
            force=True,
            threads=threads,
            progress=progress,
        )
    _show(result, verbose)


def _inspection_data(found: Inspection) -> dict[str, object]:
    return {
        "model": found.model.model_dump(mode="json"),
        "layers": [layer.model_dump(mode="json") for layer in found.layers],
        "skipped": [left.model_dump(mode="json") for left in found.skipped],
        "not_fused": [left.model_dump(mode="json") for left in found.not_fused],
        "batchnorms_fusable": found.batchnorms_fusable,
    }


def _check_demo_folder(output: Path) -> None:
    """The demo replaces what an earlier demo left there, and nothing else."""
    if not output.is_dir() or not any(output.iterdir()):
        return
    from pot_sparsity.report.io import read_report

    try:
        ours = read_report(output).model.file == DEMO_MODEL
    except UserError:  # no report: a demo that was stopped, if the folder has the demo's own name
        ours = output.name == DEMO_FOLDER.name
    if not ours:
        raise OutputError(f"output folder {str(output)!r} holds something else; give another folder with -o")


def _show(result: Result, verbose: bool) -> None:
    from pot_sparsity.report.console import print_results
    from pot_sparsity.report.io import HTML_NAME
    from pot_sparsity.report.render import summary_tables

    print_results(*summary_tables(result.report, verbose=verbose))
    if result.folder is not None:
        for file in result.files:
            print(f"model:  {file}")
        print(f"report: {result.folder / HTML_NAME}")


def _fail(message: str, code: int) -> int:
    from pot_sparsity.report.words import printable

    print(f"error: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
    return code
