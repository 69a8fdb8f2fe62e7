"""Run the experiments of docs/results.md and write that page from their reports.

Every experiment is one `pot-sparsity optimize` command on a network of the zoo: a folder with a `zoo.json`
that names, for each network, its file, preprocessing, calibration and validation data. Outcomes are kept in
the cache, one JSON line each, so that an interrupted call goes on where it stopped: delete the cache once the
code has changed. Rows whose experiment is not in the cache are left out of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pot_sparsity.data import load_preprocess
from pot_sparsity.report import words
from pot_sparsity.report.schema import DataSpec, Machine, Report, Variant, Versions

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "results.md"
ZOO = "$ZOO"
SPLIT = "dev"
VARIANTS = ("dense", "dense_int8", "sparse", "sparse_int8")


@dataclass(frozen=True)
class Experiment:
    """One run: a network of the zoo, a sparsity, and what differs from the default recipe."""

    entry: str
    percent: int
    recipe: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique name, for --only and the cache."""
        return "/".join(
            [self.entry, str(self.percent), *([self.recipe] if self.recipe else []), *self.settings]
        )

    def arguments(self, zoo: Mapping[str, Any]) -> list[str]:
        """Command-line arguments with paths under ``$ZOO``, without the output folder."""
        entry = zoo[self.entry]
        given = ["optimize", f"{ZOO}/{entry['model']}", "--calibration", f"{ZOO}/{entry['calibration']}"]
        given += ["--validation", f"{ZOO}/{entry['validation']}"]
        if "labels" in entry:
            given += ["--validation-labels", f"{ZOO}/{entry['labels']}", "--validation-split", SPLIT]
        given += preprocess_arguments(entry.get("preprocess", {}))
        given += ["--recipe", self.recipe] if self.recipe else []
        given += ["--sparsity", f"{self.percent / 100:g}"]
        for setting in self.settings:
            given += ["--set", setting]
        return given


@dataclass(frozen=True)
class Section:
    """One table of the page; ``label`` names its rows."""

    title: str
    text: str
    experiments: tuple[Experiment, ...]
    label: Callable[[Experiment], str]


def _network(experiment: Experiment) -> str:
    preset = "".join(f", {s.partition('=')[2]}" for s in experiment.settings)
    return f"{experiment.entry}, {experiment.percent} %{preset}"


def _difference(experiment: Experiment) -> str:
    parts = [f"--recipe {experiment.recipe}"] if experiment.recipe else []
    return ", ".join(f"`{part}`" for part in (*parts, *experiment.settings)) or "default"


_RESNET20 = "resnet20_akamaster_cifar10"
_PICTURES = ("mobilenet_v1_025", "squeezenet1_1", "mobilenet_v2_100_dequant")
_PERFORMANCE = "quantization.preset=performance"
_COMPARED = (
    *(f"allocation.method={name}" for name in ("uniform", "magnitude", "lamp", "erk")),
    *(f"pruning.method={name}" for name in ("magnitude", "magnitude_refit", "exact_obs")),
    "reconstruction.input=dense",
    "correction.differential=never",
)

SECTIONS = (
    Section(
        "CIFAR-10",
        "Calibrated on 1,024 pictures of the training set without their labels, judged on 5,000 of the test "
        "set.",
        (
            *(Experiment(_RESNET20, percent) for percent in (50, 60, 70, 80, 90)),
            Experiment("resnet56_akamaster_cifar10", 60),
            *(Experiment("resnet20b_distiller_cifar10", percent) for percent in (50, 70, 80)),
            Experiment("resnet8_mlperftiny_cifar10", 50),
        ),
        _network,
    ),
    Section(
        "ImageNet pictures",
        "Calibrated on 500 pictures, judged on 500 others (an easier subset than the whole validation set: "
        "compare with the dense network on the same pictures). `performance` is NNCF's preset with symmetric "
        "activations; the default is `mixed`.",
        tuple(
            Experiment(entry, 40, settings=settings)
            for entry in _PICTURES
            for settings in ((), (_PERFORMANCE,))
        ),
        _network,
    ),
    Section(
        "Detection",
        "A float16 IR that ends in DetectionOutput, calibrated on 28 pictures and judged on 40 without "
        "labels: percent of the detections with a score of at least 0.3 that have a counterpart in the dense "
        "model, or the other way round (same class, intersection over union of at least 0.5).",
        (Experiment("person-detection-0200", 50),),
        _network,
    ),
    Section(
        "The recipe of the POT paper",
        f"`--recipe pot` against the default on {_RESNET20}.",
        tuple(Experiment(_RESNET20, percent, recipe) for percent in (50, 70) for recipe in (None, "pot")),
        lambda experiment: f"{experiment.percent} %, {_difference(experiment)}",
    ),
    Section(
        "Allocations, solvers and corrections",
        f"{_RESNET20} at 70 %, one setting changed at a time. The default is `allocation.method="
        "l2_normalized_magnitude`, `pruning.method=admm`, `reconstruction.input=sparse`, "
        "`correction.differential=helps`.",
        (
            Experiment(_RESNET20, 70),
            *(Experiment(_RESNET20, 70, settings=(setting,)) for setting in _COMPARED),
        ),
        _difference,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the page needs of a report."""

    versions: Versions
    machine: Machine
    data: DataSpec
    variants: dict[str, Variant]
    seconds: float
    peak_memory_mib: float


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
    words_given = experiment.arguments(zoo)
    return " ".join(
        ["pot-sparsity", *(w if w.startswith(ZOO) else shlex.quote(w) for w in words_given), "-o", "out"]
    )


def run(experiment: Experiment, zoo: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the command in a process of its own; returns its report as read from the file."""
    given = [part.replace(ZOO, str(folder)) for part in experiment.arguments(zoo)]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        subprocess.run(
            [sys.executable, "-m", "pot_sparsity", *given, "-o", str(out), "--quiet"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def read_cache(path: Path, zoo: Mapping[str, Any]) -> dict[str, Outcome]:
    """Outcomes by experiment; those of another command than today's are passed over."""
    commands = {
        experiment.name: command(experiment, zoo) for experiment in experiments() if experiment.entry in zoo
    }
    found: dict[str, Outcome] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        record = json.loads(line)
        if commands.get(record["name"]) == record["command"]:
            report = Report.model_validate(record["report"])
            found[record["name"]] = Outcome(
                report.versions,
                report.machine,
                report.data,
                {variant.name: variant for variant in report.variants},
                report.seconds,
                report.peak_memory_mib,
            )
    return found


def experiments() -> list[Experiment]:
    """Every experiment once, in the order of the page."""
    return list(dict.fromkeys(e for section in SECTIONS for e in section.experiments))


def fill_cache(path: Path, folder: Path, zoo: Mapping[str, Any], only: Sequence[str]) -> int:
    """Run what is missing; returns how many failed."""
    known = read_cache(path, zoo)
    wanted = [e for e in experiments() if not only or any(fnmatch(e.name, pattern) for pattern in only)]
    if not wanted:
        print(
            f"no experiment is called so; there are {', '.join(e.name for e in experiments())}",
            file=sys.stderr,
        )
        return 1
    failed = 0
    for number, experiment in enumerate(wanted, 1):
        if experiment.name in known:
            continue
        print(f"[{number}/{len(wanted)}] {experiment.name}", file=sys.stderr, flush=True)
        try:
            report = run(experiment, zoo, folder)
        except (subprocess.CalledProcessError, KeyError) as error:
            print(f"    failed: {error}", file=sys.stderr)
            failed += 1
            continue
        record = {"name": experiment.name, "command": command(experiment, zoo), "report": report}
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    return failed


def cell(variant: Variant | None, metric: str) -> str:
    """A metric, and its paired difference to the dense model where there is one."""
    if variant is None or metric not in variant.metrics:
        return words.ABSENT
    value = words.metric_value(metric, variant.metrics[metric])
    return (
        value
        if variant.name == "dense"
        else f"{value} {words.interval(variant, metric)}".removesuffix(f" {words.ABSENT}")
    )


def row(label: str, outcome: Outcome) -> list[str]:
    """One line of a table."""
    metric = outcome.data.metric
    final = outcome.variants["sparse_int8"]
    return [
        label,
        *(cell(outcome.variants.get(name), metric) for name in VARIANTS),
        *([] if metric.endswith("agreement") else [cell(final, "agreement")]),
        f"{100.0 * final.zeros / final.weights:.2f}",
        f"{outcome.seconds:.0f}",
        f"{outcome.peak_memory_mib:.0f}",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def section_lines(section: Section, outcomes: Mapping[str, Outcome], zoo: Mapping[str, Any]) -> list[str]:
    """A section with its table and commands; nothing if none of its experiments has run."""
    done = [e for e in section.experiments if e.name in outcomes]
    if not done:
        return []
    metric = outcomes[done[0].name].data.metric
    head = ["run", *(words.variant_title(name) for name in VARIANTS)]
    head += [] if metric.endswith("agreement") else ["agreement"]
    head += ["zeros %", "seconds", "peak MiB"]
    lines = ["", f"## {section.title}", "", section.text, ""]
    lines += table(head, [row(section.label(e), outcomes[e.name]) for e in done])
    lines += ["", "```sh"]
    for experiment in done:
        lines += [f"# {_plain(section.label(experiment))}", command(experiment, zoo)]
    return [*lines, "```"]


def _plain(text: str) -> str:
    return text.replace("`", "")


def page(outcomes: Mapping[str, Outcome], zoo: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = [
        "# Results",
        "",
        "This page is generated by `tools/make_results.py` from the reports of the runs; do not edit it.",
        "",
        "Accuracies are top-1 in percent. Behind each stands the difference to the dense model on the same",
        "samples, in points, with its 95 % interval (paired). Agreement is the percent of samples on which",
        "the sparse INT8 model decides as the dense one does. Zeros are counted in the written INT8 model,",
        "over all layers that take part. Seconds and peak memory are those of the whole run: moments,",
        "pruning, reconstruction and correction, INT8, a dense INT8 model for comparison, validation of all",
        "four, latency. No labels are used but to judge.",
        "",
        *_setting(outcomes),
        "",
        f"The commands reproduce each row; `{ZOO}` is a folder with the networks and data.",
    ]
    for section in SECTIONS:
        lines += section_lines(section, outcomes, zoo)
    return "\n".join(lines) + "\n"


def _setting(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Machines and versions, once each."""
    machines = {
        f"{o.machine.processor}, {o.machine.cores} cores, {o.machine.memory_mib / 1024:.0f} GiB memory": None
        for o in outcomes.values()
    }
    versions = {
        ", ".join(
            [f"Python {o.versions.python}", *(f"{k} {v}" for k, v in o.versions.packages.items())]
        ): None
        for o in outcomes.values()
    }
    return [f"Measured on {'; '.join(machines)}; {'; '.join(versions)}."]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("POT_SPARSITY_ZOO", str(ROOT.parent / "shared" / "zoo"))
    parser.add_argument("--zoo", type=Path, default=Path(default), help="folder with zoo.json")
    parser.add_argument("--cache", type=Path, required=True, help="file with one JSON line per finished run")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only these; * matches all"
    )
    parser.add_argument("--list", action="store_true", help="only list names and commands")
    parser.add_argument(
        "--render-only", action="store_true", help="run nothing, write the page from the cache"
    )
    parser.add_argument("--output", type=Path, default=TARGET, help="the page (default docs/results.md)")
    arguments = parser.parse_args()
    try:
        zoo: dict[str, Any] = json.loads((arguments.zoo / "zoo.json").read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(
            f"cannot read {arguments.zoo / 'zoo.json'}: {error.strerror}; name the folder with --zoo"
        )
    if arguments.list:
        for experiment in experiments():
            print(f"{experiment.name}\n    {command(experiment, zoo)}")
        return 0
    failed = 0 if arguments.render_only else fill_cache(arguments.cache, arguments.zoo, zoo, arguments.only)
    outcomes = read_cache(arguments.cache, zoo)
    if outcomes:
        arguments.output.write_text(page(outcomes, zoo), encoding="utf-8")
    missing = [e.name for e in experiments() if e.name not in outcomes]
    if missing:
        print(f"not in the cache: {', '.join(missing)}", file=sys.stderr)
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())
