"""Cutting a graph: every layer once and in order, and the partial runs add up to the whole model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from pot_sparsity.engines import get_engine
from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.graph import Graph
from pot_sparsity.graph.layers import Layer
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.normalization import (
    find_normalizations,
    read_normalization,
    write_normalization,
)
from pot_sparsity.graph.onnx_model import OnnxModel
from pot_sparsity.pipeline.repair.sequential import wanted_output
from pot_sparsity.pipeline.repair.stages import Cut, Residual, StagePlan, plan_stages
from tests.pipeline.nets import Array, conv_net, images, node, normal, proto, shared_net
from tests.pipeline.norm_nets import FORMS, LENGTH, WIDTH, norm_net


def diamond_net() -> onnx.ModelProto:
    """Paths of unequal length that meet, a layer without dependence on the others, and an early output."""
    constants = {f"w{i}": normal(i, 6, 6, scale=0.5) for i in range(5)}
    nodes = [
        node("MatMul", ["x", "w0"], "a"),
        node("MatMul", ["a", "w1"], "b"),
        node("Relu", ["b"], "early"),
        node("MatMul", ["early", "w2"], "c"),
        node("MatMul", ["x", "w3"], "d"),
        node("Mul", ["c", "d"], "e"),
        node("Add", ["e", "a"], "f"),
        node("MatMul", ["f", "w4"], "y"),
    ]
    return proto(nodes, constants, ["n", 6], ["y", "early"])


NETS = {
    "conv": (conv_net, (3, 8, 8)),
    "diamond": (diamond_net, (6,)),
    "shared": (shared_net, (7,)),
}


def single(graph: Graph) -> list[Layer]:
    return [layer for layer in find_layers(graph).layers if not layer.shared]


def inputs_for(model: Model, shape: tuple[int, ...], batch: int = 2) -> dict[str, Array]:
    return {model.graph.inputs[0]: normal(77, batch, *shape)}


def advance(model: Model, cut: Cut, alive: dict[str, Array]) -> dict[str, Array]:
    """One partial run, by the book: only what the cut names is fed and kept."""
    after = {name: alive[name] for name in cut.carried}
    if cut.outputs:
        executable = get_engine("openvino", 1).compile(model.extract(outputs=cut.outputs, inputs=cut.inputs))
        assert set(executable.inputs) <= set(cut.inputs)
        after |= executable.run({name: alive[name] for name in executable.inputs})
    return after


def tap(model: Model, feeds: dict[str, Array], tensors: list[str]) -> dict[str, Array]:
    executable = get_engine("openvino", 1).compile(model.extract(outputs=tuple(dict.fromkeys(tensors))))
    return executable.run(feeds)


@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_visited_once_and_after_those_it_depends_on(name: str) -> None:
    graph = OnnxModel(NETS[name][0]()).graph
    layers = single(graph)
    plans = plan_stages(graph, layers)
    visited = [layer.name for plan in plans for layer, _ in plan.layers]
    assert sorted(visited) == sorted(layer.name for layer in layers)
    stage = {layer.name: index for index, plan in enumerate(plans) for layer, _ in plan.layers}
    for layer in layers:
        for later in layers:
            if depends(graph, later.places[0].input, layer.places[0].node):
                assert stage[layer.name] < stage[later.name]


def depends(graph: Graph, tensor: str, on: str) -> bool:
    pending = [tensor]
    while pending:
        producer = graph.producer(pending.pop())
        if producer is None:
            continue
        if producer.name == on:
            return True
        pending.extend(name for name in producer.inputs if name)
    return False


def test_layers_that_read_one_tensor_share_a_stage() -> None:
    plans = plan_stages(graph := OnnxModel(conv_net()).graph, single(graph))
    assert [[layer.name for layer, _ in plan.layers] for plan in plans] == [
        ["conv1"],
        ["branch1", "branch2"],
        ["depthwise"],
        ["y"],
    ]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("side", ["sparse", "dense"])
def test_walking_the_cuts_gives_what_the_whole_model_gives(name: str, side: str) -> None:
    build, shape = NETS[name]
    model = OnnxModel(build())
    plans = plan_stages(model.graph, single(model.graph))
    feeds = inputs_for(model, shape)
    places = [place for plan in plans for _, place in plan.layers]
    expected = tap(model, feeds, [tensor for place in places for tensor in (place.input, place.output)])
    alive = dict(feeds)
    for plan in plans:
        alive = advance(model, cut_of(plan, side), alive)
        for _, place in plan.layers:
            tensors = [place.input] if side == "sparse" else [place.output]
            for tensor in tensors:
                np.testing.assert_allclose(alive[tensor], expected[tensor], rtol=1e-5, atol=1e-6)


def cut_of(plan: StagePlan, side: str) -> Cut:
    return plan.sparse if side == "sparse" else plan.dense


@pytest.mark.parametrize("name", NETS)
def test_the_sparse_side_sees_the_weights_written_before_each_stage(name: str) -> None:
    """Layers rewritten as soon as their stage is solved: the walk must equal the fully rewritten model."""
    build, shape = NETS[name]
    model = OnnxModel(build())
    final = OnnxModel(build())
    layers = single(model.graph)
    for layer in layers:
        final.set_constant(
            layer.constant, np.asarray(final.graph.value(layer.constant), np.float32) * np.float32(0.5)
        )
    plans = plan_stages(model.graph, layers)
    feeds = inputs_for(model, shape)
    places = [place for plan in plans for _, place in plan.layers]
    expected = tap(final, feeds, [place.input for place in places])
    alive = dict(feeds)
    for plan in plans:
        alive = advance(model, plan.sparse, alive)
        for layer, place in plan.layers:
            np.testing.assert_allclose(alive[place.input], expected[place.input], rtol=1e-5, atol=1e-6)
            model.set_constant(layer.constant, final.graph.value(layer.constant))


def test_a_cut_holds_no_tensor_longer_than_needed() -> None:
    """The network's input is dead once the first convolution ran."""
    model = OnnxModel(conv_net())
    plans = plan_stages(model.graph, single(model.graph))
    alive: dict[str, Array] = {model.graph.inputs[0]: images(2)}
    sizes = []
    for plan in plans:
        alive = advance(model, plan.dense, alive)
        sizes.append(sorted(alive))
    assert "x" in plans[0].sparse.carried
    assert all("x" not in names for names in sizes)
    assert len(sizes[-1]) == 1


def test_shared_weights_are_refused() -> None:
    graph = OnnxModel(shared_net()).graph
    with pytest.raises(ValueError, match="'m1' is used in 2 places"):
        plan_stages(graph, find_layers(graph).layers)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_normalizations_are_looked_at_before_they_are_run(form: str) -> None:
    """Each is rewritten as soon as its stage is over: the walk must equal the fully rewritten model."""
    model, final = OnnxModel(norm_net(FORMS[form])), OnnxModel(norm_net(FORMS[form]))
    norms = find_normalizations(model.graph)
    rewritten = {item.name: read_normalization(model, item)[0] * 1.5 for item in norms}
    for item in norms:
        write_normalization(final, item, rewritten[item.name], None)
    plans = plan_stages(model.graph, single(model.graph), norms)
    assert [[item.name for item in plan.normalizations] for plan in plans if plan.normalizations] == [
        [item.name] for item in norms
    ]
    feeds = inputs_for(model, (LENGTH, WIDTH))
    outputs = [item.output for item in norms]
    dense, expected = tap(model, feeds, outputs), tap(final, feeds, outputs)
    sparse_alive, dense_alive, before = dict(feeds), dict(feeds), OnnxModel(norm_net(FORMS[form]))
    for plan in plans:
        dense_alive = advance(before, plan.dense, dense_alive)
        looked = advance(
            model, replace(plan.sparse, outputs=plan.sparse.outputs + plan.sparse.taps), sparse_alive
        )
        for item in plan.normalizations:
            assert item.output in plan.sparse.taps
            np.testing.assert_allclose(dense_alive[item.output], dense[item.output], rtol=1e-5, atol=1e-6)
            shift = read_normalization(model, item)[1]
            offset = 0.0 if shift is None else shift
            scaled = (looked[item.output] - offset) * 1.5 + offset
            np.testing.assert_allclose(scaled, expected[item.output], rtol=1e-4, atol=1e-5)
            write_normalization(model, item, rewritten[item.name], None)
        sparse_alive = {name: value for name, value in looked.items() if name not in plan.sparse.taps}


def block_net() -> onnx.ModelProto:
    """A block whose last layer meets a skip that is there before it, and one whose sum another layer completes."""
    constants = {f"w{i}": normal(90 + i, 6, 6, scale=0.5) for i in range(5)}
    constants["shift"] = normal(99, 6)
    nodes = [
        node("MatMul", ["x", "w0"], "a"),
        node("Relu", ["a"], "ra"),
        node("MatMul", ["ra", "w1"], "b"),
        node("Relu", ["b"], "rb"),
        node("MatMul", ["rb", "w2"], "c"),
        node("Add", ["c", "ra"], "sum"),
        node("Relu", ["sum"], "rs"),
        node("MatMul", ["rs", "w3"], "d"),
        node("MatMul", ["rs", "w4"], "e"),
        node("Add", ["d", "e"], "both"),
        node("Mul", ["both", "shift"], "y"),
    ]
    return proto(nodes, constants, ["n", 6])


def test_residual_sums_are_seen_and_their_parts_are_at_hand() -> None:
    model = OnnxModel(block_net())
    plans = plan_stages(model.graph, single(model.graph))
    ends = {name: end for plan in plans for name, end in plan.residuals.items()}
    names = {layer.places[0].output: layer.name for plan in plans for layer, _ in plan.layers}
    assert ends == {
        names["c"]: Residual("sum", "ra")
    }  # d and e come together: neither is there before the other
    feeds = inputs_for(model, (6,))
    expected = tap(model, feeds, ["sum", "ra", "c"])
    sparse_alive, dense_alive = dict(feeds), dict(feeds)
    for plan in plans:
        sparse_alive = advance(model, plan.sparse, sparse_alive)
        dense_alive = advance(model, plan.dense, dense_alive)
        for layer, place in plan.layers:
            target = wanted_output(plan, layer, place, sparse_alive, dense_alive)
            if layer.name in plan.residuals:
                moved = {**sparse_alive, "ra": sparse_alive["ra"] + 1.0}
                np.testing.assert_allclose(target, expected["c"], rtol=1e-4, atol=1e-5)
                shifted = wanted_output(plan, layer, place, moved, dense_alive)
                np.testing.assert_allclose(shifted, expected["c"] - 1.0, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(target, dense_alive[place.output])
