"""Run the experiments of docs/results.md and write that page from their reports.

Every experiment is one `pot-sparsity optimize` command on a network of the zoo: a folder with a `zoo.json`
that names, for each network, its file, preprocessing, calibration and validation data. Outcomes are kept in
the cache, one JSON line each, so that an interrupted call goes on where it stopped: delete the cache once the
code has changed. Rows whose experiment is not in the cache are left out of the page.

The comparison with onnxsim is not run here: `--onnxsim` names files with the lines of `compare_onnxsim.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from onnxsim_tables import read_lines, section  # type: ignore[import-not-found]
from results_page import Outcome, page  # type: ignore[import-not-found]
from results_sections import (  # type: ignore[import-not-found]
    ZOO,
    Experiment,
    command,
    experiments,
)

from pot_sparsity.report.schema import Report

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "results.md"


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
            found[record["name"]] = Outcome.of(report)
    return found


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
    parser.add_argument(
        "--onnxsim", type=Path, nargs="+", default=[], metavar="FILE", help="lines of compare_onnxsim.py"
    )
    parser.add_argument("--note", default="", help="a sentence for the page on how the runs were made")
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
        more = section(read_lines(arguments.onnxsim), zoo, ZOO)
        arguments.output.write_text(page(outcomes, zoo, more, arguments.note), encoding="utf-8")
    missing = [e.name for e in experiments() if e.name not in outcomes]
    if missing:
        print(f"not in the cache: {', '.join(missing)}", file=sys.stderr)
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())
