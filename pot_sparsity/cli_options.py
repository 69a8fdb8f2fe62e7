"""Options of the command line: their types and help, and how they become a recipe and a preprocessing.

Only the standard library and typer are imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pot_sparsity.errors import RecipeError

if TYPE_CHECKING:
    from pot_sparsity.data.preprocess import Preprocess
    from pot_sparsity.recipe import Recipe

EngineName = Literal["openvino", "onnxruntime"]
Format = Literal["same", "openvino"]

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="ONNX, OpenVINO IR (.xml), TensorFlow, TFLite or Paddle model."),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        metavar="DATA",
        help="Unlabelled samples: a folder of images, an .npz or module:callable.",
    ),
]
Validation = Annotated[
    str | None,
    typer.Option("--validation", metavar="DATA", help="Samples that only judge, in the same forms."),
]
RequiredValidation = Annotated[
    str,
    typer.Option("--validation", metavar="DATA", help="A folder of images, an .npz or module:callable."),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--validation-labels",
        metavar="FILE",
        help="Labels of the validation samples: CSV with columns file,label[,split], or .npz with labels.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option("--validation-split", metavar="NAME", help="Use only rows of the CSV with this split."),
]
Metric = Annotated[
    str, typer.Option(metavar="NAME", help="Metric of labelled validation samples: top1 or top5.")
]
RecipeSource = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="FILE|NAME",
        help="A YAML file, or one that ships: default, obc, obc_bops, pot, rd, rd_iterative, thorough.  "
        "[default: default]",
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(metavar="S", help="Fraction of zeros to reach, 0 to 1.  [default: from the recipe, 0.5]"),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND=V",
        help="Keep at most this fraction of the dense model's flops, bops, size or latency, e.g. flops=0.5; several, "
        "and --sparsity, hold at once.",
    ),
]
Timings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Seconds of every layer at several densities, in JSON or YAML, for --budget latency=...  [default: "
        "measured here]",
    ),
]
PatternName = Annotated[
    str | None, typer.Option("--pattern", metavar="P", help="Pattern of zeros: unstructured, n:m or block:c.")
]
Int8 = Annotated[
    bool | None,
    typer.Option("--int8/--no-int8", help="Quantize after pruning.  [default: from the recipe, on]"),
]
DenseInt8 = Annotated[
    bool,
    typer.Option(
        "--dense-int8/--no-dense-int8",
        help="Also quantize the dense model, to tell what pruning cost from what INT8 cost.",
    ),
]
Latency = Annotated[
    bool, typer.Option("--latency/--no-latency", help="Measure the latency of every variant.")
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Largest allowed drop of the metric, in its points; the sparsest model within it is searched for, up to "
        "--sparsity.",
    ),
]
Engine = Annotated[EngineName, typer.Option(help="What runs the model.")]
MeanValues = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Subtracted from the pixel values 0..255.")
]
ScaleValues = Annotated[str | None, typer.Option(metavar="R,G,B", help="Then divided by.")]
LayoutName = Annotated[
    Literal["NHWC", "NCHW"] | None,
    typer.Option("--layout", help="Layout of images that come as arrays.  [default: NHWC]"),
]
ReverseChannels = Annotated[
    bool, typer.Option("--reverse-input-channels", help="The model wants BGR instead of RGB.")
]
ResizeText = Annotated[
    str | None,
    typer.Option("--resize", metavar="HOW", help="HxW, shorter:N or letterbox:N[,pad=114,anchor=topleft]."),
]
CenterCrop = Annotated[
    str | None, typer.Option(metavar="N", help="Then cut N x N pixels out of the middle (or HxW).")
]
PreprocessFile = Annotated[
    Path | None,
    typer.Option(
        "--preprocess", metavar="FILE", help="JSON or YAML with these keys; options given here win."
    ),
]
Samples = Annotated[
    int | None, typer.Option(metavar="N", help="Use at most N calibration samples (a seeded draw).")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of every draw.  [default: 0]")]
Augment = Annotated[
    str | None, typer.Option(metavar="flip,crop", help="Augment the calibration samples that are fitted on.")
]
AugmentFactor = Annotated[
    int | None, typer.Option(metavar="N", help="Augmented samples per sample.  [default: 10 with --augment]")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set one key of the recipe, e.g. pruning.method=magnitude."
    ),
]
IgnoredNames = Annotated[
    list[str] | None, typer.Option("--ignored-name", metavar="NAME", help="Leave this layer dense.")
]
IgnoredPatterns = Annotated[
    list[str] | None,
    typer.Option("--ignored-pattern", metavar="REGEX", help="Leave layers with matching names dense."),
]
IgnoredTypes = Annotated[
    list[str] | None, typer.Option("--ignored-type", metavar="TYPE", help="Leave layers of this type dense.")
]
KeepStructure = Annotated[
    bool, typer.Option("--keep-structure", help="Change constants only: fuse no BatchNorm, add no bias.")
]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.  [default: all cores]")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
Database = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep solved layers there, and read those that an earlier run has solved; the result is the same.",
    ),
]
FromSweep = Annotated[
    Path | None,
    typer.Option(
        metavar="SWEEP",
        help="Write a point of this sweep (its folder) at once: its recipe and solved layers, corrected. Choose the "
        "point with --point, --max-drop, --sparsity or --budget; for the full run on its zeros add --set "
        "reconstruction.input=sparse --set finish.activations=helps.",
    ),
]
Point = Annotated[
    str | None,
    typer.Option(metavar="ID", help="With --from-sweep: the point, such as lamp@0.80, or its number."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the run in the output folder.")]
FormatName = Annotated[
    Format, typer.Option("--format", help="Format of the result: that of the input, or OpenVINO IR.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show every layer, log messages and tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the run.")]


def build_recipe(
    source: str | Mapping[str, Any] | None,
    settings: Sequence[str],
    *,
    sparsity: float | None = None,
    budget: Sequence[str] = (),
    pattern: str | None = None,
    int8: bool | None = None,
    max_drop: float | None = None,
    samples: int | None = None,
    seed: int | None = None,
    augment: str | None = None,
    augment_factor: int | None = None,
    ignored_names: Sequence[str] = (),
    ignored_patterns: Sequence[str] = (),
    ignored_types: Sequence[str] = (),
) -> Recipe:
    """The recipe, then the options (None keeps the recipe's value, ignored layers are added), then ``--set``.

    Raises
    ------
    RecipeError
        Unknown recipe or key, or a value out of range; the message names the option where there is one.
    """
    from pot_sparsity.recipe import load_recipe

    if sparsity is not None and not 0.0 <= sparsity <= 1.0:
        raise RecipeError(
            f"--sparsity must lie between 0 and 1 (0.5 is half of the weights), got {sparsity:g}"
        )
    if max_drop is not None and not max_drop >= 0.0:
        raise RecipeError(f"--max-drop must be 0 or more points of the metric, got {max_drop:g}")
    for option, number in (("--samples", samples), ("--augment-factor", augment_factor)):
        if number is not None and number < 1:
            raise RecipeError(f"{option} must be at least 1, got {number}")
    if augment_factor is not None and augment is None:
        raise RecipeError(
            "--augment-factor needs --augment: name the augmentations, e.g. --augment flip,crop"
        )
    recipe = load_recipe(source)
    base = recipe.allocation
    values: dict[str, object] = {
        "sparsity": sparsity,
        "budget": read_budget(recipe.budget, budget, sparsity),
        "pruning.pattern": pattern,
        "quantization.enabled": int8,
        "schedule.max_drop": max_drop,
        "calibration.samples": samples,
        "seed": seed,
        "calibration.augment": None if augment is None else [part.strip() for part in augment.split(",")],
        "calibration.augment_factor": None if augment is None else augment_factor or 10,
        "allocation.ignored_names": [*base.ignored_names, *ignored_names] if ignored_names else None,
        "allocation.ignored_patterns": [*base.ignored_patterns, *ignored_patterns]
        if ignored_patterns
        else None,
        "allocation.ignored_types": [*base.ignored_types, *ignored_types] if ignored_types else None,
    }
    # JSON is YAML: the same override syntax serves options and --set
    given = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    return load_recipe(source, [*given, *settings])


def read_budget(
    base: Mapping[str, float], given: Sequence[str], sparsity: float | None
) -> dict[str, object] | None:
    """The budgets that ``--budget`` gives in place of the recipe's, with ``--sparsity`` as one of them."""
    budget: dict[str, object] = {}
    for text in (part.strip() for entry in given for part in entry.split(",")):
        kind, equals, value = (part.strip() for part in text.partition("="))
        try:
            bound = float(value)
        except ValueError:
            bound = math.nan
        if not (kind and equals) or math.isnan(bound):
            raise RecipeError(f"--budget {text!r} must look like KIND=V, e.g. flops=0.5")
        if kind in budget:
            raise RecipeError(f"--budget {kind} is given twice")
        budget[kind] = bound
    if sparsity is not None and "sparsity" in budget:
        raise RecipeError("--sparsity and --budget sparsity say the same: give one of them")
    if not budget:
        budget = dict(base)
    if budget and sparsity is not None:
        budget["sparsity"] = sparsity
    return budget or None


def build_preprocess(
    file: Path | None,
    *,
    mean_values: str | None,
    scale_values: str | None,
    layout: str | None,
    reverse_input_channels: bool,
    resize: str | None,
    center_crop: str | None,
) -> Preprocess:
    """The preprocessing of a file with the options that were given on top.

    Raises
    ------
    RecipeError
        The file or a value is wrong.
    """
    from pot_sparsity.data.preprocess import load_preprocess

    settings = {} if file is None else load_preprocess(file).model_dump(exclude_defaults=True)
    options: dict[str, object] = {
        "mean_values": mean_values,
        "scale_values": scale_values,
        "layout": layout,
        "reverse_input_channels": reverse_input_channels or None,
        "resize": resize,
        "center_crop": center_crop,
    }
    settings.update({key: value for key, value in options.items() if value is not None})
    return load_preprocess(settings)
