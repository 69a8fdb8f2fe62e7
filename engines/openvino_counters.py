"""OpenVINO's performance counters: how long each operator of a model takes on this machine's CPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.engines.batching import reason
from pot_sparsity.engines.openvino_engine import read
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.model import Runnable


class CountedModel:
    """A model compiled as a deployment would run it, with counters on.

    Parameters
    ----------
    runnable
        Serialized ONNX, the path of an ONNX file, or an ``openvino.Model``, which is not changed.
    threads
        Number of threads per inference.

    Raises
    ------
    ModelError
        OpenVINO cannot read or compile the model.
    """

    def __init__(self, runnable: Runnable, threads: int) -> None:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "PERF_COUNT": "YES",
        }
        core = ov.Core()
        try:
            compiled = core.compile_model(read(core, runnable), "CPU", settings)
        except Exception as error:  # the plugin documents no exception types
            raise ModelError(f"OpenVINO cannot run the model: {reason(error)}") from error
        types = [np.dtype(port.get_element_type().to_dtype()) for port in compiled.inputs]
        self._inputs = tuple(zip(runnable.inputs, types, strict=True))
        self._request = compiled.create_infer_request()
        self._runs = 0
        self._origins = {
            node.get_friendly_name(): _origins(node) for node in compiled.get_runtime_model().get_ops()
        }
        self._totals: dict[str, float] = {}

    def run(self, feeds: Mapping[str, AnyArray], runs: int) -> dict[tuple[str, ...], float]:
        """Mean seconds over ``runs`` inferences by operator executed: the names of the model's operators it stands for.

        Operators fused into one share its time; what the plugin inserts (changes of layout) stands for none. The
        plugin's counters hold the mean over all inferences so far in whole microseconds, so the resolution is about a
        microsecond where ``runs`` are as many as all before.
        """
        arrays = [np.asarray(feeds[name], kind) for name, kind in self._inputs]
        for _ in range(runs):
            self._request.infer(arrays)
        self._runs += runs
        seconds: dict[tuple[str, ...], float] = {}
        for entry in self._request.profiling_info:
            total = entry.real_time.total_seconds() * self._runs
            mean = max(0.0, total - self._totals.get(entry.node_name, 0.0)) / runs
            self._totals[entry.node_name] = total
            names = self._origins.get(entry.node_name, ())
            seconds[names] = seconds.get(names, 0.0) + mean
        return seconds


def _origins(node: ov.Node) -> tuple[str, ...]:
    info = node.get_rt_info()
    if "originalLayersNames" not in info:
        return ()
    return tuple(name for name in info["originalLayersNames"].astype(str).split(",") if name)
