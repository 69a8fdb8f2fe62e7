"""What layers cost as functions of their zeros, for budgets: operations, bit operations, bytes, seconds.

Per layer of n weights, z of them zero:

- ``flops``: floating-point operations per sample, 2 per multiply-accumulate, times the density ``1 - z / n``.
- ``bops``: multiply-accumulates times bits of a weight times bits of an activation times the density; 8 x 8 bits where
  the run quantizes, else 32 x 32.
- ``size``: bytes as packed: a bit mask of ``ceil(n / 8)`` bytes and the kept weights, or all weights where that is
  smaller; a weight takes 1 byte in INT8 (and every output channel 4 for its scale), else what it takes in the model.
- ``latency``: seconds, measured (:mod:`pot_sparsity.pipeline.allocation.timings`).
- ``sparsity``: kept weights.

The dense model that budgets refer to is the one that came in: no zeros, not quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pot_sparsity.algorithms.allocation.budgets import CostTable, add_costs
from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.layers import Layer, flops
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.recipe import Recipe

#: Units of the kinds of cost.
UNITS = {
    "sparsity": "weights",
    "flops": "FLOPs",
    "bops": "bit operations",
    "size": "bytes",
    "latency": "seconds",
}
_FLOAT_BITS, _INT8_BITS = 32, 8
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """Costs of all layers that take part.

    Attributes
    ----------
    tables
        By kind and layer.
    dense
        By kind, what the dense model costs: what fractions refer to.
    fixed
        By kind, what no zero changes (the time of all other operators); 0 where missing.
    """

    tables: Mapping[str, Mapping[str, CostTable]]
    dense: Mapping[str, float]
    fixed: Mapping[str, float] = field(default_factory=dict)

    def total(self, kind: str, zeros: Mapping[str, int]) -> float:
        """What the model costs with these zeros of each layer."""
        layers = self.tables[kind]
        return self.fixed.get(kind, 0.0) + sum(layers[name].cost(count) for name, count in zeros.items())

    def fraction(self, kind: str, zeros: Mapping[str, int]) -> float:
        """What remains of the dense model's cost."""
        return self.total(kind, zeros) / self.dense[kind] if self.dense[kind] else 0.0

    def limit(self, kind: str, bound: float) -> float:
        """What the layers together may cost under a budget: the fraction that may remain, or the least sparsity."""
        if kind == "sparsity":
            return self.dense[kind] - round(bound * self.dense[kind])
        return bound * self.dense[kind] - self.fixed.get(kind, 0.0)

    def of_layer(self, name: str) -> dict[str, CostTable]:
        """The tables of one layer by kind."""
        return {kind: layers[name] for kind, layers in self.tables.items()}


def build_costs(
    model: Model,
    dense: Sequence[DenseLayer],
    recipe: Recipe,
    kinds: Collection[str],
    *,
    latency: Costs | None = None,
) -> Costs:
    """Costs of these kinds.

    Parameters
    ----------
    model
        The prepared dense model.
    dense
        The layers that take part.
    kinds
        Names in :data:`UNITS`.
    latency
        Costs of the kind ``latency``, where it is wanted.

    Raises
    ------
    RecipeError
        FLOPs of a layer that depend on a dimension the model leaves open.
    """
    int8 = recipe.quantization.enabled
    tables: dict[str, Mapping[str, CostTable]] = {}
    totals: dict[str, float] = {}
    for kind in (kind for kind in kinds if kind != "latency"):
        found: dict[str, CostTable] = {}
        whole = 0.0
        for item in dense:
            found[item.layer.name], full = _layer_table(kind, model, item.layer, int8=int8)
            whole += full
        tables[kind], totals[kind] = found, whole
    if latency is None or "latency" not in kinds:
        return Costs(tables, totals)
    return Costs({**tables, **latency.tables}, {**totals, **latency.dense}, latency.fixed)


def with_costs(curves: Mapping[str, Curve], costs: Costs) -> dict[str, Curve]:
    """The curves with all kinds of cost of their layers, beside the kept weights they have."""
    return {name: add_costs(curve, costs.of_layer(name)) for name, curve in curves.items()}


def _layer_table(kind: str, model: Model, layer: Layer, *, int8: bool) -> tuple[CostTable, float]:
    """A layer's table, and what it costs in the dense model."""
    if kind == "sparsity":
        return _straight(layer.size, float(layer.size)), float(layer.size)
    if kind == "size":
        return _packed(model, layer, int8=int8)
    operations = flops(layer, model.graph)
    if operations is None:
        raise RecipeError(
            f"a budget of {kind} needs the FLOPs of layer {layer.name!r}, which depend on a dimension that the model "
            "leaves open: fix the model's input shape, or set a budget of sparsity or size"
        )
    if kind == "flops":
        return _straight(layer.size, float(operations)), float(operations)
    products = operations / 2.0
    bits = _INT8_BITS if int8 else _FLOAT_BITS
    return _straight(layer.size, products * bits**2), products * _FLOAT_BITS**2


def _straight(size: int, full: float) -> CostTable:
    return CostTable(np.array([0.0, float(size)]), np.array([full, 0.0]))


def _packed(model: Model, layer: Layer, *, int8: bool) -> tuple[CostTable, float]:
    stored = float(model.graph.value(layer.constant).dtype.itemsize)
    width = 1.0 if int8 else stored
    scales = float(_SCALE_BYTES * layer.channels) if int8 else 0.0
    size, mask = float(layer.size), float(-(-layer.size // 8))
    plain, masked_from = size * width + scales, mask / width
    if masked_from >= size:  # not even a mask alone is smaller
        return CostTable(np.array([0.0]), np.array([plain])), size * stored
    return (
        CostTable(np.array([0.0, masked_from, size]), np.array([plain, plain, mask + scales])),
        size * stored,
    )
