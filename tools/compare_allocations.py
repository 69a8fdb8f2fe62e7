"""Compare all allocations on the classifiers of the zoo and write docs/allocation-tables.md.

Every network is one `pot-sparsity sweep`: the same solver and the same correction for every allocation at every
sparsity. The zoo is a folder with a `zoo.json` that names, for each network, its file, preprocessing, calibration and
validation data.

The cache is a folder with one sweep for each network, solved layers included. Finished ones that hold the points asked
for are kept, an interrupted one goes on where it stopped: delete the cache once the code has changed. Where output
distortion does not win, its model and the better ones are put together again from their layers to see which pictures
they get right, and zeros are allocated once more in the sparse model, as `optimize` does; what comes out is kept too,
in `answers.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import allocation_answers as answers  # type: ignore[import-not-found]
from allocation_page import Network, contests, page  # type: ignore[import-not-found]
from results_sections import SPLIT, ZOO, preprocess_arguments  # type: ignore[import-not-found]

from pot_sparsity.errors import PotSparsityError
from pot_sparsity.pipeline.intake import Sources
from pot_sparsity.pipeline.runfolder import STATE
from pot_sparsity.pipeline.sweeping.sweep_points import ALL
from pot_sparsity.report.sweep_io import SWEEP_JSON, read_sweep
from pot_sparsity.report.sweep_schema import Sweep

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "allocation-tables.md"
POINTS = (0.7, 0.8, 0.9)
ANSWERS = "answers.jsonl"


def classifiers(zoo: Mapping[str, Any], only: Sequence[str] = ()) -> list[str]:
    """Networks that are judged by top-1, those asked for."""
    named = [name for name, entry in zoo.items() if entry.get("metric") == "top1"]
    return [name for name in named if not only or any(fnmatch(name, pattern) for pattern in only)]


def arguments_of(entry: Mapping[str, Any], points: Sequence[float]) -> list[str]:
    """Command-line arguments with paths under ``$ZOO``, without the output folder."""
    given = ["sweep", f"{ZOO}/{entry['model']}", "--calibration", f"{ZOO}/{entry['calibration']}"]
    given += ["--validation", f"{ZOO}/{entry['validation']}"]
    if "labels" in entry:
        given += ["--validation-labels", f"{ZOO}/{entry['labels']}", "--validation-split", SPLIT]
    given += preprocess_arguments(entry.get("preprocess", {}))
    return [*given, "--points", ",".join(f"{point:g}" for point in points), "--correct", "bias"]


def command(entry: Mapping[str, Any], points: Sequence[float]) -> str:
    """The command as a user types it."""
    words = (w if w.startswith(ZOO) else shlex.quote(w) for w in arguments_of(entry, points))
    return " ".join(["pot-sparsity", *words, "-o", "trade-off"])


def finished(home: Path) -> Sweep | None:
    """The sweep in a folder, if there is one that came to its end."""
    return read_sweep(home) if (home / SWEEP_JSON).is_file() else None


def covers(sweep: Sweep | None, points: Sequence[float]) -> bool:
    """Whether a sweep has every allocation at all of these points."""
    found = set() if sweep is None else {(point.allocation, point.bound) for point in sweep.points}
    return {(name, point) for name in ALL for point in points} <= found


def run_sweep(
    entry: Mapping[str, Any], folder: Path, home: Path, points: Sequence[float], threads: int
) -> None:
    """Run the command in a process of its own; an interrupted sweep goes on, one with other points is replaced.

    Raises
    ------
    subprocess.CalledProcessError
        It fails; it has said why.
    """
    interrupted = (home / STATE / "run.json").is_file()
    how = ["--resume"] if interrupted else ["--force"] if home.exists() else []
    given = [part.replace(ZOO, str(folder)) for part in arguments_of(entry, points)]
    more = ["--threads", str(threads), "-o", str(home), "--quiet", *how]
    subprocess.run(
        [sys.executable, "-m", "pot_sparsity", *given, *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )


def answer(name: str, entry: Mapping[str, Any], folder: Path, cache: Path, threads: int) -> None:
    """Look closer, unless that is done, at every point where output distortion does not win."""
    home = cache / name
    known = answers.read(cache / ANSWERS, name, home)
    lost = contests(name, read_sweep(home), known)
    wanted = dict.fromkeys(point.id for contest in lost for point in (contest.own, contest.rival))
    missing = [point for point in wanted if point not in known]
    bounds = dict.fromkeys(contest.own.bound for contest in lost)
    again = [bound for bound in bounds if answers.refined(bound) not in known]
    sources = Sources(
        folder / entry["model"],
        folder / entry["calibration"],
        folder / entry["validation"],
        folder / entry["labels"] if "labels" in entry else None,
        SPLIT if "labels" in entry else None,
        entry.get("preprocess"),
        "openvino",
    )
    for point, found in answers.measure(sources, home, missing, again, threads):
        answers.append(cache / ANSWERS, name, home, point, found)


def fill_cache(
    cache: Path,
    folder: Path,
    zoo: Mapping[str, Any],
    names: Sequence[str],
    points: Sequence[float],
    threads: int,
) -> int:
    """Run what is missing; returns how many networks failed."""
    cache.mkdir(parents=True, exist_ok=True)
    failed = 0
    for number, name in enumerate(names, 1):
        try:
            if not covers(finished(cache / name), points):
                print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
                run_sweep(zoo[name], folder, cache / name, points, threads)
            answer(name, zoo[name], folder, cache, threads)
        except (subprocess.CalledProcessError, PotSparsityError) as error:
            print(f"    {name} failed: {error}", file=sys.stderr)
            failed += 1
    return failed


def read_networks(cache: Path, zoo: Mapping[str, Any]) -> list[Network]:
    """What the cache holds of the zoo's classifiers."""
    found = []
    for name in classifiers(zoo):
        sweep = finished(cache / name)
        if sweep is not None:
            points = sorted({point.bound for point in sweep.points})
            known = answers.read(cache / ANSWERS, name, cache / name)
            found.append(Network(name, sweep, command(zoo[name], points), known))
    return found


def parse(given: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("POT_SPARSITY_ZOO", str(ROOT.parent / "shared" / "zoo"))
    parser.add_argument("--zoo", type=Path, default=Path(default), help="folder with zoo.json")
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder with one sweep for each network that is done"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="only these networks; may be repeated"
    )
    parser.add_argument(
        "--points",
        type=lambda text: [float(part) for part in text.split(",")],
        default=list(POINTS),
        metavar="S,S,...",
        help="sparsities (0.7,0.8,0.9); a finished sweep without one of them is run again on its solved layers",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of every stage (2)")
    parser.add_argument(
        "--render-only", action="store_true", help="run nothing, write the page from the cache"
    )
    parser.add_argument(
        "--output", type=Path, default=TARGET, help="the page (default docs/allocation-tables.md)"
    )
    return parser, parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run what is missing and render the page."""
    parser, arguments = parse(given)
    try:
        zoo: dict[str, Any] = json.loads((arguments.zoo / "zoo.json").read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(
            f"cannot read {arguments.zoo / 'zoo.json'}: {error.strerror}; name the folder with --zoo"
        )
    names = classifiers(zoo, arguments.only)
    if not names:
        parser.error(f"no classifier is called so; there are {', '.join(classifiers(zoo))}")
    failed = 0
    if not arguments.render_only:
        failed = fill_cache(arguments.cache, arguments.zoo, zoo, names, arguments.points, arguments.threads)
    networks = read_networks(arguments.cache, zoo)
    if networks:
        arguments.output.write_text(page(networks), encoding="utf-8")
    missing = [name for name in classifiers(zoo) if name not in {network.name for network in networks}]
    if missing:
        print(f"not in the cache: {', '.join(missing)}", file=sys.stderr)
    return 1 if failed or not networks else 0


if __name__ == "__main__":
    raise SystemExit(main())
