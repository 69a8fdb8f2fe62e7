"""Samples as users hand them over in Python: arrays or mappings, with or without a batch dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.conform import as_array, conform
from pot_sparsity.data.dataset import Batch
from pot_sparsity.data.images import ImageInput, shape_text
from pot_sparsity.data.labels import Labels, as_labels
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import TensorInfo


@dataclass(frozen=True, eq=False)
class SampleReader:
    """Turns one item of a user's iterable into a batch, usually of one sample.

    An item is an array (for a model with one input) or a mapping from input name to array; keys that are no
    input are passed over. An array with as many dimensions as the model's input carries a batch dimension,
    one with one dimension less is a single sample. uint8 pictures ``[H, W, C]`` for an image
    input are preprocessed, everything else is taken as it is.

    Attributes
    ----------
    where
        What the items come from, for messages.
    inputs
        The model's inputs.
    image_input
        How pictures are preprocessed; None where uint8 arrays are not pictures.
    pairs
        Whether a tuple of two (or a list of two arrays) is ``(inputs, label)``; otherwise tuples and lists
        hold the inputs in the model's order.
    """

    where: str
    inputs: tuple[TensorInfo, ...]
    image_input: ImageInput | None
    pairs: bool = True

    def sample(self, item: object, position: int) -> Batch:
        """The item as a batch; DataError that names its position if it does not fit the model."""
        where = f"sample {position} of {self.where}"
        label: object = None
        if self.pairs and _is_tuple(item):
            if len(item) != 2:
                raise DataError(f"{where} is a tuple of {len(item)}: give inputs, or a pair (inputs, label)")
            item, label = item
        arrays: dict[str, AnyArray] = {}
        batched = False
        for info, value in zip(self.inputs, self._values(item, where), strict=True):
            array = as_array(value, f"{where}, input {info.name!r}" if len(self.inputs) > 1 else where)
            arrays[info.name], had_batch = self._array(array, info, where)
            batched = batched or had_batch
        sizes = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"{where} has inputs of different batch sizes {sizes}: give the same for all")
        size = next(iter(sizes.values()))
        labels = None if label is None else _labels(label, size, batched, f"label of {where}")
        return Batch(arrays, labels)

    def join(self, samples: Sequence[Batch], positions: Sequence[int]) -> Batch:
        """Samples one after the other; DataError if their shapes differ or only some have labels."""
        inputs: dict[str, AnyArray] = {}
        for name in samples[0].inputs:
            parts = [sample.inputs[name] for sample in samples]
            self._same_shape(parts, positions, f"input {name!r}")
            inputs[name] = np.concatenate(parts)
        labels = [sample.labels for sample in samples if sample.labels is not None]
        if not labels:
            return Batch(inputs)
        if len(labels) != len(samples):
            raise DataError(
                f"only {len(labels)} of {len(samples)} samples of {self.where} have a label: give all or none"
            )
        self._same_shape(labels, positions, "the label")
        return Batch(inputs, np.concatenate(labels))

    def _values(self, item: object, where: str) -> list[object]:
        names = [info.name for info in self.inputs]
        if isinstance(item, Mapping):
            values = [item.get(name, item.get(i)) for i, name in enumerate(names)]
            absent = [name for name, value in zip(names, values, strict=True) if value is None]
            if absent:
                raise DataError(
                    f"{where} has no key {absent[0]!r} (found: {', '.join(map(str, item))}): give the "
                    f"model's inputs {', '.join(names)}"
                )
            return values
        if not self.pairs and isinstance(item, tuple | list) and len(item) == len(names):
            return list(item)
        if item is None:
            raise DataError(f"{where} is None: give an array or a mapping from input name to array")
        if len(names) != 1:
            raise DataError(
                f"{where} is {type(item).__name__} but the model has inputs {', '.join(names)}: give a "
                "mapping from input name to array"
            )
        return [item]

    def _array(self, array: AnyArray, info: TensorInfo, where: str) -> tuple[AnyArray, bool]:
        """The array with a batch dimension, and whether it came with one."""
        image = self.image_input
        if image is not None and array.dtype == np.uint8:
            pixels = array.astype(np.uint8, copy=False)
            single = pixels.ndim == 3 or (pixels.ndim == 2 and image.channels == 1)
            pictures = image.pictures(pixels[None] if single else pixels, where)
            return image.to_model(image.fit(pictures)), not single
        if info.shape is None:
            return conform(array, info, where), True
        single = array.ndim == len(info.shape) - 1
        return conform(array[None] if single else array, info, where), not single

    def _same_shape(self, parts: Sequence[AnyArray], positions: Sequence[int], what: str) -> None:
        for position, part in zip(positions, parts, strict=True):
            if part.shape[1:] != parts[0].shape[1:]:
                raise DataError(
                    f"{what} of sample {position} of {self.where} is {shape_text(part.shape[1:])}, of sample "
                    f"{positions[0]} {shape_text(parts[0].shape[1:])}: bring all samples to one shape"
                )


def _is_tuple(item: object) -> TypeGuard[Sequence[object]]:
    """Whether the item is a tuple, or a list that stands for one (torch's loaders make lists)."""
    return isinstance(item, tuple) or (
        isinstance(item, list) and len(item) == 2 and not isinstance(item[0], list | tuple | int | float)
    )


def _labels(value: object, size: int, batched: bool, where: str) -> Labels:
    labels = as_labels(value, where)
    if batched and labels.ndim and labels.shape[0] == size:
        return labels
    if size == 1:
        return labels[None]
    raise DataError(
        f"{where} has shape {shape_text(labels.shape)} for {size} samples: give one label per sample"
    )
