"""What a user names (files, objects, folders) read and checked, so that a job can start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
import openvino as ov

from pot_sparsity.data import Dataset, DataSource, Preprocess, load_dataset, load_preprocess
from pot_sparsity.errors import OutputError, RecipeError, UserError
from pot_sparsity.graph.load import load_model
from pot_sparsity.pipeline.job import Job, Options
from pot_sparsity.pipeline.progress import Progress, Silent
from pot_sparsity.pipeline.reporting import input_specs
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer
from pot_sparsity.recipe import Recipe

ModelSource: TypeAlias = str | Path | onnx.ModelProto | ov.Model


@dataclass(frozen=True)
class Sources:
    """A model and its samples, as :func:`~pot_sparsity.pipeline.optimize.optimize` describes them."""

    model: ModelSource
    calibration: DataSource
    validation: DataSource | None
    validation_labels: str | Path | None
    validation_split: str | None
    preprocess: Preprocess | Mapping[str, Any] | str | Path | None
    engine: Literal["openvino", "onnxruntime"]


def load_job(
    sources: Sources, recipe: Recipe, options: Options, folder: RunFolder, progress: Progress | None
) -> Job:
    """Read model and samples.

    Raises
    ------
    UserError
        Something cannot be used; nothing has been written.
    """
    original = load_model(sources.model)
    if sources.engine == "onnxruntime" and (options.to_openvino or original.format == "openvino"):
        raise UserError(
            "--engine onnxruntime runs ONNX models only: use --engine openvino to read or write IR"
        )
    images = load_preprocess(sources.preprocess)
    inputs = input_specs(original)
    samples = load_dataset(
        sources.calibration, inputs, images, samples=recipe.calibration.samples, seed=recipe.seed
    )
    judged: Dataset | None = None
    if sources.validation is not None:
        judged = load_dataset(
            sources.validation,
            inputs,
            images,
            labels=None if sources.validation_labels is None else Path(sources.validation_labels),
            split=sources.validation_split,
        )
    return Job(recipe, options, folder, original, samples, judged, sources.engine, progress or Silent())


def check_folders(output: str | Path | None, database: str | Path | None) -> None:
    """Raise OutputError where a run and a database would share a folder."""
    if output is not None and database is not None and Path(output).resolve() == Path(database).resolve():
        raise OutputError(
            f"the run and the database cannot share the folder {str(output)!r}: give another with --database"
        )


def check_zeros(dense: Sequence[DenseLayer], zeros: Mapping[str, int]) -> None:
    """Raise RecipeError where numbers of zeros were not chosen for these layers."""
    sizes = {item.layer.name: item.layer.size for item in dense}
    other = sorted(sizes.keys() ^ zeros.keys())
    if other:
        raise RecipeError(
            f"the point was found with other layers: {other[0]!r} takes part in only one of the two; use the same "
            "--ignored-... and --keep-structure options as in the sweep"
        )
    for name, count in zeros.items():
        if not 0 <= count <= sizes[name]:
            raise RecipeError(f"layer {name!r} has {sizes[name]} weights: {count} of them cannot be zero")
