"""Measure bit operations against top-1 on networks of the zoo and write docs/bop-curve.md from the results.

After Figure 3 of Optimal Brain Compression: every layer chooses between 8 and 4 bits, dense and 2:4. All choices of
all layers are measured once; each point then takes a search over them and one walk through the network. The zoo is a
folder with a `zoo.json` that names, for each network, its file, preprocessing, calibration and validation data.

Points are kept in the cache, one JSON line each, so that an interrupted call goes on where it stopped: delete the
cache once the code has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bop_page import page  # type: ignore[import-not-found]

from pot_sparsity.algorithms.quantization.choices import DENSE_BITS, BitChoice
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.metrics import paired_interval
from pot_sparsity.pipeline.bits.bit_levels import BOPS, Measured, measure_bits
from pot_sparsity.pipeline.bits.mixed import compress_bits, with_integers
from pot_sparsity.pipeline.compress import Surroundings
from pot_sparsity.pipeline.evaluate import Evaluator
from pot_sparsity.pipeline.intake import Sources, load_job
from pot_sparsity.pipeline.job import Options
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.reporting import machine
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "bop-curve.md"
#: Points between the extremes of which all layers choose the same.
BETWEEN = 6


@dataclass(frozen=True)
class Point:
    """One model of the curve: what it is called, and the index of each layer's choice."""

    name: str
    chosen: Mapping[str, int]


def points(measured: Measured, between: int) -> list[Point]:
    """All layers alike (but the first and the last, where the recipe fixes them), and budgets in equal ratios."""
    names = dict.fromkeys(str(choice) for levels in measured.layers for choice in levels.choices)
    uniform = [Point(f"all {name}", _all_alike(measured, BitChoice.parse(name))) for name in names]
    sizes = sorted(measured.bops(point.chosen) for point in uniform)
    budgets = np.geomspace(sizes[-1], sizes[0], between + 2)[1:-1].tolist()
    return uniform + [Point(f"budget {budget:.4f}", measured.chosen(budget)) for budget in budgets]


def _all_alike(measured: Measured, wanted: BitChoice) -> dict[str, int]:
    """That choice for every layer that has it, without the pattern where a layer has none, else its only one."""
    chosen = {}
    for levels in measured.layers:
        plain = replace(wanted, pattern=None)
        known = [choice for choice in (wanted, plain, levels.choices[0]) if choice in levels.choices]
        chosen[levels.item.layer.name] = levels.choices.index(known[0])
    return chosen


def published_reduction(measured: Measured, chosen: Mapping[str, int]) -> float:
    """How many times fewer bit operations there are as OBC counts them: multiplications times bits, once."""
    dense = total = 0.0
    for levels in measured.layers:
        at = chosen[levels.item.layer.name]
        choice, cost = levels.choices[at], float(levels.curve.cost(BOPS)[at])
        total += cost / max(choice.weight_bits, choice.activation_bits)
        dense += DENSE_BITS * _macs(levels.choices[0], float(levels.curve.cost(BOPS)[0]))
    return dense / total


def _macs(choice: BitChoice, bops: float) -> float:
    """Multiply-accumulates of a choice without a pattern."""
    if choice.pattern is not None:
        raise ValueError(f"the first of mixed.choices must have no pattern, not {choice}")
    return bops / choice.bops(1.0)


def measure_point(
    point: Point, measured: Measured, around: Surroundings, evaluator: Evaluator, metric: str
) -> dict[str, Any]:
    """Put the model of a point together, once as OBC does and once with the walk, and validate both."""
    start = time.process_time()
    recipe = around.recipe
    still = recipe.model_copy(
        update={
            "reconstruction": recipe.reconstruction.model_copy(update={"input": "dense"}),
            "correction": recipe.correction.model_copy(update={"differential": "never"}),
        }
    )
    stitched = compress_bits(replace(around, recipe=still), measured, point.chosen, "stitched")
    model = compress_bits(around, measured, point.chosen, "walked")
    seconds = time.process_time() - start
    final = with_integers(model.compressed.model, model.compressed.solutions)
    found, alone = evaluator(final, exact=False), evaluator(stitched.compressed.model)
    difference = paired_interval(evaluator.dense.correct[metric], found.correct[metric])
    weights = sum(item.layer.size for item in around.dense)
    zeros = sum(int((s.weight == 0.0).sum()) for s in model.compressed.solutions.values())
    return {
        "point": point.name,
        "bops": model.bops,
        "published_reduction": published_reduction(measured, point.chosen),
        "choices": dict(Counter(str(choice) for choice in model.choices.values())),
        "layers": {name: str(choice) for name, choice in model.choices.items()},
        "zeros": zeros / weights,
        "predicted": sum(
            float(levels.curve.distortion[point.chosen[levels.item.layer.name]]) for levels in measured.layers
        ),
        "metrics": found.metrics,
        "difference": list(difference),
        "stitched": alone.metrics,
        "seconds": seconds,
    }


def measure(
    entry: Mapping[str, Any], folder: Path, recipe: Recipe, threads: int, between: int, known: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What all points share, then the points that are not known yet."""
    metric = str(entry.get("metric", "top1"))
    sources = Sources(
        folder / entry["model"],
        folder / entry["calibration"],
        folder / entry["validation"],
        folder / entry["labels"] if "labels" in entry else None,
        "dev" if "labels" in entry else None,
        entry.get("preprocess"),
        "openvino",
    )
    options = Options(metric, None, False, False, threads, False, False)
    with ExitStack() as stack:
        job = load_job(sources, recipe, options, RunFolder(None), Silent())
        start = time.process_time()
        around, evaluator = Run(job, stack).surroundings(curves=False)
        measured = measure_bits(around)
        seconds = time.process_time() - start
        todo = [point for point in points(measured, between) if point.name not in known]
        for point in todo:
            record = measure_point(point, measured, around, evaluator, metric)
            yield record | {
                "metric": metric,
                "dense": evaluator.dense.metrics,
                "preparation_seconds": seconds,
                "validation": len(job.validation),
                "calibration": len(job.samples),
                "machine": machine().model_dump(),
            }


def read_cache(path: Path, setting: str) -> list[dict[str, Any]]:
    """Records of points measured with this setting."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["setting"] == setting]


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("POT_SPARSITY_ZOO", str(ROOT.parent / "shared" / "zoo"))
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help="networks to measure; none only renders")
    parser.add_argument("--zoo", type=Path, default=Path(default), help="folder with zoo.json")
    parser.add_argument(
        "--cache", type=Path, required=True, help="file with one JSON line per finished point"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a recipe key")
    parser.add_argument(
        "--between", type=int, default=BETWEEN, help=f"points between the extremes ({BETWEEN})"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of every stage (2)")
    parser.add_argument("--output", type=Path, default=TARGET, help="the page (default docs/bop-curve.md)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is missing and render the page."""
    arguments = parse(given)
    setting = " ".join(sorted(arguments.set))
    try:
        recipe = load_recipe("obc_bops", arguments.set)
        zoo = (
            json.loads((arguments.zoo / "zoo.json").read_text(encoding="utf-8")) if arguments.entries else {}
        )
        for name in arguments.entries:
            known = [r["point"] for r in read_cache(arguments.cache, setting) if r["entry"] == name]
            for record in measure(
                zoo[name], arguments.zoo, recipe, arguments.threads, arguments.between, known
            ):
                line = {"entry": name, "setting": setting, **record}
                with arguments.cache.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
                value = record["metrics"][record["metric"]]
                print(f"{name}: {record['point']}: {record['bops']:.4f} {value:.2f}", file=sys.stderr)
    except PotSparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, KeyError) as error:
        print(f"error: {error}: name the folder with zoo.json with --zoo, and its entries", file=sys.stderr)
        return 2
    records = read_cache(arguments.cache, setting)
    if not records:
        print("error: the cache holds no point: name networks to measure", file=sys.stderr)
        return 2
    arguments.output.write_text(page(records, setting), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
