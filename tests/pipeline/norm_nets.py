"""Networks with normalizations that stay in the graph: LayerNorm as one operator or many, RMSNorm, in both formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from pot_sparsity.algorithms.arrays import AnyArray, Float32
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from tests.pipeline.nets import node, normal, proto, to_ir

WIDTH, LENGTH = 8, 6


def tokens(count: int, seed: int = 0) -> Float32:
    mixed = normal(200 + seed, count, LENGTH, WIDTH) @ normal(210, WIDTH, WIDTH, scale=0.6)
    return np.asarray(mixed + 0.3, np.float32)


def operator(data: str, name: str, scale: str, shift: str) -> list[onnx.NodeProto]:
    return [node("LayerNormalization", [data, scale, shift], name, axis=-1, epsilon=1e-5)]


def decomposed(data: str, name: str, scale: str, shift: str) -> list[onnx.NodeProto]:
    return [
        node("ReduceMean", [data], f"{name}_mean", axes=[-1]),
        node("Sub", [data, f"{name}_mean"], f"{name}_centred"),
        node("Pow", [f"{name}_centred", "two"], f"{name}_squares"),
        node("ReduceMean", [f"{name}_squares"], f"{name}_variance", axes=[-1]),
        node("Add", [f"{name}_variance", "epsilon"], f"{name}_above"),
        node("Sqrt", [f"{name}_above"], f"{name}_deviation"),
        node("Div", [f"{name}_centred", f"{name}_deviation"], f"{name}_normalized"),
        node("Mul", [scale, f"{name}_normalized"], f"{name}_scaled"),
        node("Add", [f"{name}_scaled", shift], name),
    ]


def rms(data: str, name: str, scale: str, shift: str) -> list[onnx.NodeProto]:
    """Root mean square only, no shift; multiplied by a reciprocal."""
    return [
        node("Mul", [data, data], f"{name}_squares"),
        node("ReduceMean", [f"{name}_squares"], f"{name}_power", axes=[-1]),
        node("Add", [f"{name}_power", "epsilon"], f"{name}_above"),
        node("Sqrt", [f"{name}_above"], f"{name}_root"),
        node("Reciprocal", [f"{name}_root"], f"{name}_inverse"),
        node("Mul", [data, f"{name}_inverse"], f"{name}_normalized"),
        node("Mul", [f"{name}_normalized", scale], name),
    ]


Form = Callable[[str, str, str, str], list[onnx.NodeProto]]


def norm_net(form: Form) -> onnx.ModelProto:
    """Two blocks of a matrix product, a residual sum and a normalization, then a head."""
    constants: dict[str, AnyArray] = {
        "two": np.asarray(2.0, np.float32),
        "epsilon": np.asarray(1e-5, np.float32),
        "head": normal(220, WIDTH, 5, scale=0.5),
        "head_bias": normal(221, 5, scale=0.1),
    }
    nodes, last = [], "x"
    for index in (1, 2):
        constants |= {
            f"w{index}": normal(222 + index, WIDTH, WIDTH, scale=0.5),
            f"b{index}": normal(225 + index, WIDTH, scale=0.3),
            f"scale{index}": np.asarray(1 + normal(228 + index, WIDTH, scale=0.2), np.float32),
            f"shift{index}": normal(231 + index, WIDTH, scale=0.2),
        }
        nodes += [
            node("MatMul", [last, f"w{index}"], f"product{index}"),
            node("Add", [f"product{index}", f"b{index}"], f"biased{index}"),
            node("Relu", [f"biased{index}"], f"relu{index}"),
            node("Add", [f"relu{index}", last], f"sum{index}"),
            *form(f"sum{index}", f"norm{index}", f"scale{index}", f"shift{index}"),
        ]
        last = f"norm{index}"
    nodes += [node("MatMul", [last, "head"], "scores"), node("Add", ["scores", "head_bias"], "y")]
    used = {name for item in nodes for name in item.input}
    chosen = {name: value for name, value in constants.items() if name in used}
    return proto(nodes, chosen, ["n", LENGTH, WIDTH])


FORMS: dict[str, Form] = {"operator": operator, "decomposed": decomposed, "rms": rms}
#: How each is written: ONNX, OpenVINO IR in float32, and with its constants in float16.
KINDS = [f"{form} {kind}" for form in FORMS for kind in ("onnx", "ir", "half")]


def load_kind(kind: str, folder: Path) -> Model:
    form, storage = kind.split()
    source = norm_net(FORMS[form])
    if storage == "onnx":
        return load_model(source)
    return load_model(to_ir(source, folder / "net.xml", half=storage == "half"))
