"""The pipeline: the only room that knows all others."""

from __future__ import annotations

from pot_sparsity.pipeline.inspection import Inspection, inspect
from pot_sparsity.pipeline.optimize import Result, optimize
from pot_sparsity.pipeline.sweeping.sweep import Sweep, sweep
from pot_sparsity.pipeline.validation import validate

__all__ = ["Inspection", "Result", "Sweep", "inspect", "optimize", "sweep", "validate"]
