"""What can still be done when every layer has been fitted on its own: fits that look behind the layer."""

from __future__ import annotations

from pot_sparsity.algorithms.finish.gauss_newton import NormalEquations, sketch
from pot_sparsity.algorithms.finish.rectified import Positions, fit_rectified, rectified_error

__all__ = ["NormalEquations", "Positions", "fit_rectified", "rectified_error", "sketch"]
