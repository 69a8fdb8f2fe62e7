"""Which pictures the points of a sweep get right: what a paired comparison of two of them needs.

A sweep keeps percentages. Its layer solutions are in its database, so a point is put together again in seconds; that it
is the same model shows in its accuracy, which must be the sweep's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pot_sparsity.algorithms.arrays import Bool
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.pipeline.database import Database
from pot_sparsity.pipeline.intake import Sources, load_job
from pot_sparsity.pipeline.job import Options
from pot_sparsity.pipeline.levels import Level
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.stitch import stitch
from pot_sparsity.pipeline.sweep_points import choose
from pot_sparsity.recipe import validate_recipe
from pot_sparsity.report.sweep_io import SWEEP_JSON


def measure(sources: Sources, home: Path, points: Sequence[str], threads: int) -> Iterator[tuple[str, Bool]]:
    """Points of the sweep in ``home``, each with the samples that it gets right, ``[samples]``.

    Raises
    ------
    PotSparsityError
        A model that is put together again has another accuracy than the sweep says, or the sweep corrected more than
        biases.
    """
    chosen = [choose(home, point) for point in points]
    if not chosen:
        return
    sweep = chosen[0].sweep
    if sweep.correction != "bias":
        raise PotSparsityError(f"the models of the sweep in {str(home)!r} are more than stitched layers")
    recipe, metric = validate_recipe(sweep.recipe), sweep.data.metric
    options = Options(
        metric,
        None,
        keep_structure=sweep.keep_structure,
        to_openvino=False,
        threads=threads,
        baseline_int8=False,
        measure_latency=False,
        database=Database(chosen[0].database),
    )
    with ExitStack() as stack:
        job = load_job(sources, recipe, options, RunFolder(None), Silent())
        chosen[0].check(job)
        around, evaluator = Run(job, stack).surroundings(curves=False)
        for each in chosen:
            levels = {name: Level(zeros, recipe.pruning.pattern) for name, zeros in each.zeros.items()}
            right = evaluator(stitch(around, levels).model, quiet=True).correct[metric]
            found, said = 100.0 * float(right.mean()), each.point.metrics[metric]
            if abs(found - said) > 1e-9:
                raise PotSparsityError(
                    f"{each.point.id} of {str(home)!r}: {metric} {found:.2f}, the sweep says {said:.2f}: the code has "
                    "changed since; delete that folder"
                )
            yield each.point.id, right


def digest(home: Path) -> str:
    """What tells a sweep from others in its folder."""
    return hashlib.sha256((home / SWEEP_JSON).read_bytes()).hexdigest()


def read(path: Path, name: str, home: Path) -> dict[str, Bool]:
    """Answers of a network's points in the cache, of this very sweep."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    mark, found = digest(home), {}
    for line in lines:
        record = json.loads(line)
        if (record["entry"], record["sweep"]) == (name, mark):
            packed = np.frombuffer(bytes.fromhex(record["right"]), np.uint8)
            found[record["point"]] = np.unpackbits(packed, count=record["samples"]).astype(np.bool_)
    return found


def append(path: Path, name: str, home: Path, answers: Mapping[str, Bool]) -> None:
    """Add answers to the cache, one JSON line for each point."""
    mark = digest(home)
    with path.open("a", encoding="utf-8") as stream:
        for point, right in answers.items():
            record: dict[str, Any] = {"entry": name, "sweep": mark, "point": point}
            record |= {"samples": right.size, "right": np.packbits(right).tobytes().hex()}
            stream.write(json.dumps(record) + "\n")
