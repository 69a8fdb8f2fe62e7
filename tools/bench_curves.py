"""Measure what curves and the allocation cost on this machine; prints one JSON object.

Without --random: a network of the zoo (a folder with a `zoo.json`) under the default recipe. With --random: ResNet-50
with random weights, on synthetic images. With --solver: the dynamic program alone, on made-up curves of so many layers.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from network_models import resnet50, synthetic_images  # type: ignore[import-not-found]

from pot_sparsity.algorithms.allocation.curves import NONZEROS, Curve
from pot_sparsity.algorithms.allocation.rate_distortion import allocate_zeros
from pot_sparsity.data import Dataset, load_dataset, load_preprocess
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.allocation.allocate import allocate
from pot_sparsity.pipeline.job import Job, Options
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]


def measure(model: Model, samples: Dataset, recipe: Recipe, threads: int) -> dict[str, Any]:
    """Seconds of moments, curves and allocation."""
    options = Options("top1", None, False, False, threads, False, False)
    job = Job(recipe, options, RunFolder(None), model, samples, None, "openvino", Silent())
    with ExitStack() as stack:
        around, _ = Run(job, stack).surroundings()
        start = time.perf_counter()
        allocate(around.dense, recipe, recipe.sparsity, around.curves)
        allocation = time.perf_counter() - start
        seconds = {stage.name: stage.seconds for stage in around.recorder.stages}
    return {
        "layers": len(around.dense),
        "weights": sum(item.layer.size for item in around.dense),
        "threads": threads,
        "moments_seconds": round(seconds["moments"], 2),
        "curves_seconds": round(seconds["curves"], 2),
        "allocation_seconds": round(allocation, 3),
        "curves_and_allocation_seconds": round(seconds["curves"] + allocation, 2),
    }


def solver_alone(layers: int, levels: int = 200) -> dict[str, Any]:
    """Seconds of the dynamic program on convex curves of uneven layers."""
    random = np.random.default_rng(0)
    curves = []
    for index in range(layers):
        size = int(random.integers(500, 500_000))
        zeros = np.unique(np.linspace(0, size, levels).round())
        rise = np.sort(random.exponential(size=zeros.size))
        distortion = np.cumsum(rise) * random.lognormal()
        curves.append(Curve(f"layer{index}", size, distortion, {NONZEROS: size - zeros}))
    sizes = np.array([curve.size for curve in curves], dtype=np.int64)
    start = time.perf_counter()
    allocate_zeros(curves, round(0.8 * int(sizes.sum())), np.zeros_like(sizes), sizes)
    return {
        "layers": layers,
        "levels": levels,
        "allocation_seconds": round(time.perf_counter() - start, 3),
    }


def zoo_network(folder: Path, name: str) -> tuple[Model, Dataset]:
    """A network of the zoo and its calibration samples; SystemExit where there is none of that name."""
    try:
        zoo = json.loads((folder / "zoo.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(
            f"cannot read {folder / 'zoo.json'}: {error.strerror}; name the folder with --zoo"
        ) from None
    if name not in zoo:
        raise SystemExit(f"the zoo has no network {name!r}; it has {', '.join(sorted(zoo))}")
    entry = zoo[name]
    model = load_model(folder / entry["model"])
    pictures = load_preprocess(entry.get("preprocess"))
    return model, load_dataset(folder / entry["calibration"], input_specs(model), pictures)


def random_network(folder: Path, samples: int, narrow: int) -> tuple[Model, Dataset]:
    """ResNet-50 with random weights, written into ``folder``, and images for it."""
    random = np.random.default_rng(0)
    file = folder / "resnet50.onnx"
    onnx.save(resnet50(random, narrow=narrow), str(file))
    model = load_model(file)
    return model, load_dataset(synthetic_images(random, samples), input_specs(model))


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("POT_SPARSITY_ZOO", str(ROOT.parent / "shared" / "zoo"))
    parser.add_argument(
        "network", nargs="?", default="resnet20_akamaster_cifar10", help="its name in the zoo"
    )
    parser.add_argument("--zoo", type=Path, default=Path(default), help="folder with zoo.json")
    parser.add_argument(
        "--random", type=int, metavar="SAMPLES", help="ResNet-50 with random weights on so many images"
    )
    parser.add_argument("--narrow", type=int, default=1, help="divide the widths of that network by this")
    parser.add_argument("--solver", type=int, metavar="LAYERS", help="the dynamic program alone")
    parser.add_argument("--recipe", help="recipe file or name (default: default)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a recipe key")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    arguments = parser.parse_args(given)
    if arguments.solver:
        print(json.dumps(solver_alone(arguments.solver), indent=2))
        return 0
    recipe = load_recipe(arguments.recipe, arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.random:
            model, samples = random_network(Path(folder), arguments.random, arguments.narrow)
        else:
            model, samples = zoo_network(arguments.zoo, arguments.network)
        print(json.dumps(measure(model, samples, recipe, arguments.threads), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
