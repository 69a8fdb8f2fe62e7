"""Checks that arrays are what a model input takes, and the only place where they are cast to its dtype."""

from __future__ import annotations

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.images import shape_text
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import TensorInfo


def as_array(value: object, where: str) -> AnyArray:
    """``value`` as an array of numbers or booleans.

    Raises
    ------
    DataError
        Ragged lists; objects, text, dates or complex numbers.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} is no array ({error}): give numbers of one shape") from None
    if array.dtype.kind not in "biuf":
        kind = array.dtype if array.dtype.kind != "O" else f"object ({type(value).__name__})"
        raise DataError(f"{where} has dtype {kind}: give real numbers (float32, uint8, int64, ...)")
    return array


def conform(array: AnyArray, info: TensorInfo, where: str) -> AnyArray:
    """``array [n, ...]`` in the model input's dtype, checked against its shape but for the leading dimension.

    Raises
    ------
    DataError
        No samples, another shape, a dtype that cannot be cast without loss of meaning, NaN or infinite
        values.
    """
    if array.ndim == 0 or array.shape[0] == 0:
        raise DataError(f"{where} holds no samples (shape {shape_text(array.shape)}): give at least one")
    if info.shape is not None:
        fits = array.ndim == len(info.shape) and all(
            wanted in (None, got) for wanted, got in zip(info.shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            hint = ""
            if array.dtype == np.uint8 and len(info.shape) == 4:
                hint = " (or, for uint8 images, the key 'images')"
            raise DataError(
                f"{where} has shape {shape_text(array.shape)}, model input {info.name!r} takes "
                f"{shape_text((None, *info.shape[1:]))}: give arrays of that shape{hint}"
            )
    if 0 in array.shape:
        raise DataError(
            f"{where} is empty (shape {shape_text(array.shape)}): give at least one value a sample"
        )
    _check_finite(array, where)
    return _cast(array, info, where)


def _check_finite(array: AnyArray, where: str) -> None:
    if array.dtype.kind == "f" and not (np.isfinite(np.min(array)) and np.isfinite(np.max(array))):
        row = int(np.argmin(np.isfinite(array).reshape(array.shape[0], -1).all(axis=1)))
        which = f" in sample {row}" if array.shape[0] > 1 else ""
        raise DataError(f"{where} holds NaN or infinite values{which}: repair or remove it")


def _cast(array: AnyArray, info: TensorInfo, where: str) -> AnyArray:
    dtype = info.dtype
    if dtype is None or array.dtype == dtype:
        return np.ascontiguousarray(array)
    problem = f"{where} has dtype {array.dtype}, model input {info.name!r} takes {dtype}"
    if array.dtype.kind == "f" and dtype.kind != "f":
        raise DataError(f"{problem}: give whole numbers of that dtype")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype.name)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise DataError(
                f"{problem}, which cannot hold its values {array.min()}..{array.max()}: check the array"
            )
    elif dtype.kind == "b" and not np.isin(array, (0, 1)).all():
        raise DataError(f"{problem}: give only 0 and 1")
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype.kind == "f" and array.dtype.kind == "f" and dtype.itemsize < array.dtype.itemsize:
        _check_finite(cast, f"{where} as {dtype}")
    return cast
