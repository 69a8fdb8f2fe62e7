"""Repeat the tables and figures of rate-distortion pruning on networks that train on CIFAR-10.

"Efficient joint optimization of layer-adaptive weight pruning in deep neural networks" compares, among other things,
its objective with that of single layers (table 4), two ways to refine its curves (tables 5 and 6), data with noise
(table 3), and sums of distortions with distortions of sums (figures 1 and 4). Here the same is measured on networks of
the zoo: a folder with a `zoo.json` that names, for each network, its file, preprocessing, calibration and validation
data. One more table compares what the curves cost, as published and as the default recipe measures them.

Distances are kept as arrays in the cache folder and outcomes as JSON lines, so that an interrupted call goes on where
it stopped: delete the folder once the code or the recipes `rd`, `rd_iterative` or `default` have changed. The page is
printed in Markdown or written with its figures beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rd_network import Network, published_curves  # type: ignore[import-not-found]
from rd_page import (  # type: ignore[import-not-found]
    CURVES,
    ITERATIVE,
    OBJECTIVES,
    PAIR_PERCENTS,
    PRUNED,
    REPAIRED,
    SPEED_PERCENTS,
    STEPS,
    TABLES,
    page,
)

from pot_sparsity.pipeline import optimize
from pot_sparsity.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("resnet20_akamaster_cifar10", "resnet32_akamaster_cifar10")
Outcome = dict[str, Any]
Outcomes = dict[str, Outcome]
#: Cells of one network: the name in the cache, and what measures it.
Steps = Iterator[tuple[str, Callable[[], Outcome]]]


@dataclass
class Cache:
    """Outcomes by name, one JSON line each in a folder that also holds arrays."""

    folder: Path
    known: Outcomes = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self._file.is_file():
            records = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
            self.known = {record["name"]: record["outcome"] for record in records}

    @property
    def _file(self) -> Path:
        return self.folder / "outcomes.jsonl"

    def once(self, name: str, measure: Callable[[], Outcome]) -> None:
        """Measure what is not known yet."""
        if name in self.known:
            return
        print(name, file=sys.stderr, flush=True)
        self.known[name] = measure()
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, "outcome": self.known[name]}) + "\n")


def measure(
    network: Network, tables: Sequence[str], cache: Cache, zoo: Path, entry: Outcome, every: int
) -> None:
    """Everything that the tables and figures need of one network; ``every`` as for :func:`speed`."""
    name = network.name
    cache.once(f"{name}/settings", lambda: {"samples": network.samples})
    steps: dict[str, Callable[[Network], Steps]] = {
        "6": _refinements,
        "figures": _figures,
        "speed": partial(_speed, every=every),
        "4": _objectives,
        "3": _noise,
    }
    for table, step in steps.items():
        if table in tables:
            for key, work in step(network):
                cache.once(f"{name}/{key}", work)
    if "5" in tables:
        for mode in ITERATIVE:
            for aggregate, cleaning in CURVES:
                cache.once(
                    f"{name}/iterative/{mode}/{aggregate}/{cleaning}",
                    lambda mode=mode, a=aggregate, c=cleaning: rounds(zoo, entry, mode, a, c),  # type: ignore[misc]
                )


def _refinements(network: Network) -> Steps:
    for aggregate, cleaning in CURVES:
        for percent in PRUNED:

            def work(a: str = aggregate, c: str = cleaning, p: int = percent) -> Outcome:
                curves = network.curves(aggregate=a, cleaning=c)
                found: Outcome = network.outcome(network.allocated(curves, p / 100))
                return found

            def searched(a: str = aggregate, c: str = cleaning, p: int = percent) -> Outcome:
                curves = network.curves(aggregate=a, cleaning=c)
                found: Outcome = network.outcome(network.by_ternary_search(curves, p / 100))
                return found

            yield f"pruned/network/{aggregate}/{cleaning}/{percent}", work
            yield f"pruned/ternary/{aggregate}/{cleaning}/{percent}", searched


def _objectives(network: Network) -> Steps:
    for kind in OBJECTIVES:
        for percents, how in ((PRUNED, "pruned"), (REPAIRED, "repaired")):
            for percent in percents:

                def work(k: str = kind, p: int = percent, how: str = how) -> Outcome:
                    zeros = network.allocated(network.curves(k), p / 100)
                    found: Outcome = network.outcome(zeros) if how == "pruned" else network.repaired(zeros)
                    return found

                yield f"{how}/{kind}/worst/outliers/{percent}", work


def _noise(network: Network) -> Steps:
    for percent in PRUNED:

        def lamp(p: int = percent) -> Outcome:
            found: Outcome = network.outcome(network.of_weights("lamp", p / 100))
            return found

        def noise(p: int = percent) -> Outcome:
            found: Outcome = network.outcome(network.allocated(network.curves("noise"), p / 100))
            return found

        yield f"pruned/lamp/{percent}", lamp
        yield f"pruned/noise/worst/outliers/{percent}", noise


def _speed(network: Network, every: int) -> Steps:
    yield "speed", lambda: speed(network, every)
    for percent in SPEED_PERCENTS:

        def work(p: int = percent) -> Outcome:
            found: Outcome = network.repaired(network.allocated(network.curves(), p / 100))
            return found

        def default(p: int = percent) -> Outcome:
            found: Outcome = network.repaired(network.our_zeros(p / 100))
            return found

        yield f"repaired/network/worst/outliers/{percent}", work
        yield f"repaired/default/{percent}", default


def speed(network: Network, every: int) -> Outcome:
    """Seconds of the default recipe's curves and of the published ones, one after the other, and of the solver.

    Of the published procedure every ``every``-th run is made.
    """
    ours = network.our_curves[1]
    found, published = published_curves(network, every)
    known = {name: distances[:, every - 1 :: every] for name, distances in network.distances().items()}
    apart = [float(np.abs(found[name] - known[name]).max() / known[name].max()) for name in known]
    curves = network.curves()
    start = time.perf_counter()
    network.allocated(curves, 0.8)
    return {
        "published": vars(published),
        "ours": vars(ours),
        "moments": network.our_moments(),
        "solver": time.perf_counter() - start,
        "apart": max(apart),
        "layers": len(known),
        "every": every,
    }


def _figures(network: Network) -> Steps:
    yield "additivity", lambda: additivity(network)
    yield "approximation", lambda: approximation(network)


def additivity(network: Network) -> Outcome:
    """Mean squared distances of pairs of adjacent layers, together and summed, by sparsity."""
    found: dict[str, Any] = {}
    singles = network.distances()
    names = [item.layer.name for item in network.layers]
    for percent in PAIR_PERCENTS:
        zeros = {item.layer.name: round(percent / 100 * item.layer.size) for item in network.layers}
        alone = [float(singles[name][:, percent - 1].mean()) for name in names]
        found[str(percent)] = {
            "alone": [first + second for first, second in pairwise(alone)],
            "together": [
                float(network.meter(network.pruned({name: zeros[name] for name in pair})).mean())
                for pair in pairwise(names)
            ],
        }
    return found


def approximation(network: Network) -> Outcome:
    """Distance with all layers pruned, and the sum of those of single layers, at many sparsities of the network.

    Once with the zeros that the curves ask for, once with the same sparsity in all layers.
    """
    curves = network.curves(aggregate="mean")
    found: dict[str, Any] = {}
    for kind in ("allocated", "uniform"):
        points: dict[str, list[float]] = {"percent": [], "sum": [], "real": []}
        for percent in STEPS:
            zeros = (
                network.allocated(curves, percent / 100)
                if kind == "allocated"
                else {item.layer.name: round(percent / 100 * item.layer.size) for item in network.layers}
            )
            parts = [curves[name].at(np.array([count]))[0] for name, count in zeros.items()]
            points["percent"].append(percent)
            points["sum"].append(float(sum(parts)))
            points["real"].append(float(network.meter(network.pruned(zeros)).mean()))
        found[kind] = points
    return found


def rounds(zoo: Path, entry: Outcome, mode: str, aggregate: str, cleaning: str) -> Outcome:
    """Accuracy after each round of the recipe ``rd_iterative``."""
    changes = [*ITERATIVE[mode], f"allocation.aggregate={aggregate}", f"allocation.cleaning={cleaning}"]
    report = optimize(
        zoo / entry["model"],
        zoo / entry["calibration"],
        validation=zoo / entry["validation"],
        recipe=load_recipe("rd_iterative", changes),
        preprocess=entry.get("preprocess"),
        baseline_int8=False,
        measure_latency=False,
    ).report
    return {
        "rounds": [[item.sparsity, item.metrics["top1"]] for item in report.iterations],
        "seconds": report.seconds,
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("POT_SPARSITY_ZOO", str(ROOT.parent / "shared" / "zoo"))
    parser.add_argument("--zoo", type=Path, default=Path(default), help="folder with zoo.json")
    parser.add_argument("--cache", type=Path, required=True, help="folder of what was measured before")
    parser.add_argument(
        "--network", action="append", default=[], metavar="NAME", help=f"by default {', '.join(NETWORKS)}"
    )
    parser.add_argument(
        "--table", action="append", default=[], choices=TABLES, help="all and the figures by default"
    )
    parser.add_argument(
        "--samples", type=int, default=1024, help="calibration samples that curves are measured on"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        choices=(1, 2, 4, 5, 10, 20),
        help="make one in so many runs of the published procedure, and multiply its seconds",
    )
    parser.add_argument("--render-only", action="store_true", help="run nothing, print what the cache holds")
    parser.add_argument(
        "--output", type=Path, help="write the page there and its figures beside it (printed by default)"
    )
    arguments = parser.parse_args(given)
    networks = arguments.network or NETWORKS
    arguments.cache.mkdir(parents=True, exist_ok=True)
    cache = Cache(arguments.cache)
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
        for name in networks:
            with ExitStack() as stack:
                network = Network(
                    name,
                    arguments.zoo,
                    zoo[name],
                    arguments.cache,
                    stack,
                    samples=arguments.samples,
                    threads=arguments.threads,
                )
                measure(network, arguments.table or TABLES, cache, arguments.zoo, zoo[name], arguments.every)
    text = page(networks, cache.known, arguments.output and arguments.output.parent)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
