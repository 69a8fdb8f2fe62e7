"""What all engines do around one inference: check and cast the feeds, split batches that are too large.

Many exports have the batch fixed to one. A feed with more samples than a fixed leading dimension is cut into
chunks, the last one filled up by repeating its last sample, and the outputs are joined again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.errors import DataError
from pot_sparsity.graph.graph import TensorInfo

#: One inference: arrays in the order of the compiled model's inputs to arrays in the order of its outputs.
Infer = Callable[[Sequence[AnyArray]], Sequence[AnyArray]]
_MESSAGE_LIMIT = 400


def reason(error: BaseException) -> str:
    """The message of an engine's exception in one line, without source positions."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("Exception from")]
    text = " ".join(kept) or type(error).__name__
    return text if len(text) <= _MESSAGE_LIMIT else f"{text[:_MESSAGE_LIMIT]}..."


@dataclass(frozen=True)
class BatchedExecutable:
    """A compiled model that takes any number of samples, even if its own batch is fixed.

    Attributes
    ----------
    ports
        The model's inputs under their graph names, with the shapes and types the *compiled* model declares.
    outputs
        Graph tensor names of the outputs.
    infer
        Runs the compiled model once; the arrays it returns are not reused by it.
    """

    ports: tuple[TensorInfo, ...]
    outputs: tuple[str, ...]
    infer: Infer

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph tensor names it must be fed with."""
        return tuple(port.name for port in self.ports)

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Outputs for the samples in ``feeds``; entries that the model does not read are ignored.

        If the batch had to be split, the outputs of the chunks are joined along axis 0, whatever that axis
        means (scalars are stacked). Rows that stem from filling up the last chunk are dropped where an
        output's leading dimension is a multiple of the fixed batch, and stay where it is not.

        Raises
        ------
        DataError
            An input is missing or has the wrong type or shape, or the engine fails.
        """
        for port in self.ports:
            if port.name not in feeds:
                raise DataError(f"input {port.name!r} is missing: the model reads {', '.join(self.inputs)}")
        arrays = [_cast(np.asarray(feeds[port.name]), port) for port in self.ports]
        chunks = self._chunks(arrays)
        if chunks is None:
            return dict(zip(self.outputs, self._call(arrays), strict=True))
        parts: list[list[AnyArray]] = [[] for _ in self.outputs]
        for index in range(chunks):
            pieces, padding = self._piece(arrays, index)
            for part, result in zip(parts, self._call(pieces), strict=True):
                part.append(_without_padding(result, *padding))
        return {name: _join(name, part) for name, part in zip(self.outputs, parts, strict=True)}

    def _call(self, arrays: Sequence[AnyArray]) -> Sequence[AnyArray]:
        try:
            return self.infer(arrays)
        except Exception as error:  # engines raise bare Exceptions of their own
            raise DataError(f"the model cannot be run on these data: {reason(error)}") from error

    def _chunks(self, arrays: Sequence[AnyArray]) -> int | None:
        """Number of inferences that the feeds need; None if they fit as they are."""
        needed: dict[str, int] = {}
        for port, array in zip(self.ports, arrays, strict=True):
            shape = port.shape
            if shape is None:
                continue
            if len(shape) != array.ndim or any(
                size not in (None, found) for size, found in zip(shape[1:], array.shape[1:], strict=True)
            ):
                raise DataError(_mismatch(port, array))
            if shape and shape[0] is not None:
                if array.shape[0] == 0 or shape[0] == 0:
                    raise DataError(_mismatch(port, array))
                needed[port.name] = -(-array.shape[0] // shape[0])
        if all(
            port.shape is None or not port.shape or port.shape[0] in (None, array.shape[0])
            for port, array in zip(self.ports, arrays, strict=True)
        ):
            return None
        counts = set(needed.values())
        if len(needed) < len(arrays) or len(counts) > 1:
            port, array = next(
                (port, array)
                for port, array in zip(self.ports, arrays, strict=True)
                if port.name in needed and port.shape and port.shape[0] != array.shape[0]
            )
            raise DataError(f"{_mismatch(port, array)}; the inputs' batches do not fit together")
        return counts.pop()

    def _piece(self, arrays: Sequence[AnyArray], index: int) -> tuple[list[AnyArray], tuple[int, int]]:
        """The feeds of one chunk, and how many of how many samples fill it up."""
        pieces = []
        padding = (0, 1)
        for port, array in zip(self.ports, arrays, strict=True):
            size = (port.shape or (1,))[0] or 1
            piece = array[index * size : (index + 1) * size]
            missing = size - len(piece)
            if missing:
                piece = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)])
                padding = (missing, size)
            pieces.append(piece)
        return pieces, padding


def _mismatch(port: TensorInfo, array: AnyArray) -> str:
    expected = ",".join("?" if size is None else str(size) for size in port.shape or ())
    found = ",".join(str(size) for size in array.shape)
    return f"input {port.name!r} expects shape [{expected}] and got [{found}]"


def _cast(array: AnyArray, port: TensorInfo) -> AnyArray:
    """The feed in the type the model reads, where that loses nothing but floating-point precision."""
    wanted = port.dtype
    if wanted is None or array.dtype == wanted:
        return array
    floating = wanted.kind not in "iub"
    if floating and (array.dtype.kind in "iubf" or array.dtype.name == "bfloat16"):
        return array.astype(wanted)
    if not floating and array.dtype.kind in "iub":
        result = array.astype(wanted)
        if np.array_equal(result, array):
            return result
        raise DataError(f"input {port.name!r} expects {wanted} and got {array.dtype} values that do not fit")
    raise DataError(f"input {port.name!r} expects {wanted} and got {array.dtype}")


def _without_padding(result: AnyArray, missing: int, batch: int) -> AnyArray:
    if not missing or result.ndim == 0 or len(result) % batch:
        return result
    return result[: len(result) // batch * (batch - missing)]


def _join(name: str, parts: Sequence[AnyArray]) -> AnyArray:
    if parts[0].ndim == 0:
        return np.stack(parts)
    try:
        return np.concatenate(parts, axis=0)
    except ValueError as error:
        shapes = ", ".join(str(part.shape) for part in parts[:3])
        raise DataError(
            f"output {name!r} of a model with a fixed batch changes its shape between samples ({shapes}): "
            "feed one batch at a time"
        ) from error
