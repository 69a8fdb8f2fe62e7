"""Layer error and CPU seconds of every quantizer at a few bits, on dense and on pruned layers.

Prints one JSON line per layer, sparsity, bits, grid and method. Grids: ``norm2.4`` is the reference code's
(unweighted norm 2.4), ``diagonal`` weights squared rounding errors by the diagonal of H, ``solver`` takes for
each row the shrunk range on which GPTQ ends best. Errors are relative, on the undamped H.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pot_sparsity.algorithms.arrays import Float64
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.algorithms.quantization.gptq import round_columns
from pot_sparsity.algorithms.quantization.grid import Grid, fit_grid, shrunk_grids
from pot_sparsity.algorithms.quantization.problem import GridProblem, QuantizedResult, QuantizerOptions
from pot_sparsity.algorithms.quantization.registry import QUANTIZERS

#: Steps of the search for the grid on which GPTQ ends best.
_STEPS = 24
#: The settings of the reference loops: columns as they stand, 1 % damping.
_REFERENCE = QuantizerOptions(order="columns", damping=0.01)
_METHODS: tuple[tuple[str, str, QuantizerOptions], ...] = (
    ("nearest", "nearest", QuantizerOptions()),
    ("obq", "obq", QuantizerOptions()),
    ("gptq, columns, damping 0.01", "gptq", _REFERENCE),
    ("gptq", "gptq", QuantizerOptions()),
    ("nearest_descent", "nearest_descent", QuantizerOptions()),
    ("obq_descent", "obq_descent", QuantizerOptions()),
    ("gptq_descent, columns, damping 0.01", "gptq_descent", _REFERENCE),
    ("gptq_descent", "gptq_descent", QuantizerOptions()),
    ("best_descent", "best_descent", QuantizerOptions()),
    ("gptq_descent, scales refitted", "gptq_descent", QuantizerOptions(refit_scale=True)),
)


def load_layer(path: Path) -> tuple[Float64, Float64]:
    """``W [1, rows, cols]`` and ``H [1, cols, cols]`` of an archive with arrays W and H."""
    with np.load(path, allow_pickle=False) as archive:
        return archive["W"].astype(np.float64)[None], archive["H"].astype(np.float64)[None]


def make_grids(target: Float64, second: Float64, bits: int, symmetric: bool) -> Iterator[tuple[str, Grid]]:
    """The three grids by name."""
    diagonal = np.einsum("gcc->gc", second)
    yield "norm2.4", fit_grid(target, bits, symmetric=symmetric, norm=2.4)
    yield "diagonal", fit_grid(target, bits, symmetric=symmetric, importance=diagonal)
    tried = list(shrunk_grids(target, bits, symmetric=symmetric, steps=_STEPS))
    yield "solver", round_columns(GridProblem.of(target, second), tried, QuantizerOptions())[1]


def timed(call: Callable[[], QuantizedResult], repeat: int) -> tuple[QuantizedResult, float]:
    """Result and median CPU seconds, all threads together."""
    seconds = []
    for _ in range(repeat):
        begin = time.process_time()
        result = call()
        seconds.append(time.process_time() - begin)
    return result, statistics.median(seconds)


def rows_of(path: Path, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """All measurements of one layer."""
    dense, second = load_layer(path)
    if options.rows:
        dense = dense[:, : options.rows]
    for sparsity in options.sparsity:
        target = dense
        if sparsity:
            target = SOLVERS["admm"](dense, second, round(sparsity * dense.size)).weight
        for bits in options.bits:
            for name, grid in make_grids(target, second, bits, not options.asymmetric):
                for label, method, settings in _METHODS:
                    if label not in options.methods and method not in options.methods:
                        continue
                    quantizer = QUANTIZERS[method]
                    result, seconds = timed(
                        lambda q=quantizer, t=target, g=grid, s=settings: q(t, second, g, options=s),  # type: ignore[misc]
                        options.repeat,
                    )
                    yield {
                        "layer": path.stem,
                        "rows": dense.shape[1],
                        "cols": dense.shape[2],
                        "sparsity": sparsity,
                        "bits": bits,
                        "grid": name,
                        "method": label,
                        "relative_error": float(f"{result.relative_error:.6g}"),
                        "damping": result.damping,
                        "cpu_seconds": round(seconds, 4),
                    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "layers", nargs="+", type=Path, help=".npz archives with W [rows, cols] and H [cols, cols]"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.0, 0.5], help="prune with ADMM to this first"
    )
    parser.add_argument("--methods", nargs="+", default=list(QUANTIZERS), help="names of quantizers")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--rows", type=int, help="only the first so many rows")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    for path in options.layers:
        for row in rows_of(path, options):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
