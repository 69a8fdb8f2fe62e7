"""Write the small TensorFlow and Paddle models that the tests load, with random weights of a fixed seed.

The models hold a convolution, a depthwise convolution, BatchNorm and a matrix product, a few kilobytes each:

- ``conv_net.tflite``: TFLite, batch size 1, NHWC;
- ``conv_net_saved_model/``: TensorFlow SavedModel, any batch size, NHWC;
- ``conv_net.pdmodel`` with ``conv_net.pdiparams``: Paddle, any batch size, NCHW.

Neither framework is a dependency of this project. Run the tool in an environment of its own for each::

    python -m venv /tmp/tensorflow
    /tmp/tensorflow/bin/pip install tensorflow-cpu
    /tmp/tensorflow/bin/python tools/make_fixtures.py tensorflow --output tests/fixtures

    python -m venv /tmp/paddle
    /tmp/paddle/bin/pip install paddlepaddle
    /tmp/paddle/bin/python tools/make_fixtures.py paddle --output tests/fixtures
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20240607
SIZE = 8
CHANNELS = (3, 6, 5)


def random_weights(*shapes: tuple[int, ...]) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """One array for each shape, the same ones each time."""
    rng = np.random.default_rng(SEED)
    return [rng.normal(scale=0.5, size=shape).astype(np.float32) for shape in shapes]


def tensorflow_net(tf: Any) -> Any:
    """A ``tf.Module`` whose ``serve`` maps pictures to logits."""
    inputs, hidden, classes = CHANNELS
    conv, gamma, beta, mean, spread, depthwise, shift, dense, offset = random_weights(
        (3, 3, inputs, hidden),
        *[(hidden,)] * 4,
        (3, 3, hidden, 1),
        (hidden,),
        (hidden, classes),
        (classes,),
    )
    net = tf.Module()
    net.weights = {
        name: tf.Variable(value, trainable=False, name=name)
        for name, value in {
            "conv": conv,
            "gamma": gamma,
            "beta": beta,
            "mean": mean,
            "variance": 0.5 + spread**2,
            "depthwise": depthwise,
            "shift": shift,
            "dense": dense,
            "offset": offset,
        }.items()
    }

    def serve(image: Any) -> dict[str, Any]:
        w = net.weights
        x = tf.nn.conv2d(image, w["conv"], strides=2, padding="SAME")
        x, _, _ = tf.compat.v1.nn.fused_batch_norm(
            x, w["gamma"], w["beta"], w["mean"], w["variance"], epsilon=1e-3, is_training=False
        )
        x = tf.nn.depthwise_conv2d(tf.nn.relu(x), w["depthwise"], strides=[1, 1, 1, 1], padding="SAME")
        x = tf.reduce_mean(tf.nn.relu(x + w["shift"]), axis=[1, 2])
        return {"logits": tf.matmul(x, w["dense"]) + w["offset"]}

    net.serve = serve
    return net


def write_tensorflow(folder: Path) -> None:
    tf = importlib.import_module("tensorflow")

    def signature(net: Any, batch: int | None) -> Any:
        spec = tf.TensorSpec([batch, SIZE, SIZE, CHANNELS[0]], tf.float32, name="image")
        return tf.function(net.serve, input_signature=[spec], autograph=False)

    net = tensorflow_net(tf)
    fixed = signature(net, 1).get_concrete_function()
    (folder / "conv_net.tflite").write_bytes(
        tf.lite.TFLiteConverter.from_concrete_functions([fixed], net).convert()
    )
    net = tensorflow_net(tf)
    target = folder / "conv_net_saved_model"
    shutil.rmtree(target, ignore_errors=True)
    options = tf.saved_model.SaveOptions(save_debug_info=False)
    tf.saved_model.save(net, str(target), signatures=signature(net, None), options=options)
    (target / "assets").rmdir()
    (target / "fingerprint.pb").unlink()


def write_paddle(folder: Path) -> None:
    # OpenVINO reads .pdmodel files only.
    os.environ["FLAGS_enable_pir_api"] = "0"  # noqa: SIM112
    paddle = importlib.import_module("paddle")
    inputs, hidden, classes = CHANNELS
    net = paddle.nn.Sequential(
        paddle.nn.Conv2D(inputs, hidden, 3, stride=2, padding=1),
        paddle.nn.BatchNorm2D(hidden),
        paddle.nn.ReLU(),
        paddle.nn.Conv2D(hidden, hidden, 3, padding=1, groups=hidden),
        paddle.nn.ReLU(),
        paddle.nn.AdaptiveAvgPool2D(1),
        paddle.nn.Flatten(),
        paddle.nn.Linear(hidden, classes),
    )
    state = net.state_dict()
    for tensor, value in zip(
        state.values(), random_weights(*[tuple(t.shape) for t in state.values()]), strict=True
    ):
        tensor.set_value(value)
    net[1]._variance.set_value(0.5 + net[1]._variance.numpy() ** 2)
    net.eval()
    spec = paddle.static.InputSpec([None, inputs, SIZE, SIZE], "float32", "image")
    paddle.jit.save(net, str(folder / "conv_net"), input_spec=[spec])
    (folder / "conv_net.pdiparams.info").unlink()
    program = folder / "conv_net.pdmodel"
    program.write_bytes(without_paths(program.read_bytes()))


def without_paths(program: bytes) -> bytes:
    """Blank the file names in the call stacks that Paddle saves with every operator; lengths stay as they are."""
    return re.sub(rb'File "[^"]*"', lambda found: b'File "' + b"." * (len(found.group()) - 7) + b'"', program)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("framework", choices=["tensorflow", "paddle"], help="which models to write")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    writers = {"tensorflow": write_tensorflow, "paddle": write_paddle}
    writers[arguments.framework](arguments.output)


if __name__ == "__main__":
    main()
