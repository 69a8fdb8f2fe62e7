"""The model database: what its keys depend on, that it gives back every bit, and that nothing can spoil it."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pot_sparsity.algorithms.arrays import Float64, Moments
from pot_sparsity.algorithms.pruning.problem import SolverOptions
from pot_sparsity.algorithms.quantization.grid import fit_grid
from pot_sparsity.cli import main
from pot_sparsity.errors import OutputError, PotSparsityError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.compress import Surroundings, compress
from pot_sparsity.pipeline.job import Job, Options
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.repair.correction import Steps
from pot_sparsity.pipeline.run import Run
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, prune_layer, read_dense
from pot_sparsity.pipeline.store import entries
from pot_sparsity.pipeline.store.database import Database
from pot_sparsity.pipeline.store.entries import MARKER, Entries
from pot_sparsity.pipeline.store.levels import LEVELS, RATIO, Level, default_levels, quantize_layer
from pot_sparsity.pipeline.store.stitch import stitch
from pot_sparsity.recipe import Recipe, validate_recipe
from tests.pipeline.nets import QUICK, conv_net, dataset, images, plain_net

#: Pruning and one-shot correction of biases, nothing else.
PLAIN: dict[str, Any] = {
    **QUICK,
    "allocation": {"method": "uniform"},
    "pruning": {"method": "wanda_refit"},
    "reconstruction": {"input": "dense"},
    "correction": {"differential": "never", "normalization": "never"},
    "finish": {"activations": "never", "distillation": "never"},
}


def recipe(**sections: Any) -> Recipe:
    return validate_recipe({**PLAIN, **sections})


def some_moments(groups: int, cols: int, seed: int) -> Moments:
    """Moments of correlated inputs with a mean."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, cols, cols)) @ random.normal(size=(groups, cols, 200)) + 0.3
    second = np.einsum("gcs,gds->gcd", x, x) / 200
    return Moments(200.0, x.mean(axis=-1), second)


@pytest.fixture(scope="module")
def layers() -> list[DenseLayer]:
    model = load_model(conv_net())
    return read_dense(model, find_layers(model.graph).layers)


@pytest.fixture(scope="module")
def moments(layers: list[DenseLayer]) -> dict[str, Moments]:
    return {
        item.layer.name: some_moments(item.layer.groups, item.layer.cols, seed)
        for seed, item in enumerate(layers)
    }


def grid_levels(layers: list[DenseLayer]) -> dict[str, tuple[Level, ...]]:
    """A few levels of every layer: sparse, quantized, both."""
    return {
        item.layer.name: default_levels(item.layer.size, bits=(None, 4), count=4, ratio=0.6)
        for item in layers
    }


def assert_same(first: Solution, second: Solution) -> None:
    """Every bit but the time it took."""
    assert first.weight.tobytes() == second.weight.tobytes()
    assert first.weight.shape == second.weight.shape
    assert first.biases is second.biases
    kept = [replace(item, weight=np.empty(0), biases=(), seconds=0.0, scale=None) for item in (first, second)]
    assert repr(kept[0]) == repr(kept[1])
    assert (first.scale is None) == (second.scale is None)
    if first.scale is not None and second.scale is not None:
        assert first.scale.tobytes() == second.scale.tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def entry_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.safetensors"))


# keys


def shifted(item: DenseLayer) -> DenseLayer:
    weight = item.weight.copy()
    weight.flat[-1] = np.nextafter(weight.flat[-1], 9.0)
    return replace(item, weight=weight)


def changed(moments: Moments, part: str) -> Moments:
    mean, second = moments.mean.copy(), moments.second.copy()
    if part == "count":
        return Moments(moments.count + 1, mean, second)
    (mean if part == "mean" else second).flat[0] += 1e-12
    return Moments(moments.count, mean, second)


UNFUSED = recipe(pruning={"method": "magnitude", "unfused": True})
OTHERS: dict[str, dict[str, Any]] = {
    "weight": {"item": shifted},
    "shape": {"item": lambda item: replace(item, weight=item.weight.reshape(1, 4, -1))},
    "count": {"moments": lambda moments: changed(moments, "count")},
    "mean": {"moments": lambda moments: changed(moments, "mean")},
    "second": {"moments": lambda moments: changed(moments, "second")},
    "held-out moments": {"held_out": some_moments(1, 27, 99)},
    "other held-out moments": {"held_out": some_moments(1, 27, 98)},
    "zeros": {"zeros": 51},
    "solver": {"recipe": recipe(pruning={"method": "wanda"})},
    "options of the recipe": {
        "recipe": recipe(pruning={"method": "wanda_refit", "options": {"effort": 2.0}})
    },
    "options": {"options": SolverOptions(effort=3.0)},
    "pattern": {"recipe": recipe(pruning={"method": "wanda_refit", "pattern": "block:3"})},
    "other pattern": {"recipe": recipe(pruning={"method": "wanda_refit", "pattern": "2:3"})},
    "fixed bias": {"recipe": recipe(correction={"bias": False})},
    "shrinkage": {"shrinkage": 0.1},
    "prior": {"item": lambda item: replace(item, prior=np.eye(27)[None]), "shrinkage": 0.1},
    "other prior": {"item": lambda item: replace(item, prior=np.eye(27)[None] + 0.1), "shrinkage": 0.1},
    "unfused": {"recipe": UNFUSED},
    "gain": {"recipe": UNFUSED, "item": lambda item: replace(item, gain=np.full((1, 8), 2.0))},
    "other gain": {"recipe": UNFUSED, "item": lambda item: replace(item, gain=np.full((1, 8), 3.0))},
    "bits": {"bits": 4},
    "other bits": {"bits": 8},
}


def key_of(layers: list[DenseLayer], by_layer: dict[str, Moments], **other: Any) -> str:
    item, seen = layers[0], by_layer[layers[0].layer.name]
    given: dict[str, Any] = {"held_out": None, "zeros": 50, "recipe": recipe(), **other}
    given["item"] = other["item"](item) if "item" in other else item
    given["moments"] = other["moments"](seen) if "moments" in other else seen
    return Database(None).key(**given)


def test_every_ingredient_has_a_key_of_its_own(layers: list[DenseLayer], moments: dict[str, Moments]) -> None:
    keys = {what: key_of(layers, moments, **other) for what, other in OTHERS.items()}
    keys["nothing"] = key_of(layers, moments)
    assert len(set(keys.values())) == len(OTHERS) + 1
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys.values())


@pytest.mark.parametrize(
    "other",
    [
        {"item": lambda item: replace(item, weight=item.weight.copy(), gain=np.ones((1, 8)))},
        {"item": lambda item: replace(item, biases=(np.full((1, 8), 3.0),))},
        {"moments": lambda seen: Moments(seen.count, seen.mean.copy(), seen.second.copy())},
        {"options": SolverOptions(workers=7)},
        {"zeros": np.int64(50)},
        {"shrinkage": 0.0},
        {"recipe": recipe(sparsity=0.7, seed=3, reconstruction={"input": "sparse"})},
    ],
    ids=["a copy", "biases", "copied moments", "workers", "type", "no shrinkage", "rest of the recipe"],
)
def test_what_a_solution_does_not_depend_on(
    layers: list[DenseLayer], moments: dict[str, Moments], other: dict[str, Any]
) -> None:
    assert key_of(layers, moments, **other) == key_of(layers, moments)


def test_a_given_shrinkage_makes_held_out_moments_irrelevant(
    layers: list[DenseLayer], moments: dict[str, Moments]
) -> None:
    held = some_moments(1, 27, 99)
    assert key_of(layers, moments, held_out=held, shrinkage=0.3) == key_of(layers, moments, shrinkage=0.3)
    assert key_of(layers, moments, held_out=held) != key_of(layers, moments, held_out=held, shrinkage=0.0)


def test_the_stride_of_a_pattern_counts(layers: list[DenseLayer], moments: dict[str, Moments]) -> None:
    """The same numbers as a 3 x 3 convolution and as a matrix: groups of a pattern lie elsewhere."""
    other = load_model(plain_net())
    head = next(layer for layer in find_layers(other.graph).layers if layer.name == "y")
    blocks = recipe(pruning={"method": "wanda_refit", "pattern": "block:3"})
    as_matrix = {"item": lambda item: replace(item, layer=head)}
    assert key_of(layers, moments, recipe=blocks) != key_of(layers, moments, recipe=blocks, **as_matrix)


# solutions


@pytest.mark.parametrize("bits", [None, 3, 8])
@pytest.mark.parametrize("zeros", [0, 50, 216])
def test_what_is_read_is_what_was_solved(
    layers: list[DenseLayer], moments: dict[str, Moments], tmp_path: Path, bits: int | None, zeros: int
) -> None:
    item, seen = layers[0], moments[layers[0].layer.name]
    direct = prune_layer(item, seen, None, zeros, recipe())
    if bits is not None:
        direct = quantize_layer(item, seen, direct, recipe(), bits)
    nowhere = Database(None).solve(item, seen, None, zeros, recipe(), bits=bits)
    first, second = Database(tmp_path / "db"), Database(tmp_path / "db")
    for found in (
        nowhere,
        first.solve(item, seen, None, zeros, recipe(), bits=bits),
        first.solve(item, seen, None, zeros, recipe(), bits=bits),
        second.solve(item, seen, None, zeros, recipe(), bits=bits),
    ):
        assert_same(found, direct)
    assert (first.misses, first.hits) == (1 if bits is None else 2, 1)
    assert (second.misses, second.hits) == (0, 1)


def test_held_out_moments_choose_the_shrinkage_once(
    layers: list[DenseLayer], moments: dict[str, Moments], tmp_path: Path
) -> None:
    item, seen = layers[0], moments[layers[0].layer.name]
    held = some_moments(1, 27, 3)
    direct = prune_layer(item, seen, held, 100, recipe())
    assert direct.shrinkage > 0.0
    for _ in range(2):
        assert_same(Database(tmp_path / "db").solve(item, seen, held, 100, recipe()), direct)


def test_negative_zeros_come_back(tmp_path: Path) -> None:
    """What a mask cannot tell from a pruned weight is still the same bits."""
    store = Entries(tmp_path / "db")
    values = np.array([-0.0, 0.0, 1.5, np.inf])
    store.store("ab" + "0" * 62, {"values": values})
    found = store.load("ab" + "0" * 62)
    assert found is not None
    assert found["values"].tobytes() == values.tobytes()


def test_sparse_and_quantized(layers: list[DenseLayer], moments: dict[str, Moments]) -> None:
    """Zeros stay, weights lie on the grid, and they lie there better than the nearest points do."""
    for item in layers:
        seen = moments[item.layer.name]
        zeros = item.layer.size // 2
        sparse = prune_layer(item, seen, None, zeros, recipe())
        found = Database(None).solve(item, seen, None, zeros, recipe(), bits=4)
        assert found.scale is not None
        assert (found.weight[sparse.weight == 0.0] == 0.0).all()
        steps = found.weight / found.scale[..., None]
        assert np.allclose(steps, np.rint(steps), atol=1e-9)
        assert np.rint(steps).min() >= -8
        assert np.rint(steps).max() <= 7

        second = seen.centred if item.free_bias else seen.second
        grid = fit_grid(sparse.weight, 4, importance=np.einsum("gcc->gc", second))

        def error(weight: Float64, item: DenseLayer = item, second: Float64 = second) -> float:
            moved = weight - item.weight
            return float(np.einsum("grc,gcd,grd->", moved, second, moved))

        nearest = error(grid.dequantize(grid.quantize(sparse.weight)))
        assert error(found.weight) <= nearest * (1 + 1e-9)
        assert found.relative_error == pytest.approx(error(found.weight) / error(np.zeros_like(item.weight)))
        assert found.relative_error >= sparse.relative_error * (1 - 1e-9)


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_out_of_range(layers: list[DenseLayer], moments: dict[str, Moments], bits: int) -> None:
    item = layers[0]
    with pytest.raises(PotSparsityError, match=r"layer 'conv1': bits must be between 2 and 16"):
        Database(None).solve(item, moments[item.layer.name], None, 5, recipe(), bits=bits)


# levels


@given(st.integers(1, 5000), st.integers(1, 60), st.floats(0.3, 0.99))
@settings(deadline=None, max_examples=60)
def test_levels_keep_a_share_of_the_one_before(size: int, count: int, ratio: float) -> None:
    found = default_levels(size, bits=(None, 8), count=count, ratio=ratio)
    zeros = []
    density = 1.0
    for _ in range(count):
        if (pruned := round((1.0 - density) * size)) not in zeros:
            zeros.append(pruned)
        density *= ratio
    by_bits = {bits: [level.zeros for level in found if level.bits == bits] for bits in (None, 8)}
    assert by_bits[None] == by_bits[8]
    assert by_bits[None][0] == 0
    assert len(set(by_bits[None])) == len(by_bits[None])
    # products of floats and powers may round to neighbouring counts
    assert all(any(abs(pruned - other) <= 1 for other in zeros) for pruned in by_bits[None])
    assert abs(len(zeros) - len(by_bits[None])) <= 2


def test_default_levels_are_those_of_obc() -> None:
    found = default_levels(10**9)
    assert len(found) == LEVELS == 40
    assert [1 - level.zeros / 10**9 for level in found] == pytest.approx([RATIO**i for i in range(40)])


def test_levels_of_patterns() -> None:
    found = default_levels(80, ("unstructured", "2:4", "block:4"), count=2, ratio=0.5)
    assert found == (Level(0), Level(40), Level(40, "2:4"), Level(40, "block:4"))


# building


def test_building_gives_every_level(
    layers: list[DenseLayer], moments: dict[str, Moments], tmp_path: Path
) -> None:
    """Whatever the number of threads, with and without a folder."""
    wanted = grid_levels(layers)
    built = {
        (threads, where): Database(where).build(layers, moments, {}, wanted, recipe(), threads=threads)
        for threads, where in ((1, None), (4, tmp_path / "a"), (3, None), (1, tmp_path / "b"))
    }
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(entry_files(tmp_path / "a")) == sum(map(len, wanted.values()))
    for item in layers:
        for level in wanted[item.layer.name]:
            alone = Database(None).solve_level(item, moments[item.layer.name], None, level, recipe())
            assert np.count_nonzero(alone.weight == 0.0) >= level.zeros
            for shelves in built.values():
                shelf = shelves[item.layer.name]
                assert set(shelf) == set(wanted[item.layer.name])
                assert len(shelf) == len(wanted[item.layer.name])
                assert_same(shelf[level], alone)
                assert shelf.errors[level] == alone.relative_error
    with pytest.raises(KeyError):
        built[1, None]["conv1"][Level(1)]


def test_patterns_and_exact_zeros(layers: list[DenseLayer], moments: dict[str, Moments]) -> None:
    wanted = {
        item.layer.name: (
            Level(item.layer.size // 2),
            Level(0, "1:2"),
            Level(item.layer.size // 3, "block:2"),
        )
        for item in layers
    }
    for name, shelf in Database(None).build(layers, moments, {}, wanted, recipe(), threads=2).items():
        free, pairs, blocks = (shelf[level].weight for level in wanted[name])
        assert np.count_nonzero(free == 0.0) == wanted[name][0].zeros
        if name == "branch1":  # 1 x 1: neighbours in a row make a group
            kept = (pairs != 0.0).reshape(-1, 2).sum(axis=1)
            assert (kept <= 1).all()
            assert kept.sum() == pairs.size // 2
            whole = (blocks != 0.0).reshape(-1, 2).sum(axis=1)
            assert set(whole.tolist()) <= {0, 2}


class Stopping(Silent):
    """A user who presses Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self._left = after

    def advance(self, units: int = 1) -> None:
        self._left -= units
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("threads", [1, 3])
def test_a_build_that_was_stopped_goes_on(
    layers: list[DenseLayer], moments: dict[str, Moments], tmp_path: Path, threads: int
) -> None:
    wanted = grid_levels(layers)
    Database(tmp_path / "whole").build(layers, moments, {}, wanted, recipe(), threads=threads)
    stopped = Database(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.build(layers, moments, {}, wanted, recipe(), threads=threads, progress=Stopping(5))
    known = len(entry_files(tmp_path / "stopped"))
    total = sum(map(len, wanted.values()))
    assert 10 <= known < total
    resumed = Database(tmp_path / "stopped")
    resumed.build(layers, moments, {}, wanted, recipe(), threads=threads)
    assert resumed.misses == total - known
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_two_at_once(layers: list[DenseLayer], moments: dict[str, Moments], tmp_path: Path) -> None:
    """Processes that share a folder do the same work at worst."""
    wanted = grid_levels(layers)
    databases = [Database(tmp_path / "db") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in pool.map(
            lambda database: database.build(layers, moments, {}, wanted, recipe(), threads=1), databases
        ):
            pass
    Database(tmp_path / "alone").build(layers, moments, {}, wanted, recipe(), threads=1)
    assert contents(tmp_path / "db") == contents(tmp_path / "alone")


# the folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def swap(file: Path) -> None:
    other = next(path for path in entry_files(file.parents[1]) if path != file)
    shutil.copyfile(other, file)


@pytest.mark.parametrize("damage", [truncate, flip, swap, lambda file: file.write_bytes(b"")])
def test_damaged_entries_are_solved_again(
    layers: list[DenseLayer],
    moments: dict[str, Moments],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Any,
) -> None:
    item, seen = layers[0], moments[layers[0].layer.name]
    before = Database(tmp_path / "db")
    whole = [before.solve(item, seen, None, zeros, recipe()) for zeros in (40, 80)]
    (file, _) = entry_files(tmp_path / "db")
    intact = contents(tmp_path / "db")
    damage(file)
    with caplog.at_level(logging.WARNING):
        database = Database(tmp_path / "db")
        found = [database.solve(item, seen, None, zeros, recipe()) for zeros in (40, 80)]
    assert [message for message in caplog.messages if "is damaged and will be computed again" in message]
    assert (database.hits, database.misses) == (1, 1)
    for first, second in zip(found, whole, strict=True):
        assert_same(first, second)
    assert contents(tmp_path / "db") == intact


def foreign(folder: Path) -> Path:
    folder.mkdir()
    (folder / "holiday.jpg").write_text("sea")
    return folder


def other_version(folder: Path) -> Path:
    folder.mkdir()
    (folder / MARKER).write_text(json.dumps({"kind": "layer solutions", "version": 99}))
    return folder


def broken_marker(folder: Path) -> Path:
    folder.mkdir()
    (folder / MARKER).write_text("{")
    return folder


def a_file(folder: Path) -> Path:
    folder.write_text("text")
    return folder


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (foreign, "is not empty and holds no database; give another with --database"),
        (other_version, "has layout 99, this version reads 1"),
        (broken_marker, "has layout None"),
        (a_file, "is a file; give a folder with --database"),
        (lambda folder: a_file(folder) / "inside", "is not writable|cannot be used"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, make: Any, match: str) -> None:
    path = make(tmp_path / "db")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=match) as caught:
        Database(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match="is not writable"):
        Database(tmp_path / "db")


def test_nothing_is_written_before_something_is_solved(tmp_path: Path) -> None:
    Database(tmp_path / "db")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_will_do(
    layers: list[DenseLayer], moments: dict[str, Moments], tmp_path: Path
) -> None:
    (tmp_path / "db").mkdir()
    Database(tmp_path / "db").solve(layers[0], moments[layers[0].layer.name], None, 5, recipe())
    assert len(entry_files(tmp_path / "db")) == 1


def test_a_full_disk(
    layers: list[DenseLayer], moments: dict[str, Moments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(entries, "save_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        Database(tmp_path / "db").solve(layers[0], moments[layers[0].layer.name], None, 5, recipe())
    assert [path.name for path in (tmp_path / "db").rglob("*") if path.is_file()] == [MARKER]


# whole models


def surroundings(stack: ExitStack, settings: Recipe, database: Path | None = None) -> Surroundings:
    model = load_model(conv_net())
    options = Options("top1", None, False, False, 2, False, False, database=Database(database))
    job = Job(
        settings, options, RunFolder(None), model, dataset(model, images(40)), None, "onnxruntime", Silent()
    )
    return Run(job, stack).surroundings()[0]


def native(model: Any) -> bytes:
    assert isinstance(model.native, onnx.ModelProto)
    return bytes(model.native.SerializeToString(deterministic=True))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_stitched_model_is_the_one_pruned_directly(tmp_path: Path, pattern: str) -> None:
    settings = recipe(sparsity=0.5, pruning={"method": "wanda_refit", "pattern": pattern})
    with ExitStack() as stack:
        around = surroundings(stack, settings, tmp_path / "db")
        direct = compress(replace(around, database=Database(None)), 0.5, "direct")
        choice = {name: Level(zeros, pattern) for name, zeros in direct.zeros.items()}
        found = [stitch(around, choice), stitch(around, choice)]
        assert (around.database.misses, around.database.hits) == (5, 5 + 10)
        unknown = replace(around, database=Database(None), recipe=recipe(sparsity=0.9))
        found.append(stitch(unknown, choice))
    for one in found:
        assert native(one.model) == native(direct.model)
        for name, solution in direct.solutions.items():
            assert one.solutions[name].weight.tobytes() == solution.weight.tobytes()
            assert one.zeros[name] == np.count_nonzero(solution.weight == 0.0)


def test_a_stitched_model_with_its_statistics_corrected() -> None:
    """On the way through the network zeros stay zeros and integers integers."""
    with ExitStack() as stack:
        around = surroundings(stack, recipe())
        choice = {item.layer.name: Level(item.layer.size // 2) for item in around.dense}
        choice["branch2"] = replace(choice["branch2"], bits=4)
        plain = stitch(around, choice)
        found = stitch(around, choice, steps=Steps(differential=True))
    before, after = plain.solutions["branch2"], found.solutions["branch2"]
    assert before.scale is not None
    assert after.scale is not None
    assert not np.array_equal(before.scale, after.scale)
    steps = [
        solution.weight / solution.scale[..., None]
        for solution in (before, after)
        if solution.scale is not None
    ]
    assert np.allclose(steps[0], steps[1], atol=1e-9)
    for name, solution in found.solutions.items():
        assert np.array_equal(solution.mask, plain.solutions[name].mask)
    assert native(found.model) != native(plain.model)


def written(net: onnx.ModelProto, sparsity: float, **named: Any) -> bytes:
    """What a run with curves and a walk through the network delivers."""
    sections = {
        "allocation": {"levels": 3, "refine": "never"},
        "finish": {"activations": "never", "distillation": "never"},
    }
    settings = validate_recipe({"sparsity": sparsity, **QUICK, **sections})
    result = optimize(net, images(48), recipe=settings, measure_latency=False, baseline_int8=False, **named)
    assert isinstance(result.model, onnx.ModelProto)
    return bytes(result.model.SerializeToString(deterministic=True))


def test_the_job_gives_the_same_bytes_with_a_database(tmp_path: Path) -> None:
    """Cold and warm, with 1 and with 4 threads."""
    without = written(conv_net(), 0.5, threads=1)
    assert written(conv_net(), 0.5, database=tmp_path / "db", threads=4) == without
    known = contents(tmp_path / "db")
    assert written(conv_net(), 0.5, database=tmp_path / "db", threads=1) == without
    assert contents(tmp_path / "db") == known


def test_another_sparsity_finds_the_levels_of_the_curves(tmp_path: Path) -> None:
    """Of layers with few samples, whose shrinkage is chosen."""
    assert written(plain_net(), 0.5, database=tmp_path / "db") == written(plain_net(), 0.5)
    known = contents(tmp_path / "db")
    assert len(entry_files(tmp_path / "db")) >= 2 * 3
    assert written(plain_net(), 0.7, database=tmp_path / "db") == written(plain_net(), 0.7)
    assert len(contents(tmp_path / "db")) - len(known) <= 2


def test_the_log_tells_what_was_read(tmp_path: Path) -> None:
    for out, expected in (("a", "0 solutions read, 2 computed"), ("b", "2 solutions read, 0 computed")):
        optimize(
            plain_net(),
            images(20),
            recipe=recipe(),
            database=str(tmp_path / "db"),
            output=tmp_path / out,
            measure_latency=False,
        )
        assert expected in (tmp_path / out / "run.log").read_text()


def test_a_run_and_its_database_have_a_folder_each(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot share the folder"):
        optimize(plain_net(), images(8), output=tmp_path / "x", database=tmp_path / "y" / ".." / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_a_foreign_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(plain_net(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=images(8))
    files = [str(tmp_path / name) for name in ("net.onnx", "data.npz", "out")]
    folder = str(foreign(tmp_path / "db"))
    assert main(["optimize", files[0], "-c", files[1], "-o", files[2], "--database", folder]) == 2
    assert "holds no database" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
