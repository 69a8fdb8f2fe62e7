"""Layer-wise fine-tuning by gradient descent; an optimizer or a loss is a line in its table."""

from __future__ import annotations

from pot_sparsity.algorithms.tuning.loop import OPTIMIZERS, RATES, TunedLayer, TuningSettings, tune_layer
from pot_sparsity.algorithms.tuning.losses import LOSSES

__all__ = ["LOSSES", "OPTIMIZERS", "RATES", "TunedLayer", "TuningSettings", "tune_layer"]
