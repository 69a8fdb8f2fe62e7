"""Compare with onnxsim: same layer or model, same calibration samples, same sparsity.

onnxsim runs in an environment of its own, whose interpreter ``--onnxsim-python`` names. Layers (``--layer``,
``--shape``) are given to it as one MatMul with calibration rows whose second moment is exactly the layer's.
Whole networks (MODEL and CALIBRATION, or ``--entry`` of a zoo) are pruned and judged on ``--validation``, in
floating point: ``pot_sparsity`` is the default recipe, ``pot_sparsity uniform`` gives every layer the same
sparsity, as onnxsim does. ``reached`` (percent in brackets in the table where it is not what was asked for) is the
sparsity over all layers this package prunes. All models are judged by ONNX Runtime in float32; label metrics are
percentages.

Prints JSON lines and then a table in Markdown. ``--lines FILE`` keeps the lines and does not run again what stands
there (delete it once the code has changed); ``--render`` makes one table of the lines of several files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx
from bench_solvers import make_layer  # type: ignore[import-not-found]
from onnxsim_jobs import Job, layer_jobs, run_onnxsim  # type: ignore[import-not-found]
from onnxsim_tables import Record, read_lines, tables  # type: ignore[import-not-found]
from results_sections import SPLIT  # type: ignore[import-not-found]

from pot_sparsity.algorithms.arrays import AnyArray, Pattern
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.data import Dataset, Preprocess, load_dataset, load_preprocess
from pot_sparsity.errors import PotSparsityError, UserError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.validation import validate
from pot_sparsity.recipe import load_recipe

METHODS = ("magnitude", "wanda", "sparsegpt")
PRODUCT = {"pot_sparsity": (), "pot_sparsity uniform": ("allocation.method=uniform",)}


@dataclass(frozen=True)
class Network:
    """A whole network and its data."""

    name: str
    model: Path
    calibration: str
    validation: str
    labels: Path | None
    split: str | None
    preprocess: Preprocess
    arguments: argparse.Namespace

    @cached_property
    def samples(self) -> Dataset:
        """Calibration samples, the same for all."""
        original = load_model(self.model)
        if original.format != "onnx":
            raise UserError(f"{self.model}: onnxsim reads ONNX files only")
        return load_dataset(
            self.calibration,
            input_specs(original),
            self.preprocess,
            samples=self.arguments.images,
            seed=self.arguments.seed,
        )

    @property
    def batch(self) -> int:
        """Samples per inference of onnxsim, such that none is left over where the model lets us choose."""
        count = len(self.samples)
        free = max(size for size in range(1, self.arguments.batch + 1) if count % size == 0)
        return min(load_model(self.model).batch_size or free, count)

    def judge(self, model: Path | onnx.ModelProto) -> dict[str, float]:
        """Metrics of a model, labels and distance to the dense one."""
        return validate(
            model,
            self.validation,
            reference=self.model,
            labels=self.labels,
            split=self.split,
            preprocess=self.preprocess,
            engine="onnxruntime",
            threads=self.arguments.threads,
        )


def reached_sparsity(model: Model) -> float:
    """Fraction of zeros over all layers."""
    weights = [read_weight(model, layer) for layer in find_layers(model.graph).layers]
    return float(sum(int((weight == 0.0).sum()) for weight in weights) / sum(w.size for w in weights))


def all_samples(dataset: Dataset, batch: int) -> dict[str, AnyArray]:
    """Every input of a data set as one array."""
    parts = [batch_.inputs for batch_ in dataset.batches(batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def network_jobs(network: Network) -> Iterator[Job]:
    """Label metrics of the dense model, of onnxsim's and of this package's sparse ones."""
    arguments = network.arguments
    about: Record = {"model": network.name, "images": len(network.samples), "seed": arguments.seed}
    yield Job(about | {"method": "dense"}, lambda: {"metrics": network.judge(network.model)})
    about["pattern"] = str(arguments.pattern)
    for sparsity in arguments.sparsity:
        asked = about | {"sparsity": sparsity}
        for method in arguments.onnxsim_method:
            yield Job(
                asked | {"method": f"onnxsim {method}", "simplify": arguments.simplify},
                partial(their_network, network, method, sparsity),
            )
        for name in arguments.ours:
            chosen = [*PRODUCT[name], *arguments.set]
            yield Job(
                asked | {"method": name, "set": chosen}, partial(our_network, network, sparsity, chosen)
            )


def their_network(network: Network, method: str, sparsity: float) -> Record:
    """One run of onnxsim."""
    arguments = network.arguments
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "pruned.onnx")
        version, seconds = run_onnxsim(
            arguments.onnxsim_python,
            network.model,
            output,
            all_samples(network.samples, network.batch),
            method,
            sparsity,
            arguments.pattern,
            batch=network.batch,
            simplify=arguments.simplify,
        )
        return {
            "version": version,
            "reached": reached_sparsity(load_model(output)),
            "metrics": network.judge(output),
            "seconds": seconds,
        }


def our_network(network: Network, sparsity: float, settings: Sequence[str]) -> Record:
    """One run of this package; the held-out samples come out of the same calibration samples."""
    arguments = network.arguments
    fixed = [
        f"sparsity={sparsity}",
        f"pruning.pattern='{arguments.pattern}'",
        "quantization.enabled=false",
    ]
    start = time.perf_counter()
    result = optimize(
        network.model,
        network.samples,
        recipe=load_recipe(None, [*fixed, *settings]),
        threads=arguments.threads,
        baseline_int8=False,
        measure_latency=False,
    )
    seconds = time.perf_counter() - start
    assert isinstance(result.sparse_model, onnx.ModelProto)
    return {
        "reached": result.report.sparsity_reached,
        "metrics": network.judge(result.sparse_model),
        "seconds": seconds,
    }


def networks(arguments: argparse.Namespace) -> Iterator[Network]:
    """The model that is given, and the entries of the zoo."""
    if arguments.model is not None:
        yield Network(
            arguments.model.stem,
            arguments.model,
            arguments.calibration,
            arguments.validation,
            arguments.validation_labels,
            arguments.validation_split,
            load_preprocess(arguments.preprocess),
            arguments,
        )
    if not arguments.entry:
        return
    path = Path(arguments.zoo, "zoo.json")
    try:
        zoo = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name the folder with --zoo") from None
    for name in arguments.entry:
        if name not in zoo:
            raise UserError(f"--entry {name!r} is not in {path}: there are {', '.join(zoo)}")
        entry = zoo[name]
        yield Network(
            name,
            arguments.zoo / entry["model"],
            str(arguments.zoo / entry["calibration"]),
            str(arguments.zoo / entry["validation"]),
            arguments.zoo / entry["labels"] if "labels" in entry else None,
            SPLIT if "labels" in entry else None,
            load_preprocess(entry.get("preprocess", {})),
            arguments,
        )


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """All that is asked for."""
    for path in arguments.layer:
        with np.load(path, allow_pickle=False) as arrays:
            weight, second = arrays["W"].astype(np.float64), arrays["H"].astype(np.float64)
        yield from layer_jobs(path.stem, weight, second, arguments)
    for shape in arguments.shape:
        rows, cols = (int(part) for part in shape.split("x"))
        weight, second = make_layer(rows, cols, arguments.samples, arguments.seed)
        yield from layer_jobs(shape, weight, second, arguments)
    for network in networks(arguments):
        yield from network_jobs(network)


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    """Lines of all jobs; what ``--lines`` does not hold yet is measured and added."""
    path: Path | None = arguments.lines
    known = read_lines([path]) if path is not None and path.is_file() else []
    for job in jobs(arguments):
        found = job.known(known)
        if found is None:
            found = job.about | job.measure()
            if path is not None:
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(found) + "\n")
        yield found


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", nargs="?", type=Path, help="ONNX model")
    options.add_argument("calibration", nargs="?", help="its calibration data: folder of images or .npz")
    options.add_argument("--zoo", type=Path, help="folder with zoo.json, which names networks and their data")
    options.add_argument("--entry", action="append", default=[], metavar="NAME", help="a network of the zoo")
    options.add_argument("--lines", type=Path, help="file that keeps the lines")
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
    options.add_argument("--ours", action="append", choices=list(PRODUCT), help="networks: default all")
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
    arguments.ours = arguments.ours or list(PRODUCT)
    arguments.method = arguments.method or ["admm"]
    if arguments.render:
        return arguments
    if arguments.onnxsim_python is None:
        options.error("--onnxsim-python is needed")
    if arguments.pattern.kind == "block":
        options.error("--pattern: onnxsim has no blocks of weights")
    if arguments.model is not None and (arguments.calibration is None or arguments.validation is None):
        options.error("CALIBRATION and --validation go with MODEL")
    if arguments.entry and arguments.zoo is None:
        options.error("--entry needs --zoo")
    if arguments.model is None and not arguments.layer + arguments.shape + arguments.entry:
        options.error("nothing to compare: give MODEL and CALIBRATION, --entry, --layer or --shape")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Run the tool."""
    arguments = parse(given)
    if arguments.render:
        print(tables(read_lines(arguments.render), arguments.metric))
        return 0
    found: list[Record] = []
    try:
        for record in run(arguments):
            print(json.dumps(record), flush=True)
            found.append(record)
    except PotSparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{tables(found, arguments.metric)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
