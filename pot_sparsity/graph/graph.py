"""The networkx view of a model that passes and layer discovery work on, the same for every format.

Frontends translate a format's operators into one small canonical vocabulary (below); operators outside it keep
their own type name and are never touched. A tensor has exactly one producer and a unique name.

Canonical operators and what frontends guarantee for them:

``Parameter``, ``Result``, ``Constant``
    One output / one input / one output. A constant's value is read through :meth:`Graph.value`, lazily.
``Convolution``, ``ConvolutionTranspose``
    ``inputs = (x, weight[, bias])``; ``attrs["geometry"]`` is a :class:`~pot_sparsity.algorithms.arrays.ConvGeometry`;
    ``attrs["weight_layout"]`` names the stored operand: ``"oi"`` = ``[out, in/groups, *k]`` (ONNX Conv, OV
    Convolution), ``"io"`` = ``[in, out/groups, *k]`` (ONNX ConvTranspose), ``"goi"`` = ``[g, out/g, in/g, *k]``
    (OV GroupConvolution), ``"gio"`` = ``[g, in/g, out/g, *k]`` (OV GroupConvolutionBackpropData); OV
    ConvolutionBackpropData is ``"io"`` with groups 1.
``MatMul``
    ``inputs = (a, b[, c])`` with ``attrs["transpose_a"]``, ``attrs["transpose_b"]`` (bool: last two axes),
    ``attrs["alpha"]``, ``attrs["beta"]`` (floats; 1.0 for plain MatMul); ``c`` only from Gemm.
``BatchNormalization``
    ``inputs = (x, gamma, beta, mean, variance)`` in this order, ``attrs["epsilon"]``; inference mode only.
``Add``, ``Subtract``, ``Multiply``, ``Divide``
    Two inputs, numpy broadcasting.
``Clip``, ``Clamp``
    ``Clip`` has its bounds as inputs 1 and 2 (absent ones empty), ``Clamp`` as ``attrs["min"]`` and ``attrs["max"]``.
``Identity``, ``Convert``, ``Reshape``, ``Transpose``, ``Squeeze``, ``Unsqueeze``, ``DequantizeLinear``
    The operators a weight may hide behind. ``Transpose``: ``attrs["perm"]``. ``Convert``: ``attrs["dtype"]``
    (numpy dtype). ``Reshape``/``Squeeze``/``Unsqueeze``: the resulting static shape is the output tensor's shape.
    ``DequantizeLinear``: ``inputs = (x, scale[, zero_point])``, ``attrs["axis"]``, ``attrs["block_size"]`` (0 = none).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray

#: None stands for a dimension that is not known before run time.
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape (None: unknown rank) and dtype (None: unknown or not a numeric type) of a tensor."""

    name: str
    shape: Shape | None
    dtype: np.dtype[np.generic] | None


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes
    ----------
    name
        Unique within the graph.
    op
        Canonical operator, or the format's own type name where there is none.
    inputs, outputs
        Tensor names by port; ``""`` where an optional input is absent.
    attrs
        See the module's documentation.
    source_type
        The format's own type name (``Gemm``, ``GroupConvolution``).
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, object] = field(default_factory=dict)
    source_type: str = ""

    @property
    def output(self) -> str:
        """The first output tensor."""
        return self.outputs[0]


class Graph:
    """Directed multigraph of operators; edges carry ``tensor``, ``source_port`` and ``target_port``.

    Parameters
    ----------
    nodes
        In any order; topological order is established here.
    tensors
        What is known of each tensor (missing entries mean nothing is known).
    values
        Reader of each constant, keyed by the name of the constant's *output tensor*.
    inputs, outputs
        Tensor names of the model's inputs and outputs, in the model's order.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        tensors: Mapping[str, TensorInfo],
        values: Mapping[str, Callable[[], AnyArray]],
        inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> None:
        self.network: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._tensors = dict(tensors)
        self._values = dict(values)
        self._producer: dict[str, Node] = {}
        self._consumers: dict[str, list[tuple[Node, int]]] = {}
        self._nodes: dict[str, Node] = {}
        for node in nodes:
            if node.name in self._nodes:
                raise ValueError(f"two nodes are called {node.name!r}")
            self._nodes[node.name] = node
            self.network.add_node(node.name, op=node.op)
            for tensor in node.outputs:
                if tensor:
                    self._producer[tensor] = node
        for node in nodes:
            for port, tensor in enumerate(node.inputs):
                if not tensor:
                    continue
                self._consumers.setdefault(tensor, []).append((node, port))
                source = self._producer.get(tensor)
                if source is not None:
                    self.network.add_edge(
                        source.name,
                        node.name,
                        tensor=tensor,
                        source_port=source.outputs.index(tensor),
                        target_port=port,
                    )
        if not nx.is_directed_acyclic_graph(self.network):
            raise ValueError("the model's graph has a cycle")
        order = {name: i for i, name in enumerate(self._nodes)}
        self._order = tuple(nx.lexicographical_topological_sort(self.network, key=order.__getitem__))

    def __iter__(self) -> Iterator[Node]:
        """Nodes in topological order (ties in the model's own order)."""
        return (self._nodes[name] for name in self._order)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def node(self, name: str) -> Node:
        """The node of that name; KeyError if there is none."""
        return self._nodes[name]

    def producer(self, tensor: str) -> Node | None:
        """The node whose output ``tensor`` is."""
        return self._producer.get(tensor)

    def consumers(self, tensor: str) -> tuple[tuple[Node, int], ...]:
        """(node, port) pairs that read ``tensor``, ``Result`` nodes included."""
        return tuple(self._consumers.get(tensor, ()))

    def tensor(self, name: str) -> TensorInfo:
        """What is known of a tensor; unknown shape and dtype if nothing is."""
        return self._tensors.get(name, TensorInfo(name, None, None))

    def is_constant(self, tensor: str) -> bool:
        """Whether ``tensor`` is the output of a ``Constant`` node."""
        return tensor in self._values

    def value(self, tensor: str) -> AnyArray:
        """Value of a constant tensor, in its stored dtype; KeyError if it is no constant."""
        return self._values[tensor]()
