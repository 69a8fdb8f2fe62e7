"""ONNX Runtime's CPU execution provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.engines.batching import BatchedExecutable, reason
from pot_sparsity.errors import ModelError, UserError
from pot_sparsity.graph.graph import TensorInfo
from pot_sparsity.graph.model import Runnable

_QUIET = 4
#: Keeps operators between quantizers in float32; else ONNX Runtime rounds their biases, too, or inputs of its own.
_IN_FLOAT = "session.disable_quant_qdq"
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeEngine:
    """Compiles ONNX models for this machine's CPU; computes in the model's own types.

    Parameters
    ----------
    threads
        Number of threads per inference; None leaves it to ONNX Runtime.
    """

    name = "onnxruntime"

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or 0

    def compile(self, runnable: Runnable, *, exact: bool = True) -> BatchedExecutable:
        """Compile a model; ``exact`` computes in float32 what stands between quantizers.

        Raises
        ------
        UserError
            The model is an OpenVINO model.
        ModelError
            ONNX Runtime cannot read or compile the model.
        """
        model = runnable.model
        if not isinstance(model, (bytes, Path)):
            raise UserError(
                "--engine onnxruntime runs ONNX models only: use --engine openvino for this model"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = _QUIET
        if exact:
            options.add_session_config_entry(_IN_FLOAT, "1")
        try:
            session = onnxruntime.InferenceSession(
                str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions derive from Exception alone
            raise ModelError(f"ONNX Runtime cannot run the model: {reason(error)}") from error
        found = (len(session.get_inputs()), len(session.get_outputs()))
        if found != (len(runnable.inputs), len(runnable.outputs)):
            raise ModelError(
                f"ONNX Runtime sees {found[0]} inputs and {found[1]} outputs where the model has "
                f"{len(runnable.inputs)} and {len(runnable.outputs)}: try --engine openvino"
            )
        keys = [entry.name for entry in session.get_inputs()]
        ports = tuple(
            TensorInfo(
                name, _shape(entry.shape), np.dtype(_TYPES[entry.type]) if entry.type in _TYPES else None
            )
            for name, entry in zip(runnable.inputs, session.get_inputs(), strict=True)
        )

        def infer(arrays: Sequence[AnyArray]) -> list[AnyArray]:
            return [np.asarray(value) for value in session.run(None, dict(zip(keys, arrays, strict=True)))]

        return BatchedExecutable(ports, runnable.outputs, infer)


def _shape(shape: Sequence[int | str | None] | None) -> tuple[int | None, ...] | None:
    """ONNX Runtime's shape: unknown rank and rank 0 are both empty there, free sizes are words or None."""
    if not shape:
        return None
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in shape)
