"""Prune all layers of a whole network of random weights; seconds, memory and arithmetic by stage.

The networks are a ResNet-50 (the architecture that ships with the onnx package) and an encoder of the size of
ViT-B or BERT-base. Weights are He-scaled random numbers and the samples synthetic: nothing is downloaded. What
runs is the product's preparation, moments and pruning; there is no validation, correction or INT8. Every layer
gets the same sparsity (``--set allocation.method=...`` for another rule).

Prints JSON lines: the setting with the speed of sgemm on so many threads, one line per stage, the ten slowest
layers, the total. ``gflop`` is estimated from the sizes of the layers: inference 2 per weight and position;
moments 2 * cols^2 per position (symmetric and shifted products do less); ADMM by its counted iterations, its
inverses and the refit. ``of_sgemm_peak`` may exceed 1 where products do less than that. Pruning of other
methods has no estimate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import onnx
from network_models import (  # type: ignore[import-not-found]
    encoder,
    resnet50,
    synthetic_images,
    synthetic_tokens,
)
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray, Bool, Float32, Moments, Pattern
from pot_sparsity.algorithms.pruning.projection import pattern_mask
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.data import Dataset, load_dataset
from pot_sparsity.engines import get_engine
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.graph.layers import Layer, flops
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model, Runnable
from pot_sparsity.pipeline.allocation.allocate import allocate
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.prepare import Prepared, prepare
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.recorder import peak_memory_mib
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, prune_layers, read_dense, scarce
from pot_sparsity.recipe import Recipe, load_recipe

SLOWEST = 10
_PEAK_SIZE = 2048
#: Iterations of ADMM that share one inverse, products of a refit by conjugate gradients.
_HOLD, _PRODUCTS = 12, 120

Shape = tuple[int, ...]


@dataclass
class Timed:
    """An engine that adds up the seconds its executables run and the samples they see."""

    engine: Engine
    seconds: float = 0.0
    samples: int = 0

    @property
    def name(self) -> str:
        """That of the engine."""
        return self.engine.name

    def compile(self, runnable: Runnable, *, exact: bool = True) -> Executable:
        """Compile, and watch what comes of it."""
        start = time.perf_counter()
        executable = self.engine.compile(runnable, exact=exact)
        self.seconds += time.perf_counter() - start
        return _TimedExecutable(executable, self)


@dataclass(frozen=True)
class _TimedExecutable:
    executable: Executable
    engine: Timed

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.executable.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.executable.outputs

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        start = time.perf_counter()
        values = self.executable.run(feeds)
        self.engine.seconds += time.perf_counter() - start
        self.engine.samples += len(next(iter(feeds.values())))
        return values


@dataclass
class Stages:
    """What has been measured so far."""

    peak: float
    lines: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, seconds: float, gflop: float | None) -> None:
        """One more stage is over."""
        rate = gflop / seconds if gflop is not None and seconds > 0 else None
        self.lines.append(
            {
                "stage": name,
                "seconds": round(seconds, 3),
                "peak_memory_mib": round(peak_memory_mib()),
                "gflop": None if gflop is None else round(gflop, 3),
                "gflops": None if rate is None else round(rate, 2),
                "of_sgemm_peak": None if rate is None else round(rate / self.peak, 3),
            }
        )


def sgemm_peak(threads: int, size: int = _PEAK_SIZE) -> float:
    """Best GFLOP/s of a square product in float32 on so many threads."""
    left = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    out, best = np.empty_like(left), np.inf
    with threadpool_limits(threads):
        for _ in range(4):
            start = time.perf_counter()
            np.matmul(left, left, out=out)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def moments_gflop(layers: Sequence[Layer], model: Model, images: int) -> float:
    """A plain product of every layer's unfolded input with itself."""
    total = 0.0
    for layer in layers:
        work = flops(layer, model.graph)
        if work is not None:
            total += work / layer.rows * layer.cols * images
    return total / 1e9


def inference_gflop(layers: Sequence[Layer], model: Model, images: int) -> float:
    """The layers' own products; attention and element-wise operators are left out."""
    return sum(flops(layer, model.graph) or 0 for layer in layers) * images / 1e9


def admm_gflop(turns: Mapping[Shape, int], solutions: Sequence[tuple[Layer, Solution]]) -> float:
    """Iterations (one product each), inverses (cols^3 each) and one refit of every layer."""
    total = 0.0
    for (groups, rows, cols), count in turns.items():
        total += count * groups * (2.0 * rows * cols**2 + cols**3 / _HOLD)
    for layer, solution in solutions:
        kept = solution.mask.sum(axis=2).astype(np.float64)
        total += float(np.minimum(kept**3 / 3, 2.0 * _PRODUCTS * layer.cols**2).sum())
    return total / 1e9


@contextmanager
def counted_turns() -> Iterator[Counter[Shape]]:
    """Counts ADMM's iterations by the shape of the layer, at the projection that each does once."""
    turns: Counter[Shape] = Counter()
    seen: list[Shape] = []

    def counting(score: Float32, zeros: int, pattern: Pattern) -> Bool:
        seen.append(score.shape)
        return pattern_mask(score, zeros, pattern)

    with patch("pot_sparsity.algorithms.pruning.admm.pattern_mask", counting):
        yield turns
    turns.update(seen)


def build(arguments: argparse.Namespace) -> tuple[onnx.ModelProto, Float32]:
    """The network and enough samples for the fit and for those held out."""
    random = np.random.default_rng(arguments.seed)
    count = arguments.images + arguments.held_out
    if arguments.network == "resnet50":
        return resnet50(random, narrow=arguments.narrow), synthetic_images(random, count)
    width, sequence = arguments.width, arguments.sequence
    model = encoder(
        random,
        blocks=arguments.blocks,
        width=width,
        hidden=arguments.hidden or 4 * width,
        sequence=sequence,
        heads=max(1, width // 64),
    )
    return model, synthetic_tokens(random, count, sequence, width)


def collect(
    prepared: Prepared, layers: Sequence[Layer], data: Dataset, timed: Timed, recipe: Recipe, threads: int
) -> dict[str, Moments]:
    """Moments, as the pipeline collects them."""
    return collect_moments(
        prepared.model,
        layers,
        timed,
        data,
        batch_size=recipe.calibration.batch_size,
        threads=threads,
        max_positions=recipe.calibration.max_positions,
        progress=Silent(),
    )


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """All lines."""
    threads = arguments.threads
    recipe = load_recipe(
        None,
        [
            f"pruning.method={arguments.method}",
            f"sparsity={arguments.sparsity}",
            "allocation.method=uniform",
            *arguments.set,
        ],
    )
    peak = sgemm_peak(threads, arguments.peak_size)
    proto, samples = build(arguments)
    original = load_model(proto)
    data = load_dataset({original.inputs[0].name: samples}, input_specs(original))
    fit = data.subset(np.arange(arguments.images))
    judge = data.subset(np.arange(arguments.images, len(data))) if arguments.held_out else None
    yield {
        "network": arguments.network,
        "images": arguments.images,
        "held_out": arguments.held_out,
        "sparsity": recipe.sparsity,
        "method": recipe.pruning.method,
        "threads": threads,
        "sgemm_peak_gflops": round(peak, 1),
        "before_memory_mib": round(peak_memory_mib()),
    }
    stages, begin = Stages(peak), time.perf_counter()
    engine = Timed(get_engine(arguments.engine, threads=threads))
    prepared = prepare(original, recipe, engine, fit, ignored_scope=None, keep_structure=False)
    dense = read_dense(prepared.model, prepared.layers)
    seconds = time.perf_counter() - begin
    stages.add("preparation", seconds, inference_gflop(prepared.layers, prepared.model, engine.samples))

    moments, held = collected(arguments, prepared, dense, fit, judge, recipe, stages)
    zeros = allocate(dense, recipe, recipe.sparsity)
    start = time.perf_counter()
    with counted_turns() as turns:
        solutions = prune_layers(
            dense,
            moments,
            held,
            zeros,
            recipe,
            threads=threads,
            folder=RunFolder(None),
            key="bench",
            progress=Silent(),
        )
    seconds = time.perf_counter() - start
    work = admm_gflop(turns, [(item.layer, solutions[item.layer.name]) for item in dense])
    stages.add("pruning", seconds, work if recipe.pruning.method == "admm" else None)
    total = time.perf_counter() - begin
    yield from stages.lines
    yield from slowest(dense, solutions)
    yield summary(dense, solutions, total)


def collected(
    arguments: argparse.Namespace,
    prepared: Prepared,
    dense: Sequence[DenseLayer],
    fit: Dataset,
    judge: Dataset | None,
    recipe: Recipe,
    stages: Stages,
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments of all layers, and held-out ones of the layers with few samples, as the pipeline does."""
    engine = Timed(get_engine(arguments.engine, threads=arguments.threads))
    start = time.perf_counter()
    moments = collect(prepared, prepared.layers, fit, engine, recipe, arguments.threads)
    few = [item.layer for item in dense if scarce(item, moments[item.layer.name])]
    layers, model = prepared.layers, prepared.model
    work, held = moments_gflop(layers, model, len(fit)), dict[str, Moments]()
    if few and judge is not None:
        held = collect(prepared, few, judge, engine, recipe, arguments.threads)
        work += moments_gflop(few, model, len(judge))
    seconds = time.perf_counter() - start
    stages.add("moments: inference", engine.seconds, inference_gflop(layers, model, engine.samples))
    stages.add("moments: products", seconds - engine.seconds, work)
    return moments, held


def slowest(dense: Sequence[DenseLayer], solutions: Mapping[str, Solution]) -> Iterator[dict[str, object]]:
    """The layers that took longest to prune."""
    for item in sorted(dense, key=lambda item: -solutions[item.layer.name].seconds)[:SLOWEST]:
        layer, solution = item.layer, solutions[item.layer.name]
        yield {
            "layer": layer.name,
            "groups": layer.groups,
            "rows": layer.rows,
            "cols": layer.cols,
            "seconds": round(solution.seconds, 3),
            "sparsity": round(float(np.mean(~solution.mask)), 4),
            "relative_error": solution.relative_error,
            "damping": solution.damping,
            "shrinkage": solution.shrinkage,
        }


def summary(
    dense: Sequence[DenseLayer], solutions: Mapping[str, Solution], seconds: float
) -> dict[str, object]:
    """The whole."""
    size = sum(item.layer.size for item in dense)
    return {
        "layers": len(dense),
        "weights": size,
        "sparsity": sum(int((~found.mask).sum()) for found in solutions.values()) / size,
        "layer_seconds": round(sum(found.seconds for found in solutions.values()), 3),
        "median_relative_error": float(np.median([found.relative_error for found in solutions.values()])),
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(peak_memory_mib()),
    }


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--network", choices=("resnet50", "encoder"), default="resnet50")
    options.add_argument("--images", type=int, default=64, help="calibration samples (default 64)")
    options.add_argument(
        "--held-out",
        type=int,
        default=0,
        help="more samples, on which layers with few samples choose their shrinkage as the product does (0)",
    )
    options.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros (0.5)")
    options.add_argument("--method", choices=sorted(SOLVERS), default="admm")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a recipe key")
    options.add_argument("--threads", type=int, default=2, help="threads of every stage (2)")
    options.add_argument("--engine", choices=("openvino", "onnxruntime"), default="openvino")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--blocks", type=int, default=12, help="encoder: blocks")
    options.add_argument("--width", type=int, default=768, help="encoder: width, 64 per head")
    options.add_argument("--hidden", type=int, help="encoder: width of the MLP (default 4 * width)")
    options.add_argument("--sequence", type=int, default=128, help="encoder: tokens per sample")
    options.add_argument("--narrow", type=int, default=1, help="resnet50: divide all widths by this")
    options.add_argument("--peak-size", type=int, default=_PEAK_SIZE, help="size of the product timed first")
    arguments = options.parse_args(given)
    for name in ("images", "threads", "blocks", "width", "sequence", "narrow", "peak_size"):
        if getattr(arguments, name) < 1:
            options.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.held_out < 0:
        options.error("--held-out must not be negative")
    if 64 % arguments.narrow:
        options.error(f"--narrow {arguments.narrow}: must divide 64, the smallest width")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Run the tool."""
    arguments = parse(given)
    try:
        for line in measure(arguments):
            print(json.dumps(line), flush=True)
    except PotSparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
