"""Compare with onnxsim: same layer or model, same calibration samples, same sparsity.

onnxsim runs in an environment of its own, whose interpreter ``--onnxsim-python`` names. Layers (``--layer``,
``--shape``) are given to it as one MatMul with calibration rows whose second moment is exactly the layer's.
With MODEL and CALIBRATION whole networks are pruned and judged on ``--validation``, in floating point:
``pot_sparsity`` is the default recipe, ``pot_sparsity uniform`` gives every layer the same sparsity, as
onnxsim does. ``reached`` (percent in brackets in the table) is the sparsity over all layers this package
prunes. All models are judged by ONNX Runtime in float32; label metrics are percentages.

Prints JSON lines and then a table in Markdown; ``--render`` makes one table of the lines of several runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from bench_solvers import make_layer  # type: ignore[import-not-found]
from onnx import TensorProto, helper, numpy_helper

from pot_sparsity.algorithms.arrays import AnyArray, Float32, Float64, Pattern
from pot_sparsity.algorithms.pruning.problem import LayerProblem, SolverOptions
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.data import Dataset, load_dataset, load_preprocess
from pot_sparsity.errors import PotSparsityError, UserError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.validation import validate
from pot_sparsity.recipe import load_recipe

WORKER = Path(__file__).with_name("onnxsim_worker.py")
METHODS = ("magnitude", "wanda", "sparsegpt")
PRODUCT = {"pot_sparsity": (), "pot_sparsity uniform": ("allocation.method=uniform",)}
Record = dict[str, object]


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


def layer_records(
    name: str, weight: Float64, second: Float64, arguments: argparse.Namespace
) -> Iterator[Record]:
    """Errors (on the undamped H) and seconds of all methods on one layer."""
    problem = LayerProblem.of(weight[None], second[None])
    samples = rows_with_moment(second)
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder, "layer.onnx"), Path(folder, "pruned.onnx")
        onnx.save(matmul_model(weight), model)
        run = partial(run_onnxsim, arguments.onnxsim_python, model, output, {"x": samples})
        for sparsity in arguments.sparsity:
            about: Record = {"layer": name, "sparsity": sparsity, "pattern": str(arguments.pattern)}
            for method in arguments.onnxsim_method:
                version, seconds = run(
                    method, sparsity, arguments.pattern, batch=len(samples), simplify=False
                )
                found = pruned_weight(load_model(output))
                result = problem.result(found[None], (found != 0.0)[None], 0.0)
                yield about | {
                    "method": f"onnxsim {method}",
                    "version": version,
                    "reached": float(np.mean(found == 0.0)),
                    "relative_error": result.relative_error,
                    "seconds": seconds,
                }
            zeros = round(sparsity * weight.size)
            for method in arguments.method:
                start = time.perf_counter()
                result = SOLVERS[method](
                    weight[None],
                    second[None],
                    zeros,
                    arguments.pattern,
                    options=SolverOptions(workers=arguments.threads, polish=arguments.polish),
                )
                yield about | {
                    "method": method + (" + polish" if arguments.polish else ""),
                    "reached": float(np.mean(~result.mask)),
                    "relative_error": result.relative_error,
                    "seconds": time.perf_counter() - start,
                }


def pruned_weight(model: Model) -> Float64:
    """The weight [rows, cols] of a model of one layer."""
    (layer,) = find_layers(model.graph).layers
    return np.asarray(read_weight(model, layer)[0])


def reached_sparsity(model: Model) -> float:
    """Fraction of zeros over all layers."""
    weights = [read_weight(model, layer) for layer in find_layers(model.graph).layers]
    return float(sum(int((weight == 0.0).sum()) for weight in weights) / sum(w.size for w in weights))


def all_samples(dataset: Dataset, batch: int) -> dict[str, AnyArray]:
    """Every input of a data set as one array."""
    parts = [batch_.inputs for batch_ in dataset.batches(batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def model_records(arguments: argparse.Namespace) -> Iterator[Record]:
    """Label metrics of the dense model, of onnxsim's and of this package's sparse ones."""
    original = load_model(arguments.model)
    if original.format != "onnx":
        raise UserError(f"{arguments.model}: onnxsim reads ONNX files only")
    images = load_preprocess(arguments.preprocess)
    calibration = load_dataset(
        arguments.calibration, input_specs(original), images, samples=arguments.images, seed=arguments.seed
    )
    judge = partial(
        validate,
        validation=arguments.validation,
        reference=arguments.model,
        labels=arguments.validation_labels,
        split=arguments.validation_split,
        preprocess=images,
        engine="onnxruntime",
        threads=arguments.threads,
    )
    about: Record = {"model": arguments.model.stem, "images": len(calibration)}
    yield about | {"method": "dense", "metrics": judge(arguments.model)}
    batch = original.batch_size or arguments.batch
    batch = min(batch, len(calibration))
    samples = all_samples(calibration, batch)
    about["pattern"] = str(arguments.pattern)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "pruned.onnx")
        for sparsity in arguments.sparsity:
            for method in arguments.onnxsim_method:
                version, seconds = run_onnxsim(
                    arguments.onnxsim_python,
                    arguments.model,
                    output,
                    samples,
                    method,
                    sparsity,
                    arguments.pattern,
                    batch=batch,
                    simplify=arguments.simplify,
                )
                yield about | {
                    "method": f"onnxsim {method}",
                    "version": version,
                    "sparsity": sparsity,
                    "reached": reached_sparsity(load_model(output)),
                    "metrics": judge(output),
                    "seconds": seconds,
                }
            for name, settings in PRODUCT.items():
                yield (
                    about
                    | {"method": name, "sparsity": sparsity}
                    | product(arguments, calibration, sparsity, settings, judge)
                )


def product(
    arguments: argparse.Namespace,
    calibration: Dataset,
    sparsity: float,
    settings: Sequence[str],
    judge: partial[dict[str, float]],
) -> Record:
    """One run of this package; the held-out samples come out of the same calibration samples."""
    start = time.perf_counter()
    result = optimize(
        arguments.model,
        calibration,
        recipe=load_recipe(
            None,
            [
                f"sparsity={sparsity}",
                f"pruning.pattern={arguments.pattern}",
                "quantization.enabled=false",
                *settings,
                *arguments.set,
            ],
        ),
        threads=arguments.threads,
        baseline_int8=False,
        measure_latency=False,
    )
    seconds = time.perf_counter() - start
    return {
        "reached": result.report.sparsity_reached,
        "metrics": judge(result.sparse_model),
        "seconds": seconds,
    }


def tables(records: Sequence[Record], metric: str) -> str:
    """Markdown: layer errors, and the label metric of whole models, methods side by side."""
    parts = [
        _table(
            "layer", [r for r in records if "layer" in r], lambda r: f"{float(str(r['relative_error'])):.5f}"
        ),
        _table("model", [r for r in records if "model" in r], partial(_metric, metric=metric)),
    ]
    return "\n\n".join(part for part in parts if part)


def _metric(record: Record, metric: str) -> str:
    metrics = record["metrics"]
    assert isinstance(metrics, dict)
    value = f"{metrics[metric]:.2f}" if metric in metrics else "-"
    return value if "reached" not in record else f"{value} ({100 * float(str(record['reached'])):.1f})"


def _table(what: str, records: Sequence[Record], cell: Callable[[Record], str]) -> str:
    """One line per layer or model, pattern and sparsity; a dense value stands in every line of its model."""
    if not records:
        return ""
    dense = {str(r[what]): cell(r) for r in records if r["method"] == "dense"}
    methods = list(dict.fromkeys(str(r["method"]) for r in records if r["method"] != "dense"))
    lines: dict[tuple[str, str, float], dict[str, str]] = {}
    for record in records:
        if record["method"] != "dense":
            key = str(record[what]), str(record["pattern"]), float(str(record["sparsity"]))
            lines.setdefault(key, {})[str(record["method"])] = cell(record)
    head = [what, "pattern", "sparsity", *(["dense"] if dense else []), *methods]
    rows = [
        [name, pattern, f"{sparsity:g}", *([dense.get(name, "-")] if dense else [])]
        + [found.get(method, "-") for method in methods]
        for (name, pattern, sparsity), found in lines.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def read_lines(paths: Iterable[Path]) -> list[Record]:
    """Records of earlier runs; lines that are no JSON objects are passed over."""
    return [
        json.loads(line)
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("{")
    ]


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """All that is asked for."""
    for path in arguments.layer:
        with np.load(path, allow_pickle=False) as arrays:
            weight, second = arrays["W"].astype(np.float64), arrays["H"].astype(np.float64)
        yield from layer_records(path.stem, weight, second, arguments)
    for shape in arguments.shape:
        rows, cols = (int(part) for part in shape.split("x"))
        weight, second = make_layer(rows, cols, arguments.samples, arguments.seed)
        yield from layer_records(shape, weight, second, arguments)
    if arguments.model is not None:
        yield from model_records(arguments)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", nargs="?", type=Path, help="ONNX model")
    options.add_argument("calibration", nargs="?", help="its calibration data: folder of images or .npz")
    options.add_argument("--onnxsim-python", type=Path, help="interpreter that has onnxsim and onnxruntime")
    options.add_argument("--validation", help="data to judge on, with labels")
    options.add_argument("--validation-labels", type=Path, help="CSV or .npz with labels")
    options.add_argument("--validation-split", help="rows of that CSV to use")
    options.add_argument("--preprocess", type=Path, help="JSON or YAML file with the preprocessing of images")
    options.add_argument("--images", type=int, default=256, help="calibration samples to use (256)")
    options.add_argument("--batch", type=int, default=32, help="samples per inference of onnxsim (32)")
    options.add_argument("--no-simplify", dest="simplify", action="store_false", help="keep BatchNorm for it")
    options.add_argument("--layer", type=Path, action="append", default=[], help=".npz with W and H")
    options.add_argument("--shape", action="append", default=[], help="ROWSxCOLS of a layer (cols = 9 k)")
    options.add_argument("--samples", type=int, default=8192, help="inputs behind a generated layer")
    options.add_argument("--sparsity", type=float, nargs="+", help="default: 0.5 0.6 0.7")
    options.add_argument("--pattern", type=Pattern.parse, default=Pattern(), help="unstructured or n:m")
    options.add_argument("--onnxsim-method", action="append", choices=METHODS, help="default: all")
    options.add_argument("--method", action="append", choices=sorted(SOLVERS), help="layers: default admm")
    options.add_argument("--polish", action="store_true", help="layers: end with the 1-swap polish")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a recipe key")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--metric", default="top1", help="what the table of models shows (top1)")
    options.add_argument("--render", type=Path, nargs="+", help="only a table of the lines in these files")
    arguments = options.parse_args(given)
    arguments.sparsity = arguments.sparsity or [0.5, 0.6, 0.7]
    arguments.onnxsim_method = arguments.onnxsim_method or list(METHODS)
    arguments.method = arguments.method or ["admm"]
    if arguments.render:
        return arguments
    if arguments.onnxsim_python is None:
        options.error("--onnxsim-python is needed")
    if arguments.pattern.kind == "block":
        options.error("--pattern: onnxsim has no blocks of weights")
    if arguments.model is not None and (arguments.calibration is None or arguments.validation is None):
        options.error("CALIBRATION and --validation go with MODEL")
    if arguments.model is None and not arguments.layer and not arguments.shape:
        options.error("nothing to compare: give MODEL and CALIBRATION, --layer or --shape")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Run the tool."""
    arguments = parse(given)
    if arguments.render:
        print(tables(read_lines(arguments.render), arguments.metric))
        return 0
    found: list[Record] = []
    try:
        for record in records(arguments):
            print(json.dumps(record), flush=True)
            found.append(record)
    except PotSparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{tables(found, arguments.metric)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
