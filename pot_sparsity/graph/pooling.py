"""Global average pooling in front of a layer: what the layer's input is the mean of."""

from __future__ import annotations

from dataclasses import replace

from pot_sparsity.algorithms.arrays import ConvGeometry
from pot_sparsity.graph.graph import Graph, Node
from pot_sparsity.graph.layers import Layer

#: What may stand between a pooling and the layer: the same numbers in another shape.
_MOVES = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Dropout"})
_POOLINGS = frozenset({"GlobalAveragePool", "AveragePool", "AvgPool", "ReduceMean"})


def before_pooling(graph: Graph, layer: Layer) -> Layer | None:
    """The layer as if it read single positions in place of their mean; None if it reads no mean over all positions.

    Only for looking at what it would read there: its input is the pooling's, ``[samples, cols, *spatial]``.
    """
    if layer.shared or layer.groups != 1:
        return None
    place = layer.places[0]
    node = graph.producer(place.input)
    while node is not None and node.op in _MOVES:
        node = graph.producer(node.inputs[0])
    spatial = 0 if node is None else _pooled_dimensions(graph, node, layer.cols)
    if node is None or not spatial:
        return None
    ones, zeros = (1,) * spatial, (0,) * spatial
    geometry = ConvGeometry(ones, ones, ones, zeros, zeros)
    return replace(layer, places=(replace(place, input=node.inputs[0], geometry=geometry),))


def _pooled_dimensions(graph: Graph, node: Node, channels: int) -> int:
    """How many spatial dimensions the node takes the mean over, all positions of each; 0 if it does not."""
    if node.op not in _POOLINGS:
        return 0
    before, after = (graph.tensor(name).shape for name in (node.inputs[0], node.output))
    if before is None or after is None or not 3 <= len(before) <= 5 or before[1] != channels:
        return 0
    spatial = before[2:]
    kept = after[1:] == (channels, *(1,) * len(spatial))
    # Without the other dimensions a mean over some of channels and space may look the same.
    dropped = after[1:] == (channels,) and channels not in spatial and None not in spatial
    return len(spatial) if kept or dropped else 0
