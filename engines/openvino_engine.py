"""OpenVINO's CPU plugin."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import openvino as ov

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.engines.batching import BatchedExecutable, reason
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.graph import TensorInfo
from pot_sparsity.graph.model import Runnable


class OpenVinoEngine:
    """Compiles ONNX and OpenVINO models for this machine's CPU; caches nothing on disk.

    Parameters
    ----------
    threads
        Number of threads per inference; None leaves it to OpenVINO.
    """

    name = "openvino"

    def __init__(self, threads: int | None = None) -> None:
        self._core = ov.Core()
        self._settings: dict[str, str] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = str(threads)

    def compile(self, runnable: Runnable, *, exact: bool = True) -> BatchedExecutable:
        """Compile a model.

        Parameters
        ----------
        runnable
            Serialized ONNX, the path of an ONNX file, or an ``openvino.Model``, which is not changed.
        exact
            Compute in float32. Otherwise the plugin chooses, as in a deployment (bfloat16 on some CPUs).

        Raises
        ------
        ModelError
            OpenVINO cannot read or compile the model.
        """
        settings = dict(self._settings)
        if exact:
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
        try:
            compiled = self._core.compile_model(read(self._core, runnable), "CPU", settings)
        except Exception as error:  # the plugin documents no exception types
            raise ModelError(f"OpenVINO cannot run the model: {reason(error)}") from error
        found = (len(compiled.inputs), len(compiled.outputs))
        if found != (len(runnable.inputs), len(runnable.outputs)):
            raise ModelError(
                f"OpenVINO sees {found[0]} inputs and {found[1]} outputs where the model has "
                f"{len(runnable.inputs)} and {len(runnable.outputs)}: try --engine onnxruntime"
            )
        ports = tuple(_port(name, port) for name, port in zip(runnable.inputs, compiled.inputs, strict=True))
        request = compiled.create_infer_request()

        def infer(arrays: Sequence[AnyArray]) -> list[AnyArray]:
            results = request.infer(dict(enumerate(arrays)), share_inputs=False, share_outputs=False)
            return [np.asarray(results[port]) for port in compiled.outputs]

        return BatchedExecutable(ports, runnable.outputs, infer)


def read(core: ov.Core, runnable: Runnable) -> ov.Model:
    """The model that OpenVINO reads from a runnable, or the runnable's own; raises whatever the frontend raises."""
    model = runnable.model
    if isinstance(model, ov.Model):
        return model
    return core.read_model(io.BytesIO(model) if isinstance(model, bytes) else model)


def _port(name: str, port: ov.ConstOutput) -> TensorInfo:
    partial = port.get_partial_shape()
    shape = None
    if not partial.rank.is_dynamic:
        shape = tuple(int(dim.get_length()) if dim.is_static else None for dim in partial)
    kind = port.get_element_type()
    numeric = kind.is_real() or kind.is_integral_number() or kind == ov.Type.boolean
    return TensorInfo(name, shape, np.dtype(kind.to_dtype()) if numeric else None)
