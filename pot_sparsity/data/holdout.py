"""The slice of the calibration samples that no fit ever sees, so that decisions can be judged on it."""

from __future__ import annotations

import numpy as np

from pot_sparsity.data.dataset import Dataset


def split_holdout(dataset: Dataset, fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Draw ``fraction`` of the samples (rounded, at least one on each side) as the held-out slice.

    Both parts keep the dataset's order. A single sample, or a fraction of 0, cannot be split: then both parts
    are the whole dataset.

    Parameters
    ----------
    dataset
        Plain samples; augment only the first part that comes back.
    fraction
        0 <= fraction < 1; ValueError otherwise.
    seed
        Of the draw, which depends on it and on the number of samples alone.

    Returns
    -------
    tuple
        ``(fit, held_out)``.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"held-out fraction {fraction} is not in 0 <= fraction < 1")
    count = len(dataset)
    if count < 2 or fraction == 0.0:
        return dataset, dataset
    held = min(max(1, round(fraction * count)), count - 1)
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(seed).choice(count, size=held, replace=False)] = True
    return dataset.subset(np.flatnonzero(~chosen)), dataset.subset(np.flatnonzero(chosen))


def filled(dataset: Dataset, batch: int) -> Dataset:
    """The dataset itself or, where it has fewer samples than ``batch``, its samples over and over until they fill one.

    For models whose batch is fixed: what is averaged over a full batch then weighs samples almost alike.
    """
    count = len(dataset)
    return dataset if count >= batch else dataset.subset(np.resize(np.arange(count, dtype=np.int64), batch))


def spread(dataset: Dataset, most: int) -> Dataset:
    """At most so many of the samples, evenly over all of them."""
    number = min(len(dataset), most)
    return dataset.subset(np.linspace(0, len(dataset) - 1, number).astype(np.int64))
