"""Cutting a graph into stages so that layers can be solved one after the other with one partial pass each.

A stage computes, from the tensors that crossed the previous cut, everything that does not depend on a layer still
to be solved; the layers whose input is then at hand form the stage's group. The sparse model stops in front of the
group (its weights are not known yet), the dense model runs through it (its outputs are the targets). Normalizations
whose scale is to be corrected are visited in the same way; there the sparse model looks ahead at their output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.layers import Layer, Place
from pot_sparsity.graph.normalization import Normalization


@dataclass(frozen=True)
class Cut:
    """One partial run: feed ``inputs`` (kept from the cut before), get ``outputs``; keep ``carried`` as they are.

    ``inputs`` are only those tensors that the partial run reads; ``taps`` are outputs to look at, not to keep.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    carried: tuple[str, ...]
    taps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Residual:
    """The sum that ends a residual block: ``total`` is the layer's output plus ``skip``, both tensor names."""

    total: str
    skip: str


@dataclass(frozen=True)
class StagePlan:
    """The layers of one stage and the partial runs of the sparse and the dense model that lead to them.

    Both runs yield the outputs of the ``normalizations``, too. ``residuals`` holds, by name, the layers that end a
    residual block: the sparse run yields their skip, the dense run their total.
    """

    layers: tuple[tuple[Layer, Place], ...]
    sparse: Cut
    dense: Cut
    normalizations: tuple[Normalization, ...] = ()
    residuals: Mapping[str, Residual] = field(default_factory=dict)


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

    def ahead(self, cut: Cut, before: Sequence[str], taps: Sequence[str]) -> Cut:
        """The same cut with a look at tensors that blocked nodes compute from what is alive behind it."""
        if not taps:
            return cut
        read, pending = set(cut.inputs), list(taps)
        while pending:
            node = self.graph.producer(pending.pop())
            for tensor in () if node is None else node.inputs:
                if tensor in self.computed:
                    read.add(tensor)
                elif tensor in self._dynamic:
                    pending.append(tensor)
        inputs = tuple(t for t in sorted(before) if t in read)
        return Cut(inputs, cut.outputs, cut.carried, tuple(taps))

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


def plan_stages(
    graph: Graph,
    layers: Sequence[Layer],
    normalizations: Sequence[Normalization] = (),
    *,
    dense_inputs: bool = False,
) -> list[StagePlan]:
    """Stages that visit every layer and every normalization once, in topological order.

    Parameters
    ----------
    graph
        The graph of the prepared model (the dense and the sparse model share it).
    layers
        Layers with exactly one place; shared weights cannot be solved in sequence.
    normalizations
        Normalizations whose scale and shift are to be corrected on the way.
    dense_inputs
        Also keep the dense model's input of each layer until its output is there.

    Raises
    ------
    ValueError
        If a layer has several places, or something cannot be reached from the model's inputs.
    """
    places = {}
    for layer in layers:
        if layer.shared:
            raise ValueError(f"layer {layer.name!r} is used in {len(layer.places)} places")
        places[layer.places[0].node] = (layer, layer.places[0])
    kept = {item.name: item for item in normalizations}
    stops = {name: place.input for name, (_, place) in places.items()}
    stops |= {name: item.input for name, item in kept.items()}
    sparse, dense = _Front(graph), _Front(graph)
    pending = set(stops)
    plans: list[StagePlan] = []
    while pending:
        before = sparse.alive
        sparse_cut = sparse.advance(pending)
        ready = [name for name in stops if name in pending and stops[name] in sparse.computed]
        if not ready:
            raise ValueError(f"layers {sorted(pending)} cannot be reached from the model's inputs")
        pending -= set(ready)
        group = tuple(places[name] for name in ready if name in places)
        norms = tuple(kept[name] for name in ready if name in kept)
        looked_at = [item.output for item in norms]
        sparse_cut = sparse.ahead(sparse_cut, before, looked_at)
        inputs = [place.input for _, place in group] if dense_inputs else []
        ends = {layer.name: _residual(graph, place.output, sparse.alive) for layer, place in group}
        residuals = {name: end for name, end in ends.items() if end is not None}
        totals = [end.total for end in residuals.values()]
        dense_cut = dense.advance(pending, [place.output for _, place in group] + looked_at + inputs + totals)
        plans.append(StagePlan(group, sparse_cut, dense_cut, norms, residuals))
    return plans


def _residual(graph: Graph, output: str, alive: Sequence[str]) -> Residual | None:
    """The sum that a layer's output goes into, if that is all it does and the other side is there already."""
    readers = graph.consumers(output)
    if len(readers) != 1 or readers[0][0].op != "Add" or output in graph.outputs:
        return None
    add = readers[0][0]
    others = [tensor for tensor in add.inputs if tensor != output]
    return Residual(add.outputs[0], others[0]) if len(others) == 1 and others[0] in alive else None
