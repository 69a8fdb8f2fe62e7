"""Repeat the ablations of the POT paper (its tables 4, 5 and 6) on networks that train on CIFAR-10.

"Post-training deep neural network pruning via layer-wise calibration" ablates bias correction, weight decay and the
sparsity schedule on ImageNet networks; here the same rows are run with `optimize` and the recipe `pot` on networks of
the zoo: a folder with a `zoo.json` that names, for each network, its file, preprocessing, calibration and validation
data. All results are float32 sparse models. One more table holds what the paper says in words of optimizers and losses.

Outcomes are kept in the cache, one JSON line each, so that an interrupted call goes on where it stopped: delete the
cache once the code or the recipe `pot` has changed. The tables are printed in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pot_sparsity.pipeline import optimize
from pot_sparsity.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("resnet20_akamaster_cifar10", "resnet56_akamaster_cifar10")
PERCENTS = (50, 70)
#: Iterations of tuning without a schedule; the eleven steps of the cubic one share them.
ITERATIONS, STEPS = 33, 11

_ONE_SHOT = ("quantization.enabled=false", "schedule.kind=one_shot", "schedule.start=dense")
_UNTUNED = (*_ONE_SHOT, "reconstruction.method=closed_form")
_TUNED = (*_ONE_SHOT, f"reconstruction.tuning.iterations={ITERATIONS}")


def _tuning(**settings: object) -> tuple[str, ...]:
    return (*_TUNED, *(f"reconstruction.tuning.{key}={value}" for key, value in settings.items()))


@dataclass(frozen=True)
class Row:
    """One line of a table: what it is called, what differs from the recipe ``pot``, and what the paper got."""

    label: str
    settings: tuple[str, ...]
    paper: str = "-"


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    key: str
    title: str
    text: str
    paper: str
    rows: tuple[Row, ...]


TABLES = (
    Table(
        "4",
        "Table 4: bias and variance correction",
        "Pruning by L2-normalised magnitude without fine-tuning.",
        "paper: ResNet-18, ImageNet, 50 %",
        (
            Row(
                "L2-normalized magnitude",
                (*_UNTUNED, "correction.weights=none", "correction.bias=false"),
                "64.86",
            ),
            Row("+ activation bias correction", (*_UNTUNED, "correction.weights=none"), "66.85"),
            Row("+ activation and weight bias correction", _UNTUNED, "67.46"),
        ),
    ),
    Table(
        "5",
        "Table 5: L2 regularization of the fine-tuning",
        f"Adam, mean squared error, {ITERATIONS} batches of 50 samples, 40 updates on each; no schedule.",
        "paper: ResNet-18, ImageNet, 50 %",
        (
            Row("0", _TUNED, "68.97"),
            Row("1e-6", _tuning(weight_decay="1.0e-6"), "67.78"),
            Row("1e-5", _tuning(weight_decay="1.0e-5"), "38.14"),
            Row("1e-4", _tuning(weight_decay="1.0e-4")),
            Row("1e-3", _tuning(weight_decay="1.0e-3")),
            Row("1e-2", _tuning(weight_decay="1.0e-2")),
        ),
    ),
    Table(
        "6",
        "Table 6: cubic schedule",
        f"From 10 % in 10 iterations; {ITERATIONS * 40} updates with and without the schedule.",
        "paper: ResNet-18 / ResNet-50 / GoogleNetV4, ImageNet, 50 %",
        (
            Row("without schedule", _TUNED, "68.76 / 75.43 / 79.37"),
            Row(
                "with schedule",
                ("quantization.enabled=false", f"reconstruction.tuning.iterations={ITERATIONS // STEPS}"),
                "68.91 / 75.60 / 78.10",
            ),
        ),
    ),
    Table(
        "text",
        "Optimizers, losses and generalization techniques",
        'What section 3 of the paper compares in words ("Adam outperforms", "MSE was found to be a better '
        'choice"), without a schedule, with the learning rates that the recipe has for each optimizer; and the closed '
        "form of the same problem, which the tuning walks towards.",
        "paper",
        (
            Row("Adam, mean squared error", _TUNED, "best"),
            Row(
                "Adam, ten times the learning rates",
                _tuning(learning_rate="1.0e-4", bias_learning_rate="1.0e-3"),
            ),
            Row(
                "SGD with momentum", _tuning(optimizer="sgd", learning_rate="null", bias_learning_rate="null")
            ),
            Row(
                "SGD with momentum, 0.1", _tuning(optimizer="sgd", learning_rate=0.1, bias_learning_rate=0.1)
            ),
            Row("Adadelta", _tuning(optimizer="adadelta", learning_rate="null", bias_learning_rate="null")),
            Row("Lookahead (5 steps, 0.5)", _tuning(lookahead_steps=5)),
            Row("stochastic weight averaging", _tuning(averaging="swa")),
            Row("L1 loss", _tuning(loss="l1")),
            Row("Huber loss (0.1)", _tuning(loss="huber", huber_delta=0.1)),
            Row("cosine similarity", _tuning(loss="cosine")),
            Row("inputs of the sparse model", (*_TUNED, "reconstruction.input=sparse")),
            Row("closed form", (*_UNTUNED, "pruning.method=magnitude_refit", "correction.weights=none")),
            Row(
                "closed form, inputs of the sparse model",
                (
                    *_UNTUNED,
                    "pruning.method=magnitude_refit",
                    "correction.weights=none",
                    "reconstruction.input=sparse",
                ),
            ),
        ),
    ),
)


def recipe_of(row: Row, percent: int) -> Recipe:
    """The recipe behind a cell."""
    return load_recipe("pot", [*row.settings, f"sparsity={percent / 100:g}"])


def run(network: str, recipe: Recipe, folder: Path, zoo: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell; returns what the tables need of its report."""
    entry = zoo[network]
    report = optimize(
        folder / entry["model"],
        folder / entry["calibration"],
        validation=folder / entry["validation"],
        recipe=recipe,
        preprocess=entry.get("preprocess"),
        baseline_int8=False,
        measure_latency=False,
    ).report
    variants = {variant.name: variant for variant in report.variants}
    sparse = variants["sparse"]
    return {
        "dense": variants["dense"].metrics,
        "sparse": sparse.metrics,
        "interval": sparse.interval,
        "zeros": sparse.zeros,
        "weights": sparse.weights,
        "seconds": report.seconds,
    }


def name_of(network: str, percent: int, row: Row) -> str:
    """Name of a cell in the cache; rows of equal settings share it."""
    return "/".join([network, str(percent), *row.settings])


def read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    return {record["name"]: record["outcome"] for record in records}


def cell(outcome: Mapping[str, Any] | None) -> str:
    """Accuracy, and its paired difference to the dense network on the same samples."""
    if outcome is None:
        return "-"
    top1 = outcome["sparse"]["top1"]
    if "top1" not in outcome["interval"]:
        return f"{top1:.2f}"
    difference, low, high = outcome["interval"]["top1"]
    return f"{top1:.2f} ({difference:+.2f} [{low:+.2f}, {high:+.2f}])"


def table_lines(
    table: Table,
    networks: Sequence[str],
    percents: Sequence[int],
    outcomes: Mapping[str, dict[str, Any]],
) -> list[str]:
    """A table in Markdown; rows and columns of which nothing has run are left out, other such cells are dashes."""
    columns = [
        (network, percent)
        for network in networks
        for percent in percents
        if any(name_of(network, percent, row) in outcomes for row in table.rows)
    ]
    head = ["", *(f"{network}, {percent} %" for network, percent in columns), table.paper]
    lines = [f"## {table.title}", "", table.text, ""]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in table.rows:
        if not any(name_of(network, percent, row) in outcomes for network, percent in columns):
            continue
        found = [cell(outcomes.get(name_of(network, percent, row))) for network, percent in columns]
        lines.append("| " + " | ".join([row.label, *found, row.paper]) + " |")
    return lines


def page(
    tables: Sequence[Table],
    networks: Sequence[str],
    percents: Sequence[int],
    outcomes: Mapping[str, dict[str, Any]],
) -> str:
    """All tables."""
    done = {name.partition("/")[0]: outcome["dense"]["top1"] for name, outcome in outcomes.items()}
    dense = {network: done[network] for network in networks if network in done}
    lines = [
        "# The POT paper's ablations, repeated",
        "",
        "This page is generated by `tools/reproduce_pot.py`; do not edit it.",
        "",
        "Top-1 in percent, and behind it the difference to the dense network on the same samples with its 95 %",
        "interval (paired). Dense: " + ", ".join(f"{name} {dense[name]:.2f}" for name in dense) + ".",
    ]
    for table in tables:
        lines += ["", *table_lines(table, networks, percents, outcomes)]
    return "\n".join(lines) + "\n"


def fill_cache(
    path: Path,
    folder: Path,
    zoo: Mapping[str, Any],
    tables: Sequence[Table],
    networks: Sequence[str],
    percents: Sequence[int],
) -> None:
    """Run what is missing, networks and sparsities one after the other."""
    known = read_cache(path)
    for network in networks:
        for percent in percents:
            for row in (row for table in tables for row in table.rows):
                name = name_of(network, percent, row)
                if name in known:
                    continue
                print(f"{network}, {percent} %: {row.label}", file=sys.stderr, flush=True)
                known[name] = run(network, recipe_of(row, percent), folder, zoo)
                record = {"name": name, "outcome": known[name]}
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("POT_SPARSITY_ZOO", str(ROOT.parent / "shared" / "zoo"))
    parser.add_argument("--zoo", type=Path, default=Path(default), help="folder with zoo.json")
    parser.add_argument("--cache", type=Path, required=True, help="file with one JSON line per finished run")
    parser.add_argument(
        "--network", action="append", default=[], metavar="NAME", help=f"by default {', '.join(NETWORKS)}"
    )
    parser.add_argument(
        "--sparsity", action="append", type=int, default=[], metavar="PERCENT", help="by default 50 and 70"
    )
    parser.add_argument(
        "--table", action="append", default=[], choices=[t.key for t in TABLES], help="all by default"
    )
    parser.add_argument(
        "--render-only", action="store_true", help="run nothing, print the tables of the cache"
    )
    parser.add_argument("--output", type=Path, help="write the page there (printed by default)")
    arguments = parser.parse_args(given)
    tables = [table for table in TABLES if not arguments.table or table.key in arguments.table]
    networks, percents = arguments.network or NETWORKS, arguments.sparsity or PERCENTS
    if not arguments.render_only:
        try:
            zoo: dict[str, Any] = json.loads((arguments.zoo / "zoo.json").read_text(encoding="utf-8"))
        except OSError as error:
            parser.error(
                f"cannot read {arguments.zoo / 'zoo.json'}: {error.strerror}; name the folder with --zoo"
            )
        missing = [name for name in networks if name not in zoo]
        if missing:
            parser.error(f"the zoo has no network {missing[0]!r}; it has {', '.join(sorted(zoo))}")
        fill_cache(arguments.cache, arguments.zoo, zoo, tables, networks, percents)
    text = page(tables, networks, percents, read_cache(arguments.cache))
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
