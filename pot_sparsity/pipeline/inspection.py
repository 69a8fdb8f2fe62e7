"""Looking at a model: what can be pruned, what cannot, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import openvino as ov

from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.passes import fuse_batchnorm
from pot_sparsity.pipeline.reporting import layer_report, model_spec
from pot_sparsity.report.schema import LayerReport, Left, ModelSpec


@dataclass(frozen=True)
class Inspection:
    """What ``pot-sparsity inspect`` shows.

    Attributes
    ----------
    model
        The model as a whole.
    layers
        Layers that can be pruned.
    skipped, not_fused
        Nodes that cannot be pruned or fused, and why.
    batchnorms_fusable
        Number of BatchNorms that a run would fuse.
    """

    model: ModelSpec
    layers: list[LayerReport]
    skipped: list[Left]
    not_fused: list[Left]
    batchnorms_fusable: int


def inspect(model: str | Path | onnx.ModelProto | ov.Model) -> Inspection:
    """Describe a model; nothing is run or written.

    Raises
    ------
    ModelError
        The model cannot be read.
    """
    original = load_model(model)
    found = find_layers(original.graph)
    fused = original.copy()
    not_fused = fuse_batchnorm(fused)
    return Inspection(
        model_spec(original),
        [layer_report(original, layer) for layer in found.layers],
        [Left(node=item.node, reason=item.reason) for item in found.skipped],
        [Left(node=item.node, reason=item.reason) for item in not_fused],
        sum(1 for edit in fused.edits if edit.kind == "fuse_batchnorm"),
    )
