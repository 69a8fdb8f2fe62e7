"""The schema of ``sweep.json``: every point of a sweep, with what it takes to write its model.

Units as in :mod:`pot_sparsity.report.schema`: fractions are 0..1, accuracies and agreement are percent, sizes are
bytes, times are seconds. What remains of a cost is a fraction of what the layers that take part cost in the model as it
came.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pot_sparsity.report.schema import BudgetKind, DataSpec, Machine, ModelSpec, Stage, Versions

SWEEP_VERSION = "1.0"
Correction = Literal["none", "bias", "full"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DenseFigures(_Part):
    """The model as it came."""

    metrics: dict[str, float]
    flops: float | None = Field(
        description="FLOPs per sample of the layers that take part; null where a shape is open"
    )
    size_bytes: int = Field(description="bytes of their weights")
    latency: float | None = Field(
        None,
        description="seconds of one inference of the model, by the timings; null without a budget of them",
    )


class SweepLayer(_Part):
    """A layer that takes part."""

    name: str
    weights: int


class SweepPoint(_Part):
    """One model of the sweep."""

    id: str = Field(description="its name for optimize --point, such as output_distortion@0.80")
    allocation: str
    budget: BudgetKind = Field(description="what was asked for")
    bound: float = Field(
        description="the least sparsity, or the fraction of the dense model's cost that may remain"
    )
    sparsity: float
    zeros: int
    flops: float | None = Field(description="fraction of the FLOPs that remains; null where a shape is open")
    bops: float | None = Field(description="fraction of the bit operations that remains")
    size: float = Field(
        description="fraction of the bytes that remains, packed: a bit mask and the kept weights, in INT8 where the "
        "recipe quantizes"
    )
    size_bytes: int = Field(description="bytes of the weights, packed")
    latency: float | None = Field(
        None, description="fraction of the time that remains, by the timings; null without a budget of it"
    )
    metrics: dict[str, float] = Field(
        description="label metrics, and agreement / kl / sqnr against the dense model, on the validation samples"
    )
    drop: float | None = Field(
        description="drop of the watched metric against the dense model, in its points"
    )
    relative_error: float | None = Field(description="energy of the output's error relative to the output's")
    layers: list[int] = Field(
        description="zeros that each layer was asked for, in the order of the sweep's layers"
    )
    seconds: float = Field(description="to stitch, correct and validate it")


class Sweep(_Part):
    """Everything a sweep found."""

    schema_version: str = SWEEP_VERSION
    versions: Versions
    machine: Machine
    seed: int
    engine: str
    recipe: dict[str, object] = Field(description="the recipe; allocation and budget are those of each point")
    model: ModelSpec
    data: DataSpec
    calibration: str = Field(description="digest of the calibration samples and their preprocessing")
    keep_structure: bool
    correction: Correction = Field(
        description="none; bias: one-shot activation-bias correction; full: the recipe's corrections, in sequence"
    )
    grid: float = Field(description="ratio of densities of neighbouring levels of a layer")
    database: str | None = Field(
        description="folder of the layer solutions, relative to the sweep's; null: not kept"
    )
    weights: int = Field(description="weights of the layers that take part")
    layers: list[SweepLayer]
    dense: DenseFigures
    points: list[SweepPoint] = Field(description="by allocation, then from dense to sparse")
    stages: list[Stage]
    warnings: list[str]
    seconds: float
    peak_memory_mib: float
