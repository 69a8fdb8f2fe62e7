"""A model on its way from cut to cut over the calibration samples; what crosses a cut is kept."""

from __future__ import annotations

from collections.abc import Sequence

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.dataset import Batch, Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.repair.stages import Cut
from pot_sparsity.pipeline.spool import Spool


class Side:
    """One of several models on their way side by side: runs cuts, keeps what crosses them."""

    def __init__(self, model: Model, engine: Engine) -> None:
        self.model = model
        self._engine = engine
        self.spool = Spool()

    def close(self) -> None:
        """Free what is kept."""
        self.spool.close()

    def prepare(self, cut: Cut) -> Executable | None:
        """Compile a partial run; None if it computes nothing."""
        if not cut.outputs and not cut.taps:
            return None
        return self._engine.compile(self.model.extract(outputs=cut.outputs + cut.taps, inputs=cut.inputs))

    def step(
        self, cut: Cut, executable: Executable | None, position: int, upcoming: Spool
    ) -> dict[str, AnyArray]:
        """Advance one batch over a cut; returns all tensors alive behind it, and its taps."""
        before = self.spool.read(position)
        alive: dict[str, AnyArray] = {name: before[name] for name in cut.carried}
        if executable is not None:
            alive |= executable.run({name: before[name] for name in executable.inputs})
        self.spool.drop(position)
        upcoming.append({name: value for name, value in alive.items() if name not in cut.taps})
        return alive


def fill_spools(sides: Sequence[Side], fit: Dataset, held_out: Dataset | None, size: int) -> list[bool]:
    """Put the model's inputs into all spools; returns, batch by batch, whether it belongs to the fit."""
    model = sides[0].model
    roles: list[bool] = []
    for dataset, role in ((fit, True), (held_out, False)):
        if dataset is None:
            continue
        for batch in dataset.batches(size):
            if model.batch_size is not None and batch.size < size:
                break
            inputs = _graph_inputs(model, batch)
            for side in sides:
                side.spool.append(inputs)
            roles.append(role)
    return roles


def _graph_inputs(model: Model, batch: Batch) -> dict[str, AnyArray]:
    return {
        tensor: batch.inputs[name] for tensor, name in zip(model.graph.inputs, model.input_names, strict=True)
    }
