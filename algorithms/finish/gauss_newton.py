"""Gauss-Newton on a few parameters of a whole network, from differences of its outputs.

With ``J`` the derivative of the outputs by the parameters and ``r`` what the outputs lack, one step is the minimum of
``|J d - r|^2 / n + ridge * mean(diag J^T J / n) * |d|^2`` (Levenberg's damping). The ridge stands for all that the
samples cannot tell; it is chosen on others.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from pot_sparsity.algorithms.arrays import Float32, Float64


class NormalEquations:
    """``J^T J`` and ``J^T r`` summed over samples.

    Parameters
    ----------
    parameters
        Number of columns of J.
    """

    def __init__(self, parameters: int) -> None:
        self._second = np.zeros((parameters, parameters))
        self._cross = np.zeros(parameters)
        self._basis: tuple[Float64, Float64] | None = None

    def add(self, jacobian: Float32, residual: Float32) -> None:
        """Add samples: ``jacobian [samples, outputs, parameters]``, ``residual [samples, outputs]``.

        Raises
        ------
        ValueError
            If the shapes do not fit or a number is not finite.
        """
        if jacobian.shape != (*residual.shape, self._cross.size):
            raise ValueError(f"J {jacobian.shape} does not fit residuals {residual.shape}")
        rows = jacobian.reshape(-1, self._cross.size)
        cross = rows.T @ residual.ravel()
        second = rows.T @ rows
        if not (np.isfinite(second).all() and np.isfinite(cross).all()):
            raise ValueError("the outputs are not finite")
        self._second += second
        self._cross += cross
        self._basis = None

    def step(self, ridge: float) -> Float64:
        """The damped step ``[parameters]``; zero where nothing depends on the parameters."""
        level = float(np.trace(self._second)) / self._cross.size
        if not level > 0:
            return np.zeros_like(self._cross)
        if self._basis is None:
            values, vectors = np.linalg.eigh(self._second)
            self._basis = np.maximum(values, 0.0), vectors
        values, vectors = self._basis
        return np.asarray(vectors @ ((vectors.T @ self._cross) / (values + ridge * level)))


def sketch(size: int, width: int, seed: int) -> csr_array:
    """Random signs that fold ``size`` outputs into at most ``width`` and keep squared lengths on average.

    Each output goes to one place with a random sign (a count sketch), so that millions of them cost nothing.

    Returns
    -------
    csr_array
        float32 ``[min(size, width), size]``; the identity where nothing is to be folded.
    """
    if size <= width:
        return csr_array(np.eye(size, dtype=np.float32))
    random = np.random.default_rng(seed)
    signs = random.integers(0, 2, size).astype(np.float32) * 2 - 1
    return csr_array((signs, (random.integers(0, width, size), np.arange(size))), shape=(width, size))
