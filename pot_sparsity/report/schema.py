"""The schema of ``report.json``: stable, versioned, and the only thing tables and pages are rendered from.

Sparsity, density and fractions are 0..1, accuracies and agreement are percent, sizes are bytes, memory is MiB,
latency is milliseconds, times are seconds.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = "1.0"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Versions(_Part):
    """Versions of everything that decides the result."""

    pot_sparsity: str
    python: str
    packages: dict[str, str] = Field(description="version by package name")


class Machine(_Part):
    """Where the run took place."""

    processor: str
    cores: int
    memory_mib: int


class TensorSpec(_Part):
    """One model input or output."""

    name: str
    shape: list[int | None] | None = Field(
        description="null where the rank is unknown; null entries are free"
    )
    dtype: str | None


class ModelSpec(_Part):
    """The model as it came."""

    file: str = Field(description="file name, or a description of the object")
    format: Literal["onnx", "openvino"]
    sha256: str
    parameters: int = Field(description="numbers in all floating-point constants")
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class DataSpec(_Part):
    """Samples that were used, and for what."""

    calibration: int = Field(description="calibration samples read, before augmentation")
    fit: int = Field(description="samples, after augmentation, that entered a fit")
    held_out: int = Field(description="samples that only judged")
    validation: int
    labels: bool = Field(description="whether validation had labels")
    metric: str = Field(description="the metric that max_drop watches")


class EditSpec(_Part):
    """One structural edit of the model."""

    kind: str
    node: str
    detail: str


class Left(_Part):
    """A node that was left alone, and why."""

    node: str
    reason: str


class LayerReport(_Part):
    """One layer."""

    name: str
    kind: str
    shape: list[int]
    groups: int
    rows: int
    cols: int
    weights: int
    zeros: int = Field(
        description="exact zeros as stored in the written model, after the cast to its own type"
    )
    sparsity: float
    target_zeros: int | None = Field(description="zeros the allocation gave; null for an ignored layer")
    flops: int | None = Field(description="dense FLOPs per sample; null where a shape is unknown")
    relative_error: float | None = Field(
        description="layer error relative to its output's energy, on fit samples"
    )
    damping: float = Field(description="relative damping the solver needed")
    ignored: str | None = Field(None, description="why the layer was left dense")


class Iteration(_Part):
    """One step of the schedule."""

    index: int
    sparsity: float
    zeros: int
    metrics: dict[str, float]
    drop: float | None = Field(
        description="drop of the watched metric against the dense model, in its points"
    )
    accepted: bool


BudgetKind: TypeAlias = Literal["sparsity", "flops", "bops", "size", "latency"]


class BudgetReport(_Part):
    """One budget: what was asked for, and what the sparse model, as written, costs."""

    kind: BudgetKind
    asked: float = Field(
        description="the largest fraction of the dense model's cost that may remain; of sparsity, the least fraction "
        "of zeros"
    )
    reached: float = Field(description="the same of the written weights")
    dense: float = Field(description="what the layers that take part cost in the model as it came")
    cost: float = Field(description="what they cost now")
    unit: str


class Decision(_Part):
    """Something the run measured and decided."""

    what: str
    kept: bool
    before: float | None = None
    after: float | None = None
    measure: str = ""
    reason: str = ""


class Stage(_Part):
    """One stage of the run."""

    name: str
    seconds: float
    peak_memory_mib: float = Field(description="highest resident memory of the process so far")
    metrics_before: dict[str, float] = Field(default_factory=dict)
    metrics_after: dict[str, float] = Field(default_factory=dict)


class Variant(_Part):
    """One of the models compared: dense, dense_int8, sparse, sparse_int8, mixed (bits chosen layer by layer)."""

    name: str
    metrics: dict[str, float] = Field(
        description="label metrics, and agreement / kl / sqnr against the dense model"
    )
    interval: dict[str, list[float]] = Field(
        default_factory=dict,
        description="paired difference to dense with its 95 % interval: [difference, low, high]",
    )
    zeros: int
    weights: int
    file_bytes: int | None
    compressed_bytes: int | None = Field(description="size after lossless compression (deflate)")
    latency_ms: float | None


class FileSpec(_Part):
    """A file of the run directory."""

    path: str
    bytes: int
    role: str


class Report(_Part):
    """Everything a run did, decided and measured."""

    schema_version: str = SCHEMA_VERSION
    status: Literal["done", "gate_not_met"]
    versions: Versions
    machine: Machine
    seed: int
    engine: str
    recipe: dict[str, object]
    model: ModelSpec
    data: DataSpec
    sparsity_asked: float
    sparsity_reached: float
    zeros: int
    weights: int = Field(description="weights of the layers that take part")
    budgets: list[BudgetReport] = Field(
        default_factory=list, description="empty where sparsity alone was asked for"
    )
    edits: list[EditSpec]
    not_fused: list[Left]
    skipped: list[Left]
    layers: list[LayerReport]
    iterations: list[Iteration]
    chosen_iteration: int | None
    decisions: list[Decision]
    stages: list[Stage]
    variants: list[Variant]
    files: list[FileSpec]
    warnings: list[str]
    seconds: float
    peak_memory_mib: float
