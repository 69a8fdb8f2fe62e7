"""Cutting a graph into stages so that layers can be solved one after the other with one partial pass each.

A stage computes, from the tensors that crossed the previous cut, everything that does not depend on a layer still
to be solved; the layers whose input is then at hand form the stage's group. The sparse model stops in front of the
group (its weights are not known yet), the dense model runs through it (its outputs are the targets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.layers import Layer, Place


@dataclass(frozen=True)
class Cut:
    """One partial run: feed ``inputs`` (kept from the cut before), get ``outputs``; keep ``carried`` as they are.

    ``inputs`` are only those tensors that the partial run reads.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    carried: tuple[str, ...]


@dataclass(frozen=True)
class StagePlan:
    """The layers of one stage and the partial runs of the sparse and the dense model that lead to them."""

    layers: tuple[tuple[Layer, Place], ...]
    sparse: Cut
    dense: Cut


class _Front:
    """Which nodes ran so far, and which tensors that depend on the model's inputs are alive."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.executed: set[str] = set()
        self.computed: set[str] = set(graph.inputs)
        self.alive: tuple[str, ...] = tuple(graph.inputs)
        self._dynamic = _dynamic_tensors(graph)

    def advance(self, blocked: set[str], also_needed: Sequence[str] = ()) -> Cut:
        """Run every node that depends on no blocked one; ``also_needed`` tensors are outputs in any case."""
        before = set(self.alive)
        ran: list[Node] = []
        for node in self.graph:
            if (
                node.name in self.executed
                or node.name in blocked
                or node.op in ("Constant", "Parameter", "Result")
            ):
                continue
            dynamic = [t for t in node.inputs if t in self._dynamic]
            if dynamic and all(t in self.computed for t in dynamic):
                self.executed.add(node.name)
                self.computed.update(t for t in node.outputs if t)
                ran.append(node)
        alive = [t for t in self._order() if self._needed(t)]
        wanted = [*alive, *(t for t in also_needed if t not in alive)]
        read = {t for node in ran for t in node.inputs}
        new = tuple(t for t in wanted if t not in before)
        self.alive = tuple(wanted)
        return Cut(
            inputs=tuple(t for t in sorted(before) if t in read) if new else (),
            outputs=new,
            carried=tuple(t for t in wanted if t in before),
        )

    def _order(self) -> list[str]:
        return sorted(t for t in self.computed if t in self._dynamic)

    def _needed(self, tensor: str) -> bool:
        return any(
            node.op != "Result" and node.name not in self.executed for node, _ in self.graph.consumers(tensor)
        )


def _dynamic_tensors(graph: Graph) -> set[str]:
    dynamic = set(graph.inputs)
    for node in graph:
        if node.op != "Constant" and any(t in dynamic for t in node.inputs):
            dynamic.update(t for t in node.outputs if t)
    return dynamic


def plan_stages(graph: Graph, layers: Sequence[Layer]) -> list[StagePlan]:
    """Stages that visit every layer once, in topological order.

    Parameters
    ----------
    graph
        The graph of the prepared model (the dense and the sparse model share it).
    layers
        Layers with exactly one place; shared weights cannot be solved in sequence.

    Raises
    ------
    ValueError
        If a layer has several places, or cannot be reached from the model's inputs.
    """
    places = {}
    for layer in layers:
        if layer.shared:
            raise ValueError(f"layer {layer.name!r} is used in {len(layer.places)} places")
        places[layer.places[0].node] = (layer, layer.places[0])
    sparse, dense = _Front(graph), _Front(graph)
    pending = set(places)
    plans: list[StagePlan] = []
    while pending:
        sparse_cut = sparse.advance(pending)
        ready = [name for name in places if name in pending and places[name][1].input in sparse.computed]
        if not ready:
            raise ValueError(f"layers {sorted(pending)} cannot be reached from the model's inputs")
        pending -= set(ready)
        group = tuple(places[name] for name in ready)
        ahead = [place.output for _, place in group]
        dense_cut = dense.advance(pending, ahead)
        plans.append(StagePlan(group, sparse_cut, dense_cut))
    return plans
