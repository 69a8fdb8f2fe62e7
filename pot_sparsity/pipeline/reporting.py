"""From what a run holds to the report's schema."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.graph import TensorInfo
from pot_sparsity.graph.layers import Layer, flops
from pot_sparsity.graph.model import Edit, Model
from pot_sparsity.graph.weights import count_zeros
from pot_sparsity.metrics import paired_interval
from pot_sparsity.pipeline.allocation.costs import UNITS, Costs
from pot_sparsity.pipeline.compress import Compressed
from pot_sparsity.pipeline.evaluate import Evaluation, Evaluator
from pot_sparsity.pipeline.prepare import Prepared
from pot_sparsity.pipeline.recorder import Recorder, peak_memory_mib
from pot_sparsity.recipe import Recipe
from pot_sparsity.report.schema import (
    BudgetReport,
    DataSpec,
    EditSpec,
    FileSpec,
    Iteration,
    LayerReport,
    Left,
    Machine,
    ModelSpec,
    Report,
    TensorSpec,
    Variant,
    Versions,
)

_PACKAGES = ("openvino", "nncf", "onnx", "onnxruntime", "numpy", "scipy")


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    prepared: Prepared
    evaluator: Evaluator
    iterations: list[Iteration]
    chosen: int | None
    compressed: Compressed | None
    variants: list[Variant]
    files: tuple[Path, ...]
    metric: str
    edits: tuple[Edit, ...]


def input_specs(model: Model) -> tuple[TensorInfo, ...]:
    """The model's inputs under the names users know."""
    return tuple(
        TensorInfo(name, info.shape, info.dtype)
        for name, info in zip(model.input_names, model.inputs, strict=True)
    )


def fingerprint(model: Model, recipe: Recipe, *decisive: object) -> dict[str, object]:
    """Everything that decides a run's result, for resuming."""
    parts = [item.fingerprint if hasattr(item, "fingerprint") else repr(item) for item in decisive]
    return {
        "version": version_of("pot-sparsity"),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "model": digest(model),
        "recipe": recipe.model_dump(mode="json"),
        "decisive": parts,
    }


def version_of(package: str) -> str:
    """Installed version of a package; ``unknown`` for a checkout that was not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def digest(model: Model) -> str:
    """SHA-256 over a model's structure and constants."""
    total = hashlib.sha256()
    graph = model.graph
    for node in graph:
        total.update(repr((node.name, node.source_type, node.inputs, node.outputs)).encode())
        total.update(repr(sorted((key, repr(value)) for key, value in node.attrs.items())).encode())
        for tensor in node.outputs:
            if graph.is_constant(tensor):
                total.update(np.ascontiguousarray(graph.value(tensor)).tobytes())
    return total.hexdigest()


def model_spec(model: Model) -> ModelSpec:
    """The model as the report describes it."""
    graph = model.graph
    parameters = 0
    for node in graph:
        for tensor in node.outputs:
            if graph.is_constant(tensor):
                value = graph.value(tensor)
                if value.dtype.kind == "f" or value.dtype.name == "bfloat16":
                    parameters += int(value.size)
    return ModelSpec(
        file=model.source.name if model.source else f"{model.format} object",
        format=model.format,
        sha256=digest(model),
        parameters=parameters,
        inputs=[_tensor(info) for info in input_specs(model)],
        outputs=[_tensor(info) for info in model.outputs],
    )


def _tensor(info: TensorInfo) -> TensorSpec:
    return TensorSpec(
        name=info.name,
        shape=None if info.shape is None else list(info.shape),
        dtype=None if info.dtype is None else info.dtype.name,
    )


def layer_report(
    model: Model, layer: Layer, *, compressed: Compressed | None = None, ignored: str | None = None
) -> LayerReport:
    """One layer as it stands in ``model``."""
    zeros = count_zeros(model, layer)
    solution = compressed.solutions.get(layer.name) if compressed else None
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        shape=list(layer.shape),
        groups=layer.groups,
        rows=layer.rows,
        cols=layer.cols,
        weights=layer.size,
        zeros=zeros,
        sparsity=zeros / layer.size,
        target_zeros=compressed.zeros.get(layer.name) if compressed else None,
        flops=flops(layer, model.graph),
        relative_error=solution.relative_error if solution else None,
        damping=solution.damping if solution else 0.0,
        ignored=ignored,
    )


def variant(
    name: str,
    model: Model,
    prepared: Prepared,
    found: Evaluation,
    dense: Evaluation,
    latency: float | None,
    scratch: Path,
) -> Variant:
    """Measure one of the models compared; it is written into ``scratch`` for its size."""
    scratch.mkdir()
    files = model.save(scratch, "model")
    names = {layer.name for layer in prepared.layers}
    layers = [layer for layer in find_layers(model.graph).layers if layer.name in names]
    intervals = {
        metric: list(paired_interval(dense.correct[metric], right))
        for metric, right in found.correct.items()
        if metric in dense.correct and right.size > 1
    }
    return Variant(
        name=name,
        metrics=found.metrics,
        interval=intervals,
        zeros=sum(count_zeros(model, layer) for layer in layers),
        weights=sum(layer.size for layer in layers),
        file_bytes=sum(path.stat().st_size for path in files),
        compressed_bytes=sum(_deflated(path) for path in files),
        latency_ms=latency,
    )


def _deflated(path: Path) -> int:
    packer = zlib.compressobj(6)
    total = 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())


def build_report(
    status: Literal["done", "gate_not_met"],
    outcome: Outcome,
    *,
    recipe: Recipe,
    original: Model,
    engine: str,
    counts: tuple[int, int, int, int],
    labels: bool,
    recorder: Recorder,
    folder: Path | None,
    costs: Costs | None = None,
) -> Report:
    """Assemble the report; ``counts`` are samples read, fitted, held out and validated, budgets count in ``costs``."""
    prepared, compressed = outcome.prepared, outcome.compressed
    model = compressed.model if compressed else prepared.model
    layers = [layer_report(model, layer, compressed=compressed) for layer in prepared.layers]
    zeros, weights = sum(item.zeros for item in layers), sum(item.weights for item in layers)
    budgets = [] if costs is None else _budgets(recipe, costs, layers)
    layers += [
        layer_report(model, layer, ignored=prepared.ignored[layer.name]) for layer in prepared.ignored_layers
    ]
    samples, fit, held_out, validation = counts
    return Report(
        status=status,
        versions=versions(),
        machine=machine(),
        seed=recipe.seed,
        engine=engine,
        recipe=recipe.model_dump(mode="json"),
        model=model_spec(original),
        data=DataSpec(
            calibration=samples,
            fit=fit,
            held_out=held_out,
            validation=validation,
            labels=labels,
            metric=outcome.metric,
        ),
        sparsity_asked=recipe.sparsity
        if outcome.chosen is None
        else outcome.iterations[outcome.chosen].sparsity,
        sparsity_reached=zeros / weights,
        zeros=zeros,
        weights=weights,
        budgets=budgets,
        edits=[EditSpec(**asdict(edit)) for edit in outcome.edits],
        not_fused=[Left(node=item.node, reason=item.reason) for item in prepared.not_fused],
        skipped=[Left(node=item.node, reason=item.reason) for item in prepared.skipped],
        layers=layers,
        iterations=outcome.iterations,
        chosen_iteration=outcome.chosen,
        decisions=recorder.decisions,
        stages=recorder.stages,
        variants=outcome.variants,
        files=_files(folder, outcome.files),
        warnings=recorder.warnings,
        seconds=recorder.seconds,
        peak_memory_mib=peak_memory_mib(),
    )


def _budgets(recipe: Recipe, costs: Costs, layers: Sequence[LayerReport]) -> list[BudgetReport]:
    """What each budget asked for, and what layers cost with the zeros that were counted in them."""
    zeros = {layer.name: layer.zeros for layer in layers}
    found = []
    for kind, bound in recipe.budget.items():
        left = costs.fraction(kind, zeros)
        found.append(
            BudgetReport.model_validate(
                {
                    "kind": kind,
                    "asked": bound,
                    "reached": 1.0 - left if kind == "sparsity" else left,
                    "dense": costs.dense[kind],
                    "cost": costs.total(kind, zeros),
                    "unit": UNITS[kind],
                }
            )
        )
    return found


def _files(folder: Path | None, final: Sequence[Path]) -> list[FileSpec]:
    if folder is None:
        return []
    roles = dict.fromkeys(final, "final model")
    roles |= dict.fromkeys(sorted((folder / "float").glob("model*")), "sparse model in floating point")
    return [
        FileSpec(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, role=role)
        for path, role in roles.items()
    ]


def versions() -> Versions:
    """Versions of everything that decides results."""
    return Versions(
        pot_sparsity=version_of("pot-sparsity"),
        python=platform.python_version(),
        packages={name: version_of(name) for name in _PACKAGES},
    )


def machine() -> Machine:
    """Processor, cores and memory of the machine, as far as the standard library knows it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    memory = 0
    if sys.platform != "win32":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return Machine(processor=name, cores=os.cpu_count() or 1, memory_mib=memory)
