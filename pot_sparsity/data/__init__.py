"""Calibration and validation data: image folders, ``.npz`` files and Python objects, in batches."""

from pot_sparsity.data.augment import Augmented
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.data.holdout import filled, split_holdout, spread
from pot_sparsity.data.loading import DataSource, load_dataset
from pot_sparsity.data.preprocess import Preprocess, Resize, load_preprocess

__all__ = [
    "Augmented",
    "Batch",
    "DataSource",
    "Dataset",
    "Preprocess",
    "Resize",
    "filled",
    "load_dataset",
    "load_preprocess",
    "split_holdout",
    "spread",
]
