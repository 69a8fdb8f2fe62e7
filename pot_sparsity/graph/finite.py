"""NaN and infinite weights, which no statistic survives."""

from __future__ import annotations

import numpy as np

from pot_sparsity.errors import ModelError
from pot_sparsity.graph.model import Model

_LAYERS = ("Convolution", "ConvolutionTranspose", "MatMul", "BatchNormalization")
_CHAIN = ("Identity", "Convert", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "DequantizeLinear")


def check_finite(model: Model) -> None:
    """Raise ModelError if a constant operand of a layer or BatchNormalization is NaN or infinite.

    Constants elsewhere may be infinite: attention masks are.
    """
    graph = model.graph
    seen: set[str] = set()
    pending = [tensor for node in graph if node.op in _LAYERS for tensor in node.inputs]
    while pending:
        tensor = pending.pop()
        producer = graph.producer(tensor)
        if tensor in seen or producer is None:
            continue
        seen.add(tensor)
        if producer.op in _CHAIN:
            pending.extend(producer.inputs)
        elif graph.is_constant(tensor) and (dtype := graph.tensor(tensor).dtype) is not None:
            if dtype.kind in "iub":
                continue
            value = graph.value(tensor)
            plain = value if dtype.kind == "f" else value.astype(np.float32)
            bad = value.size - int(np.count_nonzero(np.isfinite(plain)))
            if bad:
                where = f"{model.source}: " if model.source is not None else ""
                raise ModelError(
                    f"{where}weight {tensor!r} holds {bad} NaN or infinite values: "
                    "repair it or export the model again"
                )
