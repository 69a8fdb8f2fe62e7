"""The experiments of docs/results.md: what is run, and in which table it stands.

Every experiment is one ``pot-sparsity optimize`` command on a network of the zoo.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pot_sparsity.data import load_preprocess
from pot_sparsity.recipe import load_recipe

ZOO = "$ZOO"
SPLIT = "dev"


@dataclass(frozen=True)
class Experiment:
    """One run: a network of the zoo, a sparsity, and what differs from the default recipe.

    A ``bare`` one leaves out the dense INT8 model and the latencies; one with a ``flops`` budget (a part of the
    dense network's) has that in place of the sparsity.
    """

    entry: str
    percent: int
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    pattern: str | None = None
    bare: bool = False
    flops: str | None = None

    @property
    def name(self) -> str:
        """Unique name, for --only and the cache."""
        given = [part for part in (self.recipe, self.pattern, "bare" if self.bare else None) if part]
        asked = str(self.percent) if self.flops is None else f"flops={self.flops}"
        return "/".join([self.entry, asked, *given, *self.settings])

    def arguments(self, zoo: Mapping[str, Any]) -> list[str]:
        """Command-line arguments with paths under ``$ZOO``, without the output folder."""
        entry = zoo[self.entry]
        given = ["optimize", f"{ZOO}/{entry['model']}", "--calibration", f"{ZOO}/{entry['calibration']}"]
        given += ["--validation", f"{ZOO}/{entry['validation']}"]
        if "labels" in entry:
            given += ["--validation-labels", f"{ZOO}/{entry['labels']}", "--validation-split", SPLIT]
        given += preprocess_arguments(entry.get("preprocess", {}))
        given += ["--recipe", self.recipe] if self.recipe else []
        given += (
            ["--sparsity", f"{self.percent / 100:g}"]
            if self.flops is None
            else ["--budget", f"flops={self.flops}"]
        )
        given += ["--pattern", self.pattern] if self.pattern else []
        for setting in self.settings:
            given += ["--set", setting]
        return given + (["--no-dense-int8", "--no-latency"] if self.bare else [])


@dataclass(frozen=True)
class Column:
    """One of the columns that tell the rows of a table apart."""

    title: str
    cell: Callable[[Experiment], str]


@dataclass(frozen=True)
class Section:
    """One table of the page.

    ``columns`` name its rows. A compact one shows the output's error but neither the dense variants, which are the
    same in all rows, nor the command of every row: its rows differ from the first one's by what ``columns`` say.
    """

    title: str
    text: str
    experiments: tuple[Experiment, ...]
    columns: tuple[Column, ...]
    compact: bool = False


def preprocess_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Preprocessing as options of the command line; what the options default to is left out."""
    pictures = load_preprocess(settings)
    given: list[str] = []
    for option, values, neutral in (
        ("--mean-values", pictures.mean_values, 0.0),
        ("--scale-values", pictures.scale_values, 1.0),
    ):
        if any(value != neutral for value in values):
            given += [option, ",".join(f"{value:.10g}" for value in values)]
    if pictures.layout != "NHWC":
        given += ["--layout", pictures.layout]
    if pictures.reverse_input_channels:
        given.append("--reverse-input-channels")
    if pictures.resize is not None:
        given += ["--resize", pictures.resize]
    if pictures.crop_size is not None:
        height, width = pictures.crop_size
        given += ["--center-crop", str(height) if height == width else f"{height}x{width}"]
    return given


def command(experiment: Experiment, zoo: Mapping[str, Any]) -> str:
    """The command as a user types it."""
    given = experiment.arguments(zoo)
    return " ".join(
        ["pot-sparsity", *(w if w.startswith(ZOO) else shlex.quote(w) for w in given), "-o", "out"]
    )


def _network(experiment: Experiment) -> str:
    preset = "".join(f", {s.partition('=')[2]}" for s in experiment.settings)
    return f"{experiment.entry}, {experiment.percent} %{preset}"


def _difference(experiment: Experiment) -> str:
    parts = [f"--recipe {experiment.recipe}"] if experiment.recipe else []
    return ", ".join(f"`{part}`" for part in (*parts, *experiment.settings)) or "default"


def _setting(experiment: Experiment, key: str) -> str | None:
    """What the experiment sets that key to, if it does."""
    found = [setting.partition("=")[2] for setting in experiment.settings if setting.startswith(f"{key}=")]
    return found[0] if found else None


def _method(experiment: Experiment) -> str:
    return f"`{_setting(experiment, 'pruning.method') or load_recipe().pruning.method}`"


def _pattern(experiment: Experiment) -> str:
    return experiment.pattern or load_recipe().pruning.pattern


def _weights(experiment: Experiment) -> str:
    default = load_recipe().quantization
    placed = _setting(experiment, "quantization.weights") or default.weights
    return f"{placed}, {_setting(experiment, 'quantization.weight_bits') or default.weight_bits} bits"


def _step(experiment: Experiment) -> str:
    return next(name for name, settings in _STEPS if settings == experiment.settings)


def _run(cell: Callable[[Experiment], str]) -> tuple[Column, ...]:
    return (Column("run", cell),)


_RESNET20 = "resnet20_akamaster_cifar10"
_MOBILENET = "mobilenet_v1_025"
_PICTURES = (_MOBILENET, "squeezenet1_1", "mobilenet_v2_100_dequant")
_PERFORMANCE = "quantization.preset=performance"
_ALLOCATIONS = ("l2_normalized_magnitude", "uniform", "magnitude", "lamp", "erk")
_COMPARED = (
    *(f"pruning.method={name}" for name in ("magnitude", "magnitude_refit", "exact_obs")),
    "reconstruction.input=dense",
    "correction.differential=never",
)
_L2 = "allocation.method=l2_normalized_magnitude"
_EXACT = "pruning.method=exact_obs"
_METHODS: tuple[str, ...] = (
    *("exact_obs", "sparsegpt", "l_obs", "wanda_refit", "wanda", "magnitude_refit", "magnitude"),
)
_CIFAR = (_RESNET20, "resnet20b_distiller_cifar10", "resnet56_akamaster_cifar10")
_PARTS = ("0.5", "0.3333", "0.25")
_NO_DISTILLATION = "finish.distillation=never"
_NO_FINISH = ("finish.activations=never", _NO_DISTILLATION)
_STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "allocation, magnitude",
        (
            *(_L2, "pruning.method=magnitude", "reconstruction.input=dense", "correction.differential=never"),
            *_NO_FINISH,
        ),
    ),
    ("+ solver", (_L2, "reconstruction.input=dense", "correction.differential=never", *_NO_FINISH)),
    (
        "+ sparse inputs",
        (
            *(
                _L2,
                "reconstruction.masks=kept",
                "reconstruction.target=layer",
                "correction.differential=never",
            ),
            *_NO_FINISH,
        ),
    ),
    ("+ masks solved again, block targets", (_L2, "correction.differential=never", *_NO_FINISH)),
    ("+ correction", (_L2, *_NO_FINISH)),
    ("+ refit behind the activations", (_L2, _NO_DISTILLATION)),
    ("+ allocation by output distortion", (_NO_DISTILLATION,)),
    ("+ distillation", ()),
)
_OBQ = ("quantization.weights=obq",)
_OBQ4 = (*_OBQ, "quantization.weight_bits=4")
_COMBINATIONS: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, ()),
    *((None, (f"pruning.method={name}",)) for name in _METHODS),
    *((pattern, ()) for pattern in ("2:4", "4:8", "block:4")),
    *((None, placed) for placed in (_OBQ, _OBQ4)),
    *((pattern, (_EXACT,)) for pattern in ("2:4", "block:4")),
    *(("2:4", placed) for placed in (_OBQ, _OBQ4)),
)


def _combinations(entry: str) -> Section:
    return Section(
        f"Methods, patterns and weights on the grid: {entry}",
        "Every solver of the registry at 50 % zeros, N:M patterns and blocks of 4, and INT8 weights that NNCF "
        "rounds (`nncf`) or that are placed on its grid by the error of the layer's output "
        "(`--set quantization.weights=obq`), at 4 bits with 16 of its levels "
        "(`--set quantization.weight_bits=4`). Whatever the solver, the network's held-out outputs decide "
        "whether the kept weights are fitted again to the dense outputs, so solvers differ here by their masks "
        "more than by their weights. Zeros are allocated by L2-normalised magnitude in all rows.",
        tuple(
            Experiment(entry, 50, settings=(_L2, *settings), pattern=pattern, bare=True)
            for pattern, settings in _COMBINATIONS
        ),
        (
            Column("`pruning.method`", _method),
            Column("`--pattern`", _pattern),
            Column("INT8 weights", _weights),
        ),
        compact=True,
    )


SECTIONS = (
    Section(
        "CIFAR-10",
        "Calibrated on 1,024 pictures of the training set without their labels, judged on 5,000 of the test "
        "set.",
        (
            *(
                Experiment(entry, percent, bare=percent != 50)
                for entry in _CIFAR
                for percent in (50, 60, 70, 80, 90)
            ),
            Experiment("resnet8_mlperftiny_cifar10", 50),
        ),
        _run(_network),
    ),
    Section(
        "ImageNet pictures",
        "Calibrated on 500 pictures, judged on 500 others (an easier subset than the whole validation set: "
        "compare with the dense network on the same pictures). `performance` is NNCF's preset with symmetric "
        "activations; the default is `mixed`.",
        (
            *(
                Experiment(entry, 40, settings=given)
                for entry in _PICTURES
                for given in ((), (_PERFORMANCE,))
            ),
            *(
                Experiment(entry, percent)
                for entry in (_MOBILENET, "squeezenet1_1")
                for percent in (50, 60, 70)
            ),
        ),
        _run(_network),
    ),
    Section(
        "In two iterations",
        "`--recipe thorough` against the default: most zeros first, then the kept weights are trained, then the rest "
        "is pruned from that network, and it is trained once more. It takes about twice the time.",
        tuple(
            Experiment(entry, percent, recipe, bare=True)
            for entry in _CIFAR
            for percent in (70, 80, 90)
            for recipe in (None, "thorough")
        ),
        (
            Column("network", lambda experiment: experiment.entry),
            Column("zeros", lambda experiment: f"{experiment.percent} %"),
            Column("recipe", lambda experiment: experiment.recipe or "default"),
        ),
        compact=True,
    ),
    Section(
        "Within a budget of operations",
        "Two, three and four times fewer floating-point operations in convolutions and matrix products, counted at "
        "their non-zero weights (`--budget flops=...`), whatever sparsity that takes.",
        tuple(Experiment(entry, 0, flops=part, bare=True) for entry in _CIFAR for part in _PARTS),
        (
            Column("network", lambda experiment: experiment.entry),
            Column("operations left", lambda experiment: f"{100 * float(experiment.flops or 1):.1f} %"),
        ),
        compact=True,
    ),
    Section(
        "Detection",
        "A float16 IR that ends in DetectionOutput, calibrated on 28 pictures and judged on 40 without "
        "labels: percent of the detections with a score of at least 0.3 that have a counterpart in the dense "
        "model, or the other way round (same class, intersection over union of at least 0.5).",
        (Experiment("person-detection-0200", 50),),
        _run(_network),
    ),
    Section(
        "What each step contributes",
        f"{_RESNET20} at 90 %, one step after the other switched on: zeros allocated by L2-normalised "
        "magnitude, the smallest weights removed and biases corrected; then chosen and set by ADMM; then each layer "
        "fitted to the sparse model's own inputs, on the same masks, then with masks solved again and residual "
        "blocks as targets; then means and deviations corrected; then fitted behind their activations; then zeros "
        "allocated by output distortion; then all layers trained together to give the dense output, which is the "
        "default.",
        tuple(Experiment(_RESNET20, 90, settings=settings, bare=True) for _, settings in _STEPS),
        (Column("steps", _step),),
        compact=True,
    ),
    Section(
        "Allocations",
        "The same solver, reconstruction and correction behind every allocation; the finish is off, so that it cannot "
        "make up for what an allocation has done.",
        tuple(
            Experiment(_RESNET20, percent, settings=(*allocation, *_NO_FINISH), bare=True)
            for percent in (70, 80, 90)
            for allocation in ((), *((f"allocation.method={name}",) for name in _ALLOCATIONS))
        ),
        (
            Column("zeros", lambda experiment: f"{experiment.percent} %"),
            Column("allocation", lambda e: _setting(e, "allocation.method") or "output_distortion"),
        ),
        compact=True,
    ),
    Section(
        "Seeds",
        f"{_RESNET20} at 80 %, calibrated on 512 of the 1,024 pictures, drawn with five seeds.",
        tuple(
            Experiment(_RESNET20, 80, settings=("calibration.samples=512", f"seed={seed}"), bare=True)
            for seed in range(5)
        ),
        (Column("seed", lambda experiment: _setting(experiment, "seed") or ""),),
        compact=True,
    ),
    Section(
        "The recipe of the POT paper",
        f"`--recipe pot` against the default on {_RESNET20}.",
        tuple(
            Experiment(_RESNET20, percent, recipe, bare=percent != 50)
            for percent in (50, 70)
            for recipe in (None, "pot")
        ),
        _run(lambda experiment: f"{experiment.percent} %, {_difference(experiment)}"),
    ),
    Section(
        "Solvers and corrections",
        f"{_RESNET20} at 80 %, one setting changed at a time. The default is `pruning.method=admm`, "
        "`reconstruction.input=sparse`, `correction.differential=helps`.",
        (
            Experiment(_RESNET20, 80, bare=True),
            *(Experiment(_RESNET20, 80, settings=(setting,), bare=True) for setting in _COMPARED),
        ),
        _run(_difference),
    ),
    *(_combinations(entry) for entry in (_RESNET20, _MOBILENET)),
)


def experiments(sections: Sequence[Section] = SECTIONS) -> list[Experiment]:
    """Every experiment once, in the order of the page."""
    return list(dict.fromkeys(e for section in sections for e in section.experiments))
