"""The few structural edits of an OpenVINO model, done in place, and cutting a part out of a copy.

After edits, :meth:`~pot_sparsity.graph.openvino_nodes.NamedModel.settle` must run before anything else looks
at the model; it is not done here because it costs as much for one edit as for a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov
from openvino import opset13

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.graph.openvino_nodes import NamedModel, make_constant


def append_add(named: NamedModel, node: str, value: AnyArray, constant: str, add: str) -> None:
    """Add a new constant to a node's output; the sum takes over the names of the output's tensor.

    Parameters
    ----------
    named, node
        The operator; its own name stays, its output gets another tensor name.
    value
        Broadcasts over the output.
    constant, add
        Names of the two new nodes.
    """
    op = named.node(node)
    output = op.output(0)
    tensor, names = named.tensor(output), output.get_names()
    targets = list(output.get_target_inputs())
    bias = make_constant(value, constant)
    total = opset13.add(output, bias)
    total.set_friendly_name(add)
    for target in targets:
        target.replace_source_output(total.output(0))
    output.get_tensor().set_names(set())
    total.output(0).get_tensor().set_names(names)
    named.register(bias, constant)
    named.rename(op, 0, named.free_name(f"{tensor}.without_bias"))
    named.register(total, add, [tensor])


def bypass(named: NamedModel, node: str, port: int) -> None:
    """Let the consumers of a node's output read its input ``port``; a model output keeps its names."""
    op = named.node(node)
    output, source = op.output(0), op.input_value(port)
    producer = source.get_node()
    keeps_name = producer.get_type_name() == "Parameter" or _is_model_output(source)
    if _is_model_output(output):
        source.get_tensor().set_names(source.get_names() | output.get_names())
        if not keeps_name:
            named.rename(producer, source.get_index(), named.tensor(output))
    for target in list(output.get_target_inputs()):
        target.replace_source_output(source)
    named.forget(node)


def set_operand(named: NamedModel, node: str, port: int, value: AnyArray, constant: str) -> None:
    """Connect a new constant, called ``constant``, to an operator's own input port."""
    new = make_constant(value, constant)
    named.node(node).input(port).replace_source_output(new.output(0))
    named.register(new, constant)


def _is_model_output(output: ov.Output) -> bool:
    return any(target.get_node().get_type_name() == "Result" for target in output.get_target_inputs())


def cut(
    named: NamedModel, outputs: Sequence[str] | None, inputs: Sequence[str] | None
) -> tuple[ov.Model, tuple[str, ...], tuple[str, ...]]:
    """The part of a model between tensors; see :meth:`pot_sparsity.graph.model.Model.extract`.

    Returns
    -------
    tuple
        The new model and the tensor names of its inputs and outputs, in its own order.

    Raises
    ------
    ValueError
        A tensor does not exist, an input is a constant, or an output needs a model input that is not given.
    """
    copy = named.clone()
    own = [copy.tensor(op.output(0)) for op in copy.model.get_parameters()]
    results = [copy.tensor(op.input_value(0)) for op in copy.model.get_results()]
    wanted = tuple(dict.fromkeys(results if outputs is None else outputs))
    given = tuple(dict.fromkeys(own if inputs is None else inputs))
    ports = {tensor: _output(copy, tensor) for tensor in (*wanted, *given)}
    for tensor in given:
        ports[tensor] = _feed(ports[tensor], tensor)
    sinks = list(copy.model.get_sinks()) if inputs is None else []
    reached = _parameters([*(ports[tensor].get_node() for tensor in wanted), *sinks])
    fed = {ports[tensor].get_node().get_instance_id(): tensor for tensor in given}
    for key, op in reached.items():
        if key not in fed:
            name = copy.tensor(op.output(0))
            raise ValueError(f"{list(wanted)} need the model's input {name!r}, which is not given")
    used = tuple(tensor for key, tensor in fed.items() if key in reached)
    nodes = [ports[tensor].get_node() for tensor in used]
    part = ov.Model([ports[tensor] for tensor in wanted], sinks, nodes, named.model.get_friendly_name())
    return part, used, wanted


def _output(named: NamedModel, tensor: str) -> ov.Output:
    try:
        return named.output(tensor)
    except KeyError:
        raise ValueError(f"the model has no tensor called {tensor!r}") from None


def _feed(output: ov.Output, tensor: str) -> ov.Output:
    """The output of a Parameter that stands for ``output`` from now on."""
    kind = output.get_node().get_type_name()
    if kind == "Constant":
        raise ValueError(f"tensor {tensor!r} is a constant and cannot be an input")
    if kind == "Parameter":
        return output
    parameter = opset13.parameter(output.get_partial_shape(), output.get_element_type())
    parameter.set_friendly_name(tensor)
    for target in list(output.get_target_inputs()):
        target.replace_source_output(parameter.output(0))
    return parameter.output(0)


def _parameters(roots: Sequence[ov.Node]) -> dict[int, ov.Node]:
    """All Parameters that nodes depend on, by instance id."""
    seen: set[int] = set()
    found: dict[int, ov.Node] = {}
    pending = list(roots)
    while pending:
        op = pending.pop()
        key = op.get_instance_id()
        if key in seen:
            continue
        seen.add(key)
        if op.get_type_name() == "Parameter":
            found[key] = op
        pending += [value.get_node() for value in op.input_values()]
    return found
