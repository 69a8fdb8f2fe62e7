"""From a loaded model to one whose layers can be rewritten: fuse BatchNorm, add biases, list the layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import nncf
import numpy as np

from pot_sparsity.algorithms.allocation import LayerWeights
from pot_sparsity.algorithms.arrays import ConvGeometry, Float64, Pattern
from pot_sparsity.algorithms.correction import FusedBatchNorm
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine
from pot_sparsity.errors import ModelError, RecipeError
from pot_sparsity.graph.discovery import Skipped, find_layers
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.passes import NotFused, add_missing_biases, fuse_batchnorm
from pot_sparsity.pipeline.evaluate import feeds
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.recipe import Recipe

#: Largest relative L2 difference between the outputs before and after fusing.
EQUIVALENCE = 1e-4
#: A sparsity this near to that of an n:m pattern was meant to be it (0.667 for 1:3).
ROUNDED = 1e-3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model ready for pruning.

    Attributes
    ----------
    model
        BatchNorm fused and biases added, unless the structure is to be kept.
    layers
        Layers that take part.
    ignored
        Reason by name of the layers left dense on request.
    ignored_layers
        Those layers.
    skipped, not_fused
        Nodes that cannot be pruned or fused, and why.
    difference
        Relative L2 difference of the outputs before and after the structural edits.
    batch_norms
        The BatchNormalization that layers have absorbed, by layer name.
    gains
        Factors ``[groups, rows]`` that fusing has multiplied weights by, by layer name.
    """

    model: Model
    layers: tuple[Layer, ...]
    ignored_layers: tuple[Layer, ...]
    ignored: dict[str, str]
    skipped: tuple[Skipped, ...]
    not_fused: tuple[NotFused, ...]
    difference: float = 0.0
    warnings: tuple[str, ...] = field(default=())
    batch_norms: Mapping[str, FusedBatchNorm] = field(default_factory=dict)
    gains: Mapping[str, Float64] = field(default_factory=dict)


def prepare(
    original: Model,
    recipe: Recipe,
    engine: Engine,
    samples: Dataset,
    *,
    ignored_scope: nncf.IgnoredScope | None,
    keep_structure: bool,
) -> Prepared:
    """Copy the model, make the structural edits that are allowed and list its layers.

    Raises
    ------
    ModelError
        There is nothing to compress.
    RecipeError
        An ignored name that no layer has, or a regular expression that is none.
    """
    model = original.copy()
    warnings = _without_effect(recipe)
    not_fused: tuple[NotFused, ...] = ()
    batch_norms: dict[str, FusedBatchNorm] = {}
    gains: dict[str, Float64] = {}
    difference = 0.0
    if keep_structure:
        if any(node.op == "BatchNormalization" for node in model.graph):
            warnings.append(
                "--keep-structure leaves BatchNorm unfused: allocation by weight magnitude and INT8 both lose accuracy"
            )
    else:
        not_fused = tuple(fuse_batchnorm(model, batch_norms, gains))
        if model.edits:
            difference = output_difference(original, model, engine, samples)
            if not difference <= EQUIVALENCE:
                warnings.append(
                    f"fusing BatchNorm changed the output by {difference:.1e} (relative L2, limit {EQUIVALENCE:.0e}): "
                    "the BatchNorms are kept"
                )
                model, not_fused, difference = original.copy(), (), 0.0
                batch_norms, gains = {}, {}
    found = find_layers(model.graph)
    layers, ignored_layers, ignored = _divide(model, found.layers, recipe, ignored_scope)
    if not layers:
        reasons = "; ".join(f"{item.node}: {item.reason}" for item in found.skipped[:3])
        raise ModelError(
            "the model has no layer to compress (Convolution, MatMul or Gemm with a constant floating-point weight"
            + (f" that is not ignored; {reasons})" if reasons or ignored else ")")
        )
    if recipe.correction.bias and not keep_structure:
        add_missing_biases(model, layers)
        kept = {layer.name for layer in layers}
        layers = tuple(layer for layer in find_layers(model.graph).layers if layer.name in kept)
    batch_norms = {layer.name: batch_norms[layer.name] for layer in layers if layer.name in batch_norms}
    if recipe.correction.batch_norm == "reestimate" and not batch_norms:
        warnings.append("correction.batch_norm has nothing to do: no layer has absorbed a BatchNormalization")
    if recipe.allocation.options.get("unfused") and not gains and not not_fused and not keep_structure:
        warnings.append(
            "allocation.options.unfused has nothing to undo: the model came without BatchNorm, or with it fused"
        )
    return Prepared(
        model,
        layers,
        ignored_layers,
        ignored,
        found.skipped,
        not_fused,
        difference,
        tuple(warnings),
        batch_norms,
        gains,
    )


def _without_effect(recipe: Recipe) -> list[str]:
    """What was asked for and has no effect."""
    pattern = Pattern.parse(recipe.pruning.pattern)
    if pattern.kind != "n:m" or "sparsity" not in recipe.model_fields_set:
        return []
    fixed = 1.0 - pattern.n / pattern.m
    if abs(fixed - recipe.sparsity) < ROUNDED:
        return []
    return [f"{pattern} fixes the sparsity at {fixed:.3g}: sparsity {recipe.sparsity:g} is not used"]


def output_difference(original: Model, edited: Model, engine: Engine, samples: Dataset) -> float:
    """Largest relative L2 difference over the floating-point outputs on a few samples."""
    batch = next(iter(samples.batches(original.batch_size or min(8, len(samples)))))
    values = []
    for model in (original, edited):
        executable = engine.compile(model.extract())
        result = executable.run(feeds(model, executable, batch))
        values.append([result[name] for name in executable.outputs])
    worst = 0.0
    for before, after in zip(*values, strict=True):
        if before.dtype.kind != "f" or before.shape != after.shape:
            continue
        norm = float(np.linalg.norm(before.astype(np.float64)))
        gap = float(np.linalg.norm(after.astype(np.float64) - before.astype(np.float64)))
        worst = max(worst, gap / norm if norm > 0 else gap)
    return worst


def _divide(
    model: Model, layers: Sequence[Layer], recipe: Recipe, scope: nncf.IgnoredScope | None
) -> tuple[tuple[Layer, ...], tuple[Layer, ...], dict[str, str]]:
    """Split layers into those that take part and those ignored by recipe or scope."""
    settings = recipe.allocation
    names = {*settings.ignored_names, *(scope.names if scope else ())}
    patterns = (*settings.ignored_patterns, *(scope.patterns if scope else ()))
    types = {*settings.ignored_types, *(scope.types if scope else ())}
    if scope is not None and scope.subgraphs:
        raise RecipeError("IgnoredScope.subgraphs is not supported: name the operators or give a pattern")
    graph = model.graph
    known = {node.name for node in graph}
    missing = sorted(name for name in names if name not in known)
    if missing and (scope is None or scope.validate or any(m in settings.ignored_names for m in missing)):
        raise RecipeError(
            f"ignored layer {missing[0]!r} is not in the model; `pot-sparsity inspect` lists the names"
        )
    try:
        expressions = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise RecipeError(f"ignored pattern {error.pattern!r} is not a regular expression: {error}") from None
    ignored: dict[str, str] = {}
    for layer in layers:
        for place in layer.places:
            node = graph.node(place.node)
            if node.name in names:
                ignored[layer.name] = "ignored by name"
            elif any(expression.match(node.name) for expression in expressions):
                ignored[layer.name] = "ignored by pattern"
            elif node.op in types or node.source_type in types:
                ignored[layer.name] = f"ignored by type {node.source_type}"
    return (
        tuple(layer for layer in layers if layer.name not in ignored),
        tuple(layer for layer in layers if layer.name in ignored),
        ignored,
    )


def layer_weights(dense: Sequence[DenseLayer]) -> list[LayerWeights]:
    """What allocations look at."""
    result = []
    for item in dense:
        geometry = item.layer.places[0].geometry
        kernel = geometry.kernel if isinstance(geometry, ConvGeometry) else ()
        inputs = item.layer.cols // int(np.prod(kernel)) if kernel else item.layer.cols
        result.append(
            LayerWeights(
                item.layer.name,
                item.weight,
                kernel,
                inputs,
                item.layer.channels,
                item.layer.groups,
                item.gain,
            )
        )
    return result
