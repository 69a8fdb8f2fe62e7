"""Layer error and seconds of every layer solver, beside a plainly written textbook ExactOBS.

Prints one JSON line per layer, method and sparsity. Ratios are to the textbook on the same layer and process.
``cpu_seconds`` (all threads together) depends less than ``seconds`` on what else the machine does.

With ``--model`` and ``--calibration`` the layers are the convolutions of a network with the moments of its own
inputs; ratios are to the package's ExactOBS, and a last line per method and sparsity gives their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pot_sparsity.algorithms.arrays import Bool, ConvGeometry, Float64, Pattern
from pot_sparsity.algorithms.pruning.exact_obs import exact_obs
from pot_sparsity.algorithms.pruning.problem import LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.projection import top_k_mask
from pot_sparsity.algorithms.pruning.refit import refit
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.data import load_dataset, load_preprocess
from pot_sparsity.engines import get_engine
from pot_sparsity.graph.layers import pattern_stride
from pot_sparsity.graph.load import load_model
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.prepare import prepare
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.solve import read_dense
from pot_sparsity.recipe import load_recipe

_FIELD = 16
_POSITIONS = 64
T = TypeVar("T")


@dataclass(frozen=True)
class BenchLayer:
    """A layer to solve; ``real`` ones come from a network."""

    name: str
    target: Float64
    second: Float64
    stride: int = 1
    real: bool = False


def make_layer(rows: int, cols: int, samples: int, seed: int) -> tuple[Float64, Float64]:
    """Weights and second moment of a 3x3 convolution over rectified, smooth, channel-mixed fields.

    Columns are ordered (channel, ky, kx); ``cols`` must be a multiple of 9. Returns W and H.
    """
    random = np.random.default_rng(seed)
    channels = cols // 9
    spectrum = np.fft.fftfreq(_FIELD)[:, None] ** 2 + np.fft.rfftfreq(_FIELD)[None] ** 2
    blur = np.exp(-2 * (np.pi * 1.5) ** 2 * spectrum) + 0.08
    mixing = random.normal(size=(channels, channels)) * (1 + np.arange(channels)) ** -0.6
    bias = random.normal(size=channels) * 0.12 * np.sqrt((mixing**2).sum(1))
    gain = np.exp(random.normal(size=channels) * 0.5)
    columns = []
    for _ in range(-(-samples // _POSITIONS)):
        noise = np.fft.rfft2(random.normal(size=(channels, _FIELD, _FIELD)))
        latent = np.fft.irfft2(noise * blur, s=(_FIELD, _FIELD))
        mixed = np.einsum("cl,lxy->cxy", mixing, latent / latent.std()) + bias[:, None, None]
        image = np.pad(np.maximum(mixed, 0) * gain[:, None, None], ((0, 0), (1, 1), (1, 1)))
        patches = sliding_window_view(image, (3, 3), axis=(1, 2)).transpose(0, 3, 4, 1, 2)
        flat = patches.reshape(cols, _FIELD**2)
        columns.append(flat[:, random.choice(_FIELD**2, _POSITIONS, replace=False)])
    inputs = np.concatenate(columns, axis=1)[:, :samples].astype(np.float32).astype(np.float64)
    profile = np.array([[0.7, 1, 0.7], [1, 1.6, 1], [0.7, 1, 0.7]])
    tails = random.standard_t(5, size=(rows, channels, 3, 3)) / np.sqrt(cols)
    weight = tails * profile / gain[None, :, None, None] ** 0.7
    weight *= np.exp(random.normal(size=(rows, 1, 1, 1)) * 0.3)
    return weight.reshape(rows, cols).astype(np.float32).astype(np.float64), 2 * inputs @ inputs.T / samples


def textbook_trace(target: Float64, second: Float64, steps: int) -> tuple[np.ndarray, Float64]:
    """ExactOBS as printed: an inverse per row, downdated by rank 1 per removal; 4 rows at a time."""
    rows = len(target)
    order, losses = np.empty((rows, steps), np.intp), np.empty((rows, steps))
    inverse = np.linalg.inv(second)
    for begin in range(0, rows, 4):
        weight = target[begin : begin + 4].copy()
        line = np.arange(len(weight))
        inverses = np.repeat(inverse[None], len(weight), axis=0)
        gone = np.zeros(weight.shape, np.bool_)
        for step in range(steps):
            diagonal = np.where(gone, 1.0, np.einsum("rcc->rc", inverses))
            score = np.where(gone, np.inf, weight**2 / diagonal)
            chosen = score.argmin(axis=1)
            order[begin : begin + 4, step] = chosen
            losses[begin : begin + 4, step] = score[line, chosen]
            column = inverses[line, chosen]
            pivot = column[line, chosen][:, None]
            weight -= weight[line, chosen][:, None] / pivot * column
            scaled = column / np.sqrt(pivot)
            inverses -= scaled[:, :, None] * scaled[:, None, :]
            gone[line, chosen] = True
            weight[gone] = 0.0
    return order, losses


def textbook_mask(trace: tuple[np.ndarray, Float64], shape: tuple[int, int], zeros: int) -> Bool:
    """One threshold over the running maxima of all rows' losses."""
    order, losses = trace
    removed = ~top_k_mask(np.maximum.accumulate(losses, axis=1), zeros)
    mask = np.ones(shape, np.bool_)
    for row in range(shape[0]):
        mask[row, order[row, removed[row]]] = False
    return mask


def timed(call: Callable[[], T], repeats: int) -> tuple[T, float, float]:
    """Result, median wall seconds and median CPU seconds."""
    seconds, busy = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        result = call()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    return result, statistics.median(seconds), statistics.median(busy)


def report(layer: BenchLayer, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per method and sparsity."""
    groups, rows, cols = layer.target.shape
    pattern = replace(arguments.pattern, stride=layer.stride)
    about: dict[str, object] = {
        "layer": layer.name, "groups": groups, "rows": rows, "cols": cols, "pattern": str(pattern)
    }  # fmt: skip
    options = SolverOptions(
        effort=arguments.effort,
        restarts=arguments.restarts,
        workers=arguments.workers,
        polish=arguments.polish,
        polish_seconds=arguments.polish_seconds,
    )
    for sparsity in arguments.sparsity:
        zeros = round(sparsity * layer.target.size)
        reference: tuple[float, float] | None = None
        if layer.real:
            plain = partial(exact_obs, layer.target, layer.second, zeros, pattern)
            result, _, busy = timed(plain, 1)
            reference = result.relative_error, busy
        elif arguments.textbook and pattern.kind == "unstructured":
            record = about | textbook_record(layer, sparsity)
            reference = float(str(record["relative_error"])), float(str(record["cpu_seconds"]))
            yield record
        for method in arguments.method:
            result, seconds, busy = timed(
                partial(SOLVERS[method], layer.target, layer.second, zeros, pattern, options=options),
                arguments.repeats,
            )
            record = about | {
                "method": method, "sparsity": sparsity, "polish": arguments.polish, "damping": result.damping,
                "reached": float(np.mean(~result.mask)), "relative_error": result.relative_error,
                "effort": arguments.effort, "workers": arguments.workers, "seconds": seconds,
                "cpu_seconds": busy,
            }  # fmt: skip
            if reference and reference[0] > 0:
                record |= {
                    "error_ratio": result.relative_error / reference[0],
                    "cpu_speedup": reference[1] / max(busy, 1e-9),
                }
            yield record


def textbook_record(layer: BenchLayer, sparsity: float) -> dict[str, object]:
    """Error and time of the textbook form on a layer of one group."""
    target, second = layer.target[0], layer.second[0]
    # Rows differ in how much they lose: no row of these layers needs 1.5 times the mean.
    steps = min(target.shape[1], int(np.ceil(target.shape[1] * sparsity * 1.5)))
    trace, seconds, busy = timed(partial(textbook_trace, target, second, steps), 1)
    shape = (target.shape[0], target.shape[1])
    mask = textbook_mask(trace, shape, round(sparsity * target.size))[None]
    problem = LayerProblem.of(layer.target, layer.second)
    error = problem.result(refit(problem, mask)[0], mask, 0.0).relative_error
    return {
        "method": "textbook", "sparsity": sparsity, "relative_error": error, "seconds": seconds,
        "cpu_seconds": busy, "steps": steps,
    }  # fmt: skip


def medians(records: Sequence[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Median error ratio over the layers of a network, per method and sparsity."""
    ratios: dict[tuple[str, float], list[float]] = {}
    for record in records:
        if "error_ratio" in record:
            key = str(record["method"]), float(str(record["sparsity"]))
            ratios.setdefault(key, []).append(float(str(record["error_ratio"])))
    for (method, sparsity), found in ratios.items():
        yield {
            "layers": len(found), "method": method, "sparsity": sparsity,
            "median_error_ratio": statistics.median(found), "worst_error_ratio": max(found),
        }  # fmt: skip


def network_layers(arguments: argparse.Namespace) -> Iterator[BenchLayer]:
    """Convolutions of the network with the moments of their own inputs, as the pipeline collects them."""
    recipe, engine = load_recipe(), get_engine(arguments.engine, arguments.workers)
    original = load_model(arguments.model)
    samples = load_dataset(
        arguments.calibration,
        input_specs(original),
        load_preprocess(arguments.preprocess),
        samples=arguments.images,
        seed=arguments.seed,
    )
    prepared = prepare(original, recipe, engine, samples, ignored_scope=None, keep_structure=False)
    chosen = [
        item
        for item in read_dense(prepared.model, prepared.layers)
        if isinstance(item.layer.places[0].geometry, ConvGeometry)
    ]
    moments = collect_moments(
        prepared.model,
        [item.layer for item in chosen],
        engine,
        samples,
        batch_size=recipe.calibration.batch_size,
        threads=arguments.workers,
        max_positions=recipe.calibration.max_positions,
        progress=Silent(),
    )
    for item in chosen:
        found = moments[item.layer.name]
        second = found.centred if item.free_bias else found.second
        yield BenchLayer(item.layer.name, item.weight, second, pattern_stride(item.layer), real=True)


def layers(arguments: argparse.Namespace) -> Iterator[BenchLayer]:
    """All layers asked for."""
    for path in arguments.layer:
        with np.load(path, allow_pickle=False) as arrays:
            yield BenchLayer(
                path.stem, arrays["W"].astype(np.float64)[None], arrays["H"].astype(np.float64)[None]
            )
    for shape in arguments.shape:
        rows, cols = (int(part) for part in shape.split("x"))
        weight, second = make_layer(rows, cols, arguments.samples, arguments.seed)
        yield BenchLayer(shape, weight[None], second[None])
    if arguments.model is not None:
        yield from network_layers(arguments)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--layer", type=Path, action="append", default=[], help=".npz with W [rows, cols] and H"
    )
    options.add_argument(
        "--shape", action="append", default=[], help="ROWSxCOLS of a generated layer (cols = 9 k)"
    )
    options.add_argument("--samples", type=int, default=8192, help="inputs behind a generated layer")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--method", action="append", choices=sorted(SOLVERS), help="default: all")
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    options.add_argument(
        "--pattern", type=Pattern.parse, default=Pattern(), help="unstructured, 2:4, block:4, ..."
    )
    options.add_argument("--effort", type=float, default=1.0, help="admm: how much slower rho grows")
    options.add_argument("--restarts", type=int, default=None, help="admm: times to shake and settle again")
    options.add_argument("--workers", type=int, default=1, help="threads over rows")
    options.add_argument("--model", type=Path, default=None, help="network whose convolutions to solve")
    options.add_argument("--calibration", type=Path, default=None, help="its calibration data")
    options.add_argument(
        "--preprocess", type=Path, default=None, help="what its images go through (YAML or JSON)"
    )
    options.add_argument("--images", type=int, default=256, help="calibration samples to use")
    options.add_argument("--engine", default="openvino", help="what runs the network")
    options.add_argument("--repeats", type=int, default=3, help="runs behind each median")
    options.add_argument(
        "--polish", action="store_true", help="end admm and exact_obs with the 1-swap polish"
    )
    options.add_argument("--polish-seconds", type=float, default=None, help="time budget of the polish")
    options.add_argument(
        "--no-textbook", dest="textbook", action="store_false", help="leave the textbook form out"
    )
    return options


def main() -> int:
    options = parser()
    arguments = options.parse_args()
    if (arguments.model is None) != (arguments.calibration is None):
        options.error("--model and --calibration go together")
    if not arguments.layer and not arguments.shape and arguments.model is None:
        arguments.shape = ["64x576"]
    arguments.method = arguments.method or list(SOLVERS)
    records: list[dict[str, object]] = []
    for layer in layers(arguments):
        for record in report(layer, arguments):
            print(json.dumps(record), flush=True)
            records += [record] if layer.real else []
    for record in medians(records):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
