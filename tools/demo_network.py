"""The demo network in numpy: forward, backward and ONNX export of each of its pieces.

Used by ``train_demo_model.py``. Activations are [samples, height, width, channels] here; the exported graph
is in ONNX's channels-first order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[np.float32]

EPSILON = 1e-5


@dataclass
class Parameter:
    """A trained array, its gradient and Adam's two moments."""

    value: Array
    decay: bool = False
    gradient: Array = field(init=False)
    first: Array = field(init=False)
    second: Array = field(init=False)

    def __post_init__(self) -> None:
        self.gradient = np.zeros_like(self.value)
        self.first = np.zeros_like(self.value)
        self.second = np.zeros_like(self.value)


@dataclass
class Exporter:
    """Collects the nodes and initializers of the exported graph."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, value: Array) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        output = f"{name}_output"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output


class Module(Protocol):
    """A piece of the network."""

    def parameters(self) -> list[Parameter]: ...

    def forward(self, x: Array, training: bool) -> Array: ...

    def backward(self, gradient: Array) -> Array: ...

    def export(self, to: Exporter, source: str) -> str: ...


def patches(x: Array, kernel: int) -> Array:
    """Zero-padded neighbourhoods as rows: [samples * height * width, kernel**2 * channels]."""
    n, height, width, channels = x.shape
    if kernel == 1:
        return x.reshape(-1, channels)
    pad = kernel // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(kernel) for j in range(kernel)]
    return np.concatenate(shifts, axis=3).reshape(n * height * width, kernel * kernel * channels)


class Conv:
    """Convolution of stride 1 with "same" padding and no bias; the weight is [kernel**2, inputs, outputs]."""

    def __init__(self, name: str, inputs: int, outputs: int, kernel: int, rng: np.random.Generator) -> None:
        self.name, self.kernel = name, kernel
        taps = kernel * kernel
        scale = np.sqrt(2.0 / (taps * inputs))
        self.weight = Parameter(
            rng.normal(0.0, scale, (taps, inputs, outputs)).astype(np.float32), decay=True
        )
        self._rows: Array = np.zeros((0, 0), np.float32)

    def parameters(self) -> list[Parameter]:
        return [self.weight]

    def forward(self, x: Array, training: bool) -> Array:
        rows = patches(x, self.kernel)
        self._rows = rows if training else self._rows
        outputs = self.weight.value.shape[2]
        return (rows @ self.weight.value.reshape(-1, outputs)).reshape(*x.shape[:3], outputs)

    def backward(self, gradient: Array) -> Array:
        _, inputs, outputs = self.weight.value.shape
        self.weight.gradient = (self._rows.T @ gradient.reshape(-1, outputs)).reshape(self.weight.value.shape)
        turned = self.weight.value[::-1].transpose(0, 2, 1).reshape(-1, inputs)
        return (patches(gradient, self.kernel) @ turned).reshape(*gradient.shape[:3], inputs)

    def export(self, to: Exporter, source: str) -> str:
        _, inputs, outputs = self.weight.value.shape
        kernel = self.kernel
        weight = self.weight.value.reshape(kernel, kernel, inputs, outputs).transpose(3, 2, 0, 1)
        constant = to.constant(f"{self.name}_weight", weight)
        shape, pads = [kernel, kernel], [kernel // 2] * 4
        return to.node("Conv", [source, constant], self.name, kernel_shape=shape, pads=pads)


class Depthwise:
    """Depthwise 3x3 convolution of stride 2 with padding 1 and no bias; the weight is [9, channels]."""

    def __init__(self, name: str, channels: int, rng: np.random.Generator) -> None:
        self.name = name
        self.weight = Parameter(
            rng.normal(0.0, np.sqrt(2.0 / 9), (9, channels)).astype(np.float32), decay=True
        )
        self._padded: Array = np.zeros((0, 0, 0, 0), np.float32)

    def parameters(self) -> list[Parameter]:
        return [self.weight]

    def forward(self, x: Array, training: bool) -> Array:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        self._padded = padded if training else self._padded
        height, width = x.shape[1], x.shape[2]
        taps = (self._tap(padded, t, height, width) * self.weight.value[t] for t in range(9))
        return np.asarray(sum(taps), np.float32)

    def backward(self, gradient: Array) -> Array:
        result = np.zeros_like(self._padded)
        height, width = result.shape[1] - 2, result.shape[2] - 2
        for t in range(9):
            tap = self._tap(self._padded, t, height, width)
            self.weight.gradient[t] = np.einsum("nhwc,nhwc->c", tap, gradient)
            self._tap(result, t, height, width)[...] += gradient * self.weight.value[t]
        return result[:, 1:-1, 1:-1]

    def export(self, to: Exporter, source: str) -> str:
        channels = self.weight.value.shape[1]
        weight = to.constant(f"{self.name}_weight", self.weight.value.T.reshape(channels, 1, 3, 3))
        attributes = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2], "group": channels}
        return to.node("Conv", [source, weight], self.name, **attributes)

    @staticmethod
    def _tap(padded: Array, tap: int, height: int, width: int) -> Array:
        i, j = divmod(tap, 3)
        return padded[:, i : i + height : 2, j : j + width : 2]


class BatchNorm:
    """Batch normalization over all axes but the last, with running statistics for inference."""

    def __init__(self, name: str, channels: int, momentum: float = 0.1) -> None:
        self.name, self.momentum = name, momentum
        self.gamma = Parameter(np.ones(channels, np.float32))
        self.beta = Parameter(np.zeros(channels, np.float32))
        self.mean = np.zeros(channels, np.float32)
        self.variance = np.ones(channels, np.float32)
        self._normal: Array = np.zeros((0, channels), np.float32)
        self._inverse: Array = np.ones(channels, np.float32)

    def parameters(self) -> list[Parameter]:
        return [self.gamma, self.beta]

    def forward(self, x: Array, training: bool) -> Array:
        if not training:
            inverse = self.gamma.value / np.sqrt(self.variance + np.float32(EPSILON))
            return np.asarray(x * inverse + (self.beta.value - self.mean * inverse))
        axes = tuple(range(x.ndim - 1))
        mean = np.asarray(x.mean(axes))
        variance = np.asarray(x.var(axes))
        count = x.size // x.shape[-1]
        self.mean = self._blend(self.mean, mean)
        self.variance = self._blend(self.variance, variance * (count / (count - 1)))
        self._inverse = (1.0 / np.sqrt(variance + EPSILON)).astype(np.float32)
        self._normal = (x - mean) * self._inverse
        return np.asarray(self._normal * self.gamma.value + self.beta.value)

    def backward(self, gradient: Array) -> Array:
        axes = tuple(range(gradient.ndim - 1))
        self.beta.gradient = np.asarray(gradient.sum(axes))
        self.gamma.gradient = np.asarray((gradient * self._normal).sum(axes))
        count = np.float32(gradient.size // gradient.shape[-1])
        centred = gradient - self.beta.gradient / count - self._normal * (self.gamma.gradient / count)
        return np.asarray(centred * (self.gamma.value * self._inverse))

    def export(self, to: Exporter, source: str) -> str:
        values = {
            "scale": self.gamma.value,
            "bias": self.beta.value,
            "mean": self.mean,
            "variance": self.variance,
        }
        constants = [to.constant(f"{self.name}_{key}", value) for key, value in values.items()]
        return to.node("BatchNormalization", [source, *constants], self.name, epsilon=EPSILON)

    def _blend(self, running: Array, batch: Array) -> Array:
        return np.asarray((1 - self.momentum) * running + self.momentum * batch, np.float32)


class Relu:
    """Rectifier."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def parameters(self) -> list[Parameter]:
        return []

    def forward(self, x: Array, training: bool) -> Array:
        self._open = x > 0
        return np.maximum(x, np.float32(0))

    def backward(self, gradient: Array) -> Array:
        return gradient * self._open

    def export(self, to: Exporter, source: str) -> str:
        return to.node("Relu", [source], self.name)


class Chain:
    """Modules one after the other; with ``residual`` the input is added to the output."""

    def __init__(self, name: str, modules: Sequence[Module], residual: bool = False) -> None:
        self.name, self.modules, self.residual = name, modules, residual

    def parameters(self) -> list[Parameter]:
        return [parameter for module in self.modules for parameter in module.parameters()]

    def forward(self, x: Array, training: bool) -> Array:
        result = x
        for module in self.modules:
            result = module.forward(result, training)
        return result + x if self.residual else result

    def backward(self, gradient: Array) -> Array:
        result = gradient
        for module in reversed(self.modules):
            result = module.backward(result)
        return result + gradient if self.residual else result

    def export(self, to: Exporter, source: str) -> str:
        result = source
        for module in self.modules:
            result = module.export(to, result)
        return to.node("Add", [result, source], f"{self.name}/add") if self.residual else result


class Head:
    """Mean over positions, then a linear layer; the weight is [inputs, classes]."""

    def __init__(self, name: str, inputs: int, classes: int, rng: np.random.Generator) -> None:
        self.name = name
        weight = rng.normal(0.0, np.sqrt(1.0 / inputs), (inputs, classes)).astype(np.float32)
        self.weight = Parameter(weight, decay=True)
        self.bias = Parameter(np.zeros(classes, np.float32))
        self._pooled: Array = np.zeros((0, inputs), np.float32)
        self._shape: tuple[int, ...] = ()

    def parameters(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def forward(self, x: Array, training: bool) -> Array:
        self._shape = x.shape
        self._pooled = np.asarray(x.mean((1, 2)))
        return self._pooled @ self.weight.value + self.bias.value

    def backward(self, gradient: Array) -> Array:
        self.weight.gradient = self._pooled.T @ gradient
        self.bias.gradient = np.asarray(gradient.sum(0))
        positions = np.float32(self._shape[1] * self._shape[2])
        spread = (gradient @ self.weight.value.T)[:, None, None, :] / positions
        return np.asarray(np.broadcast_to(spread, self._shape))

    def export(self, to: Exporter, source: str) -> str:
        pooled = to.node("GlobalAveragePool", [source], f"{self.name}/pool")
        flat = to.node("Flatten", [pooled], f"{self.name}/flatten", axis=1)
        weight = to.constant(f"{self.name}/linear_weight", self.weight.value.T)
        bias = to.constant(f"{self.name}/linear_bias", self.bias.value)
        return to.node("Gemm", [flat, weight, bias], f"{self.name}/linear", transB=1)


def build_network(rng: np.random.Generator, channels: int = 48, wide: int = 256) -> Chain:
    """The demo network: [n, 8, 8, 1] pixels in 0..1 to [n, 10] logits."""

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> list[Module]:
        return [Conv(f"{name}/conv", inputs, outputs, kernel, rng), BatchNorm(f"{name}/bn", outputs)]

    block = [
        *conv("block/1", channels, channels, 3),
        Relu("block/1/relu"),
        *conv("block/2", channels, channels, 3),
    ]
    modules: list[Module] = [
        *conv("stem", 1, channels, 3),
        Relu("stem/relu"),
        Chain("block", block, residual=True),
        Relu("block/relu"),
        Depthwise("depthwise/conv", channels, rng),
        BatchNorm("depthwise/bn", channels),
        Relu("depthwise/relu"),
        *conv("pointwise", channels, wide, 1),
        Relu("pointwise/relu"),
        Head("head", wide, 10, rng),
    ]
    return Chain("digits_cnn", modules)
