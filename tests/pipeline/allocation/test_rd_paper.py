"""The published procedure of rate-distortion pruning, as recipes and as the measure of the fast curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from pot_sparsity.algorithms.allocation.curves import Curve
from pot_sparsity.algorithms.arrays import Float64, Moments
from pot_sparsity.data import Dataset
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import RecipeError
from pot_sparsity.graph.load import load_model
from pot_sparsity.graph.model import Model
from pot_sparsity.pipeline import optimize
from pot_sparsity.pipeline.allocation.allocate import allocate
from pot_sparsity.pipeline.allocation.curves import measure_curves, sample_number
from pot_sparsity.pipeline.allocation.probes import noise_like
from pot_sparsity.pipeline.allocation.rounds import round_sparsities
from pot_sparsity.pipeline.collect import collect_moments
from pot_sparsity.pipeline.compress import Compressed, compress
from pot_sparsity.pipeline.prepare import prepare
from pot_sparsity.pipeline.progress import Silent
from pot_sparsity.pipeline.runfolder import RunFolder
from pot_sparsity.pipeline.solve import DenseLayer, Solution, apply, prune_layer, read_dense
from pot_sparsity.recipe import Recipe, load_recipe
from tests.pipeline.nets import conv_net, dataset, images, normal, plain_net, shared_net

ENGINE = get_engine("onnxruntime", 1)  # the quicker one to compile
SAMPLES = 40


class Ready:
    """A network with everything that curves are measured from."""

    def __init__(self, native: Any, recipe: Recipe) -> None:
        self.recipe = recipe
        original = load_model(native)
        shape = original.inputs[0].shape
        assert shape is not None
        self.values = images(SAMPLES, 5) if len(shape) == 4 else normal(205, SAMPLES, int(shape[1] or 1))
        self.samples: Dataset = dataset(original, self.values)
        found = prepare(original, recipe, ENGINE, self.samples, ignored_scope=None, keep_structure=False)
        self.model: Model = found.model
        self.dense = read_dense(found.model, found.layers, found.gains)
        self.moments: dict[str, Moments] = collect_moments(
            found.model,
            found.layers,
            ENGINE,
            self.samples,
            batch_size=16,
            threads=1,
            max_positions=None,
            progress=Silent(),
        )

    def curves(self, recipe: Recipe | None = None, samples: Dataset | None = None) -> dict[str, Curve]:
        return measure_curves(
            self.model,
            self.dense,
            self.moments,
            {},
            samples or self.samples,
            ENGINE,
            recipe or self.recipe,
            threads=1,
            folder=RunFolder(None),
            progress=Silent(),
        )

    def outputs(self, model: Model, names: tuple[str, ...]) -> list[Float64]:
        found = ENGINE.compile(model.extract(outputs=names)).run({self.model.graph.inputs[0]: self.values})
        return [np.asarray(found[name], np.float64).reshape(SAMPLES, -1) for name in names]

    def distances(self, zeros: Mapping[str, int], names: tuple[str, ...] | None = None) -> Float64:
        """Squared distances ``[samples]`` with these layers pruned by magnitude, from the whole network."""
        names = names or tuple(info.name for info in self.model.outputs)
        changed = self.model.copy()
        for item in self.dense:
            if zeros.get(item.layer.name):
                apply(changed, item.layer, smallest_gone(item, zeros[item.layer.name]))
        pairs = zip(self.outputs(self.model, names), self.outputs(changed, names), strict=True)
        return np.asarray(
            np.sum([np.square(before - after).sum(axis=1) for before, after in pairs], axis=0), np.float64
        )


def smallest_gone(item: DenseLayer, zeros: int) -> Solution:
    """The plain way: sort what the weights were before BatchNorm was fused."""
    gain = 1.0 if item.gain is None else item.gain[:, :, None]
    order = np.argsort(np.abs(item.weight / gain).ravel(), kind="stable")
    weight = item.weight.ravel().copy()
    weight[order[:zeros]] = 0.0
    return Solution(weight.reshape(item.weight.shape), item.biases, 0.0, 0.0)


def published(**allocation: Any) -> Recipe:
    changes = [f"allocation.{key}={value}" for key, value in allocation.items()]
    return load_recipe("rd", changes)


def filtered(levels: Float64, distortion: Float64) -> tuple[Float64, Float64]:
    """Local maxima that break monotonicity are deleted, one after the other, until there are none."""
    points = list(zip(levels.tolist(), distortion.tolist(), strict=True))
    while True:
        wrong = [i for i in range(len(points) - 1) if points[i][1] > points[i + 1][1]]
        if not wrong:
            kept = np.array(points)
            return kept[:, 0], kept[:, 1]
        del points[wrong[0]]


@pytest.mark.parametrize("aggregate", ["mean", "worst"])
@pytest.mark.parametrize("cleaning", ["none", "outliers"])
def test_curves_are_the_published_ones(aggregate: str, cleaning: str) -> None:
    ready = Ready(conv_net(), published(levels=8, aggregate=aggregate, cleaning=cleaning))
    assert any(item.gain is not None for item in ready.dense)
    curves = ready.curves()
    for item in ready.dense:
        name, size = item.layer.name, item.layer.size
        levels = np.array([round(k / 8 * size) for k in range(1, 9)], np.float64)
        every = [ready.distances({name: int(zeros)}) for zeros in levels]
        distortion = np.array([part.max() if aggregate == "worst" else part.mean() for part in every])
        if cleaning == "outliers":
            levels, distortion = filtered(levels, distortion)
        wanted = np.arange(size + 1)
        expected = np.interp(wanted, np.append(0.0, levels), np.append(0.0, distortion))
        curve = curves[name]
        known = curve.zeros
        np.testing.assert_allclose(curve.distortion, expected[known], rtol=2e-4, atol=1e-7 * distortion.max())


def test_the_filter_has_something_to_do() -> None:
    ready = Ready(conv_net(), published(levels=8, cleaning="none"))
    falls = [(np.diff(curve.distortion) < 0.0).any() for curve in ready.curves().values()]
    assert any(falls)
    kept = ready.curves(published(levels=8))
    assert all((np.diff(curve.distortion) >= 0.0).all() for curve in kept.values())


def test_a_layer_of_its_own_is_compared_at_its_own_output() -> None:
    ready = Ready(conv_net(), published(levels=6, objective="layer", aggregate="mean", cleaning="none"))
    curves = ready.curves()
    for item in ready.dense:
        name, (place,) = item.layer.name, item.layer.places
        zeros = np.array([round(k / 6 * item.layer.size) for k in range(1, 7)])
        expected = [ready.distances({name: int(count)}, (place.output,)).mean() for count in zeros]
        np.testing.assert_allclose(curves[name].at(zeros), expected, rtol=2e-4)


def test_a_shared_weight_is_compared_at_all_its_outputs() -> None:
    ready = Ready(shared_net(), published(levels=4, objective="layer", aggregate="mean", cleaning="none"))
    (item,) = (item for item in ready.dense if item.layer.shared)
    zeros = np.array([round(k / 4 * item.layer.size) for k in range(1, 5)])
    names = tuple(place.output for place in item.layer.places)
    expected = [ready.distances({item.layer.name: int(count)}, names).mean() for count in zeros]
    np.testing.assert_allclose(ready.curves()[item.layer.name].at(zeros), expected, rtol=2e-4)


@pytest.mark.parametrize("aggregate", ["mean", "worst"])
def test_fast_curves_agree_with_the_published_ones(aggregate: str) -> None:
    slow = Ready(conv_net(), published(levels=50, aggregate=aggregate))
    changes = {"levels": 6, "spacing": "density", "aggregate": aggregate, "cleaning": "isotonic"}
    fast_recipe = published(**changes)
    exact, fast = slow.curves(), slow.curves(fast_recipe)
    sparsities = np.linspace(0.3, 0.97, 30)
    both = np.array(
        [
            [
                curves[item.layer.name].at(np.rint(sparsities * item.layer.size).astype(np.int64))
                for item in slow.dense
            ]
            for curves in (exact, fast)
        ]
    ).reshape(2, -1)
    assert spearmanr(both[0], both[1]).statistic > 0.95
    for sparsity in (0.5, 0.7):
        wanted = allocate(slow.dense, slow.recipe, sparsity, exact)
        found = allocate(slow.dense, fast_recipe, sparsity, fast)
        sizes = {item.layer.name: item.layer.size for item in slow.dense}
        moved = sum(abs(found[name] - wanted[name]) for name in sizes)
        assert moved <= 0.12 * sum(sizes.values())


def test_noise_does_not_look_at_the_samples() -> None:
    ready = Ready(conv_net(), published(levels=5))
    noise = noise_like(ready.samples, 24, 3)
    other = noise_like(dataset(load_model(conv_net()), images(3, 9)), 24, 3)
    assert noise.fingerprint == other.fingerprint
    (batch,) = noise.batches(24)
    assert not noise.has_labels
    (values,) = batch.inputs.values()
    assert values.shape == (24, 3, 8, 8)
    assert values.dtype == np.float32
    assert abs(float(values.mean())) < 0.05
    assert float(values.std()) == pytest.approx(1.0, abs=0.05)
    first, second = ready.curves(samples=noise), ready.curves(samples=other)
    for name, curve in first.items():
        np.testing.assert_array_equal(curve.distortion, second[name].distortion)


def test_noise_is_what_a_run_allocates_by(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Dataset] = []

    def spy(
        model: Model, dense: Any, moments: Any, held: Any, samples: Dataset, *rest: Any, **more: Any
    ) -> Any:
        seen.append(samples)
        return measure_curves(model, dense, moments, held, samples, *rest, **more)

    monkeypatch.setattr("pot_sparsity.pipeline.run.measure_curves", spy)
    report = optimize(
        conv_net(),
        images(24),
        recipe=published(levels=5, inputs="noise", samples=30),
        engine="onnxruntime",
        baseline_int8=False,
        measure_latency=False,
    ).report
    assert report.sparsity_reached == pytest.approx(0.5, abs=0.01)
    ((batch,),) = (list(samples.batches(30)) for samples in seen)
    expected = np.random.default_rng(0).standard_normal((30, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(next(iter(batch.inputs.values())), expected)


class Numbers:
    """A dataset of whole numbers."""

    has_labels = False
    fingerprint = "numbers"

    def __len__(self) -> int:
        return 1

    def batches(self, size: int) -> Any:
        from pot_sparsity.data.dataset import Batch

        yield Batch({"ids": np.zeros((1, 4), np.int64)})

    def subset(self, indices: Any) -> Numbers:
        return self


def test_noise_is_refused_where_inputs_are_whole_numbers() -> None:
    with pytest.raises(RecipeError, match="'noise' needs floating-point inputs, 'ids' takes int64"):
        noise_like(Numbers(), 3, 0)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Compressed]:
    found: list[Compressed] = []

    def spy(*given: Any, **more: Any) -> Compressed:
        found.append(compress(*given, **more))
        return found[-1]

    monkeypatch.setattr("pot_sparsity.pipeline.candidates.compress", spy)
    return found


@pytest.mark.parametrize("net", [conv_net, plain_net])
def test_rounds_reach_their_totals_and_never_give_zeros_back(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = recorded(monkeypatch)
    measured: list[float] = []

    def spy(*given: Any, **more: Any) -> dict[str, Curve]:
        curves = measure_curves(*given, **more)
        for item in given[1]:
            present = int((item.weight == 0.0).sum())
            measured.append(float(curves[item.layer.name].at(np.array([present]))[0]))
        return curves

    monkeypatch.setattr("pot_sparsity.pipeline.run.measure_curves", spy)
    recipe = load_recipe("rd_iterative", ["sparsity=0.5", "allocation.levels=4", "allocation.samples=24"])
    report = optimize(
        net(), images(24), recipe=recipe, engine="onnxruntime", baseline_int8=False, measure_latency=False
    ).report
    weights = sum(layer.weights for layer in report.layers if layer.ignored is None)
    left, totals = weights, []
    while weights - left < round(0.5 * weights):
        left -= round(0.2 * left)
        totals.append(min(weights - left, round(0.5 * weights)))
    assert [iteration.zeros for iteration in report.iterations] == totals
    assert [sum(result.zeros.values()) for result in results] == totals
    assert len(measured) == len(totals) * len(results[0].zeros)
    assert measured == [0.0] * len(measured)  # what is zero already costs nothing
    for result in results:
        counts = {name: int((s.weight == 0.0).sum()) for name, s in result.solutions.items()}
        assert counts == result.zeros
    for before, after in pairwise(results):
        for name, solution in before.solutions.items():
            assert (after.solutions[name].weight[~solution.mask] == 0.0).all()


def test_rounds_end_where_the_model_has_its_zeros_already() -> None:
    ready = Ready(conv_net(), load_recipe("rd_iterative", ["sparsity=0.4"]))
    assert round_sparsities(ready.dense, ready.recipe)[-1] == 0.4
    pruned = [replace(item, weight=smallest_gone(item, item.layer.size // 2).weight) for item in ready.dense]
    assert round_sparsities(pruned, ready.recipe) == [0.4]


def test_weights_are_ranked_as_they_were_before_fusing() -> None:
    ready = Ready(conv_net(), published())
    (item,) = (item for item in ready.dense if item.gain is not None)
    for zeros in (1, item.layer.size // 2, item.layer.size - 1):
        found = prune_layer(item, ready.moments[item.layer.name], None, zeros, ready.recipe)
        np.testing.assert_array_equal(found.weight, smallest_gone(item, zeros).weight)
        second = ready.moments[item.layer.name].second
        delta = found.weight - item.weight
        error = np.einsum("grc,gcd,grd->", delta, second, delta)
        energy = np.einsum("grc,gcd,grd->", item.weight, second, item.weight)
        assert found.relative_error == pytest.approx(error / energy)
    plain = load_recipe("rd", ["pruning.unfused=false"])
    other = prune_layer(item, ready.moments[item.layer.name], None, item.layer.size // 2, plain)
    assert (other.weight != smallest_gone(item, item.layer.size // 2).weight).any()
    with pytest.raises(RecipeError, match="unfused goes with 'method: magnitude'"):
        load_recipe("default", ["pruning.unfused=true"])


def test_the_recipes_are_as_published() -> None:
    for name, rounds in (("rd", "one"), ("rd_iterative", "iterative")):
        recipe = load_recipe(name)
        settings = recipe.allocation
        assert (settings.method, settings.solver, settings.rounds) == (
            "output_distortion",
            "dynamic_program",
            rounds,
        )
        assert (settings.levels, settings.spacing, settings.pruning) == (100, "linear", "magnitude")
        assert (settings.distance, settings.aggregate, settings.cleaning) == ("squared", "worst", "outliers")
        assert (settings.samples, settings.fewer_samples, settings.removed) == (1024, False, 0.2)
        assert (recipe.pruning.method, recipe.pruning.unfused) == ("magnitude", True)
        assert recipe.correction.bias is False
        assert {recipe.correction.differential, recipe.correction.normalization} == {"never"}
        assert {recipe.finish.activations, recipe.finish.rescaling, recipe.finish.distillation} == {"never"}
        assert not recipe.quantization.enabled


def test_samples_are_not_cut_where_the_recipe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = Ready(conv_net(), published(samples=900))
    monkeypatch.setattr("pot_sparsity.pipeline.allocation.curves.PASSES", 1.0)
    assert sample_number(ready.dense, ready.moments, SAMPLES, ready.recipe) == 900


def test_the_recipe_changes_nothing_but_zeros() -> None:
    result = optimize(
        conv_net(),
        images(24),
        recipe=load_recipe("rd", ["sparsity=0.6", "allocation.levels=5"]),
        engine="onnxruntime",
        baseline_int8=False,
        measure_latency=False,
    )
    report = result.report
    assert report.sparsity_reached == pytest.approx(0.6, abs=0.001)
    assert {stage.name for stage in report.stages} >= {"curves", "allocation", "pruning"}
    assert not {"reconstruction and correction", "finish"} & {stage.name for stage in report.stages}
    assert not report.decisions
