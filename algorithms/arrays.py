"""Array types shared by the numeric kernels: what every layer looks like once the model format is gone.

A layer's weight is a stack of matrices ``W [groups, rows, cols]``; its input, unfolded, is ``X [groups, cols,
samples]``. Everything a solver needs to know of ``X`` stands in its :class:`Moments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float64: TypeAlias = NDArray[np.float64]
Float32: TypeAlias = NDArray[np.float32]
Bool: TypeAlias = NDArray[np.bool_]
AnyArray: TypeAlias = NDArray[Any]
#: Variance relative to the second moment below which an input does not vary but for rounding.
CONSTANT = 1e-7
PadMode: TypeAlias = Literal["explicit", "same_upper", "same_lower", "valid"]


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution (1-D, 2-D, 3-D, possibly transposed) reads its input.

    Columns of the weight matrix are ordered (input channel within its group, kernel position in C order).

    Attributes
    ----------
    kernel, strides, dilations, pads_begin, pads_end
        One entry per spatial dimension.
    groups
        Number of groups; input channels of group g are the g-th consecutive slice of the channel axis (axis 1).
    pad_mode
        ``explicit`` uses the pads given; ``same_upper``/``same_lower`` compute them from the input's size
        (the odd element goes to the end / the beginning); ``valid`` is no padding.
    transposed
        True for ConvTranspose / ConvolutionBackpropData / GroupConvolutionBackpropData.
    output_padding
        Transposed only: extra size added at the end of each spatial dimension of the output.
    output_size
        Transposed only: the requested spatial output size, where the model fixes it (pads then follow from it,
        see the ONNX ConvTranspose specification); None otherwise.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: tuple[int, ...]
    pads_end: tuple[int, ...]
    groups: int = 1
    pad_mode: PadMode = "explicit"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    output_size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MatMulGeometry:
    """How a MatMul/Gemm with a constant operand reads its input.

    Attributes
    ----------
    feature_axis
        Axis of the activation tensor that is contracted: -1 or -2.
    groups
        1 for a 2-D constant; B for a stack ``[B, in, out]`` of constants multiplied with ``[..., B, m, in]``
        activations (then axis -3 of the activation is the group axis).
    """

    feature_axis: int = -1
    groups: int = 1


Geometry: TypeAlias = ConvGeometry | MatMulGeometry


@dataclass(frozen=True)
class Pattern:
    """Where zeros may stand: ``unstructured``, ``n:m`` (n weights kept of every m) or ``block:c``.

    Groups of m (or blocks of c) run along ``cols`` of the weight matrix in steps of ``stride`` columns, so that a
    convolution's groups can run over input channels at one kernel position (stride = kernel area).
    """

    kind: Literal["unstructured", "n:m", "block"] = "unstructured"
    n: int = 0
    m: int = 0
    stride: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``unstructured``, ``2:4`` or ``block:4``; raises ValueError with what is allowed otherwise."""
        if text == "unstructured":
            return cls()
        head, _, tail = text.partition(":")
        if head == "block" and tail.isdecimal() and int(tail) >= 2:
            return cls("block", m=int(tail))
        if head.isdecimal() and tail.isdecimal() and 0 < int(head) < int(tail):
            return cls("n:m", n=int(head), m=int(tail))
        raise ValueError(
            f"pattern {text!r} is not known: use 'unstructured', 'n:m' with 0 < n < m (e.g. '2:4') or 'block:c' "
            "with c >= 2 (e.g. 'block:4')"
        )

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"block:{self.m}" if self.kind == "block" else "unstructured"


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of a layer's unfolded input ``X [groups, cols, samples]``.

    Attributes
    ----------
    count
        Number of columns of X seen (positions x samples); the weight of these moments when merging.
    mean
        ``E[x]``, float64 ``[groups, cols]``.
    second
        ``E[x x^T]``, float64 ``[groups, cols, cols]``, symmetric, *not* centred.
    """

    count: float
    mean: Float64
    second: Float64

    @property
    def centred(self) -> Float64:
        """Covariance ``E[x x^T] - E[x] E[x]^T``: the H of a layer whose bias is free.

        An input whose variance is below the rounding of float32 products (1e-7 of its second moment) is
        constant: its row and column are exactly 0.
        """
        covariance = self.second - self.mean[:, :, None] * self.mean[:, None, :]
        power = np.einsum("gcc->gc", self.second)
        constant = np.einsum("gcc->gc", covariance) <= CONSTANT * power
        return np.where(constant[:, :, None] | constant[:, None, :], 0.0, covariance)

    @property
    def with_one(self) -> Float64:
        """Second moment of ``[x; 1]``, ``[groups, cols + 1, cols + 1]``: the constant-one row solves the bias."""
        groups, cols = self.mean.shape
        full = np.empty((groups, cols + 1, cols + 1))
        full[:, :cols, :cols] = self.second
        full[:, cols, :cols] = full[:, :cols, cols] = self.mean
        full[:, cols, cols] = 1.0
        return full

    @classmethod
    def merge(cls, parts: Sequence[Moments]) -> Moments:
        """Moments of the union of the samples behind ``parts`` (any order, any grouping, up to rounding)."""
        if not parts:
            raise ValueError("nothing to merge: no moments given")
        count = float(sum(p.count for p in parts))
        if count <= 0:
            raise ValueError("cannot merge moments of zero samples")
        mean = sum((p.mean * (p.count / count) for p in parts), np.zeros_like(parts[0].mean))
        second = sum((p.second * (p.count / count) for p in parts), np.zeros_like(parts[0].second))
        return cls(count, np.asarray(mean), np.asarray(second))


@dataclass(frozen=True)
class PruningResult:
    """What a layer solver returns.

    Attributes
    ----------
    weight
        float64 ``[groups, rows, cols]``; pruned entries are exactly 0.0.
    mask
        True where a weight is kept.
    error
        ``sum_g tr((W - W*) H (W - W*)^T)`` on the *undamped* H.
    relative_error
        ``error / sum_g tr(W* H W*^T)`` (0 where the denominator is 0).
    damping
        Relative damping that was needed (0.0 when none): multiple of mean(diag H) added to the diagonal.
    """

    weight: Float64
    mask: Bool
    error: float
    relative_error: float
    damping: float = 0.0
