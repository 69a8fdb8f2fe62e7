"""A model as a differentiable function: OpenVINO's operators, written in JAX.

The model is read, its shapes are fixed and everything that depends on neither its inputs nor the constants to be
trained is folded by OpenVINO itself, shape arithmetic first of all. What remains is a list of operators, each of
which has a rule in :mod:`pot_sparsity.engines.jax_operators`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import openvino as ov
from openvino import opset13, passes

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.engines.batching import reason
from pot_sparsity.engines.jax_operation import Operand, Operation, Rule
from pot_sparsity.engines.jax_operators import OPERATORS
from pot_sparsity.engines.openvino_engine import read
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.model import Runnable
from pot_sparsity.graph.openvino_nodes import dtype_of, is_static, read_constant

#: A tensor inside the model: instance id of the node that computes it, and the output port.
_Key = tuple[int, int]


def limit_threads(threads: int) -> None:
    """Let XLA use so many threads; without effect in a process that has used JAX before, or that sets ``NPROC``."""
    os.environ.setdefault("NPROC", str(threads))


class NotDifferentiable(ModelError):
    """The model cannot be written in JAX: an operator has no rule, or a size is not known."""


@dataclass(frozen=True)
class _Step:
    operation: Operation
    rule: Rule
    inputs: tuple[_Key, ...]
    outputs: tuple[_Key, ...]


class DifferentiableModel:
    """A runnable as a pure JAX function of its inputs and of some of its constants, in float32.

    Parameters
    ----------
    runnable
        Serialized ONNX, the path of an ONNX file, or an ``openvino.Model``, which is not changed.
    batch_size
        What a leading dimension of an input that is not fixed becomes.
    constants
        Tensor names of the constants that become arguments.

    Attributes
    ----------
    values
        Present values of these constants.
    outputs
        Tensor names of the outputs, in order.
    input_shapes
        Shapes of the inputs, in order.

    Raises
    ------
    NotDifferentiable
        An operator has no rule, or a dimension other than the first is not fixed.
    ModelError
        OpenVINO cannot read the model.
    KeyError
        A constant is not part of the model, or its name is not unique there.
    """

    def __init__(self, runnable: Runnable, batch_size: int, constants: Collection[str]) -> None:
        model = _own_copy(runnable)
        self.outputs: tuple[str, ...] = runnable.outputs
        inputs = list(model.get_parameters())
        found = (len(inputs), len(model.get_results()))
        if found != (len(runnable.inputs), len(runnable.outputs)):
            raise ModelError(
                f"OpenVINO sees {found[0]} inputs and {found[1]} outputs where the model has "
                f"{len(runnable.inputs)} and {len(runnable.outputs)}: it cannot be differentiated"
            )
        self.values, trainable = _free_constants(model, constants)
        _fix_shapes(model, runnable.inputs, batch_size)
        self.input_shapes: tuple[tuple[int, ...], ...] = tuple(_shape(node.output(0)) for node in inputs)
        self._input_keys = [_key(node.output(0)) for node in inputs]
        self._constant_keys = {name: _key(node.output(0)) for name, node in trainable.items()}
        self._output_keys = [_key(node.input_value(0)) for node in model.get_results()]
        self._fixed = _fixed_values(model)
        self._steps = _steps(model, self._fixed)
        dtypes = [_canonical(node.output(0).get_element_type()) for node in inputs]
        self._check(dtypes)

    def __call__(self, constants: Mapping[str, jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Outputs in the runnable's order; may be traced by ``jax.jit`` and ``jax.grad``.

        Parameters
        ----------
        constants
            Value of every trainable constant, of the shape in :attr:`values`.
        inputs
            One array per input, of the shape in :attr:`input_shapes`.
        """

        def apply(step: _Step, operands: Sequence[Operand]) -> list[jax.Array]:
            results = step.rule(step.operation, operands)
            return results if isinstance(results, list) else [results]

        return self._walk(constants, inputs, apply)

    def _walk(
        self,
        constants: Mapping[str, jax.Array],
        inputs: Sequence[jax.Array],
        apply: Callable[[_Step, Sequence[Operand]], Sequence[jax.Array]],
    ) -> list[jax.Array]:
        known: dict[_Key, Operand] = dict(self._fixed)
        known |= {key: jnp.asarray(constants[name]) for name, key in self._constant_keys.items()}
        known |= dict(zip(self._input_keys, map(jnp.asarray, inputs), strict=True))
        for step in self._steps:
            results = apply(step, [known[key] for key in step.inputs])
            known |= dict(zip(step.outputs, results, strict=False))
        return [jnp.asarray(known[key]) for key in self._output_keys]

    def _check(self, dtypes: Sequence[np.dtype[np.generic]]) -> None:
        """Trace the model once; all operators that have no rule for what is asked are reported together."""
        missing: set[str] = set()
        read = {key for step in self._steps for key in step.inputs} | set(self._output_keys)

        def apply(step: _Step, operands: Sequence[Operand]) -> list[jax.Array]:
            operation = step.operation
            expected = [
                jnp.zeros(shape, dtype)
                for shape, dtype in zip(operation.shapes, operation.dtypes, strict=True)
            ]
            try:
                results = step.rule(operation, operands)
            except (NotImplementedError, TypeError, ValueError, KeyError, IndexError) as error:
                missing.add(f"{operation.kind} ({error})" if str(error) else operation.kind)
                return expected
            listed = results if isinstance(results, list) else [results]
            if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(listed, expected, strict=False)):
                missing.add(f"{operation.kind} ({operation.version})")
                return expected
            if read.intersection(step.outputs[len(listed) :]):
                missing.add(f"{operation.kind} (output {len(listed)})")
                return expected
            return listed

        jax.eval_shape(
            lambda constants, inputs: self._walk(constants, inputs, apply),
            self.values,
            [np.zeros(shape, dtype) for shape, dtype in zip(self.input_shapes, dtypes, strict=True)],
        )
        _complain(missing)


def _own_copy(runnable: Runnable) -> ov.Model:
    try:
        model = read(ov.Core(), runnable)
    except Exception as error:  # the frontends document no exception types
        raise ModelError(f"OpenVINO cannot read the model: {reason(error)}") from error
    return model.clone() if isinstance(runnable.model, ov.Model) else model


def _free_constants(model: ov.Model, names: Collection[str]) -> tuple[dict[str, Float32], dict[str, ov.Node]]:
    """Put a Parameter in the place of each named constant, so that folding stops there."""
    nodes: dict[str, list[ov.Node]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            friendly = node.get_friendly_name()
            for name in {friendly, f"{friendly}:0", *node.output(0).get_names()}:
                nodes.setdefault(name, []).append(node)
    values: dict[str, Float32] = {}
    parameters: dict[str, ov.Node] = {}
    for name in names:
        if len(nodes.get(name, ())) != 1:
            raise KeyError(f"the model has {len(nodes.get(name, ()))} constants called {name!r}, not one")
        constant = nodes[name][0]
        values[name] = read_constant(constant).astype(np.float32)
        parameter = opset13.parameter(list(values[name].shape), np.float32)
        for target in list(constant.output(0).get_target_inputs()):
            target.replace_source_output(parameter.output(0))
        parameters[name] = parameter
    model.add_parameters(list(parameters.values()))
    return values, parameters


def _fix_shapes(model: ov.Model, names: Sequence[str], batch_size: int) -> None:
    """Make the shapes of all inputs static, and fold what follows from them."""
    shapes: dict[int, ov.PartialShape] = {}
    for index, node in enumerate(model.get_parameters()):
        partial = node.get_partial_shape()
        if index < len(names) and partial.is_dynamic:
            if partial.rank.is_dynamic or any(dim.is_dynamic for dim in list(partial)[1:]):
                raise NotDifferentiable(
                    f"input {names[index]!r} has the shape {partial}: "
                    "only the first dimension may be open to differentiate the model"
                )
            partial[0] = ov.Dimension(batch_size)
        shapes[index] = partial
    try:
        model.reshape(shapes)
        manager = passes.Manager()
        manager.register_pass(passes.ConstantFolding())
        manager.run_passes(model)
        model.validate_nodes_and_infer_types()
    except RuntimeError as error:
        raise NotDifferentiable(
            f"the model does not take batches of {batch_size}: {reason(error)}"
        ) from error


def _fixed_values(model: ov.Model) -> dict[_Key, AnyArray]:
    """Values that depend on neither inputs nor trainable constants and that other operators read."""
    known: dict[int, bool] = {}
    values: dict[_Key, AnyArray] = {}
    left: dict[_Key, ov.Output] = {}
    for node in model.get_ordered_ops():
        reader = node.get_type_name() == "Result" or not is_static(node, known)
        for source in node.input_values() if reader else ():
            producer = source.get_node()
            key = _key(source)
            if key in values or not is_static(producer, known):
                continue
            if producer.get_type_name() == "Constant":
                values[key] = read_constant(producer)
            else:
                left[key] = source
    if left:
        part = ov.Model(list(left.values()), [])
        settings = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
        found = ov.Core().compile_model(part, "CPU", settings)([])
        values |= {key: np.array(found[port]) for port, key in enumerate(left)}
    return {key: _in_single(value) for key, value in values.items()}


def _in_single(value: AnyArray) -> AnyArray:
    """Floating values as float32; integers keep their type, which shapes may need."""
    integral = np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_
    return value if integral else value.astype(np.float32)


def _steps(model: ov.Model, fixed: Collection[_Key]) -> list[_Step]:
    """The operators that depend on inputs or trainable constants, in order."""
    known: dict[int, bool] = {}
    nodes = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() not in ("Parameter", "Result") and not is_static(node, known)
    ]
    _complain(node.get_type_name() for node in nodes if node.get_type_name() not in OPERATORS)
    steps = []
    for node in nodes:
        outputs = node.outputs()
        operation = Operation(
            node.get_type_name(),
            node.get_type_info().version_id,
            node.get_attributes(),
            tuple(_shape(output) for output in outputs),
            tuple(_canonical(output.get_element_type()) for output in outputs),
        )
        inputs = tuple(_key(source) for source in node.input_values())
        rule = OPERATORS[operation.kind]
        steps.append(_Step(operation, rule, inputs, tuple(_key(output) for output in outputs)))
    return steps


def _complain(missing: Iterable[str]) -> None:
    names = sorted(set(missing))
    if names:
        raise NotDifferentiable(f"no derivative is known for {', '.join(names)}")


def _shape(output: ov.Output) -> tuple[int, ...]:
    partial = output.get_partial_shape()
    if partial.is_dynamic:
        node = output.get_node()
        raise NotDifferentiable(
            f"the size of {node.get_friendly_name()!r} ({node.get_type_name()}) depends on the data: "
            "the model cannot be differentiated"
        )
    return tuple(int(dim) for dim in partial.to_shape())


def _canonical(kind: ov.Type) -> np.dtype[np.generic]:
    """The type in which JAX holds a tensor."""
    dtype = dtype_of(kind)
    if dtype is None:
        raise NotDifferentiable(f"the model holds tensors of type {kind}, which JAX does not have")
    if kind.is_real():
        return np.dtype(np.float32)
    return np.dtype(f"{dtype.kind}4") if dtype.itemsize == 8 else dtype


def _key(output: ov.Output) -> _Key:
    return output.get_node().get_instance_id(), output.get_index()
