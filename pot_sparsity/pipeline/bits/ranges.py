"""Ranges of the tensors that layers read, from a sample of their values in the dense model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.algorithms.quantization.activations import ActivationGrid, fit_activation_grid
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.errors import DataError
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.collect import fitting_batch
from pot_sparsity.pipeline.evaluate import feeds

#: Values of a tensor that its range is fitted to.
VALUES = 2**15

#: By tensor, then by bits.
Ranges = dict[str, dict[int, ActivationGrid]]


def fit_ranges(
    model: Model,
    layers: Sequence[Layer],
    engine: Engine,
    samples: Dataset,
    bits: Collection[int],
    *,
    batch_size: int,
    seed: int,
) -> Ranges:
    """Grids of so many bits for every tensor that a layer reads, of least squared rounding error.

    Parameters
    ----------
    model, layers
        The dense model and its layers.
    samples
        What it runs on; a seeded draw of values from each batch stands for all.
    batch_size
        Samples per inference, at most.

    Raises
    ------
    DataError
        Values that are not finite, or no full batch.
    """
    tensors = tuple(dict.fromkeys(place.input for layer in layers for place in layer.places))
    executable = engine.compile(model.extract(outputs=tensors))
    size = fitting_batch(model, executable, samples, batch_size)
    random = np.random.default_rng(seed)
    quota = -(-VALUES // max(1, len(samples) // size))
    drawn: dict[str, list[AnyArray]] = {tensor: [] for tensor in tensors}
    for batch in samples.batches(size):
        if model.batch_size is not None and batch.size < size:
            break
        found = executable.run(feeds(model, executable, batch))
        for tensor in tensors:
            drawn[tensor].append(_draw(found[tensor], quota, random))
    ranges: Ranges = {}
    for tensor in tensors:
        try:
            values = np.concatenate(drawn[tensor])
            ranges[tensor] = {number: fit_activation_grid(values, number) for number in bits}
        except ValueError as error:
            raise DataError(f"tensor {tensor!r} has no range: {error}") from error
    return ranges


def _draw(values: AnyArray, number: int, random: np.random.Generator) -> AnyArray:
    """A draw of values, the smallest and the largest among them; zeros, which every grid holds, are left out."""
    flat = values.ravel()
    flat = flat[flat != 0.0]
    if flat.size <= number:
        return np.array(flat)
    ends = flat[[int(flat.argmin()), int(flat.argmax())]]
    return np.concatenate([ends, flat[random.integers(0, flat.size, number)]])
