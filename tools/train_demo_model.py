"""Train and export the demo network: a small CNN on the handwritten digits that come with scikit-learn.

Everything is numpy: forward, backward, BatchNorm with running statistics, Adam. The network holds one
of each thing that matters to pruning: a convolution, a residual addition, a depthwise and a pointwise
convolution and a linear head, each convolution followed by BatchNorm, which stays a node of its own in the
exported file.

Writes ``digits_cnn.onnx``, ``digits_calibration.npz`` (training images, no labels used),
``digits_validation.npz`` (the test split with its labels) and ``digits_cnn.json`` (seed, accuracy, command).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from demo_network import Array, Chain, Exporter, Parameter, build_network
from numpy.typing import NDArray
from onnx import TensorProto, helper
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

Labels = NDArray[np.int64]

SCALE = 16.0  # pixels are 0..16; the network sees them divided by this
TEST_IMAGES = 597
CALIBRATION_IMAGES = 300
ASSETS = Path(__file__).resolve().parents[1] / "pot_sparsity" / "demo_assets"


def augment(images: Array, rng: np.random.Generator) -> Array:
    """Rotate, scale, shear and shift every image a little (bilinear, zeros outside): [n, 8, 8, 1]."""
    n, height, width, _ = images.shape
    angle = rng.uniform(-0.2, 0.2, (n,))
    zoom = rng.uniform(0.9, 1.12, (n, 2))
    shear = rng.uniform(-0.15, 0.15, (n,))
    shift = rng.uniform(-0.8, 0.8, (n, 2))
    row, column = (np.arange(height) - 3.5)[:, None], (np.arange(width) - 3.5)[None, :]
    cosine, sine = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    y = (cosine * row - sine * column) * zoom[:, 0, None, None] + shift[:, 0, None, None] + 3.5
    x = (sine * row + cosine * column + shear[:, None, None] * row) * zoom[:, 1, None, None]
    x = x + shift[:, 1, None, None] + 3.5
    padded = np.pad(images[..., 0], ((0, 0), (2, 2), (2, 2)))
    y, x = np.clip(y + 2, 0, height + 2.999), np.clip(x + 2, 0, width + 2.999)
    top, left = np.floor(y).astype(np.intp), np.floor(x).astype(np.intp)
    down, right = y - top, x - left
    index = np.arange(n)[:, None, None]
    upper = padded[index, top, left] * (1 - right) + padded[index, top, left + 1] * right
    lower = padded[index, top + 1, left] * (1 - right) + padded[index, top + 1, left + 1] * right
    return np.asarray((upper * (1 - down) + lower * down)[..., None], np.float32)


def loss_gradient(logits: Array, labels: Labels, smoothing: float = 0.05) -> tuple[float, Array]:
    """Mean cross-entropy with label smoothing, and its gradient [n, classes]."""
    n, classes = logits.shape
    shifted = logits - logits.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = np.full((n, classes), smoothing / classes, np.float32)
    target[np.arange(n), labels] += np.float32(1 - smoothing)
    loss = float(-(target * log_probability).sum() / n)
    return loss, np.asarray((np.exp(log_probability) - target) / n, np.float32)


def adam_step(parameters: Sequence[Parameter], step: int, rate: float, decay: float = 0.02) -> None:
    """One step of AdamW (decoupled weight decay) in place."""
    for p in parameters:
        p.first += np.float32(0.1) * (p.gradient - p.first)
        p.second += np.float32(0.001) * (p.gradient * p.gradient - p.second)
        update = (p.first / (1 - 0.9**step)) / (np.sqrt(p.second / (1 - 0.999**step)) + 1e-8)
        if p.decay:
            update = update + decay * p.value
        p.value -= (rate * update).astype(np.float32)


def train(network: Chain, images: Array, labels: Labels, epochs: int, rng: np.random.Generator) -> None:
    """Train in place with AdamW, a one-epoch warm-up and a cosine decay of the rate."""
    batch = 64
    steps_per_epoch = len(images) // batch
    total, step = epochs * steps_per_epoch, 0
    for epoch in range(epochs):
        order, losses = rng.permutation(len(images)), []
        for chosen in order[: steps_per_epoch * batch].reshape(-1, batch):
            step += 1
            rate = 3e-3 * min(step / steps_per_epoch, 0.5 * (1 + np.cos(np.pi * step / total)))
            logits = network.forward(augment(images[chosen], rng), training=True)
            loss, gradient = loss_gradient(logits, labels[chosen])
            network.backward(gradient)
            adam_step(network.parameters(), step, float(rate))
            losses.append(loss)
        if epoch % 10 == 9 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}", file=sys.stderr)


def export_model(network: Chain) -> onnx.ModelProto:
    """The trained network as ONNX, with BatchNorm kept and a free batch dimension."""
    to = Exporter()
    network.export(to, "images")
    to.nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        to.nodes,
        "digits_cnn",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        to.initializers,
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, producer_name="pot-sparsity demo", opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def predict_onnx(model: onnx.ModelProto, images: Array) -> Array:
    """Logits [n, 10] that ONNX Runtime computes for [n, 8, 8, 1] images."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": images.transpose(0, 3, 1, 2)})[0], np.float32)


def accuracy(logits: Array, labels: Labels) -> float:
    """Top-1 accuracy in percent."""
    return float(100 * np.mean(logits.argmax(1) == labels))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the split, the weights and the augmentation"
    )
    parser.add_argument("--epochs", type=int, default=60, help="passes over the 1,200 training images")
    parser.add_argument(
        "--threads", type=int, default=2, help="BLAS threads (part of what decides the last bits)"
    )
    parser.add_argument("-o", "--output", type=Path, default=ASSETS, help="folder to write to")
    arguments = parser.parse_args()

    digits = load_digits()
    pixels = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    split, weights, draws = (np.random.default_rng([arguments.seed, stream]) for stream in range(3))
    order = split.permutation(len(pixels))
    testing, training = order[:TEST_IMAGES], order[TEST_IMAGES:]
    images = (pixels / SCALE).astype(np.float32)

    started = time.perf_counter()
    network = build_network(weights)
    with threadpool_limits(arguments.threads):
        train(network, images[training], labels[training], arguments.epochs, draws)
        own = network.forward(images[testing], training=False)
    print(f"trained in {time.perf_counter() - started:.0f} s", file=sys.stderr)

    model = export_model(network)
    exported = predict_onnx(model, images[testing])
    if not np.allclose(own, exported, atol=1e-3) or np.any(own.argmax(1) != exported.argmax(1)):
        print("the exported model does not compute what was trained", file=sys.stderr)
        return 1

    arguments.output.mkdir(parents=True, exist_ok=True)
    onnx.save(model, arguments.output / "digits_cnn.onnx")
    calibration = training[:CALIBRATION_IMAGES]
    np.savez_compressed(arguments.output / "digits_calibration.npz", images=pixels[calibration])
    np.savez_compressed(
        arguments.output / "digits_validation.npz", images=pixels[testing], labels=labels[testing]
    )
    facts = {
        "command": f"python tools/train_demo_model.py --seed {arguments.seed} --epochs {arguments.epochs}",
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "training_images": len(training),
        "test_images": len(testing),
        "calibration_images": len(calibration),
        "test_accuracy": round(accuracy(exported, labels[testing]), 3),
        "parameters": int(sum(parameter.value.size for parameter in network.parameters())),
        "model_bytes": (arguments.output / "digits_cnn.onnx").stat().st_size,
        "mean_values": [0.0],
        "scale_values": [SCALE],
    }
    (arguments.output / "digits_cnn.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
