"""Layer error and seconds of every layer solver, beside a plainly written textbook ExactOBS.

Prints one JSON line per layer, method and sparsity. Ratios are to the textbook on the same layer and process.
``cpu_seconds`` (all threads together) depends less than ``seconds`` on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pot_sparsity.algorithms.arrays import Bool, Float64, Pattern
from pot_sparsity.algorithms.pruning.problem import LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.projection import top_k_mask
from pot_sparsity.algorithms.pruning.refit import refit
from pot_sparsity.algorithms.pruning.registry import SOLVERS

_FIELD = 16
_POSITIONS = 64
T = TypeVar("T")


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


def report(
    name: str, target: Float64, second: Float64, arguments: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """One record per method and sparsity."""
    rows, cols = target.shape
    layer = {"layer": name, "rows": rows, "cols": cols, "pattern": str(arguments.pattern)}
    weights, moments = target[None], second[None]
    reference: dict[float, tuple[float, float]] = {}
    if arguments.textbook and arguments.pattern.kind == "unstructured":
        problem = LayerProblem.of(weights, moments)
        for sparsity in arguments.sparsity:
            # Rows differ in how much they lose: no row of these layers needs 1.5 times the mean.
            steps = min(cols, int(np.ceil(cols * sparsity * 1.5)))
            trace, full, full_busy = timed(partial(textbook_trace, target, second, steps), 1)
            mask = textbook_mask(trace, (rows, cols), round(sparsity * target.size))[None]
            error = problem.result(refit(problem, mask)[0], mask, 0.0).relative_error
            reference[sparsity] = (error, full_busy)
            yield layer | {
                "method": "textbook", "sparsity": sparsity, "relative_error": error, "seconds": full,
                "cpu_seconds": full_busy, "steps": steps,
            }  # fmt: skip
    options = SolverOptions(
        effort=arguments.effort, polish=arguments.polish, polish_seconds=arguments.polish_seconds
    )
    pattern = arguments.pattern
    for method in arguments.method:
        for sparsity in arguments.sparsity:
            zeros = round(sparsity * target.size)
            result, seconds, busy = timed(
                partial(SOLVERS[method], weights, moments, zeros, pattern, options=options),
                arguments.repeats,
            )
            record = layer | {
                "method": method, "sparsity": sparsity, "polish": arguments.polish, "damping": result.damping,
                "reached": float(np.mean(~result.mask)), "relative_error": result.relative_error,
                "effort": arguments.effort, "seconds": seconds, "cpu_seconds": busy,
            }  # fmt: skip
            if sparsity in reference:
                error, textbook_busy = reference[sparsity]
                record |= {
                    "error_ratio": result.relative_error / error,
                    "cpu_speedup": textbook_busy / busy,
                }
            yield record


def layers(arguments: argparse.Namespace) -> Iterator[tuple[str, Float64, Float64]]:
    for path in arguments.layer:
        with np.load(path, allow_pickle=False) as arrays:
            yield path.stem, arrays["W"].astype(np.float64), arrays["H"].astype(np.float64)
    for shape in arguments.shape:
        rows, cols = (int(part) for part in shape.split("x"))
        weight, second = make_layer(rows, cols, arguments.samples, arguments.seed)
        yield shape, weight, second


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
    arguments = parser().parse_args()
    if not arguments.layer and not arguments.shape:
        arguments.shape = ["64x576"]
    arguments.method = arguments.method or list(SOLVERS)
    for name, target, second in layers(arguments):
        for record in report(name, target, second, arguments):
            print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
