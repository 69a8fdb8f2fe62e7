"""INT8 through NNCF: places quantizers in a prepared model and proves that every zero stayed a zero.

NNCF must see a graph whose BatchNorms are fused and whose weights are direct constants: on a Reshape before
a depthwise weight it scales along the wrong axes, which can cost tens of points.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from itertools import islice

import nncf
import numpy as np
import onnx
import onnxruntime
import openvino as ov
from nncf.common.logging import nncf_logger
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet

# The same entry point as nncf uses; there is no public one.
from openvino._offline_transformations import apply_moc_transformations

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.onnxruntime_engine import OnnxRuntimeEngine
from pot_sparsity.errors import ModelError, PotSparsityError, UserError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.openvino_model import reason
from pot_sparsity.graph.openvino_nodes import settle_names
from pot_sparsity.graph.passes import fold_weight_chains
from pot_sparsity.graph.weights import read_weight
from pot_sparsity.recipe import QuantizationSettings

log = logging.getLogger(__name__)

#: What OpenVINO appends to the name of an ONNX layer whose bias it makes an operator of its own.
_SPLIT = "/WithoutBiases"
_PRESETS = {"mixed": nncf.QuantizationPreset.MIXED, "performance": nncf.QuantizationPreset.PERFORMANCE}
_RANGES = {"minmax": RangeEstimatorParametersSet.MINMAX, "histogram": RangeEstimatorParametersSet.HISTOGRAM}


def quantize(
    model: Model,
    dataset: Dataset,
    settings: QuantizationSettings,
    *,
    ignored_scope: nncf.IgnoredScope | None = None,
) -> Model:
    """Quantize weights (symmetric, per channel) and activations to INT8.

    Parameters
    ----------
    model
        Prepared model, BatchNorm fused; not changed.
    dataset
        Calibration samples; the first ``settings.samples`` are used.
    settings
        Preset and NNCF's own options; ``auto`` is NNCF's default here.
    ignored_scope
        Operators NNCF leaves in floating point.

    Raises
    ------
    ModelError
        NNCF cannot quantize this model.
    """
    folded = model.copy()
    fold_weight_chains(folded)
    native = _quantized(folded, dataset, settings, ignored_scope, None)
    if isinstance(native, onnx.ModelProto) and not _runs(native, folded, dataset):
        log.warning(
            "ONNX Runtime cannot run depthwise layers with a scale per input channel behind ReLU: "
            "activations get one scale per tensor"
        )
        native = _quantized(
            folded, dataset, settings, ignored_scope, QuantizationParameters(per_channel=False)
        )
    result = load_model(native)
    result.source = model.source
    result.edits = list(folded.edits)
    return result


def _quantized(
    folded: Model,
    dataset: Dataset,
    settings: QuantizationSettings,
    ignored_scope: nncf.IgnoredScope | None,
    activations: QuantizationParameters | None,
) -> onnx.ModelProto | ov.Model:
    size = folded.batch_size or 1
    steps = max(1, min(settings.samples, len(dataset)) // size)
    with _quiet():
        try:
            return nncf.quantize(
                folded.native,
                nncf.Dataset(_Samples(folded, dataset, size, steps)),
                preset=_PRESETS[settings.preset],
                subset_size=steps,
                fast_bias_correction=settings.bias_correction != "full",
                ignored_scope=ignored_scope,
                advanced_parameters=AdvancedQuantizationParameters(
                    activations_quantization_params=activations,
                    activations_range_estimator_params=_RANGES.get(
                        settings.ranges, RangeEstimatorParameters()
                    ),
                ),
            )
        except Exception as error:  # NNCF lets through whatever its backends and their runtimes raise
            text = str(error).strip()
            why = text.splitlines()[0] if text else type(error).__name__
            raise ModelError(f"NNCF cannot quantize this model ({why}); run with --no-int8") from error


def _runs(native: onnx.ModelProto, folded: Model, dataset: Dataset) -> bool:
    """Whether ONNX Runtime can run a quantized model that it could run before."""
    batch = next(iter(dataset.batches(folded.batch_size or 1)))
    engine = OnnxRuntimeEngine()
    for model in (load_model(native), folded):
        try:
            executable = engine.compile(model.extract(), exact=False)
            executable.run(
                dict(zip(executable.inputs, (batch.inputs[n] for n in model.input_names), strict=True))
            )
        except UserError:
            continue
        return model is not folded
    return True


def lost_zeros(sparse: Model, quantized: Model) -> dict[str, int]:
    """Weights that are zero in ``sparse`` and not in ``quantized``, by layer; empty when every zero survived.

    Raises
    ------
    PotSparsityError
        A layer of the sparse model cannot be found in the quantized one.
    """
    after = {layer.name: layer for layer in find_layers(quantized.graph).layers}
    lost: dict[str, int] = {}
    for layer in find_layers(sparse.graph).layers:
        before = read_weight(sparse, layer)
        if not (before == 0.0).any():
            continue
        if layer.name not in after:
            raise PotSparsityError(f"layer {layer.name!r} is not to be found in the quantized model")
        number = int(np.count_nonzero(read_weight(quantized, after[layer.name])[before == 0.0]))
        if number:
            lost[layer.name] = number
    return lost


class _Samples:
    """Feeds NNCF batch by batch; both of its backends accept inputs by name, OpenVINO's by position too."""

    def __init__(self, model: Model, dataset: Dataset, size: int, steps: int) -> None:
        self._names = model.input_names
        self._by_name = isinstance(model.native, onnx.ModelProto)
        self._dataset = dataset
        self._size = size
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[dict[str | int, AnyArray]]:
        for batch in islice(self._dataset.batches(self._size), self._steps):
            if batch.size == self._size:
                yield {
                    (name if self._by_name else index): batch.inputs[name]
                    for index, name in enumerate(self._names)
                }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence NNCF's bars and notices; warnings of the libraries below it are not the user's business."""
    level = nncf_logger.level
    nncf_logger.setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        nncf_logger.setLevel(level)
        onnxruntime.set_default_logger_severity(2)


def convert_to_openvino(model: Model) -> Model:
    """The same model as OpenVINO IR, with BatchNorm fused by OpenVINO's own passes; layers keep their names.

    Raises
    ------
    ModelError
        OpenVINO cannot read the model.
    """
    native = model.native
    if isinstance(native, ov.Model):
        return model
    content = native.SerializeToString()
    converted = _read_onnx(content)
    settle_names(converted, _read_onnx(content))
    operators = {op.get_friendly_name(): op for op in converted.get_ops()}
    for name, op in operators.items():
        layer = name.removesuffix(_SPLIT)
        if layer != name:
            if layer in operators:
                operators[layer].set_friendly_name(f"{layer}/Bias")
            op.set_friendly_name(layer)
    result = load_model(converted)
    result.source = model.source
    result.edits = list(model.edits)
    return result


def _read_onnx(content: bytes) -> ov.Model:
    try:
        model = ov.Core().read_model(io.BytesIO(content))
        apply_moc_transformations(model, cf=False)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot convert this model: {reason(error)}") from error
    return model
