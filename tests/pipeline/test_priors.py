"""What moments of few samples are shrunk towards, against the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest

from pot_sparsity.algorithms.arrays import ConvGeometry, Float64, MatMulGeometry
from pot_sparsity.algorithms.moments import MomentsAccumulator
from pot_sparsity.algorithms.reconstruction import RIDGE, sparse_target
from pot_sparsity.pipeline.optimize import optimize
from pot_sparsity.pipeline.priors import UNIT, prior_matrix
from pot_sparsity.pipeline.solve import shrunk
from tests.algorithms.test_reconstruction import moments as cross_moments
from tests.algorithms.test_reconstruction import problem
from tests.pipeline.nets import QUICK, conv_net, images

POSITION = ConvGeometry((1, 1), (1, 1), (1, 1), (0, 0), (0, 0))


def prior_of(x: Float64) -> Float64:
    """Through the accumulators, as the pipeline does, from ``[samples, channels, height, width]``."""
    positions, means = MomentsAccumulator(POSITION), MomentsAccumulator(MatMulGeometry())
    positions.update(x)
    means.update(x.mean(axis=(2, 3)))
    return prior_matrix(positions.result(), means.result())


def test_it_is_the_covariance_within_samples() -> None:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(5, 5))
    x = np.einsum("dc,nchw->ndhw", mixing, random.normal(size=(40, 5, 3, 4))) + random.normal(
        size=(40, 5, 1, 1)
    )
    within = np.zeros((5, 5))
    for sample in x:
        within += np.cov(sample.reshape(5, -1), bias=True) / len(x)
    expected = (1 - UNIT) * within / np.trace(within) * 5 + UNIT * np.eye(5)
    np.testing.assert_allclose(prior_of(x)[0], expected, rtol=1e-5, atol=1e-6)


def test_constant_maps_and_dead_channels_leave_it_positive_definite() -> None:
    random = np.random.default_rng(1)
    flat = np.repeat(random.normal(size=(30, 4, 1, 1)), 3, axis=2)
    np.testing.assert_array_equal(prior_of(flat)[0], np.eye(4))
    x = random.normal(size=(30, 4, 3, 3))
    x[:, 2] = 0.0
    assert np.linalg.eigvalsh(prior_of(x)[0]).min() >= UNIT * 0.99


def test_shrinking_adds_the_prior_at_the_level_of_the_diagonal() -> None:
    random = np.random.default_rng(2)
    root, other = random.normal(size=(2, 2, 4, 4))
    second, prior = root @ root.transpose(0, 2, 1), other @ other.transpose(0, 2, 1)
    found = shrunk(second, 0.3, prior)
    for group in range(2):
        expected = second[group] + 0.3 * np.trace(second[group]) / 4 * prior[group]
        np.testing.assert_allclose(found[group], expected, rtol=1e-12)
    np.testing.assert_array_equal(shrunk(second, 0.0, prior), second)


@pytest.mark.parametrize("ridge", [RIDGE, 0.3])
def test_the_target_of_sparse_inputs_leans_to_the_dense_weight_in_the_priors_metric(ridge: float) -> None:
    dense, x, y = problem(3, 12)
    random = np.random.default_rng(4)
    root = random.normal(size=(x.shape[1], x.shape[2], x.shape[2]))
    prior = root @ root.transpose(0, 2, 1)
    found = sparse_target(dense, cross_moments(x, y), None, ridge=ridge, prior=prior).weight
    for g in range(x.shape[1]):
        centred, wanted = x[:, g] - x[:, g].mean(0), y[:, g] - y[:, g].mean(0)
        level = ridge * (centred**2).mean(0).sum() / x.shape[2]
        # as further samples of that covariance, on which the dense weight is right
        extra = np.linalg.cholesky(prior[g]).T * np.sqrt(level * len(x))
        design = np.vstack([centred, extra])
        answer = np.vstack([wanted, extra @ dense[g].T])
        np.testing.assert_allclose(
            found[g], np.linalg.lstsq(design, answer, rcond=None)[0].T, rtol=1e-5, atol=1e-7
        )


def test_a_run_uses_it_for_its_head() -> None:
    """Few samples: the head is fitted in the metric of its feature maps, and zeros come out to the weight."""
    result = optimize(conv_net(), images(40), recipe={**QUICK, "sparsity": 0.5})
    layers = result.report.layers
    assert sum(layer.zeros for layer in layers) == round(0.5 * sum(layer.weights for layer in layers))
