"""Rules of the differentiable engine: arithmetic, activations, reductions; and the registry of all rules.

A rule computes one OpenVINO operator with JAX. Where an operator is not differentiable (rounding to a grid),
its gradient is that of the operator without the rounding, within the grid's range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pot_sparsity.engines.jax_operation import Operand, Operation, Rule, static_axes
from pot_sparsity.engines.jax_shapes import SHAPES
from pot_sparsity.engines.jax_windows import WINDOWS

_Unary: TypeAlias = Callable[[jax.Array], jax.Array]
_Binary: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
_Reduction: TypeAlias = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def _unary(function: _Unary) -> Rule:
    def rule(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
        return function(jnp.asarray(operands[0]))

    return rule


def _binary(function: _Binary) -> Rule:
    def rule(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
        if operation.attributes.get("auto_broadcast", "numpy") not in ("numpy", "none"):
            raise NotImplementedError(f"broadcasting {operation.attributes['auto_broadcast']}")
        return function(jnp.asarray(operands[0]), jnp.asarray(operands[1]))

    return rule


def _reduction(function: _Reduction) -> Rule:
    def rule(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
        x = jnp.asarray(operands[0])
        return function(x, static_axes(operands[1], x.ndim)).reshape(operation.shape)

    return rule


def _root(x: jax.Array) -> jax.Array:
    """Square root whose gradient at 0 is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def _matmul(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    a, b = (jnp.asarray(operand) for operand in operands)
    if operation.attributes["transpose_a"] and a.ndim > 1:
        a = a.swapaxes(-1, -2)
    if operation.attributes["transpose_b"] and b.ndim > 1:
        b = b.swapaxes(-1, -2)
    return jnp.matmul(a, b)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Integers are cut off towards zero, as OpenVINO's CPU plugin does."""
    return a / b if jnp.issubdtype(a.dtype, jnp.floating) else lax.div(*jnp.broadcast_arrays(a, b))


def _power(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    base, exponent = operands
    if isinstance(exponent, np.ndarray) and exponent.size == 1:
        value = float(exponent.reshape(()))
        if value == round(value) and abs(value) <= 8 and operation.shape == base.shape:
            return lax.integer_pow(jnp.asarray(base), round(value))
    return jnp.power(base, exponent)


def _convert(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return jnp.asarray(operands[0]).astype(operation.dtypes[0])


def _prelu(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    """A slope of one dimension belongs to axis 1."""
    x, slope = (jnp.asarray(operand) for operand in operands)
    if slope.ndim == 1 and slope.size > 1 and x.ndim > 1:
        slope = slope.reshape(1, -1, *(1,) * (x.ndim - 2))
    return jnp.where(x < 0, x * slope, x)


def _clamp(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return jnp.clip(jnp.asarray(operands[0]), operation.attributes["min"], operation.attributes["max"])


def _elu(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return jax.nn.elu(operands[0], operation.attributes["alpha"])


def _selu(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x, alpha, factor = operands
    return jnp.asarray(factor) * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0, x)))


def _gelu(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    mode = str(operation.attributes.get("approximation_mode", "ERF")).upper()
    return jax.nn.gelu(operands[0], approximate=mode == "TANH")


def _swish(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    return x * jax.nn.sigmoid(x * operands[1] if len(operands) > 1 else x)


def _hard_sigmoid(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x, alpha, beta = operands
    return jnp.clip(jnp.asarray(alpha) * x + beta, 0, 1)


def _softmax(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return jax.nn.softmax(operands[0], axis=operation.attributes["axis"])


def _log_softmax(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    return jax.nn.log_softmax(operands[0], axis=operation.attributes["axis"])


def _mvn(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    if len(operands) > 1:
        axes = static_axes(operands[1], x.ndim)
    else:
        axes = tuple(range(1 if operation.attributes["across_channels"] else 2, x.ndim))
    centred = x - jnp.mean(x, axes, keepdims=True)
    if not operation.attributes["normalize_variance"]:
        return centred
    eps = operation.attributes["eps"]
    variance = jnp.mean(centred * centred, axes, keepdims=True)
    if str(operation.attributes.get("eps_mode", "INSIDE_SQRT")).upper() == "INSIDE_SQRT":
        return centred * lax.rsqrt(variance + eps)
    return jnp.divide(centred, _root(variance) + eps)


def _batch_norm(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    if operation.version == "opset1":
        gamma, beta, x, mean, variance = operands
    else:
        x, gamma, beta, mean, variance = operands
    shape = (1, -1, *(1,) * (x.ndim - 2))
    scale = gamma * lax.rsqrt(jnp.asarray(variance) + operation.attributes["epsilon"])
    shift = beta - mean * scale
    return jnp.asarray(x) * scale.reshape(shape) + shift.reshape(shape)


def _group_normalization(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x, scale, shift = (jnp.asarray(operand) for operand in operands)
    grouped = x.reshape(x.shape[0], operation.attributes["num_groups"], -1)
    centred = grouped - jnp.mean(grouped, 2, keepdims=True)
    variance = jnp.mean(centred * centred, 2, keepdims=True)
    result = (centred * lax.rsqrt(variance + operation.attributes["epsilon"])).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return result * scale.reshape(shape) + shift.reshape(shape)


def _normalize_l2(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    axes = static_axes(operands[1], x.ndim)
    total = jnp.sum(x * x, axes, keepdims=True) if axes else x * x
    eps = operation.attributes["eps"]
    add = str(operation.attributes["eps_mode"]).lower() == "add"
    return x * lax.rsqrt(total + eps if add else jnp.maximum(total, eps))


def _fake_quantize(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    """Rounded forward; backward as if it were not, with no gradient beyond the input range."""
    x, low, high, out_low, out_high = (jnp.asarray(operand) for operand in operands)
    steps = operation.attributes["levels"] - 1
    inside = jnp.clip(x, jnp.minimum(low, high), jnp.maximum(low, high))
    width = jnp.where(high == low, 1, high - low)
    place = (inside - low) / width * steps
    rounded = place + lax.stop_gradient(jnp.round(place) - place)
    return jnp.add(rounded / steps * (out_high - out_low), out_low)


def _cumulative_sum(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    x = jnp.asarray(operands[0])
    (axis,) = static_axes(operands[1], x.ndim)
    total = lax.cumsum(x, axis, reverse=operation.attributes["reverse"])
    return total - x if operation.attributes["exclusive"] else total


def _select(operation: Operation, operands: Sequence[Operand]) -> jax.Array:
    if operation.attributes.get("auto_broadcast", "numpy") not in ("numpy", "none"):
        raise NotImplementedError(f"broadcasting {operation.attributes['auto_broadcast']}")
    condition, yes, no = operands
    return jnp.where(condition, yes, no)


ELEMENTWISE: dict[str, Rule] = {
    "Abs": _unary(jnp.abs),
    "Ceiling": _unary(jnp.ceil),
    "Cos": _unary(jnp.cos),
    "Erf": _unary(lax.erf),
    "Exp": _unary(jnp.exp),
    "Floor": _unary(jnp.floor),
    "HSigmoid": _unary(lambda x: jnp.clip(x + 3, 0, 6) / 6),
    "HSwish": _unary(lambda x: x * jnp.clip(x + 3, 0, 6) / 6),
    "Log": _unary(jnp.log),
    "LogicalNot": _unary(jnp.logical_not),
    "Mish": _unary(lambda x: x * jnp.tanh(jax.nn.softplus(x))),
    "Negative": _unary(jnp.negative),
    "Relu": _unary(jax.nn.relu),
    "Sigmoid": _unary(jax.nn.sigmoid),
    "Sign": _unary(jnp.sign),
    "Sin": _unary(jnp.sin),
    "SoftPlus": _unary(jax.nn.softplus),
    "SoftSign": _unary(jax.nn.soft_sign),
    "Sqrt": _unary(jnp.sqrt),
    "Tanh": _unary(jnp.tanh),
    "Add": _binary(jnp.add),
    "Divide": _binary(_divide),
    "Equal": _binary(jnp.equal),
    "FloorMod": _binary(jnp.mod),
    "Greater": _binary(jnp.greater),
    "GreaterEqual": _binary(jnp.greater_equal),
    "Less": _binary(jnp.less),
    "LessEqual": _binary(jnp.less_equal),
    "LogicalAnd": _binary(jnp.logical_and),
    "LogicalOr": _binary(jnp.logical_or),
    "LogicalXor": _binary(jnp.logical_xor),
    "Maximum": _binary(jnp.maximum),
    "Minimum": _binary(jnp.minimum),
    "Multiply": _binary(jnp.multiply),
    "NotEqual": _binary(jnp.not_equal),
    "SquaredDifference": _binary(lambda a, b: jnp.square(a - b)),
    "Subtract": _binary(jnp.subtract),
}

REDUCTIONS: dict[str, Rule] = {
    "ReduceL1": _reduction(lambda x, axes: jnp.sum(jnp.abs(x), axes)),
    "ReduceL2": _reduction(lambda x, axes: _root(jnp.sum(x * x, axes))),
    "ReduceMax": _reduction(jnp.max),
    "ReduceMean": _reduction(jnp.mean),
    "ReduceMin": _reduction(jnp.min),
    "ReduceProd": _reduction(jnp.prod),
    "ReduceSum": _reduction(jnp.sum),
}

#: OpenVINO's name of every operator that the differentiable engine knows, and how it is computed.
OPERATORS: dict[str, Rule] = {
    **ELEMENTWISE,
    **REDUCTIONS,
    **SHAPES,
    **WINDOWS,
    "BatchNormInference": _batch_norm,
    "Clamp": _clamp,
    "Convert": _convert,
    "ConvertLike": _convert,
    "CumSum": _cumulative_sum,
    "Elu": _elu,
    "FakeQuantize": _fake_quantize,
    "Gelu": _gelu,
    "GroupNormalization": _group_normalization,
    "HardSigmoid": _hard_sigmoid,
    "LogSoftmax": _log_softmax,
    "MVN": _mvn,
    "MatMul": _matmul,
    "NormalizeL2": _normalize_l2,
    "PRelu": _prelu,
    "Power": _power,
    "Select": _select,
    "Selu": _selu,
    "Softmax": _softmax,
    "Swish": _swish,
}
