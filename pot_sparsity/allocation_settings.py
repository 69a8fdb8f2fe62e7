"""The section of a recipe that says how zeros are spread over the layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pot_sparsity.algorithms.allocation import ALLOCATIONS
from pot_sparsity.section import Section, one_of

#: The allocation that measures the network's output.
OUTPUT_DISTORTION = "output_distortion"


class AllocationSettings(Section):
    """Which sparsity each layer gets."""

    method: str = Field(OUTPUT_DISTORTION, description="name of the allocation")
    levels: int = Field(
        6, ge=2, le=100, description="output_distortion: sparsities at which every layer is measured"
    )
    spacing: Literal["density", "linear"] = Field(
        "density",
        description="output_distortion: densities in equal ratios, with the layer's own error telling what lies in "
        "between, or sparsities in equal steps up to 1 with straight lines in between (rate-distortion pruning)",
    )
    pruning: Literal["run", "magnitude"] = Field(
        "run",
        description="output_distortion: what prunes the layer that is measured: the run's own solver, with the bias "
        "corrected, or magnitude alone",
    )
    samples: int = Field(256, ge=1, description="output_distortion: samples it is measured on, at most")
    fewer_samples: bool = Field(
        True, description="output_distortion: fewer samples for networks on which they would take long"
    )
    inputs: Literal["calibration", "noise"] = Field(
        "calibration",
        description="output_distortion: those samples, or standard normal noise of their shape (zero-data pruning)",
    )
    objective: Literal["network", "layer"] = Field(
        "network", description="output_distortion: whose output is compared, the network's or the layer's own"
    )
    distance: Literal["error", "kl", "squared"] = Field(
        "error",
        description="output_distortion: relative squared error of the outputs, divergence of class scores, or plain "
        "squared error",
    )
    aggregate: Literal["mean", "worst"] = Field(
        "mean", description="output_distortion: over samples, the mean or the worst"
    )
    cleaning: Literal["isotonic", "outliers", "running_max", "none"] = Field(
        "isotonic",
        description="output_distortion: measured points that fall with sparsity are moved to the nearest rising "
        "curve, delete the higher ones before them (outlier filtering), are lifted, or stay",
    )
    rounds: Literal["one", "iterative"] = Field(
        "one",
        description="output_distortion: all zeros at once, or round by round, with curves measured again on the model "
        "that is pruned so far; one layer never gets fewer zeros than before",
    )
    removed: float = Field(
        0.2,
        gt=0.0,
        lt=1.0,
        description="part of the weights left that a round removes (unless kind is cubic)",
    )
    refine: Literal["helps", "never"] = Field(
        "helps",
        description="output_distortion: once a sparse model stands, correct the curves by what layers do to its output "
        "and allocate again; kept if the output on held-out samples comes nearer to the dense model's",
    )
    refine_from: float = Field(
        0.08, ge=0.0, description="distance of the output on held-out samples from which on that is tried"
    )
    exchanges: int = Field(
        0,
        ge=0,
        description="output_distortion: exchanges of zeros between two layers that are tried, at most, on the pruned "
        "network itself (a sparsity, no budget); kept where the output comes nearer to the dense model's",
    )
    solver: Literal["auto", "dynamic_program", "hull"] = Field(
        "auto",
        description="output_distortion: how levels are chosen within one budget: by SPDY's dynamic program over a "
        "budget cut into buckets (as auto does), or along the lower convex hulls",
    )
    options: dict[str, float | bool] = Field(
        default_factory=dict,
        description="options of that allocation; uniform: protect_first_last, magnitude: unfused (weights as they were "
        "before BatchNorm was fused), erk: power",
    )
    max_layer_sparsity: float = Field(1.0, gt=0.0, le=1.0, description="no layer gets sparser than this")
    ignored_names: tuple[str, ...] = Field((), description="layers left dense, by node name")
    ignored_patterns: tuple[str, ...] = Field((), description="layers left dense, by regular expression")
    ignored_types: tuple[str, ...] = Field((), description="layers left dense, by operator type")

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        return one_of(value, (*ALLOCATIONS, OUTPUT_DISTORTION), "allocation")
