from __future__ import annotations

import pytest

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.algorithms.quantization.activations import fit_activation_grid
from pot_sparsity.engines import get_engine
from pot_sparsity.errors import DataError
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from pot_sparsity.pipeline.bits import ranges
from pot_sparsity.pipeline.bits.ranges import Ranges, fit_ranges
from tests.pipeline.nets import conv_net, dataset, images

ENGINE = get_engine("onnxruntime", 1)


def fitted(x: AnyArray, batch_size: int = 8) -> Ranges:
    model = load_model(conv_net())
    layers = find_layers(model.graph).layers
    return fit_ranges(model, layers, ENGINE, dataset(model, x), (4, 8), batch_size=batch_size, seed=0)


def test_small_samples_are_taken_whole() -> None:
    x = images(24)
    found = fitted(x)
    model = load_model(conv_net())
    assert set(found) == {layer.places[0].input for layer in find_layers(model.graph).layers}
    executable = ENGINE.compile(model.extract(outputs=list(found)))
    for tensor, values in executable.run({"x": x}).items():
        for bits in (4, 8):
            assert found[tensor][bits] == fit_activation_grid(values, bits)


def test_a_draw_keeps_the_ends_and_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "VALUES", 600)
    x = images(24)
    first = fitted(x)
    assert first == fitted(x)
    whole = fit_activation_grid(x, 8)
    assert first["x"][8].high == pytest.approx(whole.high, rel=0.1)
    assert first["x"][8].low == pytest.approx(whole.low, rel=0.1)


def test_values_that_are_not_finite_are_refused() -> None:
    x = images(8)
    x[3] = 3e38  # what the first layer makes of it overflows
    with pytest.raises(DataError, match="tensor 'relu1' has no range"):
        fitted(x)
