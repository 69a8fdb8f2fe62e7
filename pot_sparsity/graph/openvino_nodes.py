"""An ``openvino.Model`` whose nodes and tensors have unique, lasting names.

Friendly names may repeat and say nothing of output ports, and edits change the order of operators. So names
are given once, when the model is opened, and carried over to clones by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import openvino as ov

from pot_sparsity.algorithms.arrays import AnyArray

_DTYPES: dict[ov.Type, np.dtype[np.generic]] = {
    ov.Type.f16: np.dtype(np.float16),
    ov.Type.bf16: np.dtype(ml_dtypes.bfloat16),
    ov.Type.f32: np.dtype(np.float32),
    ov.Type.f64: np.dtype(np.float64),
    ov.Type.i8: np.dtype(np.int8),
    ov.Type.i16: np.dtype(np.int16),
    ov.Type.i32: np.dtype(np.int32),
    ov.Type.i64: np.dtype(np.int64),
    ov.Type.u8: np.dtype(np.uint8),
    ov.Type.u16: np.dtype(np.uint16),
    ov.Type.u32: np.dtype(np.uint32),
    ov.Type.u64: np.dtype(np.uint64),
    ov.Type.boolean: np.dtype(np.bool_),
}
_TYPES = {dtype: element_type for element_type, dtype in _DTYPES.items()}
_HALVES = (ov.Type.f16, ov.Type.bf16)
_HALF_WORDS = ("f16", "bf16")


def dtype_of(element_type: ov.Type) -> np.dtype[np.generic] | None:
    """The numpy dtype of an element type; None for packed (4 bits...), textual and dynamic types."""
    return _DTYPES.get(element_type)


def read_constant(node: ov.Node) -> AnyArray:
    """Copy of a Constant's value in its own dtype."""
    dtype = _DTYPES[node.get_element_type()]
    data = np.array(node.data)
    # OpenVINO hands bfloat16 out as bits that numpy is told are float16.
    return data if data.dtype == dtype else data.view(dtype)


def make_constant(value: AnyArray, name: str) -> ov.Node:
    """A Constant that holds a copy of ``value``."""
    # OpenVINO reads the bits of a float16 array in Fortran order as integers.
    value = np.ascontiguousarray(value).reshape(value.shape)
    if value.dtype == np.dtype(ml_dtypes.bfloat16):
        bits = ov.Tensor(value.view(np.uint16), ov.Shape(list(value.shape)), ov.Type.bf16)
        node = ov.op.Constant(bits, shared_memory=False)
    else:
        node = ov.op.Constant(value, shared_memory=False)
    node.set_friendly_name(name)
    return node


def is_static(node: ov.Node, known: dict[int, bool]) -> bool:
    """Whether a node depends on constants only; ``known`` caches what was found, by instance id."""
    pending = [node]
    while pending:
        current = pending[-1]
        key = current.get_instance_id()
        sources = [value.get_node() for value in current.input_values()]
        unknown = [s for s in sources if s.get_instance_id() not in known]
        if key in known or not unknown:
            known.setdefault(
                key,
                current.get_type_name() == "Constant"
                or (bool(sources) and all(known[s.get_instance_id()] for s in sources)),
            )
            pending.pop()
        else:
            pending += unknown
    return known[node.get_instance_id()]


class NamedModel:
    """A model with unique names for its nodes (``relu``, ``relu#2``) and tensors (``relu:0``).

    Parameters
    ----------
    model
        Taken over, not copied.
    names
        Names of the nodes in the order of ``get_ordered_ops``; by default their friendly names, made unique.
    tensors
        Names of the output tensors of each node in that order; by default ``node:port``.
    """

    def __init__(
        self,
        model: ov.Model,
        names: Iterable[str] | None = None,
        tensors: Iterable[Iterable[str]] | None = None,
    ) -> None:
        self.model = model
        self._names: dict[int, str] = {}
        self._tensors: dict[tuple[int, int], str] = {}
        self._nodes: dict[str, ov.Node] = {}
        self._ports: dict[str, tuple[ov.Node, int]] = {}
        ops = model.get_ordered_ops()
        given = list(names) if names is not None else unique_names(op.get_friendly_name() for op in ops)
        ports = [tuple(t) for t in tensors] if tensors is not None else [None] * len(ops)
        for op, name, outputs in zip(ops, given, ports, strict=True):
            self.register(op, name, outputs)

    def register(self, node: ov.Node, name: str, tensors: Iterable[str] | None = None) -> None:
        """Give a node (a new one, or in the place of another) its name and those of its output tensors."""
        count = node.get_output_size() if node.get_type_name() != "Result" else 0
        named = tuple(tensors) if tensors is not None else tuple(f"{name}:{port}" for port in range(count))
        self._names[node.get_instance_id()] = name
        self._nodes[name] = node
        for port, tensor in enumerate(named):
            self.rename(node, port, tensor)

    def rename(self, node: ov.Node, port: int, tensor: str) -> None:
        """Give an output another tensor name."""
        self._tensors[node.get_instance_id(), port] = tensor
        self._ports[tensor] = (node, port)

    def forget(self, name: str) -> None:
        """Drop a node that is about to leave the model, with its tensors."""
        node = self._nodes.pop(name)
        for tensor in self.tensors(node):
            if self._ports.get(tensor, (None,))[0] is node:
                del self._ports[tensor]

    def settle(self) -> None:
        """Bring shapes up to date after structural edits and forget what is no longer part of the model."""
        self.model.validate_nodes_and_infer_types()
        kept = [(name, node, self.tensors(node)) for name, node in self]
        self._names, self._tensors, self._nodes, self._ports = {}, {}, {}, {}
        for name, node, tensors in kept:
            self.register(node, name, tensors)

    def __iter__(self) -> Iterator[tuple[str, ov.Node]]:
        """Names and nodes in the model's own topological order."""
        return ((self._names[op.get_instance_id()], op) for op in self.model.get_ordered_ops())

    def node(self, name: str) -> ov.Node:
        """The node of that name; KeyError if there is none."""
        return self._nodes[name]

    def output(self, tensor: str) -> ov.Output:
        """The output port of that tensor name; KeyError if there is none."""
        node, port = self._ports[tensor]
        return node.output(port)

    def tensor(self, output: ov.Output) -> str:
        """The name of an output's tensor."""
        return self._tensors[output.get_node().get_instance_id(), output.get_index()]

    def tensors(self, node: ov.Node) -> tuple[str, ...]:
        """The names of all output tensors of a node."""
        count = node.get_output_size() if node.get_type_name() != "Result" else 0
        return tuple(self._tensors[node.get_instance_id(), port] for port in range(count))

    def free_name(self, wish: str) -> str:
        """``wish``, or ``wish#2``... if a node or tensor already has that name."""
        name, count = wish, 1
        while name in self._nodes or name in self._ports:
            count += 1
            name = f"{wish}#{count}"
        return name

    def clone(self) -> NamedModel:
        """Copy with the same names; the bytes of constants are shared (and never written to)."""
        pairs = list(self)
        model = self.model.clone()
        # Position is all that links a node to its clone, so the order of both must be the same.
        if [op.get_friendly_name() for op in model.get_ordered_ops()] != [
            op.get_friendly_name() for _, op in pairs
        ]:
            raise RuntimeError("openvino.Model.clone changed the order of the operators")
        return NamedModel(model, [name for name, _ in pairs], [self.tensors(node) for _, node in pairs])

    def replace_constant(self, tensor: str, value: AnyArray) -> None:
        """Put a constant of another value where ``tensor`` is; names stay."""
        old = self.output(tensor)
        node = old.get_node()
        new = make_constant(value, node.get_friendly_name())
        self.register(new, self._names[node.get_instance_id()], self.tensors(node))
        for target in list(old.get_target_inputs()):
            target.replace_source_output(new.output(0))
        new.output(0).get_tensor().set_names(old.get_names())


def unique_names(wishes: Iterable[str]) -> list[str]:
    """Each wish, or ``wish#2``, ``wish#3``... where it was given away before."""
    wanted = list(wishes)
    taken = set(wanted)
    seen: set[str] = set()
    result = []
    for wish in wanted:
        name, count = wish, 1
        while name in seen or (count > 1 and name in taken):
            count += 1
            name = f"{wish}#{count}"
        seen.add(name)
        result.append(name)
    return result


def settle_names(model: ov.Model, again: ov.Model | None = None) -> None:
    """Rename, in place, a model and nodes whose friendly names are process-wide counters (``Convert_825``).

    Such a name depends on what was read before, and would make the written file depend on it too.

    Parameters
    ----------
    model
        The model to work on.
    again
        The same file read a second time: names that differ are counters. By default only names that OpenVINO
        itself reports as made up count.
    """
    if again is not None and again.get_friendly_name() != model.get_friendly_name():
        model.set_friendly_name("model")
    ops = model.get_ordered_ops()
    others = [
        op.get_name() if again is None else op.get_friendly_name()
        for op in (again or model).get_ordered_ops()
    ]
    taken = {op.get_friendly_name() for op in ops}
    for position, (op, other) in enumerate(zip(ops, others, strict=True)):
        if (op.get_friendly_name() == other) != (again is None):
            continue
        name = wish = f"{op.get_type_name()}_{position}"
        count = 1
        while name in taken:
            count += 1
            name = f"{wish}#{count}"
        taken.add(name)
        op.set_friendly_name(name)


def computes_in_half(model: ov.Model) -> bool:
    """Whether any tensor that depends on an input is float16 or bfloat16."""
    known: dict[int, bool] = {}
    return any(
        output.get_element_type() in _HALVES
        for op in model.get_ordered_ops()
        if op.get_type_name() != "Result" and not is_static(op, known)
        for output in op.outputs()
    )


def float32_twin(half: NamedModel) -> NamedModel:
    """Clone with the same names that computes in float32 what ``half`` computes in float16 or bfloat16.

    Raises
    ------
    ValueError
        If a half-precision tensor remains (a body of an If, Loop or TensorIterator works on it).
    """
    twin = half.clone()
    for _, node in list(twin):
        kind = node.get_type_name()
        if kind == "Constant":
            if node.get_element_type() in _HALVES:
                tensor = twin.tensor(node.output(0))
                twin.replace_constant(tensor, read_constant(node).astype(np.float32))
        elif kind == "Parameter":
            if node.get_element_type() in _HALVES:
                node.set_element_type(ov.Type.f32)
        else:
            for key, value in node.get_attributes().items():
                if isinstance(value, str) and value in _HALF_WORDS:
                    node.set_attribute(key, "f32")
    try:
        twin.model.validate_nodes_and_infer_types()
    except RuntimeError as error:
        raise ValueError("the model computes in float16 and cannot be rewritten in float32") from error
    if computes_in_half(twin.model):
        raise ValueError("the model computes in float16 inside an If, Loop or TensorIterator")
    return twin
