"""Prune one ONNX file with onnxsim; run by ``compare_onnxsim.py`` in the environment where onnxsim lives.

Reads a job as JSON from stdin: ``model`` and ``output`` (paths), ``method`` (magnitude, wanda or sparsegpt),
``sparsity``, ``n`` and ``m`` (null unless n:m), ``samples`` (.npz with one array per input, named by its
position), ``inputs`` (their names), ``batch`` (samples per inference), ``simplify`` (fuse BatchNorm first, as
onnxsim does by default). Prints its version and seconds as one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import numpy as np
import onnx


def batches(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Calibration data as onnxsim takes them; a last batch that is not full is left out."""
    with np.load(job["samples"], allow_pickle=False) as arrays:
        values = {name: arrays[str(index)] for index, name in enumerate(job["inputs"])}
    size = int(job["batch"])
    count = len(next(iter(values.values()))) // size
    return [{name: v[i * size : (i + 1) * size] for name, v in values.items()} for i in range(count)]


def main() -> int:
    job = json.load(sys.stdin)
    onnxsim: Any = importlib.import_module("onnxsim")
    model = onnx.load(job["model"])
    if job["simplify"]:
        model, _ = onnxsim.simplify(model)
    settings = {"sparsity": job["sparsity"], "n": job["n"], "m": job["m"]}
    if job["method"] != "magnitude":
        settings["calibration_data"] = batches(job)
    start = time.perf_counter()
    pruned = getattr(onnxsim, f"apply_{job['method']}_pruning")(model, **settings)
    seconds = time.perf_counter() - start
    onnx.save(pruned, job["output"])
    print(json.dumps({"version": str(onnxsim.__version__), "seconds": seconds}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
