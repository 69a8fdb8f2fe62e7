"""Kept weights and biases of all layers trained together to give the dense network's output (knowledge distillation).

No labels: the dense network says what is wanted, at the calibration samples and at as many variations of them as the
steps take. Zeros stay zeros. (Hinton et al. 2015, "Distilling the knowledge in a neural network", on the outputs
before the softmax as in Ba & Caruana 2014, "Do deep nets really need to be deep?"; Adam, Kingma & Ba 2015.)
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pot_sparsity.algorithms.arrays import AnyArray, Float64
from pot_sparsity.data.dataset import Dataset
from pot_sparsity.data.drawing import Drawn
from pot_sparsity.engines.base import Engine
from pot_sparsity.engines.jax_engine import DifferentiableModel, NotDifferentiable, limit_threads
from pot_sparsity.errors import ModelError
from pot_sparsity.graph.chains import MOVES
from pot_sparsity.graph.graph import Graph
from pot_sparsity.graph.layers import Layer, flops
from pot_sparsity.graph.model import Model
from pot_sparsity.graph.weights import read_bias, read_weight, write_bias, write_weight
from pot_sparsity.pipeline.evaluate import feeds, float_outputs
from pot_sparsity.pipeline.progress import Progress, track
from pot_sparsity.pipeline.solve import DenseLayer, Solution

#: Decay of Adam's means of the gradient and of its square.
DECAYS = (0.9, 0.999)
#: Steps on which the rate rises to its full value; from there it falls along a half cosine.
WARM_UP = 20
#: Samples of a step, at most.
BATCH = 64
#: Whoever asks for smaller batches than this may have a model that takes no others.
UNSURE = 8
#: Steps after which the error is looked at: training that has diverged ends there.
LOOK = 50
#: Elements of all activations of a step, at most: they are kept until their derivatives are known.
ACTIVATIONS = 2**28
#: Runs of the network that a step on one sample costs: sparse forward, twice that backward, dense forward.
PASSES = 4
#: Operations that take as long as what a step does to one element of an activation: elementwise operators, pools and
#: depthwise convolutions wait for memory.
PER_ELEMENT = 300
#: Inputs per column that a layer must have seen to be trained.
FEW = 4
#: A channel's step is at least this part of its layer's.
FLOOR = 0.1
#: Added to the deviation of a gradient, whose square is nothing below the root of the smallest float32.
TINY = 1e-15

_Arrays = dict[str, jax.Array]
_Step = Callable[
    [_Arrays, tuple[_Arrays, _Arrays], Sequence[AnyArray], Sequence[AnyArray], float, float],
    tuple[_Arrays, tuple[_Arrays, _Arrays], jax.Array],
]


@dataclass(frozen=True)
class Plan:
    """How long a network is trained: ``epochs`` over the samples, ``batch`` of them at each step."""

    epochs: int
    batch: int


def plan(
    model: Model, dense: Sequence[DenseLayer], samples: int, epochs: int, budget: float, asked: int = BATCH
) -> Plan:
    """As many of the ``epochs`` as ``budget`` floating-point operations pay for, in steps that fit into memory.

    ``asked`` is the size of the batches that the user has asked for, or the default's: very small ones are kept to,
    for the model may take no others. A model with a fixed batch gets exactly that.

    Layers and activations whose sizes are not known count as free of cost.
    """
    graph = model.graph
    elements = max(1, _elements(graph))
    cost = (PASSES * sum(flops(item.layer, graph) or 0 for item in dense) + PER_ELEMENT * elements) * samples
    most = asked if asked < UNSURE else BATCH
    batch = model.batch_size or max(1, min(most, ACTIVATIONS // elements))
    return Plan(int(min(epochs, budget / cost)), batch)


def _elements(graph: Graph) -> int:
    """Elements of all activations of one sample."""
    total = 0
    for node in graph:
        if node.op in ("Constant", "Parameter", "Result"):
            continue
        for tensor in node.outputs:
            shape = graph.tensor(tensor).shape if tensor else None
            if shape and all(size is not None for size in shape[1:]):
                total += int(np.prod([size or 1 for size in shape[1:]]))
    return total


def trainable(
    dense: Sequence[DenseLayer],
    model: Model,
    solutions: Mapping[str, Solution],
    seen: Mapping[str, float],
) -> list[Layer]:
    """Layers whose weights are real numbers in the model, with no grid and no integers behind a scale.

    Left out are those that have ``seen`` fewer than :data:`FEW` inputs per column, as classifiers of many classes do
    behind a global pooling: they would learn the samples by heart.
    """
    graph = model.graph
    return [
        item.layer
        for item in dense
        if solutions[item.layer.name].scale is None
        and seen[item.layer.name] >= FEW * item.layer.cols
        and all(graph.node(name).op in MOVES | {"Convert"} for name in item.layer.chain)
        and graph.value(item.layer.constant).dtype in (np.float32, np.float16)
    ]


def distilled(
    dense_model: Model,
    model: Model,
    solutions: Mapping[str, Solution],
    layers: Sequence[Layer],
    fit: Dataset,
    engine: Engine,
    plan: Plan,
    *,
    rate: float,
    vary: bool,
    seed: int,
    threads: int,
    progress: Progress,
) -> dict[str, Solution]:
    """Train a sparse model's weights and biases against the dense model's output.

    Parameters
    ----------
    dense_model, model
        The same network, dense and sparse.
    solutions
        What is written into the sparse model, by layer.
    layers
        Those to train; see :func:`trainable`.
    fit
        Samples.
    plan
        How long; see :func:`plan`.
    rate
        Largest step of a weight, in units of the root mean square of its channel's kept weights.
    vary
        Whether samples are mirrored, shifted and mixed; see :class:`~pot_sparsity.data.drawing.Drawn`.

    Raises
    ------
    NotDifferentiable
        The network has an operator that no derivative is known for, or two constants of one name.
    ModelError
        The steps were so large that a weight is no finite number of its stored type.
    """
    limit_threads(threads)
    steps = _steps(model, layers)
    wanted = [model.graph.outputs[position] for position in float_outputs(dense_model)]
    runnable = model.extract(outputs=wanted)
    try:
        network = DifferentiableModel(runnable, plan.batch, list(steps))
    except KeyError as error:  # names need not be unique in an IR
        raise NotDifferentiable(str(error.args[0])) from error
    if any(shape[:1] != (plan.batch,) for shape in network.input_shapes):
        raise NotDifferentiable(f"its inputs do not all take batches of {plan.batch}")
    teacher = engine.compile(dense_model.extract(outputs=wanted))
    with (
        jax.default_device(jax.devices("cpu")[0]),
        Drawn(fit, vary=vary, seed=seed) as samples,
        interruptible() as check_interrupt,
    ):
        values: _Arrays = {name: jnp.asarray(value) for name, value in network.values.items()}
        state = _zeros(values), _zeros(values)
        step = _stepper(network, steps)
        total = plan.epochs * max(1, len(fit) // plan.batch)
        batches = (batch for _ in range(plan.epochs) for batch in samples.epoch(plan.batch))
        shown = track(batches, progress, "Distilling the dense network", total)
        for done, batch in enumerate(shown, 1):
            found = teacher.run(feeds(dense_model, teacher, batch))
            inputs = [_single(array) for array in feeds(dense_model, runnable, batch).values()]
            targets = [found[name] for name in wanted]
            if done == 1:
                _check(network, values, inputs, targets)
            values, state, value = step(
                values, state, inputs, targets, rate * _share(done, total), float(done)
            )
            check_interrupt()
            if done % LOOK == 0 and not np.isfinite(float(value)):
                raise ModelError("training has diverged: a smaller step is needed (finish.rate)")
        trained = {name: np.asarray(value) for name, value in values.items()}
    return _read(model, solutions, layers, trained)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let an interrupt wait for the function that this yields: within a step of XLA it would end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        check()


def _zeros(values: _Arrays) -> _Arrays:
    return {name: jnp.zeros_like(value) for name, value in values.items()}


def _check(
    network: DifferentiableModel, values: _Arrays, inputs: Sequence[AnyArray], targets: Sequence[AnyArray]
) -> None:
    """NotDifferentiable unless everything has a derivative and outputs have the shapes of the dense model's."""
    try:
        shapes = [found.shape for found in jax.eval_shape(network, values, inputs)]
        if shapes != [target.shape for target in targets]:
            raise NotDifferentiable(f"the model does not take batches of {len(inputs[0])}")
        jax.eval_shape(jax.grad(_loss(network)), values, inputs, targets)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise NotDifferentiable(str(error)) from error


def _single(array: AnyArray) -> AnyArray:
    """As the network takes it: real numbers of any width in float32."""
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _share(done: int, total: int) -> float:
    """Part of the full rate at a step, from 1 to ``total``."""
    return min(1.0, done / WARM_UP) * 0.5 * (1.0 + float(np.cos(np.pi * done / (total + 1))))


def _loss(
    network: DifferentiableModel,
) -> Callable[[_Arrays, Sequence[jax.Array], Sequence[jax.Array]], jax.Array]:
    """Energy of the outputs' errors in units of the outputs', summed over those that are not all zero."""

    def loss(values: _Arrays, inputs: Sequence[jax.Array], targets: Sequence[jax.Array]) -> jax.Array:
        total = jnp.zeros(())
        for found, target in zip(network(values, inputs), targets, strict=True):
            error, energy = jnp.sum(jnp.square(found - target)), jnp.sum(jnp.square(target))
            total += jnp.where(energy > 0.0, error, 0.0) / jnp.where(energy > 0.0, energy, 1.0)
        return total

    return loss


def _stepper(network: DifferentiableModel, steps: Mapping[str, AnyArray]) -> _Step:
    """One step of Adam on all constants, each entry in its own unit."""
    loss = _loss(network)
    units = {name: jnp.asarray(value, jnp.float32) for name, value in steps.items()}
    first, second = DECAYS

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        values: _Arrays,
        state: tuple[_Arrays, _Arrays],
        inputs: Sequence[jax.Array],
        targets: Sequence[jax.Array],
        rate: float,
        count: float,
    ) -> tuple[_Arrays, tuple[_Arrays, _Arrays], jax.Array]:
        value, gradient = jax.value_and_grad(loss)(values, inputs, targets)
        mean = {name: first * state[0][name] + (1 - first) * gradient[name] for name in values}
        power = {name: second * state[1][name] + (1 - second) * gradient[name] ** 2 for name in values}
        moved = {}
        for name in values:
            direction = mean[name] / (1 - first**count)
            deviation = jnp.sqrt(power[name] / (1 - second**count))
            moved[name] = values[name] - rate * units[name] * direction / (deviation + TINY)
        return moved, (mean, power), value

    return step


def _steps(model: Model, layers: Sequence[Layer]) -> dict[str, AnyArray]:
    """By constant, in its stored shape, the unit of each entry's steps: 0 for weights that are zero."""
    scratch = model.copy()
    found: dict[str, AnyArray] = {}
    for layer in layers:
        weight = read_weight(model, layer)
        channel, length = _sizes(weight)
        write_weight(scratch, layer, np.where(weight != 0.0, channel[..., None], 0.0))
        found[layer.constant] = np.abs(scratch.graph.value(layer.constant)).astype(np.float32)
        for place in layer.places:
            if place.bias is not None:
                write_bias(scratch, layer, place, length)
                found[place.bias.constant] = np.abs(scratch.graph.value(place.bias.constant)).astype(
                    np.float32
                )
    return found


def _sizes(weight: Float64) -> tuple[Float64, Float64]:
    """Of each channel ``[groups, rows]``: root mean square of its kept weights, and their Euclidean length."""
    power, kept = np.square(weight).sum(-1), np.count_nonzero(weight, axis=-1)
    of_layer = np.sqrt(power.sum() / max(1, int(kept.sum())))
    root = np.sqrt(power / np.maximum(kept, 1))
    return np.maximum(root, FLOOR * of_layer), np.sqrt(np.maximum(power, FLOOR**2 * power.mean()))


def _read(
    model: Model, solutions: Mapping[str, Solution], layers: Sequence[Layer], values: Mapping[str, AnyArray]
) -> dict[str, Solution]:
    """Solutions with the trained constants in place of the old ones."""
    written = model.copy()
    for name, value in values.items():
        try:
            written.set_constant(name, value)
        except ValueError as error:
            raise ModelError(f"a smaller step is needed (finish.rate): {error}") from error
    result = dict(solutions)
    for layer in layers:
        result[layer.name] = replace(
            result[layer.name],
            weight=read_weight(written, layer),
            biases=tuple(read_bias(written, layer, place) for place in layer.places),
        )
    return result
