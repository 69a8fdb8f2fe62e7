"""One inference sweep over the calibration data that collects the moments of every layer's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray, Moments
from pot_sparsity.algorithms.moments import MomentsAccumulator
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.errors import DataError, ModelError
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.evaluate import feeds
from pot_sparsity.pipeline.progress import Progress, track

#: Bytes of tapped tensors that one batch may hold.
TAP_BUDGET = 384 * 2**20


def fitting_batch(model: Model, executable: Executable, dataset: Dataset, wanted: int) -> int:
    """Largest batch up to ``wanted`` whose outputs stay within the tap budget (measured on one sample)."""
    if model.batch_size is not None:
        return model.batch_size
    probe = next(iter(dataset.batches(1)))
    tapped = sum(value.nbytes for value in executable.run(feeds(model, executable, probe)).values())
    return max(1, min(wanted, TAP_BUDGET // max(1, tapped)))


def collect_moments(
    model: Model,
    layers: Sequence[Layer],
    engine: Engine,
    dataset: Dataset,
    *,
    batch_size: int,
    threads: int,
    max_positions: int | None,
    progress: Progress,
) -> dict[str, Moments]:
    """Moments of each layer's unfolded input (over all its places), by layer name.

    Memory is one batch of tapped tensors plus the moments themselves, whatever the number of samples. Layers are
    worked on in parallel with one BLAS thread each, so the result does not depend on ``threads``.

    Raises
    ------
    DataError
        No samples; or the model yields NaN or infinite activations on them.
    """
    taps = tuple(dict.fromkeys(place.input for layer in layers for place in layer.places))
    executable = engine.compile(model.extract(outputs=taps))
    accumulators = {
        (layer.name, place.node): MomentsAccumulator(place.geometry, max_positions=max_positions)
        for layer in layers
        for place in layer.places
    }
    size = fitting_batch(model, executable, dataset, batch_size)
    work = sorted(
        ((layer, place) for layer in layers for place in layer.places),
        key=lambda item: -item[0].cols * item[0].cols * item[0].groups,
    )

    def update(name: str, node: str, tensor: AnyArray) -> None:
        try:
            accumulators[name, node].update(tensor)
        except ValueError as error:
            raise DataError(f"calibration of layer {name!r} failed: {error}") from error

    total = -(-len(dataset) // size)
    with threadpool_limits(1), Parallel(n_jobs=threads, backend="threading") as pool:
        for batch in track(dataset.batches(size), progress, "Collecting moments", total):
            if model.batch_size is not None and batch.size < size:
                break
            values = executable.run(feeds(model, executable, batch))
            pool(delayed(update)(layer.name, place.node, values[place.input]) for layer, place in work)
    return {layer.name: _result(layer, accumulators) for layer in layers}


def _result(layer: Layer, accumulators: Mapping[tuple[str, str], MomentsAccumulator]) -> Moments:
    parts = [accumulators[layer.name, place.node] for place in layer.places]
    if not any(part.count for part in parts):
        raise ModelError(f"layer {layer.name!r} saw no calibration sample: give at least one full batch")
    try:
        return Moments.merge([part.result() for part in parts if part.count])
    except ValueError as error:
        raise DataError(f"calibration of layer {layer.name!r} failed: {error}") from error
