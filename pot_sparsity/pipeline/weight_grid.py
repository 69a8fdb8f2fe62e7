"""Weights of a quantized model placed again on the grid NNCF chose, so that each layer's output moves least.

NNCF rounds every weight to the nearest point. Here the scales are read from the quantized model, the weights it
was made from are read from the sparse model, and the integers are solved for together on the moments of the
layer's input. What NNCF corrected in a bias stays; only what the new integers change is made up for.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import Float64, Moments
from pot_sparsity.algorithms.pruning.problem import layer_error
from pot_sparsity.algorithms.quantization.descent import descend
from pot_sparsity.algorithms.quantization.gptq import round_columns
from pot_sparsity.algorithms.quantization.grid import Grid, Integers
from pot_sparsity.algorithms.quantization.problem import (
    DEFAULT_OPTIONS,
    GridProblem,
    QuantizedResult,
    QuantizerOptions,
)
from pot_sparsity.algorithms.quantization.registry import QUANTIZERS
from pot_sparsity.errors import PotSparsityError
from pot_sparsity.graph.chains import chain_of, constant_value, evaluate
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.graph import Graph
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_bias, read_weight, to_matrix, write_bias, write_weight
from pot_sparsity.pipeline.solve import SCARCE, shrunk

#: A weight further than this many steps from what NNCF was given was changed by more than rounding.
_ROUNDING = 0.55
#: Added to the diagonal of H, relative to its mean, where samples are scarce.
_RIDGE = 0.01
#: Multiplications that factors of single rows may take; beyond that 8 bits start from NNCF's own integers, and
#: fewer bits do without the greedy order.
_FACTOR_BUDGET = 1e11
#: Sweeps of the descent in that case.
_WIDE_SWEEPS = 10
#: Coarser grids inside INT8 start at this share of the widest one.
_NARROWEST = 0.3
_QUANTIZERS = frozenset({"FakeQuantize", "QuantizeLinear", "DequantizeLinear", "Identity", "Convert"})


@dataclass(frozen=True)
class StoredGrid:
    """Integers of a layer in the quantized model and what they stand for.

    Attributes
    ----------
    integers
        Steps from zero as stored, int32 ``[groups, rows, cols]``.
    scale
        Weight of one step, float64 ``[groups, rows]``.
    limit
        Largest magnitude NNCF uses in this layer (127, or 63 or 64 where it leaves room against overflow).
    """

    integers: Integers
    scale: Float64
    limit: int


@dataclass(frozen=True)
class Placement:
    """What became of one layer: its relative error on its own input before and after, or why it was left."""

    layer: str
    before: float = 0.0
    after: float = 0.0
    left: str = ""


@dataclass(frozen=True)
class _Task:
    layer: Layer
    stored: StoredGrid
    target: Float64
    moments: Moments
    biases: tuple[Float64 | None, ...]


@dataclass(frozen=True)
class _Placed:
    weight: Float64
    biases: tuple[Float64 | None, ...]
    placement: Placement


def place_weights(
    sparse: Model, quantized: Model, moments: Mapping[str, Moments], *, bits: int = 8, threads: int = 1
) -> tuple[Model, list[Placement]]:
    """A copy of the quantized model with its integers solved for, layer by layer, in parallel.

    Parameters
    ----------
    sparse
        The model that was quantized; its zeros stay zeros.
    quantized
        What NNCF made of it, of either format; not changed.
    moments
        Moments of the layers' inputs, by name; other layers stay as NNCF rounded them.
    bits
        Below 8, every weight is limited to ``2^bits`` levels, stored as multiples of the INT8 grid's step.
    threads
        Layers solved side by side; the result does not depend on it.

    Raises
    ------
    PotSparsityError
        A solver failed, or the model did not store exactly what was written.
    """
    result = quantized.copy()
    originals = {layer.name: layer for layer in find_layers(sparse.graph).layers}
    tasks: list[_Task] = []
    placements: dict[str, Placement] = {}
    names = []
    for layer in find_layers(result.graph).layers:
        if layer.name not in originals or layer.name not in moments:
            continue
        names.append(layer.name)
        task = _task(sparse, result, originals[layer.name], layer, moments[layer.name])
        if isinstance(task, _Task):
            tasks.append(task)
        else:
            placements[layer.name] = task
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        placed = list(pool.map(lambda task: _place(task, bits), tasks))
    for task, found in zip(tasks, placed, strict=True):
        _write(result, task, found)
        placements[task.layer.name] = found.placement
    return result, [placements[name] for name in names]


def read_grid(model: Model, layer: Layer) -> StoredGrid | None:
    """Integers and scales of a layer; None where it stores floats, or has no single scale per row."""
    graph = model.graph
    stored = graph.value(layer.constant)
    if not np.issubdtype(stored.dtype, np.integer):
        return None
    chain = chain_of(graph, layer.constant, layer.chain)
    ones = np.ones_like(stored)

    def weight(constant: np.ndarray) -> Float64:
        return to_matrix(layer, evaluate(graph, chain, constant, rounding=False)) * layer.scale

    steps = weight(ones) - weight(ones * 0)
    scale = steps[..., 0]
    if not (np.isfinite(scale) & (scale > 0)).all() or (steps != scale[..., None]).any():
        return None
    integers = np.rint(weight(stored) / scale[..., None]).astype(np.int32)
    return StoredGrid(integers, scale, int(np.abs(integers).max(initial=0)))


def _task(
    sparse: Model, quantized: Model, before: Layer, after: Layer, moments: Moments
) -> _Task | Placement:
    """What is to be solved for one layer, or why it has to be left alone."""
    stored = read_grid(quantized, after)
    if stored is None or stored.limit == 0:
        return Placement(after.name, left="it has no integer weights with a scale per row")
    target = read_weight(sparse, before)
    if target.shape != stored.integers.shape:
        return Placement(after.name, left="its shape has changed")
    factor = input_factor(sparse.graph, quantized.graph, after)
    if factor is not None:
        # NNCF's SmoothQuant: (W / c) (c x) = W x.
        target = target / factor[:, None, :]
        moments = Moments(
            moments.count,
            moments.mean * factor,
            moments.second * factor[:, :, None] * factor[:, None, :],
        )
    distance = np.abs(stored.integers * stored.scale[..., None] - target)
    if (distance > _ROUNDING * stored.scale[..., None]).any():
        return Placement(after.name, left="NNCF changed its weights by more than rounding")
    biases = tuple(read_bias(quantized, after, place) for place in after.places)
    return _Task(after, stored, target, moments, biases)


def input_factor(sparse: Graph, quantized: Graph, layer: Layer) -> Float64 | None:
    """What the quantized model multiplies the layer's input with and the sparse one does not, ``[groups, cols]``.

    None where there is no such operator between the layer and the quantizer of its input.
    """
    tensor = layer.places[0].input
    while (node := quantized.producer(tensor)) is not None:
        if node.op == "Multiply" and node.name not in sparse:
            factors = [constant_value(quantized, name) for name in node.inputs]
            found = [factor for factor in factors if factor is not None]
            inputs = layer.groups * layer.cols
            if len(found) == 1 and found[0].size and inputs % found[0].size == 0 and (found[0] != 0).all():
                spread = np.repeat(found[0].reshape(-1), inputs // found[0].size)
                return spread.reshape(layer.groups, layer.cols)
            return None
        if node.op not in _QUANTIZERS:
            return None
        tensor = node.inputs[0]
    return None


def _place(task: _Task, bits: int) -> _Placed:
    moments, layer = task.moments, task.layer
    second = moments.centred if all(bias is not None for bias in task.biases) else moments.second
    trusted = shrunk(second, _RIDGE) if moments.count < SCARCE * layer.cols else second
    try:
        solved = _solve(GridProblem.of(task.target, trusted), task.stored, bits)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise PotSparsityError(f"layer {layer.name!r}: {error}") from error
    old = task.stored.integers * task.stored.scale[..., None]
    keep = bits == 8 and layer_error(old, task.target, trusted) <= solved.error
    new, biases = old if keep else solved.weight, task.biases
    if not keep:
        moved = np.einsum("grc,gc->gr", old - new, moments.mean)
        biases = tuple(None if bias is None else bias + moved for bias in biases)
    energy = layer_error(np.zeros_like(old), task.target, second)
    before, after = (
        layer_error(weight, task.target, second) / energy if energy > 0 else 0.0 for weight in (old, new)
    )
    return _Placed(new, biases, Placement(layer.name, before, after))


def _solve(problem: GridProblem, stored: StoredGrid, bits: int) -> QuantizedResult:
    """Integers of one layer, by as much work as its size allows."""
    grids, layer = candidates(stored, bits), problem.layer
    kept = problem.mask.sum(axis=-1).astype(np.float64)
    work = kept**3 / 6
    if bits == 8:
        # Rows that keep everything share one factor.
        if work[kept < problem.mask.shape[-1]].sum() > _FACTOR_BUDGET:
            integers, grid = descend(
                problem, stored.integers, grids[0], QuantizerOptions(sweeps=_WIDE_SWEEPS)
            )
            return problem.result(integers, grid, 0.0)
        return QUANTIZERS["gptq_descent"](layer.target, layer.given, grids[0], problem.mask)
    _, grid, _ = round_columns(problem, grids, DEFAULT_OPTIONS)
    method = "best_descent" if work.sum() <= _FACTOR_BUDGET else "gptq_descent"
    return QUANTIZERS[method](layer.target, layer.given, grid, problem.mask)


def candidates(stored: StoredGrid, bits: int) -> list[Grid]:
    """Grids of ``bits`` bits whose points all lie on the stored grid: one for 8, else one per multiple of a step."""
    zero = np.zeros(stored.scale.shape, np.int32)
    if bits == 8:
        return [Grid(stored.scale, zero, -stored.limit, stored.limit)]
    most = 2 ** (bits - 1)
    widest = max(1, stored.limit // most)
    first = max(1, int(np.ceil(_NARROWEST * widest)))
    return [Grid(stored.scale * step, zero, -most, most - 1) for step in range(widest, first - 1, -1)]


def _write(model: Model, task: _Task, placed: _Placed) -> None:
    """Write weight and biases and make sure that the model holds exactly the integers that were solved."""
    wanted = np.rint(placed.weight / task.stored.scale[..., None])
    write_weight(model, task.layer, placed.weight)
    found = read_grid(model, task.layer)
    if found is None or not np.array_equal(found.integers, wanted):
        raise PotSparsityError(
            f"layer {task.layer.name!r}: the model did not store the integers written to it"
        )
    for place, bias in zip(task.layer.places, placed.biases, strict=True):
        if bias is not None:
            write_bias(model, task.layer, place, bias)
