"""Measure how fast moments are collected, layer shape by layer shape.

Prints one JSON object per line: seconds per batch (median and best of the repeats), GFLOP/s counted as 2 *
cols^2 * samples per group (what a plain product of the unfolded input would do; symmetric and shifted
products do less, so the figure can exceed the machine's), and its ratio to the sgemm speed measured in the
same process. Networks are sums over their layers. Set the number of threads with --threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import ConvGeometry, Geometry, MatMulGeometry
from pot_sparsity.algorithms.moments import MomentsAccumulator
from pot_sparsity.algorithms.patches import output_size


@dataclass(frozen=True)
class Shape:
    name: str
    geometry: Geometry
    channels: int
    spatial: tuple[int, ...]
    network: str = ""
    repeats_in_network: int = 0
    share: float = 1.0  # of the number of samples asked for

    @property
    def flops_per_sample(self) -> float:
        if isinstance(self.geometry, MatMulGeometry):
            return 2.0 * self.channels**2 * prod(self.spatial)
        groups = self.geometry.groups
        cols = self.channels // groups * prod(self.geometry.kernel)
        return 2.0 * groups * cols**2 * prod(output_size(self.geometry, self.spatial))

    def activations(self, samples: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        conv = isinstance(self.geometry, ConvGeometry)
        shape = (samples, self.channels, *self.spatial) if conv else (samples, *self.spatial, self.channels)
        return np.maximum(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), 0)


def conv(kernel: int, stride: int = 1, groups: int = 1) -> ConvGeometry:
    pad = (kernel // 2,) * 2
    return ConvGeometry((kernel,) * 2, (stride,) * 2, (1, 1), pad, pad, groups)


SHAPES = [
    Shape("conv 3x3 16x32x32", conv(3), 16, (32, 32), "resnet20", 7),
    Shape("conv 3x3 32x16x16", conv(3), 32, (16, 16), "resnet20", 6),
    Shape("conv 3x3 64x8x8", conv(3), 64, (8, 8), "resnet20", 6),
    Shape("conv 3x3 3x32x32", conv(3), 3, (32, 32)),
    Shape("conv 3x3 stride 2 32x16x16", conv(3, 2), 32, (16, 16)),
    Shape("conv 3x3 groups 4 64x28x28", conv(3, 1, 4), 64, (28, 28), share=0.5),
    Shape("conv 3x3 128x28x28", conv(3), 128, (28, 28), share=0.5),
    Shape("conv 3x3 512x7x7", conv(3), 512, (7, 7)),
    Shape("depthwise 3x3 32x112x112", conv(3, 1, 32), 32, (112, 112), share=0.25),
    Shape("depthwise 3x3 stride 2 96x112x112", conv(3, 2, 96), 96, (112, 112), share=0.125),
    Shape("depthwise 3x3 144x56x56", conv(3, 1, 144), 144, (56, 56), share=0.25),
    Shape("depthwise 3x3 960x14x14", conv(3, 1, 960), 960, (14, 14)),
    Shape("depthwise 3x3 960x7x7", conv(3, 1, 960), 960, (7, 7)),
    Shape("pointwise 16x112x112", conv(1), 16, (112, 112), share=0.5),
    Shape("pointwise 96x28x28", conv(1), 96, (28, 28)),
    Shape("pointwise 576x14x14", conv(1), 576, (14, 14)),
    Shape("pointwise 960x7x7", conv(1), 960, (7, 7)),
    Shape("pointwise stride 2 64x56x56", conv(1, 2), 64, (56, 56)),
    Shape("linear 768, 128 tokens", MatMulGeometry(), 768, (128,)),
]


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def sgemm_peak(repeats: int) -> float:
    a = np.random.default_rng(0).standard_normal((1536, 1536), dtype=np.float32)
    b = a.copy()
    return 2 * 1536**3 / min(timed(lambda: a @ b, repeats)) / 1e9


def measure(shape: Shape, samples: int, repeats: int, peak: float) -> dict[str, float | int | str]:
    count = max(1, round(samples * shape.share))
    x = shape.activations(count)
    accumulator = MomentsAccumulator(shape.geometry)
    seconds = timed(lambda: accumulator.update(x), repeats)
    finish = min(timed(accumulator.result, 1))
    rate = shape.flops_per_sample * count / statistics.median(seconds) / 1e9
    return {
        "shape": shape.name,
        "samples": count,
        "seconds": round(statistics.median(seconds), 6),
        "best_seconds": round(min(seconds), 6),
        "result_seconds": round(finish, 6),
        "gflops": round(rate, 1),
        "of_sgemm_peak": round(rate / peak, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64, help="samples per batch (default 64)")
    parser.add_argument("--repeats", type=int, default=7, help="repeats per shape (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="BLAS threads (default 2)")
    parser.add_argument("--only", default="", help="only shapes whose name contains this text")
    parser.add_argument("--images", type=int, default=1024, help="images the networks' totals are given for")
    arguments = parser.parse_args()
    with threadpool_limits(arguments.threads):
        peak = sgemm_peak(arguments.repeats)
        print(json.dumps({"sgemm_peak_gflops": round(peak, 1), "threads": arguments.threads}), flush=True)
        totals: dict[str, list[float]] = {}
        for shape in SHAPES:
            if arguments.only not in shape.name:
                continue
            row = measure(shape, arguments.samples, arguments.repeats, peak)
            print(json.dumps(row), flush=True)
            if shape.network:
                total = totals.setdefault(shape.network, [0.0, 0.0])
                batches = arguments.images / int(row["samples"]) * shape.repeats_in_network
                for index, key in enumerate(("seconds", "best_seconds")):
                    total[index] += batches * float(row[key])
        for network, (median, best) in totals.items():
            row = {"network": network, "images": arguments.images, "seconds": round(median, 3)}
            print(json.dumps({**row, "best_seconds": round(best, 3)}), flush=True)


if __name__ == "__main__":
    main()
