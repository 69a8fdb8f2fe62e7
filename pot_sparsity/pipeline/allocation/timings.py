"""Seconds of each layer at several densities: measured on this machine, or read from a file.

A file holds what a runtime that is not here needs for each layer at a few densities::

    base: 0.0021                # optional: seconds that no zero changes
    ratio: 0.9                  # optional: the density of level i is ratio ** i
    layers:
      conv1: [{density: 1.0, seconds: 0.004}, {density: 0.5, seconds: 0.0025}]
      conv2: [{level: 0, seconds: 0.007}, {level: 7, seconds: 0.0041}]

Between levels seconds lie on straight lines; where they do not fall with density, the closest falling sequence counts.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import isotonic_regression

from pot_sparsity.algorithms.allocation.budgets import CostTable
from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.algorithms.pruning.projection import pattern_mask
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.engines.base import Engine, Executable
from pot_sparsity.engines.openvino_counters import CountedModel
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import write_weight
from pot_sparsity.pipeline.allocation.costs import Costs
from pot_sparsity.pipeline.solve import DenseLayer, layer_pattern
from pot_sparsity.recipe import Recipe

#: Densities at which layers are timed.
DENSITIES = (1.0, 0.5, 0.2, 0.05)
#: A layer that gains less than this part of its time by the zeros of those levels, or less than so many seconds, counts
#: as one that gains nothing.
NOISE = 0.1
RESOLUTION = 5e-6
_FAST = 0.25
# Inferences in a row before and while counters are read.
_BLOCKS = (5, 5, 5, 10, 20)
# Rounds of models that take turns, before and while they are timed.
_WARM, _ROUNDS = 3, 30


@dataclass(frozen=True)
class Timings:
    """Seconds of one inference.

    Attributes
    ----------
    layers
        By layer name: pairs of density and seconds, densities falling from 1.
    base
        Seconds that no zero changes.
    """

    layers: Mapping[str, tuple[tuple[float, float], ...]]
    base: float = 0.0

    def dump(self) -> str:
        """As JSON, in the format of the files."""
        layers = {
            name: [{"density": density, "seconds": seconds} for density, seconds in levels]
            for name, levels in self.layers.items()
        }
        return json.dumps({"base": self.base, "layers": layers}, indent=1) + "\n"


class _Level(BaseModel):
    model_config = ConfigDict(extra="forbid")
    density: float | None = Field(None, ge=0.0, le=1.0)
    level: int | None = Field(None, ge=0)
    seconds: float = Field(ge=0.0, allow_inf_nan=False)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    base: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    ratio: float = Field(0.9, gt=0.0, lt=1.0)
    layers: dict[str, list[_Level]] = Field(min_length=1)


def given_timings(path: str | Path | None, budgets: Collection[str]) -> Timings | None:
    """The timings of a file that was given; RecipeError where no budget of these kinds would read them."""
    if path is None:
        return None
    if "latency" not in budgets:
        raise RecipeError("--timings goes with a budget of latency, e.g. --budget latency=0.5")
    return read_timings(path)


def read_timings(path: str | Path) -> Timings:
    """Read a file of timings, JSON or YAML.

    Raises
    ------
    RecipeError
        The file cannot be read or is not of that form; the message says where.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "not a text file"
        raise RecipeError(f"cannot read timings {str(path)!r}: {why}") from None
    return parse_timings(text, f"timings {str(path)!r}")


def parse_timings(text: str, what: str = "timings") -> Timings:
    """Timings from the text of a file; ``what`` names it in messages."""
    try:
        found = _File.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(
            f"{what}: not valid JSON or YAML" + (f" at line {mark.line + 1}" if mark else "")
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{what}: {path or 'the file'}: {first['msg']}") from None
    return Timings(
        {
            name: _levels(levels, found.ratio, f"{what}: layer {name!r}")
            for name, levels in found.layers.items()
        },
        found.base,
    )


def _levels(levels: Sequence[_Level], ratio: float, what: str) -> tuple[tuple[float, float], ...]:
    pairs: dict[float, float] = {}
    for entry in levels:
        if (entry.density is None) == (entry.level is None):
            raise RecipeError(f"{what}: every level needs either 'density' or 'level'")
        density = entry.density if entry.level is None else ratio**entry.level
        assert density is not None
        if density in pairs:
            raise RecipeError(f"{what}: density {density:g} stands there twice")
        pairs[density] = entry.seconds
    if 1.0 not in pairs:
        raise RecipeError(f"{what}: the seconds of the dense layer (density 1, or level 0) are missing")
    return tuple(sorted(pairs.items(), reverse=True))


def latency_costs(timings: Timings, dense: Sequence[DenseLayer]) -> Costs:
    """Costs of the kind ``latency`` for the layers that take part.

    Raises
    ------
    RecipeError
        A layer without timings, or timings of a layer that does not exist or take part.
    """
    names = [item.layer.name for item in dense]
    for name in timings.layers:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"timings: there is no layer {name!r} that takes part{hint}")
    missing = [name for name in names if name not in timings.layers]
    if missing:
        raise RecipeError(f"timings: {len(missing)} layers have none, {missing[0]!r} first")
    tables = {item.layer.name: _table(timings.layers[item.layer.name], item.layer.size) for item in dense}
    total = timings.base + sum(table.cost(0) for table in tables.values())
    if total <= 0.0:
        raise RecipeError("timings: all of them are zero")
    return Costs({"latency": tables}, {"latency": total}, {"latency": timings.base})


def _table(levels: Sequence[tuple[float, float]], size: int) -> CostTable:
    density, seconds = (np.asarray(column, dtype=np.float64) for column in zip(*levels, strict=True))
    falling = isotonic_regression(seconds, increasing=False).x
    return CostTable((1.0 - density) * size, np.asarray(falling, dtype=np.float64))


def measure_timings(
    model: Model,
    dense: Sequence[DenseLayer],
    samples: Dataset,
    engine: Engine,
    recipe: Recipe,
    *,
    threads: int,
) -> Timings:
    """Time every layer on this machine, dense and with zeros of the recipe's pattern (the smallest weights).

    OpenVINO's counters say what each layer takes inside the network, operators fused into it included; in ONNX Runtime
    each layer runs alone. In floating point, one sample at a time (or the model's fixed batch), as a deployment would.
    Layers that cannot be told from others, or gain nothing beyond what measurements vary, keep their time whatever
    their zeros.

    Parameters
    ----------
    model
        The prepared dense model.
    dense
        The layers that take part.
    samples
        What the model is run on.
    """
    copies = [_sparse(model, dense, recipe, density) for density in DENSITIES]
    inputs = _one_batch(model, samples)
    if engine.name == "openvino":
        whole, layers = _by_counters(copies, dense, inputs, threads)
    else:
        whole, layers = _alone(copies, dense, inputs, engine)
    found = {name: _settled(samples) for name, samples in layers.items()}
    base = max(0.0, whole - sum(float(times[0]) for times in found.values()))
    return Timings(
        {name: tuple(zip(DENSITIES, times.tolist(), strict=True)) for name, times in found.items()}, base
    )


def _settled(measured: Float64) -> Float64:
    """Seconds by level from measurements ``[rounds, levels]``, falling with density or all the same.

    The faster quarter counts, which other work on the machine has disturbed least. All the same where what zeros gain
    is small, or where levels overlap as much as repeated measurements do.
    """
    seconds = np.quantile(measured, _FAST, axis=0)
    falling = np.asarray(isotonic_regression(seconds, increasing=False).x, dtype=np.float64)
    gain = falling[0] - falling[-1]
    clear = np.quantile(measured[:, -1], 1.0 - _FAST) < seconds[0]
    return (
        falling if clear and gain > max(NOISE * falling[0], RESOLUTION) else np.full(seconds.size, seconds[0])
    )


def _sparse(model: Model, dense: Sequence[DenseLayer], recipe: Recipe, density: float) -> Model:
    """A copy in which every layer keeps its largest weights."""
    changed = model.copy()
    for item in dense if density < 1.0 else ():
        zeros = round((1.0 - density) * item.layer.size)
        mask = pattern_mask(np.abs(item.weight), zeros, layer_pattern(recipe, item.layer))
        write_weight(changed, item.layer, np.where(mask, item.weight, 0.0))
    return changed


def _one_batch(model: Model, samples: Dataset) -> dict[str, AnyArray]:
    """Inputs of one inference by tensor name; few samples are repeated to fill a fixed batch."""
    size = model.batch_size or 1
    batch = next(iter(samples.batches(size)))
    named = zip(model.graph.inputs, model.input_names, strict=True)
    return {
        tensor: np.resize(batch.inputs[name], (size, *batch.inputs[name].shape[1:])) for tensor, name in named
    }


def _by_counters(
    copies: Sequence[Model], dense: Sequence[DenseLayer], inputs: Mapping[str, AnyArray], threads: int
) -> tuple[float, dict[str, Float64]]:
    """Seconds of the whole dense model, and of each layer ``[rounds, levels]``, from OpenVINO's counters."""
    graph = copies[0].graph
    owner = {
        name: item.layer.name
        for item in dense
        for place in item.layer.places
        for name in (place.node, place.output, graph.node(place.node).output)
    }
    models = [CountedModel(copy.extract(), threads) for copy in copies]
    for model in models:
        model.run(inputs, _BLOCKS[0])
    blocks = _BLOCKS[1:]
    seconds = {item.layer.name: np.zeros((len(blocks), len(models))) for item in dense}
    whole = np.zeros(len(blocks))
    for turn, runs in enumerate(blocks):
        for level, model in enumerate(models):
            start = time.perf_counter()
            counted = model.run(inputs, runs)
            if level == 0:  # counters of tiny models stay at zero
                whole[turn] = sum(counted.values()) or (time.perf_counter() - start) / runs
            for names, spent in counted.items():
                owners = {owner[name] for name in names if name in owner}
                for name in owners:
                    seconds[name][turn, level] += spent / len(owners)
    return float(np.quantile(whole, _FAST)), seconds


def _alone(
    copies: Sequence[Model], dense: Sequence[DenseLayer], inputs: Mapping[str, AnyArray], engine: Engine
) -> tuple[float, dict[str, Float64]]:
    """Seconds of the whole dense model, and of each layer ``[rounds, levels]``, every place of it run by itself."""
    model = copies[0]
    places = [(item.layer.name, place) for item in dense for place in item.layer.places]
    tapped = list(dict.fromkeys(place.input for _, place in places))
    wanted = [name for name in tapped if name not in inputs]
    values = dict(inputs)
    if wanted:
        values |= engine.compile(model.extract(outputs=wanted)).run(inputs)
    whole = _times([engine.compile(model.extract(), exact=False)], inputs)
    seconds = {item.layer.name: np.zeros((_ROUNDS, len(copies))) for item in dense}
    for name, place in places:
        cuts = [copy.extract(outputs=[place.output], inputs=[place.input]) for copy in copies]
        seconds[name] += _times(
            [engine.compile(cut, exact=False) for cut in cuts], {place.input: values[place.input]}
        )
    return float(np.quantile(whole, _FAST)), seconds


def _times(models: Sequence[Executable], inputs: Mapping[str, AnyArray]) -> Float64:
    """Seconds of models that take turns, ``[rounds, models]``."""
    seconds = np.zeros((_WARM + _ROUNDS, len(models)))
    for turn in range(_WARM + _ROUNDS):
        for index, model in enumerate(models):
            start = time.perf_counter()
            model.run(inputs)
            seconds[turn, index] = time.perf_counter() - start
    return seconds[_WARM:]
