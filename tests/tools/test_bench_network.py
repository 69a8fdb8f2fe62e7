"""The benchmark networks and the arithmetic estimates."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pot_sparsity.graph.discovery import find_layers
from pot_sparsity.graph.load import load_model
from tests.tools.loading import tool

models = tool("network_models")
bench = tool("bench_network")

TINY = ["--network", "encoder", "--blocks", "1", "--width", "16", "--sequence", "8", "--images", "4"]


def _run(model: onnx.ModelProto, value: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: value})
    return np.asarray(found)


@pytest.fixture(scope="module")
def narrow_resnet() -> onnx.ModelProto:
    model = models.resnet50(np.random.default_rng(0), narrow=16)
    assert isinstance(model, onnx.ModelProto)
    return model


def test_resnet50_runs_any_batch_and_has_no_constant_activations(narrow_resnet: onnx.ModelProto) -> None:
    onnx.checker.check_model(narrow_resnet)
    images = models.synthetic_images(np.random.default_rng(1), 3)
    scores = _run(narrow_resnet, images)
    assert scores.shape == (3, 1000)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, rtol=1e-4)
    assert np.abs(scores[0] - scores[1]).max() > 1e-6


def test_resnet50_keeps_the_shape_of_the_architecture(narrow_resnet: onnx.ModelProto) -> None:
    layers = find_layers(load_model(narrow_resnet).graph).layers
    assert len(layers) == 54
    assert {(layer.rows, layer.cols) for layer in layers} >= {(4, 147), (32, 32 * 9), (128, 32), (1000, 128)}
    # ResNet-50 has 25.5 million weights; all but the first convolution and the classifier shrink by 16^2.
    full = 25_502_912 - 64 * 147 - 2048 * 1000
    assert sum(layer.size for layer in layers) == full // 256 + 4 * 147 + 128 * 1000


def test_resnet50_batchnorms_are_identities(narrow_resnet: onnx.ModelProto) -> None:
    values = {t.name: onnx.numpy_helper.to_array(t) for t in narrow_resnet.graph.initializer}
    norms = [node for node in narrow_resnet.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == 53
    for node in norms:
        for name, expected in zip(node.input[1:], (1.0, 0.0, 0.0, 1.0), strict=True):
            assert (values[name] == expected).all()


def test_he_scaled_variance() -> None:
    weight = models.he_scaled(np.random.default_rng(0), (300, 200), 200)
    assert weight.dtype == np.float32
    assert weight.var() == pytest.approx(2 / 200, rel=0.03)


def _oracle_block(values: dict[str, np.ndarray], tokens: np.ndarray, heads: int) -> np.ndarray:
    """A block with the norm first, and the last norm, for one sample in float64."""

    def norm(x: np.ndarray) -> np.ndarray:
        return np.asarray((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5))

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ values[f"block0_{name}_weight"].astype(np.float64))

    erf = np.vectorize(math.erf)
    inner = norm(tokens)
    query, key, value = (linear(inner, f"attention_{part}") for part in ("query", "key", "value"))
    size = tokens.shape[1] // heads
    mixed = np.empty_like(tokens)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        score = np.exp(query[:, part] @ key[:, part].T / np.sqrt(size))
        mixed[:, part] = score / score.sum(1, keepdims=True) @ value[:, part]
    tokens = tokens + linear(mixed, "attention_output")
    hidden = linear(norm(tokens), "mlp1")
    hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    return norm(tokens + linear(hidden, "mlp2"))


def test_encoder_computes_what_a_transformer_does() -> None:
    random = np.random.default_rng(0)
    model = models.encoder(random, blocks=1, width=12, hidden=20, sequence=5, heads=3)
    onnx.checker.check_model(model)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tokens = models.synthetic_tokens(random, 2, 5, 12)
    found = _run(model, tokens)
    for sample in range(2):
        expected = _oracle_block(values, tokens[sample].astype(np.float64), 3)
        np.testing.assert_allclose(found[sample], expected, atol=2e-4)


def test_encoder_has_six_layers_per_block() -> None:
    model = models.encoder(np.random.default_rng(0), blocks=2, width=8, hidden=16, sequence=4, heads=2)
    layers = find_layers(load_model(model).graph).layers
    assert sorted((layer.rows, layer.cols) for layer in layers) == sorted(
        [(8, 8)] * 8 + [(16, 8), (8, 16)] * 2
    )


def test_encoder_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        models.encoder(np.random.default_rng(0), blocks=1, width=8, hidden=8, sequence=4, heads=3)


def test_synthetic_samples_have_unit_variance_and_are_correlated() -> None:
    images = models.synthetic_images(np.random.default_rng(0), 2, 64)
    assert images.shape == (2, 3, 64, 64)
    assert images.std() == pytest.approx(1.0, rel=1e-4)
    assert np.corrcoef(images[..., 1:].ravel(), images[..., :-1].ravel())[0, 1] > 0.3
    tokens = models.synthetic_tokens(np.random.default_rng(0), 8, 16, 32)
    eigenvalues = np.linalg.eigvalsh(np.cov(tokens.reshape(-1, 32).T))
    assert tokens.std() == pytest.approx(1.0, rel=1e-4)
    assert eigenvalues[-1] > 5 * eigenvalues[16]


def test_gflop_of_inference_and_moments() -> None:
    model = load_model(
        models.encoder(np.random.default_rng(0), blocks=1, width=8, hidden=16, sequence=4, heads=2)
    )
    layers = find_layers(model.graph).layers
    weights, squares = 4 * 64 + 2 * 128, 5 * 64 + 256
    assert bench.inference_gflop(layers, model, 10) == pytest.approx(2 * weights * 4 * 10 / 1e9)
    assert bench.moments_gflop(layers, model, 10) == pytest.approx(2 * squares * 4 * 10 / 1e9)


def test_smoke_run_prints_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*TINY, "--threads", "1", "--peak-size", "64", "--held-out", "2"]
    assert bench.main(given) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["sgemm_peak_gflops"] > 0
    stages = {line["stage"]: line for line in lines if "stage" in line}
    assert list(stages) == ["preparation", "moments: inference", "moments: products", "pruning"]
    # 4 samples, 2 held-out ones and 1 that finds the batch size, each twice.
    weights = 4 * 256 + 2 * 1024
    assert stages["moments: inference"]["gflop"] == pytest.approx(2 * weights * 8 * 8 / 1e9, abs=1e-3)
    # At least one iteration of ADMM on every layer.
    assert stages["pruning"]["gflop"] > 2 * (4 * 16**3 + 64 * 16**2 + 16 * 64**2) / 1e9
    layers = [line for line in lines if "layer" in line]
    assert len(layers) == 6
    assert [line["seconds"] for line in layers] == sorted((line["seconds"] for line in layers), reverse=True)
    assert lines[-1]["weights"] == weights
    assert lines[-1]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_other_methods_have_no_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--threads", "1", "--peak-size", "64", "--method", "magnitude"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (pruning,) = [line for line in lines if line.get("stage") == "pruning"]
    assert pruning["gflop"] is None
    assert pruning["of_sgemm_peak"] is None


def test_illegal_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given, text in ((["--narrow", "3"], "must divide 64"), (["--images", "0"], "must be at least 1")):
        with pytest.raises(SystemExit, match="2"):
            bench.parse(given)
        assert text in capsys.readouterr().err
    assert bench.main([*TINY, "--sparsity", "1.5", "--peak-size", "64"]) == 2
    assert "sparsity" in capsys.readouterr().err
