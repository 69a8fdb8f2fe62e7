"""A second walk through the finished sparse model: each layer fitted to what the activation behind it lets through.

The dense model and the candidates advance side by side over the samples that fit, stage by stage, as in
:mod:`pot_sparsity.pipeline.repair.sequential`. Of each layer a fixed number of positions is kept, drawn evenly over the
samples: fits that follow the activation need the samples themselves, not only their moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray, ConvGeometry, Float32
from pot_sparsity.algorithms.finish import Positions, fit_rectified
from pot_sparsity.algorithms.patches import unfold
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.layers import Layer, Place
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.progress import Progress
from pot_sparsity.pipeline.repair.sides import Side, fill_spools
from pot_sparsity.pipeline.repair.stages import StagePlan, plan_stages
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply
from pot_sparsity.pipeline.spool import Spool

#: Numbers that the inputs of one layer's positions may hold (128 MiB).
POSITION_BUDGET = 2**25
#: Products with H that cost more multiplications than this (the rows of all groups times the columns squared) make a
#: fit of minutes: such layers are left as they are.
WIDEST = 5e8


@dataclass(frozen=True)
class Behind:
    """What stands behind a layer: a residual branch that is added, and where the activation is flat."""

    skip: str | None = None
    low: float = -np.inf
    high: float = np.inf


def behind(graph: Graph, place: Place) -> Behind:
    """Look from a layer's output through one Add to a ReLU or a Clip; whatever else reads it ends the view."""
    reader = _only_reader(graph, place.output)
    skip = None
    if reader is not None and reader.op == "Add":
        others = [tensor for tensor in reader.inputs if tensor != place.output]
        if (
            len(others) != 1
            or graph.is_constant(others[0])
            or not _same_shape(graph, place.output, others[0])
        ):
            return Behind()
        skip = others[0]
        reader = _only_reader(graph, reader.output)
    low, high = _flat(graph, reader)
    return Behind(skip, low, high)


def _only_reader(graph: Graph, tensor: str) -> Node | None:
    readers = graph.consumers(tensor)
    return readers[0][0] if len(readers) == 1 else None


def _same_shape(graph: Graph, one: str, other: str) -> bool:
    shapes = graph.tensor(one).shape, graph.tensor(other).shape
    return shapes[0] is not None and shapes[0] == shapes[1]


def _flat(graph: Graph, node: Node | None) -> tuple[float, float]:
    if node is not None and node.op == "Relu":
        return 0.0, np.inf
    if node is not None and node.op == "Clamp":
        return float(str(node.attrs["min"])), float(str(node.attrs["max"]))
    if node is not None and node.op == "Clip":
        bounds = [-np.inf, np.inf]
        for index, tensor in enumerate(node.inputs[1:3]):
            if not tensor:
                continue
            if not graph.is_constant(tensor):
                return -np.inf, np.inf
            bounds[index] = float(graph.value(tensor))
        return bounds[0], bounds[1]
    return -np.inf, np.inf


@dataclass
class Candidate:
    """One sparse model on its second walk; ``slack`` is that of :func:`fit_rectified`."""

    slack: float
    model: Model
    solutions: dict[str, Solution]


@dataclass
class _Drawn:
    """Positions of one layer in one model, batch by batch."""

    inputs: list[Float32] = field(default_factory=list)
    target: list[Float32] = field(default_factory=list)
    skip: list[Float32] = field(default_factory=list)


def fit_behind(
    dense_model: Model,
    candidates: Sequence[Candidate],
    dense: Sequence[DenseLayer],
    fit: Dataset,
    engine: Engine,
    *,
    batch_size: int,
    positions: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> None:
    """Refit every layer that has one place and a bias, in topological order; rewrites the candidates.

    Parameters
    ----------
    dense_model
        The prepared model; the candidates' models have the same structure.
    dense
        The dense layers that take part.
    fit
        Samples to fit to; none that judge.
    positions
        Positions kept of a layer, at most.
    """
    layers = [item.layer for item in dense if _suits(item)]
    if not layers:
        return
    size = dense_model.batch_size or batch_size
    views = {layer.name: behind(dense_model.graph, layer.places[0]) for layer in layers}
    progress.start("Fitting layers behind their activations", len(layers))
    with ExitStack() as stack:
        stack.callback(progress.finish)
        sides = [Side(model, engine) for model in (dense_model, *(c.model for c in candidates))]
        for side in sides:
            stack.callback(side.close)
        fill_spools(sides, fit, None, size)
        for plan in plan_stages(dense_model.graph, layers):
            drawn = _advance(plan, sides, views, positions, seed)
            with threadpool_limits(1), Parallel(n_jobs=threads, backend="threading") as pool:
                found = pool(
                    delayed(_refit)(candidates[index], layer, views[layer.name], drawn[index, layer.name])
                    for layer, _ in plan.layers
                    for index in range(len(candidates))
                )
            for candidate, layer, solution in found:
                candidate.solutions[layer.name] = solution
                apply(candidate.model, layer, solution)
            progress.advance(len(plan.layers))


def _suits(item: DenseLayer) -> bool:
    """One place, a bias, one group of a matrix product or any convolution, not too wide."""
    grouped = not isinstance(item.layer.places[0].geometry, ConvGeometry) and item.layer.groups > 1
    wide = item.layer.size * item.layer.cols > WIDEST
    return not item.layer.shared and item.biases[0] is not None and not grouped and not wide


def _advance(
    plan: StagePlan, sides: Sequence[Side], views: Mapping[str, Behind], positions: int, seed: int
) -> dict[tuple[int, str], _Drawn]:
    """Run all models, the dense one first, over one cut and draw positions of the stage's layers."""
    reference, *others = sides
    dense_run = reference.prepare(plan.dense)
    runs = [side.prepare(plan.sparse) for side in others]
    upcoming = [Spool() for _ in sides]
    drawn: dict[tuple[int, str], _Drawn] = {}
    turns = len(reference.spool)
    for turn in range(turns):
        # A residual branch that ends here is no longer alive behind the cut.
        known = reference.spool.read(turn)
        known |= reference.step(plan.dense, dense_run, turn, upcoming[0])
        for index, side in enumerate(others):
            xs = side.step(plan.sparse, runs[index], turn, upcoming[index + 1])
            for number, (layer, place) in enumerate(plan.layers):
                random = np.random.default_rng((seed, turn, number))
                pool = drawn.setdefault((index, layer.name), _Drawn())
                share = max(1, _limit(layer, positions) // turns)
                _draw(pool, layer, place, views[layer.name], known, xs, share, random)
    for side, spool in zip(sides, upcoming, strict=True):
        side.close()
        side.spool = spool
    return drawn


def _limit(layer: Layer, positions: int) -> int:
    return min(positions, POSITION_BUDGET // (layer.groups * (layer.cols + 1)))


def _draw(
    pool: _Drawn,
    layer: Layer,
    place: Place,
    view: Behind,
    dense: Mapping[str, AnyArray],
    sparse: Mapping[str, AnyArray],
    share: int,
    random: np.random.Generator,
) -> None:
    """Add some positions of one batch: all groups of a layer share them."""
    inputs = _unfolded(sparse[place.input], layer, place)
    count = inputs.shape[-1]
    picked = np.sort(random.choice(count, share, replace=False)) if count > share else np.arange(count)
    target = _channels(dense[place.output], layer, place, picked)
    if view.skip is not None and view.skip in dense and view.skip in sparse:
        target += _channels(dense[view.skip], layer, place, picked)
        pool.skip.append(_channels(sparse[view.skip], layer, place, picked))
    one = np.ones((layer.groups, 1, len(picked)), np.float32)
    pool.inputs.append(np.concatenate([inputs[..., picked], one], axis=1))
    pool.target.append(target)


def _unfolded(x: AnyArray, layer: Layer, place: Place) -> Float32:
    if isinstance(place.geometry, ConvGeometry):
        return np.asarray(unfold(x, place.geometry), dtype=np.float32)
    moved = np.moveaxis(x, place.geometry.feature_axis, 0)
    return np.asarray(moved.reshape(1, layer.cols, -1), dtype=np.float32)


def _channels(y: AnyArray, layer: Layer, place: Place, picked: NDArray[np.intp]) -> Float32:
    """Picked positions of an output as float32 ``[groups, rows, positions]``."""
    flat = np.moveaxis(y, place.channel_axis, 0).reshape(layer.groups, layer.rows, -1)
    return flat[..., picked].astype(np.float32)


def _refit(
    candidate: Candidate, layer: Layer, view: Behind, drawn: _Drawn
) -> tuple[Candidate, Layer, Solution]:
    start = candidate.solutions[layer.name]
    reached = view.skip is None or bool(drawn.skip)
    positions = Positions(
        np.concatenate(drawn.inputs, axis=-1),
        np.concatenate(drawn.target, axis=-1),
        np.concatenate(drawn.skip, axis=-1) if drawn.skip else None,
        view.low if reached else -np.inf,
        view.high if reached else np.inf,
    )
    bias = start.biases[0]
    assert bias is not None
    weight, bias = fit_rectified(start.weight, bias, positions, slack=candidate.slack)
    return candidate, layer, replace(start, weight=weight, biases=(bias,))
