"""Runs of onnxsim in its own environment, and the comparison of both on single layers."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxsim_tables import Record  # type: ignore[import-not-found]

from pot_sparsity.algorithms.arrays import AnyArray, Float32, Float64, Pattern
from pot_sparsity.algorithms.pruning.problem import LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.errors import UserError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_weight

WORKER = Path(__file__).with_name("onnxsim_worker.py")


@dataclass(frozen=True)
class Job:
    """One line to be: ``about`` tells it from all others, ``measure`` finds the rest."""

    about: Record
    measure: Callable[[], Record]

    def known(self, records: Sequence[Record]) -> Record | None:
        """The line that was written for the same job, if there is one."""
        same = (found for found in records if self.about.items() <= found.items())
        return next(same, None)


def matmul_model(weight: Float64) -> onnx.ModelProto:
    """One MatMul that multiplies ``[N, cols]`` with the transpose of ``weight [rows, cols]``."""
    rows, cols = weight.shape
    stored = numpy_helper.from_array(np.ascontiguousarray(weight.T, np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="layer")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", rows])],
        [stored],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rows_with_moment(second: Float64) -> Float32:
    """Rows X [cols, cols] with ``2 X^T X / cols = H``, but for float32."""
    values, vectors = np.linalg.eigh(second)
    root = np.sqrt(np.maximum(values, 0.0) * len(second) / 2)
    return np.asarray(root[:, None] * vectors.T, dtype=np.float32)


def run_onnxsim(
    python: Path,
    model: Path,
    output: Path,
    samples: Mapping[str, AnyArray],
    method: str,
    sparsity: float,
    pattern: Pattern,
    *,
    batch: int,
    simplify: bool,
) -> tuple[str, float]:
    """Prune a file in the other environment; returns onnxsim's version and seconds.

    Raises
    ------
    UserError
        The interpreter cannot be run or onnxsim failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.npz")
        arrays: dict[str, AnyArray] = {str(index): value for index, value in enumerate(samples.values())}
        with path.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # names of arrays, not its own keyword
        group = (pattern.n, pattern.m) if pattern.kind == "n:m" else (None, None)
        job = {
            "model": str(model.resolve()),
            "output": str(output.resolve()),
            "method": method,
            "sparsity": sparsity,
            "n": group[0],
            "m": group[1],
            "samples": str(path),
            "inputs": list(samples),
            "batch": batch,
            "simplify": simplify,
        }
        try:
            child = subprocess.run(
                [str(python), str(WORKER)], input=json.dumps(job), capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise UserError(f"--onnxsim-python {str(python)!r} cannot be run: {error.strerror}") from None
    if child.returncode:
        said = child.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"onnxsim's {method} failed on {model.name}: {said[-1]}")
    found = json.loads(child.stdout.splitlines()[-1])
    return str(found["version"]), float(found["seconds"])


def layer_jobs(name: str, weight: Float64, second: Float64, arguments: argparse.Namespace) -> Iterator[Job]:
    """Errors (on the undamped H) and seconds of all methods on one layer."""
    problem = LayerProblem.of(weight[None], second[None])
    pattern: Pattern = arguments.pattern

    def theirs(method: str, sparsity: float) -> Record:
        samples = rows_with_moment(second)
        with tempfile.TemporaryDirectory() as folder:
            model, output = Path(folder, "layer.onnx"), Path(folder, "pruned.onnx")
            onnx.save(matmul_model(weight), model)
            version, seconds = run_onnxsim(
                arguments.onnxsim_python,
                model,
                output,
                {"x": samples},
                method,
                sparsity,
                pattern,
                batch=len(samples),
                simplify=False,
            )
            found = pruned_weight(load_model(output))
        result = problem.result(found[None], (found != 0.0)[None], 0.0)
        return {
            "version": version,
            "reached": float(np.mean(found == 0.0)),
            "relative_error": result.relative_error,
            "seconds": seconds,
        }

    def ours(method: str, sparsity: float) -> Record:
        options = SolverOptions(workers=arguments.threads, polish=arguments.polish)
        start = time.perf_counter()
        zeros = round(sparsity * weight.size)
        result = SOLVERS[method](weight[None], second[None], zeros, pattern, options=options)
        return {
            "reached": float(np.mean(~result.mask)),
            "relative_error": result.relative_error,
            "seconds": time.perf_counter() - start,
        }

    for sparsity in arguments.sparsity:
        about: Record = {"layer": name, "sparsity": sparsity, "pattern": str(pattern)}
        for method in arguments.onnxsim_method:
            yield Job(about | {"method": f"onnxsim {method}"}, partial(theirs, method, sparsity))
        for method in arguments.method:
            shown = method + (" + polish" if arguments.polish else "")
            yield Job(about | {"method": shown}, partial(ours, method, sparsity))


def pruned_weight(model: Model) -> Float64:
    """The weight [rows, cols] of a model of one layer."""
    (layer,) = find_layers(model.graph).layers
    return np.asarray(read_weight(model, layer)[0])
