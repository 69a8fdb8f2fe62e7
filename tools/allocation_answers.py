"""Which pictures the points of a sweep get right: what a paired comparison of two of them needs.

A sweep keeps percentages. Its layer solutions are in its database, so a point is put together again in seconds; that
it is the same model shows in its accuracy, which must be the sweep's. A sweep also measures curves in the dense model
only: the model that `optimize` makes of them, with zeros allocated again in the sparse model, is made here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pot_sparsity.algorithms.arrays import Bool
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.compress import compress
from pot_sparsity.pipeline.intake import Sources, load_job
from pot_sparsity.pipeline.job import Options
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.store.database import Database
from pot_sparsity.pipeline.store.levels import Level
from pot_sparsity.pipeline.store.stitch import stitch
from pot_sparsity.pipeline.sweeping.sweep_points import at_once, choose, merged
from pot_sparsity.recipe import Recipe, validate_recipe
from pot_sparsity.report.sweep_io import SWEEP_JSON, read_sweep
from pot_sparsity.report.sweep_schema import Sweep


@dataclass(frozen=True)
class Answers:
    """What a model does on the validation samples: which are right, ``[samples]``, and its metrics."""

    right: Bool
    metrics: Mapping[str, float]


def refined(bound: float) -> str:
    """What the model is called whose zeros are allocated again in the sparse model."""
    return f"refined@{bound:.2f}"


def measure(
    sources: Sources, home: Path, points: Sequence[str], again: Sequence[float], threads: int
) -> Iterator[tuple[str, Answers]]:
    """Points of the sweep in ``home`` and what they do, then the sparsities ``again``, allocated as `optimize` does.

    Raises
    ------
    PotSparsityError
        A model that is put together again has another accuracy than the sweep says, or the sweep corrected more than
        biases.
    """
    if not points and not again:
        return
    sweep = read_sweep(home)
    if sweep.correction != "bias":
        raise PotSparsityError(f"the models of the sweep in {str(home)!r} are more than stitched layers")
    recipe, metric = _biases_only(sweep), sweep.data.metric
    options = Options(
        metric,
        None,
        keep_structure=sweep.keep_structure,
        to_openvino=False,
        threads=threads,
        baseline_int8=False,
        measure_latency=False,
        database=Database(None if sweep.database is None else home / sweep.database),
    )
    with ExitStack() as stack:
        job = load_job(sources, recipe, options, RunFolder(None), Silent())
        around, evaluator = Run(job, stack).surroundings(curves=bool(again))

        def judged(model: Model) -> Answers:
            found = evaluator(model, quiet=True)
            return Answers(found.correct[metric], found.metrics)

        for chosen in (choose(home, point) for point in points):
            chosen.check(job)
            levels = {name: Level(zeros, recipe.pruning.pattern) for name, zeros in chosen.zeros.items()}
            found, said = judged(stitch(around, levels).model), chosen.point.metrics[metric]
            if abs(found.metrics[metric] - said) > 1e-9:
                raise PotSparsityError(
                    f"{chosen.point.id} of {str(home)!r}: {metric} {found.metrics[metric]:.2f}, the sweep says "
                    f"{said:.2f}: the code has changed since; delete that folder"
                )
            yield chosen.point.id, found
        for bound in again:
            yield refined(bound), judged(compress(around, bound, refined(bound)).model)


def _biases_only(sweep: Sweep) -> Recipe:
    """The sweep's recipe for a run that prunes and corrects as the sweep's points are, and does nothing else."""
    never = {"differential": "never", "normalization": "never", "batch_norm": "none"}
    return validate_recipe(
        merged(
            at_once(sweep.recipe), {"correction": never, "schedule": {"kind": "one_shot", "max_drop": None}}
        )
    )


def digest(home: Path) -> str:
    """What tells a sweep from others in its folder."""
    return hashlib.sha256((home / SWEEP_JSON).read_bytes()).hexdigest()


def read(path: Path, name: str, home: Path) -> dict[str, Answers]:
    """What is known of a network's models, those of this very sweep."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    mark = digest(home)
    found: dict[str, Answers] = {}
    for line in lines:
        record = json.loads(line)
        if (record["entry"], record["sweep"]) == (name, mark):
            packed = np.frombuffer(bytes.fromhex(record["right"]), np.uint8)
            right = np.unpackbits(packed, count=record["samples"]).astype(np.bool_)
            found[record["point"]] = Answers(right, record["metrics"])
    return found


def append(path: Path, name: str, home: Path, point: str, answers: Answers) -> None:
    """Add a line to the cache."""
    record: dict[str, Any] = {
        "entry": name,
        "sweep": digest(home),
        "point": point,
        "metrics": answers.metrics,
        "samples": answers.right.size,
        "right": np.packbits(answers.right).tobytes().hex(),
    }
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
