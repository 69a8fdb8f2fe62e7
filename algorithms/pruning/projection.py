"""Projections onto a pattern: which weights to keep, given how much each is worth.

Scores are ``[groups, rows, cols]``, non-negative; a score of -1 says "prune this first, it is free".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pot_sparsity.algorithms.arrays import Bool, Pattern

Scores = NDArray[np.floating]
Index = NDArray[np.intp]


def top_k_mask(scores: Scores, zeros: int) -> Bool:
    """Keep all but the ``zeros`` lowest scores of the whole array; among equals the first in memory go first.

    Parameters
    ----------
    scores
        Any shape, no NaN.
    zeros
        Between 0 and the number of scores.

    Returns
    -------
    Bool
        True where kept, the shape of ``scores``, exactly ``zeros`` entries False.
    """
    if zeros == 0:
        return np.ones(scores.shape, np.bool_)
    flat = scores.ravel()
    threshold = np.partition(flat, zeros - 1)[zeros - 1]
    kept: Bool = flat > threshold
    surplus = flat.size - int(np.count_nonzero(kept)) - zeros
    if surplus:
        kept[np.flatnonzero(flat == threshold)[-surplus:]] = True
    return kept.reshape(scores.shape)


def pattern_index(cols: int, size: int, stride: int) -> Index:
    """Column indices of each group (or block) of ``size``, ``[count, size]``; ``cols`` stands for "no
    column".

    Columns are ordered (input channel, kernel position) with ``stride`` positions; a group takes ``size``
    consecutive channels at one position. The last group of a position is filled up with ``cols``.

    Raises
    ------
    ValueError
        Where ``stride`` does not divide ``cols``.
    """
    if stride < 1 or cols % stride:
        raise ValueError(f"the pattern's stride {stride} does not divide the layer's {cols} columns")
    channels = cols // stride
    count = -(-channels // size)
    channel = np.arange(count * size).reshape(count, size)
    index = channel[:, None, :] * stride + np.arange(stride)[None, :, None]
    padded = np.where(channel[:, None, :] < channels, index, cols)
    return np.ascontiguousarray(padded.reshape(count * stride, size))


def block_count(zeros: int, weights: int, blocks: int) -> int:
    """Nearest number of blocks to prune for ``zeros`` of ``weights`` weights (0 for 0, all for all)."""
    return int(np.floor(zeros / weights * blocks + 0.5))


def pattern_mask(scores: Scores, zeros: int, pattern: Pattern) -> Bool:
    """Keep what is worth most under a pattern.

    ``unstructured`` prunes exactly ``zeros``. ``n:m`` keeps the n best of every m and ignores ``zeros``; the
    last, shorter group keeps at most n. ``block:c`` prunes the blocks of lowest mean score, as many as come
    nearest to ``zeros``.

    Returns
    -------
    Bool
        True where kept, ``[groups, rows, cols]``.
    """
    if pattern.kind == "unstructured":
        return top_k_mask(scores, zeros)
    cols = scores.shape[-1]
    index = pattern_index(cols, pattern.m, pattern.stride)
    grouped = _gather(scores, index, pattern.kind)
    kept = np.zeros((*scores.shape[:-1], cols + 1), np.bool_)
    if pattern.kind == "n:m":
        best = np.argsort(-grouped, axis=-1, kind="stable")[..., : pattern.n]
        chosen = np.zeros(grouped.shape, np.bool_)
        np.put_along_axis(chosen, best, True, axis=-1)
    else:
        size = np.count_nonzero(index < cols, axis=1)
        mean = grouped.sum(axis=-1) / size
        blocks = top_k_mask(mean, block_count(zeros, scores.size, mean.size))
        chosen = np.broadcast_to(blocks[..., None], grouped.shape)
    kept[..., index] = chosen
    return kept[..., :cols]


def _gather(scores: Scores, index: Index, kind: str) -> Scores:
    """Scores by group ``[groups, rows, count, size]``; missing columns lose (n:m) or add 0 (block)."""
    fill = -np.inf if kind == "n:m" else 0.0
    missing = np.full((*scores.shape[:-1], 1), fill, scores.dtype)
    real = scores if kind == "n:m" else np.maximum(scores, 0.0)
    return np.concatenate([real, missing], axis=-1)[..., index]
