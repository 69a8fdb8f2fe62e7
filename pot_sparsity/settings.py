"""The settings of a run, validated: one class for each section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from pot_sparsity.algorithms.arrays import Pattern
from pot_sparsity.algorithms.pruning.registry import SOLVERS
from pot_sparsity.algorithms.tuning import LOSSES, OPTIMIZERS
from pot_sparsity.allocation_settings import AllocationSettings
from pot_sparsity.mixed_settings import MixedSettings
from pot_sparsity.section import Section, When, one_of

#: What can be bounded; all but ``sparsity`` as a fraction of what the dense model costs.
BUDGETS = ("sparsity", "flops", "bops", "size", "latency")


class Calibration(Section):
    """How calibration samples are used."""

    samples: int | None = Field(
        None, ge=1, description="use at most so many samples (a seeded draw); all by default"
    )
    batch_size: int = Field(64, ge=1, description="samples per inference")
    holdout: float = Field(0.1, ge=0.0, lt=1.0, description="fraction of samples that never enters a fit")
    augment: tuple[Literal["flip", "crop"], ...] = Field(
        (), description="augmentation of the samples that fit"
    )
    augment_factor: int = Field(1, ge=1, description="augmented samples per sample")
    max_positions: int | None = Field(
        None, ge=1, description="sample at most so many output positions per sample; exact moments by default"
    )


class PruningSettings(Section):
    """How the weights of one layer are chosen and removed."""

    method: str = Field("admm", description="name of the layer solver")
    pattern: str = Field("unstructured", description="unstructured, n:m or block:c")
    options: dict[str, float | bool | int | str] = Field(
        default_factory=dict, description="options of the solver"
    )
    unfused: bool = Field(
        False, description="magnitude: rank weights by what they were before BatchNorm was fused into them"
    )

    @model_validator(mode="after")
    def _magnitude_alone(self) -> PruningSettings:
        if self.unfused and self.method != "magnitude":
            raise ValueError("unfused goes with 'method: magnitude'")
        return self

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        return one_of(value, SOLVERS, "pruning method")

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        return str(Pattern.parse(value))


class TuningSection(Section):
    """Layer-wise fine-tuning by gradient descent; the defaults are those of the POT paper and its code."""

    optimizer: str = Field("adam", description="name of the optimizer: adam, sgd or adadelta")
    loss: str = Field(
        "mse",
        description="distance to the dense model's output: mse, l1, huber or cosine; mse is the fastest",
    )
    samples: int = Field(300, ge=1, description="samples the batches are drawn from")
    batch_size: int = Field(50, ge=1, description="samples of a batch")
    iterations: int = Field(30, ge=1, description="batches")
    updates_per_batch: int = Field(40, ge=1, description="updates on each batch")
    learning_rate: float | None = Field(
        None, gt=0.0, description="of the weights; 1e-5 for adam, 0.01 for sgd, 0.1 for adadelta by default"
    )
    bias_learning_rate: float | None = Field(
        None, gt=0.0, description="of the biases; 1e-4 for adam, 0.1 for sgd and adadelta by default"
    )
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="of sgd")
    huber_delta: float = Field(1.0, gt=0.0, description="where the huber loss turns linear")
    weight_decay: float = Field(0.0, ge=0.0, description="L2 regularization, added to the gradients")
    lookahead_steps: int = Field(0, ge=0, description="updates between two of Lookahead; 0: no Lookahead")
    lookahead_alpha: float = Field(0.5, gt=0.0, le=1.0, description="how far Lookahead's slow weights follow")
    averaging: Literal["none", "swa", "ema"] = Field(
        "none",
        description="result: the last state, the mean of those after each batch of the second half (stochastic weight "
        "averaging), or an exponential moving average over all updates",
    )
    averaging_decay: float = Field(0.99, ge=0.0, lt=1.0, description="decay of ema")

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return one_of(value, OPTIMIZERS, "optimizer")

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        return one_of(value, LOSSES, "loss")


class ReconstructionSettings(Section):
    """What the kept weights are fitted to."""

    method: Literal["closed_form", "tuning"] = Field(
        "closed_form",
        description="closed_form: least squares (with dense inputs, that is the solver's own refit); tuning: gradient "
        "descent from the pruned weights, layer by layer",
    )
    when: Literal["always", "helps"] = Field(
        "helps",
        description="helps: kept if the network's output on held-out samples comes nearer to the dense model's",
    )
    tuning: TuningSection = TuningSection()
    input: Literal["dense", "sparse"] = Field(
        "sparse",
        description="fit on the dense model's inputs, or on the sparse model's own against dense outputs",
    )
    target: Literal["layer", "block"] = Field(
        "block",
        description="with sparse inputs, what a layer that ends a residual block is fitted to: its own dense output, "
        "or the block's dense output minus the sparse skip",
    )
    masks: Literal["kept", "solved"] = Field(
        "solved",
        description="with sparse inputs: keep the masks of the pruning stage (as tuning always does), or solve for "
        "them again",
    )


class CorrectionSettings(Section):
    """Repairing statistics without gradients.

    ``helps``: kept if the network's output on held-out samples comes nearer to the dense model's.
    """

    weights: Literal["none", "published", "exact"] = Field(
        "none", description="per-channel mean and variance of the weights (POT), as published or exact"
    )
    weights_when: When = Field("helps", description="when the correction of the weights is kept")
    bias: Literal[True, False, "helps"] = Field(
        True,
        description="activation-bias correction: true, false or helps; unless false, layers get a bias, and fits take "
        "it as free",
    )
    bias_mode: Literal["one_shot", "sequential"] = Field(
        "one_shot",
        description="one_shot: from the dense model's inputs; sequential: solved again in sequence, from the sparse "
        "model's own (as sparse-input reconstruction does in any case)",
    )
    differential: When = Field(
        "helps", description="per-channel mean and deviation of each layer's output, measured in sequence"
    )
    normalization: When = Field(
        "helps",
        description="per-channel mean and deviation behind each LayerNorm, merged into its scale and shift",
    )
    batch_norm: Literal["none", "reestimate"] = Field(
        "none",
        description="reestimate: give fused BatchNorms the statistics of the calibration samples; harms networks "
        "trained on other samples (augmented ones, say), which the run finds out and warns of",
    )
    batch_norm_when: When = Field("helps", description="when re-estimated BatchNorms are kept")
    scale: bool = Field(
        True, description="let the differential and the normalization correction rescale channels"
    )
    clip: tuple[float, float] = Field((0.5, 2.0), description="bounds of that rescaling")

    @field_validator("clip")
    @classmethod
    def _around_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < value[0] <= 1.0 <= value[1]:
            raise ValueError("it must be [smallest, largest] with 0 < smallest <= 1 <= largest")
        return value


class FinishSettings(Section):
    """Last steps on the sparse model as a whole, after reconstruction and correction."""

    activations: When = Field(
        "helps",
        description="fit every layer again, in sequence, to what the activation behind it lets through and what "
        "the sparse residual branch adds",
    )
    slack: tuple[float, ...] = Field(
        (0.15, 0.3),
        min_length=1,
        description="weight of the plain error where the dense activation is flat, 0 to 1; of several the best is kept",
    )
    from_error: float = Field(
        0.02,
        ge=0.0,
        description="steps that are to help start at this distance of the output on held-out samples; nearer models "
        "have nothing to gain that is worth the time",
    )
    positions: int = Field(
        2**16, ge=1, description="output positions of a layer that those fits see, at most"
    )
    rescaling: When = Field(
        "never",
        description="tune scales and biases of all channels together against the network's output (takes longer than "
        "all else together, for one or two hundredths of the error)",
    )
    sweeps: int = Field(
        1, ge=1, description="Gauss-Newton steps of it; the first that does not help ends them"
    )
    samples: int = Field(256, ge=1, description="samples the derivatives are measured on, at most")
    budget: float = Field(
        20.0,
        ge=0.0,
        description="10^12 floating-point operations that a sweep may take; beyond it the first layers are left out",
    )

    distillation: When = Field(
        "helps",
        description="train the kept weights and the biases of all layers together to give the dense network's output, "
        "on varied samples and without labels; needs JAX, and operators it knows the derivatives of",
    )
    distill_from: float = Field(
        0.005,
        ge=0.0,
        description="the same as from_error, for distillation: it has more to gain on near models",
    )
    epochs: int = Field(
        25, ge=1, description="times it goes through the samples, as far as its budget allows"
    )
    rate: float = Field(
        0.04,
        gt=0.0,
        description="largest step of a weight, in units of the root mean square of its channel's kept weights, for an "
        "output that is all wrong; smaller in proportion to its error",
    )
    vary: bool = Field(
        True, description="mirror, shift and mix the samples it sees, as far as the inputs allow it"
    )
    distillation_budget: float = Field(
        20.0,
        ge=0.0,
        description="10^12 floating-point operations that it may take; fewer epochs beyond it, none where less than "
        "three could be had",
    )

    @field_validator("slack")
    @classmethod
    def _between(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 <= slack <= 1.0 for slack in value):
            raise ValueError("every slack lies between 0 and 1")
        return value


class ScheduleSettings(Section):
    """How the global sparsity rises."""

    kind: Literal["auto", "one_shot", "cubic", "bisection"] = Field(
        "auto",
        description="auto: bisection where max_drop has to be watched (cubic where iterations build on each other), "
        "else straight to the target; bisection: the sparsest model within max_drop, up to the target",
    )
    initial: float = Field(0.1, ge=0.0, le=1.0, description="s_i of the cubic schedule")
    iterations: int = Field(10, ge=1, description="T of the cubic schedule; most trials of the bisection")
    resolution: float = Field(
        0.01, ge=0.001, le=1.0, description="how near to the sparsest model the bisection gets"
    )
    start: Literal["dense", "previous", "model"] = Field(
        "dense",
        description="what an iteration prunes: dense, the dense weights; previous, those that the one before ended "
        "with (as in the POT paper: zeros stay, tuning goes on); model, the whole model that it ended with, by new "
        "moments and curves and fitted to its outputs, so that only the last steps look at the dense model",
    )
    max_drop: float | None = Field(
        None, ge=0.0, description="largest allowed drop of the metric, in its points"
    )

    @model_validator(mode="after")
    def _bisection_has_a_limit(self) -> ScheduleSettings:
        if self.kind == "bisection" and self.max_drop is None:
            raise ValueError("'kind: bisection' needs max_drop")
        if self.kind == "bisection" and self.start != "dense":
            raise ValueError("'kind: bisection' needs 'start: dense'")
        return self


class QuantizationSettings(Section):
    """INT8 through NNCF."""

    enabled: bool = Field(True, description="whether to quantize at all")
    preset: Literal["mixed", "performance"] = Field(
        "mixed", description="mixed: asymmetric activations; performance: symmetric"
    )
    samples: int = Field(300, ge=1, description="calibration samples NNCF sees (its subset_size)")
    ranges: Literal["auto", "default", "minmax", "histogram"] = Field(
        "auto",
        description="NNCF's estimator of activation ranges; auto: the best of them by the network's output",
    )
    bias_correction: Literal["auto", "fast", "full"] = Field(
        "auto", description="NNCF's fast or full bias correction; auto: the better by the network's output"
    )
    weights: Literal["nncf", "obq", "auto"] = Field(
        "nncf",
        description="nncf: round each weight to the nearest point; obq: place a layer's weights together on the same "
        "grid, by the error of its output; auto: the better on held-out samples",
    )
    weight_bits: int = Field(
        8,
        ge=2,
        le=8,
        description="limit weights to 2^bits levels, stored as INT8; below 8 needs weights: obq",
    )

    @model_validator(mode="after")
    def _fewer_levels_are_placed(self) -> QuantizationSettings:
        if self.weight_bits < 8 and self.weights != "obq":
            raise ValueError("weight_bits below 8 needs 'weights: obq'")
        return self


class Recipe(Section):
    """All settings of a run."""

    sparsity: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="fraction of zeros over all layers that take part; does not count where there is a budget",
    )
    budget: dict[str, float] = Field(
        default_factory=dict,
        description="bounds that all hold at once: flops, bops, size and latency, each the fraction of the dense "
        "model's that may remain; sparsity, the least fraction of zeros",
    )
    seed: int = Field(0, ge=0, description="seed of every draw")
    calibration: Calibration = Calibration()
    allocation: AllocationSettings = AllocationSettings()
    pruning: PruningSettings = PruningSettings()
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    correction: CorrectionSettings = CorrectionSettings()
    finish: FinishSettings = FinishSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    quantization: QuantizationSettings = QuantizationSettings()
    mixed: MixedSettings = MixedSettings()

    @model_validator(mode="before")
    @classmethod
    def _sparsity_alone(cls, values: Any) -> Any:
        """A budget of sparsity and nothing else is the sparsity."""
        if isinstance(values, Mapping):
            budget = values.get("budget")
            if isinstance(budget, Mapping) and list(budget) == ["sparsity"]:
                return {**values, "sparsity": budget["sparsity"], "budget": {}}
        return values

    @field_validator("budget")
    @classmethod
    def _bounds(cls, value: dict[str, float]) -> dict[str, float]:
        for kind, bound in value.items():
            one_of(kind, BUDGETS, "budget")
            low = "at least" if kind == "sparsity" else "above"
            if not (0.0 < bound <= 1.0 or (kind == "sparsity" and bound == 0.0)):
                raise ValueError(f"budget {kind} must be {low} 0 and at most 1, not {bound:g}")
        return {kind: value[kind] for kind in BUDGETS if kind in value}

    @model_validator(mode="after")
    def _bisection_starts_over(self) -> Recipe:
        if self.schedule.kind == "bisection" and self.allocation.rounds == "iterative":
            raise ValueError("'schedule.kind: bisection' needs 'allocation.rounds: one'")
        return self

    def dump(self) -> str:
        """The recipe as YAML, as written into the run directory."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
