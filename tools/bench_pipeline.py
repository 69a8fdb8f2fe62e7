"""Measure where the time and the memory of one run go; prints one JSON object.

Without --memory: seconds and peak memory by stage (as the report has them; a peak is the highest resident
memory up to the end of that stage), the total, and its ratio to NNCF's quantization alone of the same model
with the same preset and samples, once, measured afterwards in the same process. What lies between stages is
the judging on held-out samples. Without MODEL the network and data that ship with the package are used.

With --memory 256,2048: the calibration set is cut or repeated to each of these lengths and every run has a
process of its own, so that its peak is its own; at most 64 validation samples are used.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from pot_sparsity.data import Dataset, Preprocess, load_dataset, load_preprocess
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.graph.load import load_model
from pot_sparsity.pipeline import Result, optimize
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.quantization import quantize
from pot_sparsity.recipe import Recipe, load_recipe

VALIDATION_SAMPLES = 64  # where memory is measured


@dataclass(frozen=True)
class Job:
    """What is measured: a model, its data and the recipe."""

    model: Path
    calibration: Dataset
    validation: Dataset | None
    recipe: Recipe
    threads: int | None

    def run(self) -> Result:
        """Optimize in memory, nothing is written."""
        return optimize(
            self.model,
            self.calibration,
            validation=self.validation,
            recipe=self.recipe,
            threads=self.threads,
        )


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="model file (default: the demo's network)")
    parser.add_argument("--calibration", help="folder of images, .npz or module:callable; goes with MODEL")
    parser.add_argument("--validation", help="in the same forms (default: held-out calibration samples)")
    parser.add_argument("--validation-labels", type=Path, help="CSV or .npz with labels")
    parser.add_argument("--validation-split", help="rows of that CSV to use")
    parser.add_argument("--preprocess", type=Path, help="JSON or YAML file with the preprocessing of images")
    parser.add_argument("--recipe", help="recipe file or name (default: default)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a recipe key")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--memory", metavar="N,N", help="measure peak memory for these numbers of calibration samples"
    )
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)  # one run of --memory
    arguments = parser.parse_args(given)
    if arguments.model is not None and arguments.calibration is None:
        parser.error("--calibration is needed with a model of your own")
    if arguments.model is None and (arguments.calibration or arguments.validation or arguments.preprocess):
        parser.error("--calibration, --validation and --preprocess go with a MODEL")
    if arguments.memory and not all(part.isdecimal() and int(part) for part in arguments.memory.split(",")):
        parser.error(f"--memory {arguments.memory}: give numbers of samples, such as 256,2048")
    return arguments


def prepare(arguments: argparse.Namespace, stack: ExitStack) -> Job:
    """Open model and data; with ``--length`` the data are brought to that length."""
    model, calibration, validation = arguments.model, arguments.calibration, arguments.validation
    pictures = load_preprocess(arguments.preprocess)
    if model is None:
        model, calibration, validation, pictures = _demo(stack)
    inputs = input_specs(load_model(model))
    samples = load_dataset(calibration, inputs, pictures)
    judged = None
    if validation is not None:
        judged = load_dataset(
            validation,
            inputs,
            pictures,
            labels=arguments.validation_labels,
            split=arguments.validation_split,
        )
    if arguments.length is not None:
        judged = samples if judged is None else judged
        judged = judged.subset(np.arange(min(VALIDATION_SAMPLES, len(judged))))
        samples = samples.subset(np.arange(arguments.length) % len(samples))
    return Job(model, samples, judged, load_recipe(arguments.recipe, arguments.set), arguments.threads)


def _demo(stack: ExitStack) -> tuple[Path, Path, Path, Preprocess]:
    assets = resources.files("pot_sparsity.demo_assets")
    facts = json.loads((assets / "digits_cnn.json").read_text(encoding="utf-8"))
    model, calibration, validation = (
        stack.enter_context(resources.as_file(assets / name))
        for name in ("digits_cnn.onnx", "digits_calibration.npz", "digits_validation.npz")
    )
    pictures = load_preprocess({key: facts[key] for key in ("mean_values", "scale_values")})
    return model, calibration, validation, pictures


def measure(job: Job) -> dict[str, object]:
    """Seconds and memory by stage, and the ratio to NNCF alone."""
    start = time.perf_counter()
    report = job.run().report
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    quantize(load_model(job.model), job.calibration, job.recipe.quantization)
    alone = time.perf_counter() - start
    return {
        "model": report.model.file,
        "sparsity": report.sparsity_reached,
        "data": report.data.model_dump(),
        "machine": report.machine.model_dump(),
        "stages": [
            {
                "name": stage.name,
                "seconds": round(stage.seconds, 3),
                "peak_memory_mib": round(stage.peak_memory_mib),
            }
            for stage in report.stages
        ],
        "between_stages_seconds": round(seconds - sum(stage.seconds for stage in report.stages), 3),
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(report.peak_memory_mib),
        "nncf_quantize_samples": min(job.recipe.quantization.samples, len(job.calibration)),
        "nncf_quantize_seconds": round(alone, 3),
        "ratio_to_nncf_quantize": round(seconds / alone, 2),
    }


def memory_of_one(job: Job) -> dict[str, object]:
    """Peak of this process."""
    report = job.run().report
    return {
        "samples": report.data.calibration,
        "peak_memory_mib": round(report.peak_memory_mib),
        "seconds": round(report.seconds, 3),
        "stages": {stage.name: round(stage.peak_memory_mib) for stage in report.stages},
    }


def memory_by_length(given: list[str], lengths: list[int]) -> dict[str, object]:
    """Run this tool once for every length; a child's high-water mark holds nothing of the others."""
    runs = []
    for length in lengths:
        command = [sys.executable, __file__, *given, "--length", str(length)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            raise SystemExit(child.returncode)
        runs.append(json.loads(child.stdout))
    return {"memory": runs}


def main() -> int:
    arguments = parse()
    if arguments.memory and arguments.length is None:
        lengths = [int(part) for part in arguments.memory.split(",")]
        print(json.dumps(memory_by_length(sys.argv[1:], lengths), indent=2))
        return 0
    try:
        with ExitStack() as stack:
            job = prepare(arguments, stack)
            found = measure(job) if arguments.length is None else memory_of_one(job)
    except PotSparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
