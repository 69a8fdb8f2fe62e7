"""The model database: solutions of single layers, on disk, under the digest of all they depend on.

After "Optimal Brain Compression" (section 6): every layer is compressed to every level on its own, once; a model for
any budget is then put together from what is there (:mod:`pot_sparsity.pipeline.store.stitch`). Levels that are both
sparse and quantized are sparse first, then the weights that are left are placed on a grid.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import scipy
from threadpoolctl import threadpool_limits

from pot_sparsity.algorithms.arrays import AnyArray, Float64, Moments
from pot_sparsity.algorithms.pruning.problem import SolverOptions
from pot_sparsity.pipeline.progress import Progress, Silent, track
from pot_sparsity.pipeline.solve import (
    SHRINKAGES,
    DenseLayer,
    Solution,
    centred_on,
    layer_pattern,
    layer_work,
    prune_layer,
    solver_options,
    unfused_gain,
)
from pot_sparsity.pipeline.store.entries import Entries
from pot_sparsity.pipeline.store.levels import Level, quantize_layer, with_pattern
from pot_sparsity.recipe import Recipe

#: Counts up whenever a solver gives other solutions for the same input, so that old ones are not read any more.
SOLVERS_VERSION = 1

log = logging.getLogger(__name__)


class Database:
    """Layer solutions that are read where they are known and computed where they are not.

    Parameters
    ----------
    path
        Its folder; None computes everything and keeps nothing.

    Attributes
    ----------
    hits, misses
        How many solutions were read and how many computed.

    Raises
    ------
    OutputError
        The folder cannot be written, or holds something else; nothing has been written then.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.hits = 0
        self.misses = 0
        self._entries = None if path is None else Entries(path)
        self._digests = _Digests()
        self._lock = threading.Lock()

    def solve(
        self,
        item: DenseLayer,
        moments: Moments,
        held_out: Moments | None,
        zeros: int,
        recipe: Recipe,
        options: SolverOptions | None = None,
        *,
        shrinkage: float | None = None,
        bits: int | None = None,
    ) -> Solution:
        """What :func:`~pot_sparsity.pipeline.solve.prune_layer` gives, bit by bit, from disk where it is known.

        Parameters
        ----------
        item, moments, held_out, zeros, recipe, options, shrinkage
            As for :func:`~pot_sparsity.pipeline.solve.prune_layer`; biases stay as they are.
        bits
            Of the grid that the weights which are left are placed on, see
            :func:`~pot_sparsity.pipeline.store.levels.quantize_layer`; None leaves them real.

        Raises
        ------
        PotSparsityError
            The solver refuses the layer.
        OutputError
            The disk is full or refuses.
        """

        def sparse() -> Solution:
            return self.solve(item, moments, held_out, zeros, recipe, options, shrinkage=shrinkage)

        def compute() -> Solution:
            if bits is not None:
                return quantize_layer(item, moments, sparse(), recipe, bits)
            return prune_layer(item, moments, held_out, zeros, recipe, options, shrinkage=shrinkage)

        if self._entries is None:
            return compute()
        return self._kept(
            self._entries,
            self.key(item, moments, held_out, zeros, recipe, options, shrinkage=shrinkage, bits=bits),
            item,
            compute,
        )

    def solve_level(
        self, item: DenseLayer, moments: Moments, held_out: Moments | None, level: Level, recipe: Recipe
    ) -> Solution:
        """The solution of one level; its pattern stands in for the recipe's."""
        chosen = with_pattern(recipe, level.pattern)
        return self.solve(item, moments, held_out, level.zeros, chosen, bits=level.bits)

    def build(
        self,
        dense: Sequence[DenseLayer],
        moments: Mapping[str, Moments],
        held_out: Mapping[str, Moments],
        levels: Mapping[str, Sequence[Level]],
        recipe: Recipe,
        *,
        threads: int,
        progress: Progress | None = None,
    ) -> dict[str, LayerLevels]:
        """All levels of all layers, in parallel, the largest layers first; what is on disk is read.

        Whoever stops it loses only the levels in progress. Results do not depend on ``threads``.

        Parameters
        ----------
        dense, moments, held_out
            The layers, the moments of their inputs, and held-out moments of layers with few samples, by name.
        levels
            Levels of each layer, by name (see :func:`~pot_sparsity.pipeline.store.levels.default_levels`).

        Returns
        -------
        dict
            By layer name: solutions by level. With a folder they are read again when asked for, so that large
            networks fit into memory.
        """
        built = {
            item.layer.name: LayerLevels(self, item, moments, held_out.get(item.layer.name), recipe)
            for item in dense
        }
        jobs = []
        for item in sorted(dense, key=lambda item: -layer_work(item)):
            groups: dict[tuple[int, str], list[Level]] = {}
            for level in levels[item.layer.name]:
                groups.setdefault((level.zeros, level.pattern), []).append(level)
            jobs += [(built[item.layer.name], group) for group in groups.values()]

        def results(pool: ThreadPoolExecutor) -> Iterator[None]:
            for future in as_completed([pool.submit(shelf.solve, group) for shelf, group in jobs]):
                yield future.result()

        with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
            try:
                for _ in track(results(pool), progress or Silent(), "Building the database", len(jobs)):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return built

    def report(self) -> None:
        """Tell the log what was read and what computed."""
        if self.path is not None:
            log.info("database %s: %d solutions read, %d computed", self.path, self.hits, self.misses)

    def key(
        self,
        item: DenseLayer,
        moments: Moments,
        held_out: Moments | None,
        zeros: int,
        recipe: Recipe,
        options: SolverOptions | None = None,
        *,
        shrinkage: float | None = None,
        bits: int | None = None,
    ) -> str:
        """SHA-256 (hexadecimal) over everything that the solution depends on, and nothing else."""
        settings = asdict(options or solver_options(recipe))
        del settings["workers"]
        if held_out is None and shrinkage is None:
            shrinkage = 0.0
        judged = held_out if shrinkage is None else None
        parts = {
            "versions": [SOLVERS_VERSION, np.__version__, scipy.__version__],
            "weight": self._digests.of(item.weight, item.weight),
            "moments": self._digest(moments),
            "held_out": None if judged is None else [self._digest(judged), *SHRINKAGES],
            "solver": recipe.pruning.method,
            "options": settings,
            "pattern": asdict(layer_pattern(recipe, item.layer)),
            "zeros": int(zeros),
            "centred": centred_on(item, recipe),
            "shrinkage": None if shrinkage is None else float(shrinkage),
            "bits": bits,
        }
        gain = unfused_gain(item, recipe)
        if gain is not None:
            parts["gain"] = self._digests.of(gain, gain)
        if item.prior is not None and shrinkage != 0.0:
            parts["prior"] = self._digests.of(item.prior, item.prior)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _digest(self, moments: Moments) -> str:
        return self._digests.of(moments, np.array([moments.count]), moments.mean, moments.second)

    def _kept(
        self, entries: Entries, key: str, item: DenseLayer, compute: Callable[[], Solution]
    ) -> Solution:
        stored = entries.load(key)
        if stored is not None:
            with self._lock:
                self.hits += 1
            return _unpack(stored, item)
        solution = compute()
        entries.store(key, _pack(solution))
        with self._lock:
            self.misses += 1
        return solution


class LayerLevels(Mapping[Level, Solution]):
    """Solutions of one layer by level.

    Attributes
    ----------
    errors
        Relative layer error of each level, on the samples behind the moments.
    """

    def __init__(
        self,
        database: Database,
        item: DenseLayer,
        moments: Mapping[str, Moments],
        held_out: Moments | None,
        recipe: Recipe,
    ) -> None:
        self.errors: dict[Level, float] = {}
        self._held: dict[Level, Solution] = {}
        self._database = database
        self._item = item
        self._moments = moments[item.layer.name]
        self._held_out = held_out
        self._recipe = recipe

    def solve(self, levels: Sequence[Level]) -> None:
        """Add levels that differ in their bits only."""
        sparse = cache(lambda: self._read(replace(levels[0], bits=None)))
        for level in levels:
            if level.bits is None:
                solution = sparse()
            elif self._database.path is None:
                solution = quantize_layer(self._item, self._moments, sparse(), self._recipe, level.bits)
            else:
                solution = self._read(level)
            if self._database.path is None:
                self._held[level] = solution
            self.errors[level] = solution.relative_error

    def __getitem__(self, level: Level) -> Solution:
        if level not in self.errors:
            raise KeyError(level)
        if level in self._held:
            return self._held[level]
        with threadpool_limits(1):  # of no use but where the entry was lost meanwhile
            return self._read(level)

    def __iter__(self) -> Iterator[Level]:
        return iter(sorted(self.errors, key=lambda level: (level.pattern, level.zeros, -(level.bits or 64))))

    def __len__(self) -> int:
        return len(self.errors)

    def _read(self, level: Level) -> Solution:
        return self._database.solve_level(self._item, self._moments, self._held_out, level, self._recipe)


class _Digests:
    """SHA-256 of arrays that nobody changes, each computed once while its owner lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[object], str]] = {}

    def of(self, owner: object, *arrays: AnyArray) -> str:
        """The digest of types, shapes and bytes."""
        known = self._known.get(id(owner))
        if known is not None and known[0]() is owner:
            return known[1]
        total = hashlib.sha256()
        for array in arrays:
            total.update(repr((array.dtype.str, array.shape)).encode())
            total.update(np.ascontiguousarray(array).data)
        self._known[id(owner)] = (weakref.ref(owner), total.hexdigest())
        return self._known[id(owner)][1]


def _pack(solution: Solution) -> dict[str, AnyArray]:
    """A solution as arrays: bits that tell which weights are stored, and those, bit by bit; not the time it took."""
    weight = np.ascontiguousarray(solution.weight, np.float64)
    stored = weight.view(np.uint64) != 0
    arrays: dict[str, AnyArray] = {
        "shape": np.array(weight.shape, np.int64),
        "stored": np.packbits(stored),
        "values": weight[stored],
        "scalars": np.array([solution.relative_error, solution.damping, solution.shrinkage]),
    }
    if solution.scale is not None:
        arrays["scale"] = solution.scale
    return arrays


def _unpack(arrays: Mapping[str, AnyArray], item: DenseLayer) -> Solution:
    """Inverse of :func:`_pack`, with the layer's own biases."""
    shape = tuple(int(size) for size in arrays["shape"])
    weight: Float64 = np.zeros(shape)
    weight[np.unpackbits(arrays["stored"], count=weight.size).astype(bool).reshape(shape)] = arrays["values"]
    relative_error, damping, shrinkage = (float(value) for value in arrays["scalars"])
    scale = arrays.get("scale")
    return Solution(weight, item.biases, relative_error, damping, shrinkage=shrinkage, scale=scale)
