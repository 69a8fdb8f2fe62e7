"""Judging one model on data, alone or against a dense reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
import openvino as ov

from pot_sparsity.data import DataSource, Preprocess, load_dataset, load_preprocess
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import DataError
from pot_sparsity.graph.load import load_model
from pot_sparsity.metrics import METRICS, get_metric
from pot_sparsity.pipeline.evaluate import Evaluator
from pot_sparsity.pipeline.progress import Progress, Silent
from pot_sparsity.pipeline.reporting import input_specs


def validate(
    model: str | Path | onnx.ModelProto | ov.Model,
    validation: DataSource,
    *,
    reference: str | Path | onnx.ModelProto | ov.Model | None = None,
    metric: str = "top1",
    labels: Path | None = None,
    split: str | None = None,
    preprocess: Preprocess | Mapping[str, Any] | str | Path | None = None,
    samples: int | None = None,
    engine: Literal["openvino", "onnxruntime"] = "openvino",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Label metrics where there are labels; agreement, KL and SQNR where there is a reference.

    Raises
    ------
    UserError
        Model or data cannot be used, or there is neither a label nor a reference to judge by.
    """
    get_metric(metric)
    candidate = load_model(model)
    dense = candidate if reference is None else load_model(reference)
    dataset = load_dataset(
        validation,
        input_specs(candidate),
        load_preprocess(preprocess),
        labels=labels,
        split=split,
        samples=samples,
    )
    if reference is None and not dataset.has_labels:
        raise DataError("there is nothing to judge by: give labels, or the dense model with --reference")
    evaluator = Evaluator(
        get_engine(engine, threads=threads),
        dataset,
        dense,
        tuple(dict.fromkeys((metric, *METRICS))),
        64,
        progress or Silent(),
        "Validating",
    )
    try:
        if reference is None:
            return {name: value for name, value in evaluator.dense.metrics.items() if name in METRICS}
        return evaluator(candidate, exact=False).metrics
    finally:
        evaluator.close()
